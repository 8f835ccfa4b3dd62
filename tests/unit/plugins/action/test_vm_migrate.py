# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.hecaton.fleet.plugins.action import vm_migrate
from ansible_collections.hecaton.fleet.plugins.action.vm_migrate import ActionModule, progress_line
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


class Destination:
    """A host that answers with one incoming record after the other; the last one stays."""

    def __init__(self, *records):
        self.records = list(records)

    def _low_level_execute_command(self, command):
        assert command == "cat /var/lib/hecaton/incoming/web1.json"
        return {"stdout": json.dumps(self.records.pop(0) if len(self.records) > 1 else self.records[0])}


@pytest.fixture
def action(monkeypatch):
    monkeypatch.setattr(vm_migrate.time, "sleep", lambda seconds: None)
    action = ActionModule.__new__(ActionModule)
    action.args, action.vm, action.interval = {}, "web1", 3
    return action


MOVED = {"id": "1", "to": "hv2", "phase": "finished", "result": "moved", "reason": ""}
UNDER_WAY = {"id": "1", "phase": "arrived", "result": None, "reason": ""}


def test_a_vm_that_ended_at_the_destination_did_not_move(action):
    ended = {"id": "1", "phase": "finished", "result": "failed", "reason": "its QEMU ended; its RAM is whole in /run/remote_ram/web1.ram"}
    record = action._arrival(Destination(UNDER_WAY, UNDER_WAY, ended), MOVED)
    assert (record["result"], record["reason"]) == ("failed", f"hv2: {ended['reason']}")


@pytest.mark.parametrize("arrival", [{**UNDER_WAY, "phase": "finished", "result": "moved"}, {**UNDER_WAY, "id": "2", "result": "failed"}])
def test_a_vm_that_arrived_or_was_not_asked_about_has_moved(action, arrival):
    assert action._arrival(Destination(UNDER_WAY, arrival), MOVED) == MOVED


def test_a_worker_whose_play_was_killed_gives_no_signs_of_life(action, monkeypatch):
    """Ansible's workers outlive a kill of ansible-playbook; the next run waits for their signs of life to end."""
    parents, told = [100, 100, 1], []
    action.args, action.controller = {"source": "hv1", "evacuation": "hv1-1"}, 100
    running = {"phase": "precopy", "result": None, "to": "hv2", "percent": None, "rate": None, "remaining": None, "eta_s": None}
    monkeypatch.setattr(vm_migrate.os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(vm_migrate, "progress_line", lambda vm, destination, record: "on its way")
    action._low_level_execute_command = lambda command: told.append(command) or {"stdout": json.dumps(running) + "\nactive"}
    with pytest.raises(AnsibleActionFail, match="what ran the play has ended"):
        action._watch({"record_path": "/r", "unit": "u"}, {})
    assert len(told) == 2
    assert all("touch -c /var/lib/hecaton/claim" in each for each in told)


def test_by_the_kernel_engine_pages_are_told_by_where_they_went(record):
    record.phase("precopy")
    record.data["remote_ram"] = {
        "pages_ahead": 900, "pages_dirty": 100, "pages_demand": 7, "pages_bubble": 20, "pages_background": 30, "wait_hist": [0, 4], "wait_ns_total": 6000000,
    }  # fmt: skip
    assert line(record) == "web1 -> hv2: precopy, pages ahead 900"
    record.phase("postcopy", on="destination")
    assert line(record) == "web1 -> hv2: postcopy, pages ahead 900, missing at the switch 100, on demand 7, in the background 50, mean wait 1.5 ms"
