# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Talks to the VMs of the driver ``qmp`` on the host this runs on. What they answer is judged in ``_vm_facts``.

A VM is an environment file ``CONFIG_DIR/NAME.conf``, run by the systemd unit ``hecaton-vm@NAME.service``, whose QEMU listens
on ``RUN_DIR/vm/NAME/agent.sock``. That socket takes one client at a time, so every connection here is short.
"""

from __future__ import annotations

import os
import time

from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpClient, QmpError
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import RamFile, RemoteRamError, is_remote_ram

# QEMU takes up to 16384, and looks at this many pages of each GiB: 16 MiB read twice, which is nothing to notice.
_SAMPLE_PAGES = 4096

# Properties of a device that say what of the host it uses.
_DEVICE_PROPERTIES = ("host", "sysfsdev", "vhostdev", "wwpn", "vendorid", "productid", "hostbus", "hostaddr", "fsdev", "mount_tag", "tag", "failover_pair_id")
# Only devices whose type starts so are asked for them.
_DEVICE_PREFIXES = ("vfio-", "usb-host", "scsi-generic", "scsi-block", "vhost-", "virtio-9p", "u2f-passthru")


def names(config_dir: str, run_dir: str) -> list[str]:
    """The VMs that are configured or run here."""
    found = set()
    try:
        found.update(entry[:-len(".conf")] for entry in os.listdir(config_dir) if entry.endswith(".conf") and not entry.startswith("."))
    except FileNotFoundError:
        pass
    try:
        # One that runs without its file was moved or taken out of the configuration: it still has to leave the host.
        folder = os.path.join(run_dir, "vm")
        found.update(entry for entry in os.listdir(folder) if os.path.exists(os.path.join(folder, entry, "agent.sock")))
    except FileNotFoundError:
        pass
    return sorted(found)


def agent_socket(run_dir: str, name: str) -> str:
    return os.path.join(run_dir, "vm", name, "agent.sock")


def open_agent(run_dir: str, name: str, timeout: float = 5.0) -> QmpClient | None:
    """A connection to a VM's QEMU, None when no QEMU runs.

    :raises QmpError: it runs, but gives no answer: it hangs, or another client keeps the socket busy.
    """
    try:
        return QmpClient(agent_socket(run_dir, name), timeout)
    except QmpError as err:
        if isinstance(err.__cause__, (FileNotFoundError, ConnectionRefusedError)):
            return None
        raise


def query(client: QmpClient) -> dict:
    """All that facts are made of: the answers of QEMU by command, ``arguments``, ``machine``, ``cpu``, ``memory``, ``objects`` and
    ``devices``, which QEMU's object model answers; ``resident``, bytes of memory that its QEMU takes, or None; ``arriving``, whether the
    kernel module still fetches some of its memory, and ``pages_lost``, of how many pages of 4 KiB the contents are nowhere since a move.

    :raises QmpError: the connection was lost.
    """
    answers = {
        command: client.execute(command)
        for command in ("query-status", "query-uuid", "query-memory-size-summary", "query-cpus-fast", "query-block", "query-migrate", "query-block-jobs")
    }
    answers["arguments"] = _arguments(client.peer_pid())
    answers["resident"] = _resident(client.peer_pid())
    answers["machine"] = _property(client, "/machine", "type")
    vcpus = answers["query-cpus-fast"]
    answers["cpu"] = _property(client, vcpus[0]["qom-path"], "type") if vcpus else None
    objects = _children(client, "/objects")
    answers["objects"] = [kind for _name, kind in objects]
    answers["memory"] = [
        {"id": name, "type": kind, **{key: _property(client, f"/objects/{name}", key) for key in ("mem-path", "share", "hugetlb")}}
        for name, kind in objects if kind.startswith("memory-backend-")
    ]
    arrivals = [_arrival(memory["mem-path"]) for memory in answers["memory"] if memory["mem-path"]]
    answers["arriving"] = any(arriving for arriving, _lost in arrivals)
    answers["pages_lost"] = sum(lost for _arriving, lost in arrivals)
    answers["devices"] = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for name, kind in _children(client, folder):
            device = {"type": kind}
            if kind.startswith(_DEVICE_PREFIXES):
                device.update({key: _property(client, f"{folder}/{name}", key) for key in _DEVICE_PROPERTIES})
                if folder == "/machine/peripheral":
                    device["id"] = name
            elif kind.startswith("virtio-balloon"):
                device["free-page-hint"] = _property(client, f"{folder}/{name}", "free-page-hint")
            answers["devices"].append(device)
    return answers


def _arrival(path: str) -> tuple[bool, int]:
    """What QEMU doesn't know of a file that is memory: whether some is still to come by the kernel module, and how many pages never will."""
    if not is_remote_ram(path):
        return False, 0
    try:
        with RamFile(path, read_only=True) as ram:
            entry = ram.stats()
    except RemoteRamError:
        return False, 0
    # At a source it is what its destination has lost.
    return entry["role"] == "destination" and entry["state"] in ("postcopy", "reconnecting"), 0 if entry["role"] == "source" else entry["pages_lost"]


