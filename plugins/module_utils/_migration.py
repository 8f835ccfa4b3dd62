# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""The record of one migration: a JSON file on the host that drives it.

The unit that drives a migration writes it, everyone else only reads it. It is replaced as a whole, so a reader sees
either the old or the new one. ``docs/data.md`` lists the fields.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import uuid

STATE_DIR = "/var/lib/hecaton"
MAX_SAMPLES = 600
#: What of its record a migration keeps when another unit takes it up.
KEPT = ("started", "switched", "downtime_ms", "bytes", "recoveries", "samples", "remote_ram")
#: Names of VMs become names of files and units.
NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")


class MigrationError(Exception):
    """A migration could not be started or did not succeed; the message is for the operator."""


class Aborted(MigrationError):
    """The operator asked for it."""


def check_name(name: str) -> str:
    """:raises MigrationError: the name can't name a file and a unit."""
    if not NAME.fullmatch(name):
        raise MigrationError(f"VM name {name!r} has characters that cannot be part of a unit's name; allowed are letters, digits and _ . -")
    return name


def record_path(state_dir: str, name: str, incoming: bool = False) -> str:
    return os.path.join(state_dir, "incoming" if incoming else "migrations", f"{name}.json")


def abort_path(state_dir: str, name: str) -> str:
    return os.path.join(state_dir, "migrations", f"{name}.abort")


def write_json(path: str, value) -> None:
    """Replaces a file by one with this value in it, all or nothing."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "w") as out:
            json.dump(value, out)
            os.fchmod(out.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_record(state_dir: str, name: str, incoming: bool = False):
    """The record of the VM's migration under way or its last one; None if there is none.

    :raises MigrationError: the file is there and can't be understood.
    """
    path = record_path(state_dir, name, incoming)
    try:
        with open(path) as handle:
            record = json.load(handle)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise MigrationError(f"{path} can't be read as a migration's record ({err}); remove it if no migration of {name} is running") from err
    if not isinstance(record, dict) or "phase" not in record:
        raise MigrationError(f"{path} is not a migration's record; remove it if no migration of {name} is running")
    return record


def finish_stale(record: dict, reason: str) -> dict:
    """The record of a migration whose unit died, as one that failed. What became of the VM has to be looked up."""
    return {**record, "phase": "finished", "result": "failed", "reason": reason, "on": "unknown" if record["on"] == "source" else record["on"]}


class Stall:
    """Tells when a stream has stood still for too long: a destination that lost its power says nothing any more.

    :param patience: seconds, 0 for ever.
    """

    def __init__(self, patience: float):
        self.patience = patience
        self._sent = -1
        self._since = 0.0

    def over(self, sent: int, now: float) -> bool:
        """Whether nothing was sent for longer than that.

        :param sent: bytes sent so far.
        :param now: seconds, of a clock that only goes forward.
        """
        if sent != self._sent:
            self._sent, self._since = sent, now
        return 0 < self.patience < now - self._since

    def reason(self, to: str) -> str:
        return f"nothing could be sent to {to} for {self.patience:g} s; it, or the network on the way to it, is down. The VM goes on here"


class Record:
    """The record while its migration runs. Each change is on disk when the call returns.

    :param job: what the migration was started with: vm, driver, engine, from, to, ...
    """

    def __init__(self, state_dir: str, job: dict):
        self._path = record_path(state_dir, job["vm"])
        self._abort = abort_path(state_dir, job["vm"])
        self._abort_refused = False
        self.data = {
            "id": job.get("id") or uuid.uuid4().hex,
            **{key: job.get(key) for key in ("vm", "driver", "engine", "from", "to", "precopy_timeout_s", "memory_mib")},
            "phase": "starting", "result": None, "reason": "", "on": "source",
            "started": time.time(), "switched": None, "finished": None,
            "percent": 0, "rate_mib_s": None, "remaining_mib": None, "eta_s": None,
            "downtime_ms": None, "total_ms": None, "bytes": None, "recoveries": 0, "samples": [],
        }  # fmt: skip
        if job.get("resume"):
            self._take_over(read_record(state_dir, job["vm"]))

    def _take_over(self, earlier: dict | None) -> None:
        """What the unit that had this migration before has noted of it."""
        if earlier and earlier["id"] == self.data["id"]:
            self.data.update({key: earlier[key] for key in KEPT if key in earlier})

    def save(self, **changes) -> None:
        self.data.update(changes)
        write_json(self._path, self.data)

    def phase(self, phase: str, **changes) -> None:
        if phase != self.data["phase"]:
            changes["phase"] = phase
            if phase in ("postcopy", "finished") and not self.data["switched"] and changes.get("on") == "destination":
                changes["switched"] = time.time()
        if changes:
            self.save(**changes)

    def progress(self, transferred: int, remaining: int, total: int, rate_bytes: float | None) -> None:
        """Notes how far RAM has got; all in bytes, the rate in bytes a second."""
        mib = 1 << 20
        done = 100 * (1 - remaining / total) if total else 0
        rate = rate_bytes / mib if rate_bytes else None
        sample = [round(time.time() - self.data["started"], 2), self.data["phase"], round(rate, 2) if rate else 0.0, round(remaining / mib, 2)]
        samples = self.data["samples"]
        if len(samples) >= MAX_SAMPLES:
            # Keep the whole course at half the resolution instead of losing its end.
            del samples[1::2]
        self.save(
            percent=max(0, min(99, int(done))),
            bytes=transferred,
            rate_mib_s=round(rate, 2) if rate else None,
            remaining_mib=round(remaining / mib, 2),
            eta_s=round(remaining / rate_bytes, 1) if rate_bytes else None,
            samples=[*samples, sample],
        )

    def abort_requested(self) -> bool:
        return not self._abort_refused and os.path.exists(self._abort)

    def refuse_abort(self, reason: str) -> None:
        """Says why an abort came too late; the migration goes on."""
        self._abort_refused = True
        self.save(abort_refused=reason)

    def finish(self, result: str, reason: str = "", on: str = "source", **changes) -> None:
        now = time.time()
        switched = self.data["switched"] or (now if on == "destination" else None)
        if self.data["total_ms"] is None:
            changes.setdefault("total_ms", round((now - self.data["started"]) * 1000))
        if result == "moved":
            changes.update(percent=100, remaining_mib=0.0)
        self.save(phase="finished", result=result, reason=reason, on=on, switched=switched, finished=now, eta_s=None, rate_mib_s=None, **changes)
        if os.path.exists(self._abort):
            os.unlink(self._abort)
