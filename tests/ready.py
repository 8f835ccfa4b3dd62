# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the lab's hosts ready for what moves guests about on them for long: the benchmarks and the soak."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import playbook

import guests as lab_guests
from image import LabError

TESTS = pathlib.Path(__file__).resolve().parent


def hypervisors(lab, folder: pathlib.Path) -> None:
    """Starts the lab, makes its hosts hypervisors, and removes the guests that were left on them.

    :param folder: where the playbook's log goes.
    """
    lab.up()
    if playbook.run(lab, str(TESTS / "lab" / "prepare.yml"), folder, quiet=True):
        raise LabError(f"the hypervisors could not be prepared; see {folder / 'playbook.log'}")
    lab_guests.Guests(lab).destroy()


def archives() -> dict:
    """Variables for the play prepare, so that emulated hosts need not compile: siw and remote_ram, compiled here for their kernel.

    Where they don't fit, as after an update of the distribution's source, the hosts compile after all, and say why.
    """
    return json.loads(_kmod("build.py", "archives").splitlines()[-1])


def module(transport: str) -> None:
    """Puts the kernel module on the hosts, with an RDMA device of this transport."""
    _kmod("install.py", transport)


def _kmod(program: str, *arguments: str) -> str:
    """What a program of tests/kmod prints. It is one of its own: its modules have names that those of its callers have too."""
    command = [sys.executable, str(TESTS / "kmod" / program), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{program} in tests/kmod failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout
