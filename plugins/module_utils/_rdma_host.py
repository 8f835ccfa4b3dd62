# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Talks to RDMA on the host this runs on: ``rdma`` of iproute2, sysfs, and pyverbs. What the answers mean is decided in ``_rdma``."""

from __future__ import annotations

import glob
import json
import os
import subprocess

from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError

INFINIBAND = "/sys/class/infiniband"
NET = "/sys/class/net"
MODULES = "/sys/module"
#: Where the connection manager's settings for a device are.
SETTINGS = "/sys/kernel/config/rdma_cm"


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command.

    :raises RdmaError: it is not installed, or failed (with ``check``).
    """
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except FileNotFoundError as err:
        package = {"rdma": "iproute2", "modprobe": "kmod", "modinfo": "kmod"}.get(command[0], command[0])
        raise RdmaError(f"{command[0]} is not installed on this host; install the package {package}", "not_installed") from err
    if check and done.returncode:
        raise RdmaError(f"'{' '.join(command)}' failed (exit status {done.returncode}): {(done.stderr or done.stdout).strip()}")
    return done


def rdma(*arguments: str) -> list:
    """What ``rdma -j`` answers."""
    done = run("rdma", "-j", "-d", *arguments)
    try:
        return json.loads(done.stdout or "[]")
    except ValueError as err:
        raise RdmaError(f"'rdma -j -d {' '.join(arguments)}' did not answer in JSON: {done.stdout[:200]!r}") from err


def read_text(path: str) -> str:
    """A file's text without white space around it, empty when it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def devices() -> list[dict]:
    """All RDMA devices of this host (see :func:`_rdma.devices`)."""
    drivers = {}
    for name in os.listdir(INFINIBAND) if os.path.isdir(INFINIBAND) else []:
        driver = os.path.join(INFINIBAND, name, "device", "driver")
        if os.path.exists(driver):
            drivers[name] = os.path.basename(os.path.realpath(driver))
    return _rdma.devices(rdma("dev", "show"), rdma("link", "show"), drivers)


def resources() -> dict:
    """Objects on all devices, by kind."""
    return {kind: rdma("resource", "show", kind) for kind in _rdma.IN_USE}


def interfaces() -> dict:
    """Network interfaces of this host, ``{name: {up, mtu, driver, type}}``; the type is ``loopback``, ``vlan``, another or None."""
    found = {}
    for name in os.listdir(NET):
        flags = read_text(os.path.join(NET, name, "flags"))
        if flags:
            driver = os.path.join(NET, name, "device", "driver")
            kinds = [line.split("=", 1)[1] for line in read_text(os.path.join(NET, name, "uevent")).splitlines() if line.startswith("DEVTYPE=")]
            found[name] = {
                "up": bool(int(flags, 16) & 1), "mtu": int(read_text(os.path.join(NET, name, "mtu")) or 0),
                "driver": os.path.basename(os.path.realpath(driver)) if os.path.exists(driver) else None,
                "type": "loopback" if int(flags, 16) & 8 else kinds[0] if kinds else None,
            }  # fmt: skip
    return found


def loaded(module: str) -> bool:
    """Whether a kernel module is loaded."""
    return os.path.isdir(os.path.join(MODULES, module))


def driver_state(kind: str) -> str:
    """Whether the driver of a soft device is ``loaded``, ``available`` or ``missing``."""
    return module_state(_rdma.SOFT[kind][0])


def module_state(module: str) -> str:
    """Whether a kernel module is ``loaded``, ``available`` or ``missing``."""
    if loaded(module):
        return "loaded"
    return "available" if run("modinfo", "-F", "filename", module, check=False).returncode == 0 else "missing"


def siw_source(kernel: str) -> str | None:
    """The distribution's archive with the source of a kernel's series, None when it isn't installed."""
    found = sorted(glob.glob(f"/usr/src/linux-source-{_rdma.series(kernel)}.tar.*"))
    return found[0] if found else None


def remove(name: str) -> None:
    """Removes a soft device, and what the connection manager was told about it, which would stay."""
    run("rdma", "link", "delete", name)
    try:
        os.rmdir(os.path.join(SETTINGS, name))
    except OSError:
        pass  # it was told nothing


def load(kind: str) -> None:
    """Loads the driver of a soft device.

    :raises RdmaError: there is none, or the kernel refuses it.
    """
    module = _rdma.SOFT[kind][0]
    state = driver_state(kind)
    if state == "loaded":
        return
    if state == "missing":
        how = "build it with hecaton.fleet.kmod_build or the role hecaton.fleet.rdma" if kind == "siw" else "install a kernel that has it"
        raise RdmaError(f"the kernel {os.uname().release} has no driver {module}; {how}", "no_driver")
    done = run("modprobe", module, check=False)
    if done.returncode:
        raise RdmaError(f"the driver {module} can't be loaded: {done.stderr.strip()}", "no_driver")


# ---- what only the verbs know


def verbs_module():
    """pyverbs, imported when it is first needed.

    :raises RdmaError: it is not installed.
    """
    try:
        import pyverbs.device
    except ImportError as err:
        raise RdmaError(f"pyverbs is missing on this host; install the package python3-pyverbs ({err})", "not_installed") from err
    return pyverbs.device


def verbs(name: str, ports: list) -> dict:
    """A device's limits and the MTU and GIDs of its ports.

    :param ports: port numbers.
    :returns: ``limits`` and ``ports``, ``{number: {mtu, max_mtu, gids}}``.
    :raises RdmaError: the device can't be asked.
    """
    device = verbs_module()
    from pyverbs.pyverbs_error import PyverbsError

    try:
        with device.Context(name=name) as context:
            attributes = context.query_device()
            found = {}
            for port in ports:
                queried = context.query_port(port)
                found[port] = {
                    "mtu": 128 << queried.active_mtu if queried.active_mtu else None,
                    "max_mtu": 128 << queried.max_mtu if queried.max_mtu else None,
                    "gids": gids(name, port),
                }
            return {
                "limits": {
                    "read_depth": attributes.max_qp_init_rd_atom, "read_depth_served": attributes.max_qp_rd_atom, "sge": attributes.max_sge,
                    "sge_read": attributes.max_sge_rd, "queue_pairs": attributes.max_qp, "work_requests": attributes.max_qp_wr,
                    "memory_regions": attributes.max_mr, "memory_region_bytes": attributes.max_mr_size, "completions": attributes.max_cqe,
                },
                "ports": found,
            }  # fmt: skip
    except PyverbsError as err:
        raise RdmaError(f"the device {name} can't be asked for its limits: {err}") from err


def gids(name: str, port: int) -> list[dict]:
    """GIDs of a port that are in use. Tables are long and sparse, and sysfs says the type of each as well."""
    base = os.path.join(INFINIBAND, name, "ports", str(port))
    found = []
    for index in sorted(int(entry) for entry in os.listdir(os.path.join(base, "gids"))):
        gid = read_text(os.path.join(base, "gids", str(index)))
        if not gid or not gid.strip("0:"):
            continue
        found.append({"index": index, "gid": gid, "type": read_text(os.path.join(base, "gid_attrs", "types", str(index))) or None,
                      "netdev": read_text(os.path.join(base, "gid_attrs", "ndevs", str(index))) or None})  # fmt: skip
    return found
