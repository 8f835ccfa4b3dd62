# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules that must never break, by number."""

from __future__ import annotations

import json
import random
import shlex
import time

import pytest

from hosts import BACKGROUND, COMPLETE, CONNECTED, FAILED, LOST, POSTCOPY, Program, cut, slow, slow_down, traced, wait_for

ALL_WRITES = "wwwwwwcrzhmpvk"
#: Besides, reads as a debugger's, children, and a debugger that stops who writes.
EVERYTHING = ALL_WRITES + "gft"


def moved(ram, ops=ALL_WRITES, threads=3, ms=1000, mib=6, how="map"):
    """A file that was written all through pre-copy, switched, and is read at the destination by many threads."""
    file = ram(mib).connect()
    writer = file.run(ops, threads)
    file.precopy(ms)
    assert writer.tell("stop")["bad"] == 0
    file.switch()
    file.check(how)
    stats = file.complete()
    assert stats["pages_missing"] == 0
    assert file.src("stats")["late_writes"] == 0
    assert writer.finish()["status"] == 0
    return file


# -- 1: a guest never sees a page older than its last write, and never zeroes in place of data -------------------------


@pytest.mark.parametrize("how", ["map", "read", "mem", "vm", "write"])
def test_rule_1_every_page_is_as_it_was_written_last(ram, how):
    assert moved(ram, how=how).check("map")["bad"] == 0


def test_rule_1_without_pre_copy(ram):
    file = ram(6).connect()
    file.switch()
    file.check("map", threads=8)
    file.complete()


def test_rule_1_where_a_read_needs_a_key_for_its_page(ram, transport):
    """As hardware iWARP does: every READ registers where it writes to, also after a connection that was lost in the middle."""
    file = ram(4)
    file.dest.sh("echo Y > /sys/module/remote_ram/parameters/sink_keys")
    file.connect()
    if transport == "siw":
        # One for each READ that may be under way; the rxe device is asked for none, whoever wants them.
        assert file.dest.do("state")["rdma"]["siw0"]["mr"] > 128
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 20000)
    reader = file.check(threads=8, later=True)
    wait_for(lambda: file.dst("stats")["pages_demand"] > 20)
    file.dest.sh("echo 1 > /sys/kernel/debug/remote_ram/inject_drop")
    wait_for(lambda: file.dst("stats")["reconnects"] > 0)
    slow_down(file.dest, 0)
    file.dst("tune", what=BACKGROUND, value=1)
    file.judge(reader, threads=8)
    file.complete()


def test_rule_1_a_vm_goes_on_at_the_destination(ram):
    file = ram(6).connect()
    writer = file.run(ALL_WRITES)
    file.precopy(1000)
    writer.tell("stop")
    file.switch()
    # It checks each page before it writes it, while pages arrive, and punches holes into pages on their way.
    there = file.run(ALL_WRITES, threads=4, host=file.dest)
    file.complete()
    assert there.tell("stop")["bad"] == 0
    there.finish()
    file.check("map")


def test_rule_1_holes_that_are_filled_during_pre_copy(ram):
    """What is behind a key changes when a hole is filled: the key is given up, and no page of before is read by it."""
    file = ram(6).connect()
    file.precopy(20000, stop=1)
    writer = file.run("whwm", threads=4)
    file.precopy(2500)
    writer.tell("stop")
    file.switch()
    file.check("map")
    file.complete()


def test_rule_1_holes_punched_while_pages_are_on_their_way(ram):
    file = ram(6).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 2000)
    puncher = file.run("hhmmcw", threads=8, host=file.dest)
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    assert puncher.tell("stop")["bad"] == 0
    puncher.finish()
    file.check("map")


#: Writes the first half of a file to its second half, from a mapping of it, while another process removes pages of the first half.
OWN = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
ram = mmap.mmap(file, 0)
half = len(ram) // 2
child = os.fork()
for at in range(0, half, 4096):
    if child:
        os.pwrite(file, memoryview(ram)[at:at + 4096], half + at)
    else:
        ram.madvise(mmap.MADV_REMOVE, at, 4096)
if child:
    sys.exit(os.wait()[1])
