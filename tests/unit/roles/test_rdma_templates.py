# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role rdma writes to a host. Of a network card there is only this: the lab has none."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess

import jinja2
import jinja2.nativetypes
import pytest
import yaml
from ansible.plugins.filter import core, mathstuff

TEMPLATES = next(folder for folder in pathlib.Path(__file__).resolve().parents if (folder / "roles" / "rdma" / "tasks").is_dir()) / "roles/rdma/templates"
SIW = {
    "rdma_kind": "siw", "rdma_roce": False, "rdma_device": "siw_mig0", "rdma_link": "mig0", "rdma_netdev": "mig0", "rdma_mtu": 0, "rdma_wireguard": False,
    "rdma_wireguard_netdev": "hecaton0",
}  # fmt: skip
RXE = {**SIW, "rdma_kind": "rxe", "rdma_roce": True, "rdma_device": "rxe_mig0"}
MLX5 = {**SIW, "rdma_kind": "hw", "rdma_roce": True, "rdma_device": "mlx5_0", "rdma_mtu": 4200}
CXGB4 = {**SIW, "rdma_kind": "hw", "rdma_device": "cxgb4_0"}


def render(name: str, **variables) -> str:
    """A template as Ansible's module renders it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update({"regex_replace": core.regex_replace, "difference": mathstuff.difference, "bool": core.to_bool})
    fixed = yaml.safe_load((TEMPLATES.parent / "vars" / "main.yml").read_text())
    return environment.get_template(f"{name}.j2").render(ansible_managed="Ansible managed", **fixed, **variables)


def commands(text: str, kind: str) -> list[str]:
    return [line.split("=", 1)[1] for line in text.splitlines() if line.startswith(f"{kind}=")]


@pytest.mark.parametrize(("variables", "module"), [(SIW, "siw"), (RXE, "rdma_rxe")])
def test_a_soft_device_is_made_and_removed_by_its_unit(variables, module):
    unit = render("hecaton-rdma.service", **variables)
    start = commands(unit, "ExecStart")
    assert f"modprobe {module}" in start
    assert any(f"rdma link add {variables['rdma_device']} type {variables['rdma_kind']} netdev mig0" in line for line in start)
    assert commands(unit, "ExecStop") == [f"-rdma link delete {variables['rdma_device']}"]
    assert commands(unit, "ExecReload") == start


@pytest.mark.parametrize("variables", [RXE, MLX5])
def test_roce_is_set_to_version_2_and_the_setting_goes_again(variables):
    unit = render("hecaton-rdma.service", **variables)
    config = f"/sys/kernel/config/rdma_cm/{variables['rdma_device']}"
    start = commands(unit, "ExecStart")
    assert start[-2] == f"mkdir -p {config}" and 'echo "RoCE v2"' in start[-1] and f"{config}/ports/*/default_roce_mode" in start[-1]
    assert f"-rmdir {config}" in commands(unit, "ExecStopPost")


@pytest.mark.parametrize(("mtu", "raised"), [("4200", True), ("0", False)])
def test_the_mtu_may_come_from_the_command_line_where_it_is_a_text(mtu, raised):
    start = commands(render("hecaton-rdma.service", **{**MLX5, "rdma_mtu": mtu}), "ExecStart")
    assert start == commands(render("hecaton-rdma.service", **{**MLX5, "rdma_mtu": int(mtu)}), "ExecStart")
    assert (f"ip link set dev mig0 mtu {mtu}" in start) == raised


@pytest.mark.parametrize(("asked", "most", "expected"), [(0, 4096, 4096), (1500, 4096, 1024), ("4200", 4096, 4096), ("9000", 2048, 2048)])
def test_a_port_has_the_mtu_that_was_asked_for(asked, most, expected):
    """As the role's last check works it out."""
    tasks = yaml.safe_load((TEMPLATES.parent / "tasks" / "verify.yml").read_text())
    (text,) = (task["vars"]["rdma_expected"] for task in tasks if "rdma_expected" in task.get("vars", {}))
    rendered = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(rdma_mtu=asked, rdma_port={"max_mtu": most})
    assert int(rendered) == expected


@pytest.mark.parametrize("variables", [SIW, CXGB4])
def test_iwarp_is_told_nothing_of_roce(variables):
    assert "roce" not in render("hecaton-rdma.service", **variables).lower()


@pytest.mark.parametrize("variables", [MLX5, CXGB4])
def test_the_device_of_a_card_is_neither_made_nor_removed(variables):
    unit = render("hecaton-rdma.service", **variables)
    assert "rdma link" not in unit and not commands(unit, "ExecStop")


def test_the_device_of_a_card_is_waited_for_before_it_is_set():
    start = commands(render("hecaton-rdma.service", **MLX5), "ExecStart")
    waits = next(number for number, line in enumerate(start) if "until test -e /sys/class/infiniband/mlx5_0" in line)
    assert waits < start.index("mkdir -p /sys/kernel/config/rdma_cm/mlx5_0")


def test_the_unit_comes_and_goes_with_its_interface():
    unit = render("hecaton-rdma.service", **{**SIW, "rdma_link": "mig-0"})
    assert "BindsTo=sys-subsystem-net-devices-mig\\x2d0.device\n" in unit and "WantedBy=multi-user.target sys-subsystem-net-devices-mig\\x2d0.device" in unit
    unit = render("hecaton-rdma.service", **{**SIW, "rdma_link": "hecaton0", "rdma_device": "siw_hecaton0", "rdma_wireguard": True, "rdma_mtu": 4200})
    assert "wg-quick@hecaton0.service" in unit and "mtu 4200" not in unit


