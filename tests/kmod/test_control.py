# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Many moves, memory under pressure, policies that are shmem's, and calls with nonsense."""

from __future__ import annotations

import errno
import os
import random

import pytest

from hosts import BACKGROUND, BANDWIDTH, PRECOPY, wait_for


def moves(ram, count, seed):
    """One file back and forth, each time another way."""
    dice = random.Random(seed)
    file = ram(2)
    for number in range(count):
        file.connect()
        writer = file.run("".join(dice.sample("wwzhmpvkcr", 5)), threads=dice.randint(1, 4))
        for _turn in range(dice.randint(0, 2)):
            file.precopy(dice.choice((20, 100, 300)), stop=dice.choice((0, 10)))
        assert writer.tell("stop")["bad"] == 0, (seed, number)
        writer.kill()
        assert writer.reap(30) == -9
        if dice.random() < 0.3:
            file.dst("tune", what=BACKGROUND, value=0)
        file.switch()
        if dice.random() < 0.5:
            there = file.run("wzhmpvkcr", threads=2, host=file.dest)
            file.dst("tune", what=BACKGROUND, value=1)
            file.complete()
            assert there.tell("stop")["bad"] == 0, (seed, number)
            there.kill()
            assert there.reap(30) == -9
        file.check(dice.choice(("map", "read", "mem", "vm")), threads=2)
        file.dst("tune", what=BACKGROUND, value=1)
        file.complete()
        file.release()
        file.turn_round()


def test_moves_back_and_forth(ram):
    moves(ram, 6, 1)


@pytest.mark.long
def test_two_hundred_moves_back_and_forth(ram):
    moves(ram, 200, int.from_bytes(os.urandom(4), "big"))


def test_the_memory_cgroup_pays_for_what_arrives(ram):
    """Pages that nobody has faulted on are charged to who attached, those that somebody faults on to who faults."""
    file = ram(8, fill=True)
    file.attach()
    file.dest.sh("mkdir -p /sys/fs/cgroup/ram; echo +memory > /sys/fs/cgroup/cgroup.subtree_control")
    file.export()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    shmem = "grep '^shmem ' /sys/fs/cgroup/ram/memory.stat | cut -d' ' -f2"
    before = int(file.dest.sh(shmem))
    reader = file.dest.program("check", file.path, file.shadow, 2, "map", cgroup="/sys/fs/cgroup/ram")
    file.judge(reader, 2)
    assert int(file.dest.sh(shmem)) - before > 6 << 20
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.dest.sh("rmdir /sys/fs/cgroup/ram")


