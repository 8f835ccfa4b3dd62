# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""A small client of QEMU's machine protocol (QMP) over a unix socket.

Hypervisors have no QMP library from their distribution, so this is ours: one connection, one command at a time,
events kept until they are asked for.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import struct
import time


class QmpError(Exception):
    """QEMU refused a command, or can't be reached. ``kind`` is QMP's error class, or ``ConnectionError``."""

    def __init__(self, message: str, kind: str = "GenericError"):
        super().__init__(message)
        self.kind = kind


class QmpClient:
    """One QMP session.

    :param path: unix socket of a QEMU started with ``-qmp unix:PATH,server=on,wait=off``.
    :param timeout: seconds a reply may take. QEMU serves one client of a socket at a time: while another one is
        served, connecting waits for it, for this long at most.
    :raises QmpError: the socket can't be reached, or isn't QMP. ``__cause__`` is the OSError, when there was one.
    """

    def __init__(self, path: str, timeout: float = 30.0):
        self.path = path
        self.timeout = timeout
        self._events: list[dict] = []
        self._buffer = b""
        self._ids = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        deadline = time.monotonic() + timeout
        try:
            self._connect(deadline)
            greeting = self._read(deadline)
            if "QMP" not in greeting:
                raise QmpError(f"{path} does not speak QMP", "ConnectionError")
            self.execute("qmp_capabilities")
        except OSError as err:
            self._socket.close()
            raise QmpError(f"cannot reach QEMU at {path}: {err.strerror or err}", "ConnectionError") from err
        except QmpError:
            self._socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self) -> None:
        self._socket.close()

    def peer_pid(self) -> int:
        """The process that listens on the socket: QEMU itself."""
        return struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]

    def execute(self, command: str, arguments: dict | None = None):
        """Runs a command and returns what it returns.

        :raises QmpError: QEMU's own error, or the connection was lost or silent for ``timeout`` seconds.
        """
        request: dict = {"execute": command, "id": next(self._ids)}
        if arguments:
            request["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as err:
            raise QmpError(f"lost QEMU at {self.path} while sending {command}: {err}", "ConnectionError") from err
        deadline = time.monotonic() + self.timeout
        while True:
            reply = self._read(deadline)
            if "event" in reply:
                self._events.append(reply)
            elif reply.get("id", request["id"]) != request["id"]:
                continue  # the late answer to a command that was given up
            elif "error" in reply:
                raise QmpError(f"{command}: {reply['error']['desc']}", reply["error"]["class"])
            elif "return" in reply:
                return reply["return"]

    def events(self, wait: float = 0.0) -> list[dict]:
        """Events received since the last call; waits up to ``wait`` seconds for a first one.

        :raises QmpError: the connection was lost, and there was no event left to return.
        """
        deadline = time.monotonic() + wait
        while True:
            line = self._line()
            if line is not None:
                self._events.append(line)
                continue
            left = 0.0 if self._events else max(0.0, deadline - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                break
            try:
                self._fill()
            except QmpError:
                if not self._events:
                    raise
                break
        events, self._events = self._events, []
        return events

    def _connect(self, deadline: float) -> None:
        while True:
            try:
                self._socket.connect(self.path)
                return
            except BlockingIOError as err:  # the queue of waiting clients is full
                if time.monotonic() >= deadline:
                    raise QmpError(f"QEMU at {self.path} gave no answer for {self.timeout:g} s, and others wait for it too", "ConnectionError") from err
                time.sleep(0.05)

    def _read(self, deadline: float) -> dict:
        while True:
            line = self._line()
            if line is not None:
                return line
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise QmpError(f"QEMU at {self.path} gave no answer for {self.timeout:g} s", "ConnectionError")
            self._fill()

    def _line(self):
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        try:
            message = json.loads(line)
        except ValueError as err:
            raise QmpError(f"{self.path} does not speak QMP", "ConnectionError") from err
        if not isinstance(message, dict):
            raise QmpError(f"{self.path} does not speak QMP", "ConnectionError")
        return message

    def _fill(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError as err:
            raise QmpError(f"lost QEMU at {self.path}: {err}", "ConnectionError") from err
        if not data:
            raise QmpError(f"QEMU at {self.path} closed the connection", "ConnectionError")
        self._buffer += data
