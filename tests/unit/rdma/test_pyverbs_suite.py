# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read from the output of rdma-core's tests."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")

SAID = """test_create_ah (tests.test_addr.AHTest.test_create_ah)
Test ibv_create_ah. ... ok
test_dm_bad (tests.test_device.DMTest.test_dm_bad) ... skipped 'No DM support'
test_noisy (tests.test_mr.MRTest.test_noisy) ... something is printed
here
FAIL
test_old_style (tests.test_mr.MRTest) ... ERROR

======================================================================
ERROR: test_old_style (tests.test_mr.MRTest)
Test something.
----------------------------------------------------------------------
Traceback (most recent call last):
  File "/root/pyverbs/tests/test_mr.py", line 7, in test_old_style
    self.create()
pyverbs.pyverbs_error.PyverbsRDMAError: Failed to modify QP. Errno: 22, Invalid argument

======================================================================
FAIL: test_noisy (tests.test_mr.MRTest.test_noisy)
----------------------------------------------------------------------
Traceback (most recent call last):
  File "/root/pyverbs/tests/test_mr.py", line 9, in test_noisy
AssertionError: 1 != 2 : the first
is not the second

----------------------------------------------------------------------
"""
BROKEN = "ERROR: pyverbs.pyverbs_error.PyverbsRDMAError: Failed to modify QP. Errno: 22, Invalid argument"


@pytest.fixture(scope="module")
def suite():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("pyverbs_suite", TESTS / "rdma" / "pyverbs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_result_is_read_however_it_is_printed(suite):
    assert suite.results(SAID) == {
        "test_addr.AHTest.test_create_ah": "ok",
        "test_device.DMTest.test_dm_bad": "skipped 'No DM support'",
        "test_mr.MRTest.test_noisy": "FAIL: AssertionError: 1 != 2 : the first",
        "test_mr.MRTest.test_old_style": BROKEN,
    }


class Host:
    """A lab host whose files of tests end in different ways."""

    said = {
        "test_addr": (1, SAID + "Ran 4 tests in 1.0s\n"),
        "test_mr": (124, "test_hangs (tests.test_mr.MRTest.test_hangs) ... "),
        "test_pd": (0, "test_pd (tests.test_pd.PDTest.test_pd) ... ok\n\nRan 1 test in 0.1s\n"),
        "test_mr.MRTest.test_old_style": (1, SAID + "Ran 4 tests in 1.0s\n"),
    }

    def __init__(self, **other):
        self.ran = []
        self.said = {**self.said, **other}

    def ssh(self, host, command, **how):
        if "infiniband" in command:
            return subprocess.CompletedProcess(command, 0, "" if "gids" in command else "siw_mig0\n", "")
        name = command.split("-v tests.")[1].split()[0]
        self.ran.append(name)
        return subprocess.CompletedProcess(command, *self.said[name])


def test_a_file_that_hangs_does_not_take_the_others_with_it(suite, tmp_path, monkeypatch):
    known = {"test_odp": "stops the host", "test_mr.MRTest.test_noisy": "is noisy", "test_pd.PDTest.test_pd": "is slow"}
    (tmp_path / "pyverbs.json").write_text(json.dumps({"siw": known}))
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "OUT", tmp_path)
    monkeypatch.setattr(suite.playbook, "run", lambda *args: 0)
    monkeypatch.setattr(suite.ready, "archives", dict)
    host = Host()
    wrong = suite.run(host, "siw", ["test_addr", "test_mr", "test_odp", "test_pd"])
    assert host.ran == ["test_addr", *["test_mr.MRTest.test_old_style"] * 2, "test_mr", "test_pd"]
    assert "test_mr did not come to its end (status 124)" in wrong[0]
    assert wrong[1:] == [f"siw: test_mr.MRTest.test_old_style ended with {BROKEN}", "siw: test_pd.PDTest.test_pd passes; take it off the list"]
    assert len(json.loads((tmp_path / "pyverbs-siw.json").read_text())) == 5
    assert (tmp_path / "pyverbs-siw.md").read_text().splitlines()[2:] == [
        f"| 1 | fails | {BROKEN} | `test_mr.MRTest.test_old_style` |",
        "| 1 | fails | is noisy | `test_mr.MRTest.test_noisy` |",
        "| 1 | left out | stops the host | `test_odp` |",
        "| 1 | skipped | No DM support | `test_device.DMTest.test_dm_bad` |",
    ]


def test_what_passes_when_it_is_run_again_is_told(suite, tmp_path, monkeypatch):
    (tmp_path / "pyverbs.json").write_text(json.dumps({"siw": {"test_mr.MRTest.test_noisy": "is noisy"}}))
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "OUT", tmp_path)
    monkeypatch.setattr(suite.playbook, "run", lambda *args: 0)
    monkeypatch.setattr(suite.ready, "archives", dict)
    host = Host(**{"test_mr.MRTest.test_old_style": (0, "test_old_style (tests.test_mr.MRTest) ... ok\n\nRan 1 test in 0.1s\n")})
    assert suite.run(host, "siw", ["test_addr"]) == []
    assert host.ran == ["test_addr", "test_mr.MRTest.test_old_style"]
    assert json.loads((tmp_path / "pyverbs-siw.json").read_text())["test_mr.MRTest.test_old_style"] == "ok"
    assert f"| 1 | at first fails, then ok | {BROKEN} | `test_mr.MRTest.test_old_style` |" in (tmp_path / "pyverbs-siw.md").read_text()
