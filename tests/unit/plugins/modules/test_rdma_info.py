# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module rdma_info on a host that is made up."""

from __future__ import annotations

import builtins

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma_host
from ansible_collections.hecaton.fleet.plugins.modules import rdma_info

PORT = {"port": 1, "state": "ACTIVE", "physical_state": "LINK_UP"}
LIMITS = {"read_depth": 128, "sge_read": 1}


def device(name, driver, netdev, soft=True):
    return {"name": name, "driver": driver, "soft": soft, "transport": "iwarp", "node_guid": "0", "firmware": None, "ports": [{**PORT, "netdev": netdev}]}


@pytest.fixture
def run(monkeypatch, outcome):
    """Runs the module and returns its result; what fails has ``failed`` set."""

    interfaces = {
        "mig0": {"up": True, "mtu": 9000, "driver": "virtio_net", "type": None},
        "ens1": {"up": False, "mtu": 1500, "driver": "mlx5_core", "type": None},
    }
    monkeypatch.setattr(_rdma_host, "interfaces", lambda: interfaces)
    monkeypatch.setattr(_rdma_host, "devices", lambda: [device("siw_mig0", "siw", "mig0"), device("mlx5_0", "mlx5_core", "ens1", soft=False)])
    monkeypatch.setattr(_rdma_host, "driver_state", lambda kind: "loaded")
    monkeypatch.setattr(_rdma_host, "module_state", lambda module: "available")
    monkeypatch.setattr(_rdma_host, "siw_source", lambda kernel: None)
    rows = {"qp": [{"ifname": "siw_mig0", "comm": "[remote_ram]"}, {"ifname": "siw_mig0", "comm": "[ib_core]"}]}
    monkeypatch.setattr(_rdma_host, "resources", lambda: rows)

    def run(**args):
        return outcome(rdma_info.main, args)

    return run


def test_devices_have_the_mtu_of_their_interface_and_what_the_verbs_say(run, monkeypatch):
    monkeypatch.setattr(_rdma_host, "verbs", lambda name, ports: {"limits": LIMITS, "ports": {1: {"mtu": 4096, "max_mtu": 4096, "gids": []}}})
    siw, mlx = run()["devices"]
    assert siw["ports"] == [{**PORT, "netdev": "mig0", "netdev_mtu": 9000, "mtu": 4096, "max_mtu": 4096, "gids": []}]
    assert siw["users"] == ["1 qp of the kernel module remote_ram"] and mlx["users"] == []
    assert siw["limits"] == {**LIMITS, "memory_region_pages": 256}
    assert mlx["limits"]["memory_region_pages"] is None


def test_an_interface_that_is_down_can_be_looked_at_and_takes_no_transport(run):
    looked = run(netdev="ens1", limits=False)
    assert not looked["failed"] and looked["hardware_module"] == "mlx5_ib" and [each["name"] for each in looked["devices"]] == ["mlx5_0"]
    refused = run(netdev="ens1", transport="auto", limits=False)
    assert refused["reason"] == "netdev_down" and "ip link set ens1 up" in refused["msg"]
    assert run(netdev="mig0", transport="auto", limits=False)["choice"]["transport"] == "siw"


@pytest.mark.parametrize(("state", "said"), [("missing", "has no bnxt_re"), ("available", "bnxt_re is not loaded"), ("loaded", "support_rdma")])
def test_a_card_whose_driver_made_no_device_is_told(run, monkeypatch, state, said):
    monkeypatch.setattr(_rdma_host, "devices", lambda: [])
    monkeypatch.setattr(_rdma_host, "interfaces", lambda: {"ens1": {"up": True, "mtu": 1500, "driver": "bnxt_en", "type": None}})
    monkeypatch.setattr(_rdma_host, "module_state", lambda module: state if module == "bnxt_re" else "missing")
    result = run(netdev="ens1", transport="hw", limits=False)
    assert result["reason"] == "no_transport" and said in result["msg"]
    assert run(netdev="ens1", limits=False)["hardware_driver"] == state


@pytest.mark.parametrize(("args", "reason"), [({"netdev": "eth9"}, "no_netdev"), ({"netdev": "mig0", "transport": "hw", "limits": False}, "no_transport")])
def test_what_is_not_there_is_told_with_its_reason(run, args, reason):
    result = run(**args)
    assert result["failed"] and result["reason"] == reason


def test_a_missing_package_is_named(run, monkeypatch):
    real = builtins.__import__

    def without_pyverbs(name, *rest):
        if name.startswith("pyverbs"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyverbs)
    result = run()
    assert result["reason"] == "not_installed" and "install the package python3-pyverbs" in result["msg"]
