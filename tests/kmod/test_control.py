# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Many moves, memory under pressure, policies that are shmem's, and calls with nonsense."""

from __future__ import annotations

import errno
import os
import random

import pytest

from hosts import BACKGROUND, BANDWIDTH, PRECOPY, TRACING, slow, slow_down, traced, wait_for


def moves(ram, count, seed):
    """One file back and forth, each time another way. Returns it, where it came to rest as a source."""
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
    return file


def test_moves_back_and_forth(ram):
    file = moves(ram, 6, 1)
    assert file.check("read", threads=1, host=file.source)["bad"] == 0


@pytest.mark.long
def test_two_hundred_moves_back_and_forth(ram):
    file = moves(ram, 200, int.from_bytes(os.urandom(4), "big"))
    assert file.check("read", threads=1, host=file.source)["bad"] == 0


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


#: Takes a file for swap.
SWAP = "cd /var/tmp; test -e swap || { dd if=/dev/zero of=swap bs=1M count=64 status=none && chmod 600 swap && mkswap -q swap; }; swapon /var/tmp/swap"


def test_memory_pressure_after_the_switch(ram):
    """Who waits for the pages has room for a third of them: what has arrived is swapped out for what arrives, and comes back as it was."""
    file, cgroup = ram(12), "/sys/fs/cgroup/ram"
    file.dest.sh(f"{SWAP}; echo +memory > /sys/fs/cgroup/cgroup.subtree_control; mkdir -p {cgroup} && echo 4M > {cgroup}/memory.max")
    try:
        file.connect()
        file.dst("tune", what=BACKGROUND, value=0)
        file.switch()
        file.judge(file.dest.program("check", file.path, file.shadow, 2, "map", cgroup=cgroup), 2)
        assert int(file.dest.sh(f"grep '^max ' {cgroup}/memory.events | cut -d' ' -f2")) > 0
        assert file.dest.sh(f"grep '^oom_kill ' {cgroup}/memory.events").split() == ["oom_kill", "0"]
        file.dst("tune", what=BACKGROUND, value=1)
        file.complete()
        file.check()
    finally:
        # What comes back is charged to the group again, which has no room for it.
        file.dest.sh(f"echo max > {cgroup}/memory.max; swapoff /var/tmp/swap; rmdir {cgroup}")


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
    for host in (file.source, file.dest):
        host.sh(SWAP)
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
    """None while pages are missing; afterwards the mapping of a process that came meanwhile can be collapsed when asked for, and is right."""
    file = ram(8).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    early = file.dest.program("hold", file.path)
    early.hear()
    assert early.tell("collapse")["ret"] == -1
    with pytest.raises(OSError) as caught:
        file.dst("allow_collapse", pid=early.pid)
    assert caught.value.errno == errno.EBUSY
    file.dst("tune", what=BACKGROUND, value=1)
    file.complete()
    file.check()
    for pid, error in ((1, errno.ENOENT), (0, errno.ESRCH), (1 << 30, errno.ESRCH)):
        with pytest.raises(OSError) as caught:
            file.dst("allow_collapse", pid=pid)
        assert caught.value.errno == error
    # As a VM has moved: its mapping is older than the last page.
    for page in range(0, 2048, 64):
        early.tell(f"peek {page}")
    assert early.tell("collapse")["ret"] == -1
    file.dst("allow_collapse", pid=early.pid)
    assert early.tell("collapse") == {"ret": 0, "errno": 0}
    for page in range(0, 2048, 64):
        early.tell(f"peek {page}")
    assert int(file.dest.sh(f"awk '/^ShmemPmdMapped|^FilePmdMapped/ {{sum += $2}} END {{print sum}}' /proc/{early.pid}/smaps")) >= 2048
    file.check()
    early.kill()
    assert early.reap(20) == -9
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


