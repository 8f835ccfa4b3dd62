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
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lab"), str(HERE)]

import interrupts
import playbook
import ready

import engines_page
import eviction
import figures
import guests as lab_guests
import lab as lab_module
import watch
import workloads
from image import LabError

OUT = ROOT / "build" / "bench"
HOSTS = ("hv1", "hv2")
NOTES = (
    "The hosts are emulated: only ratios between engines of one file mean anything.",
    "The guest of remote_ram has its memory in a file of that file system. QEMU's post-copy can't take such a file, since userfaultfd serves none but "
    "tmpfs and hugetlbfs; so precopy and userfault move the same guest with ordinary memory, started afresh when the engine before it needs the other kind.",
    "userfault has postcopy-preempt on. total_ms: of QEMU from its command migrate on, of remote_ram from the start of the unit that drives it on.",
    "downtime_ms: from QEMU's event STOP at the source to its event RESUME at the target, wrong by downtime_error_ms at most: the difference of the "
    "hosts' clocks is measured before and after each move, by the quickest of 20 questions. downtime_told_ms: what QEMU tells, which is not the same of all "
    "engines: of userfault it ends with the last byte that the source sends, and of the others with the target's answer that the guest runs.",
    "degraded_ms: from the pause until the guest has 90 % of its earlier rate, told once a second; null for a guest that writes nothing, "
    "or is not there 240 s later.",
    f"stall_p50_us, stall_p99_us: accesses of the guest after the switch that took {figures.FLOOR_US} µs or more, less those that did so in as much time "
    "before the move. Their histogram has buckets of powers of two. wait_p50_us, wait_p99_us: faults on missing pages, as the kernel module counted them.",
    "cpu_s: both hosts, from start to end of the migration, without what the guest computed; per GiB of the guest's memory.",
    "faults_per_working_set: pages that the guest had to wait for, of those that its load uses again and again (sizes.working_set_mib).",
    "eviction: play_s is the whole playbook, with preflight and plan in the case of evacuate; moving_s from the first start to the last end of a migration, "
    "downtime_max_ms as QEMU tells it.",
)  # fmt: skip


class Setting:
    """The lab as the next move needs it: the module with the right transport, and the guest with the right kind of memory on a host."""

    def __init__(self, lab, folder: pathlib.Path):
        self.lab, self.folder = lab, folder
        self.guests = lab_guests.Guests(lab)
        self.transport = self.guest = self.watch = None
        self.place = list(HOSTS)

    def install(self, transport: str | None) -> None:
        if transport and transport != self.transport:
            self.clear()  # the module can't be replaced while a guest's memory is there
            ready.module(transport)
            self.transport = transport

    def prepare(self, guest: lab_guests.Guest, transport: str | None) -> None:
        self.install(transport)
        if guest == self.guest:
            return
        self.clear()
        self.place = list(HOSTS)
        self.guests.deploy([guest], self.place[0])
        self.guest = guest
        self.watch = watch.Database(self.guests, guest, self.folder) if guest.kind == "valkey" else watch.Reports(self.guests, guest)

    def clear(self) -> None:
        if self.watch:
            self.watch.close()
        if self.guest:
            self.guests.destroy()
        self.guest = self.watch = None


def move(setting: Setting, engine: str, workload: str) -> dict:
    """Moves the guest to the other host. :returns: the row."""
    name, transport = workloads.parts(engine)
    guest, (source, target), load = setting.guest, setting.place, workloads.WORKLOADS[workload]
    record_file = setting.folder / "record.json"
    record_file.unlink(missing_ok=True)
    setting.watch.before(source)
    with watch.Pause(setting.lab, guest, HOSTS) as pause, watch.Processors(setting.lab, HOSTS) as processors:
        status = playbook.run(setting.lab, str(HERE / "move.yml"), setting.folder, {
            "bench_from": source, "bench_to": target, "bench_vm": guest.name, "bench_driver": guest.driver, "bench_engine": name,
            "bench_options": workloads.ENGINES[engine], "bench_record": str(record_file),
        }, quiet=True)  # fmt: skip
    if status or not record_file.exists():
        raise LabError(f"{guest.name} was not moved by {engine}; see {setting.folder / 'playbook.log'}")
    record = json.loads(record_file.read_text())
    row = {"engine": name, "transport": transport, "driver": guest.driver, "workload": workload, "from": source, "to": target,
           "result": record["result"], "reason": record["reason"]}  # fmt: skip
    if record["result"] == "moved":
        setting.place.reverse()
        cpu = processors.seconds(source, record)
        paused = pause.measured(source, target)
        # The same of all engines; the record has what QEMU told, and when the unit noticed that the guest had left.
        resumed = paused.pop("resumed")
        seen = {**record, "downtime_ms": paused["downtime_ms"]}
        if resumed is not None:
            seen["switched"] = resumed + processors.clocks[source]
        row |= {
            **paused, "downtime_told_ms": record["downtime_ms"], "total_ms": record["total_ms"], "bytes": record["bytes"],
            **setting.watch.after(target, seen, processors.clock(source)), **figures.kernel(record.get("remote_ram"), load.working_set_mib),
            "cpu_s": cpu, "cpu_s_per_gib": round(cpu * 1024 / guest.memory_mib, 2) if cpu is not None else None,
        }  # fmt: skip
        if name == "precopy":  # nothing is missing after its switch
            row |= {"stall_p50_us": None, "stall_p99_us": None}
    return row | setting.watch.check()


