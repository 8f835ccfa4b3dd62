#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: rdma_info
short_description: Says which RDMA devices a host has
version_added: 0.1.0
description:
  - Returns the RDMA devices of a host, with their ports, GIDs and limits.
  - Given a network interface, it also says which transport that interface can take, and why.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
requirements:
  - C(rdma) of iproute2 on the host
  - C(python3-pyverbs) on the host
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
  netdev:
    description: Return only the devices on this network interface.
    type: str
  transport:
    description:
      - Return RV(choice), the transport that O(netdev) can take. V(hw) is a network card with RDMA, V(siw) soft-iWARP, V(rxe) soft-RoCE.
      - O(netdev) has to be up.
      - V(auto) takes the first of these that the host can do. siw counts also when it can be built from the distribution's source.
    type: str
    choices: [auto, hw, siw, rxe]
  limits:
    description: Whether to ask the devices for their limits, MTU and GIDs, which takes pyverbs.
    type: bool
    default: true
seealso:
  - module: hecaton.fleet.rdma_link
  - module: hecaton.fleet.rdma_probe
"""

EXAMPLES = r"""
- name: Look at all RDMA devices
  hecaton.fleet.rdma_info:
  register: rdma

- name: Ask what the interface that carries migrations can do
  hecaton.fleet.rdma_info:
    netdev: mig0
    transport: auto
  register: rdma
"""

RETURN = r"""
devices:
  description: The RDMA devices, or those on O(netdev).
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the device.
      type: str
    driver:
      description: Its driver. V(siw) and V(rxe) are the soft ones.
      type: str
    soft:
      description: Whether there is no hardware behind it.
      type: bool
    transport:
      description: V(iwarp), V(roce) or V(infiniband).
      type: str
    node_guid:
      description: Its GUID.
      type: str
    firmware:
      description: Version of its firmware, null if it has none.
      type: str
    ports:
      description: Its ports.
      type: list
      elements: dict
      contains:
        port:
          description: Number of the port.
          type: int
        state:
          description: State of the port, V(ACTIVE) when it can be used.
          type: str
        physical_state:
          description: State of the link.
          type: str
        netdev:
          description: Its network interface.
          type: str
        netdev_mtu:
          description: MTU of that interface, in bytes.
          type: int
        mtu:
          description: MTU of the port, in bytes. It matters for RoCE and InfiniBand.
          type: int
        max_mtu:
          description: Largest MTU of the port, in bytes.
          type: int
        gids:
          description: Its GIDs that are in use, each with C(index), C(gid), C(type) and C(netdev).
          type: list
          elements: dict
    users:
      description: What uses it, programs and kernel modules, in words.
      type: list
      elements: str
    limits:
      description:
        - What the device can do, each an integer. C(read_depth) is how many RDMA READs a queue pair may have under way, C(read_depth_served)
          how many it serves, C(sge) and C(sge_read) how many pieces of memory one piece of work, and one READ, may have.
        - C(memory_region_pages) is how many pages one fast registration by the kernel holds; null for a driver whose figure is not known here.
        - Also C(queue_pairs), C(work_requests), C(completions), C(memory_regions) and C(memory_region_bytes).
      type: dict
  sample:
    - name: siw_mig0
      driver: siw
      soft: true
      transport: iwarp
      node_guid: "5054:00ff:fe77:0111"
      firmware: null
      users: ["2 qp of the kernel module remote_ram"]
      ports:
        - port: 1
          state: ACTIVE
          physical_state: LINK_UP
          netdev: mig0
          netdev_mtu: 9000
          mtu: 4096
          max_mtu: 4096
          gids: [{index: 0, gid: "5254:0077:0111:0000:0000:0000:0000:0000", type: null, netdev: mig0}]
      limits: {read_depth: 128, read_depth_served: 128, sge: 6, sge_read: 1, memory_region_pages: 256}
drivers:
  description: Drivers of soft devices, each V(loaded), V(available) or V(missing).
  returned: success
  type: dict
  sample: {siw: missing, rxe: available}
