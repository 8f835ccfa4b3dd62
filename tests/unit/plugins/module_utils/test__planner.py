# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils._planner import Options, PlanError, make_plan, render_table

FEATURES = ["aes", "avx", "avx2", "sse4_1"]


def host(name, free=8192, vms=(), **facts):
    """Facts of one hypervisor and its VMs."""
    return {
        "host": {
            "name": name,
            "memory_total_mib": 16384,
            "memory_available_mib": free,
            "cpus": 8,
            "cpu": {"vendor": "AuthenticAMD", "model": "EPYC", "arch": "x86_64", "features": FEATURES},
            "machines": ["pc-q35-10.0"],
            "drivers": ["libvirt", "qmp"],
            "cordoned": False,
            "cordon": None,
            **facts,
        },
        "vms": list(vms),
    }


def vm(name, memory=1024, **facts):
    return {
        "name": name,
        "uuid": f"uuid-{name}",
        "driver": "libvirt",
        "state": "running",
        "memory_mib": memory,
        "vcpus": 1,
        "machine": "pc-q35-10.0",
        "cpu": {"mode": "custom", "model": None, "features": ["aes"]},
        "dirty_rate_mib_s": 1.0,
        "groups": {"affinity": [], "anti_affinity": []},
        "engines": engines(),
        "blockers": [],
        **facts,
    }


def engines(precopy=(), userfault=(), remote_ram=("RAM is elsewhere",)):
    """Engines of a VM, each with what keeps the VM from using it."""
    found = {"precopy": precopy, "userfault": userfault, "remote_ram": remote_ram}
    return {name: {"usable": not messages, "blockers": [{"code": "hugetlb_memory", "message": text} for text in messages]} for name, messages in found.items()}


def cpu(vendor="AuthenticAMD", arch="x86_64", features=()):
    return {"vendor": vendor, "arch": arch, "features": list(features)}


def plan_for(facts, **options):
    return make_plan(facts, Options(**{"sources": ["hv1"], "memory_reserve_mib": 0, **options}))


def destinations(plan):
    return {move["vm"]: move["to"] for move in plan["moves"]}


def codes(plan):
    return {entry["vm"]: [blocker["code"] for blocker in entry["blockers"]] for entry in plan["blocked"]}


def message(plan, name, code):
    (text,) = [blocker["message"] for entry in plan["blocked"] if entry["vm"] == name for blocker in entry["blockers"] if blocker["code"] == code]
    return text


# memory


def test_memory_reserve_is_left_free_on_the_destination():
    facts = [host("hv1", vms=[vm("web1", 1024), vm("web2", 1024)]), host("hv2", free=3000)]
    plan = plan_for(facts, memory_reserve_mib=1000)
    assert len(plan["moves"]) == 1
    assert list(codes(plan).values()) == [["no_room"]]
    assert not plan["feasible"]


def test_no_room_names_the_vm_the_closest_host_and_what_is_short():
    facts = [host("hv1", vms=[vm("db1", 5000)]), host("hv2", free=3000), host("hv3", free=4500)]
    text = message(plan_for(facts, memory_reserve_mib=500), "db1", "no_room")
    assert "5000 MiB" in text and "hv3" in text and "1000 MiB short" in text


def test_memory_promised_to_an_incoming_vm_is_not_free():
    facts = [host("hv1", vms=[vm("web1", 1024)]), host("hv2", free=2000, vms=[vm("other", 1500, state="incoming")])]
    assert codes(plan_for(facts)) == {"web1": ["no_room"]}


def test_vcpus_are_limited_only_when_cpu_overcommit_is_set():
    facts = [host("hv1", vms=[vm("web1", vcpus=4)]), host("hv2", cpus=2, vms=[vm("other", vcpus=1)])]
    assert plan_for(facts)["feasible"]
    assert "1 short" in message(plan_for(facts, cpu_overcommit=2), "web1", "no_room")
    assert plan_for(facts, cpu_overcommit=2.5)["feasible"]


def test_packs_tightly_when_spreading_leaves_a_vm_without_room():
    facts = [host("hv1", vms=[vm("a", 3000), vm("b", 3000), vm("c", 2000)]), host("hv2", free=5000), host("hv3", free=3000)]
    plan = plan_for(facts)
    assert plan["feasible"] and len(plan["moves"]) == 3


def test_search_finds_the_packing_that_greedy_misses():
    """Both hosts must be filled to the last MiB."""
    facts = [
        host("hv1", vms=[vm(f"vm{number}", size) for number, size in enumerate([44, 36, 24, 24, 22, 20, 20, 10])]),
        host("hv2", free=100),
        host("hv3", free=100),
    ]
    assert len(plan_for(facts)["moves"]) == 8


@pytest.mark.parametrize("sizes, free", [([2, 5, 6, 8, 2, 8, 10], [22, 19]), ([4, 11, 7, 6, 5], [20, 13])], ids=["move one", "swap two"])
def test_placed_vms_make_room_where_there_are_too_many_to_try_everything(sizes, free):
    small = {f"small{number}": "hv9" for number in range(50)}
    guests = [vm(f"vm{number}", size) for number, size in enumerate(sizes)] + [vm(name, 1) for name in small]
    facts = [host("hv1", vms=guests), host("hv9", free=50)] + [host(f"hv{number}", room) for number, room in enumerate(free, 2)]
    plan = plan_for(facts, pinned=small)
    assert plan["feasible"]
    assert any(move["reason"].startswith("leaves room for") for move in plan["moves"])


