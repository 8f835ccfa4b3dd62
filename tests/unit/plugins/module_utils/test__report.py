# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _report
from ansible_collections.hecaton.fleet.plugins.module_utils._report import LOST, SCHEMA, ReportError, brief, build, dump, table, validate

START = 1795428000.0
MOVE = {"vm": "web1", "driver": "libvirt", "from": "hv1", "to": "hv2", "engine": "userfault", "memory_mib": 256, "dirty_rate_mib_s": 12.5,
        "precopy_timeout_s": 8}
PLAN = {"source": "hv1", "deadline_s": 600, "moves": [MOVE]}
MOVED = {
    "vm": "web1", "driver": "libvirt", "engine": "precopy", "from": "hv1", "to": "hv2", "phase": "finished", "result": "moved", "reason": "",
    "started": START + 0.4, "switched": START + 6.5, "finished": START + 7.7, "downtime_ms": 120, "total_ms": 7300, "bytes": 158000000,
    "samples": [[0.0, "precopy", 31.0, 256.0], [6.1, "postcopy", 28.5, 40.0]],
}
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def report(plan=None, migrations=(), locations=None, host="hv1", **more) -> dict:
    made = build(PLAN if plan is None else plan, list(migrations), locations or {}, host, START, START + 10.5, **more)
    VALIDATOR.validate(json.loads(dump(made)))
    return made


def outcome(migrations=(), locations=None, plan=None, **more) -> tuple[str, str, bool, int]:
    made = report(plan, migrations, locations, **more)
    return made["vms"][0]["result"], made["vms"][0]["reason"], made["empty"], made["failed"]


def test_report_has_what_data_md_says():
    made = report(migrations=[MOVED], locations={"web1": "hv2"}, clients=[{"name": "probe", "requests": 10, "failed": 1}])
    assert {key: value for key, value in made.items() if key not in ("vms", "plan")} == {
        "format": 1, "host": "hv1", "direction": "away", "started": "2026-11-23T10:00:00Z", "finished": "2026-11-23T10:00:10Z", "failed": 0, "deadline_s": 600,
        "elapsed_s": 10.5, "freed_s": 7.7, "empty": True, "check": False,
        "clients": [{"name": "probe", "requests": 10, "failed": 1, "worst_ms": None, "p50_ms": None, "p99_ms": None}],
    }
    assert made["plan"] == PLAN
    assert made["vms"] == [{
        "name": "web1", "driver": "libvirt", "result": "moved", "reason": "", "engine": "precopy", "from": "hv1", "to": "hv2", "location": "hv2",
        "downtime_ms": 120, "total_ms": 7300, "bytes": 158000000, "started_s": 0.4, "switched_s": 6.5, "finished_s": 7.7,
        "memory_mib": 256, "dirty_rate_mib_s": 12.5, "precopy_timeout_s": 8, "precopy_s": 6.1, "planned_start_s": None, "planned_finish_s": None,
        "onboarded": False, "samples": MOVED["samples"],
    }]


# --- Where the VM is decides, not what its migration claims ---

def test_reported_failure_but_on_the_destination_has_moved():
    state = {**MOVED, "result": "failed", "reason": "lost ssh"}
    assert outcome([state], {"web1": "hv2"}) == ("moved", "runs on hv2, although its migration was reported as failed: lost ssh", True, 0)


def test_what_did_not_move_along_is_told():
    state = {**MOVED, "reason": "2 pages could not be read here"}
    assert outcome([state], {"web1": "hv2"}) == ("moved", "2 pages could not be read here", True, 0)


def test_claimed_moved_but_on_the_source_has_failed():
    assert outcome([MOVED], {"web1": "hv1"}) == ("failed", "its migration says that it moved to hv2, but it is still on hv1", False, 1)


def test_claimed_moved_but_found_nowhere_is_lost():
    result, reason, empty, failed = outcome([MOVED], {"web1": None})
    assert (result, empty, failed) == ("failed", True, 1)
    assert reason == f"{LOST}; its migration says that it moved to hv2"


def test_claimed_moved_but_not_verified_has_failed():
    assert outcome([MOVED]) == ("failed", "nobody verified where it runs; its migration says that it moved", False, 1)


