# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sends every host of a lab a frame each second, on its migration network: python3 pulse.py RUN NAME...

An emulated host that idles was seen to miss its timer, and to sleep (for up to eight minutes) until something came from outside.
Ends when the lab's folder RUN is gone.
"""

from __future__ import annotations

import os
import socket
import sys
import time

#: To all, of an ethertype that is for local experiments (IEEE 802): an interrupt, and then dropped by the host's kernel.
FRAME = b"\xff" * 6 + bytes.fromhex("525400770300") + b"\x88\xb5" + bytes(46)


def main(run: str, names: list[str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as pulse:
        pulse.setblocking(False)
        while os.path.isdir(run):
            for name in names:
                try:
                    pulse.sendto(FRAME, f"{run}/mig-{name}")
                except OSError:
                    pass  # the host is not up, or has frames enough to wake up for
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
