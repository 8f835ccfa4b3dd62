# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rule 5: a peer can READ only the RAM of the session it authenticated for. Whatever it says gets an error, and no more."""

from __future__ import annotations

import random
import shlex
import struct
import time

import pytest
import siphash

from hosts import BACKGROUND, CONNECTED, FAILED, LISTENING, LOST, POSTCOPY, REASONS, RECONNECTING, Program, slow, wait_for
from hosts import COMPLETE as HAS_ALL  # a state; here COMPLETE is a message

MAGIC = 0x4D415252
CREDIT, PING, ABORT, OFFER, PULLED, DIRTY, SWITCH, SWITCHED, WANT, KEY, COMPLETE, BYE, PROGRESS = range(1, 14)
URGENT, BULK = 0, 1


VERSION = 4
CHUNK = 128  # pages behind one key
SOURCE, DESTINATION = 1, 2
TOKEN = b"t" * 16


def proof(request, who, token=TOKEN):
    """That one knows the token, of a request to connect."""
    return struct.pack("<Q", siphash.siphash(token, request[:44] + bytes(8) + bytes([who])))


def hello(size, link, magic=MAGIC, version=VERSION, flags=0, uuid=b"u" * 16, token=TOKEN, epoch=1, nonce=4711):
    request = struct.pack("<IHBB16sQIQ", magic, version, link, flags, uuid, size, epoch, nonce)
    return request + proof(request, SOURCE, token)


def message(kind, body=b"", magic=MAGIC, credit=0, length=None):
    return struct.pack("<IBBH", magic, kind, credit, 8 + len(body) if length is None else length) + body


def answer_to(request, token=TOKEN):
    return struct.pack("<IHH", MAGIC, VERSION, 0) + proof(request, DESTINATION, token)


class Peer:
    """A hostile program on one host, in a session with the module on the other."""

    def __init__(self, host):
        self.program = host.hostile()

    def tell(self, *words):
        answer = self.program.tell(" ".join((word.hex() or "-") if isinstance(word, bytes) else str(word) for word in words))
        assert answer is not None and "error" not in answer, (words[:2], answer)
        return answer

    def source_of(self, file):
        """Connects to the module as a source that has the token."""
        for link in (URGENT, BULK):
            answer = self.tell("connect", link, file.dest.address, file.port, hello(file.size, link))
            assert answer["connected"], answer
        assert file.dst("wait", states=[CONNECTED], ms=20000)[0] == CONNECTED

    def answer(self, make=answer_to):
        """Lets the module connect both links, with the answers that ``make`` gives to its requests. Returns those requests."""
        requests = []
        for link in (URGENT, BULK):
            requests.append(bytes.fromhex(self.tell("await")["hello"]))
            self.tell("accept", link, make(requests[-1]))
        return requests

    def destination_of(self, file, **options):
        """Lets the module connect, as a destination that has the token."""
        port = self.tell("listen", file.dest.address)["port"]
        export = file.source.start("session", name=file.name, what="export", address=file.dest.address, port=port, **options)
        self.answer()
        export()
        assert file.src("wait", states=[CONNECTED], ms=20000)[0] == CONNECTED

    def receive(self, patience=20000):
        """The next message."""
        answer = self.tell("recv", BULK, slow(patience))
        assert answer.get("message"), answer
        return bytes.fromhex(answer["message"])

    def next(self, kind, patience=20000):
        """The next message of a kind; others are passed over."""
        while True:
            data = self.receive(patience)
            if data[4] == kind:
                return data

    def end(self):
        self.program.finish()


@pytest.fixture
def peer():
    peers = []

    def make(host):
        peers.append(Peer(host))
        return peers[-1]

    yield make
    for each in peers:
        each.end()


