# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import re

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError

# What iproute2 6.15 prints on a host of the lab with both soft devices, shortened by capabilities.
DEV = json.loads("""[{"ifindex":0,"ifname":"siw_mig0","node_type":"rnic","protocol":"iw","node_guid":"5054:00ff:fe77:0111"},
{"ifindex":1,"ifname":"rxe_mig0","node_type":"ca","protocol":"roce","node_guid":"5054:00ff:fe77:0111"},
{"ifindex":2,"ifname":"mlx5_0","node_type":"ca","protocol":"roce","fw":"16.35.2000","node_guid":"0c42:a103:0012:3456"}]""")
LINK = json.loads("""[{"ifindex":0,"ifname":"siw_mig0","port":1,"state":"ACTIVE","physical_state":"LINK_UP","netdev":"mig0","netdev_index":3},
{"ifindex":1,"ifname":"rxe_mig0","port":1,"state":"ACTIVE","physical_state":"LINK_UP","netdev":"mig0","netdev_index":3},
{"ifindex":2,"ifname":"mlx5_0","port":1,"state":"DOWN","physical_state":"DISABLED","netdev":"enp1s0","netdev_index":4}]""")
FOUND = _rdma.devices(DEV, LINK, {"mlx5_0": "mlx5_core"})
SIW, RXE, MLX = FOUND
MISSING = {"siw": "missing", "rxe": "missing"}
KERNEL = "6.12.117+deb13-amd64"


def test_devices_are_what_their_driver_and_protocol_say():
    assert [(each["driver"], each["soft"], each["transport"]) for each in FOUND] == [
        ("siw", True, "iwarp"), ("rxe", True, "roce"), ("mlx5_core", False, "roce")]  # fmt: skip
    assert SIW["ports"] == [{"port": 1, "state": "ACTIVE", "physical_state": "LINK_UP", "netdev": "mig0"}]
    assert MLX["firmware"] == "16.35.2000"


def test_a_link_that_is_there_is_left_alone():
    assert _rdma.same_link([SIW], "siw_mig0", "siw", "mig0")
    assert not _rdma.same_link([RXE], "siw_mig0", "siw", "mig0")
    assert not _rdma.same_link([], "siw_mig0", "siw", "mig0")


@pytest.mark.parametrize(("name", "kind", "netdev", "reason"), [
    ("siw_mig0", "rxe", "mig0", "name_clash"), ("siw_mig0", "siw", "eth0", "name_clash"), ("mlx5_0", "siw", "mig0", "name_clash"),
    ("siw2", "siw", "mig0", "exists"),
])  # fmt: skip
def test_a_device_in_the_way_is_named(name, kind, netdev, reason):
    with pytest.raises(RdmaError) as raised:
        _rdma.same_link(FOUND, name, kind, netdev)
    assert raised.value.reason == reason


def test_interfaces_that_are_missing_or_down():
    interfaces = {"lo": {"up": True, "mtu": 65536}, "mig0": {"up": False, "mtu": 1500}}
    assert _rdma.netdev_problem("eth9", interfaces).reason == "no_netdev"
    assert "lo, mig0" in str(_rdma.netdev_problem("eth9", interfaces))
    assert _rdma.netdev_problem("mig0", interfaces).reason == "netdev_down"
    assert _rdma.netdev_problem("lo", interfaces) is None


@pytest.mark.parametrize(("kind", "type_", "reason"), [
    ("siw", "loopback", "unsuitable"), ("rxe", "vlan", "unsuitable"), ("rxe", "loopback", None), ("siw", "vlan", None), (None, "vlan", None),
    ("siw", None, None),
])  # fmt: skip
def test_interfaces_that_a_soft_device_cannot_be_on(kind, type_, reason):
    found = _rdma.netdev_problem("x", {"x": {"up": True, "mtu": 1500, "type": type_}}, kind)
    assert (found and found.reason) == reason


def test_who_uses_a_device():
    resources = {
        "qp": [
            {"ifname": "rxe_mig0", "lqpn": 1, "type": "GSI", "comm": "ib_core"},
            {"ifname": "rxe_mig0", "lqpn": 17, "type": "RC", "pid": 42, "comm": "qemu"},
            {"ifname": "rxe_mig0", "lqpn": 18, "type": "RC", "pid": 42, "comm": "qemu"},
            {"ifname": "siw_mig0", "lqpn": 3, "type": "RC", "comm": "[remote_ram]"},
        ],
        "ctx": [{"ifname": "rxe_mig0", "pid": 42, "comm": "qemu"}],
    }
    assert _rdma.users(resources, "rxe_mig0") == ["1 ctx of qemu (pid 42)", "2 qp of qemu (pid 42)"]
    assert _rdma.users(resources, "siw_mig0") == ["1 qp of the kernel module remote_ram"]
    assert _rdma.users(resources, "mlx5_0") == []


