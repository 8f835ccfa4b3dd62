# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The two hosts that the kernel module is tested on, and moves of one file between them."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import pathlib
import queue
import re
import shlex
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "lab"), str(HERE.parent / "guest")]

import lab as lab_module

NAMES = ("hv1", "hv2")
PROGRAMS = "/root/kmod"
LOAD = f"insmod {PROGRAMS}/remote_ram.ko && mount -t remote_ram none /run/remote_ram -o size=2G"
UNLOAD = "umount /run/remote_ram && rmmod remote_ram"
PATIENCE = 180  # seconds after which a host that doesn't answer counts as gone

#: How many times longer than usual all takes on the hosts: 1, or SLOW on the debug kernel. Set before anything else is done.
slowness = 1
SLOW = 4

#: What the module, or the agent, takes for a time when it isn't told, by order.
UNTOLD = {"session": {"connect_ms": 10000, "heartbeat_ms": 1000, "dead_ms": 5000}, "switch": {"ms": 10000}, "clean": {"seconds": 20}}

NONE, LISTENING, CONNECTING, CONNECTED, PRECOPY, SWITCHING, POSTCOPY, RECONNECTING, COMPLETE, FAILED, LOST = range(11)
REASONS = "none version token uuid size busy state protocol unreachable timeout disconnected aborted peer_aborted no_memory device".split()
TRACING = "/sys/kernel/tracing"
BANDWIDTH, BUSY_POLL_US, BATCH_PAGES, BACKGROUND = 1, 2, 3, 4
MIB = 1 << 20

#: The migration network as it has to be, whatever a test has left.
JOIN = "nft delete table inet cut 2>/dev/null; tc qdisc del dev mig0 root 2>/dev/null; ip link set mig0 up"

#: What the kernel says only when something is wrong with it.
ALARMS = ("BUG:", "WARNING:", "Oops", "Call Trace", "general protection", "hung_task", "blocked for more than", "soft lockup", "lockdep",
          "possible recursive", "inconsistent lock", "refcount_t", "RESTRACK", "still has", "Bad page", "list_add corruption", "list_del corruption",
          "use-after-free", "KASAN", "kmemleak", "UBSAN", "detected stalls", "self-detected stall", "Objects remaining",
          "lines of the kernel's log were lost")  # fmt: skip


def slow(value):
    """A time, or a bound of one, for hosts as slow as these."""
    return value * slowness


def in_time(do, order):
    """An order with all its times for hosts as slow as these."""
    if slowness == 1:
        return order
    told = {**UNTOLD.get(do, {}), **order}
    return {key: slow(value) if key in ("ms", "seconds") or key.endswith("_ms") else value for key, value in told.items()}


#: Reads pages through another process's memory, where it has mapped a file of ours, and says how many bytes came.
READER = """
import os, sys
pid, name, count, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
first = next(line for line in open(f"/proc/{pid}/maps") if "remote_ram" in line or name in line).split("-")[0]
memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
print(sum(len(os.pread(memory, 4096, int(first, 16) + page * 4096)) for page in range(0, count, step)))
"""


class HostGone(Exception):
    """A host that doesn't answer any more; its console may say why."""


class Refused(OSError):
    """A call that the module refused."""

    def __init__(self, answer):
        super().__init__(answer["errno"], answer["error"])
        self.reason = REASONS[answer["reason"]] if answer.get("reason") is not None else None


class Future:
    """A call under way."""

    def __init__(self, host, order, patience):
        self.host, self.order, self.patience, self.answers = host, order, patience, queue.Queue()

    def __call__(self):
        try:
            answer = self.answers.get(timeout=self.patience)
        except queue.Empty:
            raise HostGone(f"{self.host.name} did not answer {self.order} in {self.patience} s\n{self.host.stacks()}") from None
        if "is" in answer:
            return answer["is"]
        if answer["errno"] == -1:
            raise AssertionError(f"{self.host.name}: {answer['error']}")
        raise Refused(answer)

    def done(self) -> bool:
        return not self.answers.empty()