# -- who may connect ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "reason"), [
    ({"magic": 1}, "protocol"), ({"version": VERSION - 1}, "version"), ({"version": VERSION + 1}, "version"),
    ({"version": 0}, "version"),
    ({"link": 2}, "protocol"), ({"link": 255}, "protocol"),
    ({"flags": 1}, "protocol"), ({"uuid": b"v" * 16}, "uuid"), ({"token": b"t" * 15 + b"u"}, "token"), ({"token": bytes(16)}, "token"),
    ({"size": 4 << 20}, "size"), ({"size": 0}, "size"), ({"size": 2**64 - 1}, "size"),
])  # fmt: skip
def test_rule_5_a_source_that_is_not_the_one(ram, peer, change, reason):
    file = ram(2)
    file.attach()
    answer = peer(file.source).tell("connect", 0, file.dest.address, file.port, hello(**{"size": file.size, "link": 0, **change}))
    assert not answer["connected"]
    told = bytes.fromhex(answer["answer"])
    assert told, answer
    # On Ethernet the private data of a refusal are longer than what was given.
    assert struct.unpack_from("<IHH", told) == (MAGIC, VERSION, REASONS.index(reason)), answer
    # Both sides can say why.
    stats = file.dst("stats")
    assert (stats["state"], REASONS[stats["reason"]]) == (LISTENING, reason)
    # It stands in nobody's way.
    file.export()
    file.switch()
    file.complete()
    file.check()


def test_rule_5_connections_that_say_little(ram, peer):
    file = ram(2)
    file.attach()
    hostile = peer(file.source)
    dice = random.Random(5)
    # RoCE fills up with zeroes what is short.
    for data in (b"\0", hello(file.size, 0)[:20], dice.randbytes(52), hello(file.size, 0)[:51]):
        assert not hostile.tell("connect", 0, file.dest.address, file.port, data)["connected"], data
    # One link alone, and twice the same.
    assert hostile.tell("connect", 0, file.dest.address, file.port, hello(file.size, 0))["connected"]
    assert hostile.tell("connect", 1, file.dest.address, file.port, hello(file.size, 0, epoch=2))["connected"]
    hostile.tell("close", 0)
    hostile.tell("close", 1)
    wait_for(lambda: file.dst("stats")["state"] == LISTENING)
    file.export()
    file.switch()
    file.complete()
    file.check()


def test_rule_5_a_request_that_was_listened_in_on(ram, peer):
    """Said once more it opens nothing: neither as it is, nor for another session or link."""
    file = ram(2)
    hostile = peer(file.source)
    first = hello(file.size, 0)
    file.attach()
    assert hostile.tell("connect", 0, file.dest.address, file.port, first)["connected"]
    hostile.tell("close", 0)
    wait_for(lambda: file.dst("stats")["state"] == LISTENING)
    for again in (first, first[:6] + b"\1" + first[7:], first[:32] + b"\2" + first[33:]):
        assert not hostile.tell("connect", 0, file.dest.address, file.port, again)["connected"]
    file.export()
    file.switch()
    file.complete()
    file.check()


@pytest.mark.parametrize("answer", ["nothing", "short", "no proof", "another token", "its own proof", "of another request", "a refusal"])
def test_rule_5_a_destination_that_is_not_the_one(ram, peer, answer):
    """Who listens where the destination should learns no secret, and is given nothing."""
    file = ram(2)
    hostile = peer(file.dest)
    earlier = hello(file.size, 0, nonce=1)
    make = {
        "nothing": lambda request: b"",
        "short": lambda request: answer_to(request)[:8],
        "no proof": lambda request: answer_to(request)[:8] + bytes(8),
        "another token": lambda request: answer_to(request, b"x" * 16),
        "its own proof": lambda request: answer_to(request)[:8] + request[44:52],
        "of another request": lambda request: answer_to(earlier),
        "a refusal": lambda request: struct.pack("<IHH", MAGIC, VERSION, 5) + proof(request, DESTINATION),
    }[answer]
    port = hostile.tell("listen", file.dest.address)["port"]
    export = file.source.start("session", name=file.name, what="export", address=file.dest.address, port=port, connect_ms=1)
    request = bytes.fromhex(hostile.tell("await")["hello"])
    assert TOKEN not in request
    hostile.program.tell(f"accept 0 {make(request).hex() or '-'}")
    with pytest.raises(OSError) as caught:
        export()
    assert caught.value.reason in ("token", "protocol"), caught.value.reason
    still_works(file)