def test_auto_takes_hardware_then_siw_then_rxe_and_says_why():
    have = {"siw": "available", "rxe": "loaded"}
    choice = _rdma.choose("auto", "enp1s0", FOUND, have, None, KERNEL)
    assert (choice["transport"], choice["device"], choice["build"]) == ("hw", "mlx5_0", None)
    choice = _rdma.choose("auto", "mig0", FOUND, have, None, KERNEL)
    assert choice["transport"] == "siw"
    assert "mig0 has no RDMA hardware, only mlx5_0 on enp1s0" in choice["why"]
    choice = _rdma.choose("auto", "mig0", [], {"siw": "missing", "rxe": "available"}, "/usr/src/linux-source-6.12.tar.xz", KERNEL)
    assert (choice["transport"], choice["build"]) == ("siw", "/usr/src/linux-source-6.12.tar.xz")
    choice = _rdma.choose("auto", "mig0", [], {"siw": "missing", "rxe": "available"}, None, KERNEL)
    assert choice["transport"] == "rxe"
    assert "linux-source-6.12" in choice["why"]


def test_a_driver_that_is_there_is_not_built_for_its_source():
    assert _rdma.choose("siw", "mig0", [], {"siw": "loaded", "rxe": "missing"}, "/usr/src/x.tar.xz", KERNEL)["build"] is None


@pytest.mark.parametrize("wanted", ["auto", "hw", "siw", "rxe"])
def test_no_transport_says_what_is_missing(wanted):
    with pytest.raises(RdmaError) as raised:
        _rdma.choose(wanted, "mig0", [], MISSING, None, KERNEL)
    assert raised.value.reason == "no_transport"
    assert {"hw": "hardware", "siw": "driver siw", "rxe": "rdma_rxe", "auto": "hardware"}[wanted] in str(raised.value)


@pytest.mark.parametrize(("card", "state", "said"), [
    ("virtio_net", None, "eth0 has no RDMA hardware, only mlx5_0 on enp1s0"),
    ("mlx5_core", "missing", f"kernel {re.escape(KERNEL)} has no mlx5_ib"),
    ("mlx5_core", "available", "its RDMA driver mlx5_ib is not loaded"),
    ("mlx5_core", "loaded", "although mlx5_ib is loaded: its parameter enable_roce may be off"),
    ("ice", "loaded", "although irdma is loaded"),
    ("i40e", "loaded", "only the X722"),
    ("cxgb4", "loaded", "although iw_cxgb4 is loaded"),
    ("bnxt_en", "loaded", "support_rdma"),
])  # fmt: skip
def test_a_card_without_an_rdma_device_is_told_from_one_that_has_no_rdma(card, state, said):
    with pytest.raises(RdmaError, match=said) as raised:
        _rdma.choose("hw", "eth0", FOUND, MISSING, None, KERNEL, card, state)
    assert raised.value.reason == "no_transport"
    choice = _rdma.choose("auto", "eth0", FOUND, {"siw": "available", "rxe": "missing"}, None, KERNEL, card, state)
    assert choice["transport"] == "siw" and re.search(said, choice["why"])


def test_every_card_that_is_known_has_what_can_keep_it_from_rdma():
    assert set(_rdma.SWITCHED_OFF) == set(_rdma.HARDWARE)


V1 = {"gid": "0000:0000:0000:0000:0000:ffff:0a00:0001", "type": "IB/RoCE v1"}
V2 = {**V1, "type": "RoCE v2"}
LINK_LOCAL = {"gid": "fe80:0000:0000:0000:5054:00ff:fe77:0111", "type": "RoCE v2"}


@pytest.mark.parametrize(("local", "gids", "said"), [
    ("10.0.0.1", [LINK_LOCAL, V1, V2], None),
    ("10.0.0.1", [LINK_LOCAL, V1], "is of the type IB/RoCE v1"),
    ("10.0.0.1", [LINK_LOCAL], "no GID stands for 10.0.0.1; there are fe80:"),
    ("10.0.0.1", [], "there are none"),
    ("fe80::5054:ff:fe77:111", [LINK_LOCAL], None),
])  # fmt: skip
def test_a_gid_that_does_not_stand_for_an_address(local, gids, said):
    found = _rdma.wrong_gid(local, gids)
    assert said in found if said else found is None


