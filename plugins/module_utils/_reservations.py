# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Room that a hypervisor keeps for VMs which are on their way to it.

A reservation is a file under /run, so a reboot forgets it. It counts while it is fresh, and after that for as long as its
VM is really arriving; one whose control node died is worth nothing soon after.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time

from ansible_collections.hecaton.fleet.plugins.module_utils._migration import write_json

FOLDER = "/run/hecaton/reserved"
#: Seconds within which an announced VM has to begin to arrive.
FRESH = 180


@contextlib.contextmanager
def locked(folder: str = FOLDER, look_only: bool = False):
    """Two reservations are never decided on at once. Who only looks leaves nothing behind, not even the lock."""
    if look_only:
        yield
        return
    os.makedirs(folder, mode=0o755, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def live(arriving: set, folder: str = FOLDER, now: float | None = None, look_only: bool = False) -> dict:
    """Reservations that count, by VM; removes the others, unless ``look_only``. ``arriving``: names of VMs that are being received now."""
    now = time.time() if now is None else now
    found = {}
    if not os.path.isdir(folder):
        return found
    for entry in sorted(os.listdir(folder)):
        if not entry.endswith(".json"):
            continue
        path = os.path.join(folder, entry)
        try:
            with open(path) as handle:
                reservation = json.load(handle)
            counts = reservation["vm"] in arriving or 0 <= now - reservation["since"] < FRESH
        except (OSError, ValueError, KeyError):
            counts = False
        if counts:
            found[reservation["vm"]] = reservation
        elif not look_only:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return found


def reserve(vm: str, memory_mib: int, source: str, folder: str = FOLDER) -> None:
    write_json(os.path.join(folder, f"{vm}.json"), {"vm": vm, "memory_mib": memory_mib, "source": source, "since": time.time()})


def release(vm: str, folder: str = FOLDER) -> bool:
    """Whether there was one to release."""
    try:
        os.unlink(os.path.join(folder, f"{vm}.json"))
        return True
    except FileNotFoundError:
        return False


def shortage(memory_mib: int, reserve_mib: int, available_mib: int, outstanding_mib: int) -> int:
    """MiB that are missing for one more VM; 0 or less if it fits."""
    return memory_mib + reserve_mib - (available_mib - outstanding_mib)