def says_how_long(stats, left):
    """What a source reckons with what it says in the same answer."""
    assert stats["remaining_us"] == (stats[left] * 4096 * 10**6 // stats["rate"] if stats["rate"] else 2**64 - 1), stats


def test_what_is_left_and_how_long_it_will_take(ram):
    file = ram(8).connect()
    assert file.src("stats")["remaining_us"] == file.dst("stats")["remaining_us"] == 2**64 - 1
    file.src("precopy", ms=60000, bandwidth=(1 << 20) // slow(1))
    wait_for(lambda: file.src("stats")["rate"] > 0)
    says_how_long(file.src("stats"), "pages_dirty")
    file.src("precopy", ms=0)
    file.dst("tune", what=BANDWIDTH, value=(1 << 20) // slow(1))
    file.switch()
    wait_for(lambda: file.dst("stats")["rate"] > 0)
    stats = file.dst("stats")
    # More may have arrived since it was reckoned, as much as is under way at once.
    assert stats["pages_missing"] - 1 <= stats["remaining_us"] * stats["rate"] / 10**6 / 4096 < stats["pages_missing"] + 4 * 32, stats
    wait_for(lambda: 0 < file.src("stats")["pages_missing"] < file.src("stats")["pages_dirty"])
    says_how_long(file.src("stats"), "pages_missing")
    file.dst("tune", what=BANDWIDTH, value=0)
    file.complete()


def test_how_long_faults_have_waited(ram):
    """Each wait is in its bucket, and the source shows what its destination has counted."""
    file = ram(1).connect()
    file.dst("tune", what=BACKGROUND, value=0)
    file.switch()
    slow_down(file.dest, 3000)
    file.check(threads=1)
    stats = file.complete()
    waits, longest = stats["wait_hist"], stats["wait_ns_max"] // 1000
    # Bucket 12 begins at 2048 us: nobody had to wait for less than the injected delay.
    assert sum(waits) > 0 and sum(waits[:12]) == 0, waits
    assert longest.bit_length() == max(bucket for bucket, number in enumerate(waits) if number), (longest, waits)
    least, most = (1000 * sum(number << bucket for bucket, number in enumerate(waits)) // half for half in (2, 1))
    assert least <= stats["wait_ns_total"] < most, (stats["wait_ns_total"], waits)
    assert sum(stats["read_hist"]) == stats["pages_demand"] > 0
    # The last that waited may not have been counted when the source was told that all is in.
    told = file.src("stats")
    assert told["read_hist"] == stats["read_hist"] and sum(waits) - sum(told["wait_hist"]) in (0, 1), (told, stats)


def test_tracepoints_fire(ram, hosts):
    """Each of them, at one end or the other, in a move with pages ahead, on demand and in the background."""
    with traced(hosts) as trace:
        file = ram(4).connect()
        writer = file.source.program("hold", file.path)
        writer.hear()
        file.precopy(3600000, stop=1)
        assert writer.tell("sweep 0 1000") == {"ret": 0, "errno": 0}
        file.dst("tune", what=BACKGROUND, value=0)
        file.switch()
        there = file.dest.program("hold", file.path)
        there.hear()
        assert there.tell("peek 700") == {"value": 1700}
        file.dst("tune", what=BACKGROUND, value=1)
        file.complete()
        said = "".join(map(trace, hosts))
    events = hosts[0].sh(f"ls -d {TRACING}/events/remote_ram/*/ | xargs -n 1 basename").split()
    assert len(events) >= 6
    assert [event for event in events if f" {event}: ino=" not in said] == []
    for cause in ("ahead", "demand", "background"):
        assert f"cause={cause}" in said


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


def test_options_of_a_mount(hosts):
    host, where = hosts[0], "/run/limited"
    host.sh(f"mkdir -p {where} && mount -t remote_ram none {where} -o size=4M,file_size=2M,nr_files=3,uid=1,gid=2,mode=750")

    def refused(command, why=""):
        said = host.sh(f"{command} 2>&1 || echo refused")
        assert said.endswith("refused\n") and why in said, (command, said)

    def as_user(uid, command):
        return f"setpriv --reuid {uid} --regid {uid} --clear-groups {command}"

    try:
        shown = next(line for line in host.sh("cat /proc/mounts").splitlines() if f" {where} " in line).split()[3]
        assert {"size=4194304", "file_size=2097152", "nr_files=3", "uid=1", "gid=2", "mode=750"} <= set(shown.split(",")), shown
        # Whose it is.
        assert host.sh(f"stat -c '%a %u %g' {where}") == "750 1 2\n"
        host.sh(as_user(1, f"sh -c 'umask 077; truncate -s 2M {where}/one'"))
        assert host.sh(f"stat -c '%a %u %g' {where}/one") == "600 1 1\n"
        refused(as_user(3, f"truncate -s 4096 {where}/own"), "Permission denied")
        host.sh(f"chmod 755 {where}")
        refused(as_user(3, f"cat {where}/one"), "Permission denied")
        host.sh(f"chown 3:3 {where}/one && chmod 400 {where}/one && {as_user(3, f'cat {where}/one')} >/dev/null")
        # How much of it there may be.
        refused(f"truncate -s 3M {where}/one", "File too large")
        host.sh(f"truncate -s 2M {where}/two")
        refused(f"truncate -s 4096 {where}/three", "No space left")
        refused(f"truncate -s 0 {where}/four", "No space left")
        assert host.sh(f"stat -f -c '%S %b %f %c %d' {where}") == "4096 1024 0 3 0\n"
        # Limits change; not below what is in use.
        refused(f"mount -o remount,size=3M {where}")
        host.sh(f"mount -o remount,size=50%,file_size=0,nr_files=4 {where} && truncate -s 3M {where}/one && truncate -s 4096 {where}/four")
        memory = int(host.sh("grep MemTotal /proc/meminfo").split()[1])
        assert int(host.sh(f"stat -f -c %b {where}")) == memory // 4 // 2
        refused(f"truncate -s 0 {where}/five", "No space left")
        for wrong in ("size=much", "mode=9", "nr_files=4x", "uid=-2", "colour=red"):
            refused(f"mount -t remote_ram none /mnt -o {wrong}")
    finally:
        host.sh(f"umount /mnt 2>/dev/null; umount {where} && rmdir {where}")


def test_writes_beyond_two_gib(hosts):
    said = hosts[0].sh(
        "mkdir -p /run/large && mount -t remote_ram none /run/large && truncate -s 3G /run/large/f && cd /run/large && "
        "printf here | dd of=f bs=4096 seek=600000 conv=notrunc 2>&1 && dd if=f bs=4 skip=614400000 count=1 2>/dev/null; "
        "cd /; umount /run/large; rmdir /run/large"
    )
    assert said.endswith("here"), said
