# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.module_utils import _migrate_qmp, _migrate_unit, _migration
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import MigrationError
from ansible_collections.hecaton.fleet.plugins.modules import vm_migrate


class Ended(Exception):
    """How a module ends here instead of by leaving the process."""

    def __init__(self, result):
        super().__init__(result.get("msg"))
        self.result = result


@pytest.fixture
def run(monkeypatch, tmp_path):
    def end(failed):
        def ended(self, **result):
            raise Ended(dict(result, failed=failed))

        return ended

    def start(job, state_dir):
        raise AssertionError("a refused migration was started")

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", end(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", end(True))
    monkeypatch.setattr(vm_migrate, "start", start)
    monkeypatch.setattr(vm_migrate, "is_active", lambda unit: False)
    monkeypatch.setattr(vm_migrate, "installed", lambda: False)

    def call(**arguments):
        given = {"name": "web1", "destination": "hv2", "source": "hv1", "state_dir": str(tmp_path), **arguments}
        with patch_module_args(given), pytest.raises(Ended) as ended:
            vm_migrate.main()
        return ended.value.result

    return call


@pytest.mark.parametrize("key", [key for key, (least, most) in vm_migrate.RANGES.items()])
def test_a_negative_number_is_refused_by_its_name(run, key):
    result = run(**{key: -1})
    assert result["failed"] and result["msg"].startswith(f"{key} must be ")


@pytest.mark.parametrize("key, value", [("port_min", 0), ("port_max", 65536), ("max_downtime", 2000001), ("poll_interval", 0)])
def test_a_number_out_of_range_is_refused_by_its_name(run, key, value):
    result = run(**{key: value})
    assert result["failed"] and key in result["msg"] and str(value) in result["msg"]


def test_ports_in_the_wrong_order_are_refused(run):
    result = run(port_min=49300, port_max=49200)
    assert result["failed"] and result["msg"] == "port_min 49300 is greater than port_max 49200"


@pytest.mark.parametrize("name", ["../web1", "a b", "a/b", "-x", ""])
def test_a_bad_name_is_refused(run, name):
    result = run(name=name)
    assert result["failed"] and "allowed are letters" in result["msg"]


def test_a_vm_that_is_not_here_is_not_started(run):
    result = run()
    assert not result["failed"] and not result["changed"] and result["absent"]


def test_aborting_what_is_not_under_way_changes_nothing(run):
    result = run(state="aborted", destination=None)
    assert not result["failed"] and not result["changed"]


def test_what_an_earlier_attempt_left_is_gone_before_the_next_begins(run, monkeypatch, tmp_path):
    """Whoever follows reads the record while the unit still starts: the old one's end is not the new one's."""
    found = {"driver": "libvirt", "uuid": "u", "memory_mib": 64, "postcopy_failed": False}
    record = _migration.Record(str(tmp_path), {"vm": "web1", "id": "earlier", "engine": "precopy", "driver": "libvirt", "from": "hv1", "to": "hv2"})
    record.finish("failed", "the network broke")
    left = [pathlib.Path(_migration.record_path(str(tmp_path), "web1")), pathlib.Path(_migration.abort_path(str(tmp_path), "web1"))]
    left[1].touch()
    begun = []

    def start(job, state_dir):
        begun.append([path.exists() for path in left])

    monkeypatch.setattr(vm_migrate, "start", start)
    monkeypatch.setattr(vm_migrate.VmMigrate, "_find", lambda self: found)
    result = run(engine="precopy", driver="libvirt", incoming={"id": "next", "address": "192.0.2.1", "memory_mib": 64})
    assert result["changed"] and not result["failed"]
    assert begun == [[False, False]]


class Asked:
    """A VM's QEMU that is asked where its memory is."""

    def __init__(self, path, timeout):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def execute(self, command):
        assert command == "query-memdev"
        return [{"id": "pc.ram", "size": 1 << 27, "share": False}]


BLOCK = {"id": "pc.ram", "path": "/run/remote_ram/web1.ram", "size": 1 << 27}


