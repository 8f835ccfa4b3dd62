# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module rdma_link on a host that is made up: real devices are made in the lab's scenario ``rdma``."""

from __future__ import annotations

import json
import subprocess

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma_host
from ansible_collections.hecaton.fleet.plugins.modules import rdma_link

PROTOCOLS = {"siw": "iw", "rxe": "roce"}


class Host:
    """What ``rdma`` and the tools for kernel modules do, and what they did."""

    def __init__(self):
        self.links = {}
        self.resources = {}
        self.drivers = {"siw", "rxe"}
        self.done = []

    def run(self, *command, check=True):
        words = list(command)
        said = []
        if words[0] == "modprobe" or words[1] == "link":
            self.done.append(" ".join(words))
            if words[1:3] == ["link", "add"]:
                self.links[words[3]] = (words[5], words[7])
            elif words[1:3] == ["link", "delete"]:
                del self.links[words[3]]
        elif words[3:] == ["dev", "show"]:
            said = [{"ifname": name, "protocol": PROTOCOLS[kind]} for name, (kind, netdev) in self.links.items()]
        elif words[3:] == ["link", "show"]:
            said = [{"ifname": name, "port": 1, "state": "ACTIVE", "netdev": netdev} for name, (kind, netdev) in self.links.items()]
        else:
            said = self.resources.get(words[-1], [])
        return subprocess.CompletedProcess(command, 0, json.dumps(said), "")


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host()
    (tmp_path / "settings").mkdir()
    host.settings = tmp_path / "settings"
    up = {"up": True, "mtu": 9000, "driver": None, "type": None}
    interfaces = {"mig0": up, "mig1": up, "down0": {**up, "up": False}, "mig0.7": {**up, "type": "vlan"}}
    monkeypatch.setattr(_rdma_host, "run", host.run)
    monkeypatch.setattr(_rdma_host, "interfaces", lambda: interfaces)
    monkeypatch.setattr(_rdma_host, "INFINIBAND", str(tmp_path / "infiniband"))
    monkeypatch.setattr(_rdma_host, "SETTINGS", str(host.settings))
    monkeypatch.setattr(_rdma_host, "driver_state", lambda kind: "available" if kind in host.drivers else "missing")
    return host


@pytest.fixture
def run(host, outcome):
    def run(check=False, **args):
        return outcome(rdma_link.main, {**args, "_ansible_check_mode": check})

    return run


def test_a_device_is_made_once_and_removed_once(host, run):
    made = run(netdev="mig0", type="siw")
    assert made["changed"] and made["name"] == "siw_mig0" and made["device"]["driver"] == "siw"
    assert (made["diff"]["before"], made["diff"]["after"]["name"]) == ({}, "siw_mig0")
    assert not run(netdev="mig0", type="siw")["changed"]
    removed = run(name="siw_mig0", state="absent")
    assert removed["changed"] and removed["device"] is None and removed["diff"]["after"] == {}
    assert not run(name="siw_mig0", state="absent")["changed"]
    assert host.done == ["modprobe siw", "rdma link add siw_mig0 type siw netdev mig0", "rdma link delete siw_mig0"]


def test_check_mode_says_what_it_would_do_and_does_nothing(host, run):
    made = run(netdev="mig0", type="rxe", check=True)
    assert made["changed"] and made["device"] is None and made["diff"]["after"]["name"] == "rxe_mig0"
    host.links["rxe_mig0"] = ("rxe", "mig0")
    removed = run(name="rxe_mig0", state="absent", check=True)
    assert removed["changed"] and removed["diff"]["before"]["name"] == "rxe_mig0" and removed["diff"]["after"] == {}
    assert not host.done


@pytest.mark.parametrize(("args", "reason", "said"), [
    ({"netdev": "eth9", "type": "siw"}, "no_netdev", "it has down0, mig0"),
    ({"netdev": "down0", "type": "siw"}, "netdev_down", "ip link set down0 up"),
    ({"netdev": "mig0.7", "type": "rxe"}, "unsuitable", "vlan"),
    ({"netdev": "mig1", "type": "siw", "name": "siw_mig0"}, "name_clash", "there is already a device siw_mig0"),
    ({"netdev": "mig0", "type": "siw", "name": "another"}, "exists", "can have only one"),
    ({"netdev": "mig1", "type": "rxe"}, "no_driver", "install a kernel that has it"),
    ({"name": "siw_mig0", "state": "absent"}, "in_use", "1 cm_id of qemu (pid 7)"),
    ({"state": "absent"}, "arguments", "name"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_with_its_reason(host, run, args, reason, said):
    host.links["siw_mig0"] = ("siw", "mig0")
    host.resources["cm_id"] = [{"ifname": "siw_mig0", "pid": 7, "comm": "qemu"}]
    host.drivers.discard("rxe")
    result = run(**args)
    assert result["failed"] and result["reason"] == reason and said in result["msg"]
    assert not host.done and list(host.links) == ["siw_mig0"]


def test_a_device_in_use_is_removed_by_force_only(host, run):
    host.links["siw_mig0"] = ("siw", "mig0")
    host.resources["qp"] = [{"ifname": "siw_mig0", "comm": "[remote_ram]"}]
    assert run(name="siw_mig0", state="absent")["reason"] == "in_use"
    assert run(name="siw_mig0", state="absent", force=True)["changed"] and not host.links


def test_what_the_connection_manager_was_told_goes_with_the_device(host, run):
    host.links["rxe_mig0"] = ("rxe", "mig0")
    (host.settings / "rxe_mig0").mkdir()
    assert run(name="rxe_mig0", state="absent")["changed"]
    assert not list(host.settings.iterdir())
