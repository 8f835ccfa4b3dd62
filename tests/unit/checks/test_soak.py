# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the soak calls a leak, a lost VM and a complaint of the kernel."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import pathlib
import sys

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")
HOST = {"available_kib": 3000000, "slab_kib": 40000, "open_files": 900, "files": ["/var/lib/hecaton/lib/a/b.py"], "units": [], "sessions": 0, "module_users": 1,
        "rdma": ["0: siw0: qp 0 cq 0 pd 0 mr 0 cm_id 0 ctx 0"], "tainted": 1 << 12}  # fmt: skip


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", TESTS / "soak.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_what_the_host_runs_is_a_program(soak):
    ast.parse(soak.MEASURE)
    keys = {node.value for node in ast.walk(ast.parse(soak.MEASURE)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert keys >= HOST.keys()


def test_a_host_that_has_what_it_had_leaks_nothing(soak):
    most = {"available_kib": -soak.AVAILABLE_KIB, "slab_kib": soak.SLAB_KIB, "open_files": soak.OPEN_FILES}
    after = {**HOST, **{key: HOST[key] + change for key, change in most.items()}}
    assert soak.leaks({"hv1": HOST, "hv2": HOST}, {"hv1": HOST, "hv2": after}, ["one"]) == []


def test_a_host_may_have_a_file_for_each_vm_and_port(soak):
    kept = ["/var/lib/hecaton/incoming/one.json", "/var/lib/hecaton/migrations/one.json", "/var/lib/hecaton/jobs/one.outgoing.json", "/run/hecaton/ports/49201"]
    assert soak.leaks({"hv1": HOST}, {"hv1": {**HOST, "files": HOST["files"] + kept}}, ["one"]) == []
    (said,) = soak.leaks({"hv1": HOST}, {"hv1": {**HOST, "files": HOST["files"] + kept}}, ["two"])
    assert said == f"hv1 has other files than before: {', '.join(sorted(kept[:3]))}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"available_kib": 2900000}, "hv1 has 100000 KiB less memory"),
        ({"slab_kib": 50000}, "the kernel of hv1 keeps 10000 KiB more in slabs"),
        ({"open_files": 1300}, "hv1 has 400 more open files"),
        ({"files": [*HOST["files"], "/run/remote_ram/one.ram"]}, "hv1 has other files than before: /run/remote_ram/one.ram"),
        ({"files": [*HOST["files"], "/var/lib/hecaton/migrations/.x.tmp"]}, "hv1 has other files than before: /var/lib/hecaton/migrations/.x.tmp"),
        ({"files": [*HOST["files"], "/run/hecaton/incoming/one.env"]}, "hv1 has other files than before: /run/hecaton/incoming/one.env"),
        ({"units": ["hecaton-migrate-one.service"]}, "hv1 has other units than before: hecaton-migrate-one.service"),
        ({"sessions": 2}, "hv1 has 2 sessions, and had 0"),
        ({"module_users": 3}, "hv1 has 3 users of the module, and had 1"),
        ({"rdma": ["0: siw0: qp 2 cq 2 pd 1 mr 9 cm_id 1 ctx 0"]}, "hv1 has other RDMA objects than before: 0: siw0: qp 2 cq 2 pd 1 mr 9 cm_id 1 ctx 0"),
    ],
)
def test_whatever_a_host_lacks_or_keeps_is_told(soak, change, says):
    assert soak.leaks({"hv1": HOST}, {"hv1": {**HOST, **change}}, ["one"]) == [says]


def test_what_a_kernel_complains_of_is_found(soak):
    log = "[1.0] remote_ram: loaded\n[2.0] WARNING: CPU: 0 PID: 9 at mm/filemap.c\n[2.1] INFO: task qemu blocked for more than 60 seconds.\n"
    assert [line[:5] for line in soak.alarms(log)] == ["[2.0]", "[2.1]"]
    before, after = {"hv1": HOST, "hv2": HOST}, {"hv1": HOST, "hv2": copy.deepcopy({**HOST, "tainted": HOST["tainted"] | 1 << 9})}
    assert soak.tainted(before, after) == ["the kernel of hv2 is damaged: /proc/sys/kernel/tainted has 0x200 more"]
    assert soak.tainted(after, after) == []  # by an earlier test


@pytest.mark.parametrize(
    ("where", "away", "said"),
    [
        ({"one": ["hv2"], "two": ["hv3"]}, True, []),
        ({"one": ["hv1"], "two": ["hv1"]}, False, []),
        ({"one": ["hv2"]}, True, ["two runs on no host"]),
        ({"one": ["hv1"], "two": ["hv2", "hv3"]}, True, ["one runs on hv1", "two runs on hv2 and hv3"]),
        ({"one": ["hv2"], "two": ["hv1"]}, False, ["one runs on hv2"]),
    ],
)
def test_a_vm_that_is_not_on_its_one_host_is_lost(soak, where, away, said):
    assert soak.misplaced(where, ["one", "two"], away) == said


class Lab:
    def ssh(self, host, *command, **more):
        return type("Done", (), {"stdout": "[9.0] BUG: unable to handle page fault\n" if host == "hv2" else ""})


class Guests:
    corrupt = 0

    def where(self):
        return {"one": ["hv2"], "two": ["hv3"]}

    def full_check(self, names, timeout):
        return {name: {"pages": 100, "corrupt_total": self.corrupt} for name in names}


@pytest.mark.parametrize("corrupt", [0, 3])
def test_a_leg_is_on_disk_with_all_that_went_wrong(soak, monkeypatch, tmp_path, corrupt):
    report = {"vms": [{"name": name, "to": "hv2", "downtime_ms": 90, "total_ms": 9000, "engine": "remote_ram"} for name in ("one", "two")]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(soak, "OUT", tmp_path)
    monkeypatch.setattr(soak.playbook, "run", lambda *_args, **_more: 0)
    run = soak.Soak(Lab(), tmp_path / "soak.json", 1)
    run.guests = Guests()
    run.guests.corrupt = corrupt
    run.leg(1, "there")
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [row["pages_checked"] for row in found["rows"]] == [200] and found["corrupt"] == 2 * corrupt
    assert [(each["host"], each["round"]) for each in found["warnings"]] == [("hv2", 1)]
    wrong = run.verdict()
    assert any("page fault" in sentence for sentence in wrong) and any("corrupt" in sentence for sentence in wrong) == bool(corrupt)


def test_a_playbook_that_fails_ends_the_soak(soak, monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "OUT", tmp_path)
    monkeypatch.setattr(soak.playbook, "run", lambda *_args, **_more: 2)
    run = soak.Soak(Lab(), tmp_path / "soak.json", 1)
    run.guests = Guests()
    with pytest.raises(soak.LabError, match="round 4, back: the playbook ended with 2; one runs on hv2; two runs on hv3"):
        run.leg(4, "back")
    assert json.loads((tmp_path / "soak.json").read_text())["passed"] is False
