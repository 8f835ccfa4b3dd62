# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a playbook on the lab with the collection as it is installed in build/collections, for the demo and the benchmarks."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import devenv

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(lab, name: str, folder: pathlib.Path, variables: dict | None = None, quiet: bool = False) -> int:
    """Its exit status.

    :param name: a playbook of the collection, or the path of one.
    :param folder: where it runs, and keeps the file with its variables.
    :param quiet: its output goes to playbook.log there, else it is shown as it comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "build" / "collections"), "PYTHONUNBUFFERED": "1"}
    command = [str(devenv.make() / "bin" / "ansible-playbook"), "-i", str(lab.inventory), name]
    if variables:
        given = folder / "variables.json"
        given.write_text(json.dumps(variables))
        command += ["-e", f"@{given}"]
    if not quiet:
        return subprocess.run(command, env=environment, cwd=folder, check=False).returncode
    with open(folder / "playbook.log", "w") as log:
        return subprocess.run(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
