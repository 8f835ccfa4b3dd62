# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the comparison of engines does in which order, and what it runs on."""

from __future__ import annotations

import types

import pytest


@pytest.fixture
def setting(engines, monkeypatch, tmp_path):
    """A setting whose lab only notes what it is told."""
    done = []

    class Guests:
        def __init__(self, lab):
            pass

        def deploy(self, guests, host):
            done.append(f"deploy {'remote_ram' if guests[0].remote_ram else 'ordinary'} on {host}")

        def destroy(self):
            done.append("destroy")

    def run(command, **_options):
        done.append(f"install {command[-1]}")
        return types.SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(engines.lab_guests, "Guests", Guests)
    monkeypatch.setattr(engines.ready.subprocess, "run", run)
    made = engines.Setting(None, tmp_path)
    made.done = done
    return made


def prepare(setting, engines, engine):
    transport = engines.workloads.parts(engine)[1]
    setting.prepare(engines.workloads.WORKLOADS["hot"].guest("qmp", bool(transport)), transport)


def test_the_guest_is_started_afresh_only_where_its_memory_has_to_be_elsewhere(engines, setting):
    for engine in ("precopy", "userfault", "remote_ram:siw", "remote_ram:rxe", "remote_ram:rxe"):
        prepare(setting, engines, engine)
    assert setting.done == [
        "deploy ordinary on hv1", "destroy", "install siw", "deploy remote_ram on hv1", "destroy", "install rxe", "deploy remote_ram on hv1",
    ]  # fmt: skip


def test_a_transport_that_is_there_is_not_put_there_again(engines, setting):
    for engine in ("remote_ram:siw", "userfault", "remote_ram:siw"):
        prepare(setting, engines, engine)
    assert [each for each in setting.done if each.startswith("install")] == ["install siw"]


def test_all_engines_move_the_same_guest_but_for_where_its_memory_is(engines):
    for load in engines.workloads.WORKLOADS.values():
        ordinary, remote = load.guest("qmp", False), load.guest("qmp", True)
        assert (ordinary.name, ordinary.memory_mib, ordinary.append) == (remote.name, remote.memory_mib, remote.append)
        assert "/run/remote_ram/bench-qmp.ram" in remote.conf(None)
        assert "remote_ram" not in ordinary.conf(None)
        assert load.working_set_mib < load.memory_mib


def test_every_engine_has_the_same_limits(engines):
    options = engines.workloads.ENGINES
    assert {each["max_downtime"] for each in options.values()} == {engines.workloads.MAX_DOWNTIME_MS}
    assert len({each["precopy_timeout"] for each in options.values() if "precopy_timeout" in each}) == 1


def test_six_vms_fit_on_a_host(engines):
    remote, ordinary = engines.workloads.six(True), engines.workloads.six(False)
    assert len({guest.name for guest in remote}) == len({guest.uuid for guest in remote}) == 6
    assert [guest.append for guest in remote] == [guest.append for guest in ordinary]
    # Of the 2 GiB that the module's file system may hold in the lab.
    assert sum(guest.memory_mib for guest in remote) < 2048


def test_a_short_run_leaves_the_eviction_out(engines):
    assert engines.arguments(["--workloads", "hot"]).figures == ["engines"]
    assert engines.arguments([]).figures == ["engines", "eviction"]
    assert engines.arguments(["--figures", "eviction"]).figures == ["eviction"]


def test_what_was_found_is_on_disk_after_each_row(engines, row, tmp_path):
    results = engines.Results(tmp_path / "engines.json", "tcg")
    results.add("rows", row())
    results.add("rows", row("remote_ram", "siw"))
    assert '"met": true' in (tmp_path / "engines.json").read_text()
    assert "remote_ram, siw" in (tmp_path / "engines.html").read_text()
    assert not results.wrong()
    results.add("rows", row(corrupt=1))
    assert results.wrong()