os._exit(0)
"""


def test_rule_1_writes_from_the_files_own_mapping_while_holes_are_punched(ram):
    """Who writes holds shmem's lock while it waits for a page, which a punch takes when it has taken pages."""
    file = ram(4).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 500)
    file.dest.sh(f"timeout -s KILL {slow(100)} python3 -c {shlex.quote(OWN)} {file.path}")
    file.dst("tune", what=BACKGROUND, value=1)
    assert file.complete()["pages_missing"] == 0


def test_rule_1_what_is_written_at_the_destination_before_the_switch_is_not_the_vms(ram):
    file = ram(4)
    file.attach()
    program = file.dest.program("hold", file.path)
    program.hear()
    file.export()
    file.precopy(20000, stop=1)
    for page in (1, 2, 300):
        assert program.tell(f"poke {page} 4711") == {"ret": 0, "errno": 0}
    assert program.tell("remove 17 4") == {"ret": 0, "errno": 0}
    file.switch()
    file.check("map")
    file.complete()
    program.kill()


def test_rule_1_pages_that_the_destination_fetched_before_the_switch_become_stale(ram):
    file = ram(4)
    file.attach()
    program = file.dest.program("hold", file.path)
    program.hear()
    file.export()
    for page in range(0, 1024, 100):
        assert "value" in program.tell(f"peek {page}")
    writer = file.run("wz", threads=2)
    wait_for(lambda: file.src("stats")["pages_dirty"] > 0)
    file.precopy(300)
    writer.tell("stop")
    file.switch()
    file.check("map")
    file.complete()


# -- 2: dirty tracking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", ["w", "wc", "p", "v", "d", "wdk"])
def test_rule_2_no_write_is_lost(ram, ops):
    """By the mapping, with reads that make the entries anew, by write(2), by a debugger, by a disk."""
    assert moved(ram, ops=ops, mib=4, ms=1200).check("map")["bad"] == 0


def test_rule_2_write_access_that_comes_back_without_a_fault(ram):
    """mprotect() and NUMA balancing make an entry writable again that is marked dirty: after a harvest none is."""
    file = ram(4).connect()
    program = file.source.program("hold", file.path)
    program.hear()
    program.tell("sweep 0 1000")
    file.precopy(20000, stop=1)
    assert file.src("stats")["pages_dirty"] == 0
    program.tell("protect 0")
    program.tell("protect 1")
    program.tell("sweep 0 5000")
    file.switch()
    there = file.dest.program("hold", file.path)
    there.hear()
    for page in (0, 1, 17, 500, 1023):
        assert there.tell(f"peek {page}") == {"value": page + 5000}
    file.complete()


def test_rule_2_what_is_pinned_stays_dirty(ram):
    """What writes through a pin leaves no trace. A pin that lasts is refused, but for a page that is writable already."""
    file = ram(1, fill=False).connect()
    program = file.source.program("hold", file.path)
    program.hear()
    assert program.tell("pin 0")["ret"] == -1
    program.tell("poke 7 1")
    assert program.tell("pin 7")["ret"] == 0
    file.precopy(1500, stop=1)
    assert file.src("stats")["pages_dirty"] == 1


#: Writes 16 pages of a mapping and lends them to a pipe, which holds them without a pin, until it is told to take them back.
LEND = """
import ctypes, json, mmap, os, sys
ram = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
for at in range(0, 65536, 4096):
    ram[at] = 1
class iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
reader, writer = os.pipe()
part = iovec(ctypes.addressof(ctypes.c_char.from_buffer(ram)), 65536)
print(json.dumps({"lent": ctypes.CDLL(None).vmsplice(writer, ctypes.byref(part), 1, 0)}), flush=True)
for line in sys.stdin:
    os.read(reader, 65536)
    print(json.dumps({"lent": 0}), flush=True)
"""


def test_rule_2_what_is_lent_without_a_pin_stays_dirty(ram):
    """As an O_DIRECT read of NFS has pages, which writes to them without a fault; here a pipe has them."""
    file = ram(1, fill=False).connect()
    program = Program(file.source, ["python3", "-c", LEND, file.path])
    assert program.hear() == {"lent": 65536}
    file.precopy(1500)
    assert file.src("stats")["pages_dirty"] == 16
    assert program.tell("back") == {"lent": 0}
    file.precopy(3600000, stop=1)
    assert file.src("stats")["pages_dirty"] <= 1
    program.kill()


# -- 3: before the switch every failure leaves the VM on the source ----------------------------------------------------


