# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    # What every module says about check mode, diff mode and idempotence.
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in check mode and say what it would change, without changing anything.
  diff_mode:
    description: Returns what it changed, or would change, when in diff mode.
  idempotent:
    description: When run twice in a row with the same arguments, the second run changes nothing.
"""

    # The action group every module belongs to.
    ACTIONGROUP_FLEET = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/hecaton.fleet.fleet) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - hecaton.fleet.fleet
"""
