# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Empties a host of the lab and brings its VMs back, again and again, by the kernel engine: nothing may get lost, or pile up.

After each of the two legs of a round every guest checks every page of its memory. What the hosts have of memory, open files,
RAM files, sessions and RDMA objects is counted when no guest is left, before the first round and after the last; one round
that does not count goes before, so that what is made only once is there. All of it is in build/soak.json, which is written
after each leg. Ends with status 0 only if no page is corrupt, no VM is lost, no kernel complained, and nothing leaked.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "lab"), str(HERE / "kmod")]

import interrupts
import playbook
import ready

import guests as lab_guests
import hosts as kmod_hosts
import lab as lab_module
from image import LabError

OUT = ROOT / "build" / "soak"
SOURCE = "hv1"
BANDWIDTH = 8  # MiB/s that a host of the lab sends, about
# In turn: hardly any pre-copy, some, and as much as gains something. A plan that is too slow for its deadline goes on all the same.
DEADLINES = (10, 60, 120)
# What a host may have less, or more, at the end. Below that is what it does besides; a leak of each round is above it.
AVAILABLE_KIB, SLAB_KIB, OPEN_FILES = 16 * 1024, 4 * 1024, 64

# Run by a host's Python. MemAvailable counts what is on a tmpfs as used, such as a log in /run: that is added.
MEASURE = """
import glob, json, os, subprocess, time
def text(path):
    with open(path) as stream:
        return stream.read()
def said(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
time.sleep(5)
os.sync()
with open("/proc/sys/vm/drop_caches", "w") as stream:
    stream.write("3")
time.sleep(1)
memory = {line.split(":")[0]: int(line.split()[1]) for line in text("/proc/meminfo").splitlines()}
kept = sum(int(line) for line in said("df", "-k", "--output=used", "-t", "tmpfs").splitlines()[1:])
places = ("/run/remote_ram", "/run/hecaton", "/etc/hecaton", "/var/lib/hecaton")
print(json.dumps({
    "available_kib": memory["MemAvailable"] + kept,
    "slab_kib": memory["SUnreclaim"],
    "open_files": int(text("/proc/sys/fs/file-nr").split()[0]),
    "files": sorted(os.path.join(folder, name) for place in places for folder, _, names in os.walk(place) for name in names),
    "units": sorted(line.split()[0] for line in said("systemctl", "list-units", "--all", "--plain", "--no-legend", "hecaton-*").splitlines()),
    "sessions": len(os.listdir("/sys/kernel/debug/remote_ram/sessions")),
    "module_users": int(text("/sys/module/remote_ram/refcnt")),
    "rdma": said("rdma", "resource", "show").split("\\n"),
    "tainted": int(text("/proc/sys/kernel/tainted")),
}))
"""


def measure(lab) -> dict:
    """What each host has, when no guest is there."""
    found: dict = {}

    def ask(host):
        found[host] = json.loads(lab.ssh(host, "python3", "-", stdin=MEASURE).stdout)

    lab_module.each(ask, lab_module.HOSTS)
    return dict(sorted(found.items()))


def bounded(path: str, names: list) -> bool:
    """Whether a file is one of those of which a host has one for each VM, or for each port, however often VMs come and go: which there are
    depends on where the plan sends them."""
    per_vm = [f"/var/lib/hecaton/{folder}/{name}.json" for name in names for folder in ("incoming", "migrations")]
    per_vm += [f"/var/lib/hecaton/jobs/{name}.{side}.json" for name in names for side in ("incoming", "outgoing")]
    return path in per_vm or re.fullmatch(r"/run/hecaton/ports/\d+", path) is not None


def leaks(before: dict, after: dict, names: list) -> list:
    """What a host lacks, or has too much of, a sentence each.

    :param names: of the VMs that came and went.
    """
    found = []
    for host, then in before.items():
        now = after[host]
        less = then["available_kib"] - now["available_kib"]
        if less > AVAILABLE_KIB:
            found.append(f"{host} has {less} KiB less memory")
        if now["slab_kib"] - then["slab_kib"] > SLAB_KIB:
            found.append(f"the kernel of {host} keeps {now['slab_kib'] - then['slab_kib']} KiB more in slabs")
        if now["open_files"] - then["open_files"] > OPEN_FILES:
            found.append(f"{host} has {now['open_files'] - then['open_files']} more open files")
        for what, named in (("files", "files"), ("units", "units"), ("rdma", "RDMA objects")):
            more = sorted(each for each in set(now[what]) - set(then[what]) if what != "files" or not bounded(each, names))
            if more:
                found.append(f"{host} has other {named} than before: {', '.join(more[:5])}")
        for what, named in (("sessions", "sessions"), ("module_users", "users of the module")):
            if now[what] > then[what]:
                found.append(f"{host} has {now[what]} {named}, and had {then[what]}")
    return found


def alarms(log: str) -> list:
    """Lines of a kernel's log that say that something is wrong."""
    return [line for line in log.splitlines() if any(sign in line for sign in kmod_hosts.ALARMS)]


def tainted(before: dict, after: dict) -> list:
    """Kernels that have complained, also where the log has lost it."""
    added = {host: after[host]["tainted"] & ~before[host]["tainted"] for host in before}
    return [f"the kernel of {host} is damaged: /proc/sys/kernel/tainted has {bits:#x} more" for host, bits in added.items() if bits & lab_module.DAMAGED]


