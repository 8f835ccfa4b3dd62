# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures the kernel module on two hosts of the lab, side by side with the raw device and with its rival in user space.

Every row of build/bench/kmod.json is one measurement; what is compared was measured in turn, round by round. The hosts are
emulated, so only ratios mean anything. What each figure is, and its goal, stands in the file beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent / "kmod"), str(HERE.parent / "lab")]

import build
import hosts as tools
from image import LabError

OUT = ROOT / "build" / "bench" / "kmod.json"
MIB = 64  # of the file that is pulled or faulted on
THREADS = (1, 4, 16, 64)
COUNT = 1024  # pages touched in one run: 16 by each of 64 threads, so that how they begin does not count
#: How the threads that touch are scheduled: as any, and each in its turn. What differs between the two is the scheduler's part in a figure.
POLICIES = {"other": "", "rr": "chrt --rr 1 "}
BATCH = 32  # pages of one background READ, see RRAM_TUNE_BATCH_PAGES
BOUNDS = (1, 5, 20)  # seconds of pre-copy
SIZES = (1, 4, 16)  # GiB of files that are switched
DIRTY = (256, 4096)  # pages that are dirty then
CHUNK = 128 * 4096  # behind one key

GOALS = {
    "bulk_ratio": "background pull / ib_read_bw with the same message size: at least 0.8",
    "demand_ratio": "median touch of a missing page, one thread / median of ib_read_lat for 4 KiB: at most 1.5",
    "added_ratio": "what a fault adds to the median READ, ours / the rival's (userfaultfd and libibverbs): at most 0.5",
    "added_p99_ratio": "the same of the 99th percentiles",
    "cpu_s_per_gib": "CPU seconds of both hosts per GiB moved (emulated ones)",
    "source_cpu_s_per_gib": "the source's part of that",
    "destination_cpu_s_per_gib": "and the destination's",
    "memory_mib_per_gib": "what the module keeps for 1 GiB of guest RAM, in MiB: source and destination",
    "overrun_s": "time that pre-copy took beyond its bound: at most 0.2",
    "switch_us": "the switch, by size and number of dirty pages: grows with the pages, not with the size",
}


class Bench:
    """Both hosts with one transport, and the rows so far."""

    def __init__(self, lab, transport, rows, output):
        self.transport, self.rows, self.output = transport, rows, output
        self.hosts = [tools.Host(lab, name) for name in tools.NAMES]
        folder = build.built()
        tools.lab_module.each(lambda host: host.install(folder, transport), self.hosts)
        for host in self.hosts:
            # The size of files counts against the mount's limit, though these are sparse.
            host.sh("umount /run/remote_ram && mount -t remote_ram none /run/remote_ram")
        self.device = f"{transport}0"
        self.made = 0

    def add(self, figure: str, **values):
        row = {"figure": figure, "transport": self.transport, **values}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps({"goals": GOALS, "rows": self.rows, "medians": medians(self.rows)}, indent=1) + "\n")

    @contextlib.contextmanager
    def file(self, mib, pair=None, filled=True):
        """A file on both hosts, or two on one host, connected; gone afterwards."""
        source, dest = pair or self.hosts
        self.made += 1
        file = Both(source, dest, f"b{self.made}", mib)
        try:
            file.create()
            if filled:
                file.source.sh(f"{tools.PROGRAMS}/fault_load --fill {file.path}")
            file.connect()
            yield file
        finally:
            for side in (file.src, file.dst):
                for what in ("abort", "release", "close"):
                    with contextlib.suppress(OSError):
                        side(what)
            for host, path in ((file.source, file.path), (file.dest, file.dest_path)):
                host.sh(f"rm -f {path} /dev/shm/{file.name}")

    def end(self):
        wrong = []
        for host in self.hosts:
            wrong += [line for line in host.uninstall() if any(text in line for text in tools.ALARMS)]
        if wrong:
            raise LabError("a kernel complained:\n" + "\n".join(wrong))