@pytest.mark.parametrize("claim, said", [("failed", "its migration failed: no route"), ("aborted", "its migration was aborted: no route")])
def test_failure_says_why(claim, said):
    assert outcome([{**MOVED, "result": claim, "reason": "no route"}], {"web1": "hv1"}) == ("failed", said, False, 1)
    assert outcome([{**MOVED, "result": claim, "reason": "no route"}]) == ("failed", f"nobody verified where it runs; {said}", False, 1)


def test_never_started_has_failed():
    assert outcome(locations={"web1": "hv1"}) == ("failed", "no migration was started", False, 1)


def test_unfinished_on_the_source_has_failed():
    assert outcome([{**MOVED, "result": None, "phase": "precopy"}], {"web1": "hv1"})[:2] == ("failed", "its migration has not finished (phase precopy)")


def test_unfinished_postcopy_keeps_the_source_from_being_empty():
    """The VM runs elsewhere, but a part of its memory is still on the source: powering that off would lose the VM."""
    result, reason, empty, failed = outcome([{**MOVED, "result": None, "phase": "postcopy", "finished": None}], {"web1": "hv2"})
    assert (result, empty, failed) == ("failed", False, 1)
    assert "keep hv1 up" in reason


def test_found_on_another_host_than_planned():
    made = report(migrations=[MOVED], locations={"web1": "hv3"})
    assert (made["vms"][0]["result"], made["vms"][0]["to"], made["vms"][0]["reason"]) == ("moved", "hv3", "was to go to hv2 and is on hv3")


def test_found_elsewhere_without_a_migration_has_moved():
    assert outcome(locations={"web1": "hv2"}) == ("moved", "no migration of this run moved it, but runs on hv2", True, 0)


# --- Blocked, skipped, unplanned ---

BLOCKED = {"blocked": [{"vm": "gpu1", "driver": "libvirt",
                        "blockers": [{"code": "host_device", "message": "uses a GPU"}, {"code": "pinned", "message": "is pinned"}]}]}
SKIPPED = {"skipped": [{"vm": "lab9", "driver": "qmp", "reason": "excluded"}]}


@pytest.mark.parametrize("locations", [{}, {"gpu1": "hv1"}])
def test_blocked_vm_counts_as_failed_and_names_its_blockers(locations):
    assert outcome(locations=locations, plan=BLOCKED) == ("blocked", "uses a GPU; is pinned", False, 1)


def test_skipped_vm_does_not_count_as_failed_but_the_host_is_not_empty():
    assert outcome(locations={"lab9": "hv1"}, plan=SKIPPED) == ("skipped", "excluded", False, 0)


@pytest.mark.parametrize("plan, vm, said", [(BLOCKED, "gpu1", "was blocked, but runs on hv3"), (SKIPPED, "lab9", "was to be skipped, but runs on hv3")])
def test_blocked_or_skipped_vm_that_is_elsewhere_has_moved(plan, vm, said):
    assert outcome(locations={vm: "hv3"}, plan=plan) == ("moved", said, True, 0)


def test_vm_on_the_host_that_nobody_planned_has_failed():
    assert outcome(locations={"new1": "hv1"}, plan={}) == ("failed", "is on hv1, but not in the plan", False, 1)


def test_vms_of_other_hosts_are_no_matter():
    assert report({}, [], {"other": "hv2", "off": None})["vms"] == []


def test_migration_that_an_earlier_run_started_is_seen_through():
    plan = {"blocked": [{"vm": "web1", "driver": "libvirt", "blockers": [{"code": "already_migrating", "message": "is migrating"}]}]}
    made = report(plan, [{**MOVED, "started": START - 5}], {"web1": "hv2"})
    assert (made["vms"][0]["result"], made["vms"][0]["started_s"], made["vms"][0]["to"]) == ("moved", -5.0, "hv2")


def test_last_attempt_counts():
    first = {**MOVED, "started": START + 1, "result": "failed", "downtime_ms": 5}
    assert report(migrations=[MOVED, first], locations={"web1": "hv1"})["vms"][0]["downtime_ms"] == 5
    assert report(migrations=[first, MOVED], locations={"web1": "hv1"})["vms"][0]["downtime_ms"] == 5


def test_empty_host():
    made = report({}, [], {})
    assert (made["vms"], made["empty"], made["failed"], made["deadline_s"]) == ([], True, 0, None)


