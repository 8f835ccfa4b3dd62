# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import pathlib
import socket

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _migrate_qmp, _migrate_unit, _migration
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Aborted, MigrationError, Record
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpError

MIB = 1 << 20
LISTENS = _migrate_qmp.listens
UNIT = "hecaton-vm@web1.service"


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1700000000 + self.now

    def sleep(self, seconds):
        self.now += seconds
        assert self.now < 20000, "it never ends"


class Host:
    """A host with one QEMU: what it answers, and what it was told.

    ``script`` is a list of ``(seconds, answer)``: what query-migrate answers, and for how long; the last one stays.
    """

    def __init__(self, clock, script=(), run_state="running"):
        self.clock = clock
        self.script = list(script) or [(0, "none")]
        self.since = None
        self.run_state = run_state
        self.commands = []
        self.times = []
        self.refuse = {}
        self.on = {}
        self.alive = True
        self.listens = True
        self.events = []
        self.systemctl = []
        self.ports = {}  # what is wrong with a port

    def become(self, *script):
        self.script, self.since = list(script), self.clock.now

    def status(self):
        if self.since is None:
            self.since = self.clock.now
        while len(self.script) > 1 and self.clock.now - self.since >= self.script[0][0]:
            self.since += self.script.pop(0)[0]
        answer = self.script[0][1]
        return answer if isinstance(answer, dict) else {"status": answer}

    def told(self, command):
        return [arguments for name, arguments in self.commands if name == command]

    def told_at(self, command):
        return [when for (name, _arguments), when in zip(self.commands, self.times, strict=True) if name == command]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_migrate_qmp, "time", clock)
    monkeypatch.setattr(_migration, "time", clock)
    return clock


@pytest.fixture
def host(monkeypatch, clock, tmp_path):
    host = Host(clock)

    class Client:
        def __init__(self, path, timeout=30.0):
            if not (host.alive and host.listens):
                raise QmpError(f"cannot reach QEMU at {path}", "ConnectionError")

        def close(self):
            pass

        def events(self):
            if not (host.alive or host.events):
                raise QmpError("lost QEMU", "ConnectionError")
            return [{"event": event} for event in host.events]

        def execute(self, command, arguments=None):
            if not host.alive:
                raise QmpError("lost QEMU", "ConnectionError")
            if command == "query-migrate":
                answer = host.status()
                if answer["status"] == "gone":
                    host.alive = False
                    raise QmpError("lost QEMU", "ConnectionError")
                return {} if answer["status"] == "none" else answer
            if command == "query-status":
                return {"status": host.run_state() if callable(host.run_state) else host.run_state}
            host.commands.append((command, arguments))
            host.times.append(host.clock.now)
            refusal = host.refuse.get(command)
            refusal = refusal(arguments) if callable(refusal) else refusal
            if refusal:
                raise QmpError(f"{command}: {refusal}")
            if command == "quit":
                host.alive = False
            if command in host.on:
                host.on[command](arguments)
            return {}

    def systemctl(*arguments, check=True):
        host.systemctl.append(arguments)
        if arguments[0] == "is-active":
            return "active" if host.alive else "inactive"
        return ""

    monkeypatch.setattr(_migrate_qmp, "QmpClient", Client)

    def listens(address, port):
        problem = host.ports.get(port)
        if problem:
            raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(_migrate_qmp, "listens", listens)
    monkeypatch.setattr(_migrate_qmp, "systemctl", systemctl)
    monkeypatch.setattr(_migrate_qmp, "CONFIG_DIR", str(tmp_path / "vms"))
    monkeypatch.setattr(_migrate_qmp, "RUN_DIR", str(tmp_path / "run"))
    (tmp_path / "vms").mkdir()
    return host


@pytest.fixture
def config(host):
    """The VM's definition on the source."""
    path = pathlib.Path(_migrate_qmp.config_path("web1"))
    path.write_text("QEMU_ARGS=-nodefaults\n")
    return path


def outgoing(tmp_path, engine="userfault", **more):
    job = {"vm": "web1", "driver": "qmp", "engine": engine, "from": "hv1", "to": "hv2", "uri": "tcp:10.77.1.12:49200", "precopy_timeout_s": 10, **more}
    return _migrate_qmp.Outgoing(job, Record(str(tmp_path), job))


