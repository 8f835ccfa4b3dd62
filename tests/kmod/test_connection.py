# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rule 4, and what is refused: connections that don't come about, are cut, or end for good."""

from __future__ import annotations

import errno
import random
import time

import pytest

from hosts import (
    BACKGROUND,
    BANDWIDTH,
    BUSY_POLL_US,
    COMPLETE,
    CONNECTED,
    FAILED,
    LOAD,
    LOST,
    POSTCOPY,
    REASONS,
    RECONNECTING,
    UNLOAD,
    Program,
    cut,
    slow,
    slow_down,
    wait_for,
)

QUICK = {"heartbeat_ms": 300, "dead_ms": 1500}


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what,reason", [({"token": "x" * 16}, "token"), ({"uuid": "x" * 16}, "uuid")])
def test_a_stranger_is_refused_and_told_why(ram, what, reason):
    file = ram(1)
    file.attach()
    with pytest.raises(OSError) as caught:
        file.export(**what)
    assert caught.value.reason == reason
    assert file.states()[0] == 0
    # The right one may come after it.
    file.export()
    file.switch()
    file.check()
    file.complete()


def test_another_size_is_refused(ram):
    small, large = ram(1), ram(2)
    small.attach()
    large.port = small.port
    with pytest.raises(OSError) as caught:
        large.export()
    assert caught.value.reason == "size"


def test_a_second_source_is_refused(ram):
    one, two = ram(1), ram(1)
    one.connect()
    two.port = one.port
    with pytest.raises(OSError) as caught:
        two.export(connect_ms=1)
    assert caught.value.reason == "busy"
    one.switch()
    one.check()
    one.complete()


def test_nobody_listens(ram):
    file = ram(1)
    with pytest.raises(OSError) as caught:
        file.export(port=7999, connect_ms=300)
    assert caught.value.reason in ("unreachable", "timeout")
    assert file.states() == (0, 0)


@pytest.mark.parametrize("listening", ["::", "fd77::2"])
def test_addresses_of_ipv6(ram, hosts, transport, listening):
    off = "net.ipv6.conf.mig0.disable_ipv6"
    before = [host.sh(f"sysctl -n {off}").strip() for host in hosts]
    try:
        for number, host in enumerate(hosts, 1):
            # A host asks for its neighbours' addresses by its link-local one, which the lab's network has not.
            host.sh(f"sysctl -q {off}=0; for a in fd77 fe80; do ip -6 addr add $a::{number}/64 dev mig0 nodad || exit; done")
            if transport == "rxe":
                # The device takes it up a little later.
                gid = f"fd77:{'0000:' * 6}000{number}"
                wait_for(lambda h=host, g=gid: g in h.sh("cat /sys/class/infiniband/rxe0/ports/1/gids/* 2>/dev/null", check=False))
        file = ram(2)
        file.attach(address=listening)
        file.export(address="fd77::2")
        file.precopy(300)
        file.leave_dirty()
        file.switch()
        file.check()
        file.complete()
        file.release()
    finally:
        for number, host in enumerate(hosts, 1):
            host.sh(f"for a in fd77 fe80; do ip -6 addr del $a::{number}/64 dev mig0; done; sysctl -q {off}={before[number - 1]}")


def test_calls_in_the_wrong_state(ram):
    file = ram(1)
    for what, order in (("precopy", {"ms": 1}), ("switch", {}), ("abort", {}), ("take_back", {}), ("tune", {"what": BACKGROUND, "value": 1})):
        with pytest.raises(OSError):
            file.src(what, **order)
    file.connect()
    with pytest.raises(OSError):
        file.dst("switch")
    with pytest.raises(OSError):
        file.src("release")
    with pytest.raises(OSError):
        file.attach()
    # A file that is mapped can't be a destination.
    file.src("abort")
    file.release()
    file.source.program("hold", file.path).hear()
    file.turn_round()
    with pytest.raises(OSError):
        file.attach()


# -- cut ---------------------------------------------------------------------------------------------------------------


def moves_with(file, writer):
    """A file that a program writes is moved after all."""
    file.precopy(300)
    assert writer.tell("stop")["bad"] == 0
    file.switch()
    file.check()
    file.complete()


