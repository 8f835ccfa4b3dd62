# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""What is decided about RDMA devices: what one is, whether one can be made or removed, which transport a host takes.

Pure functions over what the tools print. ``_rdma_host`` runs them.
"""

from __future__ import annotations

import ipaddress
import math
import re

#: Drivers of soft devices: the kernel module, and the protocol that their devices speak.
SOFT = {"siw": ("siw", "iw"), "rxe": ("rdma_rxe", "roce")}

#: Pages that one fast memory registration holds. The verbs of user space don't tell; read in the drivers of Linux 6.12.
MR_PAGES = {"siw": 256, "rxe": 512}

#: RDMA drivers of network cards by the driver of their network interface, and the module that has to be loaded for it.
HARDWARE = {"mlx5_core": "mlx5_ib", "ice": "irdma", "i40e": "irdma", "cxgb4": "iw_cxgb4", "bnxt_en": "bnxt_re"}

#: What can keep a card from having an RDMA device although its RDMA driver is loaded, by the driver of the network interface.
SWITCHED_OFF = {
    "mlx5_core": "its parameter enable_roce may be off (devlink dev param show)",
    "ice": "its parameters enable_roce and enable_iwarp may both be off (devlink dev param show)",
    "i40e": "of its cards only the X722 has RDMA",
    "cxgb4": "the configuration of its firmware may leave no room for RDMA",
    "bnxt_en": "its option support_rdma may be off, which Broadcom's tool niccli sets",
}

#: What has to be agreed on both ends, by protocol.
TRANSPORTS = {"iw": "iwarp", "roce": "roce", "ib": "infiniband"}

#: What the drivers of soft devices refuse, which the kernel tells as an invalid argument or a missing permission only.
UNSUITABLE = {("siw", "loopback"), ("rxe", "vlan")}

#: Objects that say that somebody uses a device, as ``rdma resource show`` names them.
IN_USE = ("qp", "cm_id", "mr", "ctx")


class RdmaError(Exception):
    """Something that the operator can act on; the message says what. ``reason`` is a word for programs."""

    def __init__(self, message: str, reason: str = "failed"):
        super().__init__(message)
        self.reason = reason


# ---- devices


def devices(listed: list, links: list, drivers: dict) -> list[dict]:
    """Devices from ``rdma -d dev`` and ``rdma link``, each with its ports.

    :param drivers: for a device with hardware behind it the name of its driver, ``{device: driver}``.
    """
    found = []
    for row in listed:
        name, protocol = row["ifname"], row.get("protocol", "")
        driver = drivers.get(name) or next((soft for soft, (module, speaks) in SOFT.items() if speaks == protocol), None)
        ports = [
            {"port": link["port"], "state": link.get("state"), "physical_state": link.get("physical_state"), "netdev": link.get("netdev")}
            for link in links if link["ifname"] == name and "port" in link
        ]  # fmt: skip
        found.append({
            "name": name, "driver": driver, "soft": name not in drivers, "transport": TRANSPORTS.get(protocol),
            "node_guid": row.get("node_guid"), "firmware": row.get("fw"), "ports": ports,
        })  # fmt: skip
    return found


def default_name(kind: str, netdev: str) -> str:
    return f"{kind}_{netdev}"


def on_netdev(found: list, netdev: str) -> list[dict]:
    """Devices that have a port on a network interface."""
    return [device for device in found if any(port["netdev"] == netdev for port in device["ports"])]


def same_link(found: list, name: str, kind: str, netdev: str) -> bool:
    """Whether a soft device is there already, as it is wanted.

    :param found: what :func:`devices` returns.
    :raises RdmaError: another device is in its way.
    """
    for device in found:
        where = ", ".join(port["netdev"] or "no interface" for port in device["ports"]) or "no interface"
        if device["name"] == name:
            if device["soft"] and device["driver"] == kind and any(port["netdev"] == netdev for port in device["ports"]):
                return True
            what = f"{device['driver']} on {where}" if device["soft"] else f"the hardware of the driver {device['driver']}"
            raise RdmaError(f"there is already a device {name}, which is {what}, not {kind} on {netdev}; give another name, or remove it first", "name_clash")
    for device in on_netdev(found, netdev):
        if device["soft"] and device["driver"] == kind:
            raise RdmaError(f"{netdev} already has the device {device['name']} of type {kind}, and can have only one; name that one, or remove it", "exists")
    return False


def netdev_problem(netdev: str, interfaces: dict, kind: str | None = None) -> RdmaError | None:
    """Why a device can't be on a network interface.

    :param interfaces: ``{name: {up, mtu, driver, type}}`` of the host.
    :param kind: ``siw`` or ``rxe``, which can't be on interfaces of every type; None for any device.
    """
    if netdev not in interfaces:
        return RdmaError(f"there is no network interface {netdev} on this host; it has {', '.join(sorted(interfaces))}", "no_netdev")
    if not interfaces[netdev]["up"]:
        return RdmaError(f"the network interface {netdev} is down; bring it up first (ip link set {netdev} up)", "netdev_down")
    if (kind, interfaces[netdev].get("type")) in UNSUITABLE:
        return RdmaError(f"{netdev} is a {interfaces[netdev]['type']} interface, and {kind} can't be on one; take another interface or type", "unsuitable")
    return None


def users(resources: dict, name: str) -> list[str]:
    """Who uses a device, as words for people: ``2 qp of qemu-system-x86 (pid 4711)``.

    :param resources: ``{kind: rows of rdma resource show}``.
    """
    counts: dict = {}
    for kind in IN_USE:
        for row in resources.get(kind, []):
            if row.get("ifname") != name:
                continue
            who = str(row.get("comm", "")).strip("[]")
            if who == "ib_core" and "pid" not in row:
                continue  # the kernel's own, as long as the device is there
            key = (kind, f"{who} (pid {row['pid']})" if "pid" in row else f"the kernel module {who}")
            counts[key] = counts.get(key, 0) + 1
    return [f"{count} {kind} of {who}" for (kind, who), count in sorted(counts.items())]


# ---- which transport


def no_hardware(netdev: str, found: list, kernel: str, card: str | None, state: str | None) -> str:
    """Why a network interface has no RDMA hardware.

    :param card: the driver of the interface.
    :param state: the RDMA driver that belongs to it is ``loaded``, ``available`` or ``missing``.
    """
    real = [f"{device['name']} on {', '.join(port['netdev'] or '?' for port in device['ports'])}" for device in found if not device["soft"]]
    only = f", only {'; '.join(real)}" if real else ""
    if card not in HARDWARE:
        return f"{netdev} has no RDMA hardware{only}"
    if state != "loaded":
        why = f"its RDMA driver {HARDWARE[card]} is not loaded" if state == "available" else f"kernel {kernel} has no {HARDWARE[card]}, its RDMA driver"
        return f"{netdev}, a card of the driver {card}, has no RDMA device{only}: {why}"
    return f"{netdev}, a card of the driver {card}, has no RDMA device{only}, although {HARDWARE[card]} is loaded: {SWITCHED_OFF[card]}; see the kernel's log"


def choose(
    wanted: str, netdev: str, found: list, drivers: dict, source: str | None, kernel: str, card: str | None = None, state: str | None = None
) -> dict:  # fmt: skip
    """The transport that a network interface takes.

    :param wanted: ``auto``, ``hw``, ``siw`` or ``rxe``.
    :param found: what :func:`devices` returns.
    :param drivers: ``{siw: loaded | available | missing, rxe: ...}``.
    :param source: a source that siw can be built from, None without one.
    :param card: the driver of the interface.
    :param state: the RDMA driver that belongs to it is ``loaded``, ``available`` or ``missing``.
    :returns: ``transport``, ``why``, ``device`` (None until it is made) and ``build`` (what siw has to be built from, else None).
    :raises RdmaError: there is none.
    """
    hardware = [device for device in on_netdev(found, netdev) if not device["soft"]]
    refused = {"hw": None if hardware else no_hardware(netdev, found, kernel, card, state)}
    built = drivers["siw"] == "missing" and bool(source)
    refused["siw"] = None if built or drivers["siw"] != "missing" else (
        f"kernel {kernel} has no driver siw, and there is no source to build it from (Debian's package is linux-source-{series(kernel)})")
    refused["rxe"] = None if drivers["rxe"] != "missing" else f"kernel {kernel} has no driver rdma_rxe"
    order = ("hw", "siw", "rxe") if wanted == "auto" else (wanted,)
    for transport in order:
        if refused[transport]:
            continue
        passed = [refused[other] for other in order[:order.index(transport)]]
        if transport == "hw":
            device = hardware[0]
            why = f"{netdev} has the RDMA hardware {device['name']} ({device['driver']})"
        elif transport == "siw" and built:
            why = f"siw can be built from {source}"
        else:
            why = f"kernel {kernel} has the driver {SOFT[transport][0]}"
        return {
            "transport": transport, "why": "; ".join([*passed, why]) if wanted == "auto" else f"{transport} was asked for",
            "device": device["name"] if transport == "hw" else None, "build": source if transport == "siw" and built else None,
        }  # fmt: skip
    raise RdmaError(f"no RDMA transport for {netdev}: {'; '.join(refused[transport] for transport in order)}", "no_transport")


def series(kernel: str) -> str:
    """``6.12`` of ``6.12.117+deb13-amd64``."""
    found = re.match(r"\d+\.\d+", kernel)
    return found.group(0) if found else kernel


# ---- what a probe's failure means


def wrong_gid(local: str, gids: list) -> str | None:
    """Why no GID of a RoCE device can be used for an address; None when one can.

    :param gids: ``gid`` and ``type`` of each.
    """
    wanted = ipaddress.ip_address(local)
    if wanted.version == 4:
        wanted = ipaddress.ip_address(f"::ffff:{local}")
    types = [each["type"] for each in gids if ipaddress.ip_address(each["gid"]) == wanted]
    if "RoCE v2" in types:
        return None
    if types:
        return f"the GID for {local} is of the type {', '.join(types)} and not RoCE v2"
    return f"no GID stands for {local}; there are {', '.join(each['gid'] for each in gids) or 'none'}"


def diagnose(stage: str, error: str, seen: dict) -> RdmaError:
    """What kept one host from reaching another.

    :param stage: how far it came: ``address``, ``route``, ``resources``, ``connect``, ``hello``, ``read``.
    :param error: what the RDMA library said.
    :param seen: ``peer``, ``port``, ``local`` (this host's address towards the peer), ``netdev``, ``devices`` (those on ``netdev``),
        ``gids`` (of those that speak RoCE, None for others), ``ping`` (whether the peer answers, None when that can't be asked),
        ``big_ping`` (also to packets of the interface's size) and ``mtu``.
    """
    peer = seen["peer"]
    if stage in ("address", "route"):
        if not seen.get("devices"):
            return RdmaError(
                f"{seen['local']}, the address towards {peer}, is on {seen['netdev'] or 'no interface that is known'}, which has no RDMA device; "
                f"make one with hecaton.fleet.rdma_link", "no_device")
        if not seen.get("ping"):
            what = f"{peer} does not answer on the network ({error})" if seen.get("ping") is False else f"{peer} was not found ({error})"
            return RdmaError(f"{what}; check that it is up and that {seen['netdev']} leads to it", "no_route")
        wrong = wrong_gid(seen["local"], seen["gids"]) if seen.get("gids") is not None else None
        return RdmaError(
            f"{', '.join(seen['devices'])} can't reach {peer} ({error}); {wrong or 'a GID of the device has to stand for ' + seen['local']}: "
            f"see hecaton.fleet.rdma_info, there and here", "gid_mismatch")
    if stage == "resources":
        return RdmaError(
            f"{', '.join(seen.get('devices') or []) or 'the device'} here can't be used by a program ({error}); memory that it reads and writes has to be "
            "locked: look at memlock_bytes of hecaton.fleet.rdma_info", "resources")
    if stage == "connect":
        if "refused" in error.lower() or "rejected" in error.lower():
            return RdmaError(f"{peer} refuses connections to port {seen['port']} ({error}): nothing listens there with the same transport", "refused")
        if seen.get("ping") is False:
            return RdmaError(f"{peer} does not answer on the network ({error})", "no_route")
        ping = f"{peer} answers to ping" if seen.get("ping") else f"without ping on this host, it is not known whether {peer} answers"
        return RdmaError(
            f"{ping}, and no RDMA connection to port {seen['port']} comes about ({error}): a firewall drops it (iWARP is TCP to that "
            f"port, RoCE is UDP to port 4791), or the two hosts have different transports", "firewall")
    if stage in ("hello", "read") and seen.get("ping") and seen.get("big_ping") is False:
        return RdmaError(
            f"small packets reach {peer} and those of {seen['mtu']} bytes, the MTU of {seen['netdev']}, don't: a smaller MTU is on the way "
            f"or at the other end", "mtu_mismatch")
    return RdmaError(f"the RDMA connection to {peer} broke while {'it was set up' if stage == 'hello' else 'memory was read'}: {error}", "broken")


def mismatch(mine: dict, theirs: dict, peer: str) -> RdmaError | None:
    """What two ends that are connected don't have alike. Each has ``transport``, ``mtu``, ``read_depth``, ``netdev``, ``device``."""
    if mine["transport"] != theirs["transport"]:
        return RdmaError(f"{mine['device']} speaks {mine['transport']} and {peer} speaks {theirs['transport']}", "transport_mismatch")
    if mine["mtu"] != theirs["mtu"]:
        return RdmaError(f"the MTU of {mine['netdev']} is {mine['mtu']} here and {theirs['mtu']} at {peer}; they have to be alike", "mtu_mismatch")
    if not mine["read_depth"] or not theirs["read_depth"]:
        where = mine["device"] + " here" if not mine["read_depth"] else f"{theirs['device']} at {peer}"
        return RdmaError(f"{where} can't have an RDMA READ under way (its READ depth is 0)", "read_depth")
    return None


def seconds(span: str) -> float:
    """A span of time as systemd shows it (``1h 2min 3.5s``), in seconds; 0 for one that has no end or is not understood."""
    units = {"w": 604800, "d": 86400, "h": 3600, "min": 60, "s": 1, "ms": 1e-3, "us": 1e-6}
    return sum(float(number) * units.get(unit, 0) for number, unit in re.findall(r"([0-9.]+)([a-z]+)", span))


def percentile(values: list, share: float) -> float:
    """The value below which a share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(round(len(ordered) * share, 6)) - 1)]


def first_difference(got: bytes, expected: bytes) -> int | None:
    """Where two buffers differ first; None when they are the same."""
    if got == expected:
        return None
    for offset in range(min(len(got), len(expected))):
        if got[offset] != expected[offset]:
            return offset
    return min(len(got), len(expected))