@pytest.mark.parametrize("side", ["source", "destination"])
def test_rule_3_abort_before_the_switch(ram, side):
    file = ram(8).connect()
    writer = file.run(ALL_WRITES)
    file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 100)
    (file.src if side == "source" else file.dst)("abort")
    assert file.src("wait", states=[], ms=30000)[0] == 9
    assert file.dst("wait", states=[], ms=30000)[0] == 9
    # Writes go on, and the next attempt brings all of them.
    file.release()
    file.connect()
    file.precopy(800)
    assert writer.tell("stop")["bad"] == 0
    file.switch()
    file.check("map")
    file.complete()


def test_rule_3_a_switch_that_fails_leaves_the_file_as_it_was(ram):
    file = ram(8).connect(dead_ms=60000, heartbeat_ms=1000)
    writer = file.run(ALL_WRITES)
    file.precopy(300)
    writer.tell("stop")
    with cut(file.dest, "drop"):
        with pytest.raises(OSError) as caught:
            file.src("switch", ms=1500)
        assert caught.value.reason == "timeout"
        # The VM goes on at once: no write is refused.
        file.source.sh(f"dd if=/dev/zero of={file.path} bs=4096 count=1 conv=notrunc status=none")
        writer.tell("go")
    assert file.src("wait", states=[], ms=30000)[0] == 9
    file.dst("abort")
    file.release()
    file.connect()
    file.precopy(300)
    writer.tell("stop")
    # Page 0 was written behind the program's back.
    for path, size in ((file.shadow, 4), (file.path, 4096)):
        file.source.sh(f"dd if=/dev/zero of={path} bs={size} count=1 conv=notrunc status=none")
    file.switch()
    file.check("map")
    file.complete()


# -- 4: after the switch: see test_connection.py -----------------------------------------------------------------------
# -- 5: a peer can READ only the RAM of its session: see test_hostile.py -----------------------------------------------
# -- 6: stopped and killed processes -----------------------------------------------------------------------------------


def test_rule_6_a_stopped_process_is_read_by_another(ram):
    file = ram(4).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    program = file.dest.program("hold", file.path)
    program.hear()
    program.kill(19)
    # Another reads its memory while it is stopped: the pages come.
    reader, size = file.dest.reader(program.pid, file, 7)
    assert file.dest.sh(reader).strip() == size
    program.kill(18)
    program.kill()
    assert program.reap(20) == -9
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check("map")


def test_rule_6_killed_while_it_waits(ram):
    file = ram(4).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 500000)
    programs = [file.check("map", threads=4, later=True) for _turn in range(2)]
    wait_for(lambda: file.dst("stats")["faults_retry"] > 0)
    for program in programs:
        program.kill()
    for program in programs:
        assert program.reap(30) == -9
    slow_down(file.dest, 0)
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check("map")


def test_rule_6_the_module_stays_while_a_file_is_open(ram, hosts):
    file = ram(1)
    for host in hosts:
        assert "in use" in host.sh("rmmod remote_ram 2>&1", check=False)
    file.connect()
    for host in hosts:
        assert "busy" in host.sh("umount /run/remote_ram 2>&1", check=False)


def test_rule_6_fork_in_the_middle(ram):
    file = ram(4).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    program = file.dest.program("hold", file.path)
    program.hear()
    program.tell("peek 3")
    for page in (3, 4, 700):
        assert program.tell(f"fork {page}")["value"] != 0
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check("map")


def test_rule_6_a_file_unlinked_in_mid_session(ram):
    file = ram(4).connect()
    writer = file.run("w")
    file.src("unlink")
    file.dst("unlink")
    file.precopy(300)
    writer.tell("stop")
    file.switch()
    assert file.dst("wait", states=[COMPLETE], ms=60000) == [COMPLETE, 0]
    assert file.src("wait", states=[COMPLETE], ms=60000) == [COMPLETE, 0]
    writer.finish()
    # The last to close it ends the session; nothing is left, as is judged after each test.
    file.src("close")
    file.dst("close")