@pytest.mark.parametrize(("refusal", "reason"), [
    (b"", "unreachable"), (b"\xff" * 8, "unreachable"), (struct.pack("<IHH", MAGIC, VERSION, 0), "protocol"),
    (struct.pack("<IHH", MAGIC, VERSION, 0xFFFF), "protocol"), (struct.pack("<IHH", MAGIC, 99, 4), "size"),
])  # fmt: skip
def test_rule_5_a_refusal_that_says_anything(ram, peer, refusal, reason):
    file = ram(1)
    hostile = peer(file.dest)
    port = hostile.tell("listen", file.dest.address)["port"]
    export = file.source.start("session", name=file.name, what="export", address=file.dest.address, port=port, connect_ms=1)
    hostile.tell("await")
    hostile.tell("reject", refusal)
    with pytest.raises(OSError) as caught:
        export()
    assert caught.value.reason == reason
    still_works(file)


def postcopy(file, hostile):
    """A source after the switch to a hostile destination."""
    hostile.destination_of(file, heartbeat_ms=300, dead_ms=1500)
    switching = file.source.start("switch", name=file.name, ms=30000)
    hostile.tell("send", BULK, message(SWITCHED, hostile.next(SWITCH)[8:16]))
    switching()
    assert file.src("wait", states=[POSTCOPY], ms=20000)[0] == POSTCOPY


def test_rule_5_after_the_switch_only_the_destination_may_come_back(ram, peer):
    """Its place may have been taken by somebody who has not got the token: who has it is given the keys, nobody else."""
    file = ram(2)
    hostile = peer(file.dest)
    postcopy(file, hostile)
    hostile.tell("close", BULK)
    hostile.tell("close", URGENT)
    for _attempt in range(3):
        request = bytes.fromhex(hostile.tell("await")["hello"])
        hostile.program.tell(f"accept 0 {answer_to(request, bytes(16)).hex()}")
        assert file.src("stats")["state"] == RECONNECTING
    hostile.tell("close", URGENT)
    requests = hostile.answer()
    assert len({request[36:44] for request in requests}) == 2
    assert file.src("wait", states=[POSTCOPY], ms=20000)[0] == POSTCOPY
    hostile.tell("send", BULK, message(WANT, struct.pack("<II", 1, 1)))
    hostile.next(KEY)
    file.src("take_back")
    file.src("release")
    still_works(file)


