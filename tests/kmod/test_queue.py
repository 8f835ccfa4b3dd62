# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""More threads wait for pages than READs can be under way: those that are free go from one to the next."""

from __future__ import annotations

from hosts import BACKGROUND, PROGRAMS, Program, slow_down, wait_for


def test_rule_4_some_who_queue_for_a_read_are_killed(ram):
    """What they were given goes on to the others, none of whom is forgotten."""
    file = ram(8, fill=False)
    file.source.sh(f"{PROGRAMS}/fault_load --fill {file.path}")
    file.connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.src("switch")
    slow_down(file.dest, 300000)
    some, others = (
        Program(file.dest, [f"{PROGRAMS}/fault_load", "--threads", "200", "--count", "400", "--first", first, "--pages", "1000", file.path])
        for first in ("0", "1000")
    )
    # Each thread's first touch: more than twice what can be under way.
    wait_for(lambda: file.dst("stats")["faults_retry"] >= 400)
    some.kill()
    assert some.reap(60) == -9
    slow_down(file.dest, 0)
    found = others.finish()
    assert found["status"] == 0, found
    assert file.dst("stats")["pages_demand"] >= 400
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
