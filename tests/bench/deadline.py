# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Empties a host of six VMs under deadlines of different length, and looks when the host was free of them.

How fast the lab is nobody knows: one evacuation without a deadline goes before, and tells the plan's bandwidth and what a
move takes besides its data, as an operator would measure them. The deadlines are shares of what that one took.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lab"), str(HERE)]

import interrupts
import playbook
import ready

import guests as lab_guests
import lab as lab_module
from image import LabError

OUT = ROOT / "build" / "bench"
SOURCE = "hv1"
BANDWIDTH, SETUP = 8, 10  # what the first plan is made with: MiB/s, s
CONCURRENCY = 2
FACTORS = (0.75, 1.0, 1.5)
LATE = 1.1  # of the deadline, at which the host has to be free
CALM = "dirty.tick=100 dirty.report=20 dirty.sweep=60"
# They write so much that a second pass over their memory sends half of it again: there is something to cut.
GUESTS = tuple(
    lab_guests.Guest(f"vm{number}", "qmp", memory_mib=memory, words=f"{words} {CALM}", remote_ram=True)
    for number, (memory, words) in enumerate((
        (128, "dirty.mib=32 dirty.rate=2 dirty.pattern=random"),
        (160, "dirty.mib=64 dirty.rate=3 dirty.pattern=hot dirty.hot_mib=8"),
        (256, "dirty.mib=128 dirty.rate=2 dirty.pattern=seq"),
        (192, "dirty.mib=96 dirty.rate=2 dirty.pattern=random"),
        (128, "dirty.mib=16 dirty.rate=-1"),
        (160, "dirty.mib=64 dirty.rate=2 dirty.pattern=random"),
    ), 1)
)  # fmt: skip


def calibrate(report: dict, bandwidth: float = BANDWIDTH, setup: float = SETUP) -> dict:
    """What the next plans have to be made with, so that this evacuation would have been planned as it went.

    :param bandwidth: what this one was planned with, like ``setup``.
    """
    vms = [vm for vm in report["vms"] if vm["result"] == "moved"]
    took = max(vm["finished_s"] for vm in vms) - min(vm["started_s"] for vm in vms)
    busy = sum(vm["finished_s"] - vm["started_s"] for vm in vms)
    slots = min(CONCURRENCY, len(vms))
    # Between the plan and the first migration the first VM of each slot is set up.
    real = report["freed_s"] - report["plan"]["elapsed_s"]
    found = max(1.0, (slots * real - busy) / len(vms))
    data, planned = real - found * len(vms) / slots, report["plan"]["estimated_s"] - setup * len(vms) / slots
    return {"bandwidth_mib_s": round(bandwidth * planned / data, 2), "setup_s": round(found, 1), "moving_s": round(took, 1)}


def deadlines(report: dict, factors) -> list:
    """Shares of the time from the plan to the last page; what comes before the plan can't be made shorter."""
    before = report["plan"]["elapsed_s"]
    return [round(before + factor * (report["freed_s"] - before)) for factor in factors]


def row(report: dict, checks: dict) -> dict:
    """One evacuation: what was planned, and what became of it."""
    deadline, plan = report["deadline_s"], report["plan"]
    free = report["freed_s"]
    return {
        "deadline_s": deadline, "feasible": plan["feasible"], "planned_s": round(plan["elapsed_s"] + plan["estimated_s"], 1), "freed_s": free,
        "of_deadline": None if deadline is None or free is None else round(free / deadline, 3),
        "in_time": None if deadline is None else free is not None and free <= LATE * deadline,
        "planned_before_s": plan["elapsed_s"], "precopy_planned_s": sum(vm["precopy_timeout_s"] for vm in report["vms"]),
        "precopy_s": round(sum(vm["precopy_s"] for vm in report["vms"]), 1),
        # Unknown of a VM whose QEMU ended in the switch.
        "downtime_max_ms": max((vm["downtime_ms"] for vm in report["vms"] if vm["downtime_ms"] is not None), default=None),
        "corrupt": sum(check["corrupt_total"] for check in checks.values()),
        "vms": [
            {key: vm[key] for key in ("name", "memory_mib", "dirty_rate_mib_s", "precopy_timeout_s", "precopy_s", "planned_start_s", "started_s",
                                      "planned_finish_s", "finished_s", "downtime_ms", "bytes")} for vm in report["vms"]
        ],
    }  # fmt: skip


def evacuate(lab, folder: pathlib.Path, **more) -> tuple:
    """An evacuation of fresh VMs. :returns: its report, and how the guests' memory is."""
    guests = lab_guests.Guests(lab)
    guests.deploy(GUESTS, SOURCE)
    try:
        status = playbook.run(lab, "hecaton.fleet.evacuate", folder, {
            "evacuate_host": SOURCE, "evacuate_engine": "remote_ram", "evacuate_report_dir": str(folder), "evacuate_concurrency": CONCURRENCY, **more,
        }, quiet=True)  # fmt: skip
        report = json.loads((folder / "report.json").read_text()) if not status else None
        if not report or not report["empty"]:
            raise LabError(f"the evacuation of {SOURCE} ended with status {status}; see {folder / 'playbook.log'}")
        return report, guests.full_check([guest.name for guest in GUESTS], timeout=600)
    finally:
        guests.destroy()


def run(lab, args) -> dict:
    folder = OUT / "deadline"
    report, checks = evacuate(lab, folder, evacuate_bandwidth=BANDWIDTH, evacuate_move_setup=SETUP)
    known = calibrate(report)
    found = {
        "machine": platform.machine(), "accelerator": lab.state["accelerator"], "transport": args.transport,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "memory_mib": sum(guest.memory_mib for guest in GUESTS), "without": row(report, checks), "calibrated": known, "factors": args.factors, "rows": [],
    }  # fmt: skip
    for factor, deadline in zip(args.factors, deadlines(report, args.factors), strict=True):
        made = evacuate(lab, folder, evacuate_bandwidth=known["bandwidth_mib_s"], evacuate_move_setup=known["setup_s"], evacuate_deadline=deadline)
        found["rows"].append({"factor": factor, **row(*made)})
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({key: value for key, value in found["rows"][-1].items() if key != "vms"}), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="deadlines, as shares of what it takes without one")
    parser.add_argument("--transport", choices=["siw", "rxe"], default="siw")
    parser.add_argument("--output", type=pathlib.Path, default=OUT / "deadline.json")
    args = parser.parse_args()
    interrupts.once()
    OUT.mkdir(parents=True, exist_ok=True)
    lab = lab_module.Lab(ROOT / "build" / "lab")
    try:
        ready.hypervisors(lab, OUT)
        ready.module(args.transport)
        found = run(lab, args)
    except LabError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    late = [each["deadline_s"] for each in found["rows"] if not each["in_time"]]
    print(f"bench: {len(found['rows']) - len(late)} of {len(found['rows'])} deadlines met, within 10 %; see {args.output}")
    return int(bool(late) or any(each["corrupt"] for each in (found["without"], *found["rows"])))


if __name__ == "__main__":
    sys.exit(main())
