# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab: three emulated Debian hypervisors that run real KVM guests.

A lab lives in one folder (``build/lab``): ``lab.json`` says what runs, ``inventory.yml`` and ``ssh_config`` are for
its users. Hosts are started from a snapshot of the booted host, so that they answer after seconds. Everything is
started by us and ended by process id, checked against what we started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parent.parent)]

import interrupts

import devenv
import image
import needs
from image import LabError

REPO = pathlib.Path(__file__).resolve().parents[2]
HOSTS = ("hv1", "hv2", "hv3")
HOST_MEMORY_MIB = 4096
# All that TCG can do, but for what makes an emulated CPU slower: tables of pages with five levels; copying a byte at a time (a real
# CPU is fast at that), and changing the right to the user's memory around each copy: 200 MiB into a tmpfs took 6.8 s with both, 1.8 s
# without; and carry-less products, which TCG makes bit by bit: soft-RoCE's checksums are made of them. A CPU with AES has these in
# the kernel's eyes, and its AES-GCM uses them unasked: no AES then. And but for what QEMU 7.2 does wrong: after CMPXCHG16B, which the
# kernel's allocator uses, the flags may be those of an operand (helper_cmpxchg16b_unlocked() goes by an env->cc_op that was not
# stored). If an interrupt comes there, they stay, among them the direction of string operations: a host panicked now and then.
EMULATED_CPU = "max,-la57,-erms,-smap,-pclmulqdq,-aes,-vaes,-cx16"
# Bits of /proc/sys/kernel/tainted: a bad page, an oops, a warning, a lockup. What comes after one of them on that host proves nothing.
DAMAGED = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 14
BOOT_SECONDS = 900
SLOW_BOOT_SECONDS = 3600  # of a kernel that is not the image's, which may be one that checks all it does
# What systemd is told on such a kernel: it would end what takes longer than 90 s to start, and begin it again.
PATIENT = f"systemd.default_timeout_start_sec={SLOW_BOOT_SECONDS} systemd.default_device_timeout_sec={SLOW_BOOT_SECONDS}"
# The image's packages were configured when it was made: a boot has no libraries, no catalogue and no users to bring up to date.
UP_TO_DATE = "systemd.condition_needs_update=0"
RESTORE_SECONDS = 120
# libvirtd itself ends when nobody has asked it anything for two minutes; whoever does starts it again.
READY = "test -c /dev/kvm && systemctl is-active -q libvirtd.socket"
STORAGE = "10.0.2.100"
STORAGE_PORT = 10809
GUEST_NETWORK = "10.77.2.0/24"
GUEST_GATEWAY = "10.77.2.2"
# Guest addresses that a client outside reaches, by name of the forward: (address, port).
FORWARDS = {"valkey": ("10.77.2.20", 6379)}


def migration_address(name: str) -> str:
    return f"10.77.1.1{number(name)}"