class Results:
    """What was found so far, on disk after each row."""

    def __init__(self, output: pathlib.Path, accelerator: str):
        self.output = output
        self.found = {
            "rows": [], "medians": [], "eviction": [], "goals": [], "machine": platform.machine(), "accelerator": accelerator, "report_interval_s": 1,
            "max_downtime_ms": workloads.MAX_DOWNTIME_MS, "notes": list(NOTES), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "sizes": {
                name: {"memory_mib": load.memory_mib, "working_set_mib": load.working_set_mib, "words": load.words}
                for name, load in workloads.WORKLOADS.items()
            },
            "options": workloads.ENGINES,
        }  # fmt: skip

    def add(self, part: str, row: dict) -> None:
        self.found[part].append(row)
        self.found["medians"] = figures.medians(self.found["rows"])
        self.found["goals"] = figures.verdicts(self.found["rows"], self.found["eviction"], workloads.MAX_DOWNTIME_MS)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.found, indent=1) + "\n")
        self.output.with_suffix(".html").write_text(engines_page.render(self.found, self.output.name))
        print(json.dumps({key: value for key, value in row.items() if key not in ("course", "latency_ms")}), flush=True)

    def wrong(self) -> bool:
        return any(row["corrupt"] or row.get("failed") for row in self.found["rows"] + self.found["eviction"])


def compare(setting: Setting, results: Results, args) -> None:
    for name in args.workloads:
        load = workloads.WORKLOADS[name]
        for driver in args.drivers:
            chosen = [engine for engine in args.engines if driver in workloads.DRIVERS[workloads.parts(engine)[0]]]
            for _number in range(args.runs or load.runs):
                for engine in chosen:
                    transport = workloads.parts(engine)[1]
                    setting.prepare(load.guest(driver, bool(transport)), transport)
                    results.add("rows", move(setting, engine, name))
            setting.clear()


def evict(setting: Setting, results: Results, args) -> None:
    transports = [transport for _name, transport in map(workloads.parts, args.engines) if transport]
    for _number in range(args.runs or 3):
        for transport in (None, *transports):
            setting.install(transport)
            results.add("eviction", eviction.run(setting.lab, setting.folder / "eviction", transport))


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, help="runs of each engine with each driver (default: 5; valkey 2, eviction 3)")
    parser.add_argument("--engines", nargs="+", choices=list(workloads.ENGINES), default=list(workloads.ENGINES))
    parser.add_argument("--workloads", nargs="+", choices=list(workloads.WORKLOADS), help="default: all; with some, no eviction")
    parser.add_argument("--drivers", nargs="+", choices=["qmp", "libvirt"], default=["qmp", "libvirt"], help="libvirt has no remote_ram")
    parser.add_argument("--figures", nargs="+", choices=["engines", "eviction"], help="default: both")
    parser.add_argument("--output", type=pathlib.Path, default=OUT / "engines.json", help="the page goes beside it")
    args = parser.parse_args(argv)
    args.figures = args.figures or (["engines"] if args.workloads else ["engines", "eviction"])
    args.workloads = args.workloads or list(workloads.WORKLOADS)
    return args


def main() -> int:
    args = arguments()
    interrupts.once()
    OUT.mkdir(parents=True, exist_ok=True)
    lab = lab_module.Lab(ROOT / "build" / "lab")
    try:
        ready.hypervisors(lab, OUT)
        results, setting = Results(args.output, lab.state["accelerator"]), Setting(lab, OUT)
        try:
            if "engines" in args.figures:
                compare(setting, results, args)
            if "eviction" in args.figures:
                evict(setting, results, args)
        finally:
            setting.clear()
    except LabError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    for each in results.found["goals"]:
        print(json.dumps(each))
    print(f"bench: {args.output}, {args.output.with_suffix('.html')}")
    return int(results.wrong())


if __name__ == "__main__":
    sys.exit(main())
