# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs all checks, or the stages that are named: python3 tests/run.py [STAGE ...]

A line per stage, its full output in build/test/<stage>.log, and at last a line that counts: "N passed, N failed".
A stage that fails doesn't keep the others from running. Stages that need the lab run one after the other, as there is one
lab; beside them, and giving way to them, run those that need none.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import interrupts

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "test"
TAIL = 40  # lines of its log that a failed stage shows, from its end
FIRST = 60  # and lines from where its log first tells of a failure
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# How the tools of the stages tell of a failure: Ansible (a task that failed, an error), pytest, the linters' make.
FAILURE = re.compile(r"fatal: \[|\[ERROR\]|failed: \[|^E   |^=+ FAILURES =+$|^make.*: \*\*\* ")


# How far stages give way to those that use the lab, as a nice value: linters take what is left, tests that look at a clock need some.
SOME = 3
LEFT = 19


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    targets: tuple[str, ...]  # what make is told
    timeout: int  # seconds
    nice: int = 0  # other than 0 if it needs no lab

    @property
    def lab(self) -> bool:
        return self.nice == 0


# Suites of their own, beside these: the scenarios faults, remote_ram_faults, onboard, rdma_others and kmod, test-kmod-debug, test-kmod-kernels,
# soak, test-pyverbs, bench.
STAGES = (
    Stage("units", ("units",), 1800, SOME),
    Stage("report", ("report",), 1800, SOME),
    Stage("lint", ("lint",), 5400, LEFT),
    Stage("sanity", ("sanity",), 5400, LEFT),
    Stage("lab", ("lab",), 2400),
    # First of those that use it: it wants hosts that have nothing of ours, and leaves them so.
    Stage("rdma", ("molecule", "SCENARIO=rdma"), 5400),
    Stage("evacuate", ("molecule", "SCENARIO=evacuate"), 2400),
    Stage("abort", ("molecule", "SCENARIO=abort"), 2400),
    Stage("refuse", ("molecule", "SCENARIO=refuse"), 2400),
    Stage("remote_ram", ("molecule", "SCENARIO=remote_ram"), 2400),
    Stage("kmod", ("test-kmod",), 3600),
)


def end(process: subprocess.Popen) -> None:
    """Ends what is left of a stage's process group; what doesn't end within ten seconds is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up:
            process.poll()
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            number = 0  # told once; from here on it is only asked whether it is still there
            time.sleep(0.1)


class Runs:
    """The stages' processes that run now; once they were ended, no other one begins."""

    def __init__(self):
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.over = False

    def start(self, command: list[str], **how) -> subprocess.Popen | None:
        with self.lock:
            if self.over:
                return None
            process = subprocess.Popen(command, **how)
            self.processes.add(process)
            return process

    def done(self, process: subprocess.Popen) -> None:
        end(process)
        with self.lock:
            self.processes.discard(process)

    def end(self) -> None:
        with self.lock:
            self.over = True
            left = list(self.processes)
        for process in left:
            end(process)


def give_way(process: subprocess.Popen, nice: int) -> None:
    """Has the whole session of a stage give way. Linux shares the CPUs among sessions first (autogroups): a process is only nice within its own."""
    try:
        pathlib.Path(f"/proc/{process.pid}/autogroup").write_text(str(nice))
    except OSError:
        # A kernel without them, or one that is not ours to tell: nice alone does what it can. Or the stage is over already.
        return


def run(stage: Stage, runs: Runs) -> tuple[bool, str]:
    """Whether the stage passed, and why not."""
    with open(LOGS / f"{stage.name}.log", "w") as log:
        command = ["nice", "-n", str(stage.nice), os.environ.get("MAKE", "make"), "--no-print-directory", *stage.targets]
        # What this run of make was given, like ARGS, is for this script and not for the stages.
        given = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")}
        process = runs.start(command, cwd=ROOT, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        if process is None:
            return False, "not begun"
        if stage.nice:
            give_way(process, stage.nice)
        try:
            code = process.wait(stage.timeout)
            return code == 0, f"exit status {code}"
        except subprocess.TimeoutExpired:
            return False, f"not done after {stage.timeout} s"
        finally:
            # Also when the stage is over: nothing that it started in its group may outlive it.
            runs.done(process)


def main(names: list[str]) -> int:
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        sys.exit(f"unknown stage: {' '.join(sorted(unknown))} (known: {' '.join(stage.name for stage in STAGES)})")
    LOGS.mkdir(parents=True, exist_ok=True)
    had_lab = (ROOT / "build" / "lab" / "lab.json").exists()
    try:
        passed, failed = run_stages(names)
    finally:
        if not had_lab:
            # A lab that these checks started ends with them.
            subprocess.run([sys.executable, str(ROOT / "tests" / "lab" / "lab.py"), "down"], stdin=subprocess.DEVNULL, check=False)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def telling(lines: list[str]) -> list[str]:
    """The lines of a log that tell why its stage failed: around the first failure, and the last ones."""
    tail = max(0, len(lines) - TAIL)
    first = next((number for number, line in enumerate(lines) if FAILURE.search(line.lstrip("│ "))), len(lines))
    start = max(0, first - 5)
    if start >= tail:
        return lines[tail:]
    end = min(start + FIRST, tail)
    return lines[start:end] + (["[...]"] if end < tail else []) + lines[tail:]


def run_stages(names: list[str]) -> tuple[int, int]:
    """How many of these stages passed, and failed; all stages without names."""
    runs = Runs()
    chosen = [stage for stage in STAGES if not names or stage.name in names]
    with concurrent.futures.ThreadPoolExecutor() as lanes:
        try:
            # What needs no lab makes the environment and installs the tools, of which the others need some too: locks see to that.
            jobs = [lanes.submit(run_lane, [stage for stage in chosen if stage.lab == lab], runs) for lab in (False, True)]
            passed = sum(job.result() for job in jobs)
        finally:
            runs.end()
    return passed, len(chosen) - passed


def run_lane(stages: list[Stage], runs: Runs) -> int:
    """How many of these stages passed, one after the other."""
    passed = 0
    for stage in stages:
        if runs.over:
            break
        started = time.monotonic()
        fine, why = run(stage, runs)
        passed += fine
        took = f"{time.monotonic() - started:.0f} s"
        lines = [f"stage {stage.name} ... " + (f"ok {took}" if fine else f"FAILED {took} ({why})")]
        if not fine:
            log = LOGS / f"{stage.name}.log"
            lines += [f"    {line}" for line in telling(COLOURS.sub("", log.read_text(errors="replace")).splitlines())]
            lines.append(f"    (all of it: {log.relative_to(ROOT)})")
        print("\n".join(lines), flush=True)
    return passed


if __name__ == "__main__":
    interrupts.once(KeyboardInterrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
