# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import multiprocessing
import os
import stat

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.module_utils import _cordon
from ansible_collections.hecaton.fleet.plugins.modules import host_cordon


class Ended(Exception):
    """How a module ends here instead of by leaving the process."""

    def __init__(self, result):
        super().__init__(result.get("msg"))
        self.result = result


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the module on an own state folder, and returns its result; a failure has ``failed``."""
    warnings = []

    def end(failed):
        def ended(self, **result):
            raise Ended(dict(result, failed=failed, warnings=list(warnings)))

        return ended

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", end(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", end(True))
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda self, text: warnings.append(text))
    monkeypatch.setenv("SUDO_USER", "alice")

    def runner(**args):
        warnings.clear()
        with patch_module_args({"state_dir": str(folder), "host_name": "hv1", **args}), pytest.raises(Ended) as ended:
            host_cordon.main()
        return ended.value.result

    return runner


@pytest.fixture
def hook(tmp_path):
    """A site's command that writes down what it is told, and fails while there is a file ``broken``."""
    script = tmp_path / "hook"
    script.write_text(
        '#!/bin/sh\necho "$1 $HECATON_ACTION $HECATON_HOST $HECATON_REASON" >> "$0.log"\n'
        'test ! -e "$0.broken" || { echo "no route to the monitoring" >&2; exit 3; }\necho told\n'
    )
    script.chmod(0o755)
    return script


def told(hook):
    log = hook.with_suffix(".log")
    return log.read_text().splitlines() if log.exists() else []


def test_a_cordon_says_why_since_when_and_who(run, folder):
    result = run(reason="disk 3")
    assert result["changed"]
    assert result["cordon"] == {"reason": "disk 3", "since": result["cordon"]["since"], "by": "alice", "owner": None, "also": []}
    assert result["cordon"]["since"].endswith("Z")
    assert json.loads((folder / "cordon.json").read_text()) == result["cordon"] == _cordon.read(str(folder))
    assert stat.S_IMODE((folder / "cordon.json").stat().st_mode) == 0o644


def test_the_same_cordon_twice_changes_nothing(run, folder):
    first = run(reason="disk 3")
    written = (folder / "cordon.json").stat()
    again = run(reason="disk 3", by="bob")
    assert not again["changed"]
    assert again["cordon"] == first["cordon"]
    assert (folder / "cordon.json").stat().st_ino == written.st_ino


def test_another_reason_is_a_change_and_keeps_since(run, folder):
    run(reason="disk 3")
    _cordon.write(dict(_cordon.read(str(folder)), since="2026-01-01T00:00:00Z"), str(folder))
    result = run(reason="disk 4", by="bob")
    assert result["changed"]
    assert result["cordon"] == {"reason": "disk 4", "since": "2026-01-01T00:00:00Z", "by": "bob", "owner": None, "also": []}


def test_absent_removes_it_once(run, folder):
    run(reason="disk 3")
    assert run(state="absent")["changed"]
    assert _cordon.read(str(folder)) is None
    again = run(state="absent")
    assert not again["changed"]
    assert again["cordon"] is None


def test_check_mode_writes_nothing_and_says_what_it_would(run, folder, hook):
    result = run(reason="disk 3", hook=[str(hook)], _ansible_check_mode=True)
    assert result["changed"]
    assert result["cordon"]["reason"] == "disk 3"
    assert not folder.exists()
    run(reason="disk 3")
    assert run(state="absent", hook=[str(hook)], _ansible_check_mode=True)["changed"]
    assert _cordon.read(str(folder))["reason"] == "disk 3"
    assert told(hook) == []


def test_absent_on_a_host_never_cordoned_leaves_no_trace(run, folder):
    assert not run(state="absent")["changed"]
    assert not folder.exists()


def test_diff_shows_before_and_after(run):
    diff = run(reason="disk 3", _ansible_diff=True)["diff"]
    assert diff["before"] == {}
    assert diff["after"]["reason"] == "disk 3"
    diff = run(state="absent", _ansible_diff=True)["diff"]
    assert diff["before"]["reason"] == "disk 3"
    assert diff["after"] == {}


def test_a_second_evacuation_is_refused_and_told_by_whom(run, folder):
    first = run(reason="kernel update", owner="e1", exclusive=True)["cordon"]
    for check in (False, True):
        result = run(reason="firmware", owner="e2", exclusive=True, _ansible_check_mode=check)
        assert result["failed"]
        assert all(word in result["msg"] for word in ("e1", "alice", first["since"], "kernel update", "force=true"))
    assert _cordon.read(str(folder)) == first
    assert not run(reason="kernel update", owner="e1", exclusive=True)["changed"]


def test_no_sign_of_life_is_left_of_an_evacuation_that_gave_the_host_back(run, folder):
    run(reason="patches", owner="evac-1", exclusive=True, claim_lapses=20)
    run(reason="disk", by="bob")
    assert (folder / "claim").exists()
    run(state="absent", owner="evac-1")
    assert not (folder / "claim").exists()
    assert (folder / "cordon.json").exists()


def test_force_takes_over_from_an_evacuation_but_not_from_a_person(run):
    run(reason="disk 3")
    run(reason="kernel update", owner="e1", exclusive=True)
    cordon = run(reason="firmware", owner="e2", exclusive=True, force=True)["cordon"]
    assert (cordon["owner"], [each["reason"] for each in cordon["also"]]) == ("e2", ["disk 3"])