def test_vms_spread_over_destinations_alike():
    facts = [host("hv1", vms=[vm(f"vm{number}", 512) for number in range(8)]), host("hv2"), host("hv3"), host("hv4"), host("hv5")]
    assert sorted(destinations(plan_for(facts)).values()) == ["hv2", "hv2", "hv3", "hv3", "hv4", "hv4", "hv5", "hv5"]


def test_free_memory_before_and_after_is_reported_for_every_host():
    plan = plan_for([host("hv1", free=100, vms=[vm("web1", 1024)]), host("hv2", free=4000)])
    assert {entry["name"]: (entry["memory_free_before_mib"], entry["memory_free_after_mib"], entry["incoming"]) for entry in plan["hosts"]} == {
        "hv1": (100, 1124, 0),
        "hv2": (4000, 2976, 1),
    }


# what fits together


@pytest.mark.parametrize("mode", ["host-passthrough", "host-model", "maximum"])
def test_a_guest_with_its_hosts_cpu_needs_all_of_its_features(mode):
    guest = vm("web1", cpu={"mode": mode, "model": None, "features": []})
    facts = [host("hv1", vms=[guest]), host("hv2", cpu=cpu(features=FEATURES[:3]))]
    assert "hv2: CPU lacks sse4_1" in message(plan_for(facts), "web1", "cpu_incompatible")
    facts.append(host("hv3", free=2000, cpu=cpu(features=FEATURES + ["avx512f"])))
    assert destinations(plan_for(facts)) == {"web1": "hv3"}


def test_a_custom_model_needs_only_its_own_features():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", cpu=cpu(features=["aes"]))]
    assert destinations(plan_for(facts)) == {"web1": "hv2"}
    facts[1]["host"]["cpu"]["features"] = ["avx"]
    assert codes(plan_for(facts)) == {"web1": ["cpu_incompatible"]}


def test_flags_of_the_host_kernel_do_not_matter_to_a_guest():
    guest = vm("web1", cpu={"mode": "host-passthrough", "features": []})
    facts = [host("hv1", vms=[guest], cpu=cpu(features=FEATURES + ["rep_good", "pti"])), host("hv2")]
    assert plan_for(facts)["feasible"]


@pytest.mark.parametrize("other", [cpu("GenuineIntel", features=FEATURES), cpu(arch="aarch64", features=FEATURES)])
def test_vendor_and_architecture_have_to_be_the_same(other):
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", cpu=other)]
    assert codes(plan_for(facts)) == {"web1": ["cpu_incompatible"]}


def test_machine_type_has_to_be_known_on_the_destination():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", machines=["pc-q35-9.2"])]
    assert "pc-q35-10.0" in message(plan_for(facts), "web1", "machine_unknown")


def test_driver_has_to_exist_on_the_destination():
    facts = [host("hv1", vms=[vm("web1"), vm("web2", driver="qmp")]), host("hv2", drivers=["qmp"])]
    plan = plan_for(facts)
    assert codes(plan) == {"web1": ["driver_missing"]}
    assert destinations(plan) == {"web2": "hv2"}


def test_a_vm_of_the_same_name_keeps_it_off_a_host_unless_it_is_its_own_definition():
    left_over = vm("web1", state="shutoff")
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", vms=[left_over])]
    assert plan_for(facts)["feasible"]
    left_over["uuid"] = "somebody-else"
    assert codes(plan_for(facts)) == {"web1": ["no_destination"]}


# engines


def test_auto_prefers_remote_ram_where_the_vm_is_ready_for_it():
    facts = [host("hv1", vms=[vm("web1", engines=engines(remote_ram=[])), vm("web2")]), host("hv2")]
    moves = {move["vm"]: (move["engine"], move["engine_reason"]) for move in plan_for(facts)["moves"]}
    assert moves["web1"] == ("remote_ram", "best engine that the VM and both hosts can use")
    assert moves["web2"] == ("userfault", "not remote_ram: RAM is elsewhere")


def test_remote_ram_needs_the_destination_too():
    nothing = {"remote_ram": {"usable": False, "blockers": [{"code": "rdma_missing", "message": "there is no RDMA device"}]}}
    facts = [host("hv1", vms=[vm("web1", engines=engines(remote_ram=[]))]), host("hv2", engines=nothing)]
    (move,) = plan_for(facts)["moves"]
    assert (move["engine"], move["engine_reason"]) == ("userfault", "not remote_ram: on hv2, there is no RDMA device")


def onboarding(usable=True):
    return {"usable": usable, "blockers": [] if usable else [{"code": "driver_unsupported", "message": "it is libvirt's"}]}


def test_a_vm_is_onboarded_by_precopy_the_others_take_the_best_engine():
    guests = [vm("there", engines=engines(remote_ram=[])), vm("new", driver="qmp", onboarding=onboarding()), vm("libvirts", onboarding=onboarding(False))]
    moves = {move["vm"]: (move["engine"], move["onboard"]) for move in plan_for([host("hv1", vms=guests), host("hv2")], onboard=True)["moves"]}
    assert moves == {"there": ("remote_ram", False), "new": ("precopy", True), "libvirts": ("userfault", False)}
    moves = {move["vm"]: (move["engine"], move["onboard"]) for move in plan_for([host("hv1", vms=guests), host("hv2")])["moves"]}
    assert moves == {"there": ("remote_ram", False), "new": ("userfault", False), "libvirts": ("userfault", False)}


def test_with_precopy_asked_for_a_vm_is_onboarded_as_well():
    facts = [host("hv1", vms=[vm("new", driver="qmp", onboarding=onboarding())]), host("hv2")]
    (move,) = plan_for(facts, onboard=True, engine="precopy")["moves"]
    assert (move["engine"], move["engine_reason"], move["onboard"]) == ("precopy", "asked for", True)
    assert not plan_for(facts, onboard=True, engine="precopy", bandwidth_mib_s=10000)["warnings"]


