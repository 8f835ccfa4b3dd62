# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client that watches a guest from outside: it must not miss a lost write, and not blame a slow answer."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import pytest

GUEST = pathlib.Path(__file__).resolve().parents[2] / "guest"
sys.path.insert(0, str(GUEST))

import client  # noqa: E402

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


class FakeServer(socketserver.ThreadingTCPServer):
    """A server of SET, GET and INCR whose ``fault(server, command)`` may answer instead, or raise to hang up."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, fault=None):
        super().__init__(("127.0.0.1", 0), Session)
        self.port = self.server_address[1]
        self.fault = fault
        self.data: dict = {}
        self.count = 0
        self.lock = threading.Lock()
        self.sessions: list = []

    def answer(self, command: list) -> bytes:
        with self.lock:
            name, *rest = command
            if name == b"PING":
                return b"+PONG\r\n"
            self.count += 1
            if self.fault and (instead := self.fault(self, command)) is not None:
                return instead
            if name == b"SET":
                self.data[rest[0]] = rest[1]
                return b"+OK\r\n"
            if name == b"INCR":
                self.data[rest[0]] = b"%d" % (int(self.data[rest[0]]) + 1)
                return b":%b\r\n" % self.data[rest[0]]
            value = self.data.get(rest[0])
            return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


class Session(socketserver.StreamRequestHandler):
    def handle(self):
        self.server.sessions.append(self.connection)
        with contextlib.suppress(OSError, HangUp):
            while header := self.rfile.readline():
                words = []
                for _number in range(int(header[1:])):
                    length = int(self.rfile.readline()[1:])
                    words.append(self.rfile.read(length + 2)[:-2])
                self.wfile.write(self.server.answer(words))


class HangUp(Exception):
    pass


@contextlib.contextmanager
def fake(fault=None):
    with FakeServer(fault) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def load(tmp_path, port, *options, seconds=0.8):
    """Runs the client to its end; gives its exit status and its result."""
    result = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable, str(GUEST / "client.py"), "--port", str(port), "--result", str(result), "--keys", "20",
            "--seconds", str(seconds), "--rate", "400", *options,
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(result.read_text()) if result.exists() else None, done.stderr


def after(count, command, reply):
    """A fault that answers ``command`` with ``reply`` once, after ``count`` requests; HangUp hangs up."""
    done = []

    def fault(server, words):
        if server.count <= count or words[0] != command or done:
            return None
        done.append(True)
        if reply is HangUp:
            raise HangUp
        return reply

    return fault


def test_a_server_that_does_right_has_no_failures(tmp_path):
    with fake() as server:
        status, result, _errors = load(tmp_path, server.port, "--connections", "3", "--name", "web", "--value-bytes", "300")
    assert status == 0
    assert result["name"] == "web"
    assert (result["failed"], result["wrong"], result["messages"]) == (0, 0, [])
    assert 50 < result["requests"] <= 340
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["worst_ms"]
    assert sum(result["per_second"]) == result["requests"] == sum(n for _bound, n in result["latency_ms"])
    assert max(result["worst_ms_per_second"]) == result["worst_ms"]
    assert result["started"] < result["finished"]
    assert sum(len(v) >= 300 for v in server.data.values()) == 18


@pytest.mark.skipif(not SERVER, reason="neither valkey-server nor redis-server is installed")
def test_a_real_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SERVER, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        status, result, errors = load(tmp_path, port, "--rate", "0", "--connections", "8", "--keys", "500")
    finally:
        server.terminate()
        server.wait()
    assert (status, errors) == (0, "")
    assert result["requests"] > 500
    assert result["failed"] == 0


@pytest.mark.parametrize(
    ("command", "reply", "kind"),
    [
        (b"GET", b"$3\r\nold\r\n", "wrong"),
        (b"GET", b"$-1\r\n", "wrong"),
        (b"GET", b":7\r\n", "wrong"),
        (b"INCR", b":100000\r\n", "wrong"),
        (b"SET", b"+QUEUED\r\n", "wrong"),
        (b"SET", b"-READONLY no\r\n", "errors"),
        (b"GET", b"-LOADING soon\r\n", "errors"),
        (b"GET", HangUp, "broken"),
        (b"GET", b"HTTP/1.1 200\r\n", "broken"),
        (b"GET", b"$abc\r\n", "broken"),
    ],
)
def test_each_fault_is_one_failed_request(tmp_path, command, reply, kind):
    with fake(after(100, command, reply)) as server:
        status, result, _errors = load(tmp_path, server.port, "--connections", "2")
    assert status == 1
    assert (result["failed"], result[kind]) == (1, 1), result["messages"]
    assert len(result["messages"]) == 1
    assert result["requests"] > 100


def test_a_write_that_is_confirmed_and_lost_is_noticed(tmp_path):
    """What a page of the guest older than its last write would look like from outside."""
    with fake(after(60, b"SET", b"+OK\r\n")) as server:
        status, result, _errors = load(tmp_path, server.port, "--connections", "1", "--keys", "2")
    assert status == 1
    assert result["wrong"] >= 1
    assert "not version" in result["messages"][0]


@pytest.mark.parametrize("applied", [True, False])
def test_a_write_whose_answer_never_came_may_be_there_or_not(tmp_path, applied):
    done = []

    def fault(server, words):
        if server.count > 60 and words[0] == b"SET" and not done:
            done.append(True)
            if applied:
                server.data[words[1]] = words[2]
            raise HangUp
        return None

    with fake(fault) as server:
        _status, result, _errors = load(tmp_path, server.port, "--connections", "1", "--keys", "2", seconds=2)
    assert (result["failed"], result["broken"], result["wrong"]) == (1, 1, 0), result["messages"]


def test_a_pause_is_waited_for_and_measured_but_no_failure(tmp_path):
    def fault(server, words):
        if server.count == 150:
            time.sleep(1)

    with fake(fault) as server:
        status, result, _errors = load(tmp_path, server.port, seconds=3)
    assert (status, result["failed"]) == (0, 0)
    assert 1000 <= result["worst_ms"] < 3000


def test_no_answer_in_time_is_a_failure(tmp_path):
    def fault(server, words):
        if server.count == 100:
            time.sleep(1.5)

    with fake(fault) as server:
        status, result, _errors = load(tmp_path, server.port, "--timeout", "0.5", "--connections", "1", seconds=3)
    assert status == 1
    assert result["broken"] >= 1
    assert "timed out" in result["messages"][0]


def test_a_server_that_went_away_fails_until_it_is_back(tmp_path):
    def fault(server, words):
        if server.count > 100:
            raise HangUp

    with fake(fault) as server:
        status, result, _errors = load(tmp_path, server.port, "--connections", "2", seconds=2)
    assert status == 1
    assert result["failed"] >= 4


def test_a_request_that_is_never_answered_counts_when_the_client_is_stopped(tmp_path):
    def fault(server, words):
        if server.count == 100:
            time.sleep(4)

    with fake(fault) as server:
        options = ("--connections", "1", "--grace", "0.3")
        status, result, _errors = load(tmp_path, server.port, *options, seconds=1)
    assert status == 1
    assert result["failed"] == 1
    assert result["worst_ms"] > 300


def test_sigterm_ends_it_with_its_result_written(tmp_path):
    result, pid = tmp_path / "r.json", tmp_path / "pid"
    with fake() as server:
        command = [
            sys.executable, str(GUEST / "client.py"), "--port", str(server.port), "--result", str(result),
            "--pid-file", str(pid), "--rate", "100",
        ]  # fmt: skip
        process = subprocess.Popen(command)
        end = time.monotonic() + 20
        while not (result.exists() and json.loads(result.read_text())["requests"] > 10):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert json.loads(result.read_text())["finished"] is None
        os.kill(int(pid.read_text()), signal.SIGTERM)
        assert process.wait(10) == 0
    assert json.loads(result.read_text())["finished"] > 0
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("r.json", "pid")] == []


def test_no_server_at_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        status, result, errors = load(tmp_path, free.getsockname()[1], "--wait", "0.5")
    assert (status, result) == (2, None)
    assert "connect" in errors


def test_percentiles():
    totals = client.Totals()
    for n in range(1, 101):
        totals.answered(n / 1000)
    assert totals.worst == 0.1
    assert 0.050 <= totals.percentile(0.5) <= 0.0525
    assert 0.099 <= totals.percentile(0.99) <= 0.1
    assert client.Totals().percentile(0.99) == 0
