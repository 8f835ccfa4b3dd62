#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_migrate
short_description: Moves one running virtual machine to another hypervisor
version_added: 0.1.0
description:
  - Moves one virtual machine, live, from the hypervisor that the task runs on (or is delegated to) to O(destination).
  - The migration is driven by a transient systemd unit on the source, which records its state in a file. It goes on when Ansible,
    ssh or the control node end. Calling the module again attaches to a migration that is under way, or reports how the last one ended.
  - The action plugin of the same name prepares the destination (see M(hecaton.fleet.vm_incoming)), prints progress while it waits, and
    returns when the migration has ended.
  - A virtual machine that already runs on O(destination) is left alone.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
  - hecaton.fleet._migration
attributes:
  check_mode:
    support: full
    description: Checks the source and the destination as far as possible without changing anything.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - systemd and Python 3.9 or later on both hypervisors
  - python3-libvirt on the source for O(driver=libvirt), whose libvirtd has to reach the destination's by O(destination_uri)
options:
  state:
    description:
      - V(migrated) moves the virtual machine.
      - V(aborted) cancels its migration while that is still possible, and fails with the reason once it is not. A virtual
        machine that is not being migrated is left alone.
    type: str
    choices: [migrated, aborted]
    default: migrated
  destination:
    description:
      - Inventory name of the hypervisor to move to. Required if O(state=migrated).
      - The action plugin connects to it with the variables of the inventory to prepare it.
    type: str
  source:
    description:
      - Name of the hypervisor that the virtual machine is on, for the record.
      - The default is the inventory name of the host that the task runs on.
    type: str
  driver:
    description:
      - What runs the virtual machine. V(auto) finds out.
    type: str
    choices: [auto, libvirt, qmp]
    default: auto
  engine:
    description:
      - V(precopy) copies memory until little enough is left, then switches.
      - V(userfault) copies memory for O(precopy_timeout) seconds, then switches, and the destination fetches what is missing on
        demand. A stream that breaks after the switch is taken up again by itself.
      - V(remote_ram) does the same with the kernel module C(remote_ram) instead of QEMU, over RDMA. The virtual machine's memory has to
        be files on a C(remote_ram) file system, see the role P(hecaton.fleet.remote_ram#role). Only for O(driver=qmp).
    type: str
    choices: [precopy, userfault, remote_ram]
    default: userfault
  precopy_timeout:
    description: Seconds of pre-copy before the switch. Not for O(engine=precopy).
    type: float
    default: 30
  timeout:
    description: Seconds after which a pre-copy that does not converge is cancelled; V(0) for never. Only for O(engine=precopy).
    type: float
    default: 0
  bandwidth:
    description: Limit of the stream in MiB/s, V(0) for none.
    type: float
    default: 0
  postcopy_bandwidth:
    description: Limit in MiB/s of the pages sent unasked after the switch, V(0) for none. Pages on demand have no limit.
    type: float
    default: 0
  max_downtime:
    description: Downtime in milliseconds that the pre-copy aims at.
    type: int
    default: 300
  stall_timeout:
    description:
      - Seconds after which a migration is given up when nothing could be sent before the switch, since the destination is down
        or can't be reached. The virtual machine goes on where it is.
      - V(0) for never.
    type: float
    default: 120
  recovery_timeout:
    description: Seconds for which a stream that broke after the switch is taken up again, before the attempt ends as failed.
    type: float
    default: 3600
  migration_address:
    description:
      - Address of the destination on the network that carries migrations.
      - The default is the destination's variable C(vm_migration_address), then its C(ansible_host), then its name.
    type: str
  destination_uri:
    description:
      - libvirt's URI of the destination, as the source's libvirtd reaches it. V({address}) stands for the migration address.
    type: str
    default: "qemu+ssh://root@{address}/system"
  wait:
    description: Whether to wait until the migration has ended.
    type: bool
    default: true
  poll_interval:
    description: Seconds between two progress lines.
    type: float
    default: 3
  evacuation:
    description:
      - The evacuation that this migration is part of, the O(hecaton.fleet.host_cordon#module:owner) of the cordon on the source. While
        the action plugin watches the migration, it gives the signs of life that keep others from taking the source over.
    type: str
  journal:
    description:
      - Folder on the control node where the action plugin keeps the state of the migration while it watches it, in a file
        C(NAME.json). A migration that fails also leaves a file C(NAME.failed), by which others can tell how many did.
    type: str
  incoming:
    description:
      - What M(hecaton.fleet.vm_incoming) returned as RV(hecaton.fleet.vm_incoming#module:incoming) on the destination. The action plugin sees to it.
    type: dict
  onboard:
    description:
      - Whether its memory is to be on a C(remote_ram) file system at the destination, so that the next migration can be one of
        O(engine=remote_ram). A virtual machine whose memory is there already moves as it is.
      - Only for O(driver=qmp) and O(engine=precopy), because QEMU's post-copy takes no such file. A guest that writes faster than its
        memory can be sent is slowed down until it has moved.
    type: bool
    default: false
  follow:
    description:
      - Follow a migration that is under way, or take up one that stopped where only going on is possible, and start none.
      - Without such a migration nothing is changed.
    type: bool
    default: false
  token:
    description:
      - Secret that both sides of O(engine=remote_ram) have to know, 32 hexadecimal digits. The action plugin makes one.
    type: str
seealso:
  - module: hecaton.fleet.vm_info
  - module: hecaton.fleet.evacuation_plan
"""

EXAMPLES = r"""
- name: Move web1 from hv1 to hv2, with at most 20 s of pre-copy
  hecaton.fleet.vm_migrate:
    name: web1
    destination: hv2
    precopy_timeout: 20
  delegate_to: hv1

- name: Move it by pre-copy alone, and give up after ten minutes
  hecaton.fleet.vm_migrate:
    name: web1
    destination: hv2
    engine: precopy
    timeout: 600
    max_downtime: 100
  delegate_to: hv1

- name: Cancel the migration
  hecaton.fleet.vm_migrate:
    name: web1
    state: aborted
  delegate_to: hv1
"""

RETURN = r"""
migration:
  description:
    - State of the migration, null when there never was one. Times are seconds since the epoch, C(_ms) are milliseconds.
  returned: always
  type: dict
  contains:
    vm: {description: Name of the virtual machine., type: str, returned: always, sample: web1}
    driver: {description: What runs it., type: str, returned: always, sample: qmp}
    engine: {description: What moved its memory., type: str, returned: always, sample: userfault}
    from: {description: Where it was., type: str, returned: always, sample: hv1}
    to: {description: Where it goes., type: str, returned: always, sample: hv2}
    phase: {description: "One of starting, precopy, switch, postcopy, recovering, finished.", type: str, returned: always, sample: finished}
    result: {description: "One of moved, failed, aborted; null before it ended.", type: str, returned: always, sample: moved}
    reason: {description: "Why it failed; of one that moved, what did not.", type: str, returned: always, sample: ""}
    "on": {description: "Which side runs the virtual machine: source, destination, or unknown.", type: str, returned: always, sample: destination}
    downtime_ms: {description: How long the virtual machine stood still at the switch., type: int, returned: always, sample: 120}
    total_ms: {description: From start to last page., type: int, returned: always, sample: 7300}
    bytes: {description: What was sent., type: int, returned: always, sample: 158000000}
    samples: {description: "Course over time: seconds since the start, phase, MiB/s, MiB remaining.", type: list, elements: list, returned: always,
              sample: [[0.5, precopy, 31.0, 150.2]]}
already:
  description: Whether there was nothing to do, because the virtual machine runs on the destination.
  returned: when O(state=migrated)
  type: bool
  sample: false
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils._libvirt import LibvirtError, connect, installed, libvirt_module
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_qmp import (
    UNFINISHED,
    agent_socket,
    config_path,
    is_active,
    systemctl,
    vm_unit,
)
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_remote_ram import check_devices, is_serving, onboarded, ram_blocks
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_unit import runs_here, start, unit_name
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import MigrationError, abort_path, check_name, finish_stale, read_record, record_path
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpClient, QmpError

ARGUMENT_SPEC = {
    "name": {"type": "str", "required": True, "aliases": ["vm"]},
    "state": {"type": "str", "choices": ["migrated", "aborted"], "default": "migrated"},
    "destination": {"type": "str"},
    "source": {"type": "str"},
    "driver": {"type": "str", "choices": ["auto", "libvirt", "qmp"], "default": "auto"},
    "engine": {"type": "str", "choices": ["precopy", "userfault", "remote_ram"], "default": "userfault"},
    "precopy_timeout": {"type": "float", "default": 30},
    "timeout": {"type": "float", "default": 0},
    "bandwidth": {"type": "float", "default": 0},
    "postcopy_bandwidth": {"type": "float", "default": 0},
    "max_downtime": {"type": "int", "default": 300},
    "stall_timeout": {"type": "float", "default": 120},
    "recovery_timeout": {"type": "float", "default": 3600},
    "migration_address": {"type": "str"},
    "port_min": {"type": "int", "default": 49200},
    "port_max": {"type": "int", "default": 49299},
    "max_incoming": {"type": "int", "default": 0},
    "memory_reserve": {"type": "int", "default": 0},
    "destination_uri": {"type": "str", "default": "qemu+ssh://root@{address}/system"},
    "libvirt_uri": {"type": "str", "default": "qemu:///system"},
    "wait": {"type": "bool", "default": True},
    "poll_interval": {"type": "float", "default": 3},
    "state_dir": {"type": "path", "default": "/var/lib/hecaton"},
    "evacuation": {"type": "str"},
    "journal": {"type": "str"},
    "incoming": {"type": "dict"},
    "onboard": {"type": "bool", "default": False},
    "follow": {"type": "bool", "default": False},
    "token": {"type": "str", "no_log": True},
}
#: Least value of each number, and its greatest where there is one.
RANGES = {
    "precopy_timeout": (0, None), "timeout": (0, None), "stall_timeout": (0, None),
    "bandwidth": (0, None), "postcopy_bandwidth": (0, None), "max_downtime": (1, 2000000),
    "recovery_timeout": (0, None), "port_min": (1, 65535), "port_max": (1, 65535), "max_incoming": (0, None), "memory_reserve": (0, None),
    "poll_interval": (0.1, None),
}  # fmt: skip


class VmMigrate:
    """One call of the module: where the VM is, and what is done about it."""

    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.name = check_name(module.params["name"])
        self.state_dir = module.params["state_dir"]
        self.result: dict = {"changed": False}

    def run(self) -> dict:
        self._check_ranges()
        record = self._settled_record()
        self.result["migration"] = record
        if self.params["state"] == "aborted":
            self._abort(record)
        else:
            self._migrate(record)
        return self.result

    def _check_ranges(self) -> None:
        for key, (least, most) in RANGES.items():
            value = self.params[key]
            if value < least or (most is not None and value > most):
                raise MigrationError(f"{key} must be {f'at least {least}' if most is None else f'from {least} to {most}'}, not {value}")
        if self.params["port_min"] > self.params["port_max"]:
            raise MigrationError(f"port_min {self.params['port_min']} is greater than port_max {self.params['port_max']}")

    def _settled_record(self):
        """The record, corrected when its unit died without a last word."""
        record = read_record(self.state_dir, self.name)
        self.attached = bool(record) and record["phase"] != "finished" and is_active(unit_name(self.name))
        if record and record["phase"] != "finished" and not self.attached:
            # The unit may have ended between the two looks.
            record = read_record(self.state_dir, self.name)
            if record["phase"] != "finished":
                record = finish_stale(record, "the unit that drove the migration ended without a last word; see journalctl -u " + unit_name(self.name))
        return record

    # -- migrated --------------------------------------------------------------------------------------------------

    def _migrate(self, record) -> None:
        destination = self.params["destination"]
        self.result["already"] = False
        self.result["record_path"] = record_path(self.state_dir, self.name)
        self.result["unit"] = unit_name(self.name)
        if self.attached:
            self.result.update(changed=True, attached=True)
            return
        found = self._find()
        if found is not None and record and record["id"] and record["result"] == "failed" and self._halfway(found):
            self._resume()
            return
        if found is None and self._serves(record):
            self._resume()
            return
        if self.params["follow"]:
            self.result["idle"] = True
            return
        if found is None:
            if record and record["result"] == "moved" and record["to"] == destination:
                self.result["already"] = True
                return
            if self.params["source"] == destination:
                raise MigrationError(f"{self.name} does not run on {destination}")
            # The destination may tell: the action plugin asks it.
            self.result["absent"] = True
            if self.params["incoming"] is not None:
                raise MigrationError(f"{self.name} does not run on {self.params['source'] or 'this host'}" + self._last_seen(record))
            self.result["reason"] = f"{self.name} does not run on {self.params['source'] or 'this host'}" + self._last_seen(record)
            return
        if self.params["source"] == destination:
            self.result["already"] = True
            return
        self.result.update(changed=True, diff={"before": {"host": self.params["source"]}, "after": {"host": destination}})
        incoming = self.params["incoming"]
        if incoming is None:
            self.result["request"] = {key: value for key, value in found.items() if key != "postcopy_failed"}
        elif not self.module.check_mode:
            self._start(found, incoming)

    def _halfway(self, found: dict) -> bool:
        """Whether a migration of ours stopped where only going on is possible, or goes on without its unit."""
        if found["driver"] == "libvirt":
            return found["postcopy_failed"]
        try:
            with QmpClient(agent_socket(self.name), timeout=10) as qmp:
                status = qmp.execute("query-migrate").get("status", "none")
                return status in UNFINISHED or (status == "completed" and qmp.execute("query-status")["status"] == "postmigrate")
        except QmpError as err:
            raise MigrationError(f"the QEMU of {self.name} does not answer: {err}") from err

    def _serves(self, record) -> bool:
        """Whether the VM has left and RAM files on this host still serve it, with nobody to watch them."""
        if not record or record["engine"] != "remote_ram" or record["result"] == "moved":
            return False
        return is_serving(self._job()["ram"])

    def _job(self) -> dict:
        """What the last migration was started with."""
        try:
            with open(os.path.join(self.state_dir, "jobs", f"{self.name}.outgoing.json")) as handle:
                return json.load(handle)
        except (OSError, ValueError) as err:
            raise MigrationError(f"{self.name} is halfway through a migration, and what it was started with can't be read: {err}") from err

    def _resume(self) -> None:
        """Starts the unit again with the job it had."""
        job = self._job()
        self.result["changed"] = True
        if not self.module.check_mode:
            start({**job, "resume": True}, self.state_dir)
            self.result["started"] = True

    def _last_seen(self, record) -> str:
        if record and record["result"] == "moved":
            return f"; it moved from here to {record['to']}"
        return ""

    def _find(self):
        """What the destination has to know of the VM, None if it doesn't run here."""
        wanted = self.params["driver"]
        found = self._find_qmp() if wanted in ("auto", "qmp") else None
        if found is None and (wanted == "libvirt" or (wanted == "auto" and installed())):
            found = self._find_libvirt()
        return found

    def _find_qmp(self):
        if not runs_here(self.name, self.module.check_mode):
            return None
        try:
            with open(config_path(self.name)) as handle:
                config = handle.read()
        except OSError as err:
            raise MigrationError(f"{self.name} runs here, and its definition {config_path(self.name)} can't be read: {err.strerror}") from err
        enabled = systemctl("is-enabled", vm_unit(self.name), check=False) == "enabled"
        return {"driver": "qmp", "enabled": enabled, **self._ram(config)}

    def _ram(self, config: str) -> dict:
        """The VM's definition for the destination, and those RAM files that have to be on a remote_ram file system there."""
        engine, onboard = self.params["engine"], self.params["onboard"]
        if self.params["state"] != "migrated":
            return {"config": config, "ram": []}
        try:
            with QmpClient(agent_socket(self.name), timeout=10) as qmp:
                if engine == "remote_ram":
                    check_devices(qmp)
                try:
                    return {"config": config, "ram": ram_blocks(qmp)}
                except MigrationError:
                    if not onboard:
                        if engine == "remote_ram":
                            raise
                        return {"config": config, "ram": []}
                    if engine != "precopy":
                        raise MigrationError(f"{self.name} can only be onboarded by the engine precopy, not by {engine}") from None
                    config, block = onboarded(config, self.name, qmp.execute("query-memdev"))
                    return {"config": config, "ram": [block]}
        except QmpError as err:
            raise MigrationError(f"the QEMU of {self.name} does not answer: {err}") from err

    def _find_libvirt(self):
        conn = connect(self.params["libvirt_uri"])
        libvirt = libvirt_module()
        try:
            domain = conn.lookupByName(self.name)
            if not domain.isActive():
                return None
            state, reason = domain.state()
            # A domain that libvirt is receiving is not here yet.
            if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION:
                if domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE:
                    return None
            failed = state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED
            return {"driver": "libvirt", "uuid": domain.UUIDString(), "memory_mib": domain.maxMemory() // 1024, "postcopy_failed": failed}
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise LibvirtError(f"cannot look up {self.name}: {err}") from err
        finally:
            conn.close()

    def _start(self, found: dict, incoming: dict) -> None:
        params = self.params
        address = params["migration_address"] or incoming.get("address")
        job = {
            "side": "outgoing", "vm": self.name, "driver": found["driver"], "engine": params["engine"], "from": params["source"], "to": params["destination"],
            "id": incoming.get("id"), "memory_mib": incoming.get("memory_mib"), "precopy_timeout_s": params["precopy_timeout"],
            "timeout_s": params["timeout"], "bandwidth_mib_s": params["bandwidth"], "postcopy_bandwidth_mib_s": params["postcopy_bandwidth"],
            "max_downtime_ms": params["max_downtime"], "recovery_timeout_s": params["recovery_timeout"],
            "stall_timeout_s": params["stall_timeout"], "onboard": params["onboard"],
        }  # fmt: skip
        if found["driver"] == "libvirt":
            bracketed = f"[{address}]" if ":" in address else address
            job.update(destination_uri=params["destination_uri"].replace("{address}", bracketed), uri=f"tcp://{bracketed}", libvirt_uri=params["libvirt_uri"])
            if params["engine"] == "remote_ram":
                raise MigrationError(f"{self.name} is libvirt's, which can't leave RAM to the engine remote_ram; use userfault or precopy")
        else:
            job["uri"] = incoming["uri"]
            if params["engine"] == "remote_ram":
                job.update(ram=incoming["ram"], address=address, token=params["token"])
        # The record of an earlier attempt, too: until the unit has written its own, who follows would take that one's end for this one's.
        for path in (abort_path(self.state_dir, self.name), record_path(self.state_dir, self.name)):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        start(job, self.state_dir)
        self.result["started"] = True

    # -- aborted ---------------------------------------------------------------------------------------------------

    def _abort(self, record) -> None:
        if not self.attached:
            return
        if record["on"] == "destination":
            raise MigrationError(
                f"the migration of {self.name} can't be aborted any more: it already runs on {record['to']}, only part of its memory is still to come"
            )
        self.result.update(changed=True, record_path=record_path(self.state_dir, self.name), unit=unit_name(self.name))
        if not self.module.check_mode:
            with open(abort_path(self.state_dir, self.name), "w"):
                pass


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True, required_if=[("state", "migrated", ["destination"])])
    try:
        result = VmMigrate(module).run()
    except (MigrationError, LibvirtError) as err:
        module.fail_json(msg=str(err))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
