# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read from the output of rdma-core's tests."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")

SAID = """test_create_ah (tests.test_addr.AHTest.test_create_ah)
Test ibv_create_ah. ... ok
test_dm_bad (tests.test_device.DMTest.test_dm_bad) ... skipped 'No DM support'
test_noisy (tests.test_mr.MRTest.test_noisy) ... something is printed
here
FAIL
test_old_style (tests.test_mr.MRTest) ... ERROR
"""


def test_every_result_is_read_however_it_is_printed():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("pyverbs_suite", TESTS / "rdma" / "pyverbs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    assert module.results(SAID) == {
        "test_addr.AHTest.test_create_ah": "ok",
        "test_device.DMTest.test_dm_bad": "skipped 'No DM support'",
        "test_mr.MRTest.test_noisy": "FAIL",
        "test_mr.MRTest.test_old_style": "ERROR",
    }
