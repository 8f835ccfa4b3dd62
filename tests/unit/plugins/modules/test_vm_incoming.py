# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import functools
import types

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.module_utils import _cordon, _migrate_qmp, _migrate_unit, _migration, _reservations
from ansible_collections.hecaton.fleet.plugins.modules import vm_incoming


class Ended(Exception):
    """How a module ends here instead of by leaving the process."""

    def __init__(self, result):
        super().__init__(result.get("msg"))
        self.result = result


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A hypervisor with 1000 MiB free, without libvirt, that runs nothing."""
    host = types.SimpleNamespace(state=tmp_path / "state", active=set(), libvirt_here=None, reserved=str(tmp_path / "reserved"))
    host.state.mkdir()
    for name in ("locked", "live", "reserve", "release"):
        monkeypatch.setattr(_reservations, name, functools.partial(getattr(_reservations, name), folder=host.reserved))
    monkeypatch.setattr(vm_incoming, "arriving_qmp", set)
    monkeypatch.setattr(vm_incoming, "resident_mib", lambda name: 0)
    monkeypatch.setattr(vm_incoming, "parse_meminfo", lambda text: {"memory_available_mib": 1000})
    for module in (vm_incoming, _migrate_qmp):
        monkeypatch.setattr(module, "is_active", lambda unit: unit in host.active)
        monkeypatch.setattr(module, "incoming_env", lambda name: str(tmp_path / f"{name}.env"))

    def look(self):
        self.libvirt_here = host.libvirt_here

    monkeypatch.setattr(vm_incoming.VmIncoming, "_look_at_libvirt", look)
    return host


@pytest.fixture
def run(monkeypatch, host):
    def end(failed):
        def ended(self, **result):
            raise Ended(dict(result, failed=failed))

        return ended

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", end(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", end(True))

    def call(check_mode=False, **arguments):
        defaults = {"name": "web1", "driver": "libvirt", "uuid": "u1", "memory_mib": 500, "source": "hv1", "address": "10.77.1.12"}
        given = {**defaults, **arguments, "state_dir": str(host.state), "_ansible_check_mode": check_mode}
        with patch_module_args(given), pytest.raises(Ended) as ended:
            vm_incoming.main()
        return ended.value.result

    return call


def test_room_is_kept_for_a_vm_that_may_come(run):
    result = run()
    assert (result["changed"], result["present"], result["busy"]) == (True, False, [])
    assert _reservations.live(set())["web1"]["memory_mib"] == 500


@pytest.mark.parametrize("arguments", [{}, {"state": "absent"}])
def test_a_vm_that_arrived_although_nobody_follows_it_is_not_ended(run, host, tmp_path, monkeypatch, arguments):
    stopped, adopted = [], []
    (tmp_path / "web1.env").touch()
    host.active.add("hecaton-vm@web1.service")
    for module in (vm_incoming, _migrate_unit):
        monkeypatch.setattr(module, "adopt", lambda name, look_only=False: adopted.append(look_only) or True)
    monkeypatch.setattr(vm_incoming, "systemctl", lambda *command, check=True: stopped.append(command))
    result = run(driver="qmp", config="QEMU_ARGS=-m 500\n", **arguments)
    assert not result["failed"] and not result["changed"] and not stopped and adopted
    assert result.get("present", True)


def test_check_mode_keeps_no_room(run):
    assert run(check_mode=True)["changed"]
    assert _reservations.live(set()) == {}


def test_nothing_moves_to_a_cordoned_host(run, host):
    _cordon.write({"reason": "disk 3", "since": "2026-01-02T03:04:05Z", "by": "alice", "owner": None, "also": []}, str(host.state))
    result = run()
    assert result["failed"] and "cordoned since 2026-01-02T03:04:05Z by alice: disk 3" in result["msg"]


def test_without_room_the_message_says_how_much_is_short(run):
    result = run(memory_mib=900, memory_reserve=300)
    assert result["failed"] and result["msg"].endswith(": 200 MiB short")


def test_room_kept_for_others_is_not_free(run):
    run(name="web2", memory_mib=600)
    result = run(memory_mib=500)
    assert result["failed"] and "600 MiB are kept for web2: 100 MiB short" in result["msg"]


def test_a_namesake_is_not_taken_for_the_vm(run, host):
    host.libvirt_here = {"uuid": "u2", "running": True, "receiving": False}
    result = run()
    assert result["failed"] and "another domain called web1 (UUID u2)" in result["msg"]


def test_a_vm_that_runs_here_is_present_even_on_a_cordoned_host(run, host):
    host.libvirt_here = {"uuid": "u1", "running": True, "receiving": False}
    assert run()["present"] and not run()["changed"]


def test_a_busy_host_says_for_whom_and_keeps_no_room(run):
    run(name="web2", memory_mib=100)
    result = run(max_incoming=1)
    assert (result["changed"], result["busy"]) == (False, ["web2"])
    assert "web1" not in _reservations.live(set())


@pytest.mark.parametrize("name", ["../web1", "a b", ""])
def test_a_bad_name_is_refused(run, name):
    assert run(name=name)["failed"]


def test_giving_back_leaves_no_ram_file(run, host, monkeypatch, tmp_path):
    monkeypatch.setattr(vm_incoming, "systemctl", lambda *arguments, check=True: "")
    ram = tmp_path / "web1.ram"
    ram.write_text("")
    (tmp_path / "web1.env").write_text("")
    record = _migration.record_path(str(host.state), "web1", incoming=True)
    _migration.write_json(record, {"id": "1", "phase": "listening", "ram": [{"id": "pc.ram", "path": str(ram), "size": 1 << 27, "port": 49299}]})
    assert run(state="absent")["changed"]
    assert not ram.exists() and not (tmp_path / "web1.env").exists()


@pytest.mark.parametrize("phase, refused", [("postcopy", True), ("finished", False)])
def test_a_vm_that_is_still_leaving_can_t_come_back(run, host, phase, refused):
    """The last that its unit does is to remove what it had here, which would be what it has here again."""
    host.active.add("hecaton-migrate-web1.service")
    _migration.write_json(_migration.record_path(str(host.state), "web1"), {"id": "1", "phase": phase})
    result = run()
    assert result["failed"] == refused
    assert not refused or "web1 is still leaving this host" in result["msg"]


def test_a_record_without_its_unit_keeps_no_vm_away(run, host):
    _migration.write_json(_migration.record_path(str(host.state), "web1"), {"id": "1", "phase": "precopy"})
    assert not run()["failed"]


@pytest.mark.parametrize("engine", ["remote_ram", "precopy"])
def test_ram_files_that_a_vm_still_fetches_pages_from_stay(run, monkeypatch, engine):
    asked = []
    monkeypatch.setattr(vm_incoming, "is_needed", lambda blocks: bool(asked.append(blocks) or blocks))
    monkeypatch.setattr(vm_incoming, "start", lambda job, state_dir: pytest.fail("it was let in"))
    ram = [{"id": "pc.ram", "path": "/run/remote_ram/web1.ram", "size": 1 << 27}]
    result = run(driver="qmp", engine=engine, config='QEMU_ARGS="-m 128"', ram=ram, token="00")
    assert result["failed"] and "a part of the memory of web1 is still only on this host" in result["msg"]
    assert asked == [ram]


def test_what_a_vm_has_copied_ahead_is_not_kept_for_it_once_more(run, host, tmp_path):
    """It is in its RAM file, and in no process: the host has less free memory for it already."""
    ram = tmp_path / "web2.ram"
    ram.write_bytes(b"x" * (200 << 20))
    run(name="web2", memory_mib=600)
    _migration.write_json(_migration.record_path(str(host.state), "web2", incoming=True), {"phase": "receiving", "ram": [{"path": str(ram)}, {"path": "gone"}]})
    result = run(memory_mib=500)
    assert not result["failed"] and result["incoming"]["memory_mib"] == 500