def misplaced(where: dict, names: list, away: bool) -> list:
    """VMs that are not on exactly one host, or on the wrong one."""
    found = []
    for name in names:
        hosts = where.get(name, [])
        if len(hosts) != 1 or (hosts == [SOURCE]) == away:
            found.append(f"{name} runs on {' and '.join(hosts) or 'no host'}")
    return found


class Soak:
    """The rounds, and what is known so far, which is on disk after each leg."""

    def __init__(self, lab, output: pathlib.Path, count: int):
        self.lab, self.output, self.guests = lab, output, lab_guests.Guests(lab)
        self.chosen = lab_guests.SETS["soak"]
        self.names = [guest.name for guest in self.chosen]
        self.found = {
            "count": count, "rounds": 0, "passed": False, "corrupt": 0, "lost": [], "warnings": [], "leaks": [], "before": None, "after": None,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "took_s": 0, "rows": [],
        }  # fmt: skip
        self.begun = time.monotonic()

    def save(self, **changes) -> None:
        self.found.update(changes, took_s=round(time.monotonic() - self.begun))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.found, indent=1) + "\n")

    def listen(self, number: int, leg: str) -> None:
        """Notes what the kernels had to say since the last time."""
        logs: dict = {}

        def ask(host):
            logs[host] = self.lab.ssh(host, "dmesg --read-clear").stdout

        lab_module.each(ask, lab_module.HOSTS)
        self.found["warnings"] += [{"round": number, "leg": leg, "host": host, "line": line} for host, log in sorted(logs.items()) for line in alarms(log)]

    def leg(self, number: int, leg: str) -> None:
        """:raises LabError: not all VMs are where they should be."""
        away = leg == "there"
        variables = {
            "evacuate_host": SOURCE, "evacuate_engine": "remote_ram", "evacuate_report_dir": str(OUT), "evacuate_bandwidth": BANDWIDTH,
            "evacuate_deadline": DEADLINES[number % len(DEADLINES)], "evacuate_poll_interval": 5,
        }  # fmt: skip
        begun = time.monotonic()
        status = playbook.run(self.lab, f"hecaton.fleet.{'evacuate' if away else 'return'}", OUT, variables, quiet=True)
        took = round(time.monotonic() - begun, 1)
        self.listen(number, leg)
        lost = misplaced(self.guests.where(), self.names, away)
        self.found["lost"] += lost
        self.save()
        if status or lost:
            raise LabError(f"round {number}, {leg}: the playbook ended with {status}; {'; '.join(lost) or 'no VM is lost'}; see {OUT / 'playbook.log'}")
        checks = self.guests.full_check(self.names, timeout=600)
        self.found["corrupt"] += sum(check["corrupt_total"] for check in checks.values())
        report = json.loads((OUT / ("" if away else "return") / "report.json").read_text())
        row = {"round": number, "leg": leg, "took_s": took, "pages_checked": sum(check["pages"] for check in checks.values()),
               "corrupt": sum(check["corrupt_total"] for check in checks.values())}  # fmt: skip
        for vm in report["vms"]:
            counted = vm.get("remote_ram") or {}
            row[vm["name"]] = {"to": vm["to"], "downtime_ms": vm["downtime_ms"], "total_ms": vm["total_ms"], "engine": vm["engine"], **{
                key: counted.get(key) for key in ("pages_ahead", "pages_zero", "pages_demand", "pages_bubble", "pages_background", "late_writes", "reconnects")
            }}  # fmt: skip
        self.found["rows"].append(row)
        self.save()
        print(json.dumps(row), flush=True)

    def rounds(self, numbers) -> None:
        self.guests.deploy(self.chosen, SOURCE)
        for number in numbers:
            self.leg(number, "there")
            self.leg(number, "back")
            self.save(rounds=number)
        self.guests.destroy()

    def run(self) -> None:
        lab_module.each(lambda host: self.lab.ssh(host, "dmesg --clear"), lab_module.HOSTS)
        self.rounds([0])
        self.save(before=measure(self.lab))
        self.rounds(range(1, self.found["count"] + 1))
        after = measure(self.lab)
        self.listen(self.found["count"], "end")
        self.found["warnings"] += [{"round": None, "leg": "end", "host": None, "line": line} for line in tainted(self.found["before"], after)]
        self.save(after=after, leaks=leaks(self.found["before"], after, self.names))

    def verdict(self) -> list:
        found = self.found
        wrong = [f"{found['corrupt']} corrupt pages"] if found["corrupt"] else []
        wrong += found["lost"] + [f"{each['host']}, round {each['round']}: {each['line']}" for each in found["warnings"]] + found["leaks"]
        return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="rounds, there and back (default: 100)")
    parser.add_argument("--transport", choices=["siw", "rxe"], default="siw")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "soak.json")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    interrupts.once()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    lab = lab_module.Lab(ROOT / "build" / "lab")
    try:
        ready.hypervisors(lab, OUT)
        ready.module(args.transport)
        soak = Soak(lab, args.output, args.count)
        soak.run()
        wrong = soak.verdict()
        soak.save(passed=not wrong)
    except LabError as err:
        # The guests stay where they are, to be looked at.
        print(f"soak: {err}", file=sys.stderr)
        return 1
    for sentence in wrong:
        print(f"soak: {sentence}", file=sys.stderr)
    print(f"soak: {args.count} rounds there and back in {soak.found['took_s']} s, {'failed' if wrong else 'nothing lost, nothing left'}; see {args.output}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
