# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs of tests/ import each other by name, from folders that stand on one path."""

from __future__ import annotations

import collections
import pathlib

TESTS = pathlib.Path(__file__).resolve().parents[2]
LEFT_OUT = {TESTS / "unit", TESTS / "output"}  # pytest finds the first by path; the second is what ansible-test leaves


def test_no_two_programs_have_one_name():
    names = collections.defaultdict(list)
    for path in TESTS.rglob("*.py"):
        if not LEFT_OUT & set(path.parents) and path.stem not in ("conftest", "__init__"):
            names[path.stem].append(str(path.relative_to(TESTS)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}
