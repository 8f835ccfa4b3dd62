# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils._planner import Options, PlanError, render_table
from ansible_collections.hecaton.fleet.plugins.module_utils._planner_walk import make_walk

NO_REMOTE_RAM = {"remote_ram": {"usable": False, "blockers": [{"code": "remote_ram_missing", "message": "no remote_ram file system is mounted"}]}}


def host(name, free=8192, vms=(), **facts):
    return {
        "host": {
            "name": name,
            "memory_available_mib": free,
            "cpus": 8,
            "cpu": {"vendor": "AuthenticAMD", "model": "EPYC", "arch": "x86_64", "features": ["aes"]},
            "machines": ["pc-q35-10.0"],
            "drivers": ["libvirt", "qmp"],
            "cordoned": False,
            "cordon": None,
            **facts,
        },
        "vms": list(vms),
    }


def vm(name, memory=1024, onboarding=None, **facts):
    """A VM that can be onboarded, and whose host holds all of its memory."""
    engines = {"precopy": [], "userfault": [], "remote_ram": ["its memory is elsewhere"]}
    return {
        "name": name,
        "uuid": f"uuid-{name}",
        "driver": "qmp",
        "state": "running",
        "memory_mib": memory,
        "memory_resident_mib": memory,
        "vcpus": 1,
        "machine": "pc-q35-10.0",
        "cpu": {"mode": "custom", "model": None, "features": ["aes"]},
        "dirty_rate_mib_s": 1.0,
        "groups": {"affinity": [], "anti_affinity": []},
        "engines": {key: {"usable": not why, "blockers": [{"code": "memory_elsewhere", "message": text} for text in why]} for key, why in engines.items()},
        "onboarding": {"usable": not onboarding, "blockers": [{"code": "x", "message": text} for text in onboarding or ()]},
        "blockers": [],
        **facts,
    }


def walk(facts, **options):
    return make_walk(facts, Options(**{"memory_reserve_mib": 0, **options}))


def ways(plan):
    return [(move["vm"], move["from"], move["to"]) for move in plan["moves"]]


def test_hosts_are_walked_one_after_the_other_and_each_vm_moves_once():
    facts = [host("hv2", vms=[vm("b")]), host("hv1", vms=[vm("a1"), vm("a2")]), host("hv3")]
    before = copy.deepcopy(facts)
    plan = walk(facts)
    assert facts == before
    assert [source for _vm, source, _to in ways(plan)] == ["hv1", "hv1", "hv2"]
    assert plan["waves"] == [2, 1]
    assert [(move["order"], move["wave"]) for move in plan["moves"]] == [(1, 1), (2, 1), (3, 2)]
    assert all(move["onboard"] and move["engine"] == "precopy" and "remote_ram" in move["engine_reason"] for move in plan["moves"])
    assert plan["feasible"] and not plan["blocked"] and not plan["skipped"]
    assert (plan["source"], plan["sources"]) == (None, ["hv1", "hv2", "hv3"])


def test_a_wave_begins_when_the_one_before_is_estimated_to_end():
    plan = walk([host("hv1", vms=[vm("a")]), host("hv2", vms=[vm("b")])])
    first, second = plan["moves"]
    assert second["estimated_start_s"] == pytest.approx(first["estimated_start_s"] + first["estimated_s"], abs=0.2)
    assert plan["estimated_s"] == pytest.approx(second["estimated_start_s"] + second["estimated_s"], abs=0.2)


def test_what_one_host_frees_another_may_take():
    """Without room to spare: hv3 takes those of hv1, hv1 those of hv2."""
    facts = [host("hv1", free=0, vms=[vm("a", 3000)]), host("hv2", free=0, vms=[vm("b", 3000)]), host("hv3", free=3000)]
    plan = walk(facts)
    assert ways(plan) == [("a", "hv1", "hv3"), ("b", "hv2", "hv1")]
    assert {entry["name"]: entry["memory_free_after_mib"] for entry in plan["hosts"]} == {"hv1": 0, "hv2": 3000, "hv3": 0}


@pytest.mark.parametrize("resident", [None, 1000])
def test_memory_that_a_guest_never_touched_is_free_already(resident):
    facts = [host("hv1", free=0, vms=[vm("a", 3000, memory_resident_mib=resident)]), host("hv2", free=0, vms=[vm("b", 3000)]), host("hv3", free=3000)]
    plan = walk(facts)
    assert ways(plan) == [("a", "hv1", "hv3")]
    assert [(entry["vm"], entry["blockers"][0]["code"]) for entry in plan["blocked"]] == [("b", "no_room")]
    assert {entry["name"]: entry["memory_free_after_mib"] for entry in plan["hosts"]} == {"hv1": resident or 0, "hv2": 0, "hv3": 0}


