# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on a host: does what lines of JSON say, each in a thread of its own, and answers with lines of JSON.

{"id": 1, "do": "NAME", ...} is answered by {"id": 1, "is": ...}, or {"id": 1, "errno": .., "error": .., "reason": ..}.
"""

from __future__ import annotations

import base64
import fcntl
import glob
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

MOUNT = "/run/remote_ram"
#: What tests set, as it is otherwise.
SET = (
    ("/sys/kernel/debug/remote_ram/inject_delay_us", "0"), ("/sys/kernel/debug/remote_ram/inject_fail", "0"),
    ("/sys/module/remote_ram/parameters/busy_poll_us", "0"), ("/sys/module/remote_ram/parameters/sink_keys", "N"),
)  # fmt: skip
SESSION, PRECOPY, SWITCH, WAIT, TUNE, PROCESS = "<II16s16s128sIIIIQII", "<IIIIQQ", "<IIIIQQ", "<IIIIII", "<IIQ", "<II"
STATS = "<IIIIII29Q64Q"
NAMES = (
    "size abi role state reason rounds pages pages_ahead pages_zero pages_demand pages_bubble pages_background pages_stale "
    "pages_missing pages_dirty pages_lost bytes_ahead bytes_after late_writes faults_nowait faults_retry faults_plain "
    "faults_joined faults_poison wait_ns_total wait_ns_max read_ns_total reconnects keys keys_retired switch_us precopy_us "
    "remaining_us rate memory"
).split()


def number(direction: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xB6 << 8 | nr


CALLS = {
    "export": number(3, 0x10, struct.calcsize(SESSION)), "attach": number(3, 0x11, struct.calcsize(SESSION)),
    "precopy": number(1, 0x12, struct.calcsize(PRECOPY)), "switch": number(3, 0x13, struct.calcsize(SWITCH)),
    "wait": number(3, 0x14, struct.calcsize(WAIT)), "stats": number(3, 0x15, struct.calcsize(STATS)),
    "tune": number(1, 0x16, struct.calcsize(TUNE)), "abort": number(0, 0x17, 0), "release": number(0, 0x18, 0),
    "take_back": number(0, 0x19, 0), "allow_collapse": number(1, 0x1A, struct.calcsize(PROCESS)),
}  # fmt: skip


class Reason(OSError):
    """A call that failed, with the reason that the kernel gave."""

    def __init__(self, err, reason):
        super().__init__(err.errno, err.strerror)
        self.reason = reason


def call(fd: int, name: str, form: str, *values) -> tuple:
    data = bytearray(struct.pack(form, struct.calcsize(form), *values))
    try:
        fcntl.ioctl(fd, CALLS[name], data, True)
    except OSError as err:
        at = {SESSION: -2, SWITCH: 3, WAIT: 4}.get(form)
        raise Reason(err, struct.unpack(form, data)[at] if at is not None else None) from err
    return struct.unpack(form, data)


class Agent:
    def __init__(self):
        self.fds: dict = {}
        self.programs: dict = {}
        self.kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.kmsg, 0, os.SEEK_END)

    # -- files and sessions: a file is known by its name on the mount ------------------------------------------------

    def file(self, name: str) -> int:
        if name not in self.fds:
            self.fds[name] = os.open(f"{MOUNT}/{name}", os.O_RDWR)
        return self.fds[name]

    def create(self, name, size):
        fd = os.open(f"{MOUNT}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.fds[name] = fd
        os.ftruncate(fd, size)

    def close(self, name):
        os.close(self.fds.pop(name))

    def unlink(self, name):
        os.unlink(f"{MOUNT}/{name}")

    def session(
        self, name, what, address, port=7000, token="t" * 16, uuid="u" * 16,
        connect_ms=0, reconnect_ms=0, heartbeat_ms=0, dead_ms=0, bandwidth=0,
    ):  # fmt: skip
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # An IPv6 address comes after a flow label.
        sockaddr = struct.pack("<H", family) + struct.pack(">H", port) + bytes(4 if ":" in address else 0) + socket.inet_pton(family, address)
        sockaddr = sockaddr.ljust(128, b"\0")
        times = connect_ms, reconnect_ms, heartbeat_ms, dead_ms
        found = call(self.file(name), what, SESSION, 0, uuid.encode(), token.encode(), sockaddr, *times, bandwidth, 0, 0)
        return struct.unpack(">H", found[4][2:4])[0]

    def precopy(self, name, ms, stop=0, bandwidth=0):
        call(self.file(name), "precopy", PRECOPY, 0, ms, 0, stop, bandwidth)

    def switch(self, name, ms=0):
        found = call(self.file(name), "switch", SWITCH, 0, ms, 0, 0, 0)
        return {"dirty": found[4], "us": found[5]}

    def wait(self, name, states, ms):
        found = call(self.file(name), "wait", WAIT, sum(1 << s for s in states), ms, 0, 0, 0)
        return list(found[3:5])

    def tune(self, name, what, value):
        call(self.file(name), "tune", TUNE, what, value)

    def stats(self, name):
        found = call(self.file(name), "stats", STATS, *[0] * 98)
        return {**dict(zip(NAMES, found[:35], strict=True)), "wait_hist": found[35:67], "read_hist": found[67:]}

    def abort(self, name):
        fcntl.ioctl(self.file(name), CALLS["abort"])

    def release(self, name):
        fcntl.ioctl(self.file(name), CALLS["release"])

    def take_back(self, name):
        fcntl.ioctl(self.file(name), CALLS["take_back"])

    def allow_collapse(self, name, pid):
        call(self.file(name), "allow_collapse", PROCESS, pid)

    def fuzz(self, name, seed, count):
        """Calls with arguments at random; says how many were refused, by error."""
        dice, fd, seen = random.Random(seed), self.file(name), {}
        forms = {"export": SESSION, "attach": SESSION, "precopy": PRECOPY, "switch": SWITCH, "wait": WAIT, "stats": STATS, "tune": TUNE,
                 "allow_collapse": PROCESS}  # fmt: skip
        for _turn in range(count):
            what = dice.choice(list(CALLS))
            form = forms.get(what, "<")
            size = struct.calcsize(form)
            data = bytearray(dice.choice((bytes(size), dice.randbytes(size))))
            for _turn in range(dice.randrange(4)):
                if size:
                    struct.pack_into("<I", data, 4 * dice.randrange(size // 4), dice.choice((0, 1, 2, size, 0xFFFFFFFF, 0x80000000, dice.getrandbits(32))))
            if size and dice.random() < 0.7:
                struct.pack_into("<I", data, 0, size)
            if what == "wait":
                struct.pack_into("<I", data, 8, dice.randrange(3))  # not for ever
            if what in ("export", "attach") and dice.random() < 0.5:
                struct.pack_into("<I", data, 4, 0)
                port, address = dice.choice((0, 1, 7009)), dice.choice(("127.0.0.1", "0.0.0.0", "255.255.255.255"))
                data[40:168] = struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(address) + bytes(120)
                struct.pack_into("<I", data, 168, dice.choice((1, 50)))
                data[184:] = bytes(len(data) - 184)
            command = CALLS[what] if dice.random() < 0.9 else number(dice.randrange(4), dice.randrange(0x0F, 0x1C), dice.choice((0, size, 4096)))
            try:
                fcntl.ioctl(fd, command, data.ljust(8192, b"\0"), True)
                key = "ok"
            except OSError as err:
                key = os.strerror(err.errno)
            except ValueError:
                key = "not sent"
            seen[key] = seen.get(key, 0) + 1
        return seen

    # -- programs ----------------------------------------------------------------------------------------------------

    def spawn(self, argv, cgroup=None):
        before = None
        if cgroup:
            def before():
                with open(f"{cgroup}/cgroup.procs", "w") as procs:
                    procs.write(str(os.getpid()))
        program = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, preexec_fn=before)
        self.programs[program.pid] = program
        return program.pid

    def tell(self, pid, line):
        """Gives a program a line and returns its answer."""
        self.programs[pid].stdin.write(line + "\n")
        return self.hear(pid)

    def hear(self, pid):
        line = self.programs[pid].stdout.readline()
        if not line:
            return None
        try:
            return json.loads(line)
        except ValueError:
            return {"text": line.strip()}

    def finish(self, pid):
        """Lets a program come to its end and returns all it still had to say."""
        program = self.programs.pop(pid)
        said = program.communicate()[0]
        return {"status": program.returncode, "said": [json.loads(line) if line.startswith("{") else {"text": line} for line in said.splitlines()]}

    def kill(self, pid, number):
        os.kill(pid, number)

    def reap(self, pid, seconds):
        """Whether a program that was told to end has ended. A task that is stuck has not."""
        try:
            return self.programs[pid].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def sh(self, script, check=True):
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise OSError(done.returncode, f"{script[:200]!r}: {(done.stderr or done.stdout).strip()[-400:]}")
        return done.stdout

    def get(self, path):
        with open(path, "rb") as file:
            return base64.b64encode(file.read()).decode()

    def put(self, path, data):
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def qmp(self, path, command, **arguments):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            stream = sock.makefile("rw")
            stream.readline()
            for execute, given in (("qmp_capabilities", {}), (command, arguments)):
                stream.write(json.dumps({"execute": execute, "arguments": given}) + "\n")
                stream.flush()
                answer = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(stream.readline())
        if "error" in answer:
            raise OSError(71, answer["error"]["desc"])
        return answer["return"]

    # -- the host ----------------------------------------------------------------------------------------------------

    def log(self):
        """What the kernel has logged since the last call."""
        lines = []
        while True:
            try:
                lines.append(os.read(self.kmsg, 8192).decode(errors="replace").split(";", 1)[1].split("\n", 1)[0])
            except BlockingIOError:
                return lines
            except OSError:  # lines were lost: EPIPE
                lines.append("(lines of the kernel's log were lost)")

    def state(self):
        """What must not be left behind."""
        resources = {}
        for entry in json.loads(subprocess.run(["rdma", "-j", "resource", "show"], capture_output=True, text=True, check=False).stdout or "[]"):
            resources[entry["ifname"]] = {k: v for k, v in entry.items() if k in ("qp", "mr", "pd", "cq", "cm_id")}
        threads, stuck = [], []
        for path in glob.glob("/proc/[0-9]*/stat"):
            try:
                with open(path) as stat:
                    text = stat.read()
            except OSError:
                continue
            name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :]
            if name.startswith("rram/"):
                threads.append(name)
            elif rest[0] == "D" and name.startswith(("ram", "qemu", "python3")):
                stuck.append(name)
        files = sorted(os.listdir(MOUNT)) if os.path.ismount(MOUNT) else None
        return {"rdma": resources, "threads": threads, "stuck": stuck, "files": files, "hurt": self.hurt(), "lockdep": self.lockdep()}

    def hurt(self):
        """Whether the kernel has had a bad page, an oops, a warning or a lockup since it booted, whatever became of its log."""
        with open("/proc/sys/kernel/tainted") as tainted:
            return int(tainted.read()) & (1 << 5 | 1 << 7 | 1 << 9 | 1 << 14)

    def lockdep(self):
        """Whether lockdep still looks: it stops after what it reports, and when it has no room left. None without lockdep."""
        try:
            with open("/proc/lockdep_stats") as stats:
                return int(next(line for line in stats if "debug_locks:" in line).split()[-1])
        except FileNotFoundError:
            return None

    def clean(self, seconds=20):
        """Ends what a test left: what it set and its shadows, then programs, then sessions, then files."""
        for path, value in SET:
            with open(path, "w") as file:
                file.write(value)
        for path in glob.glob("/dev/shm/*.ram"):
            os.unlink(path)
        for pid, program in list(self.programs.items()):
            for path in (f"/proc/{pid}/cgroup",):
                if not os.path.exists(path):
                    break
                program.send_signal(signal.SIGCONT)
                program.kill()
            try:
                program.wait(seconds)
            except subprocess.TimeoutExpired:
                continue  # it is seen as stuck
            del self.programs[pid]
        for name in sorted(os.listdir(MOUNT)):
            fd = self.file(name)
            for what in ("abort", "take_back", "release"):
                try:
                    fcntl.ioctl(fd, CALLS[what])
                except OSError:
                    pass
            self.unlink(name)
        for name in list(self.fds):
            self.close(name)


def main():
    agent, lock = Agent(), threading.Lock()

    def work(order):
        answer = {"id": order.pop("id")}
        name = order.pop("do")
        try:
            answer["is"] = getattr(agent, name)(**order)
        except OSError as err:
            answer.update(errno=err.errno or -1, error=f"{name}: {err.strerror or err}", reason=getattr(err, "reason", None))
        except Exception as err:
            answer.update(errno=-1, error=f"{name}: {err!r}")
        with lock:
            print(json.dumps(answer), flush=True)

    for line in sys.stdin:
        threading.Thread(target=work, args=(json.loads(line),), daemon=True).start()
    time.sleep(0.1)
    os._exit(0)


if __name__ == "__main__":
    main()