def active(remaining=100):
    return {"status": "active", "ram": {"transferred": 10 * MIB, "remaining": remaining * MIB, "total": 200 * MIB, "mbps": 80.0}}


COMPLETED = {"status": "completed", "downtime": 120, "total-time": 7300, "ram": {"transferred": 150 * MIB, "remaining": 0, "total": 200 * MIB}}


# -- the source --------------------------------------------------------------------------------------------------------


def test_a_precopy_runs_through_and_the_source_forgets_the_vm(host, config, tmp_path):
    moving = outgoing(tmp_path, "precopy", bandwidth_mib_s=50, max_downtime_ms=100)
    host.on["migrate"] = lambda arguments: host.become((5, active()), (0, COMPLETED))
    moving.run()
    data = moving.record.data
    assert (data["phase"], data["result"], data["on"], data["downtime_ms"], data["total_ms"]) == ("finished", "moved", "destination", 120, 7300)
    assert data["bytes"] == 150 * MIB and len(data["samples"]) > 10
    assert host.told("migrate") == [{"uri": "tcp:10.77.1.12:49200"}]
    assert host.told("migrate-set-parameters") == [{"max-bandwidth": 50 * MIB, "downtime-limit": 100, "max-postcopy-bandwidth": 0}]
    assert host.told("migrate-start-postcopy") == []
    assert host.told("quit") == [None] and not config.exists()
    assert ("disable", UNIT) in host.systemctl


@pytest.fixture
def ram_file(host, monkeypatch, tmp_path):
    """A file of the guest's memory, with what QEMU answers about it."""
    path = tmp_path / "web1.ram"
    path.write_bytes(b"memory")
    monkeypatch.setattr(_migrate_qmp, "is_remote_ram", lambda name: name == str(path))
    answers = {"query-memdev": [{"id": "pc.ram", "size": 6, "share": True}], "qom-get": str(path)}
    client = _migrate_qmp.QmpClient
    execute = client.execute

    def ask(self, command, arguments=None):
        said = execute(self, command, arguments)
        return answers.get(command, said)

    monkeypatch.setattr(client, "execute", ask)
    return path


def test_ram_files_of_a_vm_that_has_left_by_qemus_stream_are_removed(host, config, ram_file, tmp_path):
    host.on["migrate"] = lambda arguments: host.become((5, active()), (0, COMPLETED))
    host.on["quit"] = lambda arguments: ram_file.stat()  # not while QEMU still has it
    outgoing(tmp_path, "precopy").run()
    assert not ram_file.exists()


def test_ram_files_of_a_vm_that_stays_are_kept(host, config, ram_file, tmp_path):
    host.on["migrate"] = lambda arguments: host.become((5, active()), (0, "failed"))
    with pytest.raises(MigrationError):
        outgoing(tmp_path, "precopy").run()
    assert ram_file.exists()


@pytest.mark.parametrize("onboard", [True, False])
def test_only_who_is_onboarded_is_slowed_down_to_converge(host, config, tmp_path, onboard):
    host.on["migrate"] = lambda arguments: host.become((0, COMPLETED))
    outgoing(tmp_path, "precopy", onboard=onboard).run()
    (told,) = host.told("migrate-set-capabilities")
    assert {entry["capability"]: entry["state"] for entry in told["capabilities"]}["auto-converge"] is onboard


def test_only_userfault_prepares_for_postcopy(host, config, tmp_path):
    for engine, wanted in (("precopy", False), ("userfault", True)):
        states = {each["capability"]: each["state"] for each in _migrate_qmp.capabilities(engine)}
        assert (states["postcopy-ram"], states["postcopy-preempt"], states["return-path"]) == (wanted, wanted, True)