def test_check_moves_nothing_and_fails_nothing():
    made = report({**PLAN, **BLOCKED, **SKIPPED}, check=True)
    assert [(vm["name"], vm["result"], vm["to"]) for vm in made["vms"]] == [("web1", "skipped", "hv2"), ("gpu1", "blocked", None), ("lab9", "skipped", None)]
    assert made["vms"][0]["reason"] == "check mode: would move to hv2"
    assert (made["check"], made["empty"], made["failed"]) == (True, False, 1)


# --- In and out ---

@pytest.mark.parametrize("change, message", [
    ({"plan": []}, "plan must be a dictionary, not []."),
    ({"plan": {"moves": "web1"}}, "plan.moves must be a list, not 'web1'."),
    ({"plan": {"moves": [{"to": "hv2"}]}}, "plan.moves[0] lacks 'vm'."),
    ({"plan": {"source": "hv9"}}, "The plan is for hv9, but the report is for hv1."),
    ({"plan": {"blocked": [{"vm": "a", "blockers": [{"code": "x"}]}]}}, "plan.blocked[0].blockers[0] lacks 'message'."),
    ({"plan": {"deadline_s": float("nan")}}, "plan.deadline_s must be a number or null, not nan."),
    ({"plan": {"other": float("inf")}}, None),
    ({"migrations": [{"vm": ""}]}, "migrations[0].vm must not be empty."),
    ({"migrations": [{"vm": "a", "result": "gone"}]}, "migrations[0].result must be one of moved, failed, aborted, null, not 'gone'."),
    ({"migrations": [{"vm": "a", "downtime_ms": -1}]}, "migrations[0].downtime_ms must not be less than 0, and is -1."),
    ({"migrations": [{"vm": "a", "downtime_ms": "12"}]}, "migrations[0].downtime_ms must be a number or null, not '12'."),
    ({"migrations": [{"vm": "a", "bytes": 1.5}]}, "migrations[0].bytes must be a whole number or null, not 1.5."),
    ({"migrations": [{"vm": "a", "samples": [[1, "precopy"]]}]}, "migrations[0].samples[0] has 2 items, which is not the number it must have."),
    ({"locations": {"web1": 3}}, "locations.web1 must be a string or null, not 3."),
    ({"locations": {7: "hv2"}}, "a name in locations must be a string, not 7."),
    ({"host": ""}, "host must not be empty."),
    ({"started": True}, "started must be a number, not True."),
    ({"started": START + 1}, f"The evacuation can't have finished ({START}) before it started ({START + 1})."),
    ({"started": 1e300, "finished": 1e300}, "1e+300 is not a moment in seconds since the epoch."),
    ({"clients": [{"name": "c", "requests": 1}]}, "clients[0] lacks 'failed'."),
])
def test_bad_input_is_named_in_a_sentence(change, message):
    given = {"plan": {}, "migrations": [], "locations": {}, "host": "hv1", "started": START, "finished": START, **change}
    with pytest.raises(ReportError) as caught:
        dump(build(**given))
    assert message is None or str(caught.value) == message


def test_build_leaves_its_input_alone():
    given = copy.deepcopy((PLAN, [MOVED], {"web1": "hv2"}))
    build(*given, "hv1", START, START + 1)
    assert given == (PLAN, [MOVED], {"web1": "hv2"})


def test_samples_are_thinned_evenly():
    samples = [[float(t), "precopy", 1.0, 1.0] for t in range(2000)]
    kept = report(migrations=[{**MOVED, "samples": samples}], locations={"web1": "hv2"})["vms"][0]["samples"]
    assert len(kept) == _report.MAX_SAMPLES
    assert (kept[0], kept[-1]) == (samples[0], samples[-1])
    assert {b[0] - a[0] for a, b in zip(kept[:-1], kept[1:], strict=True)} <= {3, 4}


def test_dump_is_json_with_a_sample_a_line():
    made = report(migrations=[MOVED], locations={"web1": "hv2"})
    text = dump(made)
    assert json.loads(text) == made
    assert '\n        [0.0, "precopy", 31.0, 256.0],\n' in text


def test_brief_leaves_out_the_samples():
    made = report(migrations=[MOVED], locations={"web1": "hv2"})
    assert brief(made)["vms"][0]["samples"] == []
    assert made["vms"][0]["samples"] == MOVED["samples"]
    VALIDATOR.validate(brief(made))


def test_schema_file_is_the_schema():
    """Write it anew with json.dumps(SCHEMA, indent=2) when this fails."""
    file = Path(__file__).parents[4] / "docs" / "report.schema.json"
    assert file.read_text() == json.dumps(SCHEMA, indent=2) + "\n"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


