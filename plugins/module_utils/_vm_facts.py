# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""What a VM is and what keeps it on its host, decided from what libvirt or QEMU says about it.

Pure functions: XML, QMP answers and configuration text in, facts out in the shape that docs/data.md fixes. Nothing here
opens a connection or reads a file.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from xml.etree import ElementTree

from ansible_collections.hecaton.fleet.plugins.module_utils._host_facts import Storage, blocker
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import MigrationError, check_name

# The namespace of what a libvirt domain's <metadata> says to this collection.
METADATA_NAMESPACE = "urn:hecaton:fleet:vm"

# Arguments that a domain hands to QEMU past libvirt.
_QEMU_NAMESPACE = "{http://libvirt.org/schemas/domain/qemu/1.0}"

# Statuses of QEMU's query-migrate while a migration is under way.
MIGRATION_ACTIVE = frozenset((
    "setup", "active", "cancelling", "pre-switchover", "device", "wait-unplug", "colo",
    "postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup",
))

# virDomainState, virDomainPausedReason and virDomainJobOperation are libvirt's ABI: their numbers don't change.
_PAUSED, _SHUTDOWN, _SHUTOFF, _CRASHED = 3, 4, 5, 6
_PAUSED_POSTCOPY, _PAUSED_POSTCOPY_FAILED = 12, 13
_RUNNING_POSTCOPY, _RUNNING_POSTCOPY_FAILED = 10, 11
_JOBS = {
    1: "start", 2: "save", 3: "restore", 4: "migration_in", 5: "migration_out", 6: "snapshot", 7: "snapshot", 8: "dump", 9: "backup", 10: "snapshot",
}

_QEMU_STATES = {
    "running": "running", "paused": "paused", "suspended": "paused", "prelaunch": "paused", "io-error": "paused", "watchdog": "paused", "debug": "paused",
    "save-vm": "paused", "finish-migrate": "paused", "colo": "running", "inmigrate": "incoming", "restore-vm": "incoming", "postmigrate": "shutoff",
    "shutdown": "shutoff", "internal-error": "crashed", "guest-panicked": "crashed",
}

# -device types that tie a VM to hardware or to a process of its host.
_HOST_DEVICE_TYPES = (
    ("vfio-", "pci"), ("usb-host", "usb"), ("scsi-generic", "scsi"), ("scsi-block", "scsi"), ("vhost-vdpa", "vdpa"), ("vhost-scsi", "scsi"),
    ("vhost-user-fs", "virtiofs"), ("vhost-user-", "vhost_user"), ("virtio-9p", "9p"), ("ivshmem", "shmem"), ("tpm-", None),
    ("ccid-card-emulated", "smartcard"), ("u2f-passthru", "usb"), ("can-host", "can"),
)
_HOST_FILE_SYSTEMS = ("9p", "virtiofs", "dir")
_ENCRYPTED = ("sev-guest", "sev-snp-guest", "tdx-guest", "pef-guest", "s390-pv-guest")


# ---- blockers ---------------------------------------------------------------------------------------------------


def blockers(vm: dict) -> list[dict]:
    """What keeps a VM from leaving its host by any engine."""
    found = []
    try:
        check_name(vm["name"])
    except MigrationError as err:
        found.append(blocker("bad_name", f"{err}; rename the VM"))
    if vm["state"] in ("shutoff", "crashed"):
        found.append(blocker("not_running", vm.get("state_reason") or f"the VM is not running (its state is {vm['state']}), so it can't move live"))
    elif vm["job"] in ("migration_in", "migration_out") or vm["state"] == "incoming":
        way = "arriving at" if vm["job"] == "migration_in" or vm["state"] == "incoming" else "leaving"
        found.append(blocker("already_migrating", f"the VM is {way} this host in a migration already under way"))
    elif vm["job"]:
        found.append(blocker("job_active", f"another job runs on the VM ({vm['job'].replace('_', ' ')}); it has to end first"))
    for device in vm["host_devices"]:
        if device["failover"]:
            continue
        named = f"{device['kind']} {device['id']}".strip() if device["id"] else device["kind"]
        if device["kind"] in _HOST_FILE_SYSTEMS:
            found.append(blocker("host_filesystem", f"the guest mounts a folder of this host ({named})"))
        else:
            found.append(blocker("host_device", f"the guest uses a device of this host ({named})"))
    for disk in vm["disks"]:
        if not disk["shared"]:
            source = disk["source"] + "".join(f", over {backing}" for backing in disk["backing"])
            what = "medium in" if disk["readonly"] else "disk"
            found.append(blocker(
                "local_disk", f"the {what} {disk['target']} is on storage that only this host has ({source}); if others have it too, say so in shared_paths"))
    if vm["memory_hotplugged"]:
        found.append(blocker(
            "memory_hotplugged", f"its definition doesn't have all of its memory ({', '.join(vm['memory_hotplugged'])} was plugged in while it ran), "
            "and a destination is made by that; unplug it, or define it and start the VM again"))
    if vm["pages_lost"]:
        # A guest that touches such a page gets a machine check; QEMU, which reads it for its stream, a signal that ends it.
        found.append(blocker(
            "memory_lost", f"{vm['pages_lost']} pages of its memory were lost in an earlier move, and reading one of them would end its QEMU; "
            "shut the VM down and start it again when that suits"))
    if vm["encrypted"]:
        found.append(blocker("encrypted_memory", "the guest's memory is encrypted by the processor and can't be copied"))
    if not vm["cpu"]["migratable"]:
        found.append(blocker("cpu_not_migratable", "the guest's CPU has features that can't be migrated (an invariant TSC, or migratable=off)"))
    for reason in vm["refused"]:
        found.append(blocker("qemu_refuses", f"QEMU says: {reason}"))
    return found


