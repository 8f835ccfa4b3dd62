#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: remote_ram_info
short_description: Says how the guest memory on remote_ram is doing
version_added: 0.1.0
description:
  - Returns the files of the C(remote_ram) file systems of a host. Each is the memory of a VM, or a part of it.
  - For a file that is being moved it says how far that is, how its pages came, and how long the guest waited for them.
  - Runs on the hypervisor and changes nothing there.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
attributes:
  check_mode:
    support: full
    details: Nothing is ever changed.
  diff_mode:
    support: N/A
    details: Nothing is ever changed.
  idempotent:
    support: full
options:
  path:
    description:
      - Look only at the file system that is mounted here. It is an error when there is none.
      - By default, at all of them.
    type: path
  files:
    description: Return only files of these names. By default, all.
    type: list
    elements: str
seealso:
  - module: hecaton.fleet.kmod
  - module: hecaton.fleet.vm_info
  - module: hecaton.fleet.vm_migrate
"""

EXAMPLES = r"""
- name: See how all guest memory on remote_ram is doing
  hecaton.fleet.remote_ram_info:
  register: ram

- name: Wait until the source of a VM is needed no more
  hecaton.fleet.remote_ram_info:
    files: [web1.ram]
  register: ram
  until: ram.mounts | map(attribute='files') | flatten | map(attribute='state') is not in [['postcopy'], ['reconnecting']]
  retries: 60
  delay: 2
"""

RETURN = r"""
loaded:
  description: Whether the kernel module is loaded.
  returned: success
  type: bool
mounts:
  description: The file systems, by path.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Where it is mounted.
      type: str
    size_mib:
      description: Limit of the sizes of its files together, in MiB; null for none.
      type: int
    free_mib:
      description: What is left of that limit, in MiB; null for none.
      type: int
    files:
      description: Its files, by name.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the file, below the mount.
          type: str
        size_mib:
          description: Its size, in MiB.
          type: int
        resident_mib:
          description: How much of it is in memory here, or swapped out, in MiB.
          type: int
        role:
          description: V(source) or V(destination) of a move, or V(none).
          type: str
        state:
          description:
            - Where the move is. V(none), V(listening), V(connecting), V(connected), V(precopy), V(switching), V(postcopy), V(reconnecting),
              V(complete), V(failed) or V(lost).
            - V(reconnecting) is as V(postcopy), while there is no connection. V(failed) ended before the VM had moved, V(lost) with
              memory that never arrived.
          type: str
        reason:
          description: Why it is not where it should be, empty for nothing.
          type: str
        rounds:
          description: Rounds of pre-copy that were begun, on a source.
          type: int
        pages:
          description:
            - Pages of 4 KiB. C(total) of the file; C(missing) not here, on a destination; C(dirty) not at the destination, on a source; C(lost).
            - How they came. C(ahead) before the VM moved, C(zero) by name alone, C(demand) because the guest waited, C(bubble) around those,
              C(background) otherwise. C(stale) came ahead and were dropped, because they had changed since.
          type: dict
        faults:
          description:
            - How often the guest touched a page that was not here. C(nowait) could not wait, and came again as one of the others;
              C(retry) and C(plain) waited; C(joined) of them for a page that was on its way already; C(poison) was told that the page is lost.
            - C(mean_us) and C(max_us) are how long it waited. C(histogram) counts waits, each entry with C(below_us) and C(count).
              C(median_below_us) and C(p99_below_us) are bounds from the histogram.
            - The times are null when nobody has waited.
          type: dict
        reads:
          description: The RDMA READs of single pages behind those faults, with the same fields for their times.
          type: dict
        bytes_ahead:
          description: Bytes that were read before the VM moved.
          type: int
        bytes_after:
          description: Bytes that were read after it.
          type: int
        rate_mib:
          description: What comes now, in MiB a second.
          type: float
        remaining_seconds:
          description: How long the rest will take, null when that is not known.
          type: float
        switch_seconds:
          description: How long handing the VM's memory over took.
          type: float
        precopy_seconds:
          description: How long pre-copy ran.
          type: float
        reconnects:
          description: Connections that were lost and taken up again.
          type: int
        late_writes:
          description: Writes to the source after the VM had moved. More than 0 says that the VM ran on both sides.
          type: int
        overhead_kib:
          description: Memory that the module holds for this file besides its pages, in KiB.
          type: int
  sample:
    - path: /run/remote_ram
      size_mib: 2048
      free_mib: 1920
      files:
        - name: web1.ram
          size_mib: 128
          resident_mib: 81
          role: destination
          state: postcopy
          reason: ""
          rounds: 0
          pages: {total: 32768, missing: 11800, dirty: 0, lost: 0, ahead: 40960, zero: 900, demand: 310, bubble: 2100, background: 6200, stale: 20410}
          faults:
            nowait: 280
            retry: 322
            plain: 0
            joined: 12
            poison: 0
            mean_us: 61.5
            max_us: 410.0
            median_below_us: 64
            p99_below_us: 256
            histogram: [{below_us: 64, count: 240}, {below_us: 256, count: 80}, {below_us: 512, count: 2}]
          reads: {mean_us: 40.2, median_below_us: 64, p99_below_us: 128, histogram: [{below_us: 64, count: 300}, {below_us: 128, count: 10}]}
          bytes_ahead: 167772160
          bytes_after: 35266560
          rate_mib: 412.5
          remaining_seconds: 0.112
          switch_seconds: 0.004
          precopy_seconds: 2.0
          reconnects: 0
          late_writes: 0
          overhead_kib: 310
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import RamFile, RemoteRamError