@pytest.mark.parametrize("how", ["drop", "down"])
def test_cut_during_pre_copy(ram, how):
    """Rule 3: the VM stays, and nobody hangs."""
    file = ram().connect(**QUICK)
    writer = file.run("wzhp")
    file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 50)
    with cut(file.dest, how):
        for side in (file.src, file.dst):
            assert side("wait", states=[], ms=60000)[0] == FAILED
    file.release()
    file.connect()
    moves_with(file, writer)


@pytest.mark.parametrize("seconds", [1, 10])
def test_a_cut_of_pre_copy_is_survived_if_it_is_short(ram, seconds):
    """Rule 3: the connection makes up for what takes less than a peer may be silent; after more the VM stays."""
    short = seconds < 5
    file = ram().connect()
    writer = file.run("wzhp")
    file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 50)
    # Longer than 4 s no queue pair of rxe tries again, on slow hosts too.
    with cut(file.dest, "drop", seconds if short else slow(seconds)):
        pass
    if not short:
        for side in (file.src, file.dst):
            assert side("wait", states=[], ms=60000)[0] == FAILED
        file.release()
        file.connect()
    moves_with(file, writer)


def test_what_was_registered_is_not_registered_again_when_messages_are(ram):
    """Rule 3: pre-copy begins while the network is cut. rxe makes what stands behind a message once more with it, and a registration fails then."""
    file = ram().connect(heartbeat_ms=1000, dead_ms=20000)
    writer = file.run("wzhp")
    with cut(file.dest, "drop", 3):
        file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 50)
    moves_with(file, writer)


@pytest.mark.expect("Call Trace")  # of a memory cgroup that is full, in which there is nobody to end
def test_no_room_for_pages_ahead_ends_the_move(ram):
    """Rule 3: what can't be copied ahead would not fit after the switch either. Both sides say so."""
    file, cgroup = ram(16), "/sys/fs/cgroup/tight"
    home = file.dest.sh("cut -d: -f3 /proc/$PPID/cgroup").strip()
    file.dest.sh(f"echo +memory > /sys/fs/cgroup/cgroup.subtree_control; mkdir -p {cgroup} && echo 0 > {cgroup}/memory.swap.max")
    file.dest.sh(f"echo $PPID > {cgroup}/cgroup.procs")
    try:
        # Who attaches pays for pages that nobody has faulted on.
        file.attach(**QUICK)
    finally:
        file.dest.sh(f"echo $PPID > /sys/fs/cgroup{home}/cgroup.procs; echo 4M > {cgroup}/memory.max")
    file.export(**QUICK)
    file.src("precopy", ms=120000)
    for side in (file.src, file.dst):
        state, reason = side("wait", states=[], ms=60000)
        assert (state, REASONS[reason]) == (FAILED, "no_memory")
    file.release()
    file.dest.sh(f"rmdir {cgroup}")
    file.connect()
    file.precopy(300)
    file.switch()
    file.check()
    file.complete()


def test_cut_during_the_switch(ram):
    """The thread that applies the final set waits for READs that don't come back: it notices."""
    file = ram(8).connect(**QUICK)
    file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 50)
    with cut(file.dest, "drop"):
        with pytest.raises(OSError):
            file.src("switch", ms=5000)
        assert file.dst("wait", states=[], ms=60000)[0] in (FAILED, LOST)
    file.release()


@pytest.mark.parametrize("how,seconds", [("drop", 1), ("down", 3), ("loss", 10)])
def test_rule_4_cut_after_the_switch(ram, how, seconds):
    """Only those wait who touch what is missing, and they go on by themselves."""
    file = ram().connect(**QUICK)
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 5000)
    reader = file.check("map", later=True)
    wait_for(lambda: file.dst("stats")["pages_demand"] > 20)
    with cut(file.dest, how):
        time.sleep(slow(seconds))
    slow_down(file.dest, 0)
    file.dst("tune", what=BACKGROUND, value=1)
    file.judge(reader)
    file.complete()
    if seconds > 1:
        assert file.dst("stats")["reconnects"] > 0


