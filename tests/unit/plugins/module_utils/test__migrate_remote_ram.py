# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the VM is, and what is left, whichever step of a kernel-engine migration breaks. The real thing: scenario remote_ram."""

from __future__ import annotations

import errno

import pytest
from ansible_collections.hecaton.fleet.plugins.action.vm_migrate import progress_line
from ansible_collections.hecaton.fleet.plugins.module_utils import _migrate_qmp, _migrate_remote_ram, _migration
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Aborted, MigrationError, Record
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpError
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import _STATS_COUNTS, RemoteRamError

BLOCK = {"id": "pc.ram", "path": "/run/remote_ram/web1.ram", "size": 1 << 27, "port": 49299}


class Clock:
    def __init__(self):
        self.now = 0.0
        self.at = []

    def monotonic(self):
        return self.now

    def time(self):
        return 1700000000 + self.now

    def sleep(self, seconds):
        self.now += seconds
        assert self.now < 20000, "it never ends"
        for when, action in list(self.at):
            if self.now >= when:
                self.at.remove((when, action))
                action()


class World:
    """A RAM file's session, a QEMU and a unit; calls are kept in ``told``."""

    def __init__(self, clock):
        self.clock = clock
        self.told = []
        self.role, self.state, self.reason, self.missing, self.lost = "none", "none", "", 0, 0
        self.migrate = "none"  # what query-migrate says
        self.alive = True
        self.silent = False  # it runs, and does not answer
        self.result = "success"  # what systemd says of how QEMU ended
        self.refuse = {}
        self.after = {}  # what is otherwise once QEMU was told a command
        self.events = []  # what QEMU has told and nobody has read

    def call(self, name, *arguments):
        self.told.append(name)
        if name in self.refuse:
            raise self.refuse[name]
        return arguments

    def qmp(self, command, arguments=None):
        if not self.alive or self.silent:
            raise QmpError("lost QEMU", "ConnectionError")
        if command == "query-status":
            return {"status": "running"}
        if command == "query-migrate":
            return {"status": self.migrate, "downtime": 120, "error-desc": "it can't be loaded"} if self.migrate != "none" else {}
        self.call(command)
        if command == "migrate":
            self.migrate = "pre-switchover"
        elif command == "migrate-continue":
            self.migrate = "completed"
        elif command == "migrate_cancel":
            self.migrate = "cancelled"
        elif command == "quit":
            self.alive = False
        vars(self).update(self.after.get(command, {}))
        return {}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (_migrate_qmp, _migrate_remote_ram, _migration):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def world(monkeypatch, clock, tmp_path):
    world = World(clock)

    class Client:
        def __init__(self, path, timeout=30.0):
            if not world.alive or world.silent:
                raise QmpError(f"cannot reach QEMU at {path}", "ConnectionError")
            self.execute = world.qmp

        def events(self, wait=0.0):
            clock.sleep(wait)
            told, world.events = world.events, []
            return told

        def close(self):
            pass

    class File:
        def __init__(self, path, size=None):
            self.path = path

        def close(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

        def stats(self):
            if "stats" in world.refuse:
                raise world.refuse["stats"]
            counts = {**dict.fromkeys(_STATS_COUNTS, 0), "pages": 32768, "pages_missing": world.missing, "remaining_us": None}
            counts["pages_lost"] = world.lost
            return {**counts, "role": world.role, "state": world.state, "reason": world.reason, "rounds": 1, "wait_hist": [0] * 32, "read_hist": [0] * 32}

        def export(self, *arguments, **more):
            world.call("export")
            world.role, world.state = "source", "connected"

        def precopy(self, timeout_ms, **more):
            world.call("precopy")
            world.state = "precopy"
            clock.at.append((clock.now + timeout_ms / 1000, lambda: setattr(world, "state", "connected") if world.state == "precopy" else None))

        def switch(self, timeout_ms=0):
            world.call("switch")
            world.state, world.missing = "postcopy", 500
            clock.at.append((clock.now + 5, lambda: (setattr(world, "missing", 0), setattr(world, "state", "complete")) if world.state == "postcopy" else None))
            return 500, 1000

        def abort(self):
            world.call("abort")
            world.state = "failed"

        def take_back(self):
            world.call("take_back")
            world.state = "failed"

        def release(self):
            world.call("release")
            world.role, world.state = "none", "none"

        def attach(self, address, port, uuid, token, **more):
            world.call("attach")
            world.role, world.state = "destination", "listening"
            return port

    def systemctl(*arguments, check=True):
        return {"is-active": "active" if world.alive else "inactive", "show": world.result}.get(arguments[0], "")

    monkeypatch.setattr(_migrate_qmp, "QmpClient", Client)
    monkeypatch.setattr(_migrate_remote_ram, "QmpClient", Client)
    monkeypatch.setattr(_migrate_remote_ram, "RamFile", File)
    monkeypatch.setattr(_migrate_remote_ram, "is_remote_ram", lambda path: True)
    monkeypatch.setattr(_migrate_qmp.os, "unlink", lambda path: world.call(f"unlink {path}"))
    monkeypatch.setattr(_migrate_remote_ram, "forget", lambda name: world.call("forget"))
    monkeypatch.setattr(_migrate_qmp, "listens", lambda address, port: None)
    monkeypatch.setattr(_migrate_qmp, "systemctl", systemctl)
    monkeypatch.setattr(_migrate_qmp, "RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(_migrate_qmp, "CONFIG_DIR", str(tmp_path / "vms"))
    return world


def outgoing(tmp_path, **more):
    job = {"vm": "web1", "driver": "qmp", "engine": "remote_ram", "from": "hv1", "to": "hv2", "uri": "tcp:10.77.1.12:49200", "precopy_timeout_s": 10,
           "address": "10.77.1.12", "token": "00" * 16, "ram": [BLOCK], **more}  # fmt: skip
    return _migrate_remote_ram.Outgoing(job, Record(str(tmp_path), job))


def test_the_whole_way(world, tmp_path):
    moving = outgoing(tmp_path)
    moving.run()
    wanted = ["export", "precopy", "migrate", "switch", "migrate-continue", "quit", "release", f"unlink {BLOCK['path']}", "forget"]
    assert [step for step in world.told if step in wanted] == ["release", *wanted]
    data = moving.record.data
    assert (data["result"], data["on"], data["downtime_ms"], data["remote_ram"]["pages"]) == ("moved", "destination", 120, 32768)


def test_the_source_qemu_ends_before_the_last_page_has_left(world, tmp_path):
    moving = outgoing(tmp_path)
    moving.run()
    assert world.told.index("quit") < world.told.index("unlink /run/remote_ram/web1.ram")
    assert world.clock.now >= 15


def test_pages_that_could_not_be_read_are_told_of(world, tmp_path):
    world.lost = 3
    moving = outgoing(tmp_path)
    moving.run()
    data = moving.record.data
    assert data["result"] == "moved" and data["reason"].startswith("3 pages could not be read here")
    assert progress_line("web1", "hv2", data).endswith(data["reason"])


def test_without_precopy_nothing_is_copied_ahead(world, tmp_path):
    outgoing(tmp_path, precopy_timeout_s=0).run()
    assert "precopy" not in world.told and "switch" in world.told


def test_a_destination_that_refuses_leaves_the_vm_alone(world, tmp_path):
    world.refuse["export"] = RemoteRamError("refused", errno.ECONNREFUSED, "the token is not the destination's")
    with pytest.raises(MigrationError, match="can't be sent to hv2"):
        outgoing(tmp_path).run()
    assert "migrate" not in world.told and world.alive


def test_an_abort_during_precopy_lets_go(world, clock, tmp_path):
    moving = outgoing(tmp_path)
    clock.at.append((3, lambda: (tmp_path / "migrations" / "web1.abort").write_text("")))
    with pytest.raises(Aborted):
        moving.run()
    assert "abort" in world.told and "migrate" not in world.told and world.alive


def test_a_connection_that_ends_before_the_switch_leaves_the_vm(world, clock, tmp_path):
    def cut():
        world.state, world.reason = "failed", "the connection was lost"

    clock.at.append((3, cut))
    with pytest.raises(MigrationError, match="before the switch: the connection was lost"):
        outgoing(tmp_path).run()
    assert "migrate" not in world.told and world.alive


def test_a_switch_that_fails_gives_the_vm_back_to_its_qemu(world, tmp_path):
    world.refuse["switch"] = RemoteRamError("switch: it took longer than it may", errno.ETIMEDOUT)
    with pytest.raises(MigrationError, match="took longer"):
        outgoing(tmp_path).run()
    assert "migrate_cancel" in world.told and "migrate-continue" not in world.told and world.told[-1] == "release"


def test_a_destination_that_can_not_load_the_devices_has_the_ram_taken_back(world, tmp_path):
    moving = outgoing(tmp_path)
    world.after["migrate-continue"] = {"migrate": "failed"}
    with pytest.raises(MigrationError, match="can't be loaded"):
        moving.run()
    assert "take_back" in world.told and "quit" not in world.told and moving.record.data["on"] == "source"


def test_a_source_whose_destination_has_all_but_can_not_load_the_devices_keeps_the_vm(world, tmp_path):
    moving = outgoing(tmp_path)
    world.after["migrate-continue"] = {"migrate": "failed", "state": "complete"}
    with pytest.raises(MigrationError, match="can't be loaded"):
        moving.run()
    assert world.told[-1] == "release" and moving.record.data["on"] == "source"


@pytest.mark.parametrize("answers", [True, False])
def test_a_vm_that_may_run_at_the_destination_already_is_not_taken_back_for_its_silence(world, clock, tmp_path, answers):
    """The network is cut after the devices' state was sent, and before the word that it arrived: the VM must not run twice."""
    moving = outgoing(tmp_path, recovery_timeout_s=3600)
    world.after["migrate-continue"] = {"migrate": "device"}
    if answers:
        clock.at.append((600, lambda: setattr(world, "migrate", "completed")))
        moving.run()
        assert moving.record.data["result"] == "moved" and clock.now >= 600
    else:
        with pytest.raises(MigrationError, match="hv2 has not answered whether web1 runs there"):
            moving.run()
        assert moving.record.data["on"] == "unknown" and clock.now >= 3600
        assert world.told[-1] == "migrate-continue"
    assert not {"take_back", "migrate_cancel", "abort"} & set(world.told)


def test_memory_that_is_still_arriving_is_not_given_away_and_not_given_up(world, tmp_path):
    world.role, world.state, world.missing = "destination", "postcopy", 500
    with pytest.raises(MigrationError, match="still arriving"):
        outgoing(tmp_path).run()
    assert not world.told and world.state == "postcopy"


@pytest.mark.parametrize("state", ["connected", "precopy"])
def test_what_a_killed_unit_had_begun_before_the_switch_does_not_stop_the_next(world, tmp_path, state):
    world.role, world.state = "source", state
    moving = outgoing(tmp_path)
    moving.run()
    assert world.told[:3] == ["abort", "release", "export"] and moving.record.data["result"] == "moved"


def test_a_source_qemu_that_is_killed_in_pre_copy_leaves_no_session(world, clock, tmp_path):
    clock.at.append((3, lambda: setattr(world, "alive", False)))
    with pytest.raises(QmpError):
        outgoing(tmp_path).run()
    assert world.told[-2:] == ["abort", "release"] and "switch" not in world.told


def test_a_source_qemu_that_is_killed_in_the_switch_is_needed_no_more(world, tmp_path):
    moving = outgoing(tmp_path)
    world.after["migrate-continue"] = {"alive": False}
    moving.run()
    assert "take_back" not in world.told and f"unlink {BLOCK['path']}" in world.told
    assert (moving.record.data["result"], moving.record.data["on"]) == ("moved", "destination")


def test_pages_that_are_lost_are_counted_and_the_ram_here_is_kept(world, clock, tmp_path):
    moving = outgoing(tmp_path)

    def lose():
        world.state, world.reason = "lost", "it took longer than it may"

    clock.at.append((12, lose))
    with pytest.raises(MigrationError, match="lacks 500 pages of web1"):
        moving.run()
    assert moving.record.data["on"] == "destination"
    assert not [step for step in world.told if step.startswith("unlink")]


def test_a_unit_that_died_between_switch_and_continue_goes_on(world, tmp_path):
    world.role, world.state, world.migrate = "source", "postcopy", "pre-switchover"
    world.clock.at.append((5, lambda: setattr(world, "state", "complete")))
    moving = outgoing(tmp_path, resume=True)
    moving.run()
    assert [step for step in world.told if step != "release"][:2] == ["migrate-continue", "quit"]
    assert moving.record.data["result"] == "moved"


def test_a_unit_that_died_after_the_switch_follows_the_pull(world, tmp_path):
    world.role, world.state, world.alive = "source", "reconnecting", False
    world.clock.at.append((5, lambda: setattr(world, "state", "complete")))
    moving = outgoing(tmp_path, resume=True)
    moving.run()
    assert moving.record.data["result"] == "moved" and "export" not in world.told


def test_a_unit_that_died_before_the_switch_leaves_the_vm_here(world, tmp_path):
    world.role, world.state, world.migrate = "source", "connected", "none"
    with pytest.raises(MigrationError, match="the VM is here, and can be moved again"):
        outgoing(tmp_path, resume=True).run()
    assert "abort" in world.told and "release" in world.told and world.alive


def test_a_file_that_received_its_vm_earlier_does_not_serve(world):
    world.role, world.state = "destination", "complete"
    assert not _migrate_remote_ram.is_serving([BLOCK])
    world.role, world.state = "source", "postcopy"
    assert _migrate_remote_ram.is_serving([BLOCK])


@pytest.mark.parametrize("role, state, needed", [("source", "postcopy", True), ("source", "reconnecting", True), ("source", "complete", False),
                                                 ("source", "precopy", False), ("destination", "postcopy", False)])  # fmt: skip
def test_a_source_s_file_is_needed_until_all_of_it_has_left(world, role, state, needed):
    world.role, world.state = role, state
    assert _migrate_remote_ram.is_needed([BLOCK]) == needed


# -- the destination ---------------------------------------------------------------------------------------------------


def incoming(tmp_path, **more):
    job = {"id": "1", "vm": "web1", "engine": "remote_ram", "config": "QEMU_ARGS=x", "address": "10.77.1.12", "port_min": 49200, "port_max": 49201,
           "wait_s": 300, "ram": [BLOCK], "token": "00" * 16, **more}  # fmt: skip
    return _migrate_remote_ram.Incoming(job, str(tmp_path))


def test_the_ram_listens_on_the_last_port_so_that_qemu_finds_the_first(world, tmp_path):
    side = incoming(tmp_path)
    side._attach()
    assert side.data["ram"] == [{**BLOCK, "port": 49201}]


def test_ports_in_use_are_passed_over_and_then_named(world, tmp_path):
    world.refuse["attach"] = RemoteRamError("attach: Address already in use", errno.EADDRINUSE)
    with pytest.raises(MigrationError, match="ports 49200-49201"):
        incoming(tmp_path)._attach()
    assert world.told.count("attach") == 2


def test_a_connection_that_ends_before_the_vm_has_arrived_ends_the_attempt(world, tmp_path):
    side = incoming(tmp_path)
    side._attach()
    world.state, world.reason = "failed", "the connection was lost"
    with pytest.raises(MigrationError, match="before the VM had arrived: the connection was lost"):
        side._look()
    side._clean_up()
    assert f"unlink {BLOCK['path']}" in world.told


def test_a_file_that_can_not_be_asked_any_more_is_told_in_the_record(world, tmp_path):
    side = incoming(tmp_path)
    world.refuse["stats"] = RemoteRamError("stats: no such device", errno.ENODEV)
    side.run()
    assert side.data["result"] == "failed" and "no such device" in side.data["reason"]
    assert f"unlink {BLOCK['path']}" in world.told


def test_pages_lost_after_the_arrival_are_said(world, tmp_path):
    side = incoming(tmp_path)
    side._attach()
    side.arrived = True
    world.state = "lost"
    with pytest.raises(MigrationError, match="machine check"):
        side._look()


def arrived(world, tmp_path):
    """A destination whose VM runs and whose RAM is on its way, and its QEMU."""
    side = incoming(tmp_path)
    side._attach()
    world.state, world.migrate, world.missing, side.arrived = "postcopy", "completed", 500, True
    return side, _migrate_qmp.QmpClient("agent.sock")


@pytest.mark.parametrize("end,words", [("complete", "its RAM is whole in /run/remote_ram/web1.ram"), ("lost", "pages are lost")])
def test_the_ram_of_a_vm_whose_qemu_is_killed_still_arrives_and_the_record_says_where_it_is(world, clock, tmp_path, end, words):
    side, qmp = arrived(world, tmp_path)
    clock.at.append((1, lambda: setattr(world, "alive", False)))
    clock.at.append((60, lambda: setattr(world, "state", end)))
    with pytest.raises(MigrationError, match="after the VM had switched to it .*" + words):
        side._receive(qmp)
    assert 60 <= clock.now < 62 and not [step for step in world.told if step.startswith("unlink")]


@pytest.mark.parametrize("result,end,kept", [("signal", "complete", True), ("signal", "lost", False), ("exit-code", "complete", False)])
def test_a_qemu_that_ends_before_it_was_seen_running_leaves_its_ram_if_it_was_killed_and_the_source_gave_it_all(world, clock, tmp_path, result, end, kept):
    side, qmp = arrived(world, tmp_path)
    side.arrived, world.alive, world.result = False, False, result
    clock.at.append((20, lambda: setattr(world, "state", end)))
    with pytest.raises(MigrationError, match="its RAM is whole in" if kept else "before the VM had arrived"):
        side._receive(qmp)
    assert side.arrived == kept and (tmp_path / "vms" / "web1.conf").exists() == kept
    assert clock.now >= 20 or result == "exit-code"


def test_a_qemu_that_waits_for_a_page_and_does_not_answer_is_not_taken_for_dead(world, clock, tmp_path):
    side, qmp = arrived(world, tmp_path)
    clock.at.append((1, lambda: setattr(world, "silent", True)))
    clock.at.append((90, lambda: setattr(world, "silent", False)))
    clock.at.append((95, lambda: setattr(world, "state", "complete")))
    side._receive(qmp)
    assert side.data["result"] == "moved" and clock.now >= 95


def test_a_qemu_that_waits_for_a_page_before_it_was_seen_running_is_not_stopped(world, clock, tmp_path):
    """It may be the only one that has the VM: the source's ends when all was sent."""
    side, qmp = arrived(world, tmp_path)
    side.arrived, world.silent = False, True
    clock.at.append((90, lambda: setattr(world, "silent", False)))
    clock.at.append((95, lambda: setattr(world, "state", "complete")))
    side._receive(qmp)
    assert side.data["result"] == "moved" and clock.now >= 95 and not [step for step in world.told if step.startswith("unlink /run/remote_ram")]


def test_a_silent_qemu_whose_ram_can_not_arrive_any_more_is_given_up(world, clock, tmp_path):
    side, qmp = arrived(world, tmp_path)
    side.arrived, world.silent = False, True
    clock.at.append((60, lambda: setattr(world, "state", "failed")))
    with pytest.raises(MigrationError, match="ended before the VM had arrived"):
        side._receive(qmp)
    assert 60 <= clock.now < 62


def test_a_qemu_that_said_that_the_vm_runs_had_it_however_it_ended(world, clock, tmp_path):
    side, qmp = arrived(world, tmp_path)
    side.arrived, world.alive, world.result, world.events = False, False, "exit-code", [{"event": "RESUME"}]
    clock.at.append((20, lambda: setattr(world, "state", "complete")))
    with pytest.raises(MigrationError, match="its RAM is whole in"):
        side._receive(qmp)
    assert side.arrived and (tmp_path / "vms" / "web1.conf").exists()


def test_the_vm_is_whole_when_the_last_page_is_in(world, tmp_path):
    side = incoming(tmp_path)
    side._attach()
    world.state = "postcopy"
    side._look()
    assert side.began and not side._whole()
    world.state = "complete"
    assert side._whole()


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hint", "refused"), [(True, True), (False, False)])
def test_a_balloon_that_hints_at_free_pages_is_refused_before_anything_begins(hint, refused):
    class Qemu:
        def execute(self, command, arguments):
            if command == "qom-get":
                assert arguments == {"path": "/machine/peripheral/balloon0", "property": "free-page-hint"}
                return hint
            named = {"/machine/peripheral": [{"name": "balloon0", "type": "child<virtio-balloon-pci>"}, {"name": "type", "type": "string"}]}
            return named.get(arguments["path"], [{"name": "device[0]", "type": "child<virtio-net-pci>"}])

    if refused:
        with pytest.raises(MigrationError, match="free-page-hint=on"):
            _migrate_remote_ram.check_devices(Qemu())
    else:
        _migrate_remote_ram.check_devices(Qemu())
