# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""The cordon of a hypervisor: a file that says that no virtual machine may move here, why, since when and who asked.

A cordon is ``{reason, since, by, owner, also}``. ``owner`` is the evacuation that it belongs to, None for a person's own.
``also`` holds the other cordons of the same host, newest first, so that an evacuation that ends leaves a cordon that was
there before it. Reading needs no lock, since the file is replaced in one step; whoever changes it holds ``locked``.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import tempfile
import time

DIRECTORY = "/var/lib/hecaton"
FIELDS = ("reason", "since", "by", "owner")


class CordonError(Exception):
    """The cordon can't be changed; the message says why and what to do."""


def timestamp(seconds: float) -> str:
    """A point in time as the file has it: ISO 8601, UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(directory: str = DIRECTORY) -> dict | None:
    """The cordon of this host, None when it has none.

    A file that isn't understood counts as a cordon, whose reason says so: nothing moves to a host in doubt.
    """
    path = os.path.join(directory, "cordon.json")
    try:
        with open(path, encoding="utf-8") as handle:
            since = os.fstat(handle.fileno()).st_mtime
            try:
                found = json.load(handle)
                return _stack([_record(each) for each in [found, *found.get("also", [])]])
            except (AttributeError, KeyError, TypeError, ValueError) as err:
                reason = f"{path} is not a cordon file ({type(err).__name__}: {err}); remove it with state=absent"
                return _stack([{"reason": reason, "since": timestamp(since), "by": "unknown", "owner": None}])
    except (FileNotFoundError, NotADirectoryError):
        return None


def write(cordon: dict | None, directory: str = DIRECTORY) -> None:
    """Replaces the cordon of this host in one step; None removes it."""
    path = os.path.join(directory, "cordon.json")
    if cordon is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    handle, new = tempfile.mkstemp(prefix=".cordon-", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(cordon, out, indent=2)
            out.write("\n")
            out.flush()
            os.fchmod(out.fileno(), 0o644)
            os.fsync(out.fileno())
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


@contextlib.contextmanager
def locked(directory: str = DIRECTORY, timeout: float = 60.0):
    """Holds the right to change the cordon of this host, so that of two at once only one wins.

    :raises CordonError: somebody else held it for all of ``timeout`` seconds.
    """
    os.makedirs(directory, mode=0o755, exist_ok=True)
    path = os.path.join(directory, "cordon.lock")
    deadline = time.monotonic() + timeout
    with open(path, "w", encoding="utf-8") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise CordonError(f"another process has been changing this host's cordon for {timeout:g} s (it holds {path})") from None
                time.sleep(0.1)
        yield


def claim_path(directory: str = DIRECTORY) -> str:
    """A file whose time stamp is the last sign of life of the evacuation that cordoned this host."""
    return os.path.join(directory, "claim")


def sign_of_life(directory: str = DIRECTORY) -> None:
    with open(claim_path(directory), "a", encoding="utf-8"):
        os.utime(claim_path(directory))


def forget_claim(cordon: dict | None, directory: str = DIRECTORY) -> None:
    """Leaves no sign of life behind once no evacuation has this host any more."""
    if any(each["owner"] for each in _records(cordon)):
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(claim_path(directory))


def await_lapse(directory: str, owner: str | None, lapses: float) -> bool:
    """Whether the host is cordoned for another owner that has been silent for ``lapses`` seconds; waits for it to tell.

    :raises CordonError: the other owner is alive.
    """
    begun = time.monotonic()
    first = None
    while True:
        others = [each for each in _records(read(directory)) if each["owner"] not in (None, owner)]
        if not others:
            return False
        try:
            stamp = os.stat(claim_path(directory)).st_mtime_ns
        except FileNotFoundError:
            return True  # nothing that gives signs of life made this cordon
        first = stamp if first is None else first
        if stamp != first:
            raise CordonError(
                f"another evacuation of this host is running: {others[0]['owner']}, by {others[0]['by']} since {others[0]['since']} ({others[0]['reason']}). "
                "Nothing was moved by this one; wait until that is done"
            )
        # Its clock may be off, or have been set: what counts as well is that nothing happened while we looked.
        if time.time() - stamp / 1e9 >= lapses or time.monotonic() - begun >= lapses:
            return True
        time.sleep(0.5)


def add(cordon: dict | None, new: dict, exclusive: bool = False, force: bool = False) -> dict:
    """The cordon after ``new`` = ``{reason, since, by, owner}`` joined it; the same dict when that changes nothing.

    :raises CordonError: ``exclusive``, and the host is cordoned for another owner.
    """
    stack = _records(cordon)
    others = [each for each in stack if each["owner"] not in (None, new["owner"])]
    if others and exclusive and not force:
        holder = others[0]
        raise CordonError(
            f"already cordoned for {holder['owner']} by {holder['by']} since {holder['since']}: {holder['reason']}. "
            "Wait until that is done; if it is not running any more, take over with force=true"
        )
    if others and force:
        stack = [each for each in stack if each not in others]
    for index, each in enumerate(stack):
        if each["owner"] == new["owner"]:
            if each["reason"] != new["reason"]:
                stack[index] = dict(new, since=each["since"])
            break
    else:
        stack.insert(0, new)
    return cordon if stack == _records(cordon) else _stack(stack)


def remove(cordon: dict | None, owner: str | None) -> dict | None:
    """The cordon without that of ``owner``; None, without any, when no owner is given."""
    return _stack([each for each in _records(cordon) if owner and each["owner"] != owner])


def _records(cordon: dict | None) -> list[dict]:
    return [] if cordon is None else [_record(each) for each in [cordon, *cordon["also"]]]


def _record(cordon: dict) -> dict:
    record = {field: cordon.get(field) for field in FIELDS}
    for field in ("reason", "since", "by"):
        if not isinstance(record[field], str):
            raise ValueError(f"{field} is missing")
    return record


def _stack(records: list[dict]) -> dict | None:
    return dict(records[0], also=records[1:]) if records else None