def _arguments(pid: int) -> list[str]:
    """QEMU's command line; empty when it can't be read."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read().split("\0")[1:-1]
    except OSError:
        return []


def _resident(pid: int) -> int | None:
    """Bytes of memory that a process takes, which would be free without it; None when it can't be read. What it maps of programs is not its own."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="surrogateescape") as stream:
            sizes = dict(line.split(":", 1) for line in stream if line.startswith("Rss"))
        return sum(int(sizes[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _property(client: QmpClient, path: str, name: str):
    """A property of an object, None when it has no such property."""
    try:
        return client.execute("qom-get", {"path": path, "property": name})
    except QmpError as err:
        if err.kind == "ConnectionError":
            raise
        return None


def _children(client: QmpClient, path: str) -> list[tuple[str, str]]:
    """The (name, type) of the objects below a path."""
    try:
        listed = client.execute("qom-list", {"path": path})
    except QmpError as err:
        if err.kind == "ConnectionError":
            raise
        return []
    return [(entry["name"], entry["type"][len("child<"):-1]) for entry in listed if entry["type"].startswith("child<")]


def start_dirty_rates(run_dir: str, vms: list[str], seconds: int, timeout: float = 5.0):
    """Starts to measure how fast guests write; returns a function that takes the patience in seconds and returns
    {name: MiB/s, or an error message}."""
    results: dict = {}
    waiting = []
    for name in vms:
        error = _ask(run_dir, name, timeout, "calc-dirty-rate", {"calc-time": seconds, "sample-pages": _SAMPLE_PAGES})[1]
        if error:
            results[name] = error
        else:
            waiting.append(name)

    def collect(patience: float = 10.0) -> dict:
        deadline = time.monotonic() + patience
        while waiting:
            for name in list(waiting):
                answer, error = _ask(run_dir, name, timeout, "query-dirty-rate")
                if error:
                    results[name] = error
                    waiting.remove(name)
                elif answer["status"] == "measured":
                    rate = answer.get("dirty-rate", -1)
                    results[name] = float(rate) if rate >= 0 else "QEMU could not measure it"
                    waiting.remove(name)
            if waiting and time.monotonic() >= deadline:
                results.update((name, "QEMU gave no result in time") for name in waiting)
                break
            if waiting:
                time.sleep(0.1)
        return results

    return collect


def _ask(run_dir: str, name: str, timeout: float, command: str, arguments: dict | None = None) -> tuple:
    """(answer, None) or (None, why there is none)."""
    try:
        client = open_agent(run_dir, name, timeout)
        if client is None:
            return None, "its QEMU has ended"
        with client:
            return client.execute(command, arguments), None
    except QmpError as err:
        return None, str(err)