SEEN = {"peer": "10.0.0.2", "port": 7475, "local": "10.0.0.1", "netdev": "mig0", "devices": ["siw_mig0"], "ping": True, "big_ping": True, "mtu": 9000}


@pytest.mark.parametrize(("stage", "error", "seen", "reason"), [
    ("address", "No such device", {"devices": []}, "no_device"),
    ("address", "timed out", {"ping": False}, "no_route"),
    ("route", "RDMA_CM_EVENT_ROUTE_ERROR", {}, "gid_mismatch"),
    ("resources", "Failed to register MR. Errno: 12, Cannot allocate memory", {}, "resources"),
    ("connect", "Connection refused", {}, "refused"),
    ("connect", "RDMA_CM_EVENT_REJECTED", {}, "refused"),
    ("connect", "not done in 60 s", {"ping": False}, "no_route"),
    ("connect", "not done in 60 s", {}, "firewall"),
    ("connect", "not done in 60 s", {"ping": None}, "firewall"),
    ("address", "timed out", {"ping": None}, "no_route"),
    ("read", "transport retry counter exceeded", {"big_ping": False}, "mtu_mismatch"),
    ("hello", "nothing came in 15 s", {"big_ping": False}, "mtu_mismatch"),
    ("read", "transport retry counter exceeded", {}, "broken"),
    ("read", "flushed", {"big_ping": None}, "broken"),
])  # fmt: skip
def test_a_failure_is_told_by_its_cause(stage, error, seen, reason):
    assert _rdma.diagnose(stage, error, {**SEEN, **seen}).reason == reason


def test_a_gid_mismatch_says_which_gids_there_are():
    seen = {**SEEN, "devices": ["rxe_mig0"], "gids": [LINK_LOCAL]}
    found = _rdma.diagnose("address", "No such device", seen)
    assert found.reason == "gid_mismatch" and "no GID stands for 10.0.0.1; there are fe80:" in str(found)


@pytest.mark.parametrize("stage", ["address", "connect"])
def test_where_there_is_no_ping_nothing_is_said_about_its_answer(stage):
    said = str(_rdma.diagnose(stage, "timed out", {**SEEN, "ping": None}))
    assert "does not answer" not in said and "answers to ping," not in said


END = {"transport": "iwarp", "mtu": 9000, "read_depth": 16, "netdev": "mig0", "device": "siw_mig0"}


@pytest.mark.parametrize(("mine", "theirs", "reason"), [
    ({}, {}, None), ({"mtu": 1500}, {}, "mtu_mismatch"), ({}, {"transport": "roce"}, "transport_mismatch"), ({"read_depth": 0}, {}, "read_depth"),
    ({}, {"read_depth": 0}, "read_depth"),
])  # fmt: skip
def test_what_two_ends_do_not_have_alike(mine, theirs, reason):
    found = _rdma.mismatch({**END, **mine}, {**END, **theirs}, "hv2")
    assert (found and found.reason) == reason


def test_percentiles_are_values_that_were_measured():
    values = list(range(1, 101))
    assert _rdma.percentile(values, 0.5) == 50
    assert _rdma.percentile(values, 0.99) == 99
    assert _rdma.percentile(list(reversed(values)), 0.99) == 99
    assert _rdma.percentile([7], 0.5) == _rdma.percentile([7], 0.99) == 7
    assert _rdma.percentile(list(range(200)), 0.99) == 197


def test_the_first_byte_that_differs():
    assert _rdma.first_difference(b"abc", b"abc") is None
    assert _rdma.first_difference(b"abc", b"abd") == 2
    assert _rdma.first_difference(b"ab", b"abd") == 2


def test_the_series_of_a_kernel():
    assert _rdma.series(KERNEL) == "6.12"


@pytest.mark.parametrize(("span", "seconds"), [("15min", 900), ("1h 2min 3.500s", 3723.5), ("1d", 86400), ("infinity", 0), ("", 0), ("300ms", 0.3)])
def test_a_span_of_time_as_systemd_shows_it(span, seconds):
    assert _rdma.seconds(span) == pytest.approx(seconds)