class Both(tools.File):
    """A file whose two ends may be on one host, where they need two names."""

    def __init__(self, source, dest, name, mib):
        super().__init__((source, dest), f"{name}.ram", mib)
        self.dest_name = self.name if source is not dest else f"{name}-there.ram"
        self.dest_path = f"/run/remote_ram/{self.dest_name}"

    def create(self):
        self.source.do("create", name=self.name, size=self.size)
        self.dest.do("create", name=self.dest_name, size=self.size)

    def dst(self, do, **order):
        return self.dest.do(do, name=self.dest_name, **order)

    def await_keys(self):
        """Until the destination has the keys of all chunks, so that no fault has to ask for one."""
        chunks = -(-self.size // CHUNK)
        tools.wait_for(lambda: self.src("stats")["keys"] >= chunks)
        time.sleep(0.5)

    def switch_with_nothing_pulled(self):
        self.dst("tune", what=tools.BATCH_PAGES, value=BATCH)
        self.dst("tune", what=tools.BACKGROUND, value=0)
        self.src("switch")
        self.await_keys()


def cpu_seconds(host) -> float:
    """Time that a host's processor was busy since it started."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, host.sh("head -1 /proc/stat").split()[1:8])
    return (user + nice + system + irq + softirq) / 100


def perftest(tool: str, server, client, *arguments) -> list:
    """The row of figures that a perftest program prints, RDMA READ from the server to the client."""
    words = " ".join(("-R", "-F", *map(str, arguments)))
    for _attempt in range(5):
        # It ends with its client, also with one that fails; should there be none, it ends too.
        waiting = server.start("sh", script=f"timeout 60 {tool} {words} 2>&1", check=False)
        try:
            for _call in range(6):
                time.sleep(0.5)
                said = client.sh(f"timeout 60 {tool} {words} {server.address} 2>&1", check=False)
                rows = [line.split() for line in said.splitlines() if line.split()[:1] == [str(arguments[arguments.index("-s") + 1])]]
                if rows:
                    return [float(value) for value in rows[0]]
        finally:
            heard = waiting()
    raise LabError(f"{tool} gave no figures; its client: {said[-400:]}\nits server: {heard[-400:]}")


def bulk(bench, rounds):
    """The background pull of all pages, and ib_read_bw with messages of the same size, in turn."""
    for number in range(rounds):
        raw = perftest("ib_read_bw", *bench.hosts, "-s", BATCH * 4096, "-n", 256)
        with bench.file(MIB) as file:
            file.switch_with_nothing_pulled()
            before = [cpu_seconds(host) for host in bench.hosts]
            begun = time.monotonic()
            file.dst("tune", what=tools.BACKGROUND, value=1)
            file.complete()
            seconds = time.monotonic() - begun
            cpu = [(cpu_seconds(host) - was) * 1024 / MIB for host, was in zip(bench.hosts, before, strict=True)]
        bench.add(
            "bulk", round=number, mib_s=MIB / seconds, read_bw_mib_s=raw[3], bulk_ratio=MIB / seconds / raw[3],
            cpu_s_per_gib=sum(cpu), source_cpu_s_per_gib=cpu[0], destination_cpu_s_per_gib=cpu[1],
        )  # fmt: skip


def touches(host, policy: str, program: str, target: str) -> dict:
    """What a program prints that touches missing pages, by each number of threads."""
    return json.loads(host.sh(f"{POLICIES[policy]}{tools.PROGRAMS}/{program} --threads {','.join(map(str, THREADS))} --count {COUNT} {target}"))


def rivals(source, dest, policy: str) -> dict:
    """What the rival in user space prints: userfaultfd, and READs by libibverbs."""
    server = tools.Program(source, [f"{tools.PROGRAMS}/uffd_rdma", "--serve", source.address, "--mib", str(MIB)])
    try:
        if "listening" not in (server.hear() or {}):
            raise LabError(f"the rival did not start: {server.finish()}")
        return touches(dest, policy, "uffd_rdma", f"{source.address} --mib {MIB}")
    finally:
        server.kill()
        server.reap(20)


def ratio(mine: float, others: float) -> float | None:
    """None where the rival adds nothing that can be measured."""
    return mine / others if others > 0 else None


def demand(bench, rounds, pair, path):
    """Touches of missing pages: ours, the rival's, and the READ by itself, in turn."""
    source, dest = pair
    for number in range(rounds):
        raw = perftest("ib_read_lat", source, dest, "-s", 4096, "-n", 1000)
        read = {"median": raw[4], "p99": raw[7]}
        for policy in POLICIES:
            with bench.file(MIB, pair) as file:
                file.switch_with_nothing_pulled()
                ours = touches(dest, policy, "fault_load", file.dest_path)
                stats = file.dst("stats")
            rival = rivals(source, dest, policy)
            for mine, other in zip(ours["runs"], rival["runs"], strict=True):
                if mine["bad"] or other["bad"]:
                    raise LabError(f"a touch saw something else than was written: {mine} {other}")
                ours_us, rival_us = mine["touch_us"], other["touch_us"]
                bench.add(
                    "demand", path=path, policy=policy, round=number, threads=mine["threads"], read_lat_us=read, rival_read_us=rival["read_us"],
                    ours_us=ours_us, rival_us=rival_us, ours_cpu_s=mine["cpu_seconds"], rival_cpu_s=other["cpu_seconds"],
                    pages_demand=stats["pages_demand"],
                    demand_ratio=ours_us["median"] / read["median"],
                    added_ratio=ratio(ours_us["median"] - read["median"], rival_us["median"] - read["median"]),
                    added_p99_ratio=ratio(ours_us["p99"] - read["p99"], rival_us["p99"] - read["p99"]),
                )  # fmt: skip


def overrun(bench, rounds):
    """Pre-copy while two threads write: how long it takes beyond its bound."""
    for number in range(rounds):
        for bound in BOUNDS:
            with bench.file(16, filled=False) as file:
                file.fill()
                writer = file.run("w", threads=2)
                begun = time.monotonic()
                file.src("precopy", ms=bound * 1000)
                file.src("wait", states=[tools.CONNECTED], ms=(bound + 60) * 1000)
                took = time.monotonic() - begun
                stats = file.src("stats")
                writer.kill()
                writer.reap(30)
            bench.add("precopy", round=number, bound_s=bound, took_s=took, counted_s=stats["precopy_us"] / 1e6, overrun_s=took - bound, rounds=stats["rounds"])


WRITE = """
import os
file = os.open("{path}", os.O_RDWR)
pages = {size} // 4096
for number in range({dirty}):
    os.pwrite(file, b"x" * 8, number * (pages // {dirty}) * 4096)
"""


def switch(bench, rounds):
    """The switch of files of which all but some pages were copied ahead."""
    for number in range(rounds):
        for gib in SIZES:
            for dirty in DIRTY:
                with bench.file(gib * 1024, filled=False) as file:
                    file.src("precopy", ms=600000, stop=1)
                    if file.src("wait", states=[tools.CONNECTED], ms=600000)[0] != tools.CONNECTED:
                        raise LabError(f"{gib} GiB of holes were not named in ten minutes")
                    file.source.sh("python3 - <<'END'\n" + WRITE.format(path=file.path, size=file.size, dirty=dirty) + "END")
                    done = file.src("switch")
                    kept = [side("stats")["memory"] for side in (file.src, file.dst)]
                    file.complete()
                bench.add("switch", round=number, gib=gib, dirty_pages=done["dirty"], switch_us=done["us"])
                bench.add("memory", round=number, gib=gib, keys="of dirty pages alone", memory_mib_per_gib=[each / (1 << 20) / gib for each in kept])


def memory(bench):
    """What is kept when the keys of all chunks are out, which is the most."""
    with bench.file(512) as file:
        file.switch_with_nothing_pulled()
        kept = [side("stats")["memory"] for side in (file.src, file.dst)]
        bench.add("memory", gib=0.5, keys="of all chunks", memory_mib_per_gib=[each / (1 << 20) / 0.5 for each in kept])


def medians(rows: list) -> list:
    """The median of every ratio and figure that GOALS names, over the rounds of what is otherwise the same."""
    groups: dict = {}
    for row in rows:
        key = tuple((name, row[name]) for name in ("figure", "transport", "path", "policy", "threads", "bound_s", "gib", "dirty_pages", "keys") if name in row)
        groups.setdefault(key, []).append(row)
    found = []
    for key, alike in groups.items():
        values = {}
        for name in GOALS:
            there = [row[name] for row in alike if isinstance(row.get(name), (int, float))]
            if there:
                values[name] = statistics.median(there)
        found.append({**dict(key), "rounds": len(alike), **values})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transports", nargs="+", choices=["siw", "rxe"], default=["siw", "rxe"])
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison (default: 5)")
    parser.add_argument("--figures", nargs="+", choices=["bulk", "demand", "loopback", "precopy", "switch", "memory"], default=None)
    parser.add_argument("--output", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    chosen = arguments.figures or ["bulk", "demand", "loopback", "precopy", "switch", "memory"]
    rows: list = []
    try:
        lab = tools.lab_module.Lab(ROOT / "build" / "lab")
        tools.two_hosts(lab)
        for transport in arguments.transports:
            bench = Bench(lab, transport, rows, arguments.output)
            try:
                if "bulk" in chosen:
                    bulk(bench, arguments.rounds)
                if "demand" in chosen:
                    demand(bench, arguments.rounds, bench.hosts, "two hosts")
                if "loopback" in chosen:
                    demand(bench, arguments.rounds, [bench.hosts[0]] * 2, "one host")
                if "precopy" in chosen:
                    overrun(bench, min(3, arguments.rounds))
                if "switch" in chosen:
                    switch(bench, min(2, arguments.rounds))
                if "memory" in chosen:
                    memory(bench)
            finally:
                bench.end()
    except (LabError, tools.HostGone, AssertionError, OSError) as err:
        print(f"bench-kmod: {err}", file=sys.stderr)
        return 1
    for row in medians(rows):
        print(json.dumps(row))
    print(f"bench-kmod: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