def test_rule_4_cut_while_pages_are_pulled(ram):
    """What was under way when the connection went is pulled again, though nobody asks for it."""
    file = ram(8).connect()
    file.dst("tune", what=BANDWIDTH, value=(2 << 20) // slow(1))
    file.switch()
    for _turn in range(3):
        before = file.dst("stats")["pages_background"]
        wait_for(lambda b=before: file.dst("stats")["pages_background"] > b + 32)
        file.dest.sh("echo 1 > /sys/kernel/debug/remote_ram/inject_drop")
        wait_for(lambda: file.dst("stats")["state"] == POSTCOPY)
    file.dst("tune", what=BANDWIDTH, value=0)
    file.complete()
    file.check()


def test_rule_4_reads_that_fail(ram):
    file = ram(4).connect()
    file.dest.sh("echo 15 > /sys/kernel/debug/remote_ram/inject_fail")
    file.switch()
    reader = file.check("map", later=True)
    wait_for(lambda: file.dst("stats")["reconnects"] > 0)
    file.dest.sh("echo 0 > /sys/kernel/debug/remote_ram/inject_fail")
    file.judge(reader)
    file.complete()


def test_rule_4_who_waits_for_a_connection_sleeps(ram):
    """Waiting costs no CPU: a thread that waits for its page while the connection is down uses less than a tenth of one."""
    file = ram(2).connect(**QUICK)
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    with cut(file.dest, "drop"):
        wait_for(lambda: file.dst("stats")["state"] == RECONNECTING)
        reader = file.check("map", threads=4, later=True)
        wait_for(lambda: file.dst("stats")["faults_retry"] >= 4)
        ticks = f"sleep {slow(1)}; a=$(cut -d' ' -f15 /proc/{reader.pid}/stat); sleep 5; b=$(cut -d' ' -f15 /proc/{reader.pid}/stat); echo $((b - a))"
        # A thread that looks again and again takes all 500. What wakes them costs as much more as the host is slow.
        assert int(file.dest.sh(ticks)) < slow(50)
    file.dst("tune", what=BACKGROUND, value=1)
    file.judge(reader)
    file.complete()


#: Reads a byte of a page when it is told to, and takes signals meanwhile.
READS = """
import json, mmap, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_what: None)
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
print(json.dumps({"started": True}), flush=True)
sys.stdin.readline()
print(json.dumps({"value": memory[int(sys.argv[2]) * 4096]}), flush=True)
"""


def test_rule_4_who_waits_takes_signals(ram):
    """QEMU kicks its threads by them: who waits for a page takes them, and waits on."""
    file = ram(1).connect(**QUICK)
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    program = Program(file.dest, ["python3", "-c", READS, file.path, "9"])
    assert program.hear() == {"started": True}
    pending = f"grep -hE '^(SigPnd|ShdPnd):' /proc/{program.pid}/status | grep -c '[1-9a-f][0-9a-f]*$'"
    with cut(file.dest, "drop"):
        wait_for(lambda: file.dst("stats")["state"] == RECONNECTING)
        late = program.tell_later("go")
        wait_for(lambda: file.dst("stats")["faults_retry"] > 0)
        for _turn in range(3):
            before = file.dst("stats")["faults_retry"]
            program.kill(10)
            # Taken, and the same instruction faults again.
            wait_for(lambda b=before: file.dst("stats")["faults_retry"] > b)
            assert file.dest.sh(pending, check=False).strip() == "0"
        assert not late.done()
    file.dst("tune", what=BACKGROUND, value=1)
    assert late() == {"value": int(file.source.sh(f"od -An -tu1 -j {9 * 4096} -N 1 {file.path}"))}
    file.complete()
    file.check()


def test_a_thread_may_spin_before_it_sleeps(ram):
    """As long as it was told and no longer: a page that does not come costs that much CPU time, once."""
    file, spent, late = ram(1), [], []
    file.dest.sh("echo 500000 > /sys/module/remote_ram/parameters/busy_poll_us")
    file.connect()
    file.dst("tune", what=BACKGROUND, value=0)
    with pytest.raises(OSError):
        file.dst("tune", what=BUSY_POLL_US, value=1000001)
    file.switch()
    programs = [file.dest.program("hold", file.path) for _turn in range(2)]
    with cut(file.dest, "drop"):
        for number, program in enumerate(programs):
            program.hear()
            ticks = f"cut -d' ' -f15 /proc/{program.pid}/stat"
            before, faults = int(file.dest.sh(ticks)), file.dst("stats")["faults_retry"]
            late.append(program.tell_later(f"peek {9 + 100 * number}"))
            wait_for(lambda f=faults: file.dst("stats")["faults_retry"] > f)
            time.sleep(slow(1))
            spent.append(int(file.dest.sh(ticks)) - before)
            file.dst("tune", what=BUSY_POLL_US, value=0)
    assert all("value" in answer() for answer in late)
    # 50 of what spun all the time.
    assert spent[1] < 10 < spent[0], spent
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check()


@pytest.mark.expect("hardware memory corruption")
def test_rule_4_cut_for_good(ram):
    """What is missing is lost, page by page: a machine check for those, and the rest can be read. Who waits stays killable."""
    file = ram(2).connect(reconnect_ms=4000, **QUICK)
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    program = file.dest.program("hold", file.path)
    program.hear()
    here = program.tell("peek 3")["value"]
    with cut(file.source, "drop"):
        wait_for(lambda: file.dst("stats")["state"] == RECONNECTING)
        victim = file.check("map", later=True)
        wait_for(lambda: file.dst("stats")["faults_retry"] > 1)
        victim.kill()
        assert victim.reap(30) == -9
        assert file.dst("wait", states=[], ms=90000)[0] == LOST
        assert program.tell("peek 3") == {"value": here}
        assert program.tell("peek 400") == {"sigbus": 4}  # BUS_MCEERR_AR
        assert file.dst("stats")["pages_lost"] > 0
        assert file.dst("stats")["faults_poison"] > 0
        assert "Input/output error" in file.dest.sh(f"dd if={file.path} of=/dev/null bs=4096 skip=400 count=1 2>&1", check=False)


@pytest.mark.expect("hardware memory corruption")
@pytest.mark.parametrize("when", ["before", "ahead", "dirty"])
def test_rule_4_a_page_that_the_source_can_not_read(ram, when):
    """Bad memory under one page, which goes bad before all, when it was copied ahead, or when it was written after that.

    All other pages move, and what the destination has not got of that one it tells by a machine check, for it alone.
    """
    file = ram(4)
    owner = file.source.program("hold", file.path)
    owner.hear()

    def spoil():
        # The owner of the memory may be told by a signal.
        assert owner.tell("poison 700") in ({"ret": 0, "errno": 0}, {"sigbus": 5}, {"sigbus": 4})

    if when == "before":
        spoil()
    file.connect()
    file.precopy(400)
    if when != "before":
        file.precopy(3600000, stop=1)
        if when == "dirty":
            assert owner.tell("sweep 600 0") == {"ret": 0, "errno": 0}
        spoil()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    here = file.dest.program("hold", file.path)
    here.hear()
    good, bad = here.tell("peek 701"), here.tell("peek 700")
    assert good.get("value")
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    lost = 0 if when == "ahead" else 1
    for stats in (file.src("stats"), file.dst("stats")):
        assert (stats["pages_lost"], stats["pages_missing"]) == (lost, 0)
    if when != "dirty":  # of which the shadow knows nothing
        last = file.judge(file.dest.program("check", file.path, file.shadow, 1, "left"), 1)
        assert last["lost"] == lost
    assert here.tell("peek 701") == good
    if not lost:
        assert bad.get("value") and here.tell("peek 700") == bad
        return
    assert bad == here.tell("peek 700") == {"sigbus": 4}
    assert file.dst("stats")["faults_poison"] == 2
    # A file that has lost a page can't be given to others. What is punched out is not missed any more.
    file.release()
    with pytest.raises(OSError) as caught:
        file.dst("session", what="export", address=file.source.address, port=7000)
    assert caught.value.errno == errno.EBUSY
    assert file.dst("stats")["pages_lost"] == 1
    assert here.tell("remove 700 1") == {"ret": 0, "errno": 0}
    assert here.tell("peek 700") == {"value": 0} and here.tell("peek 701") == good
    assert file.dst("stats")["pages_lost"] == 0
    # Nothing is missing now, so it can go on to others.
    owner.kill()
    file.src("close")
    file.src("unlink")
    file.create(file.source)
    file.turn_round()
    file.connect().switch()
    file.complete()
    there = file.dest.program("hold", file.path)
    there.hear()
    assert there.tell("peek 700") == {"value": 0} and there.tell("peek 701") == good


def test_rule_4_the_device_goes_while_there_is_no_connection(ram, transport):
    """Its keys go with it, and a new device serves the rest."""
    file = ram(4).connect(**QUICK)
    file.precopy(400)
    file.leave_dirty()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    add = f"rdma link add {transport}0 type {transport} netdev mig0"
    with cut(file.dest, "drop"):
        wait_for(lambda: RECONNECTING in file.states())
        wait_for(lambda: file.states() == (RECONNECTING, RECONNECTING))
        for host in (file.source, file.dest):
            host.sh(f"rdma link delete {transport}0")
            host.sh(add)
    file.check()
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()


def test_rule_4_the_device_goes_while_pages_arrive(ram, transport):
    file = ram(4).connect(**QUICK)
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 10000)
    reader = file.check("map", later=True)
    wait_for(lambda: file.dst("stats")["pages_demand"] > 20)
    file.dest.sh(f"rdma link delete {transport}0; rdma link add {transport}0 type {transport} netdev mig0")
    wait_for(lambda: file.dst("stats")["reconnects"] > 0)
    file.source.sh(f"rdma link delete {transport}0; rdma link add {transport}0 type {transport} netdev mig0")
    slow_down(file.dest, 0)
    file.dst("tune", what=BACKGROUND, value=1)
    file.judge(reader)
    file.complete()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_rule_3_the_module_is_unloaded_at_the_peer(ram, side):
    """Nobody holds the file there, so it may be. Here that is a lost connection, and the next attempt is like the first."""
    file = ram(6).connect()
    gone, stays = (file.source, file.dst) if side == "source" else (file.dest, file.src)
    writer = file.run("wzhp") if side == "destination" else None
    file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 50)
    gone.do("close", name=file.name)
    try:
        gone.sh(UNLOAD)
        assert stays("wait", states=[], ms=60000)[0] == FAILED
        stays("release")
    finally:
        gone.sh(LOAD)
    file.create(gone)
    if side == "source":
        file.fill()
    file.connect()
    file.precopy(300)
    if writer:
        assert writer.tell("stop")["bad"] == 0
    file.switch()
    file.check()
    file.complete()


