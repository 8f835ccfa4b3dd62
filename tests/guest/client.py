# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of valkey (or redis) that knows what each of its keys holds, and records what it was made to wait.

It needs nothing but Python. It writes its result once a second and when it ends, on SIGTERM or after --seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import random
import signal
import socket
import sys
import tempfile
import threading
import time

STEPS = 16  # buckets of the latency histogram for each doubling: a percentile is at most 4.4 % above the truth
BATCH = 200


class Broken(Exception):
    """The connection can't be used any more."""


class ErrorReply(Exception):
    """The server answered with an error."""


class Connection:
    """One connection that speaks RESP, the protocol of valkey."""

    def __init__(self, host: str, port: int, timeout: float):
        try:
            self.socket = socket.create_connection((host, port), timeout)
        except OSError as error:
            raise Broken(f"connect: {error}") from error
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def send(self, *commands) -> None:
        out = []
        for command in commands:
            out.append(b"*%d\r\n" % len(command))
            out.extend(b"$%d\r\n%b\r\n" % (len(word), word) for word in command)
        try:
            self.socket.sendall(b"".join(out))
        except OSError as error:
            raise Broken(f"send: {error}") from error

    def receive(self):
        """One reply: bytes, None or a number. An error reply is returned as an :class:`ErrorReply`."""
        try:
            line = self.file.readline()
            if not line.endswith(b"\r\n"):
                raise Broken("the server closed the connection")
            kind, rest = line[:1], line[1:-2]
            if kind == b"+":
                return rest
            if kind == b"-":
                return ErrorReply(rest.decode(errors="replace"))
            if kind == b":":
                return int(rest)
            if kind == b"$":
                length = int(rest)
                if length < 0:
                    return None
                data = self.file.read(length + 2)
                if len(data) != length + 2:
                    raise Broken("the server closed the connection")
                return data[:-2]
        except OSError as error:
            raise Broken(f"receive: {error}") from error
        except ValueError as error:
            raise Broken(f"not RESP: {error}") from error
        raise Broken(f"not RESP: {line[:40]!r}")

    def call(self, *command):
        self.send(command)
        return self.receive()


class Totals:
    """What all workers saw, together."""

    def __init__(self):
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.requests = self.failed = self.wrong = self.errors = self.broken = 0
        self.worst = 0.0
        self.histogram: dict = {}
        self.per_second: list = []
        self.worst_per_second: list = []
        self.messages: list = []

    def answered(self, seconds: float) -> None:
        bucket = max(0, math.ceil(math.log2(max(seconds * 1e6, 1)) * STEPS))
        with self.lock:
            self.requests += 1
            self.worst = max(self.worst, seconds)
            self.histogram[bucket] = self.histogram.get(bucket, 0) + 1
            at = self._second()
            self.per_second[at] += 1
            self.worst_per_second[at] = max(self.worst_per_second[at], seconds)

    def fail(self, kind: str, message: str) -> None:
        with self.lock:
            self.failed += 1
            setattr(self, kind, getattr(self, kind) + 1)
            if len(self.messages) < 20:
                self.messages.append(f"{time.monotonic() - self.began:.3f}s {message}")

    def _second(self) -> int:
        at = int(time.monotonic() - self.began)
        while len(self.per_second) <= at:
            self.per_second.append(0)
            self.worst_per_second.append(0.0)
        return at

    def percentile(self, part: float) -> float:
        """In seconds; the upper edge of the bucket, but never more than the worst."""
        left = part * self.requests
        for bucket in sorted(self.histogram):
            left -= self.histogram[bucket]
            if left <= 0:
                return min(2 ** (bucket / STEPS) / 1e6, self.worst)
        return self.worst

    def result(self) -> dict:
        with self.lock:
            self._second()
            return {
                "requests": self.requests, "failed": self.failed, "wrong": self.wrong, "errors": self.errors,
                "broken": self.broken, "worst_ms": ms(self.worst), "p50_ms": ms(self.percentile(0.5)),
                "p99_ms": ms(self.percentile(0.99)), "per_second": list(self.per_second),
                "worst_ms_per_second": [ms(s) for s in self.worst_per_second],
                "latency_ms": [[ms(2 ** (b / STEPS) / 1e6), n] for b, n in sorted(self.histogram.items())],
                "messages": list(self.messages),
            }  # fmt: skip


def ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