def engines(vm: dict) -> dict:
    """What each engine can do with a VM. ``blockers`` holds only what is particular to that engine."""
    userfault = []
    if vm["state"] == "paused":
        userfault.append(blocker("vm_paused", "a paused VM writes nothing: pre-copy moves it in one pass, post-copy gains nothing"))
    if any(network["kind"] == "vhostuser" for network in vm["networks"]) or any(device["kind"] == "vhost_user" for device in vm["host_devices"]):
        userfault.append(blocker("vhost_user", "a vhost-user backend shares the guest's memory, and may not support post-copy"))
    memory = vm["memory_backend"]
    if memory["kind"] in ("file", "remote_ram") and memory["file_system"] not in ("tmpfs", "hugetlbfs"):
        where = memory["file_system"] or "an unknown file system"
        userfault.append(blocker("memory_file", f"the guest's memory is a file on {where}: QEMU does post-copy only on tmpfs or hugetlbfs"))
    usable = not vm["blockers"]
    remote = []
    if vm["driver"] != "qmp":
        remote.append(blocker("driver_unsupported", f"{vm['driver']} has no way to leave the guest's memory to the engine remote_ram"))
    elif memory["kind"] != "remote_ram":
        remote.append(blocker("memory_not_remote_ram", "the guest's memory is not on a remote_ram file system (the playbook onboard moves it there)"))
    elif not memory["shared"]:
        remote.append(blocker("memory_private", "the guest maps its memory file privately; the memory backend needs share=on"))
    if vm["memory_elsewhere"] and memory["kind"] == "remote_ram":
        remote.append(blocker(
            "memory_mixed", f"part of the guest's memory is not a shared file on a remote_ram file system ({', '.join(vm['memory_elsewhere'])})"))
    if vm["free_page_hint"]:
        # It clears the hinted pages in its dirty bitmap, and has none of memory that it leaves to us.
        remote.append(blocker("free_page_hint", "its balloon has free-page-hint=on, with which QEMU does not survive that the kernel moves the memory"))
    return {
        "remote_ram": {"usable": usable and not remote, "blockers": remote},
        "precopy": {"usable": usable, "blockers": []},
        "userfault": {"usable": usable and not userfault, "blockers": userfault},
    }


def onboarding(vm: dict) -> dict:
    """Whether a VM can have its memory on remote_ram from its next move on, without being restarted."""
    found = []
    if vm["driver"] != "qmp":
        found.append(blocker("driver_unsupported", f"{vm['driver']} has no way to leave the guest's memory to the engine remote_ram"))
    elif vm["memory_backend"]["kind"] == "remote_ram":
        found.append(blocker("memory_remote_ram", "the guest's memory is on a remote_ram file system already"))
    elif vm["memory_defined"]:
        found.append(blocker(
            "memory_defined", "the VM's definition says itself where its memory is (memory-backend, -mem-path or -numa); it has to be changed by hand"))
    if vm["free_page_hint"]:
        # It could only move by pre-copy from then on.
        found.append(blocker("free_page_hint", "its balloon has free-page-hint=on, with which the engine remote_ram can't move it"))
    return {"usable": not vm["blockers"] and not found, "blockers": found}


def notes(vm: dict) -> list[dict]:
    """What does not keep a VM on its host, but should be known."""
    if vm["memory_backend"]["kind"] == "hugetlb":
        return [blocker("hugetlb_memory", "the guest's memory is huge pages (hugetlbfs), which the engine remote_ram can't take over")]
    return []


def complete(vm: dict) -> dict:
    """Adds ``blockers``, ``engines``, ``onboarding`` and ``notes``, and drops what only they were decided from."""
    vm["blockers"] = blockers(vm) + vm.pop("unknown", [])
    vm["engines"] = engines(vm)
    vm["onboarding"] = onboarding(vm)
    vm["notes"] = notes(vm)
    for key in ("state_reason", "encrypted", "refused", "memory_defined", "memory_elsewhere", "memory_hotplugged", "pages_lost", "free_page_hint"):
        vm.pop(key)
    return vm


def _empty(name: str, driver: str) -> dict:
    """A VM of which nothing is known yet. The order is that of docs/data.md."""
    return {
        "name": name,
        "uuid": None,
        "driver": driver,
        "state": "shutoff",
        "state_reason": "",
        "job": None,
        "memory_mib": 0,
        "memory_resident_mib": None,
        "vcpus": 1,
        "machine": None,
        "cpu": {"mode": "custom", "model": None, "features": [], "migratable": True},
        "disks": [],
        "host_devices": [],
        "memory_backend": {"kind": "anonymous", "path": None, "file_system": None, "shared": False},
        "dirty_rate_mib_s": None,
        "dirty_rate_error": None,
        "networks": [],
        "groups": {"affinity": [], "anti_affinity": []},
        "migration": None,
        "encrypted": False,
        "refused": [],
        "memory_defined": False,
        "memory_elsewhere": [],
        "memory_hotplugged": [],
        "pages_lost": 0,
        "free_page_hint": False,
    }


