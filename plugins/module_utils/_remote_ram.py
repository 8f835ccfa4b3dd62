# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""A file of a ``remote_ram`` file system: the ioctls of kmod-src/include/uapi/linux/remote_ram.h, and no more.

What the calls mean is in that header; names here are its names. Times are milliseconds, sizes bytes, unless a name says
otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

FS_MAGIC = 0x52524D46
ROLES = ("none", "source", "destination")
STATES = ("none", "listening", "connecting", "connected", "precopy", "switching", "postcopy", "reconnecting", "complete", "failed", "lost")
#: Where a session ends by itself.
ENDED = ("none", "complete", "failed", "lost")
REASONS = (
    "",
    "the peer speaks another version of the protocol",
    "the token is not the destination's",
    "the destination waits for another VM",
    "the two files differ in size",
    "the destination has a source already",
    "the peer is not in a state to do that",
    "the peer sent something malformed",
    "there is no route, no RDMA device for the address, or nobody listens there",
    "it took longer than it may",
    "the connection was lost",
    "it was aborted",
    "the peer aborted it",
    "memory ran out",
    "the RDMA device failed, went away, or lacks what is needed",
)
FOREVER = 0xFFFFFFFF

_SESSION = struct.Struct("=II16s16s128sIIIIQII")
_PRECOPY = struct.Struct("=IIIIQQ")
_SWITCH = struct.Struct("=IIIIQQ")
_WAIT = struct.Struct("=IIIIII")
_TUNE = struct.Struct("=IIQ")
_PROCESS = struct.Struct("=II")
_BUCKETS = 32
_STATS_WORDS = ("size", "abi", "role", "state", "reason", "rounds")
_STATS_COUNTS = (
    "pages", "pages_ahead", "pages_zero", "pages_demand", "pages_bubble", "pages_background", "pages_stale", "pages_missing",
    "pages_dirty", "pages_lost", "bytes_ahead", "bytes_after", "late_writes", "faults_nowait", "faults_retry", "faults_plain",
    "faults_joined", "faults_poison", "wait_ns_total", "wait_ns_max", "read_ns_total", "reconnects", "keys", "keys_retired",
    "switch_us", "precopy_us", "remaining_us", "rate", "memory",
)  # fmt: skip
_STATS = struct.Struct(f"={len(_STATS_WORDS)}I{len(_STATS_COUNTS)}Q{_BUCKETS}Q{_BUCKETS}Q")

_MAGIC, _NONE, _WRITE, _READ = 0xB6, 0, 1, 2
TUNABLES = {"bandwidth": 1, "busy_poll_us": 2, "batch_pages": 3, "background": 4}


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _MAGIC << 8 | number


EXPORT = _ioc(_READ | _WRITE, 0x10, _SESSION.size)
ATTACH = _ioc(_READ | _WRITE, 0x11, _SESSION.size)
PRECOPY = _ioc(_WRITE, 0x12, _PRECOPY.size)
SWITCH = _ioc(_READ | _WRITE, 0x13, _SWITCH.size)
WAIT = _ioc(_READ | _WRITE, 0x14, _WAIT.size)
STATS = _ioc(_READ | _WRITE, 0x15, _STATS.size)
TUNE = _ioc(_WRITE, 0x16, _TUNE.size)
ABORT = _ioc(_NONE, 0x17, 0)
RELEASE = _ioc(_NONE, 0x18, 0)
TAKE_BACK = _ioc(_NONE, 0x19, 0)
ALLOW_COLLAPSE = _ioc(_WRITE, 0x1A, _PROCESS.size)


#: What errors mean that the C library's words mislead about.
_SAID = {
    errno.ENOTCONN: "no session",
    errno.EOPNOTSUPP: "this host makes huge pages of all shared memory, which leaves no page to fetch by itself; set "
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled to another value than force",
}


class RemoteRamError(Exception):
    """A call that failed.

    :ivar errno: the system's number.
    :ivar reason: why the session says it failed, in words; empty if it says nothing.
    """

    def __init__(self, message: str, number: int = 0, reason: str = ""):
        super().__init__(message)
        self.errno = number
        self.reason = reason


def _reason(number: int) -> str:
    return REASONS[number] if number < len(REASONS) else f"reason {number}"


def _state(number: int) -> str:
    """Its name; a number that a newer kernel made up is no reason to fail."""
    return STATES[number] if number < len(STATES) else f"state {number}"


def sockaddr(address: str, port: int) -> bytes:
    """An IPv4 or IPv6 address as a ``struct sockaddr_storage``.

    :raises RemoteRamError: it is neither an address nor a name of one.
    """
    if not 0 <= port <= 65535:
        raise RemoteRamError(f"{address!r} port {port} is not an address: ports are from 0 to 65535")
    try:
        family, _kind, _proto, _name, resolved = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as err:
        raise RemoteRamError(f"{address!r} port {port} is not an address: {err}") from err
    packed = socket.inet_pton(family, resolved[0].partition("%")[0])
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack(">H", port) + packed + bytes(120)
    return struct.pack("=H", family) + struct.pack(">HI", port, resolved[2]) + packed + struct.pack("=I", resolved[3]) + bytes(100)


def port_of(address: bytes) -> int:
    return struct.unpack_from(">H", address, 2)[0]


