# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the runner of all checks shows of a stage that failed."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("checks_run", TESTS / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    before = list(sys.path)
    sys.path.insert(0, str(TESTS))
    spec.loader.exec_module(module)
    sys.path[:] = before
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "failure",
    [
        "  │ fatal: [localhost]: FAILED! => {",
        "[ERROR]: Task failed: no room",
        "E   assert 1 == 2",
        "make[1]: *** [Makefile:62: molecule] Error 2",
    ],
)
def test_the_first_failure_is_shown_even_far_from_the_end(run, failure):
    lines = [f"before {number}" for number in range(500)] + [failure, "why"] + [f"after {number}" for number in range(500)]
    shown = run.telling(lines)
    assert failure in shown and "why" in shown
    assert shown[-1] == "after 499"
    assert len(shown) <= run.FIRST + run.TAIL + 1


def test_without_a_failure_the_end_is_shown(run):
    lines = [f"line {number}" for number in range(500)]
    assert run.telling(lines) == lines[-run.TAIL :]


def test_a_failure_at_the_end_is_shown_once(run):
    lines = [f"line {number}" for number in range(500)] + ["fatal: [hv1]: FAILED!"]
    assert run.telling(lines).count("fatal: [hv1]: FAILED!") == 1


def test_a_short_log_is_shown_whole(run):
    assert run.telling(["fatal: [hv1]: FAILED!", "end"]) == ["fatal: [hv1]: FAILED!", "end"]


def test_a_session_gives_way_as_a_whole(run):
    if not pathlib.Path("/proc/self/autogroup").exists():
        pytest.skip("this kernel has no autogroups")
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            run.give_way(process, 19)
            assert pathlib.Path(f"/proc/{process.pid}/autogroup").read_text().endswith(" nice 19\n")
        finally:
            process.kill()
