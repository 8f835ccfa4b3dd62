# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmark of deadlines makes of a report."""

from __future__ import annotations

import pytest


def report(freed=125.0, deadline=None, moves=6, estimated=90.0):
    """Two at a time, 30 s each, 5 s apart, after 20 s in which nothing moved."""
    vms = []
    for number in range(moves):
        start = 25.0 + 35 * (number // 2)
        vms.append({
            "name": f"vm{number}", "result": "moved", "memory_mib": 160, "dirty_rate_mib_s": 2.0, "precopy_timeout_s": 20, "precopy_s": 21.5,
            "planned_start_s": 20.0, "started_s": start, "planned_finish_s": 50.0, "finished_s": start + 30, "downtime_ms": 90 + number, "bytes": 1 << 27,
        })  # fmt: skip
    return {"deadline_s": deadline, "freed_s": freed, "plan": {"elapsed_s": 20.0, "estimated_s": estimated, "feasible": True}, "vms": vms}


def test_the_next_plan_would_have_planned_it_as_it_went(deadline):
    known = deadline.calibrate(report(), bandwidth=8, setup=10)
    # 105 s in two slots, 30 s of each 35 s of them on data: planned were 60 s for that, and it took 90.
    assert known == {"bandwidth_mib_s": pytest.approx(8 * 60 / 90, abs=0.01), "setup_s": 5.0, "moving_s": 100.0}


def test_deadlines_are_shares_of_what_comes_after_the_plan(deadline):
    assert deadline.deadlines(report(), (0.5, 1.0, 2.0)) == [72, 125, 230]


@pytest.mark.parametrize(("limit", "in_time"), [(None, None), (114, True), (125, True), (113, False)])
def test_a_host_is_free_in_time_up_to_a_tenth_too_late(deadline, limit, in_time):
    made = deadline.row(report(deadline=limit), {"vm1": {"corrupt_total": 2}, "vm2": {"corrupt_total": 0}})
    assert made["in_time"] is in_time and made["corrupt"] == 2
    assert (made["planned_s"], made["precopy_planned_s"], made["precopy_s"], made["downtime_max_ms"]) == (110.0, 120, 129.0, 95)
    assert made["vms"][0]["finished_s"] == 55.0


def test_a_host_that_never_was_free_is_not_in_time(deadline):
    made = deadline.row(report(freed=None, deadline=600), {})
    assert made["in_time"] is False and made["of_deadline"] is None
