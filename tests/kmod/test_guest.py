# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real KVM guest on the files: moved while it writes, stopped, looked into, and killed in the middle."""

from __future__ import annotations

import time

import pytest
from kvm_guest import ARRIVES, MIB, Guest, booted, keep, move, put_initramfs

from hosts import BACKGROUND, FAILED, LOST, POSTCOPY, RECONNECTING, cut, slow, wait_for


@pytest.fixture
def vm(ram, hosts):
    """A guest that runs on the first host, as it was when it had booted."""
    for host in hosts:
        put_initramfs(host)
    keep(hosts[0])
    file = ram(MIB, fill=False)
    guests = [booted(hosts[0], file)]
    yield file, guests
    for guest in guests:
        guest.kill(18)
        guest.kill()


def test_a_guest_is_moved_and_moved_back(vm):
    file, guests = vm
    file.attach()
    guests.append(Guest(file.dest, file, incoming=ARRIVES))
    move(file, guests[0], guests[1], 3000)
    file.complete()
    guests[1].check()
    # Back, without pre-copy. The source's QEMU is killed, and its file serves all there is.
    file.release()
    file.turn_round()
    file.attach(heartbeat_ms=300, dead_ms=2000)
    file.dst("tune", what=BACKGROUND, value=0)
    guests.append(Guest(file.dest, file, incoming=ARRIVES))
    move(file, guests[1], guests[2], 0, end="kill")
    wait_for(lambda: guests[2].qmp("query-status")["status"] == "running", 120)
    # In the middle: stopped, and while a debugger holds it another process reads its memory, which arrives for that.
    before = file.dst("stats")
    assert before["pages_missing"] > 0 and before["faults_nowait"] + before["faults_retry"] + before["faults_plain"] > 0
    guests[2].kill(19)
    reader, size = file.dest.reader(guests[2].pid, file, 97)
    said = file.dest.sh(f"gdb -nx -q -batch -p {guests[2].pid} -ex 'info threads' -ex 'shell {reader}' -ex detach 2>&1 | tail -20")
    assert ("Thread" in said or "LWP" in said) and size in said.split(), said
    after = file.dst("stats")
    assert after["faults_plain"] > before["faults_plain"] and 0 < after["pages_missing"] < before["pages_missing"]
    guests[2].kill(18)
    # KVM's faults can't wait; those for which nothing was in the way have begun to be fetched at once.
    begun = sum(map(int, file.dest.sh("awk '/^faults_begun:/ {print $2}' /sys/kernel/debug/remote_ram/sessions/*").split()))
    assert 0 < begun <= file.dst("stats")["faults_nowait"]
    # And the connection is cut while it runs.
    file.dest.sh("echo 1 > /sys/kernel/debug/remote_ram/inject_drop")
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    guests[2].check()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_rule_3_a_qemu_that_is_killed_before_the_switch(vm, side):
    """The source's takes its VM along, and no session with it; the destination's leaves the VM as it was, and it can be moved again."""
    file, guests = vm
    file.attach()
    guests.append(Guest(file.dest, file, incoming=ARRIVES))
    file.export()
    file.src("precopy", ms=60000)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 50)
    guests[side == "destination"].kill()
    wait_for(lambda: not guests[side == "destination"].alive())
    assert file.states()[0] not in (FAILED, LOST)
    file.src("abort")
    for end in (file.src, file.dst):
        assert end("wait", states=[], ms=60000)[0] == FAILED
    file.release()
    if side == "source":
        # What the VM had is still there, for whoever wants to look into it.
        assert file.source.sh(f"cmp -s {file.path} /dev/zero || echo contents").strip() == "contents"
        return
    guests[0].check()
    file.dest.sh(f"rm -f /dev/shm/{file.name}.*")
    file.attach()
    guests.append(Guest(file.dest, file, incoming=ARRIVES))
    move(file, guests[0], guests[2], 1000)
    file.complete()
    guests[2].check()


@pytest.mark.above
def test_a_guest_whose_qemu_aborts_in_the_middle_can_be_read(vm):
    """A core dump pulls what is missing, and the whole RAM can be read from the file afterwards."""
    file, guests = vm
    file.attach()
    guests.append(Guest(file.dest, file, incoming=ARRIVES, more="-S"))
    file.dst("tune", what=BACKGROUND, value=0)
    move(file, guests[0], guests[1], 1000)
    assert file.dst("stats")["state"] == POSTCOPY
    missing = file.dst("stats")["pages_missing"]
    assert missing > 0
    pid = guests[1].pid
    file.dest.sh("echo /var/tmp/core.%p > /proc/sys/kernel/core_pattern")
    file.dest.sh(f"echo 0x7f > /proc/{pid}/coredump_filter; prlimit --core=unlimited --pid {pid}")
    guests[1].kill(6)
    # A READ for each page, and a core file on an emulated disk: minutes when the other transport has guests as well.
    wait_for(lambda: not guests[1].alive(), 400)
    assert int(file.dest.sh("stat -c %s /var/tmp/core.*; rm -f /var/tmp/core.*").split()[0]) > MIB << 20
    # Every page the source had is here; the guest did not run, so next to nothing has changed.
    pages = "import hashlib,sys; f=open(sys.argv[1],'rb'); print(' '.join(hashlib.md5(f.read(4096)).hexdigest()[:8] for _turn in range(int(sys.argv[2]))))"
    there, here = (host.sh(f"python3 -c \"{pages}\" {file.path} {file.pages}").split() for host in (file.source, file.dest))
    assert sum(a != b for a, b in zip(there, here, strict=True)) < 16
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    assert LOST not in file.states()


def test_rule_6_a_guest_that_waits_without_a_line_can_be_killed(vm):
    """KVM faults for it in a workqueue, where nothing can be killed, and its process waits for that when it ends."""
    file, guests = vm
    file.attach(heartbeat_ms=300, dead_ms=2000)
    guests.append(Guest(file.dest, file, incoming=ARRIVES))
    file.dst("tune", what=BACKGROUND, value=0)
    move(file, guests[0], guests[1], 0)
    wait_for(lambda: file.dst("stats")["faults_nowait"] > 0)
    with cut(file.dest, "drop"):
        wait_for(lambda: file.dst("stats")["state"] == RECONNECTING)
        time.sleep(slow(2))
        guests[1].kill()
        # All of its threads: the first one may be gone while others are stuck.
        wait_for(lambda: file.dest.sh(f"test -e /proc/{guests[1].pid} || echo gone", check=False) == "gone\n")
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
