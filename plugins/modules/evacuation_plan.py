#!/usr/bin/python

# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: evacuation_plan
short_description: Plan which VM of a hypervisor moves where
version_added: 0.1.0
description:
  - Decides for each VM of one or more hypervisors which host it moves to, in which order, with which engine, and for how
    long its memory is copied ahead, so that the hypervisor is empty by a deadline.
  - Nothing is moved and no host is contacted. The facts of all hosts, as M(hecaton.fleet.vm_info) returns them, are the
    only input. Run it once, on the control node, with C(delegate_to) set to V(localhost).
  - A destination is chosen by free memory above a reserve, by CPU features, machine types and drivers, by affinity and
    anti-affinity groups, and by pins. VMs are spread over the hosts with most free memory. They are packed tightly only
    when a VM would find no room otherwise.
  - Big VMs and VMs that dirty much memory start first.
  - A VM that can't move is reported as blocked, with everything that is in its way. The module does not fail for that, see
    RV(plan.feasible).
author:
  - The hecaton.fleet authors (@hecaton-fleet)
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
  facts:
    description:
      - Facts of all hypervisors, the one to evacuate and those that may take its VMs.
      - Each element has C(host) and C(vms), as M(hecaton.fleet.vm_info) returns them.
      - For a host that can't be reached, give C(host) with its C(name), and C(unreachable) with the reason.
    type: list
    elements: dict
    required: true
  sources:
    description:
      - Hypervisors to empty, by the C(name) in their facts. All of them are planned together.
      - Without it, O(vms) and O(destinations) are required, and the VMs are taken from whichever other host they are on.
    type: list
    elements: str
    default: []
    aliases: [source]
  destinations:
    description:
      - Hypervisors that may take VMs. An empty list is an error.
      - When not set, these are all hosts in O(facts) but O(sources).
      - Cordoned and unreachable hosts get nothing in either case.
    type: list
    elements: str
  vms:
    description:
      - Names of the VMs to move, for instance to bring them back.
      - When not set, every VM of O(sources) is planned.
    type: list
    elements: str
  exclude:
    description: Names of VMs to leave where they are. They are listed in RV(plan.skipped).
    type: list
    elements: str
    default: []
  pinned:
    description:
      - Names of VMs, each with the only host it may move to.
      - With V(null) a VM has to stay where it is, which blocks the evacuation.
    type: dict
    default: {}
  affinity:
    description:
      - Names of groups, each with a list of VMs that have to be on the same host.
      - Groups in the VMs' own facts count too.
    type: dict
    default: {}
  anti_affinity:
    description:
      - Names of groups, each with a list of VMs that have to be on different hosts.
      - Groups in the VMs' own facts count too.
    type: dict
    default: {}
  memory_reserve_mib:
    description: Memory in MiB that has to stay free on each destination.
    type: float
    default: 1024
  cpu_overcommit:
    description:
      - How many vCPUs a destination may run for each of its CPUs.
      - When not set, vCPUs are not counted.
    type: float
  per_source:
    description: How many VMs leave one host at the same time.
    type: int
    default: 2
  per_destination:
    description: How many VMs arrive on one host at the same time.
    type: int
    default: 2
  bandwidth_mib_s:
    description:
      - Bandwidth in MiB/s of each host's link for migrations. Migrations at the same time share it.
      - The default is a bit less than a 10 Gbit/s link carries.
    type: float
    default: 1000
  deadline_s:
    description:
      - Time in seconds within which all VMs have to be gone.
      - The time of pre-copy is bounded for each VM so that this holds. What is not copied ahead is fetched after the switch.
      - When not set, each VM gets as much pre-copy as it can use.
    type: float
  elapsed_s:
    description: Time in seconds of O(deadline_s) that had passed when the plan was made.
    type: float
    default: 0
  setup_s:
    description: Time in seconds that a move takes besides its data, to prepare both hosts and to move the devices' state.
    type: float
    default: 1
  precopy_min_s:
    description: Time in seconds of pre-copy that a VM gets at least, however close the deadline.
    type: int
    default: 2
  engine:
    description:
      - What moves the memory.
      - V(auto) takes the best engine that the VM and both hosts can use, V(remote_ram) before V(userfault) before V(precopy).
      - V(userfault) is QEMU's pre-copy, bounded in time, and then its post-copy.
      - V(precopy) is QEMU's pre-copy alone. It may never converge.
      - A VM that can't use the engine asked for is blocked.
    type: str
    choices: [auto, remote_ram, userfault, precopy]
    default: auto
  onboard:
    description:
      - Whether VMs that can't use V(remote_ram) because of where their memory is have it there once they have arrived, if VM and
        destination allow that. Such a VM moves by V(precopy), which O(engine) has to be, or V(auto).
    type: bool
    default: false
  walk:
    description:
      - Plans how VMs are onboarded, instead of how O(sources) become empty. Of these, or of all hosts if there are none, only those VMs move
        that can have their memory on C(remote_ram) and have it elsewhere, as with O(onboard).
      - One host comes after the other, in RV(plan.waves), and may take VMs of the others, also where one has left before.
      - There is no O(deadline_s). VMs that can't be onboarded are skipped, with the reason, and so are hosts that belong to an evacuation.
    type: bool
    default: false
