# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turns a guest's balloon and its virtio-mem up and down until its QEMU ends: ``resize.py NAME MEMORY_MIB PLUGGED_MIB RESULT``.

Runs on the guest's host, beside its move. What the guest made of it is in the file RESULT, replaced after each look: ``balloon_mib``
and ``plugged_mib`` (least and most that was seen), ``freed_mib`` (the most that its RAM file has shrunk by while the
balloon stood still: what the guest reported as free), ``turns``, ``refused`` (what QEMU would not do, and how often).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

BALLOON_MIB = 24  # taken from the guest and given back
TURN = 25.0  # seconds between two changes: longer than a guest takes to free memory, and to report it
LOOK = 0.5  # and between two looks


class Refused(Exception):
    """QEMU's own words."""


class Qemu:
    """The operator's monitor of a VM. :raises OSError: QEMU has ended."""

    def __init__(self, name: str):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"/run/hecaton/vm/{name}/qmp.sock")
        self.lines = self.socket.makefile()
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            line = self.lines.readline()
            if not line:
                raise OSError("QEMU has closed its monitor")
            answer = json.loads(line)
            if "error" in answer:
                raise Refused(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]


def look(qemu: Qemu, name: str) -> tuple:
    """MiB that the balloon leaves the guest, that virtio-mem has plugged in, and that the RAM file takes."""
    balloon = qemu.ask("query-balloon")["actual"]
    plugged = sum(device["data"]["size"] for device in qemu.ask("query-memory-devices"))
    return balloon / 2**20, plugged / 2**20, os.stat(f"/run/remote_ram/{name}.ram").st_blocks / 2048


def main(name: str, memory_mib: int, plugged_mib: int, result: str) -> None:
    found = {"balloon_mib": [], "plugged_mib": [], "freed_mib": 0.0, "turns": 0, "refused": {}}
    qemu = Qemu(name)
    while True:
        little = found["turns"] % 2 == 0
        for command, arguments in (
            ("balloon", {"value": (memory_mib - BALLOON_MIB * little) << 20}),
            ("qom-set", {"path": "/machine/peripheral/more0", "property": "requested-size", "value": 0 if little else plugged_mib << 20}),
        ):
            try:
                qemu.ask(command, **arguments)
            except Refused as err:
                found["refused"][str(err)] = found["refused"].get(str(err), 0) + 1
        found["turns"] += 1
        # The most that the RAM file has taken since the balloon has moved.
        before, most, until = None, 0.0, time.monotonic() + TURN
        while time.monotonic() < until:
            balloon, plugged, taken = look(qemu, name)
            for key, value in (("balloon_mib", balloon), ("plugged_mib", plugged)):
                found[key] = [min([value, *found[key]]), max([value, *found[key]])]
            most = max(most, taken) if before == balloon else taken
            found["freed_mib"] = max(found["freed_mib"], most - taken)
            before = balloon
            with open(f"{result}.new", "w") as out:
                json.dump(found, out)
            os.rename(f"{result}.new", result)
            time.sleep(LOOK)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except (OSError, ValueError):
        pass  # the VM has left
