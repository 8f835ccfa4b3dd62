# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module rdma_probe on a host that is made up: hosts probe each other in the lab's scenario ``rdma``."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma_host, _rdma_probe
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError
from ansible_collections.hecaton.fleet.plugins.modules import rdma_probe

PEER, LOCAL = "10.77.1.12", "10.77.1.11"
END = {"host": "hv2", "device": "siw_mig0", "netdev": "mig0", "mtu": 9000, "port_mtu": 4096, "transport": "iwarp", "read_depth": 16}


class Host:
    """What the tools say on it, and what they were told to do."""

    def __init__(self):
        self.done = []
        self.listens = None  # the description of the unit that runs
        self.began, self.lifetime = 0.0, "15min"  # when it began, and how long it lives
        self.starts = True
        self.answers = {}  # whether the peer answers: {size of the packets, None for small ones: whether}
        self.probe = {}  # what the probe finds
        self.errors = []  # what it ends with instead
        self.jobs = []
        self.transport = "iwarp"

    def run(self, *command, check=True):
        words, code, said = list(command), 0, ""
        if words[0] == "systemctl":
            if words[1] == "is-active":
                code = 0 if self.listens else 3
            elif words[1] == "show" and "Description" in words:
                said = self.listens or ""
            elif words[1] == "show":
                said = f"RuntimeMaxUSec={self.lifetime}\nActiveEnterTimestampMonotonic={int(self.began * 1e6)}\n"
            elif words[1] == "stop":
                self.done.append("stop")
                self.listens = None
        elif words[0] == "systemd-run":
            self.done.append("start")
            self.began = time.clock_gettime(time.CLOCK_MONOTONIC)
            self.listens = next(word.split("=", 1)[1] for word in words if word.startswith("--description=")) if self.starts else None
        elif words[0] == "journalctl":
            said = "listening\n" if self.listens else "can't listen on it\n"
        elif words[0] == "ping":
            size = words[words.index("-s") + 1] if "-s" in words else None
            code = 0 if self.answers.get(size) else 1
        elif words[0] == "ip":
            said = json.dumps([{"ifname": "mgmt0", "addr_info": [{"local": "10.0.2.15"}]}, {"ifname": "mig0", "addr_info": [{"local": LOCAL}]}])
        elif words[0] == "modprobe":
            self.done.append(" ".join(words))
        return subprocess.CompletedProcess(command, code, said, "")

    def devices(self):
        port = {"port": 1, "state": "ACTIVE", "netdev": "mig0"}
        return [{"name": "siw_mig0", "driver": "siw", "soft": True, "transport": self.transport, "ports": [port]}]

    def watched(self, work, seconds):
        self.jobs.append(seconds)
        for error in self.errors:
            raise error
        found = {"local": {}, "remote": {}, "latencies": [0.001] * 98 + [0.005] * 2, "bandwidth": 41.3 * (1 << 20), **self.probe}
        remote = {**END, "length": 4096, **found["remote"]}
        return {"memory": _rdma_probe.pattern("seed", remote["length"]), **found, "local": {**END, "host": "hv1", **found["local"]}, "remote": remote}


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host()
    monkeypatch.setattr(_rdma_host, "run", host.run)
    monkeypatch.setattr(_rdma_host, "devices", host.devices)
    monkeypatch.setattr(_rdma_host, "gids", lambda name, port: [{"gid": "fe80::1", "type": "RoCE v2"}])
    monkeypatch.setattr(_rdma_host, "interfaces", lambda: {"mig0": {"up": True, "mtu": 9000}, "mgmt0": {"up": True, "mtu": 1500}})
    monkeypatch.setattr(_rdma_host, "verbs_module", lambda: None)
    monkeypatch.setattr(_rdma_probe, "watched", host.watched)
    monkeypatch.setattr(rdma_probe.secrets, "token_hex", lambda count: "seed")
    monkeypatch.setattr(rdma_probe.shutil, "which", lambda name, path=None: "/usr/bin/ping")
    monkeypatch.setattr(rdma_probe, "PROGRAMS", str(tmp_path / "programs"))
    return host


@pytest.fixture
def run(host, outcome):
    def run(check=False, **args):
        return outcome(rdma_probe.main, {**args, "_ansible_check_mode": check})

    return run


def test_what_was_read_and_measured_is_returned(host, run):
    result = run(address=PEER, source=LOCAL, device="siw_mig0", timeout=7)
    assert not result["failed"] and not result["changed"] and host.jobs == [7]
    assert result["probe"] == {
        "host": "hv2", "device": "siw_mig0", "remote_device": "siw_mig0", "transport": "iwarp", "mtu": 9000, "port_mtu": 4096, "read_depth": 16,
        "verified_bytes": 4096, "latency_us": {"median": 1000.0, "p99": 5000.0, "reads": 100, "size": 4096}, "bandwidth_mib_s": 41.3,
    }  # fmt: skip