def test_userfault_asks_for_postcopy_once_and_not_before_the_time_bound(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.on["migrate"] = lambda arguments: host.become((0, active()))
    host.on["migrate-start-postcopy"] = lambda arguments: host.become((1, active()), (3, {**active(50), "status": "postcopy-active"}), (0, COMPLETED))
    moving.run()
    (asked,) = host.told_at("migrate-start-postcopy")
    assert 10 <= asked <= 11
    data = moving.record.data
    assert (data["result"], data["on"]) == ("moved", "destination")
    assert data["switched"] < data["finished"]
    assert list(dict.fromkeys(sample[1] for sample in data["samples"])) == ["precopy", "switch", "postcopy"]


def test_a_userfault_that_converges_before_its_bound_needs_no_postcopy(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.on["migrate"] = lambda arguments: host.become((3, active()), (0, COMPLETED))
    moving.run()
    assert moving.record.data["result"] == "moved" and host.told("migrate-start-postcopy") == []


def test_postcopy_is_not_asked_for_before_memory_flows(host, config, tmp_path):
    moving = outgoing(tmp_path, precopy_timeout_s=0)
    host.on["migrate"] = lambda arguments: host.become((4, "setup"), (0, active()))
    host.on["migrate-start-postcopy"] = lambda arguments: host.become((0, COMPLETED))
    moving.run()
    assert host.told_at("migrate-start-postcopy")[0] >= 4


def test_a_refused_switch_is_asked_for_again(host, config, tmp_path):
    moving = outgoing(tmp_path)
    answers = ["not yet", "not yet"]
    host.refuse["migrate-start-postcopy"] = lambda arguments: answers.pop() if answers else None
    host.on["migrate"] = lambda arguments: host.become((0, active()))
    host.on["migrate-start-postcopy"] = lambda arguments: host.become((0, COMPLETED))
    moving.run()
    assert len(host.told("migrate-start-postcopy")) == 3 and moving.record.data["result"] == "moved"


def test_a_failure_before_the_switch_leaves_the_vm_on_the_source(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.on["migrate"] = lambda arguments: host.become((2, active()), (0, {"status": "failed", "error-desc": "no route to host"}))
    with pytest.raises(MigrationError, match="^no route to host$"):
        moving.run()
    assert moving.record.data["on"] == "source" and config.exists() and host.alive
    assert host.told("quit") == []
    assert not [call for call in host.systemctl if call[0] in ("stop", "kill", "disable")]


def test_a_migration_that_qemu_refuses_leaves_the_vm_on_the_source(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.refuse["migrate"] = "device is not migratable"
    with pytest.raises(QmpError, match="not migratable"):
        moving.run()
    assert moving.record.data["on"] == "source" and config.exists() and host.told("quit") == []


def test_an_abort_before_the_switch_cancels_once_and_the_vm_stays(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.on["migrate"] = lambda arguments: (host.become((0, active())), request_abort(tmp_path))
    host.on["migrate_cancel"] = lambda arguments: host.become((2, "cancelling"), (0, "cancelled"))
    with pytest.raises(Aborted, match="on request"):
        moving.run()
    assert host.told("migrate_cancel") == [None]
    assert moving.record.data["on"] == "source" and config.exists() and host.alive


def request_abort(tmp_path):
    path = pathlib.Path(_migration.abort_path(str(tmp_path), "web1"))
    path.parent.mkdir(exist_ok=True)
    path.touch()


def test_an_abort_after_the_switch_is_refused_and_the_migration_goes_on(host, config, tmp_path):
    moving = outgoing(tmp_path, precopy_timeout_s=0)
    host.on["migrate"] = lambda arguments: host.become((0, active()))

    def switch(arguments):
        request_abort(tmp_path)
        host.become((5, {**active(50), "status": "postcopy-active"}), (0, COMPLETED))

    host.on["migrate-start-postcopy"] = switch
    moving.run()
    assert host.told("migrate_cancel") == []
    assert moving.record.data["result"] == "moved" and "already runs on the destination" in moving.record.data["abort_refused"]


def test_a_precopy_that_does_not_converge_is_cancelled_after_its_time(host, config, tmp_path):
    moving = outgoing(tmp_path, "precopy", timeout_s=60)
    host.on["migrate"] = lambda arguments: host.become((0, active()))
    host.on["migrate_cancel"] = lambda arguments: host.become((0, "cancelled"))
    with pytest.raises(MigrationError, match="did not converge within timeout_s=60; allow more") as failed:
        moving.run()
    assert not isinstance(failed.value, Aborted)
    assert 60 <= host.told_at("migrate_cancel")[0] <= 61


def test_a_lost_stream_after_the_switch_is_taken_up_again_and_counted_once_for_each_loss(host, config, tmp_path):
    moving = outgoing(tmp_path, precopy_timeout_s=0)
    flowing = {**active(50), "status": "postcopy-active"}
    attempts = []

    def migrate(arguments):
        if not arguments.get("resume"):
            host.become((0, active()))
            return
        attempts.append(host.clock.now)
        # The first loss needs three attempts, the second one.
        if len(attempts) == 3:
            host.become((1, "postcopy-recover"), (20, flowing), (0, "postcopy-paused"))
        elif len(attempts) == 4:
            host.become((2, flowing), (0, COMPLETED))

    def refuse(arguments):
        if not arguments.get("resume") or len(attempts) >= 2:
            return None
        attempts.append(host.clock.now)
        return "no route to host"

    host.refuse["migrate"] = refuse
    host.on["migrate"] = migrate
    host.on["migrate-start-postcopy"] = lambda arguments: host.become((3, flowing), (0, "postcopy-paused"))
    moving.run()
    data = moving.record.data
    assert (data["result"], data["recoveries"], data["on"]) == ("moved", 2, "destination")
    assert all(arguments == {"uri": "tcp:10.77.1.12:49200", "resume": True} for arguments in host.told("migrate")[1:])
    assert attempts[2] - attempts[1] > attempts[1] - attempts[0], "it waits longer each time"
    assert host.told("migrate_cancel") == []


def test_a_stream_that_does_not_come_back_ends_after_recovery_timeout_and_both_qemus_stay(host, config, tmp_path):
    moving = outgoing(tmp_path, precopy_timeout_s=0, recovery_timeout_s=100)
    host.on["migrate"] = lambda arguments: None if arguments.get("resume") else host.become((0, active()))
    host.on["migrate-start-postcopy"] = lambda arguments: host.become((2, {**active(50), "status": "postcopy-active"}), (0, "postcopy-paused"))
    with pytest.raises(MigrationError, match="waits on hv2 with its missing pages here: keep both QEMUs running"):
        moving.run()
    assert 100 <= host.clock.now <= 110
    assert moving.record.data["on"] == "destination"
    assert host.alive and config.exists() and host.told("quit") == [] and host.told("migrate_cancel") == []
    assert not [call for call in host.systemctl if call[0] in ("stop", "kill")]


def test_a_recovery_timeout_of_zero_gives_up_at_the_first_loss(host, config, tmp_path):
    moving = outgoing(tmp_path, recovery_timeout_s=0)
    host.become((0, "postcopy-paused"))
    with pytest.raises(MigrationError):
        moving.run()
    assert host.clock.now <= 5


def test_attempts_to_reconnect_never_get_rarer_than_the_backoff_allows(host, config, tmp_path):
    moving = outgoing(tmp_path, recovery_timeout_s=200)
    host.become((0, "postcopy-paused"))
    with pytest.raises(MigrationError):
        moving.run()
    times = host.told_at("migrate")
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps[0] < 2 and max(gaps) <= _migrate_qmp.BACKOFF[1] + 1


@pytest.mark.parametrize("status", ["postcopy-active", "postcopy-paused", "postcopy-recover"])
def test_a_migration_that_stopped_after_the_switch_is_gone_on_with_and_not_begun_again(host, config, tmp_path, status):
    moving = outgoing(tmp_path, resume=True)
    host.become((1, status), (0, COMPLETED))
    moving.run()
    assert moving.record.data["result"] == "moved"
    assert host.told("migrate-set-capabilities") == [] and host.told("migrate-start-postcopy") == []
    assert all(arguments.get("resume") for arguments in host.told("migrate"))


def test_a_precopy_whose_unit_died_is_followed_when_resumed(host, config, tmp_path):
    moving = outgoing(tmp_path, "precopy", resume=True)
    host.become((3, active()), (0, COMPLETED))
    moving.run()
    assert moving.record.data["result"] == "moved" and host.told("migrate") == []


def test_a_migration_of_somebody_else_is_left_alone(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.become((0, active()))
    with pytest.raises(MigrationError, match="by somebody else"):
        moving.run()
    assert host.commands == [] and config.exists()


def test_one_that_landed_while_its_unit_was_dead_is_cleaned_up(host, config, tmp_path):
    moving = outgoing(tmp_path, resume=True)
    host.become((0, COMPLETED))
    host.run_state = "postmigrate"
    moving.run()
    assert moving.record.data["result"] == "moved" and not config.exists() and host.told("quit") == [None]


def test_an_earlier_migration_that_completed_does_not_count_for_a_vm_that_came_back(host, config, tmp_path):
    """A QEMU that once received says completed for ever."""
    moving = outgoing(tmp_path, "precopy")
    host.become((0, COMPLETED))
    host.on["migrate"] = lambda arguments: host.become((2, active()), (0, COMPLETED))
    moving.run()
    assert len(host.told("migrate")) == 1 and moving.record.data["result"] == "moved"


def test_a_qemu_that_ends_during_precopy_is_reported_with_the_vm_on_the_source(host, config, tmp_path):
    moving = outgoing(tmp_path, "precopy")
    host.on["migrate"] = lambda arguments: host.become((2, active()), (0, "gone"))
    with pytest.raises(MigrationError, match="ended or stopped answering during pre-copy"):
        moving.run()
    assert moving.record.data["on"] == "source" and config.exists()


def test_a_source_that_ends_after_the_switch_says_that_pages_are_lost(host, config, tmp_path):
    moving = outgoing(tmp_path)
    host.become((2, {**active(50), "status": "postcopy-active"}), (0, "gone"))
    with pytest.raises(MigrationError, match="has lost those pages"):
        moving.run()
    assert moving.record.data["on"] == "destination"


def test_a_source_that_does_not_quit_is_killed(host, config, tmp_path, monkeypatch):
    moving = outgoing(tmp_path, "precopy")
    host.on["migrate"] = lambda arguments: host.become((0, COMPLETED))
    host.on["quit"] = lambda arguments: setattr(host, "alive", True)
    moving.run()
    assert ("kill", "--signal=KILL", UNIT) in host.systemctl and 60 <= host.clock.now < 65
    assert moving.record.data["result"] == "moved"


@pytest.mark.parametrize(
    "problem, result, words", [(Aborted("on request"), "aborted", "on request"), (MigrationError("no route"), "failed", "no route"),
                               (QmpError("refused"), "failed", "refused"), (KeyError("bug"), "failed", "internal error: KeyError('bug')")],
)  # fmt: skip
def test_however_the_unit_ends_the_record_has_its_last_word(host, tmp_path, monkeypatch, problem, result, words):
    def run(self):
        raise problem

    monkeypatch.setattr(_migrate_qmp.Outgoing, "run", run)
    job = {"side": "outgoing", "vm": "web1", "driver": "qmp", "engine": "precopy", "from": "hv1", "to": "hv2"}
    assert _migrate_unit.drive(job, str(tmp_path)) == (0 if result == "aborted" else 1)
    record = _migration.read_record(str(tmp_path), "web1")
    assert (record["phase"], record["result"], record["on"]) == ("finished", result, "source")
    assert words in record["reason"]


# -- the destination ---------------------------------------------------------------------------------------------------


def incoming(tmp_path, **more):
    job = {"id": "1", "vm": "web1", "engine": "userfault", "config": "QEMU_ARGS=-nodefaults\n", "address": "10.77.1.12", "port_min": 49200, "port_max": 49202,
           "wait_s": 300, **more}  # fmt: skip
    return _migrate_qmp.Incoming(job, str(tmp_path))


def incoming_record(tmp_path):
    return json.loads(pathlib.Path(_migration.record_path(str(tmp_path), "web1", incoming=True)).read_text())


def stopped(host):
    return ("stop", UNIT) in host.systemctl


def arrives(host, *script):
    """The stream comes; the VM runs here when its state says so."""
    host.on["migrate-incoming"] = lambda arguments: host.become(*script)
    host.run_state = lambda: "running" if host.status()["status"] in ("completed", "postcopy-active", "postcopy-paused") else "inmigrate"


def test_a_vm_that_arrived_lives_here_and_its_qemu_is_not_stopped(host, tmp_path):
    arrives(host, (1, "none"), (3, "active"), (0, "completed"))
    incoming(tmp_path, enabled=True).run()
    record = incoming_record(tmp_path)
    assert (record["phase"], record["result"], record["uri"]) == ("finished", "moved", "tcp:10.77.1.12:49200")
    assert pathlib.Path(_migrate_qmp.config_path("web1")).read_text() == "QEMU_ARGS=-nodefaults\n"
    assert not pathlib.Path(_migrate_qmp.incoming_env("web1")).exists()
    assert ("enable", UNIT) in host.systemctl and not stopped(host)


def test_a_vm_that_arrives_panicked_has_arrived_all_the_same(host, tmp_path):
    host.on["migrate-incoming"] = lambda arguments: host.become((1, "active"), (0, "completed"))
    host.run_state = lambda: "guest-panicked" if host.status()["status"] == "completed" else "inmigrate"
    incoming(tmp_path).run()
    assert incoming_record(tmp_path)["result"] == "moved"
    assert pathlib.Path(_migrate_qmp.config_path("web1")).exists() and not stopped(host)


def test_a_vm_that_was_not_enabled_is_not_enabled_here(host, tmp_path):
    arrives(host, (1, "active"), (0, "completed"))
    incoming(tmp_path).run()
    assert ("enable", UNIT) not in host.systemctl


def test_until_it_arrives_the_vm_has_no_definition_here(host, tmp_path):
    seen = []
    path = pathlib.Path(_migrate_qmp.config_path("web1"))
    arrives(host, (3, "active"), (0, "failed"))
    host.run_state = lambda: seen.append(path.exists()) or "inmigrate"
    incoming(tmp_path).run()
    assert seen and not any(seen) and not path.exists()


@pytest.mark.parametrize("end", ["failed", "gone"])
def test_a_stream_that_ends_before_arrival_is_cleaned_up(host, tmp_path, end):
    arrives(host, (2, "active"), (0, end))
    incoming(tmp_path).run()
    record = incoming_record(tmp_path)
    assert (record["phase"], record["result"]) == ("finished", "failed") and record["reason"]
    assert stopped(host) and not pathlib.Path(_migrate_qmp.incoming_env("web1")).exists()


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_a_ram_file_is_made_afresh_and_goes_with_a_vm_that_does_not_come(host, tmp_path, end):
    path = tmp_path / "web1.ram"
    path.write_bytes(b"of an earlier attempt")
    seen = []

    def listen(_arguments):
        seen.append(path.exists())
        path.write_bytes(b"new")  # QEMU makes it
        host.become((2, "active"), (0, end))

    arrives(host, (2, "active"), (0, end))
    host.on["migrate-incoming"] = listen
    incoming(tmp_path, engine="precopy", ram=[{"id": "pc.ram", "path": str(path), "size": 3}]).run()
    assert seen == [False] and path.exists() is (end == "completed")


def test_one_that_never_comes_is_cleaned_up_when_its_time_is_over(host, tmp_path):
    arrives(host, (0, "none"))
    incoming(tmp_path, wait_s=30).run()
    assert incoming_record(tmp_path)["reason"] == "nothing arrived within 30 s"
    assert stopped(host) and 30 <= host.clock.now < 32


def test_one_that_has_begun_to_come_may_take_longer_than_the_wait(host, tmp_path):
    arrives(host, (5, "none"), (600, "active"), (0, "completed"))
    incoming(tmp_path, wait_s=30).run()
    assert incoming_record(tmp_path)["result"] == "moved" and not stopped(host)


def test_after_arrival_a_lost_stream_is_listened_for_again_and_qemu_is_never_stopped(host, tmp_path):
    arrives(host, (1, "active"), (2, "postcopy-active"), (0, "postcopy-paused"))
    host.on["migrate-recover"] = lambda arguments: host.become((1, "postcopy-recover"), (1, "postcopy-active"), (0, "completed"))
    incoming(tmp_path).run()
    assert host.told("migrate-recover") == [{"uri": "tcp:10.77.1.12:49200"}]
    assert incoming_record(tmp_path)["result"] == "moved" and not stopped(host)


def test_a_refused_listening_after_arrival_is_tried_again(host, tmp_path):
    answers = ["Address already in use", "Address already in use"]
    arrives(host, (1, "postcopy-active"), (0, "postcopy-paused"))
    host.refuse["migrate-recover"] = lambda arguments: answers.pop() if answers else None
    host.on["migrate-recover"] = lambda arguments: host.become((1, "postcopy-active"), (0, "completed"))
    incoming(tmp_path).run()
    assert len(host.told("migrate-recover")) == 3 and incoming_record(tmp_path)["result"] == "moved" and not stopped(host)


def test_a_qemu_that_ends_after_arrival_is_reported_and_not_cleaned_up(host, tmp_path):
    arrives(host, (1, "active"), (2, "postcopy-active"), (0, "gone"))
    incoming(tmp_path).run()
    record = incoming_record(tmp_path)
    assert record["result"] == "failed" and "after the VM had switched to it" in record["reason"]
    assert not stopped(host) and pathlib.Path(_migrate_qmp.config_path("web1")).exists()


@pytest.mark.parametrize(("events", "ran"), [(["RESUME"], True), (["MIGRATION", "RESUME", "GUEST_PANICKED"], True), (["MIGRATION"], False), ([], False)])
def test_a_qemu_that_ends_as_soon_as_the_vm_runs_had_it(host, tmp_path, events, ran):
    """The source has forgotten the VM then: if this host cleaned up, no host knew it any more."""
    arrives(host, (1, "active"), (0, "gone"))
    host.events = events
    incoming(tmp_path, enabled=True).run()
    record = incoming_record(tmp_path)
    assert record["result"] == "failed" and ("after the VM had switched to it" in record["reason"]) is ran
    assert pathlib.Path(_migrate_qmp.config_path("web1")).exists() is ran and stopped(host) is not ran
    assert ("enable", UNIT) not in host.systemctl


@pytest.mark.parametrize("status", ["running", "paused", "guest-panicked", "inmigrate", "prelaunch"])
def test_a_vm_that_arrived_unwatched_is_adopted(host, tmp_path, status):
    """The unit that followed it was killed. If it counted as still to come, what cleans up after one that did not would end it."""
    env, conf = pathlib.Path(_migrate_qmp.incoming_env("web1")), pathlib.Path(_migrate_qmp.config_path("web1"))
    env.parent.mkdir(parents=True)
    env.write_text(f'QEMU_ARGS="-m 128"\n{_migrate_qmp.WAITING}')
    host.run_state = status
    here = status not in ("inmigrate", "prelaunch")
    assert _migrate_qmp.adopt("web1", look_only=True) is here and env.exists() and not conf.exists()
    assert _migrate_qmp.adopt("web1") is here
    assert (env.exists(), conf.exists()) == (not here, here)
    if here:
        assert conf.read_text() == 'QEMU_ARGS="-m 128"\n' and not _migrate_qmp.adopt("web1")


def test_a_qemu_that_may_have_a_vm_and_gives_no_answer_is_not_judged(host, tmp_path):
    env = pathlib.Path(_migrate_qmp.incoming_env("web1"))
    env.parent.mkdir(parents=True)
    env.write_text(_migrate_qmp.WAITING)
    host.listens = False
    with pytest.raises(MigrationError, match="gives no answer"):
        _migrate_qmp.adopt("web1")
    host.alive = False
    assert not _migrate_qmp.adopt("web1") and env.exists()


def test_a_busy_port_makes_it_try_the_next(host, tmp_path):
    arrives(host, (1, "active"), (0, "completed"))
    host.ports[49200] = errno.EADDRINUSE
    incoming(tmp_path).run()
    # QEMU is told once: after one that it could not listen on, it takes no other.
    assert [arguments["uri"] for arguments in host.told("migrate-incoming")] == ["tcp:10.77.1.12:49201"]
    assert incoming_record(tmp_path)["uri"] == "tcp:10.77.1.12:49201"


def test_with_all_ports_busy_it_says_which_and_cleans_up(host, tmp_path):
    host.ports = dict.fromkeys((49200, 49201, 49202), errno.EADDRINUSE)
    incoming(tmp_path).run()
    assert not host.told("migrate-incoming") and stopped(host)
    assert "10.77.1.12 ports 49200-49202: Address already in use" in incoming_record(tmp_path)["reason"]


def test_an_address_that_is_not_this_hosts_is_not_tried_on_all_ports(host, tmp_path):
    host.ports = {49200: errno.EADDRNOTAVAIL, 49201: AssertionError}
    incoming(tmp_path).run()
    assert not host.told("migrate-incoming") and stopped(host)
    assert "Cannot assign requested address" in incoming_record(tmp_path)["reason"]


def test_a_port_stays_with_its_vm_until_the_unit_ends(host, tmp_path):
    first, second, third = (incoming(tmp_path) for _count in range(3))
    assert (first._take_port(), second._take_port()) == (49200, 49201)
    first._port.close()
    assert third._take_port() == 49200


def test_ports_that_other_vms_have_are_in_use(host, tmp_path):
    others = [incoming(tmp_path) for _count in range(3)]
    assert [other._take_port() for other in others] == [49200, 49201, 49202]
    incoming(tmp_path).run()
    assert "10.77.1.12 ports 49200-49202: Address already in use" in incoming_record(tmp_path)["reason"]


def test_an_address_of_ipv6_is_told_from_the_port(host, tmp_path):
    arrives(host, (1, "active"), (0, "completed"))
    incoming(tmp_path, address="fd00::12").run()
    assert host.told("migrate-incoming") == [{"uri": "tcp:[fd00::12]:49200"}] and incoming_record(tmp_path)["uri"] == "tcp:[fd00::12]:49200"


def test_another_program_that_listens_is_seen():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match="already in use"):
        LISTENS("127.0.0.1", server.getsockname()[1])
    LISTENS("127.0.0.1", 0)


def test_the_destination_sets_the_engines_capabilities_before_it_listens(host, tmp_path):
    arrives(host, (1, "active"), (0, "completed"))
    incoming(tmp_path).run()
    assert [command for command, _arguments in host.commands][:2] == ["migrate-set-capabilities", "migrate-incoming"]
    assert host.told("migrate-set-capabilities") == [{"capabilities": _migrate_qmp.capabilities("userfault")}]


def test_a_qemu_that_does_not_open_its_monitor_is_given_up_and_cleaned_up(host, tmp_path):
    host.listens = False
    incoming(tmp_path).run()
    assert "did not open its monitor in 60 s" in incoming_record(tmp_path)["reason"]
    assert stopped(host) and not pathlib.Path(_migrate_qmp.incoming_env("web1")).exists()


def test_the_definition_of_a_vm_under_way_is_for_root_only(host, tmp_path):
    modes = []

    def listen(arguments):
        modes.append(pathlib.Path(_migrate_qmp.incoming_env("web1")).stat().st_mode & 0o777)
        host.become((0, "failed"))

    host.on["migrate-incoming"] = listen
    incoming(tmp_path).run()
    assert modes == [0o600]


def test_a_stream_that_stands_still_before_the_switch_is_given_up(host, config, tmp_path):
    host.on["migrate"] = lambda _arguments: host.become((0, active(200)))
    host.on["migrate_cancel"] = lambda _arguments: host.become((0, "cancelled"))
    move = outgoing(tmp_path, stall_timeout_s=45, precopy_timeout_s=300)
    with pytest.raises(MigrationError, match="nothing could be sent to hv2 for 45 s.*goes on here"):
        move.run()
    assert 45 <= host.told_at("migrate_cancel")[0] <= 47


def test_a_stream_that_moves_is_not_given_up(host, config, tmp_path):
    def growing(second):
        answer = active(200)
        return (40, {**answer, "ram": {**answer["ram"], "transferred": second}})

    host.on["migrate"] = lambda _arguments: host.become(*[growing(second) for second in range(5)], (0, COMPLETED))
    outgoing(tmp_path, engine="precopy", stall_timeout_s=45).run()
    assert host.told("migrate_cancel") == []


def test_after_the_switch_a_stream_that_stands_still_is_not_given_up(host, config, tmp_path):
    standing = (500, {**active(100), "status": "postcopy-active"})
    host.on["migrate"] = lambda _arguments: host.become((1, active(200)), standing, (0, COMPLETED))
    outgoing(tmp_path, precopy_timeout_s=0, stall_timeout_s=45).run()
    assert host.told("migrate_cancel") == []