MIB = 1 << 20


def mounts(text: str) -> list:
    """Where remote_ram is mounted, by /proc/self/mounts."""
    found = []
    for line in text.splitlines():
        _device, path, kind = line.split(" ")[:3]
        if kind == "remote_ram":
            # Blanks and the like are written in octal.
            found.append(path.encode("latin-1").decode("unicode_escape").encode("latin-1").decode("utf-8", "surrogateescape"))
    return sorted(set(found))


def times(histogram: list, total_ns: int) -> dict:
    """What is known of times from their histogram and their sum. Bucket n holds what took less than 2^n us."""
    count = sum(histogram)

    def below(share):
        seen = 0
        for bucket, n in enumerate(histogram):
            seen += n
            if seen >= share * count:
                return 1 << bucket
        return None

    return {
        "mean_us": round(total_ns / count / 1000, 1) if count else None,
        "median_below_us": below(0.5) if count else None,
        "p99_below_us": below(0.99) if count else None,
        "histogram": [{"below_us": 1 << bucket, "count": n} for bucket, n in enumerate(histogram) if n],
    }


def describe(name: str, size: int, resident: int, stats: dict) -> dict:
    """A file as this module returns it."""
    faults = times(stats["wait_hist"], stats["wait_ns_total"])
    faults["max_us"] = round(stats["wait_ns_max"] / 1000, 1) if faults["histogram"] else None
    faults.update({key: stats[f"faults_{key}"] for key in ("nowait", "retry", "plain", "joined", "poison")})
    ways = ("missing", "dirty", "lost", "ahead", "zero", "demand", "bubble", "background", "stale")
    return {
        "name": name,
        "size_mib": size // MIB,
        "resident_mib": resident // MIB,
        **{key: stats[key] for key in ("role", "state", "reason", "rounds", "bytes_ahead", "bytes_after", "reconnects", "late_writes")},
        "pages": {"total": stats["pages"], **{way: stats[f"pages_{way}"] for way in ways}},
        "faults": faults,
        "reads": times(stats["read_hist"], stats["read_ns_total"]),
        "rate_mib": round(stats["rate"] / MIB, 1),
        "remaining_seconds": None if stats["remaining_us"] is None else stats["remaining_us"] / 1e6,
        "switch_seconds": stats["switch_us"] / 1e6,
        "precopy_seconds": stats["precopy_us"] / 1e6,
        "overhead_kib": stats["memory"] // 1024,
    }


def look(top: str, name: str) -> dict | None:
    """A file, None when it is gone meanwhile."""
    path = os.path.join(top, name)
    try:
        found = os.lstat(path)
        with RamFile(path, read_only=True) as file:
            return describe(name, found.st_size, found.st_blocks * 512, file.stats())
    except (FileNotFoundError, RemoteRamError):
        if os.path.lexists(path):
            raise
        return None


def mount(path: str, names: list | None) -> dict:
    limits = os.statvfs(path)
    there = sorted(os.path.relpath(os.path.join(folder, name), path) for folder, _folders, found in os.walk(path) for name in found)
    files = [look(path, name) for name in there if not names or name in names]
    return {
        "path": path,
        "size_mib": limits.f_blocks * limits.f_frsize // MIB if limits.f_blocks else None,
        "free_mib": limits.f_bavail * limits.f_frsize // MIB if limits.f_blocks else None,
        "files": [file for file in files if file],
    }


def run(params: dict) -> dict:
    with open("/proc/self/mounts", encoding="latin-1") as stream:
        found = mounts(stream.read())
    if params["path"]:
        wanted = os.path.realpath(params["path"])
        if wanted not in found:
            raise RemoteRamError(f"no remote_ram file system is mounted on {params['path']} (mounted: {', '.join(found) or 'none'})")
        found = [wanted]
    return {"changed": False, "loaded": os.path.isdir("/sys/module/remote_ram"), "mounts": [mount(path, params["files"]) for path in found]}


def main():
    module = AnsibleModule(
        argument_spec={"path": {"type": "path"}, "files": {"type": "list", "elements": "str"}},
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module.params))
    except (RemoteRamError, OSError) as err:
        module.fail_json(msg=str(err))


if __name__ == "__main__":
    main()
