# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of the kernel module that compile in user space."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[3] / "kmod-src" / "tests"

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("gcc", "make"))), reason="gcc and make are not installed")


def make(*arguments):
    return subprocess.run(["make", "-s", "-C", str(TESTS), "CC=gcc", *arguments], capture_output=True, text=True, check=False)


def test_order(tmp_path):
    """Its own unit tests, with the address and undefined behaviour sanitizers."""
    done = make("check", f"BUILD={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all tests passed" in done.stdout


def test_the_order_spares_faults(tmp_path):
    """On every trace the order beats fetching from the first page to the last, and fetching on demand alone.

    The made database reads all over its pages: there is nothing around a fault, and no more to gain than nothing to lose.
    """
    done = make("sim", "SIM=--json", f"BUILD={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["traces"]
    shares = {}
    for result in results:
        shares.setdefault(result["trace"], {})[result["policy"]] = result["share"]
    assert len(shares) >= 8
    for trace, share in shares.items():
        bound = 1.01 if trace.startswith("made:database") else 1
        assert share["ours"] < share["push"] * bound and share["push"] < share["none"], (trace, share)
