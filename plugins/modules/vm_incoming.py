#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_incoming
short_description: Prepares a hypervisor for a virtual machine that is about to arrive
version_added: 0.1.0
description:
  - Checks, right before a migration, that this hypervisor may and can take the virtual machine (not cordoned, not another one of
    the same name, enough free memory, not too many arriving at once) and keeps room for it.
  - For O(driver=qmp), also starts QEMU to receive it, under a systemd unit that follows the migration and cleans up when it fails.
  - M(hecaton.fleet.vm_migrate) calls this by itself on the destination. Call it yourself only to drive a migration by other means.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
  - hecaton.fleet._migration
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: partial
    details:
      - Once the virtual machine runs here, nothing changes. Before that, each call with O(state=present) prepares it anew.
options:
  state:
    description:
      - V(present) prepares for it.
      - V(absent) gives the room back, and ends a QEMU that waits for a virtual machine that has not begun to arrive. One that is
        arriving, or is here, is left alone.
    type: str
    choices: [present, absent]
    default: present
  driver:
    description: What runs it. Required if O(state=present).
    type: str
    choices: [libvirt, qmp]
  engine:
    description: Engine that will move it.
    type: str
    choices: [precopy, userfault, remote_ram]
    default: userfault
  source:
    description: Name of the hypervisor that it comes from.
    type: str
  uuid:
    description: Its UUID, by which a libvirt domain of the same name is told apart.
    type: str
  memory_mib:
    description: Its memory in MiB. By default, what O(config) says.
    type: int
  config:
    description: Text of its definition C(/etc/hecaton/vms/NAME.conf) on the source. Required if O(driver=qmp) and O(state=present).
    type: str
  ram:
    description:
      - Its RAM files on the source, which are made here under the same names, each with C(id), C(path) and C(size) in bytes.
        Required if O(engine=remote_ram).
    type: list
    elements: dict
    default: []
  token:
    description: Secret by which its source is known, 32 hexadecimal digits. Required if O(engine=remote_ram).
    type: str
  postcopy_bandwidth:
    description: Limit in MiB/s of the pages fetched unasked after the switch, V(0) for none. Only for O(engine=remote_ram).
    type: float
    default: 0
  recovery_timeout:
    description: Seconds without a connection after which pages that are missing count as lost. Only for O(engine=remote_ram).
    type: float
    default: 3600
  enabled:
    description: Whether it starts with the host, once it is here.
    type: bool
    default: false
  address:
    description: Address of this host to receive the stream on.
    type: str
  arrival_timeout:
    description: Seconds within which it has to begin to arrive.
    type: float
    default: 300
"""

EXAMPLES = r"""
- name: Keep room for web1 on hv2
  hecaton.fleet.vm_incoming:
    name: web1
    driver: libvirt
    uuid: 7d0c2c05-9f2e-4a60-94f5-7a34a8f5ac17
    memory_mib: 2048
    source: hv1
  delegate_to: hv2

- name: Give it back
  hecaton.fleet.vm_incoming:
    name: web1
    state: absent
  delegate_to: hv2
"""

RETURN = r"""
incoming:
  description: What the source has to know.
  returned: when O(state=present) and the virtual machine can come
  type: dict
  contains:
    id: {description: Names this migration., type: str, returned: always, sample: b3f0d2a4}
    address: {description: Where the stream goes., type: str, returned: always, sample: 10.77.1.12}
    uri: {description: "QEMU's migration URI, null with O(driver=libvirt).", type: str, returned: always, sample: "tcp:10.77.1.12:49200"}
    memory_mib: {description: Room kept in MiB., type: int, returned: always, sample: 2048}
    ram: {description: "O(ram), each with the C(port) that it listens on.", type: list, elements: dict, returned: always, sample: []}
present:
  description: Whether the virtual machine runs here already.
  returned: when O(state=present)
  type: bool
  sample: false