def test_onboarding_by_another_engine_is_no_secret():
    plan = plan_for([host("hv1", vms=[vm("new", driver="qmp", onboarding=onboarding())]), host("hv2")], onboard=True, engine="userfault")
    (move,) = plan["moves"]
    assert (move["engine"], move["onboard"]) == ("userfault", False)
    assert plan["warnings"] == ["nothing is onboarded: that is done by pre-copy, and the engine userfault was asked for"]


def test_nothing_is_onboarded_where_there_is_no_remote_ram():
    nothing = {"remote_ram": {"usable": False, "blockers": [{"code": "remote_ram_missing", "message": "no remote_ram file system is mounted"}]}}
    facts = [host("hv1", vms=[vm("new", driver="qmp", onboarding=onboarding())]), host("hv2", engines=nothing)]
    (move,) = plan_for(facts, onboard=True)["moves"]
    assert (move["engine"], move["onboard"]) == ("userfault", False)


def test_auto_falls_back_to_precopy_and_says_why():
    guest = vm("web1", engines=engines(userfault=["RAM is not shareable"]))
    (move,) = plan_for([host("hv1", vms=[guest]), host("hv2")])["moves"]
    assert (move["engine"], move["engine_reason"]) == ("precopy", "not remote_ram: RAM is elsewhere; not userfault: RAM is not shareable")


def test_auto_minds_what_the_destination_can_not_do():
    no_userfault = {"userfault": {"usable": False, "blockers": [{"code": "no_destination", "message": "no userfaultfd"}]}}
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", engines=no_userfault)]
    (move,) = plan_for(facts)["moves"]
    assert (move["engine"], move["engine_reason"]) == ("precopy", "not remote_ram: RAM is elsewhere; not userfault: on hv2, no userfaultfd")
    assert "no userfaultfd" in message(plan_for(facts, engine="userfault"), "web1", "no_destination")


def test_an_engine_asked_for_that_the_vm_can_not_use_blocks_it():
    guest = vm("web1", engines=engines(userfault=["RAM is not shareable"]))
    plan = plan_for([host("hv1", vms=[guest]), host("hv2")], engine="userfault")
    assert message(plan, "web1", "hugetlb_memory") == "engine userfault: RAM is not shareable"


# blockers


def test_every_blocker_is_reported_not_only_the_first():
    guest = vm(
        "gpu1",
        memory=99999,
        blockers=[{"code": "host_device", "message": "0000:00:05.0"}, {"code": "local_disk", "message": "vda"}],
        machine="pc-q35-99",
        driver="xen",
        cpu={"mode": "host-passthrough", "features": []},
        engines=engines(precopy=["no"], userfault=["no"]),
    )
    facts = [host("hv1", vms=[guest]), host("hv2", cpu=cpu(features=["aes"]))]
    assert set(codes(plan_for(facts, pinned={"gpu1": None}))["gpu1"]) == {
        "host_device",
        "local_disk",
        "hugetlb_memory",
        "pinned",
        "driver_missing",
        "machine_unknown",
        "cpu_incompatible",
        "no_room",
    }


@pytest.mark.parametrize("state, code", [("shutoff", "not_running"), ("crashed", "not_running"), ("incoming", "already_migrating")])
def test_only_a_vm_that_runs_here_can_leave(state, code):
    assert codes(plan_for([host("hv1", vms=[vm("web1", state=state)]), host("hv2")])) == {"web1": [code]}


def test_a_blocker_does_not_stop_the_other_vms():
    gpu = vm("gpu1", blockers=[{"code": "host_device", "message": "GPU"}])
    plan = plan_for([host("hv1", vms=[gpu, vm("web1")]), host("hv2")])
    assert destinations(plan) == {"web1": "hv2"} and not plan["feasible"]


def test_excluded_vms_are_skipped_and_leave_the_plan_feasible():
    plan = plan_for([host("hv1", vms=[vm("web1"), vm("lab9")]), host("hv2")], exclude=["lab9", "ghost"])
    assert plan["skipped"] == [{"vm": "lab9", "driver": "libvirt", "from": "hv1", "reason": "excluded"}]
    assert plan["feasible"]
    assert any("ghost" in warning for warning in plan["warnings"])


# hosts


def test_cordoned_hosts_get_nothing():
    cordoned = host("hv2", cordoned=True, cordon={"reason": "firmware", "since": None, "by": "ana"})
    plan = plan_for([host("hv1", vms=[vm("web1")]), cordoned, host("hv3", free=2000)])
    assert destinations(plan) == {"web1": "hv3"}
    (entry,) = [entry for entry in plan["hosts"] if entry["name"] == "hv2"]
    assert (entry["usable"], entry["reason"]) == (False, "cordoned by ana: firmware")


def test_all_destinations_cordoned_is_no_destination_with_the_reasons():
    plan = plan_for([host("hv1", vms=[vm("web1")]), host("hv2", cordoned=True)])
    assert "hv2 is cordoned" in message(plan, "web1", "no_destination")


def test_unreachable_hosts_get_nothing_and_need_no_facts():
    facts = [host("hv1", vms=[vm("web1")]), {"host": {"name": "hv2", "unreachable": "no route to host"}}]
    assert "no route to host" in message(plan_for(facts), "web1", "no_destination")


def test_only_the_destinations_asked_for_get_vms():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2"), host("hv3", free=2000)]
    assert destinations(plan_for(facts, destinations=["hv3"])) == {"web1": "hv3"}