seealso:
  - module: hecaton.fleet.vm_info
"""

EXAMPLES = r"""
- name: Gather the facts of all hypervisors
  hecaton.fleet.vm_info:
  register: fleet_facts

- name: Plan the evacuation of hv07 within ten minutes
  hecaton.fleet.evacuation_plan:
    facts: "{{ ansible_play_hosts | map('extract', hostvars, 'fleet_facts') }}"
    source: hv07
    deadline_s: 600
    bandwidth_mib_s: 1100
    anti_affinity:
      web: [web1, web2, web3]
    exclude: [lab9]
  delegate_to: localhost
  run_once: true
  register: evacuation

- name: Show the plan
  ansible.builtin.debug:
    msg: "{{ evacuation.table.splitlines() }}"
  run_once: true

- name: Plan how the VMs of the whole fleet get their memory onto remote_ram
  hecaton.fleet.evacuation_plan:
    facts: "{{ ansible_play_hosts | map('extract', hostvars, 'fleet_facts') }}"
    walk: true
  delegate_to: localhost
  run_once: true

- name: Plan how two VMs come back to hv07
  hecaton.fleet.evacuation_plan:
    facts: "{{ ansible_play_hosts | map('extract', hostvars, 'fleet_facts') }}"
    vms: [web1, db1]
    destinations: [hv07]
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
plan:
  description: The plan. Memory is in MiB, time in seconds, rates are in MiB/s.
  returned: success
  type: dict
  contains:
    source:
      description: The host to empty, V(null) if there are several.
      type: str
      sample: hv07
    sources:
      description: All hosts to empty.
      type: list
      elements: str
      sample: [hv07]
    deadline_s:
      description: The deadline asked for, V(null) without one.
      type: float
      sample: 600.0
    elapsed_s:
      description: O(elapsed_s). The times of the plan count from there.
      type: float
      sample: 12.3
    estimated_s:
      description: Estimated time in seconds until the last VM is gone.
      type: float
      sample: 42.3
    feasible:
      description: Whether every VM can move, and by the deadline. VMs left out on purpose don't count.
      type: bool
      sample: true
    concurrency:
      description: How many VMs move at the same time, for each source, for each destination, and overall at the peak.
      type: dict
      sample: {per_source: 2, per_destination: 2, peak: 2}
    moves:
      description: The moves, in the order in which they start.
      type: list
      elements: dict
      contains:
        vm:
          description: Name of the VM.
          type: str
          sample: web1
        driver:
          description: What manages the VM.
          type: str
          sample: libvirt
        from:
          description: The host that the VM is on.
          type: str
          sample: hv07
        to:
          description: The host that it moves to.
          type: str
          sample: hv02
        engine:
          description: What moves its memory.
          type: str
          sample: userfault
        engine_reason:
          description: Why that engine.
          type: str
          sample: best engine that the VM and both hosts can use
        onboard:
          description: Whether its memory is on C(remote_ram) from this move on, and was elsewhere before.
          type: bool
          sample: false
        memory_mib:
          description: Memory of the VM.
          type: float
          sample: 4096
        dirty_rate_mib_s:
          description: How fast the VM dirties its memory, V(null) when it was not measured.
          type: float
          sample: 12.5
        precopy_timeout_s:
          description: Time after which the VM switches to its destination, whatever has been copied by then.
          type: int
          sample: 8
        order:
          description: Place in the order of starts, from 1.
          type: int
          sample: 1
        wave:
          description: Which wave it is in, from 1.
          returned: with O(walk)
          type: int
          sample: 1
        estimated_start_s:
          description: Estimated start, in seconds since the first one.
          type: float
          sample: 0.0
        estimated_s:
          description: Estimated time from its start until its memory is complete on the destination.
          type: float
          sample: 9.5
        reason:
          description: Why that destination.
          type: str
          sample: most free memory
    waves:
      description: How many of the moves each wave has; one begins when all of the wave before have ended.
      returned: with O(walk)
      type: list
      elements: int
      sample: [3, 2]
    blocked:
      description: VMs that can't move.
      type: list
      elements: dict
      contains:
        vm:
          description: Name of the VM.
          type: str
          sample: gpu1
        driver:
          description: What manages the VM.
          type: str
          sample: libvirt
        from:
          description: The host that the VM is on.
          type: str
          sample: hv07
        blockers:
          description: Everything that is in its way, each with C(code) and C(message).
          type: list
          elements: dict
          sample: [{code: host_device, message: "it uses PCI device 0000:00:05.0 of the host"}]
    skipped:
      description: VMs left out on purpose, each with C(vm), C(driver), C(from) and C(reason).
      type: list
      elements: dict
      sample: [{vm: lab9, driver: libvirt, from: hv07, reason: excluded}]
    hosts:
      description: All hosts, before and after.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the host.
          type: str
          sample: hv02
        cordoned:
          description: Whether it is cordoned.
          type: bool
          sample: false
        usable:
          description: Whether VMs may move to it.
          type: bool
          sample: true
        reason:
          description: Why not, empty if it is usable.
          type: str
          sample: ""
        memory_free_before_mib:
          description: Free memory now.
          type: int
          sample: 64000
        memory_free_after_mib:
          description: Free memory after all moves.
          type: int
          sample: 59904
        incoming:
          description: How many VMs move to it.
          type: int
          sample: 1
    warnings:
      description: What a person should know about the plan, in sentences.
      type: list
      elements: str
      sample: ["the dirty rate of db1 is not known: counted as 25% of the VM's share of the link"]