class Mtus:
    """Interfaces with an MTU, and the commands of a unit run on them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir()
        ip = folder / "bin" / "ip"
        ip.write_text(f'#!/bin/sh\ntest "$1 $2 $3 $5" = "link set dev mtu" && echo "$6" > "{folder}/net/$4/mtu"\n')
        ip.chmod(0o755)
        for name in ("mig0", "mig1"):
            (folder / "net" / name).mkdir(parents=True)
            (folder / "net" / name / "mtu").write_text("1500\n")

    def run(self, kind: str, **variables) -> None:
        unit = render("hecaton-rdma.service", **{**CXGB4, **variables})
        for line in commands(unit, kind):
            words = shlex.split(line.lstrip("-").replace("/run/", f"{self.folder}/").replace("/sys/class/net", f"{self.folder}/net"))
            subprocess.run(words, env={"PATH": f"{self.folder}/bin:{os.defpath}"}, check=True)

    def now(self) -> tuple:
        return tuple(int((self.folder / "net" / name / "mtu").read_text()) for name in ("mig0", "mig1"))


def test_an_interface_gets_its_mtu_back(tmp_path):
    mtus = Mtus(tmp_path)
    mtus.run("ExecStart")
    assert mtus.now() == (1500, 1500)
    mtus.run("ExecStart", rdma_mtu=4200)
    mtus.run("ExecReload", rdma_mtu=9000)
    assert mtus.now() == (9000, 1500)
    mtus.run("ExecReload", rdma_mtu=9000, rdma_link="mig1")
    assert mtus.now() == (1500, 9000), "another interface took its place"
    mtus.run("ExecStopPost", rdma_mtu=9000, rdma_link="mig1")
    assert mtus.now() == (1500, 1500)
    mtus.run("ExecStart", rdma_mtu=4200)
    mtus.run("ExecReload")
    assert mtus.now() == (1500, 1500), "no MTU is asked for any more"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "net"]


def test_the_rule_names_the_device_that_has_the_guid():
    rule = render("60-hecaton-rdma.rules", rdma_guid="0c42:a103:0012:3456", rdma_hw_name="mig")
    assert rule.splitlines()[-1] == (
        'ACTION=="add", SUBSYSTEM=="infiniband", ATTR{node_guid}=="0c42:a103:0012:3456", PROGRAM="rdma_rename %k NAME_FIXED mig"')


def test_the_group_of_qemu_may_lock_any_amount_of_memory():
    lines = render("limits.conf", rdma_memlock_group="kvm").splitlines()
    assert lines[-2:] == ["@kvm soft memlock unlimited", "@kvm hard memlock unlimited"]


def wireguard(host: str) -> str:
    peers = {
        "hv1": {"rdma_wireguard_address": "10.78.1.11/24", "rdma_wireguard_endpoint": "10.77.1.11", "rdma_wireguard_public": {"stdout": "key of hv1"}},
        "hv2": {"rdma_wireguard_address": "fd78::12/64", "rdma_wireguard_endpoint": "fd77::12", "rdma_wireguard_public": {"stdout": "key of hv2"},
                "rdma_wireguard_port": 51999},
    }  # fmt: skip
    return render(
        "wireguard.conf", inventory_hostname=host, groups={"hypervisors": list(peers)}, rdma_wireguard_group="hypervisors", hostvars=peers,
        rdma_wireguard_address=peers[host]["rdma_wireguard_address"], rdma_wireguard_port=51820,
    )  # fmt: skip


def test_a_peer_of_wireguard_is_known_by_its_public_key_and_reached_at_its_endpoint():
    assert "PublicKey = key of hv2\nEndpoint = [fd77::12]:51999\nAllowedIPs = fd78::12/128\n" in wireguard("hv1")
    assert "PublicKey = key of hv1\nEndpoint = 10.77.1.11:51820\nAllowedIPs = 10.78.1.11/32\n" in wireguard("hv2")


def test_the_configuration_of_wireguard_has_no_private_key():
    text = wireguard("hv1")
    assert "PrivateKey" not in text and "PostUp = wg set %i private-key /etc/wireguard/%i.key\n" in text and "key of hv1" not in text


@pytest.mark.parametrize(("variables", "devices", "wireguards"), [
    (SIW, ["siw_mig0"], []), (RXE, ["rxe_mig0"], []), (MLX5, [], []),
    ({**SIW, "rdma_device": "siw_hecaton0", "rdma_wireguard": True}, ["siw_hecaton0"], ["hecaton0"]), ({**SIW, "rdma_wireguard": "false"}, ["siw_mig0"], []),
])  # fmt: skip
def test_the_unit_tells_what_it_was_made_for(variables, devices, wireguards):
    """So that it is removed also when the interface is another one by then."""
    tasks = yaml.safe_load((TEMPLATES.parent / "tasks" / "previous.yml").read_text())
    facts = next(task["ansible.builtin.set_fact"] for task in tasks if "ansible.builtin.set_fact" in task)
    environment = jinja2.nativetypes.NativeEnvironment()
    environment.filters["regex_findall"] = core.regex_findall
    text = render("hecaton-rdma.service", **variables)
    found = {name: environment.from_string(value).render(rdma_text=text) for name, value in facts.items() if value}
    assert found == {"rdma_previous_devices": devices, "rdma_previous_wireguards": wireguards}
