# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests on the lab's hosts: defines, starts, questions and removes them.

Two kinds: ``tiny`` (the host's kernel and our checking init) and ``valkey`` (a small Debian with a database on a disk on
the shared storage); two drivers: ``libvirt`` and ``qmp``. What runs where is asked of the hosts each time, because
guests move.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "guest")]

import guest_image

import lab as lab_module
import report as guest_report
from image import LabError

FILES = "/var/lib/hecaton-lab"
LOGS = "/var/log/hecaton-lab"
SOCKETS = "/run/hecaton-lab"
START_SECONDS = 420

# An initramfs may be several archives, one behind the other. Those modules of the running kernel fit, as guests boot with it.
ADD_MODULES = f"""
    set -eo pipefail
    work=$(mktemp -d); trap 'rm -rf $work' EXIT; cd $work; mkdir modules; number=10
    for name in virtio_balloon virtio_mem; do
        modprobe -D $name | while read -r what path _; do
            [ $what = insmod ] || continue; xz -dc $path > modules/$number-$(basename $path .xz); number=$((number + 1)); done
        number=$((number + 10)); done
    cp {FILES}/tiny.cpio both; find modules | cpio --quiet -o -H newc >> both; mv both {FILES}/tiny-modules.cpio
"""


@dataclasses.dataclass(frozen=True)
class Guest:
    """What a guest is made of. ``words`` go to its kernel command line."""

    name: str
    driver: str
    kind: str = "tiny"
    memory_mib: int = 128
    words: str = ""
    extra_args: str = ""  # more arguments for QEMU, driver qmp only
    extra_devices: str = ""  # more XML below <devices>, driver libvirt only
    cpu: str = "host"
    still: bool = False  # never let run: there to be looked at; driver qmp only
    before: str = ""  # what the host needs first, as a shell command
    modules: bool = False  # with the drivers of virtio-balloon and virtio-mem; kind tiny only
    remote_ram: bool = False  # its memory is a file on the remote_ram file system; driver qmp only
    on: str = ""  # the host that it is started on, if not that of the others

    @property
    def uuid(self) -> str:
        return f"77000000-0000-4000-9000-{self.name.encode().hex()[:12].zfill(12)}"

    @property
    def append(self) -> str:
        common = "console=ttyS0 quiet mitigations=off no_timer_check random.trust_cpu=on"
        if self.kind == "tiny":
            return f"{common} {self.words}"
        address, _port = lab_module.FORWARDS["valkey"]
        return f"{common} root=/dev/vda rw init=/sbin/lab-init lab.ip={address}/24 lab.gw={lab_module.GUEST_GATEWAY} {self.words}"

    @property
    def initrd(self) -> str:
        return f"{FILES}/tiny{'-modules' if self.modules else ''}.cpio" if self.kind == "tiny" else "/boot/initrd.img"

    @property
    def mac(self) -> str:
        return f"52:54:00:77:03:{sum(self.name.encode()) % 256:02x}"

    def xml(self, storage) -> str:
        """The guest as a libvirt domain."""
        devices = ""
        if self.kind == "valkey":
            devices = (
                # An emulated host may be late: a connection to the storage that broke is made again, and the guest waits for it.
                "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/>"
                f"<source protocol='nbd' name='{self.name}'><host name='{lab_module.STORAGE}' port='{lab_module.STORAGE_PORT}'/>"
                "<reconnect delay='60'/></source>"
                "<target dev='vda' bus='virtio'/></disk>"
                f"<interface type='bridge'><source bridge='br0'/><mac address='{self.mac}'/><model type='virtio'/><rom enabled='no'/></interface>"
            )
        return (
            f"<domain type='kvm'><name>{self.name}</name><uuid>{self.uuid}</uuid><memory unit='MiB'>{self.memory_mib}</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type><kernel>/boot/vmlinuz</kernel><initrd>{self.initrd}</initrd><cmdline>{self.append}</cmdline></os>"
            # Under load a guest's kernel may leave the HPET ticking, which costs as much as the guest.
            "<features><acpi/></features><clock offset='utc'><timer name='hpet' present='no'/></clock>"
            "<cpu mode='host-passthrough' migratable='on'/><on_crash>preserve</on_crash>"
            f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}{self.extra_devices}<controller type='usb' model='none'/>"
            f"<serial type='unix'><source mode='bind' path='{SOCKETS}/{self.name}.serial'/><log file='{LOGS}/{self.name}.log' append='on'/>"
            "<target port='0'/></serial>"
            "<memballoon model='none'/></devices></domain>"
        )

    def conf(self, storage) -> str:
        """The guest as a unit's environment file."""
        disk = ""
        if self.kind == "valkey":
            disk = (
                f" -drive file=nbd://{lab_module.STORAGE}:{lab_module.STORAGE_PORT}/{self.name},if=virtio,format=raw,cache=none,file.reconnect-delay=60"
                f" -netdev bridge,id=net0,br=br0 -device virtio-net-pci,netdev=net0,mac={self.mac},romfile="
            )
        memory = ""
        if self.remote_ram:
            backend = f"id=pc.ram,mem-path=/run/remote_ram/{self.name}.ram,share=on,prealloc=off,size={self.memory_mib}M"
            memory = f",memory-backend=pc.ram -object memory-backend-file,{backend}"
        return (
            f"QEMU_ARGS=\"-machine pc,accel=kvm,hpet=off{memory} -cpu {self.cpu} -smp 1 -m {self.memory_mib} -uuid {self.uuid} "
            f"-kernel /boot/vmlinuz -initrd {self.initrd} "
            f"-append '{self.append}' -chardev socket,id=serial0,path={SOCKETS}/{self.name}.serial,server=on,wait=off,logfile={LOGS}/{self.name}.log"
            f",logappend=on -serial chardev:serial0{disk}{' -S' if self.still else ''} {self.extra_args}\"\n"
        )