@pytest.mark.expect("hardware memory corruption")
@pytest.mark.parametrize("how", ["unlinked", "unloaded"])
def test_rule_4_what_served_is_taken_away(ram, how):
    """A file serves without a descriptor, and without a name. Without both it is gone, and what is missing is lost as after a cut for good."""
    file = ram(2).connect(reconnect_ms=2000)
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    program = file.dest.program("hold", file.path)
    program.hear()
    file.src("unlink" if how == "unlinked" else "close")
    here = program.tell("peek 3")
    assert here.get("value"), here
    if how == "unlinked":
        file.src("close")
        end, again = "true", "true"
    else:
        end, again = UNLOAD, LOAD
    try:
        file.source.sh(end)
        assert file.dst("wait", states=[], ms=60000)[0] == LOST
    finally:
        file.source.sh(again)
    assert program.tell("peek 3") == here
    assert program.tell("peek 400") == {"sigbus": 4}
    assert file.dst("stats")["pages_lost"] > 400


# -- ended -------------------------------------------------------------------------------------------------------------


def test_abort_while_it_listens(ram):
    file = ram(1)
    file.attach()
    file.dst("abort")
    assert file.states()[1] == FAILED
    file.dst("release")


@pytest.mark.expect("hardware memory corruption")
def test_abort_after_the_switch(ram):
    """A source may not withhold pages; a destination may give up, and those who wait get an answer."""
    file = ram(2).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    with pytest.raises(OSError):
        file.src("abort")
    program = file.dest.program("hold", file.path)
    program.hear()
    slow_down(file.dest, 500000)
    waits = program.tell_later("peek 9")
    wait_for(lambda: file.dst("stats")["faults_retry"] > 0)
    file.dst("abort")
    assert file.states()[1] == LOST
    assert set(waits()) <= {"value", "sigbus"}
    assert program.tell("peek 300") == {"sigbus": 4}


