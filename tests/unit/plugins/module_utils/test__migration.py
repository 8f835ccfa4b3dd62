# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import pathlib
import stat

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _migration
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import MigrationError, Record

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


@pytest.fixture
def record(folder):
    return Record(folder, {"vm": "web1", "driver": "qmp", "engine": "userfault", "from": "hv1", "to": "hv2"})


def on_disk(folder, name="web1"):
    return json.loads(pathlib.Path(_migration.record_path(folder, name)).read_text())


def request_abort(folder):
    pathlib.Path(folder, "migrations").mkdir(exist_ok=True)
    pathlib.Path(_migration.abort_path(folder, "web1")).touch()


@pytest.mark.parametrize("name", ["web1", "a", "_x", "db-1.example.org", "x" * 100])
def test_a_name_that_can_name_a_file_is_taken(name):
    assert _migration.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../web1", "a/b", "a b", "-a", ".a", "a\n", "a\0b", "a@b", "a;b", "a+b", "w\u00e9b", "x" * 101])
def test_a_name_that_cannot_name_a_file_and_a_unit_is_refused(name):
    with pytest.raises(MigrationError, match="allowed are letters"):
        _migration.check_name(name)


def test_a_change_is_on_disk_when_the_call_returns_and_all_may_read_it(record, folder):
    record.save(phase="precopy", percent=3)
    assert (on_disk(folder)["phase"], on_disk(folder)["percent"]) == ("precopy", 3)
    assert stat.S_IMODE(os.stat(_migration.record_path(folder, "web1")).st_mode) == 0o644


def test_a_write_that_fails_halfway_leaves_the_old_record_and_nothing_else(record, folder):
    record.save(percent=3)
    with pytest.raises(TypeError):
        record.save(percent=4, reason=object())
    assert on_disk(folder)["percent"] == 3
    assert os.listdir(os.path.join(folder, "migrations")) == ["web1.json"]


def test_a_record_that_cannot_be_put_in_place_leaves_the_old_one(record, folder, monkeypatch):
    record.save(percent=3)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_migration.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        record.save(percent=4)
    assert on_disk(folder)["percent"] == 3
    assert os.listdir(os.path.join(folder, "migrations")) == ["web1.json"]


def test_without_a_record_there_is_none(folder):
    assert _migration.read_record(folder, "web1") is None


def test_the_two_sides_have_a_record_each(record, folder):
    record.save()
    assert _migration.read_record(folder, "web1")["vm"] == "web1"
    assert _migration.read_record(folder, "web1", incoming=True) is None


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b'"finished"', b'{"vm": "web1"}', b"\xff\xfe", b'{"phase": "precopy"} and more'])
def test_a_record_that_is_not_understood_is_named_and_not_taken_for_none(folder, text):
    path = pathlib.Path(_migration.record_path(folder, "web1"))
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(MigrationError, match="remove it if no migration of web1 is running") as refused:
        _migration.read_record(folder, "web1")
    assert str(path) in str(refused.value)


def test_samples_never_exceed_their_limit_and_keep_start_and_end(record):
    for number in range(1500):
        record.progress(number * MIB, (1500 - number) * MIB, 1500 * MIB, 10 * MIB)
        assert len(record.data["samples"]) <= _migration.MAX_SAMPLES
    remaining = [sample[3] for sample in record.data["samples"]]
    assert (remaining[0], remaining[-1]) == (1500, 1)
    assert remaining == sorted(remaining, reverse=True)


def test_progress_says_percent_rate_and_time_left(record, folder):
    record.phase("precopy")
    record.progress(300 * MIB, 100 * MIB, 400 * MIB, 20 * MIB)
    found = on_disk(folder)
    assert (found["percent"], found["rate_mib_s"], found["remaining_mib"], found["eta_s"], found["bytes"]) == (75, 20.0, 100.0, 5.0, 300 * MIB)
    assert found["samples"][0][1:] == ["precopy", 20.0, 100.0]


@pytest.mark.parametrize("remaining, total, percent", [(0, 400, 99), (400, 400, 0), (500, 400, 0), (0, 0, 0)])
def test_percent_stays_between_0_and_99_until_the_vm_has_moved(record, remaining, total, percent):
    record.progress(0, remaining, total, 0)
    assert (record.data["percent"], record.data["eta_s"], record.data["rate_mib_s"]) == (percent, None, None)


def test_an_abort_is_seen_until_it_is_refused_and_the_refusal_is_recorded(record, folder):
    assert not record.abort_requested()
    request_abort(folder)
    assert record.abort_requested()
    record.refuse_abort("too late")
    assert not record.abort_requested()
    assert on_disk(folder)["abort_refused"] == "too late"


def test_an_abort_is_asked_of_one_vm_only(folder, record):
    request_abort(folder)
    assert not Record(folder, {"vm": "web2"}).abort_requested()


def test_finish_says_what_became_of_the_vm_and_forgets_the_abort(record, folder):
    request_abort(folder)
    record.phase("precopy")
    record.progress(1, 100 * MIB, 400 * MIB, 20 * MIB)
    record.finish("aborted", "on request", on="source")
    found = on_disk(folder)
    assert (found["phase"], found["result"], found["reason"], found["on"]) == ("finished", "aborted", "on request", "source")
    assert (found["switched"], found["eta_s"], found["rate_mib_s"]) == (None, None, None)
    assert found["finished"] >= found["started"] and found["total_ms"] >= 0
    assert not os.path.exists(_migration.abort_path(folder, "web1"))


def test_a_vm_that_moved_is_at_100_percent_and_has_switched(record, folder):
    record.progress(1, 100 * MIB, 400 * MIB, 20 * MIB)
    record.save(total_ms=7300)
    record.finish("moved", on="destination")
    found = on_disk(folder)
    assert (found["percent"], found["remaining_mib"], found["total_ms"]) == (100, 0.0, 7300)
    assert found["switched"] == found["finished"]


def test_the_switch_is_noted_once(record):
    record.phase("precopy")
    assert record.data["switched"] is None
    record.phase("postcopy", on="destination")
    switched = record.data["switched"]
    assert switched
    record.phase("recovering", on="destination")
    record.phase("postcopy", on="destination")
    record.finish("moved", on="destination")
    assert record.data["switched"] == switched


@pytest.mark.parametrize("side, now", [("source", "unknown"), ("destination", "destination"), ("unknown", "unknown")])
def test_of_a_migration_whose_unit_died_the_vm_is_only_known_to_be_on_the_destination(record, side, now):
    record.data["on"] = side
    stale = _migration.finish_stale(record.data, "gone")
    assert (stale["phase"], stale["result"], stale["reason"], stale["on"]) == ("finished", "failed", "gone", now)
    assert record.data["phase"] == "starting"


@pytest.mark.parametrize("same", [True, False])
def test_a_unit_that_takes_a_migration_up_keeps_what_was_noted_of_it(record, folder, same):
    record.phase("precopy")
    record.progress(300 * MIB, 100 * MIB, 400 * MIB, 20 * MIB)
    record.phase("postcopy", on="destination", downtime_ms=120)
    job = {"vm": "web1", "from": "hv1", "to": "hv2", "resume": True, "id": record.data["id"] if same else "another"}
    taken_up = _migration.Record(folder, job).data
    for key in ("downtime_ms", "switched", "samples", "bytes"):
        assert (taken_up[key] == record.data[key]) is same, key
    assert (taken_up["phase"], taken_up["result"]) == ("starting", None)
