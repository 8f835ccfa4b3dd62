#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: rdma_probe
short_description: Proves that two hosts reach each other by RDMA
version_added: 0.1.0
description:
  - One host listens, with memory that holds a pattern. Another one connects to it, reads that memory by RDMA, compares each byte, and
    measures the latency of a READ and the bandwidth of many.
  - The figures include what the library and Python need for a READ, which is some microseconds. Compare them with each other only.
  - The listening side is a transient systemd unit that ends by itself.
author:
  - The hecaton.fleet authors (@hecaton-fleet)
requirements:
  - C(python3-pyverbs) on both hosts
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
attributes:
  check_mode:
    support: full
    details: In check mode nothing listens and nothing is read.
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  state:
    description:
      - V(listening) lets the host answer probes for O(lifetime) seconds.
      - V(probed) probes the way to another host, which has to listen.
      - V(absent) ends listening.
    type: str
    choices: [probed, listening, absent]
    default: probed
  address:
    description:
      - With O(state=listening), the address of this host on the interface that has the RDMA device.
      - With O(state=probed), that address of the other host.
    type: str
  source:
    description: With O(state=probed), the address of this host to probe from. By default, the one that leads to O(address).
    type: str
  device:
    description: With O(state=probed), the RDMA device that the way has to lead through. Any one by default.
    type: str
  port:
    description: Port to listen on, and to connect to.
    type: int
    default: 7475
  lifetime:
    description: Seconds for which a host listens.
    type: int
    default: 900
  timeout:
    description: Seconds that a probe may take.
    type: int
    default: 60
  length:
    description: Bytes of memory that are read and compared, and that each READ has while the bandwidth is measured.
    type: int
    default: 1048576
  reads:
    description: How many READs the latency is measured with.
    type: int
    default: 200
  read_size:
    description: Bytes of each of these READs.
    type: int
    default: 4096
  seconds:
    description: For how long the bandwidth is measured.
    type: float
    default: 1
seealso:
  - module: hecaton.fleet.rdma_link
  - module: hecaton.fleet.rdma_info
"""

EXAMPLES = r"""
- name: Prove that hv1 reaches hv2
  hosts: hv2
  tasks:
    - name: Listen
      hecaton.fleet.rdma_probe:
        state: listening
        address: 10.77.1.12

    - name: Probe
      hecaton.fleet.rdma_probe:
        address: 10.77.1.12
        source: 10.77.1.11
      delegate_to: hv1
      register: probed

    - name: End listening
      hecaton.fleet.rdma_probe:
        state: absent
"""

RETURN = r"""
probe:
  description: What was found.
  returned: O(state=probed), not in check mode
  type: dict
  contains:
    host:
      description: Name of the other host.
      type: str
    device:
      description: RDMA device on this side.
      type: str
    remote_device:
      description: RDMA device on the other side.
      type: str
    transport:
      description: V(iwarp), V(roce) or V(infiniband).
      type: str
    mtu:
      description: MTU of the network interfaces on both sides, in bytes.
      type: int
    port_mtu:
      description: MTU of the RDMA port, in bytes.
      type: int
    read_depth:
      description: How many READs a queue pair may have under way in both directions, at most 16 here.
      type: int
    verified_bytes:
      description: How many bytes were read and were what they should be.
      type: int
    latency_us:
      description: Microseconds that one READ took, C(median) and C(p99), and of how many READs C(reads) of C(size) bytes.
      type: dict
    bandwidth_mib_s:
      description: MiB/s that many READs together brought.
      type: float
  sample:
    host: hv2
    device: siw_mig0
    remote_device: siw_mig0
    transport: iwarp
    mtu: 9000
    port_mtu: 4096
    read_depth: 16
    verified_bytes: 1048576
    latency_us: {median: 912.4, p99: 2310.0, reads: 200, size: 4096}
    bandwidth_mib_s: 41.3
unit:
  description: The systemd unit that listens.
  returned: O(state=listening)
  type: str
  sample: hecaton-rdma-probe-7475.service
reason:
  description: Why it failed, as a word. Among others V(no_device), V(no_route), V(gid_mismatch), V(refused), V(firewall), V(resources),
    V(mtu_mismatch), V(transport_mismatch), V(read_depth), V(wrong_device), V(corrupt) and V(broken).
  returned: failure
  type: str
  sample: firewall