# Six guests share one emulated CPU: each wake-up, each character on a serial port and each page that is checked costs
# them all, so the guests of the demo do these things as seldom as they may.
CALM = "dirty.tick=100 dirty.report=20 dirty.sweep=60"

# Most of the memory is only read, and seldom, so that it is long on its way where the bandwidth is limited.
SLOW = "dirty.rate=1 dirty.pattern=random dirty.report=1 dirty.sweep=120"

#: Sets of guests by what they are for.
SETS = {
    "demo": (
        Guest("web1", "qmp", memory_mib=160, words=f"dirty.mib=64 dirty.rate=4 dirty.pattern=hot dirty.hot_mib=8 {CALM}", remote_ram=True),
        Guest("batch1", "qmp", memory_mib=256, words=f"dirty.mib=128 dirty.rate=12 dirty.pattern=seq {CALM}", remote_ram=True),
        Guest("batch2", "qmp", memory_mib=256, words=f"dirty.mib=128 dirty.rate=8 dirty.pattern=random {CALM}", remote_ram=True),
        Guest("db1", "qmp", kind="valkey", memory_mib=256, remote_ram=True),
        # With ordinary memory: they have it on remote_ram once they have moved.
        Guest("web2", "qmp", memory_mib=128, words=f"dirty.mib=32 dirty.rate=1 dirty.pattern=random {CALM}"),
        Guest("idle1", "qmp", memory_mib=128, words=f"dirty.mib=16 dirty.rate=-1 {CALM}"),
    ),
    "small": (
        Guest("one", "qmp", memory_mib=128, words="dirty.mib=32 dirty.rate=4 dirty.pattern=random dirty.report=1"),
        Guest("two", "libvirt", memory_mib=128, words="dirty.mib=32 dirty.rate=4 dirty.pattern=random dirty.report=1"),
    ),
    # What keeps a VM on its host, all told: real parts, but no guest runs.
    "awkward": (
        Guest("plain", "qmp", memory_mib=64, still=True, cpu="qemu64"),
        Guest("disk", "qmp", memory_mib=64, still=True, cpu="qemu64", before=f"truncate -s 8M {FILES}/local.raw",
              extra_args=f"-drive file={FILES}/local.raw,if=virtio,format=raw"),
        Guest("device", "qmp", memory_mib=64, still=True, cpu="qemu64", before="modprobe scsi_debug && udevadm settle",
              extra_args="-device virtio-scsi-pci -drive file=/dev/sg0,if=none,id=sg0,format=raw -device scsi-generic,drive=sg0"),
        Guest("cpu", "qmp", memory_mib=64, still=True),
        Guest("leaving", "qmp", memory_mib=64, still=True, cpu="qemu64"),
    ),
    "remote": (
        Guest("one", "qmp", memory_mib=128, words="dirty.mib=64 dirty.rate=8 dirty.pattern=random dirty.report=1", remote_ram=True),
        # With a balloon that also reports free pages, and a second RAM file: what virtio-mem plugs in. That may be above 4 GiB, for which the
        # guest's kernel would keep 64 MiB to bounce from.
        Guest("two", "qmp", memory_mib=256, words="swiotlb=512 dirty.mib=64 dirty.churn_mib=48 dirty.rate=8 dirty.pattern=hot dirty.report=1",
              modules=True, remote_ram=True,
              extra_args="-m maxmem=512M -object memory-backend-file,id=vmem0,mem-path=/run/remote_ram/two.vmem.ram,share=on,prealloc=off,size=128M "
                         "-device virtio-mem-pci,id=more0,memdev=vmem0,requested-size=64M -device virtio-balloon-pci,free-page-reporting=on"),
    ),
    # For hours on end: what they write on their consoles is read as a whole each time.
    "soak": (
        Guest("one", "qmp", memory_mib=128, words=f"dirty.mib=56 dirty.rate=8 dirty.pattern=random {CALM}", remote_ram=True),
        Guest("two", "qmp", memory_mib=160, words=f"dirty.mib=88 dirty.rate=6 dirty.pattern=hot {CALM}", remote_ram=True),
    ),
    # On two hosts; two with ordinary memory, and one that has it where they are to have it.
    "onboard": (
        Guest("one", "qmp", memory_mib=128, words=f"dirty.mib=32 dirty.rate=4 dirty.pattern=random {CALM}"),
        Guest("there", "qmp", memory_mib=96, words=f"dirty.mib=16 dirty.rate=1 {CALM}", remote_ram=True),
        Guest("two", "qmp", memory_mib=128, words=f"dirty.mib=32 dirty.rate=4 dirty.pattern=random {CALM}", on="hv2"),
    ),
    "remote_slow": (
        Guest("one", "qmp", memory_mib=192, words=f"dirty.mib=16 dirty.bloat_mib=64 {SLOW}", remote_ram=True),
        Guest("two", "qmp", memory_mib=128, words=f"dirty.mib=16 dirty.bloat_mib=32 {SLOW}", remote_ram=True),
    ),
    "busy": (
        Guest("one", "qmp", memory_mib=192, words="dirty.mib=96 dirty.rate=40 dirty.pattern=random dirty.report=1"),
        Guest("two", "libvirt", memory_mib=192, words="dirty.mib=96 dirty.rate=40 dirty.pattern=random dirty.report=1"),
    ),
}