#: Sets a policy through one mapping of a file, and asks for it through another.
MBIND = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
MBIND, GET_MEMPOLICY, MPOL_BIND, MPOL_F_ADDR = 237, 239, 2, 2
file = open("{path}", "r+b")
first, second = (mmap.mmap(file.fileno(), 0) for _ in range(2))
address = lambda where: ctypes.addressof(ctypes.c_char.from_buffer(where))
nodes, mode, size = ctypes.c_ulong(1), ctypes.c_int(-1), len(first)
assert libc.syscall(MBIND, ctypes.c_void_p(address(first)), ctypes.c_ulong(size), MPOL_BIND, ctypes.byref(nodes), 64, 0) == 0, ctypes.get_errno()
assert libc.syscall(GET_MEMPOLICY, ctypes.byref(mode), None, 0, ctypes.c_void_p(address(second)), MPOL_F_ADDR) == 0, ctypes.get_errno()
print(mode.value, sum(second[::4096]) >= 0)
"""


def test_a_numa_policy_is_the_files(ram):
    """mbind() on one mapping is seen through another, as with any shmem file; pages arrive under it."""
    file = ram(2, fill=True)
    file.attach()
    file.export()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    script = MBIND.format(path=file.path)
    assert file.dest.sh(f"python3 - <<'END'\n{script}\nEND").split() == ["2", "True"]
    assert file.dst("stats")["pages_missing"] == 0
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check()


def test_the_first_session_fixes_the_size(ram):
    """Whoever waits for a page looks at bitmaps that were made for it."""
    file = ram(2, fill=True)
    file.source.sh(f"truncate -s 3M {file.path} && truncate -s 2M {file.path}")
    file.attach()
    file.export()
    file.switch()
    file.complete()
    file.release()
    for host in (file.source, file.dest):
        assert "busy" in host.sh(f"truncate -s 1M {file.path} 2>&1", check=False)
    file.check()


def test_swap_on_both_sides(ram):
    """Pages are swapped out while they are written, offered, read and pulled."""
    file = ram(8)
    swap = "cd /var/tmp; test -e swap || { dd if=/dev/zero of=swap bs=1M count=64 status=none && chmod 600 swap && mkswap -q swap; }; swapon /var/tmp/swap"
    for host in (file.source, file.dest):
        host.sh(swap)
    try:
        file.connect()
        writer = file.run("wzhpk")
        out = file.source.program("hold", file.path)
        out.hear()
        for _turn in range(3):
            assert out.tell("pageout")["ret"] == 0
            file.precopy(300)
        assert writer.tell("stop")["bad"] == 0
        assert out.tell("pageout")["ret"] == 0
        file.switch()
        there = file.dest.program("hold", file.path)
        there.hear()
        reader = file.check("map", later=True)
        for _turn in range(3):
            assert there.tell("pageout")["ret"] == 0
        file.judge(reader)
        file.complete()
        assert there.tell("pageout")["ret"] == 0
        file.check("map")
        assert "/var/tmp/swap" in file.dest.sh("cat /proc/swaps")
    finally:
        for host in (file.source, file.dest):
            host.sh("swapoff /var/tmp/swap")


def test_huge_pages_after_completion(ram):
    """None while pages are missing; afterwards the mapping of a process that comes then can be collapsed, and is right."""
    file = ram(8).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    early = file.dest.program("hold", file.path)
    early.hear()
    assert early.tell("collapse")["ret"] == -1
    early.kill()
    assert early.reap(20) == -9
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check()
    later = file.dest.program("hold", file.path)
    later.hear()
    for page in range(0, 2048, 64):
        later.tell(f"peek {page}")
    assert later.tell("collapse") == {"ret": 0, "errno": 0}
    file.check()
    # Back again, huge pages and all: they are written while they are offered.
    file.release()
    file.turn_round()
    file.connect()
    writer = file.run("wzhk")
    file.precopy(500)
    assert writer.tell("stop")["bad"] == 0
    file.switch()
    file.check()
    file.complete()


def test_a_host_that_makes_huge_pages_of_everything_is_refused(ram):
    """shmem_enabled=force overrules the mount. Refused before anything is connected, and taken when it is off again."""
    file = ram(8)
    knob = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    before = file.dest.sh(f"sed 's/.*\\[//;s/\\].*//' {knob}").strip()
    try:
        file.dest.sh(f"echo force > {knob}")
        with pytest.raises(OSError) as caught:
            file.attach()
        assert caught.value.errno == errno.EOPNOTSUPP
    finally:
        file.dest.sh(f"echo {before} > {knob}")
    file.connect()
    file.switch()
    file.complete()
    file.check()


def test_pre_copy_ends_when_all_of_a_quiet_file_is_there(ram):
    """Not at its bound, which is longer than any test may take."""
    file = ram(2).connect()
    file.precopy(3600000, stop=1)
    assert file.src("stats")["pages_dirty"] <= 1
    file.switch()
    file.complete()
    file.check()


def test_a_bandwidth_limit_and_its_end(ram):
    file = ram(8).connect()
    file.src("precopy", ms=60000, bandwidth=64 << 10)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 0)
    assert file.src("stats")["pages_ahead"] < 1500
    file.src("tune", what=BANDWIDTH, value=0)
    wait_for(lambda: file.src("stats")["pages_ahead"] > 1500)
    assert file.src("wait", states=[PRECOPY], ms=1000)[0] == PRECOPY
    file.src("precopy", ms=0)
    file.switch()
    file.check()
    file.complete()


@pytest.mark.parametrize("seed", [1, 2])
def test_calls_with_arguments_at_random(ram, seed):
    """An error, never an oops; in no session, and in the middle of one."""
    file = ram(1)
    found = file.src("fuzz", seed=seed, count=300)
    assert found.get("Invalid argument", 0) > 10, found
    file.source.do("clean")
    file.source.do("create", name=file.name, size=file.size)
    file.fill()
    file.connect()
    file.dst("tune", what=BACKGROUND, value=0)
    for side in (file.src, file.dst):
        assert side("fuzz", seed=seed + 100, count=150).get("Invalid argument", 0) > 5


def test_limits_of_the_mount(hosts):
    host = hosts[0]
    # Size of all files: 2 GiB.
    host.do("create", name="big.ram", size=3 << 29)
    with pytest.raises(OSError):
        host.do("create", name="more.ram", size=1 << 30)
    assert "1572864" in host.sh("stat -f -c '%b %a %S' /run/remote_ram; df -k --output=used /run/remote_ram")


def test_writes_beyond_two_gib(hosts):
    said = hosts[0].sh(
        "mkdir -p /run/large && mount -t remote_ram none /run/large && truncate -s 3G /run/large/f && cd /run/large && "
        "printf here | dd of=f bs=4096 seek=600000 conv=notrunc 2>&1 && dd if=f bs=4 skip=614400000 count=1 2>/dev/null; "
        "cd /; umount /run/large; rmdir /run/large"
    )
    assert said.endswith("here"), said