def test_rule_6_all_at_once(ram):
    """Writes of all kinds, holes, children, debuggers and aborts race with pre-copy, and then with faults; what each page has to hold is counted."""
    file, dice = ram(4), random.Random(6)
    writer = file.run(EVERYTHING, threads=4)
    for turn in range(4):
        file.connect()
        file.src("precopy", ms=60000)
        time.sleep(slow(dice.random() * 0.4))
        (file.dst if turn % 2 else file.src)("abort")
        for side in (file.src, file.dst):
            assert side("wait", states=[], ms=30000)[0] == FAILED
        file.release()
    file.connect()
    file.precopy(400)
    assert writer.tell("stop")["bad"] == 0
    file.switch()
    there = file.run(EVERYTHING, threads=4, host=file.dest)
    file.complete()
    assert there.tell("stop")["bad"] == 0
    for program in (writer, there):
        assert program.finish()["status"] == 0
    file.check()


@pytest.mark.expect("hardware memory corruption")
@pytest.mark.parametrize("what", [EVERYTHING, "r", "t"], ids=["everything", "reads", "debugger"])
def test_rule_6_an_abort_in_the_middle_of_it(ram, what):
    """Whoever touches what is lost ends, or is told; what had arrived, and was written since, is as it has to be."""
    file, threads = ram(4).connect(), 4
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 5000)
    there = file.run(what, threads, host=file.dest)
    wait_for(lambda: file.dst("stats")["pages_demand"] > 50)
    file.dst("abort")
    assert file.states()[1] == LOST
    # By SIGBUS, or because a read failed.
    assert there.reap(60) in ((-7, 1) if what == EVERYTHING else (1,))
    found = file.check("left", threads=1, later=True).finish()["said"][-1]
    assert 0 < found["lost"] == file.dst("stats")["pages_missing"], found
    # Each thread may have ended between a page and its number.
    assert found["bad"] <= threads, found


@pytest.mark.parametrize("state", ["listening", "connected", "postcopy"])
def test_rule_6_the_last_one_closes_it_in_mid_session(ram, state):
    file = ram(4)
    file.attach()
    if state != "listening":
        file.export()
        assert file.states() == (CONNECTED, CONNECTED)
    if state == "postcopy":
        file.dst("tune", what=BACKGROUND, value=0)
        file.switch()
        assert file.states() == (POSTCOPY, POSTCOPY)
    for side in (file.dst, file.src):
        side("unlink")
        side("close")


# -- 7: zero copy ------------------------------------------------------------------------------------------------------


#: Says in which frame of memory each page of a file is that a process maps: its own mapping, as the kernel tells of it.
FRAMES = """
import ctypes, json, mmap, os, struct, sys
ram = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
touched = [ram[at] for at in range(0, len(ram), 4096)]
start = ctypes.addressof(ctypes.c_char.from_buffer(ram))
with open("/proc/self/pagemap", "rb") as pagemap:
    pagemap.seek(start // 4096 * 8)
    entries = struct.unpack(f"{len(touched)}Q", pagemap.read(8 * len(touched)))
print(json.dumps([entry & (1 << 55) - 1 if entry >> 63 else None for entry in entries]))
"""


def test_rule_7_the_device_is_told_of_the_pages_that_are_mapped(ram, hosts):
    """Frame by frame: what READs put there, and what keys let a peer READ, is what a process maps of the file, at either end."""
    file = ram(6)
    with traced(hosts) as trace:
        file.connect()
        file.precopy(200)
        # Of what went ahead some is stale, so all three ways of a READ are there.
        file.leave_dirty()
        file.dst("tune", what=BACKGROUND, value=0)
        file.switch()
        reader = file.dest.program("hold", file.path)
        reader.hear()
        for page in range(0, file.pages, 128):
            reader.tell(f"peek {page}")
        file.dst("tune", what=BACKGROUND, value=1)
        file.complete()
        for host, event in ((file.source, "rram_key"), (file.dest, "rram_sink")):
            told = {}
            for line in trace(host).splitlines():
                if f" {event}: " in line:
                    said = dict(word.split("=") for word in line.split(f"{event}: ")[1].split())
                    told[int(said["page"])] = int(said["pfn"])
            frames = json.loads(host.sh(f"python3 -c {shlex.quote(FRAMES)} {file.path}"))
            assert len(frames) == file.pages and None not in frames
            assert len(told) >= 6, told
            # The kernel may have moved a page to another frame since.
            same = sum(frames[page] == pfn for page, pfn in told.items())
            assert same >= 0.9 * len(told), (host.name, event, same, len(told))
    file.check()