def test_an_evacuation_leaves_a_persons_cordon_as_it_was(run):
    mine = run(reason="disk 3")["cordon"]
    during = run(reason="kernel update", owner="e1", exclusive=True)
    assert not during["failed"]
    assert during["cordon"]["owner"] == "e1"
    after = run(state="absent", owner="e1")
    assert after["changed"]
    assert after["cordon"] == mine
    assert "disk 3" in after["warnings"][0]


def test_a_person_may_cordon_during_an_evacuation_and_it_stays(run):
    run(reason="kernel update", owner="e1", exclusive=True)
    run(reason="keep it empty")
    assert run(state="absent", owner="e1")["cordon"]["reason"] == "keep it empty"


def test_absent_for_another_owner_is_no_change_but_a_warning(run):
    run(reason="kernel update", owner="e1")
    result = run(state="absent", owner="e2")
    assert not result["changed"]
    assert result["cordon"]["owner"] == "e1"
    assert "kernel update" in result["warnings"][0]


def test_absent_without_an_owner_removes_all(run, folder):
    run(reason="disk 3")
    run(reason="kernel update", owner="e1")
    assert run(state="absent")["changed"]
    assert _cordon.read(str(folder)) is None


def test_an_empty_owner_is_not_all_owners(run, folder):
    run(reason="disk 3")
    assert run(state="absent", owner="")["failed"]
    assert _cordon.read(str(folder))["reason"] == "disk 3"


def test_the_hook_is_told_on_a_change_only(run, hook):
    result = run(reason="disk 3; reboot", hook=[str(hook), "two words"])
    assert result["hook"] == {"rc": 0, "stdout": "told\n", "stderr": ""}
    assert "hook" not in run(reason="disk 3; reboot", hook=[str(hook), "two words"])
    run(state="absent", hook=[str(hook), "two words"])
    run(state="absent", hook=[str(hook), "two words"])
    assert told(hook) == ["two words cordon hv1 disk 3; reboot", "two words uncordon hv1 disk 3; reboot"]


def test_the_hook_is_not_told_uncordon_while_the_host_stays_cordoned(run, hook):
    run(reason="disk 3")
    run(reason="kernel update", owner="e1")
    run(state="absent", owner="e1", hook=[str(hook), "x"])
    assert told(hook) == ["x cordon hv1 disk 3"]


def test_a_failed_hook_leaves_everything_as_it_was(run, hook, folder):
    broken = hook.with_suffix(".broken")
    broken.touch()
    result = run(reason="disk 3", hook=[str(hook), "x"])
    assert result["failed"]
    assert result["hook"] == {"rc": 3, "stdout": "", "stderr": "no route to the monitoring\n"}
    assert "no route to the monitoring" in result["msg"]
    assert _cordon.read(str(folder)) is None

    broken.unlink()
    cordon = run(reason="disk 3", hook=[str(hook), "x"])["cordon"]
    broken.touch()
    assert run(state="absent", hook=[str(hook), "x"])["failed"]
    assert _cordon.read(str(folder)) == cordon


def test_a_hook_that_is_missing_is_named(run, folder):
    result = run(reason="disk 3", hook=["/nonexistent/hook"])
    assert result["failed"]
    assert "/nonexistent/hook" in result["msg"]
    assert _cordon.read(str(folder)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"since": 1}', '{"reason": "x", "since": "y", "by": "z", "also": 4}'])
def test_a_file_in_doubt_counts_as_a_cordon_and_can_be_removed(run, folder, content):
    folder.mkdir()
    (folder / "cordon.json").write_text(content)
    cordon = _cordon.read(str(folder))
    assert "is not a cordon file" in cordon["reason"]
    assert run(reason="kernel update", owner="e1", exclusive=True)["cordon"]["also"][0]["reason"] == cordon["reason"]
    assert run(state="absent")["changed"]
    assert _cordon.read(str(folder)) is None


def test_a_file_written_by_hand_is_a_persons_cordon(folder):
    folder.mkdir()
    (folder / "cordon.json").write_text('{"reason": "x", "since": "2026-01-01T00:00:00Z", "by": "bob"}')
    assert _cordon.read(str(folder)) == {"reason": "x", "since": "2026-01-01T00:00:00Z", "by": "bob", "owner": None, "also": []}


def test_an_unusable_folder_is_named(run, folder):
    folder.write_text("a file")
    result = run(reason="disk 3")
    assert result["failed"]
    assert str(folder) in result["msg"]


def test_no_temporary_file_is_left(run, folder, monkeypatch):
    run(reason="disk 3")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    result = run(reason="disk 4")
    assert result["failed"]
    assert "No space left" in result["msg"]
    assert sorted(os.listdir(folder)) == ["cordon.json", "cordon.lock"]
    assert _cordon.read(str(folder))["reason"] == "disk 3"


def test_a_lock_held_for_too_long_is_an_error_that_says_so(folder):
    with _cordon.locked(str(folder)), pytest.raises(_cordon.CordonError, match="cordon.lock"), _cordon.locked(str(folder), timeout=0.2):
        pass


def _compete(folder, start, owner, results):
    start.wait()
    with _cordon.locked(folder):
        try:
            new = {"reason": "race", "since": _cordon.timestamp(0), "by": "x", "owner": owner}
            _cordon.write(_cordon.add(_cordon.read(folder), new, exclusive=True), folder)
            results.put(owner)
        except _cordon.CordonError:
            results.put(None)


def test_of_many_evacuations_at_once_one_wins(folder):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_compete, args=(str(folder), start, f"e{number}", results)) for number in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    winners = [owner for owner in (results.get(timeout=30) for each in workers) if owner]
    for worker in workers:
        worker.join()
    assert len(winners) == 1
    assert _cordon.read(str(folder))["owner"] == winners[0]