choice:
  description: The transport for O(netdev).
  returned: O(transport) is given
  type: dict
  contains:
    transport:
      description: V(hw), V(siw) or V(rxe).
      type: str
    why:
      description: Why this one.
      type: str
    device:
      description: The device, if it is hardware.
      type: str
    build:
      description: Source that siw has to be built from, null when it is there already.
      type: str
  sample:
    transport: siw
    why: mig0 has no RDMA hardware; siw can be built from /usr/src/linux-source-6.12.tar.xz
    device: null
    build: /usr/src/linux-source-6.12.tar.xz
hardware_module:
  description: Kernel module that the network card behind O(netdev) needs for RDMA, null if it isn't known to have RDMA.
  returned: O(netdev) is given
  type: str
  sample: mlx5_ib
hardware_driver:
  description: That kernel module is V(loaded), V(available) or V(missing); null if there is no such module.
  returned: O(netdev) is given
  type: str
  sample: available
kernel:
  description: Release of the running kernel.
  returned: success
  type: str
  sample: 6.12.117+deb13-amd64
memlock_bytes:
  description: How much memory a program of the user that this runs as may lock, null for any amount.
  returned: success
  type: int
  sample: null
reason:
  description: Why it failed, as a word, such as V(no_netdev), V(netdev_down), V(no_transport) or V(not_installed).
  returned: failure
  type: str
  sample: no_transport
"""

import os
import resource

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma, _rdma_host
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError


class RdmaInfo:
    def __init__(self, module: AnsibleModule):
        self.params = module.params

    def run(self) -> dict:
        netdev = self.params["netdev"]
        found = _rdma_host.devices()
        interfaces = _rdma_host.interfaces()
        drivers = {kind: _rdma_host.driver_state(kind) for kind in _rdma.SOFT}
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        kernel = os.uname().release
        result = {"changed": False, "kernel": kernel, "drivers": drivers, "memlock_bytes": None if limit == resource.RLIM_INFINITY else limit}
        if netdev:
            problem = _rdma.netdev_problem(netdev, interfaces)
            # One that is down can be looked at, and can take no transport.
            if problem and (netdev not in interfaces or self.params["transport"]):
                raise problem
            card = interfaces[netdev]["driver"]
            result["hardware_module"] = needed = _rdma.HARDWARE.get(card)
            result["hardware_driver"] = state = _rdma_host.module_state(needed) if needed else None
            if self.params["transport"]:
                result["choice"] = _rdma.choose(self.params["transport"], netdev, found, drivers, _rdma_host.siw_source(kernel), kernel, card, state)
            found = _rdma.on_netdev(found, netdev)
        resources = _rdma_host.resources() if found else {}
        for device in found:
            device["users"] = _rdma.users(resources, device["name"])
            for port in device["ports"]:
                port["netdev_mtu"] = interfaces.get(port["netdev"], {}).get("mtu")
            if self.params["limits"]:
                self.ask(device)
        return {**result, "devices": found}

    @staticmethod
    def ask(device: dict) -> None:
        answer = _rdma_host.verbs(device["name"], [port["port"] for port in device["ports"]])
        device["limits"] = {**answer["limits"], "memory_region_pages": _rdma.MR_PAGES.get(device["driver"])}
        for port in device["ports"]:
            port.update(answer["ports"][port["port"]])


def main():
    module = AnsibleModule(
        argument_spec={
            "netdev": {"type": "str"},
            "transport": {"type": "str", "choices": ["auto", "hw", "siw", "rxe"]},
            "limits": {"type": "bool", "default": True},
        },
        required_by={"transport": ["netdev"]},
        supports_check_mode=True,
    )
    try:
        module.exit_json(**RdmaInfo(module).run())
    except (RdmaError, OSError) as err:
        module.fail_json(msg=str(err), reason=getattr(err, "reason", "failed"))


if __name__ == "__main__":
    main()
