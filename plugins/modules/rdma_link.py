#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: rdma_link
short_description: Makes a soft RDMA device on a network interface
version_added: 0.1.0
description:
  - Makes or removes a device of soft-iWARP (C(siw)) or soft-RoCE (C(rxe)) on a network interface, as C(rdma link add) does.
  - It lasts until the host stops. The role C(hecaton.fleet.rdma) makes it last longer.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
requirements:
  - C(rdma) of iproute2 on the host
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  netdev:
    description:
      - Network interface that carries the device. It has to be up. Required if O(state=present).
      - V(siw) can't be on the loopback interface, and V(rxe) not on a VLAN.
    type: str
  type:
    description: What kind of device. Required if O(state=present).
    type: str
    choices: [siw, rxe]
  name:
    description: Name of the device. By default O(type) and O(netdev) with C(_) between them. Required if one of these is not given.
    type: str
  state:
    description: Whether the device is to be there.
    type: str
    choices: [present, absent]
    default: present
  force:
    description: Remove a device that is in use as well. What uses it loses its connections.
    type: bool
    default: false
seealso:
  - module: hecaton.fleet.rdma_info
  - module: hecaton.fleet.rdma_probe
"""

EXAMPLES = r"""
- name: Make a soft-iWARP device on the interface that carries migrations
  hecaton.fleet.rdma_link:
    netdev: mig0
    type: siw

- name: Remove it, if nothing uses it
  hecaton.fleet.rdma_link:
    name: siw_mig0
    state: absent
"""

RETURN = r"""
name:
  description: Name of the device.
  returned: success
  type: str
  sample: siw_mig0
device:
  description: The device, as M(hecaton.fleet.rdma_info) has it without the limits; null when there is none.
  returned: success
  type: dict
  sample: {"name": "siw_mig0", "driver": "siw", "soft": true, "transport": "iwarp", "node_guid": "5054:00ff:fe77:0111", "firmware": null,
    "ports": [{"port": 1, "state": "ACTIVE", "physical_state": "LINK_UP", "netdev": "mig0"}]}
reason:
  description: Why it failed, as a word, such as V(no_netdev), V(netdev_down), V(unsuitable), V(name_clash), V(exists),
    V(no_driver), V(in_use) or V(hardware).
  returned: failure
  type: str
  sample: netdev_down
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma, _rdma_host
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError


class RdmaLink:
    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.kind: str | None = module.params["type"]
        self.netdev: str | None = module.params["netdev"]
        self.name: str = module.params["name"] or _rdma.default_name(self.kind, self.netdev)

    def run(self) -> dict:
        before = self.device()
        changed = self.absent(before) if self.params["state"] == "absent" else self.present()
        after = self.device()
        if changed and self.module.check_mode:
            shown = {"name": self.name, "driver": self.kind, "ports": [{"port": 1, "netdev": self.netdev}]} if self.params["state"] == "present" else {}
        else:
            shown = after or {}
        return {"changed": changed, "name": self.name, "device": after, "diff": {"before": before or {}, "after": shown}}

    def device(self) -> dict | None:
        return next((device for device in _rdma_host.devices() if device["name"] == self.name), None)

    def present(self) -> bool:
        if _rdma.same_link(_rdma_host.devices(), self.name, self.kind, self.netdev):
            return False
        problem = _rdma.netdev_problem(self.netdev, _rdma_host.interfaces(), self.kind)
        if problem:
            raise problem
        if self.module.check_mode:
            if _rdma_host.driver_state(self.kind) == "missing":
                self.module.warn(f"the driver {_rdma.SOFT[self.kind][0]} is not there yet")
            return True
        _rdma_host.load(self.kind)
        _rdma_host.run("rdma", "link", "add", self.name, "type", self.kind, "netdev", self.netdev)
        return True

    def absent(self, before: dict | None) -> bool:
        if not before:
            return False
        if not before["soft"]:
            raise RdmaError(f"{self.name} is hardware of the driver {before['driver']}; only soft devices can be removed", "hardware")
        users = _rdma.users(_rdma_host.resources(), self.name)
        if users and not self.params["force"]:
            raise RdmaError(f"{self.name} is in use: {', '.join(users)}; end what uses it, or set force to cut its connections", "in_use")
        if not self.module.check_mode:
            _rdma_host.remove(self.name)
        return True


def main():
    module = AnsibleModule(
        argument_spec={
            "netdev": {"type": "str"},
            "type": {"type": "str", "choices": ["siw", "rxe"]},
            "name": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "force": {"type": "bool", "default": False},
        },
        required_if=[("state", "present", ["netdev", "type"])],
        supports_check_mode=True,
    )
    if not module.params["name"] and not (module.params["type"] and module.params["netdev"]):
        module.fail_json(msg="give the device's name, or its type and netdev", reason="arguments")
    try:
        module.exit_json(**RdmaLink(module).run())
    except RdmaError as err:
        module.fail_json(msg=str(err), reason=err.reason)


if __name__ == "__main__":
    main()