def _disk(target, source, kind, disk_format, shared, readonly, backing=()) -> dict:
    return {
        "target": target, "source": source, "kind": kind, "format": disk_format, "shared": shared, "readonly": readonly, "backing": list(backing),
    }


def _memory_kind(kind: str, path: str | None, storage: Storage) -> dict:
    file_system = storage.file_system(path) if path else None
    if kind == "file" and file_system == "remote_ram":
        kind = "remote_ram"
    elif kind == "file" and file_system == "hugetlbfs":
        kind = "hugetlb"
    return {"kind": kind, "path": path, "file_system": file_system, "shared": False}


def _loopback(host: str | None) -> bool:
    """Whether a server's name means this very host, and so another server on every host."""
    if not host:
        return False
    if host.split(".")[0] == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ---- libvirt ----------------------------------------------------------------------------------------------------


def domain_state(state: int, reason: int, operation: int = 0) -> tuple[str, str | None]:
    """libvirt's numbers as (state, job).

    :param operation: virDomainJobOperation of a job under way, 0 for none.
    """
    job = _JOBS.get(operation)
    if state in (_SHUTDOWN, _SHUTOFF, 0):
        return "shutoff", None
    if state == _CRASHED:
        return "crashed", None
    if state == _PAUSED:
        if reason in (_PAUSED_POSTCOPY, _PAUSED_POSTCOPY_FAILED):
            return "paused", job or "migration_out"
        return ("incoming" if job == "migration_in" else "paused"), job
    if reason in (_RUNNING_POSTCOPY, _RUNNING_POSTCOPY_FAILED):
        return "running", job or "migration_in"
    return "running", job


def memory_backing_dir(qemu_conf: str) -> str:
    """Where libvirt keeps guest memory that is a file, from the text of ``qemu.conf``."""
    found = re.search(r'^\s*memory_backing_dir\s*=\s*"([^"]+)"', qemu_conf, re.MULTILINE)
    return found.group(1) if found else "/var/lib/libvirt/qemu/ram"


def facts_from_domain_xml(xml: str, state: str, job: str | None, storage: Storage | None = None, volumes: dict | None = None,
                          memory_dir: str = "/var/lib/libvirt/qemu/ram") -> dict:
    """The facts of a libvirt domain.

    :param xml: what libvirt says the domain is now (the live XML of one that runs).
    :param state: as in docs/data.md, from :func:`domain_state`.
    :param job: what libvirt is doing to it, from :func:`domain_state`.
    :param volumes: {(pool, volume): (pool type, path)} of disks that name a storage pool's volume.
    :param memory_dir: libvirt's ``memory_backing_dir``.
    """
    storage = storage or Storage()
    root = ElementTree.fromstring(xml)
    vm = _empty(root.findtext("name") or "", "libvirt")
    vm["uuid"] = root.findtext("uuid")
    vm["state"] = state
    vm["job"] = job
    vm["memory_mib"] = _mib(root.find("memory"))
    vm["vcpus"] = int(root.findtext("vcpu") or 1)
    os_type = root.find("os/type")
    vm["machine"] = os_type.get("machine") if os_type is not None else None
    vm["cpu"] = _domain_cpu(root)
    vm["memory_backend"] = _domain_memory(root, storage, memory_dir)
    vm["groups"] = _domain_groups(root)
    vm["encrypted"] = root.find("launchSecurity") is not None
    for disk in root.iterfind("devices/disk"):
        _domain_disk(vm, disk, storage, volumes or {})
    for interface in root.iterfind("devices/interface"):
        _domain_interface(vm, interface)
    vm["host_devices"] += _domain_host_devices(root)
    if not job and root.find("devices/disk/mirror") is not None:
        vm["job"] = "block_job"
    extra = [arg.get("value") or "" for arg in root.iterfind(f"{_QEMU_NAMESPACE}commandline/{_QEMU_NAMESPACE}arg")]
    vm["host_devices"] += _Arguments(extra).host_devices()
    return complete(vm)


def _mib(element) -> int:
    units = {"b": 1, "bytes": 1, "kb": 1000, "k": 1024, "kib": 1024, "mb": 1000 ** 2, "m": 1024 ** 2, "mib": 1024 ** 2,
             "gb": 1000 ** 3, "g": 1024 ** 3, "gib": 1024 ** 3, "tb": 1000 ** 4, "t": 1024 ** 4, "tib": 1024 ** 4}
    if element is None:
        return 0
    return int(element.text) * units[element.get("unit", "KiB").lower()] // 1024 ** 2


def _domain_cpu(root) -> dict:
    cpu = root.find("cpu")
    facts = {"mode": "custom", "model": None, "features": [], "migratable": True}
    if cpu is None:
        return facts
    features = {feature.get("name") for feature in cpu.iterfind("feature") if feature.get("policy", "require") in ("require", "force")}
    facts["mode"] = cpu.get("mode", "custom")
    facts["model"] = cpu.findtext("model") or None
    facts["features"] = sorted(features)
    tsc_fixed = any(timer.get("name") == "tsc" and timer.get("frequency") for timer in root.iterfind("clock/timer"))
    facts["migratable"] = cpu.get("migratable") != "off" and ("invtsc" not in features or tsc_fixed)
    return facts


def _domain_memory(root, storage: Storage, memory_dir: str) -> dict:
    backing = root.find("memoryBacking")
    kind = "anonymous"
    shared = False
    if backing is not None:
        access = backing.find("access")
        shared = access is not None and access.get("mode") == "shared"
        source = backing.find("source")
        if backing.find("hugepages") is not None:
            kind = "hugetlb"
        elif source is not None:
            kind = {"memfd": "memfd", "file": "file"}.get(source.get("type", ""), "anonymous")
    facts = _memory_kind(kind, memory_dir if kind == "file" else None, storage)
    facts["shared"] = shared or any(cell.get("memAccess") == "shared" for cell in root.iterfind("cpu/numa/cell"))
    return facts


def _domain_groups(root) -> dict:
    said = root.find(f"metadata/{{{METADATA_NAMESPACE}}}vm")
    groups = {}
    for key in ("affinity", "anti_affinity"):
        text = said.findtext(f"{{{METADATA_NAMESPACE}}}{key}") if said is not None else None
        groups[key] = (text or "").split()
    return groups


def _domain_disk(vm: dict, disk, storage: Storage, volumes: dict) -> None:
    target = disk.find("target").get("dev") if disk.find("target") is not None else "?"
    driver = disk.find("driver")
    disk_format = driver.get("type") if driver is not None else None
    readonly = disk.find("readonly") is not None or disk.get("device") == "cdrom"
    source, kind, shared = _domain_source(disk.get("type", "file"), disk.find("source"), storage, volumes)
    if source is None:
        vm["disks"].append(_disk(target, None, kind, disk_format, True, readonly))
        return
    if kind in ("nvme", "vhostvdpa"):
        vm["host_devices"].append(_host_device({"nvme": "pci", "vhostvdpa": "vdpa"}[kind], source))
        return
    backing = []
    store = disk.find("backingStore")
    while store is not None and store.get("type"):
        path, _kind, backing_shared = _domain_source(store.get("type"), store.find("source"), storage, volumes)
        if path is not None:
            backing.append(path)
            shared = shared and backing_shared
        store = store.find("backingStore")
    vm["disks"].append(_disk(target, source, kind, disk_format, shared, readonly, backing))


def _domain_source(kind: str, source, storage: Storage, volumes: dict) -> tuple:
    """(source, kind, shared) of a ``<source>``; the source is None when the drive is empty."""
    if source is None:
        return None, kind, True
    if kind == "network":
        return _domain_network_source(source, storage)
    if kind == "volume":
        name = (source.get("pool"), source.get("volume"))
        pool_type, path = volumes.get(name, (None, None))
        text = path or "/".join(part or "" for part in name)
        return text, kind, pool_type in ("rbd", "gluster", "iscsi", "iscsi-direct", "netfs") or storage.is_shared(text)
    if kind == "nvme":
        return _pci_address(source.find("address")), kind, False
    path = source.get({"block": "dev", "dir": "dir", "vhostvdpa": "dev", "vhostuser": "path"}.get(kind, "file"))
    if path is None:
        return None, kind, True
    if kind == "file":
        return path, kind, storage.is_shared(path)
    # A block device may be a LUN that every host sees, or a disk of this host: only the operator knows.
    return path, kind, storage.declared(path)


def _domain_network_source(source, storage: Storage) -> tuple:
    protocol, name = source.get("protocol"), source.get("name") or ""
    hosts = source.findall("host")
    address = ""
    local = False
    if hosts:
        first = hosts[0]
        if first.get("transport") == "unix":
            address = first.get("socket") or ""
        else:
            address = first.get("name") or ""
            if ":" in address:
                address = f"[{address}]"
            if first.get("port"):
                address += f":{first.get('port')}"
        local = any(host.get("transport") == "unix" or _loopback(host.get("name")) for host in hosts)
    text = f"{protocol}://{address}/{name}" if address else f"{protocol}:{name}"
    return text, "network", not local or storage.declared(text)


def _domain_interface(vm: dict, interface) -> None:
    kind = interface.get("type", "")
    source = interface.find("source")
    mac = interface.find("mac")
    name = None
    if source is not None:
        name = source.get("bridge") or source.get("network") or source.get("dev") or source.get("path")
    if kind == "network" and source is not None and source.get("bridge"):
        name = source.get("bridge")
    if kind == "hostdev":
        name = _pci_address(source.find("address")) if source is not None else ""
        vm["host_devices"].append(_host_device("pci", name, _is_transient(interface)))
    elif kind == "vdpa":
        vm["host_devices"].append(_host_device("vdpa", name or ""))
    vm["networks"].append({"kind": kind, "source": name, "mac": mac.get("address") if mac is not None else None})


def _is_transient(element) -> bool:
    """The passthrough half of a failover pair: QEMU unplugs it for the time of a migration."""
    teaming = element.find("teaming")
    return teaming is not None and teaming.get("type") == "transient"


def _host_device(kind: str, device_id: str, failover: bool = False) -> dict:
    return {"kind": kind, "id": device_id, "failover": failover}


def _pci_address(address) -> str:
    if address is None:
        return ""
    parts = [int(address.get(key, "0"), 0) for key in ("domain", "bus", "slot", "function")]
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*parts)


