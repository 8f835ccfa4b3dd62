# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import json

import pytest
import yaml
from ansible.module_utils import basic
from ansible_collections.hecaton.fleet.plugins.modules import evacuation_plan

try:
    from ansible.module_utils.testing import patch_module_args
except ImportError:  # ansible-core before 2.17.6

    @contextlib.contextmanager
    def patch_module_args(args):
        before = basic._ANSIBLE_ARGS
        basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": args}).encode()
        try:
            yield
        finally:
            basic._ANSIBLE_ARGS = before


def host(name, vms=()):
    return {
        "host": {
            "name": name,
            "memory_available_mib": 4096,
            "cpus": 4,
            "cpu": {"vendor": "AuthenticAMD", "arch": "x86_64", "features": ["aes"]},
            "machines": ["pc-q35-10.0"],
            "drivers": ["libvirt"],
            "cordoned": False,
        },
        "vms": list(vms),
    }


WEB1 = {
    "name": "web1",
    "driver": "libvirt",
    "state": "running",
    "memory_mib": 512,
    "machine": "pc-q35-10.0",
    "cpu": {"mode": "host-model", "features": []},
    "engines": {"precopy": {"usable": True, "blockers": []}, "userfault": {"usable": True, "blockers": []}},
    "blockers": [],
}
FLEET = [host("hv1", [WEB1]), host("hv2")]


def run(capsys, **args):
    """What the module prints: (failed, result)."""
    with patch_module_args(args), pytest.raises(SystemExit) as end:
        evacuation_plan.main()
    return bool(end.value.code), json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("check_mode", [False, True])
def test_it_returns_plan_and_table_and_changes_nothing(capsys, check_mode):
    failed, result = run(capsys, facts=FLEET, source="hv1", _ansible_check_mode=check_mode)
    assert not failed and result["changed"] is False
    assert [(move["vm"], move["to"]) for move in result["plan"]["moves"]] == [("web1", "hv2")]
    assert result["table"].startswith("Evacuation of hv1: 1 to move")


def test_a_blocked_vm_is_no_failure_of_the_module(capsys):
    failed, result = run(capsys, facts=FLEET, source="hv1", pinned={"web1": None})
    assert not failed and not result["plan"]["feasible"]


def test_return_needs_no_source(capsys):
    failed, result = run(capsys, facts=FLEET, vms=["web1"], destinations=["hv2"])
    assert not failed and result["plan"]["sources"] == ["hv1"]


@pytest.mark.parametrize(
    "args, words",
    [
        ({"source": "hv9"}, "unknown source host 'hv9'"),
        ({"source": "hv1", "destinations": []}, "no destination: the list of destinations is empty"),
        ({"source": "hv1", "memory_reserve_mib": -1}, "memory_reserve_mib must be 0 or more"),
        ({"source": "hv1", "per_source": -1}, "per_source must be 1 or more"),
        ({"source": "hv1", "deadline_s": -1}, "deadline_s must be above 0"),
        ({"source": "hv1", "bandwidth_mib_s": 0}, "bandwidth_mib_s must be above 0"),
        ({"source": "hv1", "engine": "warp"}, "value of engine must be one of"),
        ({}, "no source"),
    ],
)
def test_wrong_options_fail_with_a_sentence(capsys, args, words):
    failed, result = run(capsys, facts=FLEET, **args)
    assert failed and words in result["msg"]


@pytest.mark.parametrize(
    "facts, words",
    [
        ([{}], "entry 0 has no 'host'"),
        ([host("hv1", [{**WEB1, "memory_mib": "big"}]), host("hv2")], "'memory_mib' of VM web1 on host hv1"),
        ([host("hv1", [{**WEB1, "engines": None}]), host("hv2")], "VM web1 on host hv1 has no 'engines'"),
        ([host("hv1", [WEB1])], "no destination"),
        ([], "unknown source host 'hv1': the facts are of no host at all"),
    ],
)
def test_wrong_facts_fail_with_what_and_where_and_no_traceback(capsys, facts, words):
    failed, result = run(capsys, facts=facts, source="hv1")
    assert failed and words in result["msg"]
    assert "Traceback" not in json.dumps(result)


def test_the_documentation_and_the_argument_spec_agree():
    documented = yaml.safe_load(evacuation_plan.DOCUMENTATION)["options"]
    spec = evacuation_plan.argument_spec()
    assert sorted(documented) == sorted(spec)
    for name, option in spec.items():
        for key in ("type", "default", "choices", "elements", "required", "aliases"):
            assert documented[name].get(key) == option.get(key), f"{key} of {name}"


def test_the_plan_returned_is_the_plan_documented(capsys):
    documented = yaml.safe_load(evacuation_plan.RETURN)["plan"]["contains"]
    walked = run(capsys, facts=FLEET, walk=True)[1]["plan"]
    assert sorted(documented) == sorted(walked)
    _failed, result = run(capsys, facts=FLEET, source="hv1")
    assert sorted(set(documented) - {"waves"}) == sorted(result["plan"])
    assert sorted(set(documented["moves"]["contains"]) - {"wave"}) == sorted(result["plan"]["moves"][0])
    assert sorted(documented["hosts"]["contains"]) == sorted(result["plan"]["hosts"][0])
