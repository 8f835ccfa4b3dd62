# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the engines are compared on: the guests, their loads, and the sizes of both.

Of a guest's memory, its kernel and program need about 67 MiB (tests/guest/README.md); the load gets the rest.
"""

from __future__ import annotations

import dataclasses

import guests as lab_guests

MAX_DOWNTIME_MS = 300
#: What vm_migrate is told for each engine. A name may have a transport after a colon, for engines that have several.
ENGINES = {
    # A load that writes faster than the lab sends never ends it.
    "precopy": {"timeout": 150, "max_downtime": MAX_DOWNTIME_MS},
    "userfault": {"precopy_timeout": 5, "max_downtime": MAX_DOWNTIME_MS},
    "remote_ram:siw": {"precopy_timeout": 5, "max_downtime": MAX_DOWNTIME_MS},
    "remote_ram:rxe": {"precopy_timeout": 5, "max_downtime": MAX_DOWNTIME_MS},
}
DRIVERS = {"precopy": ("qmp", "libvirt"), "userfault": ("qmp", "libvirt"), "remote_ram": ("qmp",)}


def parts(engine: str) -> tuple:
    """The engine and the transport, None if it has none."""
    name, _colon, transport = engine.partition(":")
    return name, transport or None


@dataclasses.dataclass(frozen=True)
class Workload:
    """A guest and its load. ``working_set_mib`` is what the load uses again and again."""

    memory_mib: int
    working_set_mib: int
    words: str = ""
    kind: str = "tiny"
    runs: int = 5

    def guest(self, driver: str, remote_ram: bool) -> lab_guests.Guest:
        """The same guest for all engines, but for where its memory is."""
        return lab_guests.Guest(f"bench-{driver}", driver, kind=self.kind, memory_mib=self.memory_mib, words=self.words, remote_ram=remote_ram)


WORKLOADS = {
    # It reads all of its 32 MiB every 30 s, and writes nothing.
    "idle": Workload(128, 32, "dirty.mib=32 dirty.rate=-1 dirty.tick=50 dirty.report=1 dirty.sweep=30"),
    # Nine of ten writes go to 64 MiB, as fast as it can.
    "hot": Workload(192, 64, "dirty.mib=96 dirty.pattern=hot dirty.hot_mib=64 dirty.rate=0 dirty.report=1 dirty.sweep=30"),
    # 80 % of 352 MiB: a smaller guest has less than that left.
    "random": Workload(352, 282, "dirty.mib=282 dirty.pattern=random dirty.rate=8 dirty.tick=50 dirty.report=1 dirty.sweep=60"),
    # See database.py for the data set.
    "valkey": Workload(256, 132, kind="valkey", runs=2),
}

_CALM = "dirty.tick=100 dirty.report=20 dirty.sweep=60"
_SIX = {
    "six1": (128, "dirty.mib=32 dirty.rate=1 dirty.pattern=random"),
    "six2": (160, "dirty.mib=64 dirty.rate=2 dirty.pattern=hot dirty.hot_mib=8"),
    "six3": (256, "dirty.mib=128 dirty.rate=1 dirty.pattern=seq"),
    "six4": (256, "dirty.mib=128 dirty.rate=1 dirty.pattern=random"),
    "six5": (128, "dirty.mib=16 dirty.rate=-1"),
    "six6": (160, "dirty.mib=64 dirty.rate=1 dirty.pattern=random"),
}


def six(remote_ram: bool) -> list:
    """Six VMs that a whole host is emptied of. All of them write so little that stock pre-copy ends."""
    return [lab_guests.Guest(name, "qmp", memory_mib=memory, words=f"{words} {_CALM}", remote_ram=remote_ram) for name, (memory, words) in _SIX.items()]
