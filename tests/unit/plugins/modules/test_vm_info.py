# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import pathlib
import sys
import types

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.module_utils import _libvirt, _planner, _qmp_vms
from ansible_collections.hecaton.fleet.plugins.modules import vm_info

DOMAINS = pathlib.Path(__file__).parent.parent / "module_utils" / "domains"


class Ended(Exception):
    """How a module ends here instead of by leaving the process."""

    def __init__(self, result):
        super().__init__(result.get("msg"))
        self.result = result


class Error(Exception):
    """libvirt.libvirtError"""

    def __init__(self, message, code=0):
        super().__init__(message)
        self.code = code

    def get_error_code(self):
        return self.code


class Domain:
    def __init__(self, name, state=(1, 1), operation=0, rate=12, gone=False):
        self.uuid, self._name, self._state, self.operation, self.rate, self.gone = name, name, state, operation, rate, gone
        self.measured = False

    def name(self):
        return self._name

    def state(self):
        if self.gone:
            raise Error("no domain", FakeLibvirt.VIR_ERR_NO_DOMAIN)
        return list(self._state)

    def isActive(self):
        return self._state[0] not in (5, 6)

    def XMLDesc(self):
        return (DOMAINS / f"{self._name}.xml").read_text()

    def jobStats(self):
        return {"type": 2, "operation": self.operation} if self.operation else {"type": 0}

    def startDirtyRateCalc(self, seconds, flags):
        if isinstance(self.rate, str):
            raise Error(self.rate)
        self.measured = True
        return 0


