# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Proves an RDMA path: one host listens with memory that holds a pattern, the other one reads that memory.

Stands alone, since the listening side runs as a program of its own: it needs the Python standard library and pyverbs.
The calls of pyverbs can't be interrupted, so each side does its work in a process that another one watches and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import sys
import time

VERSION = 1
MESSAGE = 4096  # bytes of one message
DEPTH = 16  # READs under way while the bandwidth is measured, at most
EXCHANGE_SECONDS = 15  # for the other end to say something
SERVE_SECONDS = 120  # for one probe that does not say how long it takes
LONGEST_SECONDS = 3600  # and for one that does


class ProbeError(Exception):
    """What failed; ``stage`` is how far it came."""

    def __init__(self, stage: str, message: str):
        super().__init__(message)
        self.stage = stage


def pattern(seed: str, length: int) -> bytes:
    """The bytes that the memory of the listening side holds."""
    return hashlib.shake_128(seed.encode()).digest(length)


class Connection:
    """One end of a connection: a queue pair that belongs to an id of the connection manager.

    :param cmid: bound to a device already.
    """

    def __init__(self, cmid):
        from pyverbs import enums
        from pyverbs.cq import CQ
        from pyverbs.qp import QPCap, QPInitAttr

        self.enums = enums
        self.cmid = cmid
        attributes = cmid.context.query_device()
        self.read_depth = min(attributes.max_qp_init_rd_atom, DEPTH)
        self.served = min(attributes.max_qp_rd_atom, DEPTH)
        # One queue for each direction: what is read is told from what is received by where it completes.
        self.sent, self.received = CQ(cmid.context, DEPTH + 4), CQ(cmid.context, 8)
        capacity = QPCap(max_send_wr=DEPTH + 4, max_recv_wr=4, max_send_sge=1, max_recv_sge=1)
        cmid.create_qp(QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=self.sent, rcq=self.received, cap=capacity))
        self.inbox = cmid.reg_msgs(MESSAGE)
        self.outbox = cmid.reg_msgs(MESSAGE)

    def parameters(self):
        from pyverbs.cmid import ConnParam

        return ConnParam(resources=self.served, depth=self.read_depth, retry=7, rnr_retry=5)

    def expect(self) -> None:
        """Makes room for one message."""
        self.cmid.post_recv(self.inbox)

    def say(self, stage: str, message: dict) -> None:
        text = json.dumps(message).encode()
        self.outbox.write(text.ljust(MESSAGE), MESSAGE)
        self.cmid.post_send(self.outbox)
        self.complete(self.sent, stage, EXCHANGE_SECONDS)

    def hear(self, stage: str, seconds: float = EXCHANGE_SECONDS) -> dict:
        self.complete(self.received, stage, seconds)
        try:
            message = json.loads(bytes(self.inbox.read(MESSAGE, 0)).decode())
            if message["version"] != VERSION:
                raise ProbeError(stage, f"the other end speaks version {message['version']} of the probe, not {VERSION}; run the same release on both hosts")
            return message
        except (KeyError, TypeError, ValueError) as err:
            raise ProbeError(stage, f"the other end said something that is no probe ({err})") from err

    def complete(self, queue, stage: str, seconds: float) -> None:
        """Waits, without sleeping, until one piece of work is done."""
        give_up = time.monotonic() + seconds
        while True:
            count, done = queue.poll(1)
            if count:
                if done[0].status != self.enums.IBV_WC_SUCCESS:
                    from pyverbs.utils import wc_status_to_str

                    raise ProbeError(stage, wc_status_to_str(done[0].status))
                return
            if time.monotonic() > give_up:
                raise ProbeError(stage, f"nothing came in {seconds:g} s")

    def close(self) -> None:
        for region in (self.inbox, self.outbox):
            region.close()
        self.cmid.close()
        for queue in (self.sent, self.received):
            queue.close()


def say(text: str) -> None:
    """Writes a line to the journal of the listening side."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def netdev_of(device: str) -> str | None:
    """The network interface of a device's first port."""
    try:
        with open(f"/sys/class/infiniband/{device}/ports/1/gid_attrs/ndevs/0") as stream:
            return stream.read().strip() or None
    except OSError:
        return None


