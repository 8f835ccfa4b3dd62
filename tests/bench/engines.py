# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compares the engines on the lab: they move the same VM under the same load in turn, A B A B, and each run is a row.

What is emulated is slow, and slower when the machine is busy: only ratios between engines of one such file mean anything.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import signal
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lab"), str(HERE.parent / "guest")]

import playbook

import guests as lab_guests
import lab as lab_module
import report as guest_report
from image import LabError

OUT = ROOT / "build" / "bench"
#: What vm_migrate is told for each engine. A name may have a transport after a colon, for engines that have several.
ENGINES = {
    "precopy": {"timeout": 240, "max_downtime": 300},
    "userfault": {"precopy_timeout": 5},
}
HOSTS = ("hv1", "hv2")
RECOVERED = 0.9  # of the guest's earlier rate
MEDIANS = ("downtime_ms", "total_ms", "degraded_ms", "stall_p50_us", "stall_p99_us", "stall_max_us", "bytes")
#: Reports of the guest that are waited for before a move, and after it: what "earlier" and "again" mean.
REPORTS = 8


def percentile(hist: list, part: float) -> int | None:
    """The upper edge in µs of the bucket in which so much of a histogram lies (bucket n ends at 2^n µs)."""
    total, seen = sum(hist), 0
    if not total:
        return None
    for bucket, count in enumerate(hist):
        seen += count
        if seen >= part * total:
            return 1 << bucket
    return None


def difference(after: list, before: list) -> list:
    return [count - (before[bucket] if bucket < len(before) else 0) for bucket, count in enumerate(after)]


def measure(before: list, after: list, downtime_ms: float) -> dict:
    """What the guest saw of a move.

    :param before: its reports up to the switch, oldest first; those from REPORTS before the move on.
    :param after: its reports from the switch on.
    """
    usual = statistics.median(each["rate_mib_s"] for each in before[:REPORTS])
    with_hist = [each for each in before[:REPORTS] if each["stall_hist"]], [each for each in after if each["stall_hist"]]
    hist = difference(with_hist[1][-1]["stall_hist"], with_hist[0][-1]["stall_hist"]) if all(with_hist) else []
    recovered = next((each for each in after if each["rate_mib_s"] >= RECOVERED * usual), None)
    moving = [*before[REPORTS:], *after]
    return {
        "rate_before_mib_s": usual,
        # The guest's clock stands still while it is paused.
        "degraded_ms": round(recovered["uptime_ms"] - before[-1]["uptime_ms"] + downtime_ms) if recovered else None,
        "stall_p50_us": percentile(hist, 0.5),
        "stall_p99_us": percentile(hist, 0.99),
        "stall_max_us": max((each["stall_max_us"] for each in moving), default=None),
    }


class Bench:
    def __init__(self, lab, guest):
        self.lab = lab
        self.guest = guest
        self.guests = lab_guests.Guests(lab)

    def reports(self, host: str) -> list:
        """What the guest told on a host, oldest first."""
        logs = self.guests._logs([self.guest.name], [host])
        found = guest_report.parse(logs.get(self.guest.name, b"")).reports
        return sorted(found, key=lambda each: each["seq"])

    def await_reports(self, host: str, since: int, count: int, settled=lambda found: True, timeout: float = 240) -> list:
        """Its reports after number ``since``, once there are so many, and ``settled`` is content or the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            found = [each for each in self.reports(host) if each["seq"] > since]
            if len(found) >= count and (settled(found) or time.monotonic() > deadline):
                return found
            if time.monotonic() > deadline + timeout:
                raise LabError(f"{self.guest.name} on {host} reports nothing any more")
            time.sleep(2)

    def move(self, engine: str, source: str, target: str) -> dict:
        name, _colon, transport = engine.partition(":")
        latest = self.reports(source)
        start = latest[-1]["seq"] if latest else 0
        first = self.await_reports(source, start, REPORTS)[0]["seq"]
        record_file = OUT / "record.json"
        record_file.unlink(missing_ok=True)
        status = playbook.run(self.lab, str(HERE / "move.yml"), OUT, {
            "bench_from": source, "bench_to": target, "bench_vm": self.guest.name, "bench_driver": self.guest.driver, "bench_engine": name,
            "bench_options": ENGINES[engine], "bench_record": str(record_file),
        }, quiet=True)  # fmt: skip
        if status or not record_file.exists():
            raise LabError(f"{self.guest.name} was not moved by {engine}; see {OUT / 'playbook.log'}")
        record = json.loads(record_file.read_text())
        before = [each for each in self.reports(source) if each["seq"] >= first]
        usual = statistics.median(each["rate_mib_s"] for each in before[:REPORTS])
        after = self.await_reports(target, before[-1]["seq"], REPORTS, lambda found: any(each["rate_mib_s"] >= RECOVERED * usual for each in found))
        check = self.guests.full_check([self.guest.name], timeout=300)[self.guest.name]
        return {
            "engine": name, "transport": transport or None, "driver": self.guest.driver, "workload": self.guest.words, "memory_mib": self.guest.memory_mib,
            "from": source, "to": target, "downtime_ms": record["downtime_ms"], "total_ms": record["total_ms"], "bytes": record["bytes"],
            **measure(before, after, record["downtime_ms"] or 0), "corrupt": check["corrupt_total"],
        }  # fmt: skip


def medians(rows: list) -> list:
    kinds = list(dict.fromkeys((row["engine"], row["transport"], row["driver"], row["workload"]) for row in rows))
    found = []
    for kind in kinds:
        same = [row for row in rows if (row["engine"], row["transport"], row["driver"], row["workload"]) == kind]
        values = {key: [row[key] for row in same if row[key] is not None] for key in MEDIANS}
        found.append({
            **dict(zip(("engine", "transport", "driver", "workload"), kind, strict=True)), "runs": len(same),
            **{key: statistics.median(each) if each else None for key, each in values.items()}, "corrupt": sum(row["corrupt"] for row in same),
        })  # fmt: skip
    return found


def write(rows: list, accelerator: str, output: pathlib.Path) -> None:
    result = {
        "rows": rows, "medians": medians(rows), "machine": platform.machine(), "accelerator": accelerator, "report_interval_s": 1,
        "notes": "degraded_ms is told by reports of the guest, one a second; stalls are upper edges of buckets of powers of two",
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2, help="runs of each engine with each driver (default: 2)")
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), default=sorted(ENGINES))
    parser.add_argument("--drivers", nargs="+", choices=["qmp", "libvirt"], default=["qmp", "libvirt"])
    parser.add_argument("--output", type=pathlib.Path, default=OUT / "engines.json")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    OUT.mkdir(parents=True, exist_ok=True)
    lab = lab_module.Lab(ROOT / "build" / "lab")
    rows = []
    try:
        lab.up()
        if playbook.run(lab, str(HERE.parent / "lab" / "prepare.yml"), OUT, quiet=True):
            raise LabError(f"the hypervisors could not be prepared; see {OUT / 'playbook.log'}")
        for guest in (each for each in lab_guests.SETS["bench"] if each.driver in args.drivers):
            bench = Bench(lab, guest)
            try:
                bench.guests.deploy([guest], HOSTS[0])
                place = list(HOSTS)
                for _number in range(args.runs):
                    for engine in args.engines:
                        rows.append(bench.move(engine, *place))
                        place.reverse()
                        write(rows, lab.state["accelerator"], args.output)
                        print(json.dumps({key: value for key, value in rows[-1].items() if key != "workload"}), flush=True)
            finally:
                bench.guests.destroy()
    except LabError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    print(json.dumps(medians(rows), indent=1))
    return int(any(row["corrupt"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