def test_sources_are_never_destinations_of_one_another():
    facts = [host("hv1", vms=[vm("a")]), host("hv2", vms=[vm("b")]), host("hv3", free=2048)]
    plan = plan_for(facts, sources=["hv1", "hv2"])
    assert destinations(plan) == {"a": "hv3", "b": "hv3"}
    assert (plan["source"], plan["sources"]) == (None, ["hv1", "hv2"])


def test_return_moves_named_vms_back_from_wherever_they_are():
    facts = [host("hv1", vms=[vm("db1")]), host("hv2", vms=[vm("web1"), vm("other")]), host("hv3", vms=[vm("web2")])]
    plan = plan_for(facts, sources=[], vms=["web1", "web2", "db1", "ghost"], destinations=["hv1"])
    assert destinations(plan) == {"web1": "hv1", "web2": "hv1"}
    assert {entry["vm"]: entry["reason"] for entry in plan["skipped"]} == {"db1": "already on hv1", "ghost": "on none of the hosts"}


def test_a_definition_left_behind_by_a_vm_that_runs_elsewhere_is_skipped():
    facts = [host("hv1", vms=[vm("web1", state="shutoff")]), host("hv2", vms=[vm("web1")]), host("hv3")]
    plan = plan_for(facts)
    assert plan["feasible"] and not plan["moves"]
    assert plan["skipped"][0]["reason"] == "it runs on hv2; this is only its definition"
    plan = plan_for(facts, sources=[], vms=["web1"], destinations=["hv3"])
    assert plan["feasible"] and [(move["from"], move["to"]) for move in plan["moves"]] == [("hv2", "hv3")]


def test_different_vms_of_one_name_never_share_a_destination():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", vms=[vm("web1", uuid="another")]), host("hv3", free=9999)]
    assert len(plan_for(facts, sources=["hv1", "hv2"])["blocked"]) == 1
    facts.append(host("hv4", free=2000))
    assert sorted(move["to"] for move in plan_for(facts, sources=["hv1", "hv2"])["moves"]) == ["hv3", "hv4"]


# pins and groups


def test_a_pinned_vm_goes_to_its_host_or_nowhere():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2"), host("hv3", free=1100)]
    assert destinations(plan_for(facts, pinned={"web1": "hv3"})) == {"web1": "hv3"}
    facts[2]["host"]["memory_available_mib"] = 1000
    assert "hv3" in message(plan_for(facts, pinned={"web1": "hv3"}), "web1", "no_room")
    facts[2]["host"]["cordoned"] = True
    assert "cordoned" in message(plan_for(facts, pinned={"web1": "hv3"}), "web1", "pinned")


@pytest.mark.parametrize("pin", [None, "hv1"])
def test_a_vm_pinned_to_where_it_is_blocks(pin):
    assert codes(plan_for([host("hv1", vms=[vm("web1")]), host("hv2")], pinned={"web1": pin})) == {"web1": ["pinned"]}


def test_anti_affinity_keeps_vms_apart_and_off_hosts_with_a_member():
    facts = [host("hv1", vms=[vm("web1"), vm("web2")]), host("hv2", free=99999, vms=[vm("web3")]), host("hv3"), host("hv4")]
    plan = plan_for(facts, anti_affinity={"web": ["web1", "web2", "web3"]})
    assert sorted(destinations(plan).values()) == ["hv3", "hv4"]
    facts.pop()
    plan = plan_for(facts, anti_affinity={"web": ["web1", "web2", "web3"]})
    ((left, found),) = codes(plan).items()
    assert found == ["anti_affinity"]
    assert "hv2, hv3" in message(plan, left, "anti_affinity")


def test_groups_in_the_facts_of_vms_count_like_those_in_the_options():
    apart = {"affinity": [], "anti_affinity": ["web"]}
    facts = [host("hv1", vms=[vm("web1", groups=apart), vm("web2", groups=apart)]), host("hv2"), host("hv3")]
    assert len(set(destinations(plan_for(facts)).values())) == 2
    together = {"affinity": ["app"], "anti_affinity": []}
    facts[0]["vms"] = [vm("web1", groups=together), vm("web2", groups=together)]
    assert len(set(destinations(plan_for(facts)).values())) == 1


def test_affinity_moves_a_group_to_one_host_with_room_for_all():
    facts = [host("hv1", vms=[vm("web1", 2000), vm("db1", 2000)]), host("hv2", free=3000), host("hv3", free=4000)]
    assert destinations(plan_for(facts, affinity={"app": ["web1", "db1"]})) == {"web1": "hv3", "db1": "hv3"}
    facts[2]["host"]["memory_available_mib"] = 3900
    plan = plan_for(facts, affinity={"app": ["web1", "db1"]})
    assert codes(plan) == {"db1": ["no_room"], "web1": ["no_room"]}
    assert "4000 MiB" in message(plan, "db1", "no_room")


def test_affinity_follows_members_that_are_elsewhere_already():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", free=2000, vms=[vm("db1")]), host("hv3")]
    (move,) = plan_for(facts, affinity={"app": ["web1", "db1"]})["moves"]
    assert (move["to"], move["reason"]) == ("hv2", "with db1, by affinity group app")


def test_affinity_with_members_on_several_hosts_takes_one_that_can_run_the_vm():
    facts = [host("hv1", vms=[vm("web1")]), host("hv2", vms=[vm("db1", driver="qmp")], drivers=["qmp"]), host("hv3", free=2000, vms=[vm("db2")])]
    plan = plan_for(facts, affinity={"app": ["web1", "db1", "db2"]})
    assert destinations(plan) == {"web1": "hv3"}
    assert any("on several: hv2, hv3" in warning for warning in plan["warnings"])


