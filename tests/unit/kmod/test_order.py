# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of pages is one C file for the kernel and for user space: its own tests, under the sanitizers, in user space."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

TESTS = pathlib.Path(__file__).parents[3] / "kmod-src" / "tests"


def test_the_page_order(tmp_path):
    if not (shutil.which("gcc") and shutil.which("make")):
        pytest.skip("no gcc and make to compile the C tests with")
    done = subprocess.run(["make", "-s", "-C", str(TESTS), "check", f"BUILD={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all tests passed" in done.stdout