def test_memory_promised_to_one_that_arrives_is_not_free_afterwards():
    facts = [host("hv1", vms=[vm("a", 1000)]), host("hv2", free=4000, vms=[vm("late", 500, state="incoming")])]
    assert {entry["name"]: entry["memory_free_after_mib"] for entry in walk(facts)["hosts"]}["hv2"] == 2500


def test_a_host_that_came_too_early_gets_another_turn():
    facts = [host("hv1", free=0, vms=[vm("a", 3000)]), host("hv2", free=2000, vms=[vm("b", 1000)]), host("hv3", free=1000)]
    plan = walk(facts)
    assert ways(plan) == [("b", "hv2", "hv3"), ("a", "hv1", "hv2")]
    assert plan["feasible"] and plan["waves"] == [1, 1]


def test_what_finds_no_room_is_named():
    plan = walk([host("hv1", vms=[vm("big", 9000), vm("small", 100)]), host("hv2", free=1000)])
    assert ways(plan) == [("small", "hv1", "hv2")]
    (entry,) = plan["blocked"]
    assert (entry["vm"], entry["from"], [blocker["code"] for blocker in entry["blockers"]]) == ("big", "hv1", ["no_room"])
    assert not plan["feasible"]


def test_those_that_can_not_be_onboarded_stay_and_it_is_said_why():
    guests = [
        vm("there", onboarding=["its memory is on a remote_ram file system already"]),
        vm("gpu", onboarding=["unused"], blockers=[{"code": "host_device", "message": "it uses a PCI device"}]),
        vm("off", state="shutoff"),
        vm("new"),
    ]
    guests[1]["onboarding"] = {"usable": False, "blockers": []}
    plan = walk([host("hv1", vms=guests), host("hv2")])
    assert ways(plan) == [("new", "hv1", "hv2")]
    assert [(entry["vm"], entry["reason"]) for entry in plan["skipped"]] == [
        ("gpu", "it uses a PCI device"), ("off", "it is shutoff"), ("there", "its memory is on a remote_ram file system already"),
    ]  # fmt: skip


def test_a_definition_that_is_there_already_is_the_same_vm():
    facts = [host("hv1", vms=[vm("a")]), host("hv2", vms=[vm("a", state="shutoff"), vm("b")]), host("hv3", free=100)]
    plan = walk(facts)
    assert ways(plan) == [("a", "hv1", "hv2"), ("b", "hv2", "hv1")] and not plan["skipped"]


def test_only_hosts_with_remote_ram_take_vms():
    facts = [host("hv1", vms=[vm("a")]), host("hv2", engines=NO_REMOTE_RAM), host("hv3", free=2000)]
    plan = walk(facts)
    assert ways(plan) == [("a", "hv1", "hv3")]
    assert {entry["name"]: entry["reason"] for entry in plan["hosts"]}["hv2"] == "no remote_ram file system is mounted"
    plan = walk(facts[:2])
    assert plan["blocked"][0]["blockers"][0]["message"] == (
        "no other host can have its memory on remote_ram: hv2 is no remote_ram file system is mounted"
    ) and not plan["moves"]


def test_a_cordoned_host_takes_none_and_its_vms_leave():
    plan = walk([host("hv1", vms=[vm("a")]), host("hv2", vms=[vm("b")], cordoned=True), host("hv3")])
    assert [name for name, _from, _to in ways(plan)] == ["a", "b"]
    assert "hv2" not in {to for _name, _from, to in ways(plan)}


def test_one_that_can_not_be_reached_does_not_keep_the_others():
    plan = walk([host("hv1", vms=[vm("a")]), host("hv2"), {"host": {"name": "hv3", "unreachable": "no route"}, "vms": []}])
    assert ways(plan) == [("a", "hv1", "hv2")]
    assert plan["warnings"] == ["hv3 is unreachable: no route: its VMs are left alone"]


@pytest.mark.parametrize("cordon", [{"reason": "x", "owner": "hv1-abc"}, {"reason": "y", "owner": None, "also": [{"reason": "x", "owner": "hv1-abc"}]}])
def test_vms_of_a_host_that_is_being_evacuated_are_left_alone(cordon):
    facts = [host("hv1", vms=[vm("a")], cordoned=True, cordon=cordon), host("hv2", vms=[vm("b")]), host("hv3")]
    plan = walk(facts)
    assert ways(plan) == [("b", "hv2", "hv3")]
    assert plan["warnings"][0].startswith("hv1 is being evacuated, or was and is cordoned")
    with pytest.raises(PlanError, match="hv1 is being evacuated"):
        walk(facts, sources=["hv1"])