@pytest.mark.parametrize(("probe", "reason", "said"), [
    ({"remote": {"mtu": 1500}}, "mtu_mismatch", "9000 here and 1500 at 10.77.1.12"),
    ({"local": {"read_depth": 0}, "latencies": [], "memory": b""}, "read_depth", "siw_mig0 here can't have an RDMA READ"),
    ({"remote": {"read_depth": 0}, "latencies": [], "memory": b""}, "read_depth", "siw_mig0 at 10.77.1.12"),
    ({"remote": {"transport": "roce"}}, "transport_mismatch", "speaks iwarp"),
    ({"local": {"device": "rxe_mig0"}}, "wrong_device", "leads through rxe_mig0"),
    ({"memory": _rdma_probe.pattern("seed", 4096)[:100] + bytes(3996)}, "corrupt", "from byte 100 of 4096 on"),
])  # fmt: skip
def test_a_connection_that_is_no_good_is_refused(host, run, probe, reason, said):
    host.probe = probe
    result = run(address=PEER, source=LOCAL, device="siw_mig0")
    assert result["failed"] and result["reason"] == reason and said in result["msg"]


ALL, SMALL, NOTHING = {None: True, "8972": True}, {None: True}, {}


@pytest.mark.parametrize(("stage", "error", "answers", "transport", "reason", "said"), [
    ("address", "timed out", NOTHING, "iwarp", "no_route", "mig0 leads to it"),
    ("address", "No such device", ALL, "roce", "gid_mismatch", "no GID stands for 10.77.1.11; there are fe80::1"),
    ("connect", "not done in 60 s", ALL, "iwarp", "firewall", "a firewall drops it"),
    ("connect", "Connection refused", ALL, "iwarp", "refused", "port 7475"),
    ("read", "transport retry counter exceeded", SMALL, "roce", "mtu_mismatch", "those of 9000 bytes, the MTU of mig0, don't"),
    ("read", "transport retry counter exceeded", ALL, "roce", "broken", "while memory was read"),
])  # fmt: skip
def test_what_fails_is_told_by_what_plain_networking_says(host, run, stage, error, answers, transport, reason, said):
    host.errors, host.answers, host.transport = [_rdma_probe.ProbeError(stage, error)], answers, transport
    result = run(address=PEER, source=LOCAL)
    assert result["failed"] and result["reason"] == reason and said in result["msg"]


def test_an_interface_without_a_device_is_named(host, run):
    host.errors = [_rdma_probe.ProbeError("address", "No such device")]
    result = run(address="10.0.2.2", source="10.0.2.15")
    assert result["reason"] == "no_device" and "is on mgmt0, which has no RDMA device" in result["msg"]


def test_a_peer_that_no_route_leads_to_is_not_probed(host, run, monkeypatch):
    def nowhere(*_args, **_more):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(rdma_probe.socket, "getaddrinfo", nowhere)
    result = run(address="192.0.2.1")
    assert result["reason"] == "no_route" and "Network is unreachable" in result["msg"] and not host.jobs


def test_a_host_listens_once_and_ends_once(host, run):
    assert run(state="listening", address=LOCAL)["changed"]
    assert not run(state="listening", address=LOCAL)["changed"]
    assert run(state="listening", address="10.77.1.99")["changed"], "another address is another listener"
    assert run(state="absent")["changed"] and not run(state="absent")["changed"]
    assert host.done == ["modprobe rdma_ucm", "start", "stop", "modprobe rdma_ucm", "start", "stop"]


def test_a_listener_of_an_earlier_run_that_ends_soon_is_replaced(host, run):
    assert run(state="listening", address=LOCAL)["changed"]
    host.began -= 600
    assert run(state="listening", address=LOCAL)["changed"] and host.done[-3:] == ["stop", "modprobe rdma_ucm", "start"]


def test_check_mode_listens_to_nothing_and_reads_nothing(host, run):
    assert run(state="listening", address=LOCAL, check=True)["changed"] and not run(address=PEER, source=LOCAL, check=True)["changed"]
    host.listens = "RDMA probes"
    assert run(state="absent", check=True)["changed"] and host.listens
    assert not host.done and not host.jobs


def test_a_listener_that_does_not_come_up_says_what_it_said(host, run):
    host.starts = False
    result = run(state="listening", address=LOCAL)
    assert result["reason"] == "not_listening" and "can't listen on it" in result["msg"]


@pytest.mark.parametrize(("option", "value"), [("port", 0), ("port", 65536), ("length", 0), ("reads", 0), ("read_size", (1 << 26) + 1), ("lifetime", 86401)])
def test_figures_that_make_no_sense_are_refused(host, run, option, value):
    result = run(address=PEER, source=LOCAL, **{option: value})
    assert result["reason"] == "arguments" and option in result["msg"] and not host.jobs


@pytest.mark.parametrize("state", ["probed", "listening"])
def test_a_missing_package_is_told(host, run, monkeypatch, state):
    def missing():
        raise RdmaError("pyverbs is missing on this host; install the package python3-pyverbs", "not_installed")

    monkeypatch.setattr(_rdma_host, "verbs_module", missing)
    result = run(state=state, address=PEER)
    assert result["reason"] == "not_installed" and "python3-pyverbs" in result["msg"]
