# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked of a host about RDMA, with tools and a sysfs that are made up."""

from __future__ import annotations

import subprocess

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma_host
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Makes a program: its output, its exit status."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_rdma_host, "MODULES", str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()

    def make(name: str, said: str = "", status: int = 0) -> None:
        (tmp_path / f"{name}.said").write_text(said)
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\" >&{2 if status else 1}; done < {tmp_path}/{name}.said\nexit {status}\n")
        program.chmod(0o755)

    return make


def test_a_driver_that_is_missing_says_where_it_comes_from(tools):
    tools("modinfo", "modinfo: ERROR: Module siw not found.\n", 1)
    for kind, said in (("siw", "build it with hecaton.fleet.kmod_build"), ("rxe", "install a kernel that has it")):
        with pytest.raises(RdmaError, match=said) as raised:
            _rdma_host.load(kind)
        assert raised.value.reason == "no_driver"


def test_a_driver_that_the_kernel_refuses_says_what_the_kernel_said(tools):
    tools("modinfo", "/lib/modules/6.12/updates/dkms/siw.ko\n")
    tools("modprobe", "modprobe: ERROR: could not insert 'siw': Key was rejected by service\n", 1)
    with pytest.raises(RdmaError, match="Key was rejected by service") as raised:
        _rdma_host.load("siw")
    assert raised.value.reason == "no_driver"


def test_a_driver_that_is_loaded_is_left_alone(tools, tmp_path):
    (tmp_path / "modules" / "rdma_rxe").mkdir()
    assert _rdma_host.driver_state("rxe") == "loaded"
    _rdma_host.load("rxe")


def test_a_tool_that_is_missing_is_told_by_its_package(monkeypatch):
    def nothing(command, **_more):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", nothing)
    with pytest.raises(RdmaError, match="rdma is not installed on this host; install the package iproute2") as raised:
        _rdma_host.rdma("dev", "show")
    assert raised.value.reason == "not_installed"


def test_what_a_tool_said_is_told_when_it_fails(tools):
    tools("rdma", "error: Invalid argument\n", 22)
    with pytest.raises(RdmaError, match=r"'rdma link add siw_mig0' failed \(exit status 22\): error: Invalid argument"):
        _rdma_host.run("rdma", "link", "add", "siw_mig0")
    tools("rdma", "no JSON\n")
    with pytest.raises(RdmaError, match="did not answer in JSON"):
        _rdma_host.rdma("link", "show")


def test_interfaces_are_what_sysfs_says(tmp_path, monkeypatch):
    monkeypatch.setattr(_rdma_host, "NET", str(tmp_path))
    for name, flags, mtu, uevent in (("lo", "0x9", 65536, ""), ("mig0", "0x1003", 9000, "INTERFACE=mig0\n"), ("mig0.7", "0x1002", 1500, "DEVTYPE=vlan\n")):
        (tmp_path / name).mkdir()
        for file, text in (("flags", flags), ("mtu", str(mtu)), ("uevent", uevent)):
            (tmp_path / name / file).write_text(f"{text}\n")
    (tmp_path / "bonding_masters").write_text("\n")
    assert _rdma_host.interfaces() == {
        "lo": {"up": True, "mtu": 65536, "driver": None, "type": "loopback"}, "mig0": {"up": True, "mtu": 9000, "driver": None, "type": None},
        "mig0.7": {"up": False, "mtu": 1500, "driver": None, "type": "vlan"},
    }  # fmt: skip


def test_gids_are_those_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(_rdma_host, "INFINIBAND", str(tmp_path))
    port = tmp_path / "rxe_mig0" / "ports" / "1"
    for index, gid, kind in ((0, "fe80::1", "RoCE v2"), (1, "0000:0000:0000:0000:0000:0000:0000:0000", None), (10, "::ffff:0a4d:010b", "RoCE v2")):
        for file, text in (("gids", gid), ("gid_attrs/types", kind), ("gid_attrs/ndevs", kind and "mig0")):
            (port / file).mkdir(parents=True, exist_ok=True)
            if text:
                (port / file / str(index)).write_text(f"{text}\n")
    assert _rdma_host.gids("rxe_mig0", 1) == [
        {"index": 0, "gid": "fe80::1", "type": "RoCE v2", "netdev": "mig0"}, {"index": 10, "gid": "::ffff:0a4d:010b", "type": "RoCE v2", "netdev": "mig0"},
    ]  # fmt: skip


def test_the_source_of_siw_is_that_of_the_kernels_series(monkeypatch):
    asked = []
    monkeypatch.setattr(_rdma_host.glob, "glob", lambda pattern: asked.append(pattern) or ["/usr/src/linux-source-6.12.tar.xz"])
    assert _rdma_host.siw_source("6.12.117+deb13-amd64") == "/usr/src/linux-source-6.12.tar.xz"
    assert asked == ["/usr/src/linux-source-6.12.tar.*"]