def about(connection: Connection) -> dict:
    """What an end tells the other one about itself."""
    device = connection.cmid.dev_name
    context = connection.cmid.context
    with open("/proc/sys/kernel/hostname") as stream:
        host = stream.read().strip()
    netdev = netdev_of(device)
    mtu = 0
    if netdev:
        with open(f"/sys/class/net/{netdev}/mtu") as stream:
            mtu = int(stream.read())
    port = context.query_port(1)
    with open(f"/sys/class/infiniband/{device}/node_type") as stream:
        iwarp = "RNIC" in stream.read()
    return {
        "version": VERSION, "host": host, "device": device, "netdev": netdev, "mtu": mtu, "port_mtu": 128 << port.active_mtu if port.active_mtu else None,
        "transport": "iwarp" if iwarp else "roce" if port.link_layer == 2 else "infiniband", "read_depth": min(connection.read_depth, connection.served),
    }  # fmt: skip


# ---- the listening side


def listen(address: str, port: int, ready=None) -> None:
    """Serves probes, one after another, until it is ended.

    :param address: of this host, on the interface that has the device.
    :param ready: called once it listens.
    :raises ProbeError: it can't listen there.
    """
    import pyverbs.cm_enums as cm
    from pyverbs.cmid import CMID, AddrInfo, CMEvent, CMEventChannel
    from pyverbs.pyverbs_error import PyverbsError

    try:
        channel = CMEventChannel()
        listener = CMID(creator=channel, port_space=cm.RDMA_PS_TCP)
        listener.bind_addr(AddrInfo(src=address, src_service=str(port), port_space=cm.RDMA_PS_TCP, flags=cm.RAI_PASSIVE))
        listener.listen(backlog=8)
    except PyverbsError as err:
        raise ProbeError("address", f"can't listen on {address} port {port}: {err}") from err
    if ready:
        ready()
    # pyverbs takes the device away from the listener when one of its connections is closed, so they stay until the end.
    ended = []
    while True:
        event = CMEvent(channel)
        if event.event_type != cm.RDMA_CM_EVENT_CONNECT_REQUEST:
            event.ack_cm_event()
            continue
        cmid = CMID(creator=event, listen_id=listener)
        event.ack_cm_event()
        try:
            connection = Connection(cmid)
            ended.append(connection)
            serve(connection)
            say("served one probe")
        except (PyverbsError, ProbeError, KeyError, TypeError, ValueError, OSError) as err:
            # Whatever one of them says, the next one is served.
            say(f"a probe ended early: {err!r}")


def serve(connection: Connection) -> None:
    """One probe."""
    cmid, memory = connection.cmid, None
    try:
        connection.expect()
        cmid.accept(connection.parameters())
        hello = connection.hear("hello")
        length = max(1, min(int(hello["length"]), 1 << 26))
        memory = cmid.reg_read(length)
        memory.write(pattern(str(hello["seed"]), length), length)
        connection.expect()
        connection.say("hello", {**about(connection), "address": memory.buf, "rkey": memory.rkey, "length": length})
        connection.hear("read", max(SERVE_SECONDS, min(int(hello.get("timeout", 0)), LONGEST_SECONDS)))
    finally:
        if memory:
            memory.close()
        cmid.disconnect()


# ---- the reading side


def probe(job: dict, tell) -> dict:
    """Connects, reads and measures.

    :param job: ``peer``, ``port``, ``source`` (address of this host, or None), ``length`` (bytes of the pattern), ``reads`` (for the
        latency), ``read_size``, ``seconds`` (for the bandwidth), ``timeout`` (seconds for all of it) and ``seed``.
    :param tell: called with the name of each stage that begins.
    :returns: ``local``, ``remote``, ``latencies`` (seconds), ``bandwidth`` (bytes a second) and ``memory`` (what was read).
    :raises ProbeError: it failed.
    """
    import pyverbs.cm_enums as cm
    from pyverbs.cmid import CMID, AddrInfo, CMEvent, CMEventChannel
    from pyverbs.pyverbs_error import PyverbsError

    stage = "address"

    def expect(kind: int) -> None:
        event = CMEvent(channel)
        got, name = event.event_type, event.event_str()
        event.ack_cm_event()
        if got != kind:
            raise ProbeError(stage, name)

    try:
        tell(stage)
        channel = CMEventChannel()
        cmid = CMID(creator=channel, port_space=cm.RDMA_PS_TCP)
        cmid.resolve_addr(AddrInfo(src=job["source"], dst=job["peer"], dst_service=str(job["port"]), port_space=cm.RDMA_PS_TCP))
        expect(cm.RDMA_CM_EVENT_ADDR_RESOLVED)
        tell(stage := "route")
        cmid.resolve_route()
        expect(cm.RDMA_CM_EVENT_ROUTE_RESOLVED)
        tell(stage := "resources")
        connection = Connection(cmid)
        tell(stage := "connect")
        connection.expect()
        cmid.connect(connection.parameters())
        expect(cm.RDMA_CM_EVENT_ESTABLISHED)
        tell(stage := "hello")
        mine = about(connection)
        connection.say(stage, {**mine, "length": job["length"], "seed": job["seed"], "timeout": job["timeout"]})
        theirs = connection.hear(stage)
        if not mine["read_depth"] or not theirs["read_depth"]:
            return {"local": mine, "remote": theirs, "latencies": [], "bandwidth": 0.0, "memory": b""}
        tell(stage := "read")
        try:
            return measure(connection, job, mine, theirs)
        finally:
            connection.close()
    except PyverbsError as err:
        raise ProbeError(stage, str(err)) from err