class FakeLibvirt(types.ModuleType):
    """As much of the binding as the module uses."""

    libvirtError = Error
    VIR_ERR_NO_DOMAIN = 42
    VIR_DOMAIN_JOB_NONE, VIR_DOMAIN_JOB_BOUNDED, VIR_DOMAIN_JOB_UNBOUNDED = 0, 1, 2
    VIR_DOMAIN_STATS_DIRTYRATE = 512
    VIR_DOMAIN_DIRTYRATE_MEASURED = 2

    def __init__(self, *domains, fails=None, failures=1000):
        super().__init__("libvirt")
        self.failures = failures
        self.domains = {domain.name(): domain for domain in domains}
        self.fails = fails
        self.opened = []

    def registerErrorHandler(self, handler, context):
        pass

    def openReadOnly(self, uri):
        return self._open(uri, True)

    def open(self, uri):
        return self._open(uri, False)

    def _open(self, uri, readonly):
        if self.fails and self.failures:
            self.failures -= 1
            raise Error(self.fails, 38)
        self.opened.append((uri, readonly))
        return self

    def close(self):
        pass

    def getLibVersion(self):
        return 11003000

    def getVersion(self):
        return 10000013

    def listAllDomains(self):
        return list(self.domains.values())

    def lookupByName(self, name):
        return self.domains[name]

    def storagePoolLookupByName(self, name):
        raise Error("no pool")

    def domainListGetStats(self, domains, stats):
        return [(domain, {"dirtyrate.calc_status": 2, "dirtyrate.megabytes_per_second": domain.rate}) for domain in domains]


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A hypervisor without any driver, whose folders are in tmp_path."""
    monkeypatch.setattr(vm_info, "RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(vm_info, "PATIENCE", 0.3)
    monkeypatch.setattr(vm_info, "LIBVIRT_QEMU_CONF", str(tmp_path / "qemu.conf"))
    monkeypatch.setattr(vm_info.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_libvirt, "DAEMONS", ())
    monkeypatch.setitem(sys.modules, "libvirt", None)
    qemu = tmp_path / "qemu"
    qemu.write_text(
        "#!/bin/sh\ncase $1 in --version) echo 'QEMU emulator version 10.0.13 (Debian)';; *) echo Supported machines are:; echo 'pc-q35-10.0  PC';; esac\n"
    )
    qemu.chmod(0o755)
    return tmp_path


@pytest.fixture
def libvirt(monkeypatch, world):
    def install(*domains, **more):
        fake = FakeLibvirt(*domains, **more)
        monkeypatch.setitem(sys.modules, "libvirt", fake)
        monkeypatch.setattr(_libvirt, "DAEMONS", ("/",))
        return fake

    return install


@pytest.fixture
def run(monkeypatch, world):
    def call(check_mode=False, **arguments):
        defaults = {"vm_config_dir": str(world / "vms"), "state_dir": str(world / "state"), "qemu_binary": str(world / "qemu")}
        defaults["_ansible_check_mode"] = check_mode
        warnings = []

        def end(self, **result):
            raise Ended(result)

        monkeypatch.setattr(basic.AnsibleModule, "exit_json", end)
        monkeypatch.setattr(basic.AnsibleModule, "fail_json", lambda self, msg, **result: end(self, failed=True, msg=msg, **result))
        monkeypatch.setattr(basic.AnsibleModule, "warn", lambda self, message: warnings.append(message))
        with patch_module_args({**defaults, **arguments}), pytest.raises(Ended) as ended:
            vm_info.main()
        return dict(ended.value.result, warnings=warnings)

    return call


def configure(world, name, text='QEMU_ARGS="-machine q35 -m 256"\n'):
    (world / "vms").mkdir(exist_ok=True)
    (world / "vms" / f"{name}.conf").write_text(text)


def record(world, name, text, folder="migrations"):
    (world / "state" / folder).mkdir(parents=True, exist_ok=True)
    (world / "state" / folder / f"{name}.json").write_text(text)


def test_a_host_with_both_drivers(run, libvirt, world):
    libvirt(Domain("web1"), Domain("gpu1"))
    configure(world, "db1")
    result = run(host_name="hv1", migration_address="10.77.1.11")
    assert result["changed"] is False and result["warnings"] == []
    host = result["host"]
    assert (host["name"], host["migration_address"], host["drivers"]) == ("hv1", "10.77.1.11", ["libvirt", "qmp"])
    assert (host["qemu_version"], host["libvirt_version"], host["machines"]) == ("10.0.13", "11.3.0", ["pc-q35-10.0"])
    assert host["memory_total_mib"] > 0 and host["cpus"] > 0 and host["cpu"]["arch"]
    assert (host["cordoned"], host["cordon"]) == (False, None)
    assert [(vm["name"], vm["driver"], vm["state"]) for vm in result["vms"]] == [
        ("db1", "qmp", "shutoff"),
        ("gpu1", "libvirt", "running"),
        ("web1", "libvirt", "running"),
    ]


def test_the_planner_takes_the_facts(run, libvirt, world):
    libvirt(Domain("web1"), Domain("gpu1"), Domain("files1"))
    configure(world, "db1")
    result = run(host_name="hv1")
    fleet = _planner.Fleet([json.loads(json.dumps(result))])
    assert sorted(fleet.hosts["hv1"].vms) == ["db1", "files1", "gpu1", "web1"]


def test_nothing_is_changed_in_check_mode_and_libvirt_is_opened_read_only(run, libvirt, world):
    fake = libvirt(Domain("web1"))
    before = sorted(world.rglob("*"))
    assert run(check_mode=True)["vms"][0]["name"] == "web1"
    assert fake.opened == [("qemu:///system", True)]
    assert sorted(world.rglob("*")) == before


def test_drivers_that_a_host_lacks_are_left_out(run, world):
    configure(world, "db1")
    result = run()
    assert result["host"]["drivers"] == ["qmp"] and result["host"]["libvirt_version"] is None
    assert [vm["name"] for vm in result["vms"]] == ["db1"]


def test_a_host_without_any_driver_is_a_warning(run):
    result = run()
    assert (result["vms"], result["host"]["drivers"]) == ([], [])
    assert any("neither libvirt nor" in warning for warning in result["warnings"])


def test_a_driver_that_was_asked_for_has_to_be_there(run):
    assert "python3-libvirt" in run(drivers=["libvirt"])["msg"]
    assert "hecaton.fleet.qemu" in run(drivers=["qmp"])["msg"]


def test_an_installed_libvirt_without_its_binding_or_its_daemon_is_never_overlooked(run, monkeypatch, libvirt):
    libvirt(fails="Failed to connect socket")
    result = run()
    assert result["failed"] and "Failed to connect socket" in result["msg"] and "set drivers to qmp" in result["msg"]
    monkeypatch.setitem(sys.modules, "libvirt", None)
    result = run()
    assert result["failed"] and "python3-libvirt" in result["msg"]


def test_a_daemon_that_was_just_about_to_end_is_asked_again(run, libvirt):
    """Started by its socket, libvirtd ends when it is idle: who connects at that moment is cut off."""
    libvirt(fails="Cannot write data: Broken pipe", failures=2)
    assert run()["host"]["drivers"] == ["libvirt"]


def test_only_the_vms_that_were_named(run, libvirt, world):
    libvirt(Domain("web1"), Domain("gpu1"))
    configure(world, "db1")
    configure(world, "db2")
    result = run(vms=["web1", "db2", "nobody"])
    assert [vm["name"] for vm in result["vms"]] == ["db2", "web1"]
    assert result["warnings"] == ["this host has no VM called nobody"]


def test_a_domain_that_goes_away_meanwhile_is_left_out(run, libvirt):
    libvirt(Domain("web1"), Domain("gpu1", gone=True))
    assert [vm["name"] for vm in run()["vms"]] == ["web1"]


def test_libvirts_jobs_and_its_memory_folder_reach_the_facts(run, libvirt, world):
    (world / "qemu.conf").write_text('memory_backing_dir = "/run/remote_ram"\n')
    libvirt(Domain("web1", operation=5), Domain("files1"))
    vms = {vm["name"]: vm for vm in run()["vms"]}
    assert vms["web1"]["job"] == "migration_out"
    assert vms["files1"]["memory_backend"]["path"] == "/run/remote_ram"


def test_shared_paths_reach_the_facts(run, libvirt):
    libvirt(Domain("files1"))
    disks = {disk["target"]: disk["shared"] for disk in run(shared_paths=["/dev/mapper"])["vms"][0]["disks"]}
    assert disks["vdd"] is True and disks["vda"] is False


def test_dirty_rates_of_running_vms(run, libvirt, monkeypatch, world):
    fake = libvirt(Domain("web1", rate=12), Domain("gpu1", state=(3, 1)), Domain("files1", operation=5))
    result = run(measure_dirty_rate=True)
    vms = {vm["name"]: (vm["dirty_rate_mib_s"], vm["dirty_rate_error"]) for vm in result["vms"]}
    assert vms == {"web1": (12.0, None), "gpu1": (None, "it is paused"), "files1": (None, "it is busy")}
    assert fake.domains["web1"].measured and not fake.domains["gpu1"].measured
    assert ("qemu:///system", False) in fake.opened


def test_a_dirty_rate_that_cannot_be_measured_says_why(run, libvirt):
    libvirt(Domain("web1", rate="the QEMU is too old"))
    vm = run(measure_dirty_rate=True)["vms"][0]
    assert (vm["dirty_rate_mib_s"], vm["dirty_rate_error"]) == (None, "the QEMU is too old")


def test_nothing_is_measured_unless_asked(run, libvirt):
    fake = libvirt(Domain("web1"))
    vm = run()["vms"][0]
    assert (vm["dirty_rate_mib_s"], vm["dirty_rate_error"]) == (None, None)
    assert not fake.domains["web1"].measured


@pytest.mark.parametrize("seconds", [0, 61])
def test_how_long_to_measure_is_checked(run, seconds):
    assert "from 1 to 60" in run(dirty_rate_seconds=seconds)["msg"]


def test_the_record_of_a_migration_is_passed_on(run, world):
    configure(world, "db1")
    record(world, "db1", '{"id": "1", "phase": "finished", "result": "failed"}')
    assert run()["vms"][0]["migration"]["result"] == "failed"


def test_a_garbled_record_is_a_warning(run, world):
    configure(world, "db1")
    record(world, "db1", '{"id": "1", "pha')
    result = run()
    assert result["vms"][0]["migration"] is None
    assert any("db1.json" in warning for warning in result["warnings"])


@pytest.mark.parametrize(("folder", "job"), [("migrations", "migration_out"), ("incoming", "migration_in")])
def test_a_qemu_kept_busy_by_its_migration_is_migrating(run, monkeypatch, world, folder, job):
    configure(world, "db1")
    record(world, "db1", '{"id": "1", "phase": "precopy", "result": null}', folder)

    def busy(run_dir, name, timeout):
        raise _qmp_vms.QmpError("gave no answer", "ConnectionError")

    monkeypatch.setattr(_qmp_vms, "open_agent", busy)
    vm = run()["vms"][0]
    assert (vm["job"], [blocker["code"] for blocker in vm["blockers"]]) == (job, ["already_migrating"])


def test_a_vm_that_is_arriving_counts_for_its_groups(run, monkeypatch, world):
    (world / "vms").mkdir()
    (world / "run" / "incoming").mkdir(parents=True)
    (world / "run" / "incoming" / "db1.env").write_text('QEMU_ARGS="-m 512"\nVM_GROUPS_ANTI_AFFINITY="database"\n')
    (world / "run" / "vm" / "db1").mkdir(parents=True)
    (world / "run" / "vm" / "db1" / "agent.sock").touch()

    def busy(run_dir, name, timeout):
        raise _qmp_vms.QmpError("gave no answer", "ConnectionError")

    monkeypatch.setattr(_qmp_vms, "open_agent", busy)
    vm = run()["vms"][0]
    assert (vm["memory_mib"], vm["groups"]["anti_affinity"]) == (512, ["database"])


def test_a_qemu_that_hangs_is_reported_and_not_measured(run, monkeypatch, world):
    configure(world, "db1")

    def busy(run_dir, name, timeout):
        raise _qmp_vms.QmpError("gave no answer", "ConnectionError")

    monkeypatch.setattr(_qmp_vms, "open_agent", busy)
    vm = run(measure_dirty_rate=True)["vms"][0]
    assert [blocker["code"] for blocker in vm["blockers"]] == ["unreachable"]
    assert vm["dirty_rate_mib_s"] is None and vm["dirty_rate_error"]


def test_the_cordon_is_read(run, world):
    (world / "state").mkdir()
    (world / "state" / "cordon.json").write_text(json.dumps({"reason": "disk", "since": "2026-11-23T10:00:00Z", "by": "alice", "owner": None, "also": []}))
    host = run()["host"]
    assert host["cordoned"] is True and host["cordon"]["reason"] == "disk"


def test_a_qemu_that_cannot_start_is_an_error(run, world):
    (world / "qemu").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    result = run()
    assert result["failed"] and "exit status 3" in result["msg"] and "broken" in result["msg"]


def test_the_address_of_a_host_without_one_is_null_with_a_warning(run, monkeypatch):
    monkeypatch.setattr(vm_info, "route_address", lambda: None)
    monkeypatch.setattr(vm_info, "name_address", lambda: None)
    result = run()
    assert result["host"]["migration_address"] is None
    assert any("migration_address" in warning for warning in result["warnings"])