# --- Onto remote_ram ---

def test_of_those_to_be_onboarded_who_stays_has_failed_and_who_was_skipped_has_not():
    plan = {"source": None, "sources": ["hv1", "hv2"], "waves": [1, 1],
            "moves": [{"vm": "web1", "from": "hv1", "to": "hv2", "onboard": True}, {"vm": "web2", "from": "hv2", "to": "hv1", "onboard": True}],
            "skipped": [{"vm": "old", "from": "hv1", "reason": "its memory is there already"}]}
    made = report(plan, [MOVED], {"web1": "hv2", "web2": "hv2", "old": "hv1", "other": "hv1"}, host="hypervisors", direction="onboard")
    assert [(vm["name"], vm["result"], vm["from"], vm["to"], vm["onboarded"]) for vm in made["vms"]] == [
        ("web1", "moved", "hv1", "hv2", True), ("web2", "failed", "hv2", "hv1", False), ("old", "skipped", "hv1", None, False)]
    assert (made["failed"], made["empty"], made["freed_s"]) == (1, False, None)


def test_what_others_move_meanwhile_is_not_onboarded():
    plan = {"source": None, "sources": ["hv1", "hv3"], "waves": [1],
            "moves": [{"vm": "web2", "from": "hv1", "to": "hv2", "onboard": True}],
            "skipped": [{"vm": "web1", "from": "hv1", "reason": "it is libvirt's"}]}
    failed = {**MOVED, "vm": "gone", "result": "failed"}
    made = report(plan, [MOVED, failed], {"web1": "hv2", "web2": "hv3", "gone": "hv1"}, host="hypervisors", direction="onboard")
    assert [(vm["name"], vm["result"], vm["reason"], vm["onboarded"]) for vm in made["vms"]] == [
        ("web2", "failed", "is on hv3, where no migration of this run brought it: its memory is as it was", False),
        ("web1", "skipped", "it is libvirt's; it is on hv2 now", False)]


def test_all_onboarded_is_told_with_the_time_of_the_last():
    plan = {"source": "hv1", "sources": ["hv1"], "waves": [1], "moves": [{"vm": "web1", "from": "hv1", "to": "hv2", "onboard": True}]}
    made = report(plan, [MOVED], {"web1": "hv2", "stays": "hv1"}, direction="onboard")
    assert (made["failed"], made["empty"]) == (0, False)
    assert made["freed_s"] is not None
    assert made["freed_s"] == made["vms"][0]["finished_s"]


# --- The way back ---

# As the planner makes it when the VMs are on several hosts: no single source.
BACK = {"source": None, "sources": ["hv2", "hv3"],
        "moves": [{"vm": "web1", "from": "hv2", "to": "hv1"}, {"vm": "web2", "from": "hv3", "to": "hv1"}]}
RETURNED = {"vm": "web1", "from": "hv2", "to": "hv1", "result": "moved", "started": START + 1}


def test_back_on_the_host_has_moved_and_still_away_has_failed():
    made = report(BACK, [RETURNED, {**RETURNED, "vm": "web2", "from": "hv3", "result": "failed", "reason": "no route"}],
                  {"web1": "hv1", "web2": "hv3", "local": "hv1"}, direction="back")
    assert [(vm["name"], vm["result"], vm["reason"], vm["from"], vm["to"]) for vm in made["vms"]] == [
        ("web1", "moved", "", "hv2", "hv1"), ("web2", "failed", "its migration failed: no route", "hv3", "hv1"),
    ]
    assert (made["direction"], made["failed"], made["empty"]) == ("back", 1, False)


@pytest.mark.parametrize("place, reason", [
    ("hv3", "is on hv3, not back on hv1"),
    (None, f"{LOST}; its migration says that it moved to hv1"),
])
def test_anywhere_but_home_has_failed(place, reason):
    made = report({"moves": BACK["moves"][:1]}, [RETURNED], {"web1": place}, direction="back")
    assert (made["vms"][0]["result"], made["vms"][0]["reason"]) == ("failed", reason)


def test_table_has_a_line_for_each_vm_and_its_reason():
    lines = table(report(migrations=[MOVED], locations={"web1": "hv1"}, clients=[{"name": "c", "requests": 9, "failed": 1, "worst_ms": 12.4}])).splitlines()
    assert lines[1].split() == ["web1", "failed", "hv1", "hv2", "precopy", "120", "ms", "7.3", "s", "151", "MiB"]
    assert lines[2].strip() == "its migration says that it moved to hv2, but it is still on hv1"
    assert lines[3] == "client c: 9 requests, 1 failed, worst 12 ms"