def measure(connection: Connection, job: dict, mine: dict, theirs: dict) -> dict:
    cmid, signaled = connection.cmid, connection.enums.IBV_SEND_SIGNALED
    from pyverbs.mr import MR

    sink = MR(cmid.pd, theirs["length"], connection.enums.IBV_ACCESS_LOCAL_WRITE | connection.enums.IBV_ACCESS_REMOTE_WRITE)
    cmid.post_read(sink, theirs["length"], theirs["address"], theirs["rkey"], flags=signaled)
    connection.complete(connection.sent, "read", 60)
    memory = bytes(sink.read(theirs["length"], 0))
    size = min(job["read_size"], theirs["length"])
    latencies = []
    for number in range(job["reads"]):
        began = time.perf_counter()
        cmid.post_read(sink, size, theirs["address"], theirs["rkey"], flags=signaled)
        connection.complete(connection.sent, "read", 60)
        latencies.append(time.perf_counter() - began)
    depth = max(1, min(mine["read_depth"], theirs["read_depth"], DEPTH))
    began, under_way, moved = time.perf_counter(), 0, 0
    while time.perf_counter() - began < job["seconds"] or under_way:
        while under_way < depth and time.perf_counter() - began < job["seconds"]:
            cmid.post_read(sink, theirs["length"], theirs["address"], theirs["rkey"], flags=signaled)
            under_way += 1
        connection.complete(connection.sent, "read", 60)
        under_way -= 1
        moved += theirs["length"]
    bandwidth = moved / (time.perf_counter() - began)
    connection.say("read", {"version": VERSION, "done": True})
    sink.close()
    return {"local": mine, "remote": theirs, "latencies": latencies, "bandwidth": bandwidth, "memory": memory}


# ---- processes


def watched(work, seconds: float):
    """Does ``work(tell)`` in a process of its own and returns its result, which ``json`` and ``bytes.hex`` bear.

    :raises ProbeError: it failed, or was not done in time; then its process is gone.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reader)

            def tell(kind, value=None):
                os.write(writer, json.dumps([kind, value]).encode() + b"\n")

            try:
                result = work(lambda stage: tell("stage", stage))
                memory = result.pop("memory")
                with os.fdopen(writer, "wb", closefd=False) as out:
                    out.write(json.dumps(["result", {**result, "memory": memory.hex()}]).encode() + b"\n")
                code = 0
            except ProbeError as err:
                tell("error", [err.stage, str(err)])
            except Exception as err:
                tell("error", ["internal", repr(err)])
        finally:
            os._exit(code)
    os.close(writer)
    stage, buffer, give_up = "address", b"", time.monotonic() + seconds
    try:
        while True:
            left = give_up - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                raise ProbeError(stage, f"not done in {seconds:g} s")
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                raise ProbeError(stage, "its process ended without a word")
            buffer += chunk
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                kind, value = json.loads(line)
                if kind == "stage":
                    stage = value
                elif kind == "error":
                    raise ProbeError(*value)
                else:
                    return {**value, "memory": bytes.fromhex(value["memory"])}
    finally:
        os.close(reader)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)


if __name__ == "__main__":
    try:
        listen(sys.argv[1], int(sys.argv[2]), ready=lambda: say("listening"))
    except ProbeError as err:
        raise SystemExit(str(err)) from err
