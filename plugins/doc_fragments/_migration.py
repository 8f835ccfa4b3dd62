# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    # Options of the modules on both sides of a migration.
    DOCUMENTATION = r"""
options:
  name:
    description: Name of the virtual machine.
    type: str
    required: true
    aliases: [vm]
  port_min:
    description: First TCP port for migration streams on the destination. Only for O(driver=qmp).
    type: int
    default: 49200
  port_max:
    description: Last TCP port for migration streams on the destination. Only for O(driver=qmp).
    type: int
    default: 49299
  max_incoming:
    description:
      - How many virtual machines may be on their way to the destination at once, V(0) for any number. M(hecaton.fleet.vm_migrate)
        waits for its turn.
    type: int
    default: 0
  memory_reserve:
    description: MiB of memory that have to stay free on the destination.
    type: int
    default: 0
  libvirt_uri:
    description: libvirt's URI on the hypervisor that the module runs on.
    type: str
    default: qemu:///system
  state_dir:
    description: Folder on the hypervisors where migrations are recorded.
    type: path
    default: /var/lib/hecaton
"""