class Worker(threading.Thread):
    """One connection with keys of its own, so that it alone decides what they hold.

    ``versions`` has, for each key, the versions it may hold: one, or two after a write whose answer never came.
    """

    def __init__(self, number: int, options, totals: Totals, stop: threading.Event):
        super().__init__(name=f"worker-{number}", daemon=True)
        self.number, self.options, self.totals, self.stop = number, options, totals, stop
        self.random = random.Random(f"{options.seed}/{number}")
        self.count = max(1, options.keys // options.connections)
        self.versions = [{0} for _number in range(self.count)]
        self.counter = {0}
        self.connection = None
        self.since = None  # when the request under way was sent

    def key(self, index: int) -> bytes:
        return f"{self.options.name}:{self.number}:{index}".encode()

    def value(self, index: int, version: int) -> bytes:
        unit = b"%b=%d;" % (self.key(index), version)
        size = max(self.options.value_bytes, len(unit))
        return (unit * (size // len(unit) + 1))[:size]

    def connect(self) -> None:
        self.connection = Connection(self.options.host, self.options.port, self.options.timeout)

    def disconnect(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def preload(self) -> None:
        """Writes all keys. These requests are not counted; a server that isn't up yet is waited for."""
        until = time.monotonic() + self.options.wait
        while not self.stop.is_set():
            try:
                self.connect()
                if self.connection.call(b"PING") == b"PONG":
                    break
                raise Broken("the server is not ready")
            except Broken:
                self.disconnect()
                if time.monotonic() > until:
                    raise
                self.stop.wait(0.2)
        commands = [(b"SET", self.key(i), self.value(i, 0)) for i in range(self.count)]
        commands.append((b"SET", self.key(self.count), b"0"))
        for at in range(0, len(commands), BATCH):
            part = commands[at : at + BATCH]
            self.connection.send(*part)
            for reply in [self.connection.receive() for _command in part]:
                if reply != b"OK":
                    raise Broken(f"SET answered {reply!r}")

    def run(self) -> None:
        # Workers start spread over one interval, so that a set rate is even.
        interval = self.options.connections / self.options.rate if self.options.rate else 0
        due = time.monotonic() + interval * self.number / self.options.connections
        while not self.stop.is_set():
            if interval:
                if self.stop.wait(max(0.0, due - time.monotonic())):
                    break
                # What could not be sent while the guest stood still is not made up for by a burst.
                due = max(due + interval, time.monotonic())
            self.step()
        self.disconnect()

    def step(self) -> None:
        try:
            if not self.connection:
                self.connect()
            self.since = time.monotonic()
            self.request()
        except Exception as error:  # of any kind: a worker that ended unnoticed would watch nothing any more
            self.totals.fail("broken", f"{self.name}: {error if isinstance(error, Broken) else repr(error)}")
            self.disconnect()
            self.stop.wait(0.5)
        finally:
            self.since = None

    def call(self, *command):
        reply = self.connection.call(*command)
        self.totals.answered(time.monotonic() - self.since)
        if isinstance(reply, ErrorReply):
            self.totals.fail("errors", f"{self.name}: {command[0].decode()}: {reply}")
        return reply

    def request(self) -> None:
        dice = self.random.random() * 100
        index = self.random.randrange(self.count)
        if dice >= self.options.write_percent:
            self.get(index)
        elif dice < self.options.write_percent / 5:
            self.increase()
        else:
            self.set(index)

    def get(self, index: int) -> None:
        reply = self.call(b"GET", self.key(index))
        if isinstance(reply, ErrorReply):
            return
        held = [v for v in self.versions[index] if reply == self.value(index, v)]
        if held:
            self.versions[index] = set(held)
        else:
            shown = repr(reply)[:80]
            self.totals.fail("wrong", f"{self.key(index).decode()} is {shown}, not version {self.versions[index]}")

    def set(self, index: int) -> None:
        version = max(self.versions[index]) + 1
        self.versions[index].add(version)
        reply = self.call(b"SET", self.key(index), self.value(index, version))
        if reply == b"OK":
            self.versions[index] = {version}
        elif not isinstance(reply, ErrorReply):
            self.totals.fail("wrong", f"SET answered {reply!r}")

    def increase(self) -> None:
        possible = {n + 1 for n in self.counter}
        self.counter = self.counter | possible
        reply = self.call(b"INCR", self.key(self.count))
        if isinstance(reply, ErrorReply):
            return
        if reply not in possible:
            self.totals.fail("wrong", f"{self.key(self.count).decode()} counted to {reply!r}, not {sorted(possible)}")
            # It may go on from there, or as if it had not said so.
            self.counter = {n for n in (reply, *self.counter) if isinstance(n, int)}
        else:
            self.counter = {reply}


def write_json(path: pathlib.Path, data) -> None:
    """In one step: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        json.dump(data, file)
    os.chmod(name, 0o644)
    os.replace(name, path)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--name", default="client", help="name in the result, and first part of the keys")
    parser.add_argument("--result", type=pathlib.Path, required=True, metavar="FILE.json")
    parser.add_argument("--pid-file", type=pathlib.Path)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0, help="requests a second in all; 0: as fast as it goes")
    parser.add_argument("--keys", type=int, default=1000, help="written before the load starts")
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--write-percent", type=float, default=50, help="a fifth of these are INCR, the rest SET")
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a request has failed")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for the server at the start")
    parser.add_argument("--grace", type=float, default=5, help="seconds at the end for requests under way")
    parser.add_argument("--seconds", type=float, default=0, help="ends by itself; 0: at SIGTERM")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """0: every request was answered, and right; 1: some failed; 2: the server could not be loaded with keys."""
    options = arguments(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.pid_file:
        options.pid_file.write_text(f"{os.getpid()}\n")
    totals = Totals()
    workers = [Worker(n, options, totals, stop) for n in range(options.connections)]
    try:
        for worker in workers:
            worker.preload()
    except Broken as error:
        print(f"client: {options.host}:{options.port}: {error}", file=sys.stderr)
        return 2

    totals.began = time.monotonic()
    started = time.time()

    def write(finished=None):
        waiting = [w.since for w in workers if w.since is not None]
        longest = time.monotonic() - min(waiting) if waiting else 0.0
        head = {"name": options.name, "started": started, "updated": time.time(), "finished": finished}
        write_json(options.result, {**head, **totals.result(), "waiting_ms": ms(longest)})

    for worker in workers:
        worker.start()
    until = totals.began + options.seconds if options.seconds else math.inf
    write()
    while not stop.wait(min(1.0, max(0.0, until - time.monotonic()))):
        if time.monotonic() >= until:
            stop.set()
        write()
    finished = time.time()
    deadline = time.monotonic() + options.grace
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            since = worker.since
            waited = time.monotonic() - since if since is not None else 0.0
            totals.worst = max(totals.worst, waited)
            totals.fail("broken", f"{worker.name}: no answer for {waited:.1f} s when the client was stopped")
    write(finished)
    return 1 if totals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