@pytest.mark.expect("hardware memory corruption")
def test_a_vm_that_is_taken_back(ram):
    file = ram(2).connect()
    file.precopy(300)
    file.leave_dirty()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    file.src("take_back")
    assert file.src("wait", states=[], ms=1000)[0] == FAILED
    assert file.dst("wait", states=[], ms=30000)[0] == LOST
    writer = file.run("wzhp")
    file.release()
    # And then it is moved after all. The destination asks for a page before the switch, which needs a key.
    file.attach()
    program = file.dest.program("hold", file.path)
    program.hear()
    file.export()
    for page in range(0, 512, 40):
        assert "value" in program.tell(f"peek {page}")
    file.precopy(300)
    writer.tell("stop")
    file.switch()
    file.check()
    file.complete()


def outcome(call):
    """None, or the number of the error."""
    try:
        call()
    except OSError as err:
        return err.errno
    return None


def test_abort_and_switch_at_once(ram):
    """One of them wins: a switch that succeeded is not undone, and one that was aborted did not happen."""
    file, dice = ram(2), random.Random(5)
    for turn in range(12):
        file.connect()
        # Or all may be in before somebody asks for an abort, which then has nothing to end.
        file.dst("tune", what=BACKGROUND, value=0)
        switch = file.source.start("switch", name=file.name)
        time.sleep(slow(dice.random() * 0.06))
        aborted = outcome(lambda: file.src("abort"))
        if outcome(switch) is None:
            assert aborted is not None, turn
            file.take_shadow()
            file.dst("tune", what=BACKGROUND, value=1)
            file.complete()
            file.check(threads=1)
            file.release()
            file.turn_round()
        else:
            assert file.states()[0] == FAILED, turn
            # It may have switched, and learns that it must not run.
            assert file.dst("wait", states=[], ms=30000)[0] in (FAILED, LOST)
            file.release()


