# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the lab's hosts ready for what moves guests about on them for long: the benchmarks and the soak."""

from __future__ import annotations

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


def module(transport: str) -> None:
    """Puts the kernel module on the hosts, with an RDMA device of this transport."""
    # A program of its own: its modules have names that those of its callers have too.
    command = [sys.executable, str(TESTS / "kmod" / "install.py"), transport]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"the module could not be put on the hosts: {(done.stderr or done.stdout).strip()[-600:]}")
