# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows the main job on the lab: six VMs leave hv1 while a client outside keeps using one of them.

Four move by the kernel engine; two have ordinary memory and get onto it by moving. Ends with status 0 only if all six run
elsewhere with their memory on remote_ram, no page of a guest is corrupt, and the client lost no request. The report is
build/demo/report.html. The lab stays up; make lab-down ends it.
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

import interrupts
import playbook
import ready

import guests as lab_guests
import lab as lab_module
from image import LabError

OUT = ROOT / "build" / "demo"
SOURCE = "hv1"
# MiB/s that a host of the lab sends, about, while guests run on it: what the plan's times are made of.
BANDWIDTH = 8
TRANSPORT = "siw"
# Takes away what tests of the kernel module load by hand, told by the name of their device: the roles would find it in their way.
UNLOAD = """
test -e /sys/class/infiniband/siw0 || test -e /sys/class/infiniband/rxe0 || exit 0
! mountpoint -q /run/remote_ram || umount /run/remote_ram || exit 1
for link in siw0 rxe0; do test ! -e /sys/class/infiniband/$link || rdma link delete $link || exit 1; done
for module in remote_ram siw; do test ! -d /sys/module/$module || rmmod $module || exit 1; done
"""
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


def prepare(lab) -> None:
    """Makes the hosts what an operator makes them: QEMU as units, an RDMA device, remote_ram."""
    lab_guests.Guests(lab).destroy()
    lab_module.each(lambda host: lab.ssh(host, "sh", stdin=UNLOAD), lab_module.HOSTS)
    for name, variables in ((str(HERE / "lab" / "prepare.yml"), None), ("hecaton.fleet.prepare", {"rdma_transport": TRANSPORT, **ready.archives()})):
        if playbook.run(lab, name, OUT, variables):
            raise LabError("the hypervisors could not be prepared")


def off_remote_ram(lab, where: dict) -> list:
    """Guests whose QEMU has no memory on remote_ram."""
    look = "ls -l /proc/$(systemctl show --property=MainPID --value hecaton-vm@{0})/fd | grep -q '/run/remote_ram/{0}.ram$' && echo there || echo elsewhere"
    return [name for name, hosts in where.items() if lab.ssh(hosts[0], look.format(name)).stdout.strip() != "there"]


def verdict(guests, chosen, status: int, seen: dict) -> list:
    """What is wrong, a sentence each; nothing if all went well."""
    wrong = [f"the evacuation ended with status {status}"] if status else []
    where = guests.where()
    for guest in chosen:
        hosts = where.get(guest.name, [])
        if len(hosts) != 1 or hosts == [SOURCE]:
            wrong.append(f"{guest.name} runs on {' and '.join(hosts) or 'no host'}")
    for name in off_remote_ram(guests.lab, {guest.name: where[guest.name] for guest in chosen if len(where.get(guest.name, [])) == 1}):
        wrong.append(f"{name} has no memory on remote_ram")
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
    engines = {guest.name: "remote_ram" if guest.remote_ram else "precopy" for guest in chosen}
    for vm in report["vms"]:
        counted = vm.get("remote_ram")
        how = f"{vm['engine']}{' onto remote_ram' if vm['onboarded'] else ''}"
        faults = f", {counted['pages_demand']} of {counted['pages']} pages on demand" if counted else ""
        print(f"  {vm['name']}: {vm['result']} {vm['from']} -> {vm['to']}, {how}, downtime {vm['downtime_ms']} ms, total {vm['total_ms']} ms{faults}")
        if vm["engine"] != engines.get(vm["name"]) or vm["onboarded"] != (vm["engine"] == "precopy"):
            wrong.append(f"{vm['name']} moved by {how}")
    return wrong


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    interrupts.once()
    begun = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    lab = lab_module.Lab(ROOT / "build" / "lab")
    chosen = lab_guests.SETS["demo"]
    guests = lab_guests.Guests(lab)
    try:
        say("the lab: three hypervisors")
        lab.up()
        say(f"preparing them: ansible-playbook hecaton.fleet.prepare, transport {TRANSPORT}")
        prepare(lab)
        say(f"{len(chosen)} VMs on {SOURCE}: {', '.join(guest.name for guest in chosen)}")
        guests.deploy(chosen, SOURCE)
        with client(lab) as result:
            say(f"ansible-playbook hecaton.fleet.evacuate -e evacuate_host={SOURCE} -e evacuate_onboard=true")
            # Read when the report is written, not before.
            fields = "dict2items | selectattr('key', 'in', %s) | items2dict" % list(CLIENT_FIELDS)
            clients = "{{ [lookup('ansible.builtin.file', '%s') | from_json | %s] }}" % (result, fields)
            status = playbook.run(lab, "hecaton.fleet.evacuate", OUT, {
                "evacuate_host": SOURCE, "evacuate_report_dir": str(OUT), "evacuate_clients": clients, "evacuate_bandwidth": BANDWIDTH,
                "evacuate_onboard": True,
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