#: Maps all of a file anew, again and again.
TOUCH = """
import mmap, time
end = time.time() + {seconds}
file = open("{path}", "r+b")
while time.time() < end:
    with mmap.mmap(file.fileno(), 0) as pages:
        sum(pages[at] for at in range(0, len(pages), 4096))
"""


def test_rule_3_a_fault_that_waits_for_a_page_under_way_does_not_keep_a_session_from_its_end(ram):
    """Pages are copied ahead again while somebody touches them at the destination; then the line goes, and the destination gives up."""
    file = ram(4).connect(dead_ms=20000, heartbeat_ms=1000)
    file.precopy(400)
    writer = file.run("w", threads=2)
    file.src("precopy", ms=20000)
    touching = file.dest.start("sh", script=f"python3 - <<'END'\n{TOUCH.format(seconds=slow(6), path=file.path)}\nEND", check=False)
    time.sleep(slow(2))
    with cut(file.dest, "drop"):
        time.sleep(slow(2))
        file.dst("abort")
        assert file.states()[1] == FAILED
        file.dst("release")
    touching()
    assert writer.tell("stop")["bad"] == 0
    writer.kill()
    assert file.src("wait", states=[FAILED], ms=120000)[0] == FAILED
    file.src("release")


def test_a_switch_that_nobody_waited_for(ram):
    """A source that gave up while its destination switched says so: the destination does not wait for it."""
    file = ram(2).connect(dead_ms=60000, heartbeat_ms=1000)
    with cut(file.source, "drop"):
        with pytest.raises(OSError) as caught:
            file.src("switch", ms=300)
        assert caught.value.reason == "timeout"
    assert file.src("wait", states=[CONNECTED], ms=100)[0] == FAILED
    file.dst("abort")
    assert file.states()[1] in (FAILED, LOST)


def test_completed_and_back_again(ram):
    file = ram(2)
    for _turn in range(3):
        file.connect()
        writer = file.run("wzhmpvk")
        file.precopy(200)
        writer.tell("stop")
        writer.finish()
        file.switch()
        file.check()
        file.complete()
        assert file.states() == (COMPLETE, COMPLETE)
        file.release()
        file.turn_round()