def _domain_host_devices(root) -> list[dict]:
    found = []
    for device in root.iterfind("devices/hostdev"):
        kind = device.get("type") or device.get("mode") or ""
        source = device.find("source")
        found.append(_host_device(kind, _hostdev_id(kind, source), _is_transient(device)))
    for file_system in root.iterfind("devices/filesystem"):
        driver = file_system.find("driver")
        source = file_system.find("source")
        kind = "virtiofs" if driver is not None and driver.get("type") == "virtiofs" else "9p"
        found.append(_host_device(kind, (source.get("dir") or source.get("socket") or "") if source is not None else ""))
    for tpm in root.iterfind("devices/tpm/backend[@type='passthrough']/device"):
        found.append(_host_device("tpm", tpm.get("path", "")))
    for card in root.iterfind("devices/smartcard"):
        if card.get("mode") in ("host", "host-certificates"):
            found.append(_host_device("smartcard", card.get("mode", "")))
    for shmem in root.iterfind("devices/shmem"):
        if shmem.get("role") != "master":
            found.append(_host_device("shmem", shmem.get("name", "")))
    return found


def _hostdev_id(kind: str, source) -> str:
    if source is None:
        return ""
    address = source.find("address")
    if kind == "pci":
        return _pci_address(address)
    if kind == "mdev" and address is not None:
        return address.get("uuid", "")
    if kind == "usb":
        vendor, product = source.find("vendor"), source.find("product")
        if vendor is not None and product is not None:
            return f"{vendor.get('id', '')}:{product.get('id', '')}".replace("0x", "")
        return f"{address.get('bus')}.{address.get('device')}" if address is not None else ""
    if kind == "scsi":
        adapter = source.find("adapter")
        return " ".join(part for part in (adapter.get("name") if adapter is not None else source.get("name"), ) if part)
    return source.get("wwpn") or source.get("dev") or ""


# ---- QMP --------------------------------------------------------------------------------------------------------


def parse_environment(text: str) -> dict:
    """The variables of a systemd ``EnvironmentFile``: comments, quotes and continued lines as systemd reads them."""
    values = {}
    # A backslash joins lines, inside and outside of quotes.
    rest = text.replace("\\\n", "")
    while rest:
        line, _newline, after = rest.partition("\n")
        stripped = line.strip()
        name, equals, value = stripped.partition("=")
        name = name.strip()
        if not stripped or stripped[0] in "#;" or not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            rest = after
            continue
        value = rest[rest.index("=") + 1:].lstrip(" \t")
        if value[:1] in ("'", '"'):
            values[name], rest = _quoted(value)
        else:
            values[name] = re.sub(r"\\(.)", r"\1", value.partition("\n")[0].strip())
            rest = after
    return values


def _quoted(text: str) -> tuple[str, str]:
    """(value, the lines after it) of text that starts with a quote; the quotes may span lines."""
    quote, result, index = text[0], [], 1
    while index < len(text) and text[index] != quote:
        if text[index] == "\\" and quote == '"' and index + 1 < len(text) and text[index + 1] in '"\\`$':
            index += 1
        result.append(text[index])
        index += 1
    return "".join(result), text[index + 1:].partition("\n")[2]


def split_arguments(text: str) -> list[str]:
    """Command line arguments as systemd splits an unbraced variable: at white space, quotes kept together."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _option(text: str, first: str = "") -> dict:
    """QEMU's ``a,key=value,flag`` or JSON as a dict; ``first`` names the value that has no key. ``,,`` is a comma."""
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return {}
    values = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        part = part.replace("\0", ",")
        key, equals, value = part.partition("=")
        if equals:
            values[key] = value
        elif number == 0 and first:
            values[first] = part
        elif part:
            values[part] = "on"
    return values