def test_affinity_with_a_vm_that_stays_blocks():
    gpu = vm("gpu1", blockers=[{"code": "host_device", "message": "GPU"}])
    plan = plan_for([host("hv1", vms=[gpu, vm("web1")]), host("hv2")], affinity={"app": ["gpu1", "web1"]})
    assert codes(plan) == {"gpu1": ["host_device"], "web1": ["affinity"]}
    assert "gpu1" in message(plan, "web1", "affinity")


def test_contradicting_groups_block():
    facts = [host("hv1", vms=[vm("a"), vm("b")]), host("hv2"), host("hv3")]
    plan = plan_for(facts, affinity={"x": ["a", "b"]}, anti_affinity={"y": ["a", "b"]})
    assert codes(plan) == {"a": ["anti_affinity"], "b": ["anti_affinity"]}


def test_affinity_group_pinned_to_two_hosts_blocks():
    facts = [host("hv1", vms=[vm("a"), vm("b")]), host("hv2"), host("hv3")]
    plan = plan_for(facts, affinity={"x": ["a", "b"]}, pinned={"a": "hv2", "b": "hv3"})
    assert codes(plan) == {"a": ["affinity"], "b": ["affinity"]}


def test_affinity_group_that_no_single_host_can_run_blocks():
    facts = [host("hv1", vms=[vm("a"), vm("b", driver="qmp")]), host("hv2", drivers=["libvirt"]), host("hv3", drivers=["qmp"])]
    assert codes(plan_for(facts, affinity={"x": ["a", "b"]})) == {"a": ["affinity"], "b": ["affinity"]}
    assert destinations(plan_for(facts)) == {"a": "hv2", "b": "hv3"}


# schedule


def test_what_is_dirtied_faster_than_half_the_link_is_copied_ahead_once():
    """Where the rest follows after the switch, more passes would send more than they spare; without a switch to post-copy they have to."""
    options = {"bandwidth_mib_s": 100, "per_source": 1, "per_destination": 1}
    for rate, expected in ((0, 10), (50, 20), (60, 10), (900, 10)):
        plan = plan_for([host("hv1", vms=[vm("web1", 1000, dirty_rate_mib_s=rate)]), host("hv2", free=99999)], **options)
        assert (plan["moves"][0]["engine"], plan["moves"][0]["precopy_timeout_s"]) == ("userfault", expected)
    plan = plan_for([host("hv1", vms=[vm("web1", 1000, dirty_rate_mib_s=60)]), host("hv2", free=99999)], engine="precopy", **options)
    assert plan["moves"][0]["precopy_timeout_s"] > 25


def test_big_and_hot_vms_start_first():
    guests = [vm("small", 512), vm("big", 4096), vm("hot", 3072, dirty_rate_mib_s=900), vm("calm", 2048)]
    plan = plan_for([host("hv1", vms=guests), host("hv2", free=99999)], per_source=1)
    assert [move["vm"] for move in plan["moves"]] == ["hot", "big", "calm", "small"]
    assert [move["order"] for move in plan["moves"]] == [1, 2, 3, 4]


def test_moves_at_the_same_time_share_the_link():
    guests = [vm(f"vm{number}", 1000, dirty_rate_mib_s=0) for number in range(4)]
    facts = [host("hv1", vms=guests), host("hv2"), host("hv3")]
    one = plan_for(facts, bandwidth_mib_s=100, per_source=1)
    four = plan_for(facts, bandwidth_mib_s=100, per_source=4)
    assert one["estimated_s"] == pytest.approx(44)  # 1000 MiB at 100 MiB/s and one second to switch, each
    assert four["estimated_s"] == pytest.approx(41)  # a quarter of the link each
    assert (one["concurrency"]["peak"], four["concurrency"]["peak"]) == (1, 4)


def test_without_a_deadline_precopy_gets_what_it_can_use():
    guest = vm("web1", 1000, dirty_rate_mib_s=50)
    (move,) = plan_for([host("hv1", vms=[guest]), host("hv2")], bandwidth_mib_s=100)["moves"]
    assert move["precopy_timeout_s"] == 20  # 1000 MiB, and the link is 50 MiB/s faster than the guest


def test_a_deadline_cuts_precopy_so_that_the_host_is_empty_in_time():
    guests = [vm(f"vm{number}", 1000, dirty_rate_mib_s=20) for number in range(6)]
    facts = [host("hv1", vms=guests), host("hv2"), host("hv3")]
    free = plan_for(facts, bandwidth_mib_s=100)
    bound = plan_for(facts, bandwidth_mib_s=100, deadline_s=80)
    assert free["estimated_s"] > 80 >= bound["estimated_s"]
    assert bound["feasible"]
    assert max(move["precopy_timeout_s"] for move in bound["moves"]) < min(move["precopy_timeout_s"] for move in free["moves"])
    assert any("pre-copy is cut" in warning for warning in bound["warnings"])


def test_what_has_passed_of_the_deadline_is_not_there_any_more():
    guests = [vm(f"vm{number}", 1000, dirty_rate_mib_s=20) for number in range(6)]
    facts = [host("hv1", vms=guests), host("hv2"), host("hv3")]
    late, fresh = plan_for(facts, bandwidth_mib_s=100, deadline_s=100, elapsed_s=20), plan_for(facts, bandwidth_mib_s=100, deadline_s=80)
    assert [move["precopy_timeout_s"] for move in late["moves"]] == [move["precopy_timeout_s"] for move in fresh["moves"]]
    assert (late["deadline_s"], late["elapsed_s"], late["feasible"]) == (100, 20, True)
    for elapsed, says in ((60, "60 s of it have passed"), (100, "100 s of it have passed"), (140, "s too long")):
        gone = plan_for(facts, bandwidth_mib_s=100, deadline_s=100, elapsed_s=elapsed)
        assert not gone["feasible"] and any(says in warning for warning in gone["warnings"])
        assert {move["precopy_timeout_s"] for move in gone["moves"]} == {2}


