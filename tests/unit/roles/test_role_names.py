# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a role notes for itself has no name of its options: it would be taken for the option when the role runs once more."""

from __future__ import annotations

import pathlib

import pytest
import yaml

ROLES = sorted(path for path in (pathlib.Path(__file__).resolve().parents[3] / "roles").iterdir() if (path / "meta" / "argument_specs.yml").exists())


def noted(tasks: list) -> set:
    """The names that tasks register, or set as facts."""
    names: set = set()
    for task in tasks:
        names |= {task["register"]} if "register" in task else set()
        names |= set(task.get("ansible.builtin.set_fact", {}))
        for part in ("block", "rescue", "always"):
            names |= noted(task.get(part, []))
    return names


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_role_notes_nothing_under_the_name_of_an_option(role):
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    options = {name for spec in specs.values() for name in spec.get("options", {})}
    names = set().union(*(noted(yaml.safe_load(path.read_text()) or []) for path in (role / "tasks").glob("*.yml")))
    assert options and names & options == set()