def test_vms_of_one_name_are_not_mistaken_for_each_other():
    plan = walk([host("hv1", vms=[vm("a")]), host("hv2", vms=[vm("a", uuid="another")]), host("hv3")])
    assert ways(plan) == []
    assert [(entry["vm"], entry["from"]) for entry in plan["blocked"]] == [("a", "hv1"), ("a", "hv2")]
    assert "another VM of its name runs on hv2" in plan["blocked"][0]["blockers"][0]["message"]


def test_who_is_pinned_to_its_host_stays_and_who_is_to_another_goes_there():
    facts = [host("hv1", vms=[vm("a"), vm("b"), vm("c")]), host("hv2", free=9000), host("hv3", free=2000)]
    plan = walk(facts, pinned={"a": "hv1", "b": None, "c": "hv3"})
    assert ways(plan) == [("c", "hv1", "hv3")] and not plan["blocked"]
    assert [(entry["vm"], entry["reason"]) for entry in plan["skipped"]] == [("a", "it is pinned to hv1"), ("b", "it is pinned to hv1")]


def test_an_affinity_group_moves_together_or_not_at_all():
    facts = [host("hv1", vms=[vm("a"), vm("b")]), host("hv2", free=1500), host("hv3", free=3000)]
    assert ways(walk(facts, affinity={"pair": ["a", "b"]})) == [("a", "hv1", "hv3"), ("b", "hv1", "hv3")]
    facts[0]["vms"][1]["onboarding"] = {"usable": False, "blockers": []}
    plan = walk(facts, affinity={"pair": ["a", "b"]})
    assert not plan["moves"] and [entry["blockers"][0]["code"] for entry in plan["blocked"]] == ["affinity"]


def test_anti_affinity_minds_who_moved_before():
    """By free memory alone b would follow a to hv3."""
    facts = [host("hv1", free=1000, vms=[vm("a")]), host("hv2", free=2000, vms=[vm("b")]), host("hv3", free=9000)]
    assert ways(walk(facts)) == [("a", "hv1", "hv3"), ("b", "hv2", "hv3")]
    assert ways(walk(facts, anti_affinity={"apart": ["a", "b"]})) == [("a", "hv1", "hv3"), ("b", "hv2", "hv1")]


def test_who_is_excluded_does_not_block_where_nothing_can_go():
    plan = walk([host("hv1", vms=[vm("a")]), host("hv2", engines=NO_REMOTE_RAM)], exclude=["a"])
    assert plan["feasible"] and [entry["reason"] for entry in plan["skipped"]] == ["excluded"]


def test_names_that_no_vm_has_are_told_once():
    facts = [host("hv1", vms=[vm("a")]), host("hv2", vms=[vm("b")])]
    assert walk(facts, vms=["a", "nobody"], exclude=["noone"])["warnings"] == [
        "exclude names noone, but no VM has that name", "vms names nobody, but no VM has that name",
    ]  # fmt: skip


def test_sources_destinations_and_names_narrow_it_down():
    facts = [host("hv1", vms=[vm("a"), vm("b"), vm("c")]), host("hv2", vms=[vm("d")]), host("hv3")]
    plan = walk(facts, sources=["hv1"], destinations=["hv3"], exclude=["b"], vms=["a", "b"])
    assert ways(plan) == [("a", "hv1", "hv3")]
    assert plan["skipped"] == [{"vm": "b", "driver": "qmp", "from": "hv1", "reason": "excluded"}]
    assert plan["source"] == "hv1"


@pytest.mark.parametrize(("options", "says"), [
    ({"engine": "userfault"}, "engine userfault can't put"),
    ({"deadline_s": 60}, "no deadline"),
    ({"sources": ["hv9"]}, "unknown source host 'hv9'"),
    ({"destinations": ["hv9"]}, "unknown destination host 'hv9'"),
    ({"sources": ["down"]}, "down is unreachable"),
    ({"pinned": {"a": "hv9"}}, "a is pinned to 'hv9'"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(options, says):
    facts = [host("hv1", vms=[vm("a")]), host("hv2"), {"host": {"name": "down", "unreachable": True}, "vms": []}]
    with pytest.raises(PlanError, match=says):
        walk(facts, **options)


def test_without_any_host_to_look_at_there_is_no_plan():
    with pytest.raises(PlanError, match="hv1 is unreachable: no route"):
        walk([{"host": {"name": "hv1", "unreachable": "no route"}, "vms": []}])


def test_the_table_speaks_of_onboarding():
    text = render_table(walk([host("hv1", vms=[vm("a"), vm("big", 9000)]), host("hv2", free=2000)]))
    assert text.startswith("Onboarding of the VMs of hv1, hv2: 1 to move, 1 blocked")
    assert "these can't be onboarded" in text