busy:
  description: Names of the virtual machines that are arriving, when there are O(max_incoming) of them. Nothing was prepared.
  returned: when O(state=present)
  type: list
  elements: str
  sample: []
"""

import os
import subprocess
import time
import uuid

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _cordon, _reservations
from ansible_collections.hecaton.fleet.plugins.module_utils._host_facts import parse_meminfo
from ansible_collections.hecaton.fleet.plugins.module_utils._libvirt import LibvirtError, connect, installed, libvirt_module
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_qmp import config_path, incoming_env, is_active, systemctl, vm_unit
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_remote_ram import is_needed
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_unit import adopt, runs_here, start, unit_name
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import MigrationError, check_name, read_record, record_path
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import is_remote_ram
from ansible_collections.hecaton.fleet.plugins.module_utils._vm_facts import facts_from_qmp, parse_environment

ARGUMENT_SPEC = {
    "name": {"type": "str", "required": True, "aliases": ["vm"]},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "driver": {"type": "str", "choices": ["libvirt", "qmp"]},
    "engine": {"type": "str", "choices": ["precopy", "userfault", "remote_ram"], "default": "userfault"},
    "source": {"type": "str"},
    "uuid": {"type": "str"},
    "memory_mib": {"type": "int"},
    "config": {"type": "str"},
    "ram": {"type": "list", "elements": "dict", "default": []},
    "token": {"type": "str", "no_log": True},
    "postcopy_bandwidth": {"type": "float", "default": 0},
    "recovery_timeout": {"type": "float", "default": 3600},
    "enabled": {"type": "bool", "default": False},
    "address": {"type": "str"},
    "port_min": {"type": "int", "default": 49200},
    "port_max": {"type": "int", "default": 49299},
    "max_incoming": {"type": "int", "default": 0},
    "memory_reserve": {"type": "int", "default": 0},
    "arrival_timeout": {"type": "float", "default": 300},
    "libvirt_uri": {"type": "str", "default": "qemu:///system"},
    "state_dir": {"type": "path", "default": "/var/lib/hecaton"},
}


def arriving_qmp() -> set:
    """Names of VMs whose incoming units run."""
    listed = subprocess.run(
        ["systemctl", "list-units", "--plain", "--no-legend", "--state=active,activating", "hecaton-incoming-*.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {line.split()[0][len("hecaton-incoming-") : -len(".service")] for line in listed.stdout.splitlines() if line.strip()}


def resident_mib(name: str) -> int:
    """MiB that the QEMU of this VM already occupies here, 0 if there is none."""
    pid = systemctl("show", "--property=MainPID", "--value", vm_unit(name), check=False)
    try:
        if pid in ("", "0"):
            with open(f"/run/libvirt/qemu/{name}.pid") as handle:
                pid = handle.read().strip()
        with open(f"/proc/{pid}/statm") as handle:
            return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, ValueError):
        return 0


def ram_files_mib(record: dict) -> int:
    """MiB that the RAM files of a VM already occupy here. What is copied ahead is in them, and in no process.

    :param record: of its arrival.
    """
    blocks = 0
    for block in record.get("ram") or []:
        try:
            blocks += os.stat(block["path"]).st_blocks
        except OSError:
            continue  # it has gone, and takes no room
    return blocks * 512 >> 20


class VmIncoming:
    """One call of the module."""

    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.name = check_name(module.params["name"])
        self.state_dir = module.params["state_dir"]
        self.libvirt_arriving: set = set()
        self.libvirt_here = None

    def run(self) -> dict:
        if self.params["state"] == "absent":
            return self._absent()
        self._look_at_libvirt()
        if self._present():
            return {"changed": False, "present": True, "busy": []}
        self._check_cordon()
        self._check_namesake()
        self._check_ram()
        memory = self.params["memory_mib"] or self._memory_of_config()
        look_only = self.module.check_mode
        with _reservations.locked(look_only=look_only):
            reservations = _reservations.live(arriving_qmp() | self.libvirt_arriving, look_only=look_only)
            reservations.pop(self.name, None)
            if 0 < self.params["max_incoming"] <= len(reservations):
                return {"changed": False, "present": False, "busy": sorted(reservations)}
            self._check_memory(memory, reservations)
            if not self.module.check_mode:
                _reservations.reserve(self.name, memory, self.params["source"] or "")
        incoming = {"id": uuid.uuid4().hex, "address": self.params["address"], "uri": None, "memory_mib": memory, "ram": []}
        if self.params["driver"] == "qmp" and not self.module.check_mode:
            incoming.update(self._listen(incoming["id"]))
        return {"changed": True, "present": False, "busy": [], "incoming": incoming}

    # -- may it come? ----------------------------------------------------------------------------------------------

    def _look_at_libvirt(self) -> None:
        if self.params["driver"] != "libvirt" and not installed():
            return
        libvirt = libvirt_module()
        try:
            conn = connect(self.params["libvirt_uri"])
        except LibvirtError:
            if self.params["driver"] == "libvirt":
                raise
            return  # no VM of libvirt's can be arriving without it
        try:
            for domain in conn.listAllDomains():
                state, reason = domain.state()
                receiving = state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION
                if receiving:
                    self.libvirt_arriving.add(domain.name())
                if domain.name() == self.name:
                    self.libvirt_here = {"uuid": domain.UUIDString(), "running": bool(domain.isActive()) and not receiving, "receiving": receiving}
        except libvirt.libvirtError as err:
            raise LibvirtError(f"cannot list the domains: {err}") from err
        finally:
            conn.close()

    def _present(self) -> bool:
        """Whether the VM runs here; without O(driver), by name alone."""
        here = self.libvirt_here
        if here and here["running"] and (self.params["uuid"] in (None, here["uuid"])):
            return True
        return runs_here(self.name, self.module.check_mode)

    def _check_cordon(self) -> None:
        cordon = _cordon.read(self.state_dir)
        if cordon:
            raise MigrationError(f"this host is cordoned since {cordon['since']} by {cordon['by']}: {cordon['reason']}; {self.name} can't move here")

    def _check_namesake(self) -> None:
        if self.params["driver"] is None:
            raise MigrationError(f"{self.name} does not run here, and driver is needed to prepare for it")
        here = self.libvirt_here
        if here and self.params["uuid"] != here["uuid"] and (here["running"] or self.params["driver"] == "libvirt"):
            raise MigrationError(f"libvirt on this host has another domain called {self.name} (UUID {here['uuid']}); rename or undefine it first")
        if here and here["receiving"]:
            raise MigrationError(f"libvirt is receiving {self.name} on this host already; wait until that has ended")
        leaving = read_record(self.state_dir, self.name)
        if leaving and leaving["phase"] != "finished" and is_active(unit_name(self.name)):
            # Its last steps remove the definition and the RAM files that it had here.
            raise MigrationError(f"{self.name} is still leaving this host; wait until that has ended (journalctl -u {unit_name(self.name)})")
        if self.params["driver"] == "qmp" and is_active(unit_name(self.name, True)):
            record = read_record(self.state_dir, self.name, incoming=True) or {}
            if record.get("phase") in ("receiving", "arrived"):
                raise MigrationError(f"{self.name} is arriving on this host already; wait until that has ended (journalctl -u {unit_name(self.name, True)})")

    def _check_ram(self) -> None:
        # The files that it would have here are those that it had before it left.
        if is_needed(self.params["ram"]):
            raise MigrationError(f"a part of the memory of {self.name} is still only on this host, which it left before; wait until all of it has left")
        for block in self.params["ram"]:
            folder = os.path.dirname(block["path"])
            if not is_remote_ram(folder):
                raise MigrationError(f"{folder} is not on a remote_ram file system on this host; the playbook hecaton.fleet.prepare mounts one")

    def _memory_of_config(self) -> int:
        facts = facts_from_qmp(self.name, parse_environment(self.params["config"]), None)
        return facts["memory_mib"]

    def _check_memory(self, memory: int, reservations: dict) -> None:
        with open("/proc/meminfo") as handle:
            available = parse_meminfo(handle.read())["memory_available_mib"]
        outstanding = sum(max(0, r["memory_mib"] - self._occupied_mib(name)) for name, r in reservations.items())
        short = _reservations.shortage(memory, self.params["memory_reserve"], available, outstanding)
        if short > 0:
            raise MigrationError(
                f"no room for {self.name} on this host: it needs {memory} MiB and {self.params['memory_reserve']} MiB have to stay free; "
                f"{available} MiB are free, of which {outstanding} MiB are kept for {', '.join(sorted(reservations)) or 'nobody'}: {short} MiB short"
            )

    def _occupied_mib(self, name: str) -> int:
        """MiB that a VM on its way here occupies already. Its QEMU has mapped its RAM files, so they count once."""
        return max(resident_mib(name), ram_files_mib(read_record(self.state_dir, name, incoming=True) or {}))

    # -- driver qmp ------------------------------------------------------------------------------------------------

    def _listen(self, ident: str) -> dict:
        # One that was prepared before and never came is replaced.
        self._stop_waiting()
        job = {
            "side": "incoming", "id": ident, "vm": self.name, "engine": self.params["engine"], "config": self.params["config"],
            "enabled": self.params["enabled"], "address": self.params["address"], "port_min": self.params["port_min"], "port_max": self.params["port_max"],
            "wait_s": self.params["arrival_timeout"], "ram": self.params["ram"], "token": self.params["token"],
            "postcopy_bandwidth_mib_s": self.params["postcopy_bandwidth"], "recovery_timeout_s": self.params["recovery_timeout"],
        }  # fmt: skip
        start(job, self.state_dir)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            record = read_record(self.state_dir, self.name, incoming=True)
            if record and record["id"] == ident:
                if record["phase"] == "listening":
                    return {"uri": record["uri"], "ram": record.get("ram", [])}
                if record["phase"] == "finished":
                    raise MigrationError(f"{self.name} can't be received: {record['reason']}")
            time.sleep(0.1)
        self._stop_waiting()
        raise MigrationError(f"QEMU for {self.name} was not ready to receive within 120 s; see journalctl -u {unit_name(self.name, True)}")

    def _stop_waiting(self) -> bool:
        """Ends a QEMU that nothing has begun to arrive at."""
        unit = unit_name(self.name, True)
        record = read_record(self.state_dir, self.name, incoming=True) or {}
        if not os.path.exists(incoming_env(self.name)) or (record.get("phase") in ("receiving", "arrived") and is_active(unit)):
            return False
        if adopt(self.name):
            return False  # it came after all, and runs
        systemctl("stop", unit, check=False)
        systemctl("stop", vm_unit(self.name), check=False)
        systemctl("reset-failed", vm_unit(self.name), check=False)
        ram = [block["path"] for block in record.get("ram") or []]
        for path in (*ram, incoming_env(self.name), record_path(self.state_dir, self.name, incoming=True)):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        return True

    def _absent(self) -> dict:
        if self.module.check_mode:
            return {"changed": os.path.exists(incoming_env(self.name)) and not os.path.exists(config_path(self.name)) and not adopt(self.name, True)}
        stopped = self._stop_waiting()
        released = _reservations.release(self.name)
        return {"changed": stopped or released}


def main() -> None:
    required = [("driver", "qmp", ["config"]), ("engine", "remote_ram", ["token"])]
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True, required_if=required)
    try:
        result = VmIncoming(module).run()
    except (MigrationError, LibvirtError) as err:
        module.fail_json(msg=str(err))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