class Host:
    """A host and the agent on it."""

    def __init__(self, lab, name):
        self.lab, self.name = lab, name
        self.address = lab_module.migration_address(name)
        self.agent = self.transport = self.peer = None
        self.cut = False  # by cut(), below

    def connect(self):
        self.agent = subprocess.Popen(
            ["ssh", "-F", str(self.lab.folder / "ssh_config"), "-S", "none", self.name, "--", f"exec python3 -u {PROGRAMS}/agent.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.waiting, self.count = {}, itertools.count()
        threading.Thread(target=self._listen, args=(self.agent, self.waiting), daemon=True).start()

    def _listen(self, agent, waiting):
        for line in agent.stdout:
            answer = json.loads(line)
            waiting.pop(answer["id"]).answers.put(answer)

    def disconnect(self):
        if self.agent:
            self.agent.stdin.close()
            try:
                self.agent.wait(slow(20))
            except subprocess.TimeoutExpired:
                self.agent.kill()
            self.agent = None

    def start(self, do, **order):
        """Begins a call; what it returns is called for the result."""
        order = in_time(do, order)
        told = order["ms"] / 1000 + slow(30) if do == "wait" else 0
        future = Future(self, do, max(slow(PATIENCE), told))
        number = next(self.count)
        self.waiting[number] = future
        try:
            self.agent.stdin.write(json.dumps({"id": number, "do": do, **order}) + "\n")
        except OSError as err:
            raise HostGone(f"{self.name}: {err}") from err
        return future

    def do(self, do, **order):
        return self.start(do, **order)()

    def stacks(self):
        """Where in the kernel the threads of our programs and of the module wait; asked past the agent, which may be what doesn't answer."""
        script = (
            "for t in /proc/[0-9]*/task/*; do case $(cat $t/comm 2>/dev/null) in ram|hostile|fault_load|rram*|qemu*|CPU*) "
            'echo "== ${t##*/} $(cat $t/comm) $(cut -d" " -f3 $t/stat) $(cat $t/syscall)"; cat $t/stack;; esac; done 2>/dev/null; dmesg | tail -n 20'
        )
        try:
            return self.lab.ssh(self.name, f"timeout {slow(60)} sh -c {shlex.quote(script)}", timeout=slow(90)).stdout
        except lab_module.LabError as err:
            return f"(and its threads could not be looked at: {err})"

    def sh(self, script, check=True):
        return self.do("sh", script=script, check=check)

    def program(self, verb, *arguments, cgroup=None):
        return Program(self, [f"{PROGRAMS}/ram", verb, *map(str, arguments)], cgroup)

    def reader(self, pid, file, step):
        """A command that reads every so many pages of a file through a process that has it mapped, and how many bytes it has to find."""
        self.do("put", path=f"{PROGRAMS}/reader.py", data=base64.b64encode(READER.encode()).decode())
        return f"python3 {PROGRAMS}/reader.py {pid} {file.name} {file.pages} {step}", str(len(range(0, file.pages, step)) * 4096)

    def hostile(self):
        """A peer that does what it is told; see kmod-src/tests/hostile.c."""
        program = Program(self, [f"{PROGRAMS}/hostile", str(slow(5000))])
        assert program.hear() == {"started": True}
        return program

    def install(self, folder, transport):
        """Loads the modules and mounts the file system, with one kind of device on the migration network."""
        self.transport, self.cut = transport, False
        prepare = f"umount /run/remote_ram 2>/dev/null; rmmod remote_ram 2>/dev/null; mkdir -p {PROGRAMS} /run/remote_ram; cat {PROGRAMS}/from 2>/dev/null"
        there = self.lab.ssh(self.name, prepare, check=False, timeout=slow(300)).stdout
        # A folder's name says what is in it. It is noted when all of it is there, and forgotten while that changes.
        files = {p.name: p for p in folder.iterdir() if p.is_file() and p.name != "manifest.json"}
        tasks = []
        if "modules.tar" in files:  # of a kernel that the host's image doesn't know
            tasks = [f"tar -C / -xf {PROGRAMS}/modules.tar", "depmod"] if there != folder.name else []
            tasks += ["modprobe kvm_amd", "echo clear > /sys/kernel/debug/kmemleak"]
        if there == folder.name:
            files = {}
        for name, path in {**files, "agent.py": HERE / "agent.py"}.items():
            self.lab.put(self.name, path, f"{PROGRAMS}/{name}", before=f"rm -f {PROGRAMS}/from {PROGRAMS}/{name}", timeout=slow(120))
        tasks += [f"printf %s {folder.name} > {PROGRAMS}/from"]
        self.lab.ssh(self.name, " && ".join(tasks), timeout=slow(300))
        # One that is loaded may be another one.
        driver = f"{{ test ! -e /sys/module/siw || rmmod siw; }} && insmod {PROGRAMS}/siw.ko" if transport == "siw" else "modprobe rdma_rxe"
        self.lab.ssh(
            self.name,
            f"{JOIN}; chmod +x {PROGRAMS}/*; modprobe -a ib_core iw_cm ib_uverbs libcrc32c rdma_ucm rdma_cm || exit 1; "
            f"for d in $(ls /sys/class/infiniband 2>/dev/null); do rdma link delete $d; done; "
            f"{driver} && rdma link add {transport}0 type {transport} netdev mig0 || exit 1; "
            f"{LOAD} || exit 1; "
            # A task that waits for its peer on purpose may be killed, so it isn't counted as hung; these seconds find those that can't.
            f"sysctl -q kernel.hung_task_timeout_secs={slow(60)} kernel.hung_task_warnings=-1 kernel.panic_on_oops=0 2>/dev/null; "
            # The kernel's own patience with a CPU, of which a slow host has less.
            f"sysctl -q kernel.watchdog_thresh={slow(10)}; echo {slow(21)} > /sys/module/rcupdate/parameters/rcu_cpu_stall_timeout",
            timeout=slow(300),
        )
        self.connect()

    def leaks(self):
        """Objects that nothing points to, each with where it was made, on a kernel that looks for such; None on one that doesn't.

        It says so in its log too, which is for nobody else.
        """
        # Twice, and not at once: what has been freed by RCU meanwhile is no leak. A detector that has switched itself off refuses.
        scan = "cd /sys/kernel/debug && { test -e kmemleak || exit 0; } && echo scan > kmemleak && sleep 8 && echo scan > kmemleak && cat kmemleak && echo end"
        said = self.sh(scan)
        return said.split("unreferenced object")[1:] if said else None

    def unload(self):
        """Unloads the module and ends the agent. :returns: what the kernel had to say about it."""
        self.sh(UNLOAD)
        time.sleep(0.2)
        said = self.do("log")
        self.disconnect()
        return said

    def uninstall(self):
        """The same, for those who have not looked at the log before."""
        self.do("log")
        return self.unload()


def made_by(lost: str) -> str:
    """What kmemleak tells of an object in a line: its size, who asked for it, and the functions that made it, the innermost first."""
    what, _by, stack = lost.partition("backtrace")
    size, who = re.search(r"\(size (\d+)\)", what), re.search(r'comm "(.*?)"', what)
    functions = ["".join(found) for found in re.findall(r"(\S+)\+0x\S+( \[\w+\])?$", stack, re.MULTILINE)]
    return f"{size.group(1)} bytes, by {who.group(1)}: {' < '.join(functions)}"


class Program:
    """A program on a host that says what it does in lines of JSON."""

    def __init__(self, host, argv, cgroup=None):
        self.host = host
        self.pid = host.do("spawn", argv=argv, cgroup=cgroup)

    def tell(self, line):
        return self.host.do("tell", pid=self.pid, line=line)

    def tell_later(self, line):
        return self.host.start("tell", pid=self.pid, line=line)

    def hear(self):
        return self.host.do("hear", pid=self.pid)

    def finish(self):
        return self.host.do("finish", pid=self.pid)

    def kill(self, number=9):
        self.host.do("kill", pid=self.pid, number=number)

    def reap(self, seconds):
        return self.host.do("reap", pid=self.pid, seconds=seconds)


class File:
    """A RAM file that is on either host, with the shadow that says what has to be in it."""

    def __init__(self, hosts, name, mib=16):
        self.source, self.dest = hosts
        self.name, self.size, self.port = name, int(mib * MIB), 0
        self.path, self.shadow = f"/run/remote_ram/{name}", f"/dev/shm/{name}"

    @property
    def pages(self):
        return self.size // 4096

    def create(self, *hosts):
        for host in hosts or (self.source, self.dest):
            host.do("create", name=self.name, size=self.size)
        return self

    def fill(self):
        program = self.source.program("fill", self.path, self.shadow)
        assert program.finish()["status"] == 0
        return self

    def src(self, do, **order):
        return self.source.do(do, name=self.name, **order)

    def dst(self, do, **order):
        return self.dest.do(do, name=self.name, **order)

    def attach(self, **options):
        self.port = self.dst("session", what="attach", **{"address": "0.0.0.0", "port": 0, **options})
        return self.port

    def export(self, **options):
        options = {"address": self.dest.address, "port": self.port, **options}
        return self.src("session", what="export", **options)

    def connect(self, **options):
        self.attach(**options)
        self.export(**options)
        return self

    def precopy(self, ms=400, **options):
        self.src("precopy", ms=ms, **options)
        state, reason = self.src("wait", states=[CONNECTED], ms=120000)
        assert state == CONNECTED, (state, REASONS[reason])

    def run(self, ops, threads=3, host=None):
        program = (host or self.source).program("run", self.path, self.shadow, threads, ops)
        assert program.hear() == {"started": True}
        return program

    def switch(self, **options):
        """Switches, and takes the shadow along."""
        done = self.src("switch", **options)
        self.take_shadow()
        return done

    def leave_dirty(self):
        """Has pages that the destination lacks, however much went ahead and however fast."""
        writer = self.run("w", threads=1)
        time.sleep(slow(0.3))
        assert writer.tell("stop")["bad"] == 0
        writer.kill()
        assert writer.reap(30) == -9

    def take_shadow(self):
        self.dest.do("put", path=self.shadow, data=self.source.do("get", path=self.shadow))

    def check(self, how="map", threads=4, host=None, later=False):
        """Compares all pages with the shadow."""
        program = (host or self.dest).program("check", self.path, self.shadow, threads, how)
        return program if later else self.judge(program, threads)

    def judge(self, program, threads=4):
        found = program.finish()
        assert found["status"] == 0, found
        last = found["said"][-1]
        looked = self.pages * threads
        assert last["bad"] == 0 and last["pages"] == self.pages and last["looked"] in (looked, self.pages * threads), found
        return last

    def complete(self):
        for side in (self.dest, self.source):
            assert side.do("wait", name=self.name, states=[COMPLETE], ms=120000) == [COMPLETE, 0]
        return self.dst("stats")

    def release(self):
        self.src("release")
        self.dst("release")

    def turn_round(self):
        """What was the destination is the next source."""
        self.source, self.dest = self.dest, self.source

    def states(self):
        return self.src("stats")["state"], self.dst("stats")["state"]


def wait_for(what, seconds=60):
    """Until something is so: a generous limit, that judges nothing but that it ever comes."""
    deadline, pause = time.monotonic() + slow(seconds), 0.05
    while not what():
        assert time.monotonic() < deadline, "it never came"
        # To look is work as well, for the host that is waited for.
        time.sleep(pause)
        pause = min(2 * pause, slow(0.2))


def two_hosts(lab):
    """Has two hosts of the lab up, and no more: three and two cores are too many."""
    if not all(lab.running(name) for name in NAMES):
        lab.up()
    for name in lab_module.HOSTS:
        if name not in NAMES and lab.running(name):
            lab.kill(name)


def slow_down(host, us):
    """Each demand READ of a host begins so much later, so that a test finds some to come; the judge ends it."""
    host.sh(f"echo {slow(us)} > /sys/kernel/debug/remote_ram/inject_delay_us")


def dropping(*ways, seconds=None):
    """A command that drops what comes or goes on the migration network.

    :param seconds: after so long the kernel lets all pass again, however long it takes until the next command is run.
    """
    rules = ["add table inet cut"]
    if seconds:
        rules += ["add set inet cut links { type ifname; flags timeout; }", f"add element inet cut links {{ mig0 timeout {round(seconds * 1000)}ms }}"]
    for way in ways:
        match = f"{'iifname' if way == 'input' else 'oifname'} {'@links' if seconds else 'mig0'}"
        rules += [f"add chain inet cut {way} {{ type filter hook {way} priority 0; }}", f"add rule inet cut {way} {match} drop"]
    return f"nft '{'; '.join(rules)}'"


def ways_to_cut(host, how, seconds=None):
    """What cuts the migration network of a host: on which hosts, how it begins and how it ends.

    With rxe it is always cut where packets come in, on both hosts: when the sending host itself drops a packet of a queue pair that
    has none on its way, rxe waits for ever for that packet to be freed, and the queue pair of the connection manager is one.

    :param seconds: until it ends by itself, if packets are dropped.
    """
    if host.transport == "rxe":
        return [host, host.peer], dropping("input", seconds=seconds), "nft delete table inet cut"
    begin, end = {
        "drop": (dropping("input", "output", seconds=seconds), "nft delete table inet cut"),
        "loss": ("tc qdisc replace dev mig0 root netem loss 100%", "tc qdisc del dev mig0 root"),
        "down": ("ip link set mig0 down", "ip link set mig0 up"),
    }[how]
    return [host], begin, end


@contextlib.contextmanager
def cut(host, how, seconds=None):
    """The migration network is cut on a host while this lasts, and for as long as the commands take: seconds, on slow hosts.

    :param seconds: if packets are dropped: so long, and hardly longer, whatever the commands take; nor does this end before.
    """
    hosts, begin, end = ways_to_cut(host, how, seconds)
    for each in hosts:
        each.cut = True
    lab_module.each(lambda each: each.sh(begin), hosts)
    over = time.monotonic() + (seconds or 0)
    try:
        yield
    finally:
        time.sleep(max(0, over - time.monotonic()))
        for each in hosts:
            each.sh(end)
            each.cut = False


@contextlib.contextmanager
def traced(hosts):
    """The module's tracepoints are on, on some hosts. What is yielded tells a host's trace."""
    try:
        for host in hosts:
            host.sh(f"cd {TRACING} && echo 4096 > buffer_size_kb && echo > trace && echo 1 > tracing_on && echo 1 > events/remote_ram/enable")
        yield lambda host: host.sh(f"cat {TRACING}/trace")
    finally:
        for host in hosts:
            host.sh(f"cd {TRACING} && echo 0 > events/remote_ram/enable && echo > trace")


def console(lab, name):
    return (pathlib.Path(lab.state["run"]) / f"{name}.console").read_text(errors="replace")[-4000:]


def decode(data):
    return base64.b64decode(data)


__all__ = [name for name in dir() if not name.startswith("_")]
