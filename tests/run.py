# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs all checks, or the stages that are named: python3 tests/run.py [STAGE ...]

A line per stage, its full output in build/test/<stage>.log, and at last a line that counts: "N passed, N failed".
A stage that fails doesn't keep the others from running.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "test"
TAIL = 40  # lines of its log that a failed stage shows, from its end
FIRST = 60  # and lines from where its log first tells of a failure
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# How the tools of the stages tell of a failure: Ansible (a task that failed, an error), pytest, the linters' make.
FAILURE = re.compile(r"fatal: \[|\[ERROR\]|failed: \[|^E   |^=+ FAILURES =+$|^make.*: \*\*\* ")


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    targets: tuple[str, ...]  # what make is told
    timeout: int  # seconds


# Long suites of their own, beside these: the scenarios faults, remote_ram_faults and rdma, test-kmod-debug, soak, test-pyverbs, bench.
STAGES = (
    Stage("lint", ("lint",), 900),
    Stage("sanity", ("sanity",), 1800),
    Stage("units", ("units",), 600),
    Stage("report", ("report",), 600),
    Stage("lab", ("lab",), 2400),
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


def run(stage: Stage) -> tuple[bool, str]:
    """Whether the stage passed, and why not."""
    with open(LOGS / f"{stage.name}.log", "w") as log:
        command = [os.environ.get("MAKE", "make"), "--no-print-directory", *stage.targets]
        # What this run of make was given, like ARGS, is for this script and not for the stages.
        given = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")}
        process = subprocess.Popen(
            command, cwd=ROOT, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(stage.timeout)
            return code == 0, f"exit status {code}"
        except subprocess.TimeoutExpired:
            return False, f"not done after {stage.timeout} s"
        finally:
            # Also when the stage is over: nothing that it started in its group may outlive it.
            end(process)


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
    passed = failed = 0
    for stage in STAGES:
        if names and stage.name not in names:
            continue
        print(f"stage {stage.name} ... ", end="", flush=True)
        started = time.monotonic()
        fine, why = run(stage)
        took = f"{time.monotonic() - started:.0f} s"
        if fine:
            passed += 1
            print(f"ok {took}", flush=True)
            continue
        failed += 1
        print(f"FAILED {took} ({why})", flush=True)
        log = LOGS / f"{stage.name}.log"
        for line in telling(COLOURS.sub("", log.read_text(errors="replace")).splitlines()):
            print(f"    {line}")
        print(f"    (all of it: {log.relative_to(ROOT)})", flush=True)
    return passed, failed


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
