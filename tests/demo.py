# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows the main job on the lab: six VMs leave hv1 while a client outside keeps using one of them.

Ends with status 0 only if all six run elsewhere, no page of a guest is corrupt, and the client lost no request. The
report is build/demo/report.html. The lab stays up; make lab-down ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "lab")]

import playbook

import guests as lab_guests
import lab as lab_module
from image import LabError

OUT = ROOT / "build" / "demo"
SOURCE = "hv1"
# MiB/s that a host of the lab sends, about, while guests run on it: what the plan's times are made of.
BANDWIDTH = 8
CLIENT_FIELDS = ("name", "requests", "failed", "worst_ms", "p50_ms", "p99_ms")


def say(text: str) -> None:
    print(f"\ndemo: {text}", flush=True)


@contextlib.contextmanager
def client(lab):
    """A client of the database outside the lab, for as long as the block runs; its result is in client.json."""
    result = OUT / "client.json"
    result.unlink(missing_ok=True)
    process = subprocess.Popen([
        sys.executable, str(HERE / "guest" / "client.py"), "--host", "127.0.0.1", "--port", str(lab.forward("valkey")), "--name", "db1 (valkey)",
        "--result", str(result), "--pid-file", str(OUT / "client.pid"), "--connections", "2", "--rate", "20", "--keys", "200", "--wait", "300",
        # A guest of an emulated host may stand still for long when the machine is busy: late is late, not lost. The report has the worst.
        "--timeout", "300", "--grace", "60",
    ])  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (result.exists() and json.loads(result.read_text())["requests"]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError("the client outside got no answer from the database")
            time.sleep(0.5)
        yield result
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def verdict(guests, chosen, status: int, seen: dict) -> list:
    """What is wrong, a sentence each; nothing if all went well."""
    wrong = [f"the evacuation ended with status {status}"] if status else []
    where = guests.where()
    for guest in chosen:
        hosts = where.get(guest.name, [])
        if len(hosts) != 1 or hosts == [SOURCE]:
            wrong.append(f"{guest.name} runs on {' and '.join(hosts) or 'no host'}")
    tiny = [guest.name for guest in chosen if guest.kind == "tiny" and len(where.get(guest.name, [])) == 1]
    for name, check in guests.full_check(tiny, timeout=180).items():
        print(f"  {name}: {check['pages']} pages checked, {check['corrupt_total']} corrupt")
        if check["corrupt_total"]:
            wrong.append(f"{name} has {check['corrupt_total']} corrupt pages")
    print(f"  {seen['name']}: {seen['requests']} requests, {seen['failed']} failed, worst {seen['worst_ms']:.0f} ms")
    if seen["failed"]:
        wrong.append(f"the client lost {seen['failed']} requests: {'; '.join(seen['messages'][:3])}")
    report = json.loads((OUT / "report.json").read_text())
    moved = [vm for vm in report["vms"] if vm["result"] == "moved"]
    if len(moved) != len(chosen) or report["failed"]:
        wrong.append(f"the report says {len(moved)} moved, {report['failed']} failed")
    for vm in report["vms"]:
        print(f"  {vm['name']}: {vm['result']} {vm['from']} -> {vm['to']}, {vm['engine']}, downtime {vm['downtime_ms']} ms, total {vm['total_ms']} ms")
    return wrong


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    signal.signal(signal.SIGTERM, lambda *_signal: sys.exit(143))
    begun = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    lab = lab_module.Lab(ROOT / "build" / "lab")
    chosen = lab_guests.SETS["demo"]
    guests = lab_guests.Guests(lab)
    try:
        say("the lab: three hypervisors")
        lab.up()
        say("preparing them")
        if playbook.run(lab, str(HERE / "lab" / "prepare.yml"), OUT):
            raise LabError("the hypervisors could not be prepared")
        say(f"{len(chosen)} VMs on {SOURCE}: {', '.join(guest.name for guest in chosen)}")
        guests.deploy(chosen, SOURCE)
        with client(lab) as result:
            say(f"ansible-playbook hecaton.fleet.evacuate -e evacuate_host={SOURCE}")
            # Read when the report is written, not before.
            fields = "dict2items | selectattr('key', 'in', %s) | items2dict" % list(CLIENT_FIELDS)
            clients = "{{ [lookup('ansible.builtin.file', '%s') | from_json | %s] }}" % (result, fields)
            status = playbook.run(lab, "hecaton.fleet.evacuate", OUT, {
                "evacuate_host": SOURCE, "evacuate_report_dir": str(OUT), "evacuate_clients": clients, "evacuate_bandwidth": BANDWIDTH,
            })  # fmt: skip
            time.sleep(3)
        say("what became of it")
        wrong = verdict(guests, chosen, status, json.loads(result.read_text()))
    except LabError as err:
        print(f"demo: {err}", file=sys.stderr)
        return 1
    for sentence in wrong:
        print(f"demo: {sentence}", file=sys.stderr)
    took = f"{time.monotonic() - begun:.0f} s"
    print(f"\ndemo: {'failed' if wrong else 'all VMs moved, nothing was lost'} in {took}; the report is {OUT.relative_to(ROOT)}/report.html")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