class _Statfs(ctypes.Structure):
    # Only the first field is read; the rest is room for what the C library writes.
    _fields_ = [("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 248)]


def is_remote_ram(path: str) -> bool:
    """Whether a path is on a remote_ram file system. False if it does not exist."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = _Statfs()
    return libc.statfs(os.fsencode(path), ctypes.byref(found)) == 0 and found.f_type == FS_MAGIC


class RamFile:
    """An open file of guest RAM. To be used with ``with``; closing it does not end its session.

    :param path: the file.
    :param size: make it, and give it this size.
    :param read_only: open it only to look: for :meth:`stats` and :meth:`wait`.
    :raises RemoteRamError: it can't be opened, or has another size.
    """

    def __init__(self, path: str, size: int | None = None, *, read_only: bool = False):
        self.path = path
        try:
            access = os.O_RDONLY if read_only else os.O_RDWR
            self.fd = os.open(path, access | os.O_CLOEXEC | (os.O_CREAT if size is not None else 0), 0o600)
        except OSError as err:
            raise RemoteRamError(f"{path} can't be opened: {err.strerror}", err.errno or 0) from err
        try:
            if size is not None and os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        except OSError as err:
            os.close(self.fd)
            raise RemoteRamError(f"{path} can't be made {size} bytes large: {err.strerror}", err.errno or 0) from err

    def __enter__(self) -> RamFile:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _call(self, what: str, number: int, argument=b"", reason=None):
        """``reason`` says where in the argument the kernel leaves its reason: a struct and an index."""
        try:
            fcntl.ioctl(self.fd, number, argument, True) if isinstance(argument, bytearray) else fcntl.ioctl(self.fd, number, argument)
        except OSError as err:
            why = ""
            if reason:
                layout, index = reason
                why = _reason(layout.unpack(argument)[index])
            said = why or _SAID.get(err.errno) or os.strerror(err.errno or 0)
            raise RemoteRamError(f"{self.path}: {what}: {said}", err.errno or 0, why) from err
        return argument

    def _session(self, what: str, number: int, address: str, port: int, uuid: bytes, token: bytes, connect_ms: int, reconnect_ms: int,
                 heartbeat_ms: int, dead_ms: int, bandwidth: int) -> bytes:  # fmt: skip
        argument = bytearray(
            _SESSION.pack(_SESSION.size, 0, uuid, token, sockaddr(address, port), connect_ms, reconnect_ms, heartbeat_ms, dead_ms, bandwidth, 0, 0)
        )
        self._call(what, number, argument, (_SESSION, 10))
        return _SESSION.unpack(argument)[4]

    def export(self, address: str, port: int, uuid: bytes, token: bytes, *, connect_ms: int = 0, reconnect_ms: int = 0, heartbeat_ms: int = 0,
               dead_ms: int = 0, bandwidth: int = 0) -> None:  # fmt: skip
        """Makes the file the source of a session, and connects to the destination."""
        self._session("export", EXPORT, address, port, uuid, token, connect_ms, reconnect_ms, heartbeat_ms, dead_ms, bandwidth)

    def attach(self, address: str, port: int, uuid: bytes, token: bytes, *, reconnect_ms: int = 0, heartbeat_ms: int = 0, dead_ms: int = 0,
               bandwidth: int = 0) -> int:  # fmt: skip
        """Makes the file the destination of a session, and returns the port on which it listens."""
        return port_of(self._session("attach", ATTACH, address, port, uuid, token, 0, reconnect_ms, heartbeat_ms, dead_ms, bandwidth))

    def precopy(self, timeout_ms: int, *, stop_pages: int = 0, bandwidth: int = 0) -> None:
        self._call("pre-copy", PRECOPY, _PRECOPY.pack(_PRECOPY.size, 0, timeout_ms, 0, stop_pages, bandwidth))

    def switch(self, timeout_ms: int = 0) -> tuple:
        """Hands the file over. Returns (pages that the destination does not have, microseconds it took)."""
        argument = bytearray(_SWITCH.pack(_SWITCH.size, 0, timeout_ms, 0, 0, 0))
        self._call("switch", SWITCH, argument, (_SWITCH, 3))
        return _SWITCH.unpack(argument)[4:6]

    def wait(self, *states: str, timeout_ms: int = FOREVER) -> tuple:
        """Waits until the session is in one of these states, or has ended. Returns (state, reason in words).

        :raises RemoteRamError: ``errno.ETIMEDOUT``.
        """
        argument = bytearray(_WAIT.pack(_WAIT.size, sum(1 << STATES.index(state) for state in states), timeout_ms, 0, 0, 0))
        self._call("wait", WAIT, argument)
        values = _WAIT.unpack(argument)
        return _state(values[3]), _reason(values[4])

    def stats(self) -> dict:
        """``struct rram_stats`` as a dict; role, state and reason in words, histograms as lists."""
        argument = bytearray(_STATS.size)
        struct.pack_into("=I", argument, 0, _STATS.size)
        values = _STATS.unpack(self._call("stats", STATS, argument))
        words = len(_STATS_WORDS)
        result = dict(zip(_STATS_WORDS + _STATS_COUNTS, values))
        result["wait_hist"] = list(values[words + len(_STATS_COUNTS) :][:_BUCKETS])
        result["read_hist"] = list(values[words + len(_STATS_COUNTS) + _BUCKETS :])
        result.update(role=ROLES[result["role"]], state=_state(result["state"]), reason=_reason(result["reason"]))
        if result["remaining_us"] == 0xFFFFFFFFFFFFFFFF:
            result["remaining_us"] = None
        return result

    def tune(self, **values: int) -> None:
        for name, value in values.items():
            self._call(f"tune {name}", TUNE, _TUNE.pack(_TUNE.size, TUNABLES[name], value))

    def abort(self) -> None:
        self._call("abort", ABORT, 0)

    def release(self) -> None:
        self._call("release", RELEASE, 0)

    def take_back(self) -> None:
        self._call("take back", TAKE_BACK, 0)

    def allow_collapse(self, pid: int) -> None:
        """Lets the mapping of a process that came while pages were missing be made of huge pages, now that all are here."""
        self._call("allow to collapse", ALLOW_COLLAPSE, _PROCESS.pack(_PROCESS.size, pid))