class _Arguments:
    """QEMU's command line, for what QMP doesn't tell."""

    def __init__(self, arguments: list[str]):
        self._pairs = []
        for index, argument in enumerate(arguments):
            if argument.startswith("-"):
                value = arguments[index + 1] if index + 1 < len(arguments) else ""
                self._pairs.append((re.sub("^--?", "", argument), value))

    def all(self, *names: str) -> list[str]:
        return [value for name, value in self._pairs if name in names]

    def last(self, name: str, first: str = "") -> dict:
        """All uses of an option that QEMU merges into one."""
        merged = {}
        for value in self.all(name):
            merged.update(_option(value, first))
        return merged

    def cpu(self) -> dict:
        facts = {"mode": "custom", "model": None, "features": [], "migratable": True}
        text = (self.all("cpu") or [""])[-1]
        model, _comma, flags = text.partition(",")
        facts["model"] = model or None
        features = {}
        for flag in filter(None, flags.split(",")):
            key, equals, value = flag.partition("=")
            if flag[0] in "+-":
                features[flag[1:]] = flag[0] == "+"
            elif equals:
                features[key] = value in ("on", "yes", "true")
            else:
                features[flag] = True
        facts["migratable"] = features.pop("migratable", True)
        for setting in ("enforce", "check", "pmu", "l3-cache", "host-phys-bits", "full-cpuid-auto-level"):
            features.pop(setting, None)
        facts["features"] = sorted(name for name, wanted in features.items() if wanted)
        return facts

    def host_devices(self) -> list[dict]:
        found = []
        for text in self.all("device"):
            options = _option(text, "driver")
            device = _device_fact(options.get("driver") or "", options)
            if device:
                found.append(device)
        for text in self.all("netdev"):
            options = _option(text, "type")
            if options.get("type") == "vhost-vdpa":
                found.append(_host_device("vdpa", options.get("vhostdev") or ""))
        for text in self.all("virtfs"):
            found.append(_host_device("9p", _option(text, "fsdriver").get("path") or ""))
        return found

    def file_systems(self) -> dict:
        """{fsdev id: folder}"""
        return {options.get("id"): options.get("path") or "" for options in (_option(text, "fsdriver") for text in self.all("fsdev"))}

    def networks(self) -> list[dict]:
        macs = {}
        for text in self.all("device"):
            options = _option(text, "driver")
            if options.get("netdev"):
                macs[options["netdev"]] = options.get("mac")
        found = []
        for text in self.all("netdev", "nic"):
            options = _option(text, "type")
            kind = options.get("type")
            if kind in (None, "none", "nic"):
                continue
            source = options.get("br") or options.get("ifname") or options.get("vhostdev")
            found.append({"kind": "vhostuser" if kind == "vhost-user" else kind, "source": source, "mac": options.get("mac") or macs.get(options.get("id"))})
        return found

    def disks(self, storage: Storage) -> list[dict]:
        """Drives as far as the command line names them, for a VM whose QEMU isn't there to ask."""
        found = []
        for number, text in enumerate(self.all("drive")):
            options = _option(text, "file")
            if options.get("file"):
                readonly = options.get("media") == "cdrom" or options.get("readonly", options.get("read-only")) == "on"
                found.append(_qemu_disk(options.get("id") or f"drive{number}", options["file"], options.get("format"), readonly, storage))
        for text in self.all("blockdev"):
            options = _unflatten(_option(text, "driver"))
            for filename in _leaves(options):
                found.append(_qemu_disk(str(options.get("node-name") or "?"), filename, None, options.get("read-only") in (True, "on"), storage))
        return found

    def memory_mib(self) -> int:
        return _size_mib((self.last("m", "size").get("size")) or "128M")

    def any(self) -> bool:
        return bool(self._pairs)

    def define_memory(self) -> bool:
        """Whether they say themselves what the guest's memory is made of."""
        return bool(self.all("mem-path", "numa")) or any("memory-backend" in text for text in self.all("object", "machine", "M", "device"))

    def memory_objects(self) -> list[dict]:
        found = []
        for text in self.all("object"):
            options = _option(text, "qom-type")
            if str(options.get("qom-type")).startswith("memory-backend-"):
                found.append({"id": options.get("id"), "type": options["qom-type"], "mem-path": options.get("mem-path"),
                              "share": options.get("share") in ("on", True), "hugetlb": options.get("hugetlb") in ("on", True)})
        if not found and self.all("mem-path"):
            found.append({"type": "memory-backend-file", "mem-path": self.all("mem-path")[-1], "share": False})
        return found


def _unflatten(options: dict) -> dict:
    """``file.driver=file`` as a nested dict."""
    result: dict = {}
    for key, value in options.items():
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        else:
            node[leaf] = value
    return result


def _size_mib(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([bBkKmMgGtT]?)", text)
    if not found:
        return 0
    factor = {"b": 1 / 1024 ** 2, "k": 1 / 1024, "": 1, "m": 1, "g": 1024, "t": 1024 ** 2}[found.group(2).lower()]
    return int(float(found.group(1)) * factor)


def _device_fact(kind: str, properties: dict) -> dict | None:
    """The fact about a QEMU device that ties its VM to this host, None about any other."""
    # Emulated devices share these prefixes; only the named ones reach out of the VM.
    for prefix, name in _HOST_DEVICE_TYPES:
        if name and kind.startswith(prefix):
            if name == "pci" and str(properties.get("sysfsdev") or "").rpartition("/")[2].count("-") == 4:
                name = "mdev"
            device_id = properties.get("host") or properties.get("sysfsdev") or properties.get("vhostdev") or properties.get("wwpn")
            if not device_id and kind == "usb-host":
                pair = ("vendorid", "productid") if properties.get("vendorid") else ("hostbus", "hostaddr")
                device_id = ":".join(_hex(properties.get(key)) if pair[0] == "vendorid" else str(properties.get(key)) for key in pair)
            return _host_device(name, str(device_id or properties.get("mount_tag") or properties.get("tag") or properties.get("id") or kind),
                                bool(properties.get("failover_pair_id")))
    return None


def _hex(value) -> str:
    try:
        return f"{int(str(value), 0):04x}"
    except ValueError:
        return str(value)


def _leaves(node: dict) -> list[str]:
    """What the protocol nodes at the bottom of a QEMU block graph read from, as file names or URLs."""
    children = [child for key, child in node.items() if isinstance(child, dict) and key not in ("server", "cache", "encrypt")]
    if children:
        return [leaf for child in children for leaf in _leaves(child)]
    driver = node.get("driver")
    if "filename" in node:
        return [str(node["filename"])]
    if driver in ("nbd", "ssh"):
        server = node.get("server") if isinstance(node.get("server"), dict) else node
        if server.get("type") == "unix" or ("path" in server and "host" not in server):
            return [f"{driver}+unix:///{node.get('export', '')}?socket={server.get('path')}"]
        return [f"{driver}://{server.get('host')}:{server.get('port', '')}/{node.get('export', node.get('path', ''))}"]
    if driver == "rbd":
        return [f"rbd:{node.get('pool')}/{node.get('image')}"]
    if driver == "iscsi":
        return [f"iscsi://{node.get('portal')}/{node.get('target')}/{node.get('lun', 0)}"]
    if driver == "gluster":
        return [f"gluster:///{node.get('volume')}/{node.get('path')}"]
    if driver == "nfs":
        return [f"nfs://{(node.get('server') or {}).get('host')}{node.get('path', '')}"]
    if driver in ("null-co", "null-aio"):
        return [f"{driver}://"]
    if driver == "nvme":
        return [f"nvme://{node.get('device')}/{node.get('namespace')}"]
    if driver in ("http", "https", "ftp", "ftps"):
        return [str(node.get("url"))]
    return [str(node.get("path") or node.get("dir") or driver or "?")]


def qemu_source(filename: str, storage: Storage) -> tuple[str, str, bool]:
    """(source, kind, shared) of a file name as QEMU gives or takes it: a path, a URL, or ``json:{...}``."""
    if filename.startswith("json:"):
        try:
            names = _leaves(json.loads(filename[5:]))
        except ValueError:
            names = []
        if len(names) != 1:
            # Several files below one disk: shared only when each is.
            parts = [qemu_source(name, storage) for name in names]
            return filename, "file", bool(parts) and all(part[2] for part in parts)
        filename = names[0]
    scheme = re.match(r"([a-z][a-z0-9+-]+):", filename)
    if not scheme or filename.startswith("/"):
        if filename.startswith("/dev/"):
            return filename, "block", storage.declared(filename)
        return filename, "file", storage.is_shared(filename)
    protocol = scheme.group(1)
    if protocol in ("file", "host_device", "host_cdrom"):
        return qemu_source(filename.partition(":")[2], storage)
    if protocol in ("null-co", "null-aio"):
        return filename, "null", True
    if protocol in ("fat", "nvme", "vvfat", "blkdebug", "blkverify", "fd"):
        return filename, {"fat": "dir", "vvfat": "dir"}.get(protocol, protocol), storage.declared(filename)
    host = re.match(r"[a-z0-9+-]+:(?://)?(?:[^@/]*@)?(\[[^\]]*\]|[^:/?]*)", filename)
    local = "+unix" in protocol or filename.startswith("nbd:unix:") or _loopback(host.group(1) if host else None)
    return filename, "network", not local or storage.declared(filename)


def _qemu_disk(target: str, filename: str, disk_format: str | None, readonly: bool, storage: Storage, backing: list | None = None) -> dict:
    source, kind, shared = qemu_source(filename, storage)
    names = []
    for name in backing or []:
        backing_source, _kind, backing_shared = qemu_source(name, storage)
        names.append(backing_source)
        shared = shared and backing_shared
    return _disk(target, source, kind, disk_format, shared, readonly, names)


def _qmp_disks(blocks: list[dict], storage: Storage) -> list[dict]:
    found = []
    for block in blocks:
        inserted = block.get("inserted")
        qdev = block.get("qdev") or ""
        target = block.get("device") or re.sub(r"^/machine/[^/]+/([^/]+).*$", r"\1", qdev) or (inserted or {}).get("node-name") or "?"
        if not inserted:
            found.append(_disk(target, None, "file", None, True, True))
            continue
        readonly = bool(inserted.get("ro"))
        image = inserted.get("image") or {}
        name = image.get("filename") or inserted.get("file") or "?"
        if readonly and name.startswith("/usr/share/"):
            continue  # firmware that comes with QEMU's packages: each host has its own, and the guest's copy moves as RAM
        backing = []
        while image.get("backing-image"):
            backing.append(image.get("full-backing-filename") or image["backing-image"].get("filename") or "?")
            image = image["backing-image"]
        found.append(_qemu_disk(target, name, inserted.get("drv"), readonly, storage, backing))
    return found


def _qmp_memory(objects: list[dict], storage: Storage) -> dict:
    """One block of guest memory stands for all: one on remote_ram, or else a file, if there is any."""
    if not objects:
        return _memory_kind("anonymous", None, storage)
    elsewhere = _memory_elsewhere(objects, storage)
    first = min(objects, key=lambda entry: (_block_name(entry) in elsewhere, not entry.get("mem-path")))
    kind = {"memory-backend-memfd": "memfd", "memory-backend-file": "file", "memory-backend-shm": "memfd"}.get(first["type"], "anonymous")
    facts = _memory_kind(kind, first.get("mem-path") or None, storage)
    if first.get("hugetlb"):
        facts["kind"] = "hugetlb"
    facts["shared"] = bool(first.get("share"))
    return facts


def _memory_elsewhere(objects: list[dict], storage: Storage) -> list[str]:
    """Blocks of guest memory that are no shared files on a remote_ram file system."""
    return [
        _block_name(entry) for entry in objects
        if not (entry.get("share") and entry.get("mem-path") and storage.file_system(entry["mem-path"]) == "remote_ram")
    ]


def _block_name(entry: dict) -> str:
    return entry.get("id") or entry["type"]


def _memory_hotplugged(objects: list[dict], defined: _Arguments) -> list[str]:
    """Blocks of guest memory that its definition does not have. One is the machine's own, if nothing else is said of it."""
    if not defined.any():
        return []
    known = {entry.get("id") for entry in defined.memory_objects()}
    more = [entry["id"] for entry in objects if entry.get("id") and entry["id"] not in known]
    more.sort(key=lambda name: not name.endswith(".ram"))  # as QEMU names the machine's own
    named = "memory-backend" in {**defined.last("machine", "type"), **defined.last("M", "type")} or any("memdev" in node for node in defined.all("numa"))
    return more if named else more[1:]


def _qmp_cpu(cpu_type: str | None, arguments: _Arguments) -> dict:
    facts = arguments.cpu()
    model = re.sub(r"-[a-z0-9_]+-cpu$", "", cpu_type) if cpu_type else facts["model"]
    facts["mode"] = {"host": "host-passthrough", "max": "maximum"}.get(model or "", "custom")
    facts["model"] = model if facts["mode"] == "custom" else None
    return facts


def facts_from_qmp(name: str, conf: dict, queries: dict | None, storage: Storage | None = None, error: str | None = None,
                   job: str | None = None) -> dict:
    """The facts of a VM of the driver ``qmp``.

    :param conf: the variables of its environment file, from :func:`parse_environment`.
    :param queries: {command: answer} as ``_qmp_vms.query`` collects them; None when its QEMU wasn't asked.
    :param error: why QEMU gave no answer, although it runs. Without it, no queries mean that QEMU doesn't run.
    :param job: with ``error``, what is known to keep its QEMU busy: ``migration_in`` or ``migration_out``.
    """
    storage = storage or Storage()
    asked = queries or {}
    vm = _empty(name, "qmp")
    arguments = _Arguments(asked.get("arguments") or split_arguments(conf.get("QEMU_ARGS", "")))
    vm["groups"] = {"affinity": conf.get("VM_GROUPS_AFFINITY", "").split(), "anti_affinity": conf.get("VM_GROUPS_ANTI_AFFINITY", "").split()}
    uuid = (asked.get("query-uuid") or {}).get("UUID") or (arguments.all("uuid") or [None])[-1]
    vm["uuid"] = None if uuid and not uuid.strip("0-") else uuid
    if queries:
        status = queries["query-status"]["status"]
        vm["state"] = _QEMU_STATES.get(status, "paused")
        if status == "postmigrate":
            vm["state_reason"] = "the guest left this QEMU in a migration, which now waits to be ended"
        vm["job"] = _qmp_job(vm["state"], queries)
        if vm["state"] == "shutoff" and vm["job"] == "migration_out":
            vm["state"] = "paused"  # the guest runs elsewhere already, but still fetches memory from here
        vm["refused"] = list((queries.get("query-migrate") or {}).get("blocked-reasons") or [])
    elif error:
        vm["state"] = "incoming" if job == "migration_in" else "running"
        vm["job"] = job
        vm["unknown"] = [] if job else [blocker("unreachable", f"its QEMU gives no answer: {error}")]
    sizes = asked.get("query-memory-size-summary")
    vm["memory_mib"] = (sizes["base-memory"] + sizes.get("plugged-memory", 0)) // 1024 ** 2 if sizes else arguments.memory_mib()
    if asked.get("resident") is not None:
        vm["memory_resident_mib"] = min(vm["memory_mib"], asked["resident"] // 1024 ** 2)
    vcpus = asked.get("query-cpus-fast")
    vm["vcpus"] = len(vcpus) if vcpus else _leading_number(arguments.last("smp", "cpus").get("cpus"))
    machine = asked.get("machine")
    vm["machine"] = re.sub("-machine$", "", machine) if machine else arguments.last("machine", "type").get("type") or arguments.last("M", "type").get("type")
    vm["cpu"] = _qmp_cpu(asked.get("cpu"), arguments)
    vm["disks"] = _qmp_disks(asked["query-block"], storage) if "query-block" in asked else arguments.disks(storage)
    vm["networks"] = arguments.networks()
    vm["memory_backend"] = _qmp_memory(asked.get("memory") or arguments.memory_objects(), storage)
    vm["memory_defined"] = arguments.define_memory() or len(asked.get("memory") or []) > 1
    vm["memory_elsewhere"] = _memory_elsewhere(asked.get("memory") or [], storage)
    vm["memory_hotplugged"] = _memory_hotplugged(asked.get("memory") or [], _Arguments(split_arguments(conf.get("QEMU_ARGS", ""))))
    vm["pages_lost"] = asked.get("pages_lost", 0)
    vm["free_page_hint"] = any(device.get("free-page-hint") for device in asked.get("devices") or [])
    vm["encrypted"] = any(kind in _ENCRYPTED for kind in asked.get("objects") or [])
    vm["host_devices"] = _qmp_host_devices(asked, arguments)
    return complete(vm)


def _leading_number(text) -> int:
    found = re.match(r"\d+", str(text or ""))
    return int(found.group()) if found else 1


def _qmp_job(state: str, queries: dict) -> str | None:
    if (queries.get("query-migrate") or {}).get("status") in MIGRATION_ACTIVE:
        # QEMU keeps the word inmigrate until the guest runs; in post-copy it runs here while its memory still arrives.
        return "migration_in" if state == "incoming" or _is_incoming(queries) else "migration_out"
    if queries.get("arriving"):
        return "migration_in"
    if queries.get("query-block-jobs"):
        return "block_job"
    return None


def _is_incoming(queries: dict) -> bool:
    migration = queries.get("query-migrate") or {}
    # The outgoing side counts what it sends; the incoming one has no such numbers.
    return migration.get("status", "").startswith("postcopy") and "ram" not in migration


def _qmp_host_devices(asked: dict, arguments: _Arguments) -> list[dict]:
    folders = arguments.file_systems()
    if "devices" not in asked:
        found = arguments.host_devices()
    else:
        found = []
        for device in asked["devices"]:
            fact = _device_fact(device["type"], device)
            if fact:
                if fact["kind"] == "9p":
                    fact["id"] = folders.get(device.get("fsdev")) or fact["id"]
                found.append(fact)
        # A network backend is no device.
        found += [fact for fact in arguments.host_devices() if fact["kind"] == "vdpa"]
    unique = []
    for fact in found:
        if fact not in unique:
            unique.append(fact)
    return unique