"""

import json
import os
import secrets
import shutil
import socket
import sys
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma, _rdma_host, _rdma_probe
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma import RdmaError
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma_probe import ProbeError

PROGRAMS = "/run/hecaton"


class RdmaProbe:
    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.port: int = module.params["port"]
        self.unit = f"hecaton-rdma-probe-{self.port}.service"
        self.program = os.path.join(PROGRAMS, f"rdma-probe-{self.port}.py")

    def run(self) -> dict:
        if self.params["state"] == "absent":
            return self.absent()
        _rdma_host.verbs_module()
        return self.listening() if self.params["state"] == "listening" else self.probed()

    # ---- the listening side

    def active(self) -> bool:
        return _rdma_host.run("systemctl", "is-active", "--quiet", self.unit, check=False).returncode == 0

    def description(self) -> str:
        return _rdma_host.run("systemctl", "show", "-P", "Description", self.unit).stdout.strip()

    def left(self) -> float:
        """Seconds that the listener still lives: an earlier run may have left it."""
        lines = _rdma_host.run("systemctl", "show", "-p", "ActiveEnterTimestampMonotonic", "-p", "RuntimeMaxUSec", self.unit).stdout.splitlines()
        shown = dict(line.split("=", 1) for line in lines if "=" in line)
        lives = _rdma.seconds(shown.get("RuntimeMaxUSec", ""))
        return lives + int(shown.get("ActiveEnterTimestampMonotonic") or 0) / 1e6 - time.clock_gettime(time.CLOCK_MONOTONIC)

    def listening(self) -> dict:
        address = self.params["address"]
        description = f"RDMA probes on {address} port {self.port}"
        listens = self.active()
        if listens and self.description() == description and self.left() > self.params["lifetime"] / 2:
            return {"changed": False, "unit": self.unit}
        if self.module.check_mode:
            return {"changed": True, "unit": self.unit}
        if listens:
            self.stop()
        os.makedirs(PROGRAMS, mode=0o755, exist_ok=True)
        with open(self.program, "w") as out:
            out.write(_rdma_probe.__loader__.get_source(_rdma_probe.__name__))
        # The connection manager's device for programs comes with this module, which nothing loads by itself.
        _rdma_host.run("modprobe", "rdma_ucm")
        _rdma_host.run("systemctl", "reset-failed", self.unit, check=False)
        _rdma_host.run(
            "systemd-run", "--quiet", "--collect", f"--unit={self.unit}", f"--description={description}", f"--property=RuntimeMaxSec={self.params['lifetime']}",
            "--property=LimitMEMLOCK=infinity", "--setenv=PYTHONUNBUFFERED=1", f"--property=ExecStopPost=/bin/rm -f {self.program}",
            sys.executable, "-B", self.program, address, str(self.port))  # fmt: skip
        self.await_listening()
        return {"changed": True, "unit": self.unit}

    def await_listening(self) -> None:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up:
            invocation = _rdma_host.run("systemctl", "show", "-P", "InvocationID", self.unit).stdout.strip()
            said = _rdma_host.run("journalctl", "--no-pager", "-o", "cat", f"_SYSTEMD_INVOCATION_ID={invocation}", check=False).stdout if invocation else ""
            if "listening" in said.splitlines():
                return
            if not self.active():
                journal = _rdma_host.run("journalctl", "--no-pager", "-o", "cat", "-n", "5", "-u", self.unit, check=False).stdout
                raise RdmaError(f"nothing listens on {self.params['address']} port {self.port}: {' / '.join(journal.strip().splitlines())}", "not_listening")
            time.sleep(0.2)
        raise RdmaError(f"the unit {self.unit} does not listen after 60 s", "not_listening")

    def stop(self) -> None:
        _rdma_host.run("systemctl", "stop", self.unit)

    def absent(self) -> dict:
        listens = self.active()
        if listens and not self.module.check_mode:
            self.stop()
        return {"changed": listens}

    # ---- the reading side

    def probed(self) -> dict:
        peer = self.params["address"]
        if self.module.check_mode:
            return {"changed": False}
        local = self.local_address(peer)
        _rdma_host.run("modprobe", "rdma_ucm")
        job = {"peer": peer, "port": self.port, "source": self.params["source"], "seed": secrets.token_hex(8)}
        job.update({key: self.params[key] for key in ("length", "reads", "read_size", "seconds", "timeout")})
        try:
            result = _rdma_probe.watched(lambda tell: _rdma_probe.probe(job, tell), self.params["timeout"])
        except ProbeError as err:
            raise _rdma.diagnose(err.stage, str(err), self.look_around(local)) from err
        mine, theirs = result["local"], result["remote"]
        if self.params["device"] and mine["device"] != self.params["device"]:
            raise RdmaError(
                f"the way to {peer} leads through {mine['device']}, not {self.params['device']}; two devices on one interface are in each other's way",
                "wrong_device")
        problem = _rdma.mismatch(mine, theirs, peer)
        if problem:
            raise problem
        different = _rdma.first_difference(result["memory"], _rdma_probe.pattern(job["seed"], theirs["length"]))
        if different is not None:
            raise RdmaError(f"what was read from {peer} differs from what is there, from byte {different} of {theirs['length']} on", "corrupt")
        latencies = [value * 1e6 for value in result["latencies"]]
        return {"changed": False, "probe": {
            "host": theirs["host"], "device": mine["device"], "remote_device": theirs["device"], "transport": mine["transport"], "mtu": mine["mtu"],
            "port_mtu": mine["port_mtu"], "read_depth": min(mine["read_depth"], theirs["read_depth"]), "verified_bytes": theirs["length"],
            "latency_us": {"median": round(_rdma.percentile(latencies, 0.5), 1), "p99": round(_rdma.percentile(latencies, 0.99), 1),
                           "reads": len(latencies), "size": min(self.params["read_size"], theirs["length"])},
            "bandwidth_mib_s": round(result["bandwidth"] / (1 << 20), 1),
        }}  # fmt: skip

    def local_address(self, peer: str) -> str:
        """The address that leads to the peer.

        :raises RdmaError: there is no way to it.
        """
        if self.params["source"]:
            return self.params["source"]
        try:
            family, kind, protocol, name, where = socket.getaddrinfo(peer, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as route:
                route.connect(where)  # sends nothing
                return route.getsockname()[0]
        except OSError as err:
            raise RdmaError(f"there is no route from this host to {peer}: {err.strerror}", "no_route") from err

    def look_around(self, local: str) -> dict:
        """What plain networking says about a way on which RDMA failed."""
        peer = self.params["address"]
        netdev = next((row["ifname"] for row in self.addresses() for each in row.get("addr_info", []) if each.get("local") == local), None)
        mtu = _rdma_host.interfaces().get(netdev, {}).get("mtu", 0)
        devices = _rdma.on_netdev(_rdma_host.devices(), netdev) if netdev else []
        roce = [(device["name"], port["port"]) for device in devices if device["transport"] == "roce" for port in device["ports"] if port["netdev"] == netdev]
        return {
            "peer": peer, "port": self.port, "local": local, "netdev": netdev, "mtu": mtu, "devices": [device["name"] for device in devices],
            "gids": [gid for name, port in roce for gid in _rdma_host.gids(name, port)] if roce else None,
            "ping": self.ping(peer, local), "big_ping": self.ping(peer, local, ["-M", "do", "-s", str(mtu - (48 if ":" in peer else 28))]) if mtu else None,
        }  # fmt: skip

    @staticmethod
    def addresses() -> list:
        return json.loads(_rdma_host.run("ip", "-j", "address", "show").stdout or "[]")

    @staticmethod
    def ping(peer: str, local: str, more: list | None = None) -> bool | None:
        """Whether a host answers; None when there is no ping here."""
        if not shutil.which("ping", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"):
            return None
        return _rdma_host.run("ping", "-n", "-q", "-c", "2", "-i", "0.3", "-W", "2", "-I", local, *(more or []), peer, check=False).returncode == 0


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["probed", "listening", "absent"], "default": "probed"},
            "address": {"type": "str"},
            "source": {"type": "str"},
            "device": {"type": "str"},
            "port": {"type": "int", "default": 7475},
            "lifetime": {"type": "int", "default": 900},
            "timeout": {"type": "int", "default": 60},
            "length": {"type": "int", "default": 1048576},
            "reads": {"type": "int", "default": 200},
            "read_size": {"type": "int", "default": 4096},
            "seconds": {"type": "float", "default": 1},
        },
        required_if=[("state", "probed", ["address"]), ("state", "listening", ["address"])],
        supports_check_mode=True,
    )
    largest = {"port": 65535, "lifetime": 86400, "timeout": 3600, "length": 1 << 26, "reads": 100000, "read_size": 1 << 26}
    for option, most in largest.items():
        if not 1 <= module.params[option] <= most:
            module.fail_json(msg=f"{option} must be from 1 to {most}, not {module.params[option]}", reason="arguments")
    try:
        module.exit_json(**RdmaProbe(module).run())
    except RdmaError as err:
        module.fail_json(msg=str(err), reason=err.reason)
    except OSError as err:
        module.fail_json(msg=f"cannot probe: {err}", reason="failed")


if __name__ == "__main__":
    main()
