# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""What a hypervisor is, decided from what the kernel and QEMU print about themselves.

Pure functions over text: the caller reads the files and runs the commands.
"""

from __future__ import annotations

import os
import re

# File systems that every host of a fleet sees alike (what libvirt counts as shared, and the usual FUSE clients).
SHARED_FILE_SYSTEMS = frozenset((
    "nfs", "nfs4", "ceph", "gfs2", "ocfs2", "cifs", "smb3", "smbfs", "afs", "lustre", "gpfs", "beegfs", "fhgfs", "orangefs", "acfs",
    "fuse.glusterfs", "glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.quobyte", "fuse.mfs", "fuse.moosefs", "fuse.lizardfs",
    "fuse.juicefs",
))

# libvirt gives QEMU /dev/userfaultfd by itself since this release.
_LIBVIRT_OPENS_USERFAULTFD = (10, 1, 0)


class Storage:
    """Knows which paths of this host the other hosts see too.

    :param mounts: text of ``/proc/mounts``.
    :param shared_paths: what the operator declares to be shared: a path or another disk source; everything below it
        counts too.
    :param resolve: follows symbolic links, ``os.path.realpath`` on a real host.
    """

    def __init__(self, mounts: str = "", shared_paths: list | tuple = (), resolve=os.path.normpath):
        self._mounts = parse_mounts(mounts)
        self._declared = [path.rstrip("/") or "/" for path in shared_paths if path]
        self._resolve = resolve

    def file_system(self, path: str) -> str | None:
        """The type of the file system that holds ``path``, or None for what isn't an absolute path."""
        if not path.startswith("/"):
            return None
        path = self._resolve(path)
        best = ("", None)
        for mount_point, kind in self._mounts:
            # A later mount on the same point hides the one before.
            if _below(path, mount_point) and len(mount_point) >= len(best[0]):
                best = (mount_point, kind)
        return best[1]

    def declared(self, source: str) -> bool:
        """Whether the operator said that this source is shared."""
        candidates = {source}
        if source.startswith("/"):
            candidates.add(self._resolve(source))
        return any(_below(candidate, prefix) for candidate in candidates for prefix in self._declared)

    def is_shared(self, path: str) -> bool:
        """Whether a file at ``path`` is the same file on the other hosts."""
        return self.declared(path) or self.file_system(path) in SHARED_FILE_SYSTEMS


def _below(path: str, folder: str) -> bool:
    return folder == "/" and path.startswith("/") or path == folder or path.startswith(folder + "/")


def parse_mounts(text: str) -> list[tuple[str, str]]:
    """``/proc/mounts`` as (mount point, type), in its order."""
    mounts = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3:
            mounts.append((re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), fields[1]), fields[2]))
    return mounts


def parse_meminfo(text: str) -> dict:
    """``memory_total_mib`` and ``memory_available_mib`` from ``/proc/meminfo``."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    return {
        "memory_total_mib": int(values.get("MemTotal", 0)) // 1024,
        "memory_available_mib": int(values.get("MemAvailable", values.get("MemFree", 0))) // 1024,
    }


def parse_cpuinfo(text: str, arch: str) -> dict:
    """The ``cpu`` fact from ``/proc/cpuinfo``."""
    values = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())
    return {
        "vendor": values.get("vendor_id") or values.get("CPU implementer") or "",
        "model": values.get("model name") or values.get("Processor") or "",
        "arch": arch,
        "features": sorted(set((values.get("flags") or values.get("Features") or "").split())),
    }


def parse_machines(text: str) -> list[str]:
    """Machine types, aliases too, from ``qemu-system-x86_64 -machine help``."""
    names = set()
    for line in text.splitlines()[1:]:
        fields = line.split()
        if fields and fields[0] != "none":
            names.add(fields[0])
    return sorted(names)


def parse_qemu_version(text: str) -> str | None:
    """The version from ``qemu-system-x86_64 --version``."""
    found = re.search(r"version (\d+\.\d+\.\d+)", text)
    return found.group(1) if found else None


def version_text(number: int) -> str:
    """libvirt's and QEMU's packed version number as text: 11003000 is 11.3.0."""
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def engines(drivers: list, unprivileged: str | None, device: bool, libvirt_version: str | None = None, mounts: str = "",
            rdma_devices: list | None = None) -> dict:  # fmt: skip
    """What a host can do as a *destination*. QEMU's post-copy needs userfaultfd there, and nowhere else.

    :param drivers: those that the host has. One that can't use userfaultfd is enough of an obstacle: the plan chooses
        an engine for a pair of hosts.
    :param unprivileged: content of ``/proc/sys/vm/unprivileged_userfaultfd``; None when there is no such file.
    :param device: whether ``/dev/userfaultfd`` exists.
    :param mounts: content of ``/proc/mounts``.
    :param rdma_devices: names of the RDMA devices.
    """
    blockers = []
    if unprivileged is None:
        blockers.append(blocker("userfaultfd_missing", "the kernel has no userfaultfd (CONFIG_USERFAULTFD)"))
    elif "libvirt" in drivers and unprivileged.strip() != "1":
        version = tuple(int(part) for part in (libvirt_version or "0").split("."))
        if not device or version < _LIBVIRT_OPENS_USERFAULTFD:
            blockers.append(blocker(
                "userfaultfd_forbidden",
                "libvirt runs QEMU as an ordinary user, which this host does not let use userfaultfd: set the sysctl vm.unprivileged_userfaultfd to 1"))
    remote = []
    if not any(line.split()[2:3] == ["remote_ram"] for line in mounts.splitlines()):
        remote.append(blocker("remote_ram_missing", "no remote_ram file system is mounted (the playbook prepare does that)"))
    if not rdma_devices:
        remote.append(blocker("rdma_missing", "there is no RDMA device (the playbook prepare makes one)"))
    return {
        "remote_ram": {"usable": not remote, "blockers": remote},
        "precopy": {"usable": True, "blockers": []},
        "userfault": {"usable": not blockers, "blockers": blockers},
    }


def blocker(code: str, message: str) -> dict:
    """One reason why something can't be done: a code for programs, a sentence for people."""
    return {"code": code, "message": message}