def _broken():
    """Reports that are wrong, each in one way."""
    for path, value in (
            (("format",), 2), (("failed",), -1), (("failed",), None), (("empty",), "yes"), (("host",), ""), (("extra",), 1),
            (("elapsed_s",), "9"), (("vms",), {}),
            (("vms", 0, "result"), "gone"), (("vms", 0, "bytes"), 0.5), (("vms", 0, "to"), 4), (("vms", 0, "extra"), 1), (("vms", 0, "samples"), [[1, "x", 1]]),
            (("vms", 0, "samples"), [[1, 2, 3, 4]]), (("vms", 0, "samples"), [[1, "x", 3, 4]] * 601),
            (("plan", "moves"), [{}]), (("clients",), [{"name": "c"}])):
        made = build(PLAN, [MOVED], {"web1": "hv2"}, "hv1", START, START + 1)
        made = json.loads(dump(made))
        place = made
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        yield made
    made = build(PLAN, [MOVED], {"web1": "hv2"}, "hv1", START, START + 1)
    del made["empty"]
    yield made


@pytest.mark.parametrize("made", list(_broken()))
def test_validate_refuses_what_jsonschema_refuses(made):
    assert not VALIDATOR.is_valid(made)
    with pytest.raises(ReportError):
        validate(made, SCHEMA, "the report")


# --- The kernel engine ---

COUNTED = {"pages": 32768, "pages_ahead": 13239, "pages_zero": 1865, "pages_demand": 137, "pages_bubble": 10937, "pages_background": 3732,
           "faults_retry": 147, "wait_ns_max": 35522315, "wait_hist": [0] * 11 + [6, 29, 50, 44, 17, 1] + [0] * 15, "rounds": 1}  # fmt: skip


def test_what_the_kernel_counted_is_kept_and_nothing_else():
    made = report(migrations=[{**MOVED, "engine": "remote_ram", "remote_ram": COUNTED}], locations={"web1": "hv2"})
    assert made["vms"][0]["remote_ram"] == {key: value for key, value in COUNTED.items() if key != "rounds"}


def test_other_engines_have_no_such_field():
    assert "remote_ram" not in report(migrations=[MOVED], locations={"web1": "hv2"})["vms"][0]


# --- Planned and real ---


def test_times_of_the_plan_count_from_the_start_of_the_evacuation():
    plan = {**PLAN, "elapsed_s": 12.5, "moves": [{**MOVE, "estimated_start_s": 3, "estimated_s": 9.5}]}
    (vm,) = report(plan, [MOVED], {"web1": "hv2"})["vms"]
    assert (vm["planned_start_s"], vm["planned_finish_s"], vm["precopy_s"]) == (15.5, 25.0, 6.1)


def test_the_host_is_free_when_the_last_vm_has_its_last_page():
    plan = {"source": "hv1", "moves": [MOVE, {**MOVE, "vm": "web2"}]}
    late = {**MOVED, "vm": "web2", "finished": START + 9.25}
    assert report(plan, [MOVED, late], {"web1": "hv2", "web2": "hv2"})["freed_s"] == 9.25
    assert report(plan, [MOVED, late], {"web1": "hv2", "web2": "hv1"})["freed_s"] is None
    assert report(plan, [MOVED, {**late, "finished": None, "result": None}], {"web1": "hv2", "web2": "hv2"})["freed_s"] is None
    back = report(plan, [{**MOVED, "to": "hv1", "from": "hv2"}], {"web1": "hv1", "web2": "hv2"}, direction="back")
    assert back["failed"] == 1 and back["freed_s"] is None


def test_who_got_onto_remote_ram_is_told_only_of_those_that_moved():
    plan = {"source": "hv1", "moves": [{**MOVE, "onboard": True}]}
    assert report(plan, [MOVED], {"web1": "hv2"})["vms"][0]["onboarded"] is True
    assert report(plan, [{**MOVED, "result": "failed"}], {"web1": "hv1"})["vms"][0]["onboarded"] is False
    assert report(migrations=[MOVED], locations={"web1": "hv2"})["vms"][0]["onboarded"] is False