def test_what_a_move_takes_besides_its_data_is_counted_for_each():
    facts = [host("hv1", vms=[vm(f"vm{number}", 1000, dirty_rate_mib_s=0) for number in range(4)]), host("hv2")]
    assert plan_for(facts, bandwidth_mib_s=100, per_source=1, setup_s=5)["estimated_s"] == pytest.approx(60)


def test_bigger_and_hotter_vms_get_more_of_the_precopy_time():
    guests = [vm("small", 500), vm("big", 4000), vm("hot", 4000, dirty_rate_mib_s=20)]
    plan = plan_for([host("hv1", vms=guests), host("hv2", free=99999)], bandwidth_mib_s=100, deadline_s=120)
    timeout = {move["vm"]: move["precopy_timeout_s"] for move in plan["moves"]}
    assert timeout["small"] < timeout["big"] < timeout["hot"]


def test_a_deadline_that_can_not_be_met_is_infeasible_and_says_by_how_much():
    guests = [vm("web1", 5000, dirty_rate_mib_s=0)]
    plan = plan_for([host("hv1", vms=guests), host("hv2")], bandwidth_mib_s=100, deadline_s=20)
    assert not plan["feasible"]
    assert any("can't be met" in warning and "31 s too long" in warning for warning in plan["warnings"])
    assert [move["precopy_timeout_s"] for move in plan["moves"]] == [2]


def test_precopy_never_gets_less_than_the_minimum():
    plan = plan_for([host("hv1", vms=[vm("a", 5000)]), host("hv2")], bandwidth_mib_s=100, deadline_s=1, precopy_min_s=5)
    assert [move["precopy_timeout_s"] for move in plan["moves"]] == [5]


def test_onboarding_that_can_not_converge_slows_the_guest_down_and_says_so():
    guest = vm("new", driver="qmp", dirty_rate_mib_s=200, onboarding=onboarding())
    warnings = plan_for([host("hv1", vms=[guest]), host("hv2")], bandwidth_mib_s=100, onboard=True)["warnings"]
    assert len(warnings) == 1 and "it is slowed down until its memory is on remote_ram" in warnings[0]


def test_precopy_that_can_not_converge_is_warned_of():
    guest = vm("hot", dirty_rate_mib_s=500)
    plan = plan_for([host("hv1", vms=[guest]), host("hv2")], bandwidth_mib_s=100, engine="precopy")
    assert any("hot" in warning and "never converge" in warning for warning in plan["warnings"])


def test_an_unknown_dirty_rate_is_warned_of_and_stays_unknown_in_the_plan():
    plan = plan_for([host("hv1", vms=[vm("web1", dirty_rate_mib_s=None)]), host("hv2")])
    assert plan["moves"][0]["dirty_rate_mib_s"] is None
    assert any("web1" in warning for warning in plan["warnings"])


def test_a_host_without_vms_is_a_feasible_plan_without_moves():
    plan = plan_for([host("hv1"), host("hv2")], deadline_s=10)
    assert (plan["moves"], plan["feasible"], plan["estimated_s"]) == ([], True, 0)


# rules that hold for any fleet