class Guests:
    """The guests of one lab."""

    def __init__(self, lab: lab_module.Lab):
        self.lab = lab

    def prepare_hosts(self, modules: bool = True) -> None:
        """Puts the files that guests are started from on all hosts; without ``modules`` only those of guests that have none."""
        tiny = pathlib.Path(guest_image.tiny_initramfs())

        before = f"mkdir -p {FILES} {LOGS} {SOCKETS} /etc/qemu && chmod 777 {SOCKETS} {LOGS} && echo allow br0 > /etc/qemu/bridge.conf"

        def prepare(host):
            self.lab.put(host, tiny, f"{FILES}/tiny.cpio", before=before)
            if modules:
                self.lab.ssh(host, "bash", stdin=ADD_MODULES)

        lab_module.each(prepare, [host for host in lab_module.HOSTS if self.lab.running(host)])

    def deploy(self, guests, host: str) -> None:
        """Defines and starts guests on a host, and waits until each is up. All earlier ones are ended first, like those of the demo."""
        self.destroy()
        self.prepare_hosts(any(guest.modules for guest in guests))
        # A whole Debian boots slowly beside busy guests on one emulated CPU: it goes first, and alone.
        for place in dict.fromkeys(guest.on or host for guest in guests):
            here = [guest for guest in guests if (guest.on or host) == place]
            for batch in ([g for g in here if g.kind == "valkey"], [g for g in here if g.kind != "valkey"]):
                if batch:
                    self._start(batch, place)

    def _start(self, guests, host: str) -> None:
        script, domains, units = [], [], []
        for guest in guests:
            if guest.kind == "valkey":
                disk = self.lab.disks() / guest.name
                shutil.copyfile(pathlib.Path(guest_image.valkey_image()) / "root.raw", disk)
            if guest.before:
                script.append(f"{{ {guest.before}; }} || exit 1")
            script.append(f": > {LOGS}/{guest.name}.log; chmod 666 {LOGS}/{guest.name}.log")
            if guest.driver == "libvirt":
                script.append(f"cat > {FILES}/{guest.name}.xml <<'END'\n{guest.xml(self.lab)}\nEND")
                domains.append(f"define {FILES}/{guest.name}.xml; start {guest.name}")
            else:
                script.append(f"cat > /etc/hecaton/vms/{guest.name}.conf <<'END'\n{guest.conf(self.lab)}END")
                units.append(f"hecaton-vm@{guest.name}")
        if units:
            script.insert(0, f"test -d /etc/hecaton/vms || {{ echo the role hecaton.fleet.qemu was not applied to {host} >&2; exit 1; }}")
            script.append(f"systemctl enable -q --now {' '.join(units)} || exit 1")
        if domains:
            # virsh goes on after an error, and its status is that of the last command.
            script.append(f"said=$(virsh -q '{'; '.join(domains)}' 2>&1); case $said in *error:*) echo \"$said\" >&2; exit 1;; esac")
        self.lab.ssh(host, "bash", stdin="\n".join(script), timeout=START_SECONDS)
        deadline = time.monotonic() + START_SECONDS
        waiting = {guest.name: "valkey ready" if guest.kind == "valkey" else '"started"' for guest in guests if not guest.still}
        while waiting:
            logs = self._logs(list(waiting), [host])
            waiting = {name: sign for name, sign in waiting.items() if sign.encode() not in logs.get(name, b"")}
            if waiting and time.monotonic() > deadline:
                name = next(iter(waiting))
                tail = logs.get(name, b"")[-600:].decode(errors="replace")
                raise LabError(f"{', '.join(waiting)} did not start in {START_SECONDS} s; the end of {name}'s console: {tail}")
            if waiting:
                time.sleep(2)

    def destroy(self) -> None:
        """Ends and forgets all guests on all hosts."""
        # As few calls as can be: each starts a program on an emulated CPU.
        script = f"""
            todo=; for vm in $(virsh -q list --all --name); do todo="$todo destroy $vm; undefine $vm;"; done
            [ -z "$todo" ] || virsh -q "$todo" >/dev/null 2>&1
            todo=$(systemctl list-units --all --plain --no-legend 'hecaton-vm@*' 'hecaton-migrate-*' 'hecaton-incoming-*' | cut -d' ' -f1)
            [ -z "$todo" ] || {{ systemctl kill --signal=KILL $todo; systemctl stop $todo; systemctl reset-failed $todo; }} 2>/dev/null
            todo=; units=; for file in /etc/hecaton/vms/*.conf /run/hecaton/incoming/*.env /run/hecaton/reserved/*.json \\
                /var/lib/hecaton/migrations/* /var/lib/hecaton/incoming/*.json /var/lib/hecaton/jobs/*.json {LOGS}/*.log {FILES}/*.xml /run/remote_ram/*.ram; do
                [ -e "$file" ] || continue; vm=${{file##*/}}; vm=${{vm%.*}}
                case "$file" in *.conf) units="$units hecaton-vm@$vm";; esac; todo="$todo $file"; done
            [ -z "$units" ] || systemctl disable -q $units 2>/dev/null
            ! mountpoint -q /proc/cpuinfo || umount /proc/cpuinfo
            rm -f $todo /var/lib/hecaton/cordon.json /var/lib/hecaton/claim
        """
        lab_module.each(lambda host: self.lab.ssh(host, "bash", stdin=script), [h for h in lab_module.HOSTS if self.lab.running(h)])

    def where(self) -> dict:
        """The hosts that run each guest now: ``{name: [hosts]}``. One that is still being received does not count."""
        found: dict = {}

        def look(host):
            listed = self.lab.ssh(
                host, "virsh -q list --state-running --name; "
                "for u in $(systemctl list-units --plain --no-legend --state=active 'hecaton-vm@*' | cut -d' ' -f1); do "
                "v=${u#hecaton-vm@}; v=${v%.service}; test -e /run/hecaton/incoming/$v.env || echo $v; done"
            ).stdout.split()  # fmt: skip
            for name in listed:
                found.setdefault(name, []).append(host)

        lab_module.each(look, [h for h in lab_module.HOSTS if self.lab.running(h)])
        return {name: sorted(hosts) for name, hosts in sorted(found.items())}

    def fingerprint(self) -> dict:
        """What a migration or an evacuation could leave on each host, as text: to compare before and after."""
        found: dict = {}
        look = (
            "cd /; for d in $(virsh -q list --all --name | sort); do virsh domstate $d; virsh dumpxml $d | sha256sum; done; "
            "systemctl list-units --plain --no-legend 'hecaton-*' | sed 's/  */ /g'; "
            # Not locks: they stay, so that nobody holds one that is gone.
            "find etc/hecaton etc/systemd/system var/lib/hecaton run/hecaton/incoming run/hecaton/reserved \\( -type f -o -type l \\) "
            "! -name '*.lock' 2>/dev/null | sort | while read f; do echo $f $(sha256sum < $f); done; ls -l dev/shm; ip -br link | sed 's/  */ /g'"
        )

        def ask(host):
            found[host] = self.lab.ssh(host, "bash", stdin=look).stdout

        lab_module.each(ask, [h for h in lab_module.HOSTS if self.lab.running(h)])
        return dict(sorted(found.items()))

    def _logs(self, names, hosts=None) -> dict:
        """What guests wrote on their consoles, on all hosts together."""
        parts: dict = {}

        def fetch(host):
            listing = " ".join(f"{LOGS}/{name}.log" for name in names)
            text = self.lab.ssh_bytes(host, f"for f in {listing}; do [ -e $f ] && echo @@file $f && cat $f; done; true")
            for part in text.split(b"@@file ")[1:]:
                path, _newline, content = part.partition(b"\n")
                parts.setdefault(pathlib.PurePath(path.decode().strip()).stem, []).append(content)

        lab_module.each(fetch, hosts or [h for h in lab_module.HOSTS if self.lab.running(h)])
        return {name: b"\n".join(contents) for name, contents in parts.items()}

    def summaries(self, names) -> dict:
        """What each tiny guest reported so far, on whichever hosts it was."""
        return {name: guest_report.parse(content) for name, content in self._logs(names).items()}

    def full_check(self, names, timeout: float = 120) -> dict:
        """Lets each guest check every page now: ``{name: {pages, corrupt, corrupt_total}}``.

        :raises LabError: a guest does not run on exactly one host, or gives no answer.
        """
        where = self.where()
        before = {name: len(summary.full_checks) for name, summary in self.summaries(names).items()}
        for name in names:
            if len(where.get(name, [])) != 1:
                raise LabError(f"{name} runs on {where.get(name) or 'no host'}")
            self.lab.ssh(where[name][0], f"printf 'check\\n' | timeout 5 socat -t 1 - UNIX-CONNECT:{SOCKETS}/{name}.serial >/dev/null; true")
        deadline = time.monotonic() + timeout
        results: dict = {}
        while len(results) < len(names):
            for name, summary in self.summaries([n for n in names if n not in results]).items():
                if len(summary.full_checks) > before.get(name, 0):
                    results[name] = summary.full_checks[-1]
            if time.monotonic() > deadline:
                raise LabError(f"no answer to a full check from {', '.join(n for n in names if n not in results)} in {timeout:g} s")
            time.sleep(0.5)
        return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, default=lab_module.REPO / "build" / "lab", help="the lab's folder (default: build/lab)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("deploy", help="start a set of guests")
    one.add_argument("set", choices=sorted(SETS))
    one.add_argument("--host", default="hv1")
    verbs.add_parser("prepare", help="put what guests are started from on all hosts, which a deploy does too")
    verbs.add_parser("destroy", help="end all guests and remove their traces")
    verbs.add_parser("fingerprint", help="say what there is on all hosts that a migration could change")
    verbs.add_parser("where", help="say which host runs which guest")
    one = verbs.add_parser("check", help="let tiny guests check all their memory; status 1 if any page is wrong")
    one.add_argument("names", nargs="+")
    args = parser.parse_args()
    guests = Guests(lab_module.Lab(args.dir))
    try:
        if args.verb == "deploy":
            guests.deploy(SETS[args.set], args.host)
        elif args.verb == "prepare":
            guests.prepare_hosts()
        elif args.verb == "destroy":
            guests.destroy()
        elif args.verb == "fingerprint":
            print(json.dumps(guests.fingerprint(), indent=1))
        elif args.verb == "where":
            print(json.dumps(guests.where()))
        else:
            results = guests.full_check(args.names)
            print(json.dumps(results, indent=1))
            return int(any(result["corrupt_total"] for result in results.values()))
    except LabError as err:
        print(f"guests: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
