# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Times how long a host of six VMs takes to get empty: by the playbook evacuate, and by stock pre-copies in a loop, one by one."""

from __future__ import annotations

import json
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lab"), str(HERE)]

import playbook

import guests as lab_guests
import workloads
from image import LabError

SOURCE, TARGETS = "hv1", ("hv2", "hv3")
BANDWIDTH = 8  # MiB/s that a host of the lab sends, about: what the plan's times are made of


def run(lab, folder: pathlib.Path, transport: str | None) -> dict:
    """A row: six fresh VMs leave their host.

    :param transport: of the evacuation, whose module is there already; None for the loop.
    """
    guests = lab_guests.Guests(lab)
    chosen = workloads.six(bool(transport))
    guests.deploy(chosen, SOURCE)
    try:
        begun = time.monotonic()
        moves = evacuate(lab, folder) if transport else loop(lab, folder, chosen)
        took = time.monotonic() - begun
        names = [guest.name for guest in chosen]
        where = guests.where()
        left = [name for name in names if len(where.get(name, [])) != 1 or SOURCE in where[name]]
        if left:
            raise LabError(f"{', '.join(left)} did not leave {SOURCE}; see {folder / 'playbook.log'}")
        checks = guests.full_check(names, timeout=600)
    finally:
        guests.destroy()
    return {
        "how": "evacuate" if transport else "loop", "engine": moves[0]["engine"], "transport": transport, "vms": len(moves),
        "memory_mib": sum(guest.memory_mib for guest in chosen), "play_s": round(took, 1),
        "moving_s": round(max(each["finished"] for each in moves) - min(each["started"] for each in moves), 1),
        # Unknown of a VM whose QEMU ended in the switch.
        "downtime_max_ms": max((each["downtime_ms"] for each in moves if each["downtime_ms"] is not None), default=None),
        "corrupt": sum(check["corrupt_total"] for check in checks.values()),
    }  # fmt: skip


def evacuate(lab, folder: pathlib.Path) -> list:
    status = playbook.run(lab, "hecaton.fleet.evacuate", folder, {
        "evacuate_host": SOURCE, "evacuate_engine": "remote_ram", "evacuate_report_dir": str(folder), "evacuate_bandwidth": BANDWIDTH,
        "evacuate_max_downtime": workloads.MAX_DOWNTIME_MS,
    }, quiet=True)  # fmt: skip
    if status:
        raise LabError(f"the evacuation of {SOURCE} ended with status {status}; see {folder / 'playbook.log'}")
    vms = json.loads((folder / "report.json").read_text())["vms"]
    return [{"engine": vm["engine"], "downtime_ms": vm["downtime_ms"], "started": vm["started_s"], "finished": vm["finished_s"]} for vm in vms]


def loop(lab, folder: pathlib.Path, chosen: list) -> list:
    records = folder / "records.json"
    records.unlink(missing_ok=True)
    status = playbook.run(lab, str(HERE / "one_by_one.yml"), folder, {
        "bench_from": SOURCE, "bench_moves": [{"name": guest.name, "to": TARGETS[number % len(TARGETS)]} for number, guest in enumerate(chosen)],
        "bench_max_downtime": workloads.MAX_DOWNTIME_MS, "bench_records": str(records),
    }, quiet=True)  # fmt: skip
    if status:
        raise LabError(f"a migration of the loop did not end well; see {folder / 'playbook.log'}")
    return json.loads(records.read_text())