table:
  description: The plan as a text table for a person.
  returned: success
  type: str
  sample: |
    Evacuation of hv07: 1 to move, about 9.5 s of 600 s: feasible

      #  start  takes  VM    from  to    engine       memory     dirties  pre-copy  why there
      1    0 s  9.5 s  web1  hv07  hv02  userfault  4096 MiB  12.5 MiB/s       8 s  most free memory
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils._planner import ENGINES, Options, PlanError, make_plan, render_table
from ansible_collections.hecaton.fleet.plugins.module_utils._planner_walk import make_walk


def argument_spec():
    return {
        "facts": {"type": "list", "elements": "dict", "required": True},
        "sources": {"type": "list", "elements": "str", "default": [], "aliases": ["source"]},
        "destinations": {"type": "list", "elements": "str"},
        "vms": {"type": "list", "elements": "str"},
        "exclude": {"type": "list", "elements": "str", "default": []},
        "pinned": {"type": "dict", "default": {}},
        "affinity": {"type": "dict", "default": {}},
        "anti_affinity": {"type": "dict", "default": {}},
        "memory_reserve_mib": {"type": "float", "default": 1024},
        "cpu_overcommit": {"type": "float"},
        "per_source": {"type": "int", "default": 2},
        "per_destination": {"type": "int", "default": 2},
        "bandwidth_mib_s": {"type": "float", "default": 1000},
        "deadline_s": {"type": "float"},
        "elapsed_s": {"type": "float", "default": 0},
        "setup_s": {"type": "float", "default": 1},
        "precopy_min_s": {"type": "int", "default": 2},
        "engine": {"type": "str", "choices": ["auto", *ENGINES], "default": "auto"},
        "onboard": {"type": "bool", "default": False},
        "walk": {"type": "bool", "default": False},
    }


def main():
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    options = Options(**{name: module.params[name] for name in argument_spec() if name not in ("facts", "walk")})
    try:
        plan = (make_walk if module.params["walk"] else make_plan)(module.params["facts"], options)
    except PlanError as error:
        module.fail_json(msg=f"No plan: {error}")
    module.exit_json(changed=False, plan=plan, table=render_table(plan))


if __name__ == "__main__":
    main()