def random_fleet(rng):
    """A fleet with every constraint in it, tight enough that some VMs are blocked, and options to plan it."""
    hosts = [f"hv{number}" for number in range(1, rng.randint(3, 12))]
    names = itertools.count()
    facts = []
    for name in hosts:
        vms = [
            vm(
                f"vm{next(names)}",
                rng.choice([256, 512, 1000, 2048, 3333]),
                vcpus=rng.randint(1, 4),
                driver=rng.choice(["libvirt", "libvirt", "qmp"]),
                state=rng.choice(["running"] * 8 + ["paused", "shutoff", "incoming"]),
                cpu={"mode": rng.choice(["custom", "host-passthrough", "host-model"]), "features": ["aes"]},
                dirty_rate_mib_s=rng.choice([None, 0, 5.5, 300, 5000]),
                engines=engines(userfault=rng.choice([[], [], ["no"]]), precopy=rng.choice([[], [], [], ["no"]])),
                blockers=rng.choice([[]] * 9 + [[{"code": "local_disk", "message": "vda"}]]),
            )
            for _vm in range(rng.randint(0, 9))
        ]
        facts.append(
            host(
                name,
                rng.randint(0, 9000),
                vms,
                cordoned=rng.random() < 0.1,
                cpu=cpu(features=FEATURES[: rng.choice([3, 4, 4, 4])]),
                drivers=rng.choice([["libvirt", "qmp"], ["libvirt", "qmp"], ["libvirt"]]),
            )
        )
    count = next(names)
    pick = [f"vm{number}" for number in range(count)]

    def groups():
        return {f"g{number}": rng.sample(pick, min(len(pick), rng.randint(2, 4))) for number in range(rng.randint(0, 2))}

    options = {
        "sources": rng.sample(hosts, rng.randint(1, max(1, len(hosts) // 2))),
        "exclude": rng.sample(pick, min(len(pick), 2)),
        "affinity": groups(),
        "anti_affinity": groups(),
        "pinned": {name: rng.choice(hosts + [None]) for name in rng.sample(pick, min(len(pick), 2))},
        "memory_reserve_mib": rng.choice([0, 500]),
        "cpu_overcommit": rng.choice([None, 3]),
        "per_source": rng.randint(1, 4),
        "per_destination": rng.randint(1, 3),
        "bandwidth_mib_s": rng.choice([30, 1000]),
        "deadline_s": rng.choice([None, 5, 100, 1000]),
    }
    return facts, options


def vms_of(facts):
    return {guest["name"]: (entry["host"]["name"], guest) for entry in facts for guest in entry["vms"]}


SEEDS = range(150)


@pytest.fixture(scope="module")
def random_plans():
    plans = []
    for seed in SEEDS:
        facts, options = random_fleet(random.Random(seed))
        plans.append((facts, options, make_plan(facts, Options(**options))))
    return plans


def test_any_plan_names_each_vm_exactly_once(random_plans):
    for facts, options, plan in random_plans:
        expected = sorted(name for name, (where, _vm) in vms_of(facts).items() if where in options["sources"])
        assert sorted(entry["vm"] for key in ("moves", "blocked", "skipped") for entry in plan[key]) == expected


def test_any_plan_leaves_the_reserve_on_each_destination(random_plans):
    for facts, options, plan in random_plans:
        for entry in facts:
            name = entry["host"]["name"]
            arriving = sum(move["memory_mib"] for move in plan["moves"] if move["to"] == name)
            promised = sum(guest["memory_mib"] for guest in entry["vms"] if guest["state"] == "incoming")
            room = entry["host"]["memory_available_mib"] - promised - options["memory_reserve_mib"]
            assert not arriving or arriving <= room


def test_any_plan_minds_cpu_overcommit(random_plans):
    for facts, options, plan in random_plans:
        guests = vms_of(facts)
        for entry in facts:
            arriving = [guests[move["vm"]][1]["vcpus"] for move in plan["moves"] if move["to"] == entry["host"]["name"]]
            there = [guest["vcpus"] for guest in entry["vms"] if guest["state"] in ("running", "paused", "incoming")]
            if arriving and options["cpu_overcommit"]:
                assert sum(arriving) + sum(there) <= entry["host"]["cpus"] * options["cpu_overcommit"]


def test_any_plan_moves_only_to_hosts_that_can_run_the_vm(random_plans):
    for facts, options, plan in random_plans:
        hosts = {entry["host"]["name"]: entry["host"] for entry in facts}
        guests = vms_of(facts)
        for move in plan["moves"]:
            where, guest = guests[move["vm"]]
            source, destination = hosts[where], hosts[move["to"]]
            assert move["from"] == where and move["to"] not in options["sources"]
            assert not destination["cordoned"]
            assert guest["driver"] in destination["drivers"]
            assert guest["engines"][move["engine"]]["usable"]
            assert guest["state"] in ("running", "paused") and not guest["blockers"]
            if guest["cpu"]["mode"] != "custom":
                assert set(source["cpu"]["features"]) <= set(destination["cpu"]["features"])


def test_any_plan_respects_groups_and_pins(random_plans):
    for facts, options, plan in random_plans:
        after = {name: where for name, (where, guest) in vms_of(facts).items() if guest["state"] != "shutoff"}
        moved = destinations(plan)
        after.update(moved)
        for members in options["anti_affinity"].values():
            for name in set(members) & set(moved):
                assert not [other for other in members if other != name and after.get(other) == moved[name]]
        for members in options["affinity"].values():
            together = {moved[name] for name in members if name in moved}
            assert len(together) <= 1
            staying = {after[name] for name in members if name in after and name not in moved}
            assert not together or not staying or together & staying
        for name, pin in options["pinned"].items():
            assert name not in moved or moved[name] == pin


def test_any_schedule_keeps_to_the_concurrency(random_plans):
    for _facts, options, plan in random_plans:
        peak = 0
        for move in plan["moves"]:
            now = move["estimated_start_s"] + 0.11  # times in the plan are rounded to 0.1 s
            running = [other for other in plan["moves"] if other["estimated_start_s"] < now < other["estimated_start_s"] + other["estimated_s"] - 0.11]
            peak = max(peak, len(running))
            for key, limit in (("from", options["per_source"]), ("to", options["per_destination"])):
                for name in {other[key] for other in running}:
                    assert len([other for other in running if other[key] == name]) <= limit
        assert peak <= plan["concurrency"]["peak"]


def test_any_schedule_starts_in_the_order_of_the_plan_and_ends_when_it_says(random_plans):
    for _facts, _options, plan in random_plans:
        starts = [move["estimated_start_s"] for move in plan["moves"]]
        assert starts == sorted(starts)
        ends = [move["estimated_start_s"] + move["estimated_s"] for move in plan["moves"]]
        assert max(ends, default=0) == pytest.approx(plan["estimated_s"], abs=0.2)


def test_any_plan_that_is_feasible_meets_its_deadline_and_blocks_nothing(random_plans):
    for _facts, options, plan in random_plans:
        late = options["deadline_s"] is not None and plan["estimated_s"] > options["deadline_s"]
        assert plan["feasible"] == (not late and not plan["blocked"])
        assert all(entry["blockers"] for entry in plan["blocked"])
        assert all(move["precopy_timeout_s"] >= 2 for move in plan["moves"])


def test_the_same_input_gives_the_same_plan_whatever_the_order_of_the_facts():
    for seed in SEEDS:
        facts, options = random_fleet(random.Random(seed))
        before = copy.deepcopy(facts)
        first = make_plan(facts, Options(**options))
        assert facts == before, "the planner must not change the facts"
        for entry in facts:
            entry["vms"].reverse()
        second = make_plan(list(reversed(facts)), Options(**options))
        assert json.dumps(first["moves"]) == json.dumps(second["moves"])


def test_small_fleets_are_packed_as_well_as_trying_everything():
    rng = random.Random(3)
    for _round in range(60):
        sizes = [rng.randrange(4, 40) for _vm in range(rng.randint(2, 7))]
        free = [rng.randrange(10, 70) for _host in range(rng.randint(1, 3))]
        best = 0
        for choice in itertools.product(range(-1, len(free)), repeat=len(sizes)):
            if all(sum(size for size, to in zip(sizes, choice, strict=True) if to == bin_) <= room for bin_, room in enumerate(free)):
                best = max(best, sum(to >= 0 for to in choice))
        facts = [host("hv1", vms=[vm(f"vm{number}", size) for number, size in enumerate(sizes)])]
        facts += [host(f"hv{number}", room) for number, room in enumerate(free, 2)]
        assert len(plan_for(facts)["moves"]) == best, f"{sizes} into {free}"


# what is wrong with the input


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sources": ["hv9"]}, "unknown source host 'hv9'"),
        ({"sources": []}, "no source"),
        ({"destinations": []}, "no destination: the list of destinations is empty"),
        ({"destinations": ["hv1"]}, "no destination"),
        ({"destinations": ["hv9"]}, "unknown destination host 'hv9'"),
        ({"pinned": {"web1": "hv9"}}, "'hv9'"),
        ({"pinned": {"web1": 3}}, r"pinned\[web1\]"),
        ({"affinity": {"app": "web1"}}, r"affinity\[app\] must be a list"),
        ({"memory_reserve_mib": -5}, "memory_reserve_mib must be 0 or more, not -5"),
        ({"per_source": 0}, "per_source must be 1 or more, not 0"),
        ({"per_destination": True}, "per_destination must be a whole number"),
        ({"bandwidth_mib_s": 0}, "bandwidth_mib_s must be above 0"),
        ({"bandwidth_mib_s": float("nan")}, "bandwidth_mib_s must be a number"),
        ({"deadline_s": -1}, "deadline_s must be above 0"),
        ({"cpu_overcommit": 0}, "cpu_overcommit must be above 0"),
        ({"engine": "warp"}, "engine must be one of"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(change, words):
    with pytest.raises(PlanError, match=words):
        plan_for([host("hv1", vms=[vm("web1")]), host("hv2")], **change)


def _without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    "facts, words",
    [
        ({}, "facts must be a list"),
        (["hv1"], "entry 0 must be a mapping"),
        ([{"vms": []}], "entry 0 has no 'host'"),
        ([{"host": {}, "vms": []}], "host of entry 0 has no 'name'"),
        ([host("hv1"), host("hv1")], "host hv1 is there twice"),
        ([_without(host("hv1"), "vms")], "host hv1 has no 'vms'"),
        ([host("hv1", free="lots")], "'memory_available_mib' of host hv1 must be a number, 0 or more, not str 'lots'"),
        ([host("hv1", free=-1)], "'memory_available_mib' of host hv1"),
        ([host("hv1", cpu=None)], "host hv1 has no 'cpu'"),
        ([host("hv1", machines="q35")], "'machines' of host hv1 must be a list"),
        ([host("hv1", machines=[1])], "'machines' of host hv1 must be a list of texts"),
        ([host("hv1", vms=["web1"])], "VM 0 on host hv1 must be a mapping"),
        ([host("hv1", vms=[vm("a"), vm("a")])], "VM a on host hv1 is there twice"),
        ([host("hv1", vms=[_without(vm("web1"), "memory_mib")])], "VM web1 on host hv1 has no 'memory_mib'"),
        ([host("hv1", vms=[vm("web1", engines=[])])], "'engines' of VM web1 on host hv1 must be a mapping"),
        ([host("hv1", vms=[vm("web1", engines={"precopy": 1})])], "engine 'precopy' of VM web1 on host hv1"),
        ([host("hv1", vms=[vm("web1", blockers=["x"])])], "'blockers' of VM web1 on host hv1"),
        ([host("hv1", vms=[vm("web1", groups={"affinity": "x"})])], "'affinity' of groups of VM web1 on host hv1"),
        ([{"host": {"name": "hv1", "unreachable": "no route"}}], "source host hv1 is unreachable: no route"),
        ([host("hv1")], "no destination: there is no host besides hv1"),
    ],
)
def test_wrong_facts_are_refused_with_what_and_where(facts, words):
    with pytest.raises(PlanError) as error:
        plan_for(facts)
    assert words in str(error.value)


# the table


def test_the_table_tells_moves_blockers_skips_hosts_and_warnings():
    gpu = vm("gpu1", blockers=[{"code": "host_device", "message": "it uses a GPU"}], machine="pc-q35-99")
    facts = [host("hv1", vms=[vm("web1"), gpu, vm("lab9")]), host("hv2"), host("hv3", cordoned=True)]
    table = render_table(plan_for(facts, exclude=["lab9"], deadline_s=60))
    assert table.startswith("Evacuation of hv1: 1 to move, 1 blocked, 1 skipped, about ")
    assert "NOT FEASIBLE" in table.splitlines()[0]
    for words in ("web1", "userfault", "1024 MiB", "it uses a GPU", "machine_unknown", "excluded", "cordoned", "Warnings"):
        assert words in table
    assert not [line for line in table.splitlines() if line != line.rstrip()]


def test_the_table_of_a_big_fleet_lists_only_hosts_that_take_part():
    facts = [host("hv1", vms=[vm("web1")])] + [host(f"other{number}") for number in range(50)]
    table = render_table(plan_for(facts))
    assert "other0" in table and "other7" not in table
    assert "and 49 hosts that nothing moves to" in table