def number(name: str) -> int:
    return HOSTS.index(name) + 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def each(work, names) -> None:
    """Calls ``work(name)`` for all names at once and raises the first error. An interrupt does not wait for the rest."""
    failures = []

    def guarded(name):
        try:
            work(name)
        except Exception as err:
            failures.append(err)

    threads = [threading.Thread(target=guarded, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def pid_in(path: pathlib.Path) -> int:
    """The id in a pid file. A daemon may still be about to write it when the command that started it is through."""
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
        if time.monotonic() > deadline:
            raise LabError(f"nothing wrote its process id to {path} in 10 s")
        time.sleep(0.05)


class Process:
    """A process that we started: its id, and its start time, so that a reused id is never taken for it."""

    @staticmethod
    def start_time(pid: int):
        try:
            return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        except (OSError, IndexError, ValueError):
            return None

    @staticmethod
    def state(pid: int) -> str:
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            return "X"

    @classmethod
    def record(cls, pid: int) -> dict:
        return {"pid": pid, "started": cls.start_time(pid)}

    @classmethod
    def alive(cls, record) -> bool:
        return bool(record) and record["started"] is not None and cls.start_time(record["pid"]) == record["started"] and cls.state(record["pid"]) not in "ZX"

    @classmethod
    def end(cls, record, hard: bool = False) -> None:
        for number_, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            if not cls.alive(record):
                return
            if hard and number_ is signal.SIGTERM:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(record["pid"], number_)
            deadline = time.monotonic() + patience
            while cls.alive(record) and time.monotonic() < deadline:
                time.sleep(0.05)


def accelerator() -> str:
    """``kvm`` if a probe boot on /dev/kvm works and nested virtualisation is on, else ``tcg``."""
    forced = os.environ.get("HECATON_LAB_ACCEL")
    if forced:
        return forced
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    nested = [p for p in ("/sys/module/kvm_intel/parameters/nested", "/sys/module/kvm_amd/parameters/nested") if os.path.exists(p)]
    if not any(pathlib.Path(p).read_text().strip() in ("1", "Y") for p in nested):
        return "tcg"
    known = devenv.cache() / f"accelerator-{pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if known.exists():
        return known.read_text().strip()
    kernel = image.host_image() / "vmlinuz"
    probe = subprocess.Popen(
        ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults", "-display", "none", "-serial", "stdio",
         "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1", "-no-reboot"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
    )  # fmt: skip
    try:
        output = probe.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        probe.kill()
        output = probe.communicate()[0]
    # Without a root file system the kernel gets as far as looking for one: then the CPU it runs on is a whole one.
    result = "kvm" if "Unable to mount root fs" in output else "tcg"
    known.write_text(result)
    return result


def monitor_of(path):
    """A client of a host's QEMU monitor (QMP); the collection's own is loaded from this tree."""
    spec = {}
    source = (REPO / "plugins" / "module_utils" / "_qmp.py").read_text()
    exec(compile(source, "_qmp.py", "exec"), spec)  # not importable as a package from here
    return spec["QmpClient"](str(path), timeout=120)


class Lab:
    """A lab in a folder.

    :param folder: where its state is; made by :meth:`up`.
    :param hosts: which hosts :meth:`up` starts.
    :param kernel: another kernel that they boot, one that needs no initramfs; such hosts are not saved and have no libvirtd to wait for.
    """

    def __init__(self, folder: pathlib.Path, hosts=HOSTS, kernel: pathlib.Path | None = None):
        self.folder = folder.resolve()
        self.hosts, self.kernel = hosts, kernel
        self.state_file = self.folder / "lab.json"
        self.state = {}
        with contextlib.suppress(OSError, ValueError):
            self.state = json.loads(self.state_file.read_text())

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def inventory(self) -> pathlib.Path:
        return self.folder / "inventory.yml"

    def running(self, name: str) -> bool:
        return Process.alive(self.state.get("hosts", {}).get(name, {}).get("process"))

    def forward(self, name: str) -> int:
        """The loopback port that leads to the guest address called ``name`` in FORWARDS."""
        return self.state["forwards"][name]

    def disks(self) -> pathlib.Path:
        """The folder whose files the storage server exports, each under its own name."""
        return pathlib.Path(self.state["run"]) / "disks"

    def disk_uri(self, name: str) -> str:
        return f"nbd://{STORAGE}:{STORAGE_PORT}/{name}"

    def ssh(self, name: str, *command: str, check: bool = True, timeout: float = 300, stdin: str | None = None) -> subprocess.CompletedProcess:
        """Runs a command on a host. :raises LabError: it failed (with ``check``) or the host didn't answer in time."""
        if name not in self.state.get("hosts", {}):
            raise LabError(f"{name} is not a host of this lab; the hosts are {', '.join(self.state.get('hosts', {})) or 'none: make lab first'}")
        try:
            done = subprocess.run(
                ["ssh", "-F", str(self.folder / "ssh_config"), name, "--", *command],
                capture_output=True, text=True, errors="replace", timeout=timeout, input=stdin if stdin is not None else "", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as err:
            raise LabError(f"{name} did not finish {' '.join(command)[:80]!r} in {timeout:g} s") from err
        if check and done.returncode:
            raise LabError(f"{name}: {' '.join(command)[:200]!r} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
        return done

    def ssh_bytes(self, name: str, command: str, timeout: float = 120) -> bytes:
        """What a command on a host prints, as it is."""
        return subprocess.run(
            ["ssh", "-F", str(self.folder / "ssh_config"), name, "--", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=True
        ).stdout

    def talk(self, name: str, command: str) -> subprocess.Popen:
        """A command on a host that is written to and read from while it runs. It ends when its input does."""
        return subprocess.Popen(
            ["ssh", "-F", str(self.folder / "ssh_config"), name, "--", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip

    def put(self, name: str, source: pathlib.Path, target: str, before: str = "true", timeout: float = 120) -> None:
        """Copies a file to a host, after a command there."""
        with open(source, "rb") as content:
            done = subprocess.run(
                ["ssh", "-F", str(self.folder / "ssh_config"), name, "--", f"{before} && cat > {target}"],
                stdin=content, capture_output=True, timeout=timeout, check=False,
            )  # fmt: skip
        if done.returncode:
            raise LabError(f"{source.name} could not be copied to {name}: {done.stderr.decode(errors='replace').strip()}")

    # -- up and down -----------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Starts what isn't running; a lab that is up already is left as it is."""
        missing = needs.missing("lab")
        if missing:
            raise LabError(f"the lab needs Debian packages that are not installed: apt-get install -y --no-install-recommends {' '.join(missing)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with devenv.locked(self.folder / ".lock"):
            if self.state and not Process.alive(self.state.get("hub")):
                self._clear()
            absent = [name for name in self.hosts if not self.running(name)]
            if not absent:
                print("lab: already up", flush=True)
                return
            started = time.monotonic()
            self._check_memory(len(absent))
            accel = accelerator()
            snapshot = None if self.kernel else self._snapshot(accel)
            try:
                self._start(absent, accel, snapshot)
            except LabError as err:
                if not snapshot:
                    self._clear()
                    raise
                # A snapshot that doesn't come up is of no use to anyone: make it again, once.
                print(f"lab: the saved hosts did not come up ({err}); booting them again", flush=True)
                self._clear()
                image.drop(snapshot)
                self._start(list(HOSTS), accel, self._snapshot(accel))
            except BaseException:
                self._clear()
                raise
            print(f"lab: {', '.join(absent)} up in {time.monotonic() - started:.0f} s ({accel}); inventory {os.path.relpath(self.inventory)}", flush=True)

    def down(self) -> None:
        if self.folder.exists():
            with devenv.locked(self.folder / ".lock"):
                self._clear()
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, name: str) -> None:
        """Cuts a host's power."""
        Process.end(self.state["hosts"][name]["process"], hard=True)

    def _check_memory(self, hosts: int) -> None:
        available = int(next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[1]) // 1024
        # Hosts use what their guests touch: half of what they are given covers every suite with room to spare.
        wanted = hosts * HOST_MEMORY_MIB // 2
        if available < wanted:
            raise LabError(f"{hosts} lab hosts need about {wanted} MiB of free memory, and this machine has {available} MiB")

    def _clear(self) -> None:
        for host in self.state.get("hosts", {}).values():
            Process.end(host.get("process"), hard=True)
        for part in ("pulse", "outside", "switch", "hub"):
            Process.end(self.state.get(part))
            self.state.pop(part, None)
        if self.state.get("run"):
            shutil.rmtree(self.state["run"], ignore_errors=True)
        self.state = {}
        self.state_file.unlink(missing_ok=True)

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1))
        temporary.replace(self.state_file)

    def _start(self, names: list, accel: str, snapshot: pathlib.Path | None) -> None:
        """Starts hosts, from a snapshot or by booting them, and waits until each answers."""
        if not self.state:
            run = tempfile.mkdtemp(prefix="hecaton-lab-")  # short: unix socket paths are limited to 107 bytes
            self.state = {"run": run, "hosts": {}, "forwards": {n: free_port() for n in FORWARDS}, "accelerator": accel}
            (pathlib.Path(run) / "disks").mkdir()
            self._save()
        if not Process.alive(self.state.get("hub")):
            self._start_networks()
        for name in names:
            old = self.state["hosts"].get(name, {})
            self.state["hosts"][name] = {"ssh_port": old.get("ssh_port") or free_port(), "process": None}
            self._start_host(name, accel, snapshot)
        self._write_access()
        self._wait(names, snapshot)

    def _start_networks(self) -> None:
        run = pathlib.Path(self.state["run"])
        # The migration network is a hub in user space: a QEMU without a machine, that takes frames of any size.
        command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-daemonize", "-pidfile", f"{run}/hub.pid"]
        for name in HOSTS:
            command += ["-netdev", self._link(name, f"hub-{name}", f"mig-{name}"), "-netdev", f"hubport,id=p-{name},hubid=0,netdev={name}"]
        image.run(command)
        self.state["hub"] = Process.record(pid_in(run / "hub.pid"))
        self._save()
        # The guests' network is a learning switch, and one of its ports leads to QEMU's own TCP stack, by which clients
        # outside reach guests. restrict=on: nothing leaves for the machine's own network.
        image.run(["vde_switch", "-d", "-s", f"{run}/guests", "-p", f"{run}/switch.pid", "-M", f"{run}/switch.mgmt"])
        self.state["switch"] = Process.record(pid_in(run / "switch.pid"))
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{self.state['forwards'][n]}-{a}:{p}" for n, (a, p) in FORWARDS.items())
        image.run([
            "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-daemonize", "-pidfile", f"{run}/outside.pid",
            "-netdev", f"user,id=outside,net={GUEST_NETWORK},host={GUEST_GATEWAY},dhcpstart=10.77.2.200,ipv6=off,restrict=on{forwards}",
            "-netdev", "hubport,id=p1,hubid=0,netdev=outside",
            "-netdev", f"vde,id=guests,sock={run}/guests", "-netdev", "hubport,id=p2,hubid=0,netdev=guests",
        ])  # fmt: skip
        self.state["outside"] = Process.record(pid_in(run / "outside.pid"))
        pulse = subprocess.Popen(
            [sys.executable, str(REPO / "tests" / "lab" / "pulse.py"), str(run), *HOSTS],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.state["pulse"] = Process.record(pulse.pid)
        self._save()

    def _link(self, ident: str, local: str, remote: str) -> str:
        run = self.state["run"]
        return f"dgram,id={ident},local.type=unix,local.path={run}/{local},remote.type=unix,remote.path={run}/{remote}"

    @staticmethod
    def processors(accel: str) -> list:
        """The part of a host's command line that says what CPUs it has."""
        # Two vCPUs under multi-threaded TCG crash the host's kernel in KVM's self-modifying code: one.
        return ["-accel", "tcg", "-cpu", EMULATED_CPU, "-smp", "1"] if accel == "tcg" else ["-accel", "kvm", "-cpu", "host", "-smp", "2"]

    @staticmethod
    def _machine(name: str, accel: str, *words: str) -> list:
        """The part of a host's command line that a snapshot depends on."""
        ident = f"77000000-0000-4000-8000-00000000001{number(name)}"
        identity = f"systemd.hostname={name} systemd.machine_id={ident.replace('-', '')}"
        return [
            "-name", name, "-machine", "q35", *Lab.processors(accel), "-m", str(HOST_MEMORY_MIB), "-nodefaults", "-display", "none", "-uuid", ident,
            "-append", " ".join(["root=/dev/vda rw console=ttyS0 mitigations=off apparmor=0", UP_TO_DATE, identity, *words]),
            "-device", f"virtio-net-pci,netdev=mgmt,mac=52:54:00:77:00:1{number(name)},romfile=",
            "-device", f"virtio-net-pci,netdev=mig,mac=52:54:00:77:01:1{number(name)},romfile=",
            "-device", f"virtio-net-pci,netdev=guest,mac=52:54:00:77:02:1{number(name)},romfile=",
            "-device", "virtio-rng-pci",
        ]  # fmt: skip

    def _start_host(self, name: str, accel: str, snapshot) -> None:
        run = pathlib.Path(self.state["run"])
        host = self.state["hosts"][name]
        base = image.host_image()
        disk = run / f"{name}.qcow2"
        backing = (snapshot / f"{name}.qcow2", "qcow2") if snapshot else (base / "root.raw", "raw")
        image.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", backing[1], "-b", str(backing[0]), str(disk)])
        for stale in (f"mig-{name}", f"{name}.monitor"):
            (run / stale).unlink(missing_ok=True)
        command = [
            "qemu-system-x86_64", *self._machine(name, accel, *([PATIENT] if self.kernel else [])),
            *(["-kernel", str(self.kernel)] if self.kernel else ["-kernel", str(base / "vmlinuz"), "-initrd", str(base / "initrd.img")]),
            "-drive", f"file={disk},if=virtio,format=qcow2,cache=unsafe",
            "-netdev", f"user,id=mgmt,ipv6=off,restrict=on,hostfwd=tcp:127.0.0.1:{host['ssh_port']}-10.0.2.15:22"
                       f",guestfwd=tcp:{STORAGE}:{STORAGE_PORT}-cmd:nbdkit -s -t 4 file dir={run}/disks",
            "-netdev", self._link("mig", f"mig-{name}", f"hub-{name}"),
            "-netdev", f"vde,id=guest,sock={run}/guests",
            "-serial", f"file:{run}/{name}.console", "-qmp", f"unix:{run}/{name}.monitor,server=on,wait=off",
            "-daemonize", "-pidfile", f"{run}/{name}.pid",
        ]  # fmt: skip
        if snapshot:
            command += ["-incoming", f"exec:zstd -dcq {snapshot}/{name}.state"]
        image.run(command)
        host["process"] = Process.record(pid_in(run / f"{name}.pid"))
        self._save()

    def _write_access(self) -> None:
        """The files by which people and Ansible reach the hosts."""
        lab_keys = image.keys()
        host_key = " ".join((lab_keys / "host.pub").read_text().split()[:2])
        known, config, hosts = [], [], {}
        for name in HOSTS:
            port = self.state["hosts"].get(name, {}).get("ssh_port")
            if not port:
                continue
            known.append(f"[127.0.0.1]:{port} {host_key}")
            config.append(f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n")
            hosts[name] = {"ansible_port": port, "vm_migration_address": migration_address(name)}
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        common = f"  User root\n  IdentityFile {lab_keys}/control\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.folder}/known_hosts\n  LogLevel ERROR\n"
        common += f"  BatchMode yes\n  ConnectTimeout 30\n  ControlMaster auto\n  ControlPersist 120\n  ControlPath {self.state['run']}/cm-%n\n"
        (self.folder / "ssh_config").write_text("\n".join(config) + "\nHost *\n" + common)
        inventory = {
            "hypervisors": {
                "hosts": hosts,
                "vars": {
                    "ansible_host": "127.0.0.1",
                    # Said, since a play that is local would take its tasks that are delegated for local ones too.
                    "ansible_connection": "ssh",
                    "ansible_user": "root",
                    "ansible_python_interpreter": "/usr/bin/python3",
                    "ansible_ssh_private_key_file": str(lab_keys / "control"),
                    "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.folder}/known_hosts -o IdentitiesOnly=yes -o LogLevel=ERROR",
                    # Ansible's own, without -C: an emulated CPU would spend more on unpacking than the loopback takes.
                    "ansible_ssh_args": "-o ControlMaster=auto -o ControlPersist=600s",
                    "ansible_pipelining": True,
                    "ansible_timeout": 60,
                    "rdma_netdev": "mig0",
                },
            }
        }
        # JSON is YAML: no library needed to write it.
        self.inventory.write_text(json.dumps(inventory, indent=2) + "\n")

    def _wait(self, names: list, snapshot) -> None:
        seconds = RESTORE_SECONDS if snapshot else SLOW_BOOT_SECONDS if self.kernel else BOOT_SECONDS
        deadline = time.monotonic() + seconds
        console = pathlib.Path(self.state["run"])
        waiting = list(names)
        while waiting and not snapshot:
            for name in list(waiting):
                said = (console / f"{name}.console").read_bytes()
                if b"lab-ready" in said:
                    waiting.remove(name)
                # As PID 1 does when its generators take longer than 90 s, whatever it was told of patience.
                elif (frozen := b"systemd[1]: Freezing execution" in said) or not self.running(name):
                    raise LabError(f"{name} {'froze' if frozen else 'ended'} while it booted; the end of its console:\n{said[-800:].decode(errors='replace')}")
            if waiting and time.monotonic() > deadline:
                raise LabError(f"{', '.join(waiting)} did not boot in {seconds} s; the console is in {console}")
            time.sleep(0.5)

        def answers(name):
            while True:
                # A restored host lives at the time it was saved: tell it what time it is.
                try:
                    self.ssh(name, f"date -s @{time.time():.0f} >/dev/null && {'true' if self.kernel else READY}", timeout=60)
                    return
                except LabError as err:
                    if not self.running(name) or time.monotonic() > deadline:
                        raise LabError(f"{name} does not answer over ssh: {err}") from err
                    time.sleep(1)

        if snapshot:
            for name in names:
                self._resume(name, deadline)
        each(answers, names)
        each(self._check_kernel, names)

    def _check_kernel(self, name: str) -> None:
        """:raises LabError: the host's kernel has warned or oopsed since it booted."""
        tainted = int(self.ssh(name, "cat /proc/sys/kernel/tainted").stdout)
        if tainted & DAMAGED:
            said = self.ssh(name, "dmesg | grep -m1 -A30 -e 'cut here' -e 'Oops: ' -e 'BUG: '", check=False).stdout
            raise LabError(f"{name}'s kernel is in trouble before anything was asked of it (/proc/sys/kernel/tainted is {tainted}); it says:\n{said}")

    def _resume(self, name: str, deadline: float) -> None:
        """Lets a restored host run as soon as its memory is there: it was stopped when it was saved."""
        with monitor_of(pathlib.Path(self.state["run"]) / f"{name}.monitor") as monitor:
            while monitor.execute("query-migrate").get("status") != "completed":
                if time.monotonic() > deadline:
                    raise LabError(f"{name}'s saved memory could not be loaded in {RESTORE_SECONDS} s")
                time.sleep(0.05)
            monitor.execute("cont")

    def _snapshot(self, accel: str) -> pathlib.Path:
        """The cached folder with the booted hosts' memory and disks."""
        version = image.run(["qemu-system-x86_64", "--version"]).stdout.splitlines()[0]
        key = image.digest(image.host_image().name, version, *[" ".join(self._machine(n, accel)) for n in HOSTS])

        def build(folder):
            scratch = Lab(folder / "scratch")
            scratch.folder.mkdir()
            try:
                scratch._start(list(HOSTS), accel, None)
                each(lambda name: scratch._save_host(name, folder), HOSTS)
            finally:
                scratch._clear()
                shutil.rmtree(scratch.folder, ignore_errors=True)

        return image.entry("snapshot", key, build)

    def _save_host(self, name: str, folder: pathlib.Path) -> None:
        run = pathlib.Path(self.state["run"])
        # Let what booting started settle, and keep no log of it that grows with every restore.
        self.ssh(name, "systemctl is-system-running --wait >/dev/null; journalctl -q --rotate --vacuum-size=1M; sync; echo 3 > /proc/sys/vm/drop_caches")
        self._check_kernel(name)
        monitor = monitor_of(run / f"{name}.monitor")
        with monitor:
            monitor.execute("stop")
            monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            monitor.execute("migrate", {"uri": f"exec:zstd -1 -q -f -o {folder}/{name}.state"})
            deadline = time.monotonic() + 300
            while monitor.execute("query-migrate").get("status") not in ("completed", "failed"):
                if time.monotonic() > deadline:
                    raise LabError(f"{name} could not be saved in 300 s")
                time.sleep(0.2)
            if monitor.execute("query-migrate")["status"] == "failed":
                raise LabError(f"{name} could not be saved: {monitor.execute('query-migrate')}")
            monitor.execute("quit")
        deadline = time.monotonic() + 30
        while self.running(name) and time.monotonic() < deadline:
            time.sleep(0.1)
        shutil.move(run / f"{name}.qcow2", folder / f"{name}.qcow2")

    # -- what tests and people do to it ----------------------------------------------------------------------------

    def bandwidth(self, mbit: float | None) -> None:
        """Limits what each host sends on the migration network to ``mbit`` Mbit/s; None lifts the limit."""
        for name in HOSTS:
            change = f"tc qdisc replace dev mig0 root tbf rate {mbit}mbit burst 256k latency 200ms" if mbit else "tc qdisc del dev mig0 root 2>/dev/null; true"
            self.ssh(name, change)

    def status(self) -> list:
        rows = []
        for name in HOSTS:
            host = self.state.get("hosts", {}).get(name)
            row = {"host": name, "running": self.running(name), "ssh": None, "guests": None, "memory_free_mib": None}
            if row["running"]:
                row["ssh"] = f"127.0.0.1:{host['ssh_port']}"
                try:
                    seen = self.ssh(name, "cat /proc/loadavg; grep MemAvailable /proc/meminfo; pgrep -c qemu-system || true", timeout=30).stdout.split()
                    row.update(load=float(seen[0]), memory_free_mib=int(seen[6]) // 1024, guests=int(seen[8]))
                except (LabError, IndexError, ValueError) as err:
                    row["error"] = str(err)
            rows.append(row)
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, default=REPO / "build" / "lab", help="the lab's folder (default: build/lab)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="start the hosts and write the inventory")
    verbs.add_parser("down", help="end everything the lab started and remove its folder")
    verbs.add_parser("status", help="say what runs")
    verbs.add_parser("image", help="only build and cache the image and the snapshot")
    one = verbs.add_parser("ssh", help="open a shell on a host, or run a command")
    one.add_argument("host")
    one.add_argument("command", nargs=argparse.REMAINDER)
    one = verbs.add_parser("bandwidth", help="limit the migration network")
    one.add_argument("mbit", type=float, help="Mbit/s each host may send; 0 lifts the limit")
    one = verbs.add_parser("kill", help="cut a host's power (up starts it afresh)")
    one.add_argument("host")
    args = parser.parse_args()
    lab = Lab(args.dir)
    interrupts.once()
    try:
        if args.verb == "up":
            lab.up()
        elif args.verb == "down":
            lab.down()
        elif args.verb == "image":
            lab._snapshot(accelerator())
        elif args.verb == "status":
            rows = lab.status()
            for row in rows:
                if row["running"]:
                    error = f"  {row['error']}" if row.get("error") else ""
                    print(f"{row['host']}  up    ssh {row['ssh']}  guests {row['guests']}  free {row['memory_free_mib']} MiB{error}")
                else:
                    print(f"{row['host']}  down")
            return 0 if all(row["running"] and not row.get("error") for row in rows) else 1
        elif args.verb == "bandwidth":
            lab.bandwidth(args.mbit or None)
        elif args.host not in lab.state.get("hosts", {}):
            known = ", ".join(lab.state.get("hosts", {}))
            raise LabError(f"no host {args.host!r}: " + (f"the lab's hosts are {known}" if known else "the lab is down, start it with: make lab"))
        elif args.verb == "ssh":
            return subprocess.call(["ssh", "-F", str(lab.folder / "ssh_config"), args.host, *(["--", *args.command] if args.command else [])])
        elif args.verb == "kill":
            lab.kill(args.host)
    except LabError as err:
        print(f"lab: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