def lost_before_key(hostile, chunk):
    """The pages of which the module says that they can't be read, up to the key of their chunk."""
    lost = []
    while True:
        data = hostile.receive()
        if data[4] == KEY and struct.unpack_from("<I", data, 12) == (chunk,):
            return lost
        at = 12
        while data[4] == DIRTY and at < len(data):
            first, number, _heat, flags = struct.unpack_from("<IHBB", data, at)
            at += 8 + (number // 8 if flags & 1 else 0)
            if flags & 8:
                lost += range(first, first + number)


def test_rule_4_what_a_key_hides_is_told_on_each_connection(ram, peer):
    """There are zeroes behind it in place of a page that can't be read; what was said before a cut may never have been heard."""
    file, chunk = ram(2), 300 // CHUNK
    owner = file.source.program("hold", file.path)
    owner.hear()
    owner.tell("poison 300")
    hostile = peer(file.dest)
    postcopy(file, hostile)
    for _connection in range(3):
        hostile.tell("send", BULK, message(WANT, struct.pack("<II", 1, chunk)))
        assert lost_before_key(hostile, chunk) == [300]
        hostile.tell("close", BULK)
        hostile.tell("close", URGENT)
        hostile.answer()
        assert file.src("wait", states=[POSTCOPY], ms=20000)[0] == POSTCOPY
    file.src("take_back")
    file.src("release")


#: Opens TCP connections and closes them at once, in both ways that there are. Who doesn't listen with TCP (rxe) refuses. Its own
#: ports stay taken for a minute: not of those that rdma_cm gives to peers.
SCAN = '''
import socket, struct, sys
for number in range(400):
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5, source_address=("", 20000 + number)) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", number % 2, 0))
    except OSError:
        pass
'''


def test_rule_5_a_scan_of_ports(ram):
    """Connections that end before they are accepted leave the listener as it is. siw as the kernel has it loses its listener by them."""
    file = ram(2)
    file.attach()
    file.source.sh(f"python3 -c {shlex.quote(SCAN)} {file.dest.address} {file.port}")
    assert file.dst("stats")["state"] == LISTENING
    file.export()
    file.switch()
    file.complete()
    file.check()


#: Refuses one connection as siw does (MPA of revision 2, whose data begin with both depths), and closes it in the same packet.
REFUSE = '''
import json, socket, struct, sys
answer = bytes.fromhex(sys.argv[2])
with socket.create_server((sys.argv[1], 0)) as server:
    print(json.dumps({"port": server.getsockname()[1]}), flush=True)
    peer, _ = server.accept()
    with peer:
        peer.recv(4096)
        peer.send(b"MPA ID Rep Frame" + struct.pack(">HHHH", 0x3002, 4 + len(answer), 1, 1) + answer, socket.MSG_MORE)
        peer.shutdown(socket.SHUT_WR)
        peer.recv(4096)
'''


def test_a_refusal_is_heard_whose_end_comes_with_it(ram, transport):
    """On a busy host TCP makes one packet of both. siw as the kernel has it then sees a connection that ends without an answer."""
    if transport != "siw":
        pytest.skip("only siw has a connection of TCP")
    file = ram(1)
    refuses = Program(file.dest, ["python3", "-c", REFUSE, file.dest.address, struct.pack("<IHHQ", MAGIC, VERSION, REASONS.index("size"), 0).hex()])
    file.port = refuses.hear()["port"]
    with pytest.raises(OSError) as caught:
        file.export()
    assert caught.value.reason == "size"
    refuses.finish()


# -- what it may say ---------------------------------------------------------------------------------------------------


def run_of(first, nr):
    return struct.pack("<HH", first, nr)


def offer(chunk, runs, nr=None, rkey=0x1234, iova=0x1000000, seq=1):
    return message(OFFER, struct.pack("<IIIQI", seq, chunk, rkey, iova, len(runs) if nr is None else nr) + b"".join(runs))


def dirty(first, nr, heat=3, flags=0, bits=b"", count=1):
    return message(DIRTY, struct.pack("<IIHBB", count, first, nr, heat, flags) + bits)


HEADERS = [
    message(PING, magic=0), message(0), message(14), message(255), message(PING, length=9), message(PING, length=0), message(PING, b"x", length=8),
    message(PING, credit=255), message(PING)[:7], b"\0", b"", message(PING, bytes(4088)), message(CREDIT, b"1"),
]  # fmt: skip
#: A file of 2 MiB has 512 pages, in so many chunks.
CHUNKS = 512 // CHUNK
TO_DESTINATION = [
    *HEADERS,
    *[message(kind, bytes(size)) for kind in (ABORT, OFFER, DIRTY, SWITCH, KEY) for size in (0, 3)],
    *[message(kind, b"\xff" * size) for kind in (PULLED, SWITCHED, WANT, COMPLETE, PROGRESS) for size in (0, 4, 600)],
    offer(CHUNKS, [run_of(0, 1)]), offer(0xFFFFFFFF, [run_of(0, 1)]), offer(0, [run_of(CHUNK - 1, 2)]), offer(0, [run_of(CHUNK, 1)]),
    offer(0, [run_of(0, CHUNK + 1)]), message(KEY, struct.pack("<IIIQ", 1, CHUNKS, 7, 0)),
    offer(0, [run_of(0, 0)]), offer(0, [run_of(0xFFFF, 0x7FFF)]), offer(0, [run_of(0, 1)], nr=2), offer(0, [run_of(0, 1)], nr=0xFFFFFFFF),
    offer(0, [run_of(0, 1)], nr=0x40000001), offer(1, [run_of(100, 0x8000 | 50)]), offer(0, [run_of(0, 0x8000)]), offer(0, []),
    offer(0, [run_of(i, 1) for i in range(CHUNK)] * 3),
    message(KEY, struct.pack("<I", 300)), message(KEY, struct.pack("<IIIQ", 2, 0, 7, 0)),
    dirty(512, 1), dirty(0xFFFFFFFF, 1), dirty(511, 2), dirty(0, 513), dirty(0, 0), dirty(0, 1, heat=4), dirty(0, 1, heat=255), dirty(0, 1, flags=0x80),
    dirty(0, 1, flags=16), dirty(0, 1, flags=8), dirty(0, 64, flags=9, bits=b"\xff" * 8),
    dirty(0, 64, flags=1), dirty(0, 63, flags=1, bits=bytes(8)), dirty(480, 64, flags=1, bits=b"\xff" * 8), dirty(0, 0xFFC0, flags=1, bits=b"\xff" * 64),
    dirty(0, 1, count=2), dirty(0, 1, count=0xFFFFFFFF), dirty(0, 1)[:-1],
    dirty(0, 2),
    message(SWITCH, struct.pack("<Q", 1)), message(SWITCH, struct.pack("<Q", 2**64 - 1)), message(BYE),
]  # fmt: skip
#: What the protocol allows, or a version of it might: nothing has to come of these.
HARMLESS = {dirty(0, 2), message(CREDIT, b"1"), offer(0, []), message(PING, bytes(4088))}

TO_SOURCE = [
    *HEADERS,
    *[message(kind, bytes(size)) for kind in (ABORT, PULLED, SWITCHED, WANT, PROGRESS) for size in (0, 3)],
    *[message(kind, b"\xff" * size) for kind in (OFFER, DIRTY, SWITCH, KEY, BYE) for size in (0, 4, 600)],
    message(PULLED, struct.pack("<I", 4711)), message(SWITCHED, struct.pack("<Q", 0)), message(COMPLETE), message(PROGRESS, b"\xff" * 616),
    message(WANT, struct.pack("<II", 1, CHUNKS)), message(WANT, struct.pack("<II", 1, 0xFFFFFFFF)), message(WANT, struct.pack("<II", 2, 0)),
    message(WANT, struct.pack("<I", 0x40000000)), message(WANT, struct.pack("<I", 0xFFFFFFFF) + bytes(4000)),
]  # fmt: skip


#: What ends a session after the switch, or is right then.
AFTER_THE_SWITCH = {message(COMPLETE), *(message(kind, bytes(size)) for kind in (ABORT, COMPLETE) for size in (0, 3, 4, 600))}


def impostor(ram, peer):
    """A file that waits for its source, and a hostile peer that is it."""
    file = ram(2)
    file.attach()
    hostile = peer(file.source)
    hostile.source_of(file)
    return file, hostile


def still_works(file):
    """Session after session: the file is as it was, and can be moved."""
    file.connect()
    file.switch()
    file.complete()
    file.check()


@pytest.mark.above
def test_rule_5_a_destination_is_told_nonsense(ram, peer):
    file = ram(2)
    hostile = peer(file.source)
    for number, nonsense in enumerate(TO_DESTINATION):
        file.attach()
        hostile.source_of(file)
        hostile.tell("send", BULK, nonsense)
        if nonsense in HARMLESS:
            hostile.tell("send", BULK, message(0))
        state, reason = file.dst("wait", states=[FAILED, LISTENING], ms=30000)
        # Whose header is wrong already is cut off at once. A peer's silence is no refusal.
        wrong = nonsense in HARMLESS or nonsense in HEADERS or struct.unpack_from("<H", nonsense, 6) != (len(nonsense),)
        reasons = ("protocol", "disconnected") if wrong else ("protocol",)
        assert state == FAILED and REASONS[reason] in reasons, (number, nonsense[:40], state, REASONS[reason])
        file.dst("release")
    still_works(file)


@pytest.mark.above
def test_rule_5_a_source_is_told_nonsense(ram, peer):
    file = ram(2)
    hostile = peer(file.dest)
    for number, nonsense in enumerate(TO_SOURCE):
        hostile.destination_of(file)
        hostile.tell("send", BULK, nonsense)
        if nonsense in HARMLESS:
            hostile.tell("send", BULK, message(0))
        state, reason = file.src("wait", states=[FAILED], ms=30000)
        assert state == FAILED, (number, nonsense[:40], state, REASONS[reason])
        file.src("release")
    still_works(file)


def test_rule_5_offers_that_are_never_settled_come_to_an_end(ram, peer):
    """A peer that gives no room for answers can't make the destination keep more of its offers than an honest one has under way."""
    file, hostile = impostor(ram, peer)
    for number in range(200):
        if hostile.tell("send", BULK, offer(0, [run_of(0, 0x8001)], seq=number))["status"] != "success":
            break
    state, reason = file.dst("wait", states=[FAILED], ms=30000)
    assert (state, REASONS[reason]) == (FAILED, "protocol")
    file.dst("release")
    still_works(file)


def test_rule_5_who_has_all_pages_keeps_them(ram, peer):
    """An abort that comes after the last page is too late."""
    file, hostile = impostor(ram, peer)
    hostile.tell("send", BULK, dirty(0, 512, heat=0, flags=2))
    hostile.tell("send", BULK, message(SWITCH, struct.pack("<Q", 0)))
    hostile.next(SWITCHED)
    hostile.next(COMPLETE)
    hostile.tell("send", BULK, message(ABORT, struct.pack("<I", 11)))
    hostile.tell("send", BULK, message(BYE))
    time.sleep(slow(1))
    assert file.dst("stats")["state"] == HAS_ALL
    file.dst("release")
    file.turn_round()
    file.connect()
    file.src("switch")
    file.complete()


@pytest.mark.above
@pytest.mark.parametrize("side", ["source", "destination"])
def test_rule_5_random_messages(ram, peer, side, request):
    """Each right in its header, so that all that follows is looked at."""
    file, dice = ram(2), random.Random(7)
    hostile = peer(file.source if side == "source" else file.dest)
    for session in range(60 if request.config.getoption("--long") else 5):
        if side == "source":
            file.attach()
            hostile.source_of(file)
        else:
            hostile.destination_of(file)
            if session % 2:
                file.src("precopy", ms=5000)
        mine = file.dst if side == "source" else file.src
        for _turn in range(40):
            number = dice.choice((0, 2, 4, 8, 12, 14, 60, 2000))
            words = [dice.choice((0, 1, 2, CHUNK - 1, CHUNK, 512, 0x8001, 0xFFFF, dice.getrandbits(16))) for _n in range(number)]
            status = hostile.tell("send", BULK, message(dice.randrange(1, 14), struct.pack(f"<{len(words)}H", *words)))["status"]
            if status != "success":
                break
        mine("abort")
        assert mine("wait", states=[FAILED, LOST], ms=30000)[0] in (FAILED, LOST)
        mine("release")
    still_works(file)


def test_rule_5_after_the_switch_nonsense_loses_nothing(ram, peer):
    """A connection that is broken by nonsense is a connection lost: the destination waits for one that is better."""
    file, hostile = impostor(ram, peer)
    file.dst("tune", what=BACKGROUND, value=0)
    hostile.tell("send", BULK, dirty(0, 512))
    hostile.tell("send", BULK, message(SWITCH, struct.pack("<Q", 512)))
    hostile.next(SWITCHED)
    assert file.dst("wait", states=[POSTCOPY], ms=20000)[0] == POSTCOPY
    # A page that is lost stays so, whatever is said of it then, and stops nothing.
    for flags in (8, 8, 2, 10):
        hostile.tell("send", BULK, dirty(9, 2, flags=flags))
    wait_for(lambda: file.dst("stats")["pages_lost"] == 2)
    lost = file.dest.program("hold", file.path)
    lost.hear()
    assert lost.tell("peek 10") == {"sigbus": 4}
    hostile.tell("send", BULK, message(KEY, struct.pack("<IIIQ", 1, CHUNKS, 7, 0)))
    assert file.dst("wait", states=[RECONNECTING], ms=30000)[0] == RECONNECTING
    # Back again, with a key that is made up: the READ fails, the page stays missing.
    for link in (URGENT, BULK):
        assert hostile.tell("connect", link, file.dest.address, file.port, hello(file.size, link, epoch=2))["connected"]
    assert file.dst("wait", states=[POSTCOPY], ms=20000)[0] == POSTCOPY
    reader = file.dest.program("hold", file.path)
    reader.hear()
    late = reader.tell_later("peek 3")
    hostile.next(WANT)
    hostile.tell("send", BULK, message(KEY, struct.pack("<IIIQ", 1, 0, 0x12345678, 0x1000)))
    assert file.dst("wait", states=[RECONNECTING], ms=30000)[0] == RECONNECTING
    assert file.dst("stats")["pages_missing"] == 510 and not late.done()
    assert lost.tell("peek 9") == {"sigbus": 4}
    assert lost.tell("remove 9 1") == {"ret": 0, "errno": 0} and lost.tell("peek 9") == {"value": 0}
    lost.kill()
    file.dst("abort")
    assert file.dst("wait", states=[LOST], ms=20000)[0] == LOST
    assert "sigbus" in late()
    reader.kill()


@pytest.mark.above
def test_rule_5_a_source_is_told_nonsense_after_the_switch(ram, peer):
    """It serves on: what is broken is the connection, and the destination may come back with a better one."""
    file = ram(2)
    hostile = peer(file.dest)
    postcopy(file, hostile)
    for number, nonsense in enumerate(TO_SOURCE):
        if nonsense in AFTER_THE_SWITCH:
            continue
        hostile.tell("send", BULK, nonsense)
        if nonsense in HARMLESS:
            hostile.tell("send", BULK, message(0))
        wait_for(lambda: file.src("stats")["state"] == RECONNECTING, 30)
        hostile.answer()
        assert file.src("wait", states=[POSTCOPY], ms=20000)[0] == POSTCOPY, (number, nonsense[:40])
    hostile.tell("send", BULK, message(WANT, struct.pack("<II", 1, 0)))
    hostile.next(KEY)
    file.src("take_back")
    file.src("release")
    still_works(file)


# -- what it may read --------------------------------------------------------------------------------------------------


def offered(file, hostile):
    """A session in which the hostile peer was offered a chunk: (rkey, address) of its first page."""
    hostile.destination_of(file)
    file.src("precopy", ms=30000)
    _seq, chunk, rkey, iova = struct.unpack_from("<IIIQ", hostile.next(OFFER), 8)
    assert chunk == 0 and rkey
    return rkey, iova


def test_rule_5_keys_and_addresses_that_were_not_given(ram, peer):
    file, other = ram(2), ram(2)
    hostile = peer(file.dest)
    end = CHUNK * 4096
    attempts = [
        ("read", lambda key, at: (key + 1, at, 4096)), ("read", lambda key, at: (key ^ 0x100, at, 4096)), ("read", lambda key, at: (key + 0x100, at, 4096)),
        ("read", lambda key, at: (0, at, 4096)), ("read", lambda key, at: (1, at, 4096)), ("read", lambda key, at: (0xFFFFFFFF, at, 4096)),
        ("read", lambda key, at: (key, at - 1, 1)), ("read", lambda key, at: (key, at - 4096, 4096)), ("read", lambda key, at: (key, at + end, 1)),
        ("read", lambda key, at: (key, at + end - 1, 2)), ("read", lambda key, at: (key, 0, 8)), ("read", lambda key, at: (key, 2**64 - 8, 8)),
        ("write", lambda key, at: (key, at, b"\xee" * 64)), ("write", lambda key, at: (key + 1, at, b"\xee" * 64)),
    ]  # fmt: skip
    for what, make in attempts:
        rkey, iova = offered(file, hostile)
        # The key does what it is for.
        assert hostile.tell("read", URGENT, rkey, iova, 64)["status"] == "success"
        answer = hostile.tell(what, URGENT, *make(rkey, iova))
        # An iWARP WRITE has ended for its sender when it is sent: what counts is that it wrote nothing.
        assert answer["status"] != "success" or what == "write", (what, make(0, 0), answer)
        assert file.src("wait", states=[FAILED], ms=30000)[0] == FAILED
        file.src("release")
        if what == "write":
            file.check("read", threads=1, host=file.source)
    # A key that the peer makes void is void for itself alone.
    rkey, iova = offered(file, hostile)
    hostile.tell("invalidate", BULK, rkey, message(PING))
    file.src("abort")
    file.src("release")
    other.connect()
    other.switch()
    other.complete()
    other.check()
    still_works(file)


def test_rule_5_a_key_is_void_after_its_session(ram, peer):
    """Of two sessions of one peer, on two queue pairs of other protection domains."""
    file, other = ram(2), ram(2)
    first = peer(file.dest)
    rkey, iova = offered(file, first)
    second = peer(file.dest)
    second.destination_of(other)
    # The other session's connection does not open this file.
    assert second.tell("read", URGENT, rkey, iova, 64)["status"] != "success"
    assert first.tell("read", URGENT, rkey, iova, 64)["status"] == "success"
    file.src("abort")
    assert file.src("wait", states=[FAILED], ms=20000)[0] == FAILED
    assert first.tell("read", URGENT, rkey, iova, 64)["status"] != "success"
    file.src("release")
    other.src("wait", states=[FAILED], ms=20000)
    other.src("release")
    still_works(file)
