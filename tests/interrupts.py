# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Interrupts a program once, so that it can clean up after itself."""

from __future__ import annotations

import signal

NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def once(kind: type[BaseException] = SystemExit) -> None:
    """Has the first of these signals raise an exception in the main thread, and those that follow do nothing.

    One more comes often: make passes on what it gets to programs that were told already. It would break off the cleaning up, or
    leave a lock taken that the cleaning up waits for. What is ignored when the program starts, as by nohup, stays so.

    :param kind: SystemExit or KeyboardInterrupt; it is given the exit status of a program that the signal ends.
    """

    def interrupt(number, _frame):
        for each in taken:
            signal.signal(each, lambda *_: None)
        raise kind(128 + number)

    taken = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, interrupt)
