# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.hecaton.fleet.plugins.action.vm_migrate import progress_line
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Record

MIB = 1 << 20


@pytest.fixture
def record(tmp_path):
    return Record(str(tmp_path), {"vm": "web1", "from": "hv1", "to": "hv2"})


def line(record):
    return progress_line("web1", "hv2", record.data)


def test_before_memory_flows_there_is_only_the_phase(record):
    assert line(record) == "web1 -> hv2: starting"


def test_while_memory_flows_percent_rate_rest_and_time_left_are_shown(record):
    record.phase("precopy")
    record.progress(300 * MIB, 100 * MIB, 400 * MIB, 20 * MIB)
    assert line(record) == "web1 -> hv2: precopy, 75 %, 20.0 MiB/s, 100 MiB left, ETA 5 s"


def test_a_stream_that_stands_still_has_no_time_left(record):
    record.phase("precopy")
    record.progress(300 * MIB, 100 * MIB, 400 * MIB, 0)
    assert line(record) == "web1 -> hv2: precopy, 75 %, 0.0 MiB/s, 100 MiB left"


def test_a_lost_connection_is_said(record):
    record.phase("recovering", on="destination")
    assert line(record) == "web1 -> hv2: recovering, connection lost, reconnecting"


def test_an_abort_that_came_too_late_is_said(record):
    record.phase("postcopy", on="destination")
    record.refuse_abort("it already runs there")
    assert line(record) == "web1 -> hv2: postcopy, can't be aborted: it already runs there"


def test_one_that_moved_says_how_long_it_took_and_stood_still(record):
    record.finish("moved", on="destination", total_ms=7340, downtime_ms=120)
    assert line(record) == "web1 -> hv2: moved, in 7.3 s, downtime 120 ms"


def test_one_that_moved_without_a_measured_downtime_does_not_make_one_up(record):
    record.finish("moved", on="destination", total_ms=7340)
    assert line(record) == "web1 -> hv2: moved, in 7.3 s"


@pytest.mark.parametrize("result", ["failed", "aborted"])
def test_one_that_did_not_move_says_why(record, result):
    record.finish(result, "no route to host")
    assert line(record) == f"web1 -> hv2: {result}, no route to host"
