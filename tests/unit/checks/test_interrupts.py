# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A program that is interrupted twice, as by make, still cleans up."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time

import pytest

TESTS = str(pathlib.Path(__file__).resolve().parents[2])
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
import interrupts
interrupts.once()
try:
    print("begun", flush=True)
    time.sleep(60)
finally:
    print("cleaning", flush=True)
    time.sleep(0.5)
    print("cleaned", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_does_not_interrupt_the_cleaning_up(number):
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, TESTS], stdout=subprocess.PIPE, text=True, preexec_fn=default)
    assert program.stdout.readline() == "begun\n"
    program.send_signal(number)
    assert program.stdout.readline() == "cleaning\n"
    program.send_signal(number)
    assert program.communicate(timeout=30)[0] == "cleaned\n"
    assert program.returncode == 128 + number


def default():
    """Whoever runs the tests may ignore them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_what_is_ignored_stays_ignored():
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, TESTS], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: (default(), signal.signal(signal.SIGHUP, signal.SIG_IGN)),
    )  # fmt: skip
    assert program.stdout.readline() == "begun\n"
    program.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert program.poll() is None
    program.terminate()
    assert program.communicate(timeout=30)[0] == "cleaning\ncleaned\n"
