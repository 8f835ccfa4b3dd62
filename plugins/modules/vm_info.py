#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_info
short_description: Says what a hypervisor has room for, what runs on it, and what keeps each VM there
version_added: 0.1.0
description:
  - Returns the facts that a plan is made of. There are the hypervisor's memory, CPU and software, and for each of its virtual
    machines its size, state and disks, how fast it writes, and every reason why it could not move.
  - Runs on the hypervisor and changes nothing there. What can be found out about a move is found out here, before anything moves.
  - >-
    A VM of the driver V(libvirt) says which other VMs it belongs with in its metadata:
    C(<h:vm xmlns:h="urn:hecaton:fleet:vm"><h:anti_affinity>database</h:anti_affinity></h:vm>), where C(anti_affinity) and
    C(affinity) each hold names of groups with spaces in between. One of the driver V(qmp) does so with
    C(VM_GROUPS_ANTI_AFFINITY) and C(VM_GROUPS_AFFINITY) in its environment file.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
requirements:
  - the distribution's package C(python3-libvirt), for the driver V(libvirt)
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
    details: It changes nothing.
  idempotent:
    support: full
options:
  drivers:
    description:
      - How VMs run on this host. V(libvirt) asks libvirt, V(qmp) asks QEMU processes that run as units
        C(hecaton-vm@NAME.service).
      - A driver that is named here and that the host does not have is an error.
      - By default both are asked, and one that the host does not have is left out of RV(host.drivers). A libvirt that is installed
        but does not answer is an error all the same, because its VMs would be overlooked.
    type: list
    elements: str
    choices: [libvirt, qmp]
  libvirt_uri:
    description: The libvirt to ask.
    type: str
    default: qemu:///system
  vms:
    description: Return only VMs of these names. By default, all.
    type: list
    elements: str
  measure_dirty_rate:
    description:
      - Measure how fast each running VM writes to its memory, all at the same time.
      - QEMU compares hashes of a sample of the pages, which a guest does not notice. A page counts once, however often it is written.
    type: bool
    default: false
  dirty_rate_seconds:
    description: How long to measure, from 1 to 60 seconds.
    type: int
    default: 1
  host_name:
    description: The name of this host in the plan, such as its inventory name. By default, the host's own name.
    type: str
  migration_address:
    description:
      - The address at which other hypervisors reach this one for migrations.
      - By default, the address that the default route leaves from, or else the one that the host's own name stands for.
    type: str
  shared_paths:
    description:
      - Disk sources that every hypervisor has alike, although that can't be seen from here. Each is a path such as
        V(/srv/images) or V(/dev/mapper/san), a URL such as V(nbd://localhost:10809), or a storage pool of libvirt. What lies below
        it counts too.
      - Files on network and cluster file systems, and disks that QEMU reads over the network, are known to be shared. Block devices
        are not.
    type: list
    elements: str
    default: []
  vm_config_dir:
    description: Folder with the environment files of the VMs of the driver V(qmp).
    type: path
    default: /etc/hecaton/vms
  state_dir:
    description: Folder in which the host keeps its cordon and the records of its migrations.
    type: path
    default: /var/lib/hecaton
  qemu_binary:
    description: The QEMU to ask for its version and machine types. By default, the distribution's.
    type: path
seealso:
  - module: hecaton.fleet.evacuation_plan
  - module: hecaton.fleet.host_cordon
  - module: hecaton.fleet.vm_migrate
"""

EXAMPLES = r"""
- name: See what runs on a hypervisor
  hecaton.fleet.vm_info:
  register: facts

- name: Gather what a plan needs
  hecaton.fleet.vm_info:
    host_name: "{{ inventory_hostname }}"
    migration_address: "{{ migration_network_address }}"
    measure_dirty_rate: true
    dirty_rate_seconds: 2
  register: facts

- name: Say that a block device is a LUN of a storage network
  hecaton.fleet.vm_info:
    shared_paths:
      - /dev/mapper/san
  register: facts

- name: List the VMs that can't leave, and why
  ansible.builtin.debug:
    msg: "{{ item.name }}: {{ item.blockers | map(attribute='message') | join('; ') }}"
  loop: "{{ facts.vms | selectattr('blockers') }}"
  loop_control:
    label: "{{ item.name }}"
"""

RETURN = r"""
host:
  description: The hypervisor.
  returned: success
  type: dict
  contains:
    name:
      description: Its name in the plan, O(host_name).
      type: str
    memory_total_mib:
      description: Its memory, in MiB.
      type: int
    memory_resident_mib:
      description: How much of it the host holds, in MiB, which is free once the VM has left; null when that is not known, as of libvirt's VMs.
      type: int
    memory_available_mib:
      description: The memory that the kernel counts as available now, in MiB.
      type: int
    cpus:
      description: Number of its CPUs.
      type: int
    cpu:
      description: C(vendor), C(model), C(arch) and the sorted C(features) of its CPUs, as the kernel names them.
      type: dict
    qemu_version:
      description: Version of QEMU, null when none was found.
      type: str
    libvirt_version:
      description: Version of libvirt, null when the host has none or it was not asked.
      type: str
    machines:
      description: Machine types that its QEMU can start, aliases too.
      type: list
      elements: str
    kernel:
      description: Release of the kernel.
      type: str
    migration_address:
      description: Where other hypervisors reach it, null when that could not be found out.
      type: str
    cordoned:
      description: Whether it is cordoned.
      type: bool
    cordon:
      description: The cordon as M(hecaton.fleet.host_cordon) returns it, null when there is none.
      type: dict
    drivers:
      description: The drivers that it has, of those that were asked for.
      type: list
      elements: str
    engines:
      description:
        - What it can do as a destination, for each engine. C(usable) says whether, C(blockers) why not, each with C(code) and
          C(message).
        - Only a destination needs userfaultfd, so that no VM on this host is kept there for the lack of it.
      type: dict
  sample:
    name: hv1
    memory_total_mib: 3900
    memory_available_mib: 2700
    cpus: 1
    cpu: {vendor: AuthenticAMD, model: QEMU TCG CPU, arch: x86_64, features: [aes, avx]}
    qemu_version: 10.0.13
    libvirt_version: 11.3.0
    machines: [pc-i440fx-10.0, pc-q35-10.0]
    kernel: 6.12.63+deb13-amd64
    migration_address: 10.77.1.11
    cordoned: false
    cordon: null
    drivers: [libvirt, qmp]
    engines:
      precopy: {usable: true, blockers: []}
      userfault: {usable: true, blockers: []}
vms:
  description: Its virtual machines, running or not, sorted by name.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
    uuid:
      description: Its UUID, null when it has none.
      type: str
    driver:
      description: V(libvirt) or V(qmp).
      type: str
    state:
      description: V(running), V(paused), V(incoming), V(shutoff) or V(crashed).
      type: str
    job:
      description: What is being done to it now, such as V(migration_out), V(migration_in), V(backup) or V(block_job); null for nothing.
      type: str
    memory_mib:
      description: Its memory, in MiB.
      type: int
    vcpus:
      description: Number of its virtual CPUs.
      type: int
    machine:
      description: Its machine type, null when its configuration names none.
      type: str
    cpu:
      description:
        - C(mode) is V(host-passthrough), V(host-model), V(custom) or V(maximum), C(model) the CPU model of a custom one, C(features)
          what it requires beyond its model.
        - C(migratable) is false when it shows the guest something that can't be migrated.
      type: dict
    disks:
      description:
        - Each has C(target), C(source), C(kind), C(format), C(shared), C(readonly), and the sources that it is an overlay of in
          C(backing). An empty drive has no source.
      type: list
      elements: dict
    host_devices:
      description: Devices and folders of the host that it uses, each with C(kind), C(id), and C(failover) when it is unplugged to migrate.
      type: list
      elements: dict
    memory_backend:
      description:
        - C(kind) is V(anonymous), V(memfd), V(file), V(hugetlb) or V(remote_ram). C(path) and C(file_system) say where a file is,
          C(shared) whether other processes may map it.
      type: dict
    dirty_rate_mib_s:
      description: How fast it writes to its memory, in MiB/s; null when that was not measured.
      type: float
    dirty_rate_error:
      description: Why it was not measured, null when it was or was not asked for.
      type: str
    networks:
      description: Its network interfaces, each with C(kind), C(source) and C(mac).
      type: list
      elements: dict
    groups:
      description: The groups that it stays together with (C(affinity)) or apart from (C(anti_affinity)).
      type: dict
    migration:
      description: The record of its migration under way, or of its last one from this host; null when there is none.
      type: dict
    engines:
      description: What each engine can do with it. C(usable) says whether, C(blockers) what is particular to the engine.
      type: dict
    onboarding:
      description: Whether its memory can be put on C(remote_ram) by its next move (C(usable)), and C(blockers) if not.
      type: dict
    blockers:
      description: What keeps it from leaving by any engine, each with C(code) and C(message).
      type: list
      elements: dict
    notes:
      description: What does not keep it here, but should be known, each with C(code) and C(message).
      type: list
      elements: dict
  sample:
    - name: web1
      uuid: 7d0c1f5e-6a2b-4d8e-9c55-0f3a4b7de921
      driver: libvirt
      state: running
      job: null
      memory_mib: 256
      memory_resident_mib: null
      vcpus: 1
      machine: pc-q35-10.0
      cpu: {mode: host-passthrough, model: null, features: [], migratable: true}
      disks:
        - {target: vda, source: "nbd://10.77.1.100:10809/web1", kind: network, format: raw, shared: true, readonly: false, backing: []}
      host_devices: []
      memory_backend: {kind: anonymous, path: null, file_system: null, shared: false}
      dirty_rate_mib_s: 12.0
      dirty_rate_error: null
      networks:
        - {kind: bridge, source: br0, mac: "52:54:00:6b:3c:58"}
      groups: {affinity: [], anti_affinity: [web]}
      migration: null
      engines:
        precopy: {usable: true, blockers: []}
        userfault: {usable: true, blockers: []}
      onboarding: {usable: false, blockers: [{code: driver_unsupported, message: "libvirt has no way to leave the guest's memory to the engine remote_ram"}]}
      blockers: []
      notes: []
"""

import os
import socket
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _cordon, _host_facts, _libvirt, _migration, _qmp_vms, _vm_facts
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpError

RUN_DIR = "/run/hecaton"
LIBVIRT_QEMU_CONF = "/etc/libvirt/qemu.conf"
DRIVERS = ("libvirt", "qmp")
# Seconds that a QEMU may be busy with another client. When its record says why, there is no sense in waiting.
PATIENCE = 5.0
PATIENCE_MIGRATING = 1.0


class VmInfoError(Exception):
    """What was asked for can't be found out; the message says what to do about it."""


class VmInfo:
    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.storage = _host_facts.Storage(read_text("/proc/mounts") or "", module.params["shared_paths"], os.path.realpath)
        self.libvirt_version: str | None = None
        self.libvirt_qemu_version: str | None = None
        self.drivers: list[str] = []

    def run(self) -> dict:
        vms = self.libvirt_vms() + self.qmp_vms()
        if not self.drivers:
            self.module.warn(f"this host has neither libvirt nor {self.params['vm_config_dir']}, so no VM was looked for")
        vms.sort(key=lambda vm: (vm["name"], vm["driver"]))
        for name in sorted(set(self.params["vms"] or ()) - {vm["name"] for vm in vms}):
            self.module.warn(f"this host has no VM called {name}")
        for vm in vms:
            vm["migration"] = self.record(vm["name"])
        if self.params["measure_dirty_rate"]:
            self.measure(vms)
        return {"changed": False, "host": self.host(), "vms": vms}

    def wants(self, driver: str) -> bool:
        return driver in (self.params["drivers"] or DRIVERS)

    def chosen(self, name: str) -> bool:
        return self.params["vms"] is None or name in self.params["vms"]

    # ---- drivers

    def libvirt_vms(self) -> list[dict]:
        if not self.wants("libvirt"):
            return []
        if not self.params["drivers"] and not _libvirt.installed():
            return []
        try:
            conn = _libvirt.connect(self.params["libvirt_uri"])
        except _libvirt.LibvirtError as err:
            if self.params["drivers"]:
                raise
            raise VmInfoError(f"{err}. libvirt is installed here, so there may be VMs; if it isn't used, set drivers to qmp") from err
        try:
            versions = _libvirt.version(conn)
            entries = _libvirt.domains(conn, self.params["vms"])
        finally:
            conn.close()
        self.drivers.append("libvirt")
        if versions["libvirt"]:
            self.libvirt_version = _host_facts.version_text(versions["libvirt"])
        if versions["qemu"]:
            self.libvirt_qemu_version = _host_facts.version_text(versions["qemu"])
        memory_dir = _vm_facts.memory_backing_dir(read_text(LIBVIRT_QEMU_CONF) or "")
        found = []
        for entry in entries:
            state, job = _vm_facts.domain_state(entry["state"], entry["reason"], entry["operation"])
            found.append(_vm_facts.facts_from_domain_xml(entry["xml"], state, job, self.storage, entry["volumes"], memory_dir))
        return found

    def qmp_vms(self) -> list[dict]:
        folder = self.params["vm_config_dir"]
        if not self.wants("qmp"):
            return []
        if not os.path.isdir(folder):
            if self.params["drivers"]:
                raise VmInfoError(f"there is no {folder}, so this host has no VMs of the driver qmp; prepare it with the role hecaton.fleet.qemu")
            return []
        self.drivers.append("qmp")
        return [self.qmp_vm(name) for name in _qmp_vms.names(folder, RUN_DIR) if self.chosen(name)]

    def qmp_vm(self, name: str) -> dict:
        # As in its unit: one that is arriving has its definition in the second file only.
        files = (os.path.join(self.params["vm_config_dir"], f"{name}.conf"), os.path.join(RUN_DIR, "incoming", f"{name}.env"))
        conf: dict = {}
        for path in files:
            conf.update(_vm_facts.parse_environment(read_text(path) or ""))
        job = self.recorded_job(name)
        queries = error = None
        try:
            client = _qmp_vms.open_agent(RUN_DIR, name, PATIENCE_MIGRATING if job else PATIENCE)
            if client:
                with client:
                    queries = _qmp_vms.query(client)
        except QmpError as err:
            error = str(err)
        return _vm_facts.facts_from_qmp(name, conf, queries, self.storage, error, job)

    # ---- records

    def record(self, name: str, incoming: bool = False) -> dict | None:
        try:
            return _migration.read_record(self.params["state_dir"], name, incoming)
        except _migration.MigrationError as err:
            self.module.warn(str(err))
            return None

    def recorded_job(self, name: str) -> str | None:
        """What the records on this host say is being done to a VM. Its QEMU knows better, when it answers."""
        for job, incoming in (("migration_in", True), ("migration_out", False)):
            record = self.record(name, incoming)
            if record and record["phase"] != "finished":
                return job
        return None

    # ---- dirty rate

    def measure(self, vms: list[dict]) -> None:
        measured = []
        for vm in vms:
            if vm["state"] == "running" and not vm["job"] and not any(blocker["code"] == "unreachable" for blocker in vm["blockers"]):
                measured.append(vm)
            else:
                vm["dirty_rate_error"] = f"it is {vm['state']}" if vm["state"] != "running" else "it is busy"
        seconds = self.params["dirty_rate_seconds"]
        by_libvirt = [vm for vm in measured if vm["driver"] == "libvirt"]
        collectors = {}
        conn = _libvirt.connect(self.params["libvirt_uri"], readonly=False) if by_libvirt else None
        try:
            if conn:
                collectors["libvirt"] = _libvirt.start_dirty_rates(conn, by_libvirt, seconds)
            collectors["qmp"] = _qmp_vms.start_dirty_rates(RUN_DIR, [vm["name"] for vm in measured if vm["driver"] == "qmp"], seconds)
            if measured:
                time.sleep(seconds)
            results = {driver: collect() for driver, collect in collectors.items()}
        finally:
            if conn:
                conn.close()
        for vm in measured:
            result = results[vm["driver"]][vm["name"]]
            vm["dirty_rate_error" if isinstance(result, str) else "dirty_rate_mib_s"] = result

    # ---- the host

    def host(self) -> dict:
        cordon = _cordon.read(self.params["state_dir"])
        system = os.uname()
        qemu = self.qemu()
        return {
            "name": self.params["host_name"] or system.nodename,
            **_host_facts.parse_meminfo(read_text("/proc/meminfo") or ""),
            "cpus": os.cpu_count() or 1,
            "cpu": _host_facts.parse_cpuinfo(read_text("/proc/cpuinfo") or "", system.machine),
            "qemu_version": qemu["version"] or self.libvirt_qemu_version,
            "libvirt_version": self.libvirt_version,
            "machines": qemu["machines"],
            "kernel": system.release,
            "migration_address": self.params["migration_address"] or self.default_address(),
            "cordoned": cordon is not None,
            "cordon": cordon,
            "drivers": self.drivers,
            "engines": _host_facts.engines(
                self.drivers, read_text("/proc/sys/vm/unprivileged_userfaultfd"), os.path.exists("/dev/userfaultfd"), self.libvirt_version,
                read_text("/proc/mounts") or "", rdma_devices()),
        }

    def qemu(self) -> dict:
        binary = self.params["qemu_binary"]
        if not binary:
            candidates = (f"/usr/bin/qemu-system-{os.uname().machine}", "/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm")
            binary = next((path for path in candidates if os.path.exists(path)), None)
        if not binary:
            self.module.warn("no QEMU was found, so the machine types of this host are not known; qemu_binary can name it")
            return {"version": None, "machines": []}
        answers = []
        for question in (["--version"], ["-machine", "help"]):
            rc, stdout, stderr = self.module.run_command([binary, *question])
            if rc:
                raise VmInfoError(f"{binary} {' '.join(question)} failed (exit status {rc}): {stderr.strip() or stdout.strip()}")
            answers.append(stdout)
        return {"version": _host_facts.parse_qemu_version(answers[0]), "machines": _host_facts.parse_machines(answers[1])}

    def default_address(self) -> str | None:
        address = route_address() or name_address()
        if not address:
            self.module.warn("this host has no default route and its name stands for no address; give migration_address")
        return address


def rdma_devices() -> list:
    """Names of this host's RDMA devices."""
    try:
        return sorted(os.listdir("/sys/class/infiniband"))
    except FileNotFoundError:
        return []


def route_address() -> str | None:
    """The address that a packet to anywhere would leave from. Nothing is sent."""
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((anywhere, 9))
                return probe.getsockname()[0]
        except OSError:
            continue
    return None


def name_address() -> str | None:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return None if address.startswith("127.") else address


def read_text(path: str) -> str | None:
    """A file's text, None when it isn't there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def main():
    module = AnsibleModule(
        argument_spec={
            "drivers": {"type": "list", "elements": "str", "choices": ["libvirt", "qmp"]},
            "libvirt_uri": {"type": "str", "default": "qemu:///system"},
            "vms": {"type": "list", "elements": "str"},
            "measure_dirty_rate": {"type": "bool", "default": False},
            "dirty_rate_seconds": {"type": "int", "default": 1},
            "host_name": {"type": "str"},
            "migration_address": {"type": "str"},
            "shared_paths": {"type": "list", "elements": "str", "default": []},
            "vm_config_dir": {"type": "path", "default": "/etc/hecaton/vms"},
            "state_dir": {"type": "path", "default": "/var/lib/hecaton"},
            "qemu_binary": {"type": "path"},
        },
        supports_check_mode=True,
    )
    if not 1 <= module.params["dirty_rate_seconds"] <= 60:
        module.fail_json(msg=f"dirty_rate_seconds must be from 1 to 60, not {module.params['dirty_rate_seconds']}")
    try:
        module.exit_json(**VmInfo(module).run())
    except (VmInfoError, _libvirt.LibvirtError, OSError) as err:
        module.fail_json(msg=str(err))


if __name__ == "__main__":
    main()