@pytest.fixture
def asks(run, monkeypatch, tmp_path):
    """A VM of driver qmp that is to move: ``asks(engine, blocks, ...)`` is what the destination is told of its memory."""

    def asks(blocks, hints=False, **arguments):
        def ram_blocks(qmp):
            if not blocks:
                raise MigrationError("the RAM block pc.ram is anonymous memory")
            return blocks

        def check_devices(qmp):
            if hints:
                raise MigrationError("its balloon has free-page-hint=on")

        (tmp_path / "web1.conf").write_text('QEMU_ARGS="-m 128"\n')
        for module in (vm_migrate, _migrate_qmp):
            monkeypatch.setattr(module, "is_active", lambda unit: unit == "hecaton-vm@web1.service")
        monkeypatch.setattr(vm_migrate, "systemctl", lambda *_arguments, check=True: "enabled")
        monkeypatch.setattr(vm_migrate, "config_path", lambda name: str(tmp_path / f"{name}.conf"))
        monkeypatch.setattr(_migrate_qmp, "incoming_env", lambda name: str(tmp_path / f"{name}.env"))
        monkeypatch.setattr(vm_migrate, "QmpClient", Asked)
        monkeypatch.setattr(vm_migrate, "ram_blocks", ram_blocks)
        monkeypatch.setattr(vm_migrate, "check_devices", check_devices)
        return run(driver="qmp", **arguments)

    return asks


@pytest.mark.parametrize("engine", ["precopy", "userfault", "remote_ram"])
def test_the_destination_is_told_of_ram_files_by_whatever_engine_the_vm_comes(asks, engine):
    """What is left of them when it did not come has to be removed."""
    assert asks([BLOCK], engine=engine)["request"]["ram"] == [BLOCK]


@pytest.mark.parametrize("here", [True, False])
def test_a_vm_that_arrived_unwatched_can_leave(asks, tmp_path, monkeypatch, here):
    (tmp_path / "web1.env").touch()
    monkeypatch.setattr(_migrate_unit, "adopt", lambda name, look_only: here)
    assert ("request" in asks([BLOCK])) is here


def test_ordinary_memory_stays_so_unless_it_is_onboarded(asks):
    assert asks([], engine="userfault")["request"] == {"driver": "qmp", "enabled": True, "config": 'QEMU_ARGS="-m 128"\n', "ram": []}
    told = asks([], engine="precopy", onboard=True)["request"]
    assert told["ram"] == [BLOCK] and "mem-path=/run/remote_ram/web1.ram" in told["config"]


@pytest.mark.parametrize("arguments, says", [
    ({"engine": "remote_ram"}, "the RAM block pc.ram is anonymous memory"),
    ({"engine": "userfault", "onboard": True}, "web1 can only be onboarded by the engine precopy, not by userfault"),
])
def test_what_an_engine_can_t_do_with_ordinary_memory_is_said(asks, arguments, says):
    result = asks([], **arguments)
    assert result["failed"] and says in result["msg"]


def test_what_keeps_a_vm_from_the_kernel_engine_is_said_also_of_one_that_may_be_onboarded(asks):
    result = asks([BLOCK], hints=True, engine="remote_ram", onboard=True)
    assert result["failed"] and result["msg"] == "its balloon has free-page-hint=on"


@pytest.mark.parametrize("status", ["none", "active", "device"])
def test_who_only_follows_takes_up_what_stopped_halfway_and_starts_nothing(run, monkeypatch, tmp_path, status):
    """A unit that died in pre-copy by the kernel engine, or with its host, leaves a record that never ends."""
    record = _migration.Record(str(tmp_path), {"vm": "web1", "id": "1", "engine": "remote_ram", "driver": "qmp", "from": "hv1", "to": "hv2"})
    record.phase("precopy")
    _migration.write_json(str(tmp_path / "jobs" / "web1.outgoing.json"), {"vm": "web1", "ram": []})
    begun = []

    class Qemu(Asked):
        def execute(self, command):
            return {"query-migrate": {"status": status}, "query-status": {"status": "running"}}[command]

    monkeypatch.setattr(vm_migrate, "QmpClient", Qemu)
    monkeypatch.setattr(vm_migrate, "start", lambda job, state_dir: begun.append(job))
    monkeypatch.setattr(vm_migrate.VmMigrate, "_find", lambda self: {"driver": "qmp", "config": "", "ram": []})
    result = run(driver="qmp", follow=True)
    halfway = status != "none"
    assert not result["failed"] and result["changed"] is halfway and result.get("idle", False) is not halfway
    assert [job["resume"] for job in begun] == ([True] if halfway else []) and "request" not in result


def test_who_only_follows_moves_no_vm_that_was_never_under_way(run, monkeypatch):
    monkeypatch.setattr(vm_migrate.VmMigrate, "_find", lambda self: {"driver": "qmp", "config": "", "ram": []})
    result = run(follow=True)
    assert not result["failed"] and not result["changed"] and "request" not in result
