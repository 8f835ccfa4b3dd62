# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A KVM guest of the lab on a file of ours: its QEMU, how it boots, and its move to the other host."""

from __future__ import annotations

import pathlib
import types

import guest_image

import image
from hosts import slow, wait_for

MIB = 96
INITRAMFS = "/root/kmod/tiny.cpio"
ARRIVES = "tcp:0.0.0.0:7100"
CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "pause-before-switchover")]


class Guest:
    """QEMU on one host, stock, with its RAM on a file of ours.

    :param incoming: whence the state of its devices comes, if it is not to boot.
    """

    def __init__(self, host, file, incoming=None, more="", words="dirty.mib=20 dirty.rate=4 dirty.pattern=random dirty.report=1"):
        self.host, self.file = host, file
        self.base = f"/dev/shm/{file.name}"
        self.log, self.socket = f"{self.base}.log", f"{self.base}.qmp"
        host.sh(
            f"rm -f {self.base}.*; ulimit -c unlimited; cd /var/tmp; qemu-system-x86_64 -name {file.name} "
            f"-machine pc,accel=kvm,memory-backend=pc.ram -cpu host -smp 1 -m {MIB} "
            f"-object memory-backend-file,id=pc.ram,mem-path={file.path},share=on,prealloc=off,size={MIB}M "
            "-nodefaults -display none "
            f"-kernel /boot/vmlinuz -initrd {INITRAMFS} -append 'console=ttyS0 quiet mitigations=off no_timer_check random.trust_cpu=on "
            f"{words}' "
            f"-chardev socket,id=serial0,path={self.base}.serial,server=on,wait=off,logfile={self.log} -serial chardev:serial0 "
            f"-qmp unix:{self.socket},server=on,wait=off -daemonize -pidfile {self.base}.pid {'-incoming defer' if incoming else ''} {more}"
        )
        self.pid = int(host.sh(f"cat {self.base}.pid"))
        if incoming:
            self.qmp("migrate-set-capabilities", capabilities=CAPABILITIES)
            self.qmp("migrate-incoming", uri=incoming)

    def qmp(self, command, **arguments):
        return self.host.do("qmp", path=self.socket, command=command, **arguments)

    def alive(self):
        return self.host.sh(f"test -e /proc/{self.pid} && grep -q '^State:.[^Z]' /proc/{self.pid}/status && echo yes", check=False).strip() == "yes"

    def kill(self, number=9):
        self.host.sh(f"kill -{number} {self.pid}", check=False)

    def check(self):
        """Lets the guest check all its pages."""
        before = int(self.host.sh(f"grep -c full_check {self.log}", check=False) or 0)
        self.host.sh(f"printf 'check\\n' | timeout {slow(5)} socat -t 1 - UNIX-CONNECT:{self.base}.serial >/dev/null; true")
        wait_for(lambda: int(self.host.sh(f"grep -c full_check {self.log}", check=False) or 0) > before, 150)
        said = self.host.sh(f"cat {self.log}")
        assert '"error"' not in said, said[-2000:]


#: A guest that has just booted, kept outside of any file of ours: name and path of its memory, and beside it the state of its devices,
#: and which of all guests that were ever kept it is.
BOOTED = types.SimpleNamespace(name="booted", path="/dev/shm/booted.memory")
STATE, WHICH = "/dev/shm/booted.state", "/dev/shm/booted.which"


def boot(host):
    """Boots a guest on a host and keeps it."""
    guest = Guest(host, BOOTED)
    wait_for(lambda: '"started"' in host.sh(f"cat {guest.log}"), 240)
    guest.qmp("stop")
    guest.qmp("migrate-set-capabilities", capabilities=CAPABILITIES[:1])
    guest.qmp("migrate", uri=f"exec:cat > {STATE}.new")
    wait_for(lambda: guest.qmp("query-migrate")["status"] == "completed", 120)
    guest.qmp("quit")
    wait_for(lambda: not guest.alive())
    host.sh(f"mv {STATE}.new {STATE}")


def put_initramfs(host):
    host.lab.put(host.name, guest_image.tiny_initramfs(), INITRAMFS, timeout=slow(120))


def keep(host):
    """Has a guest that has just booted on a host. It boots once for all hosts, also those of other kernels: on a slow one that takes minutes."""
    # It has its host's CPU.
    processors = host.lab.processors(host.lab.state["accelerator"])
    key = image.digest(pathlib.Path(__file__), guest_image.tiny_initramfs(), image.host_image().name, *processors)

    def there():
        return host.sh(f"cat {WHICH} 2>/dev/null", check=False) == key

    def make(folder):
        boot(host)
        packed = host.lab.ssh_bytes(host.name, f"cd /dev/shm && tar -cSI 'gzip -1' -f - booted.memory booted.state && printf %s {key} > {WHICH}", slow(120))
        (folder / "booted.tgz").write_bytes(packed)

    if there():
        return
    packed = image.entry("kmodguest", key, make) / "booted.tgz"
    if not there():
        host.lab.put(host.name, packed, "booted.tgz", before="cd /dev/shm", timeout=slow(120))
        host.sh(f"cd /dev/shm && tar -xSzf booted.tgz && rm booted.tgz && printf %s {key} > {WHICH}")


def booted(host, file):
    """A guest that runs on a file, as it was after it had booted."""
    # Zeroes that it never wrote stay holes.
    host.sh(f"dd if={BOOTED.path} of={file.path} bs=16k conv=notrunc,sparse status=none")
    guest = Guest(host, file, incoming=f"exec:cat {STATE}")
    wait_for(lambda: guest.qmp("query-status")["status"] == "paused", 120)
    guest.qmp("cont")
    return guest


def move(file, guest, incoming, precopy_ms, end="quit"):
    """The whole of a move. Returns when the guest has left, by its own QEMU's end or a violent one."""
    file.export()
    if precopy_ms:
        file.precopy(precopy_ms)
    guest.qmp("migrate-set-capabilities", capabilities=CAPABILITIES)
    guest.qmp("migrate", uri=f"tcp:{file.dest.address}:7100")
    wait_for(lambda: guest.qmp("query-migrate")["status"] == "pre-switchover", 120)
    file.src("switch")
    guest.qmp("migrate-continue", state="pre-switchover")
    wait_for(lambda: guest.qmp("query-migrate")["status"] == "completed", 120)
    if end == "quit":
        guest.qmp("quit")
    else:
        guest.kill()
    wait_for(lambda: not guest.alive())
    assert file.src("stats")["late_writes"] == 0
