# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the other tests stand on: a host's CPU, emulated as it may be, computes as a real one."""

from __future__ import annotations

import pytest

from hosts import PROGRAMS

CARRY, ALWAYS, PARITY, ZERO, INTERRUPTS = 1 << 0, 1 << 1, 1 << 2, 1 << 6, 1 << 9


@pytest.mark.above
def test_an_exchange_of_16_bytes_leaves_the_other_flags_alone(hosts):
    """The kernel's allocator lives on it. With the flags spoilt, one of them the direction of string operations, hosts panicked."""
    for host in hosts:
        said = host.sh(f"{PROGRAMS}/flags").strip()
        # 0 minus the operand borrows from beyond the highest bit, and the pair was as expected.
        assert said == "none" or int(said, 16) == CARRY | ALWAYS | PARITY | ZERO | INTERRUPTS, said
