# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives of modules that tests compile have to be made as the roles make modules: otherwise they aren't taken, and emulated hosts compile."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
import yaml

REPO = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("kmod_build_for_tests", REPO / "tests" / "kmod" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task(role, file):
    (found,) = [task for task in yaml.safe_load((REPO / "roles" / role / "tasks" / file).read_text()) if "hecaton.fleet.kmod_build" in task]
    return found["hecaton.fleet.kmod_build"]


def test_siw_is_made_as_the_role_makes_it(build):
    given = task("rdma", "siw.yml")
    assert given["make_args"] == build.SIW_ARGS and given["src_path"] == build.SIW and "exclude" not in given
    names = [text.split("'")[3] for text in given["patches"]]
    assert names == [path.name for path in build.SIW_PATCHES] and names


def test_remote_ram_is_made_as_the_role_makes_it(build):
    given = task("remote_ram", "present.yml")
    assert given["exclude"] == build.EXCLUDE and "make_args" not in given
