# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What _qmp_vms asks the kernel module of a VM's memory. What QEMU answers is for the scenarios."""

from __future__ import annotations

import os

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _qmp_vms
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import RemoteRamError


@pytest.fixture
def ram(monkeypatch):
    """Files of memory: ``ram.update(path=stats, or an error)``."""
    files = {}

    class RamFile:
        def __init__(self, path, read_only=False):
            assert read_only  # it belongs to others
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            pass

        def stats(self):
            if isinstance(files[self.path], Exception):
                raise files[self.path]
            return files[self.path]

    monkeypatch.setattr(_qmp_vms, "RamFile", RamFile)
    monkeypatch.setattr(_qmp_vms, "is_remote_ram", lambda path: path in files)
    return files


@pytest.mark.parametrize(
    ("role", "state", "lost", "expected"),
    [
        ("destination", "postcopy", 0, (True, 0)),
        ("destination", "reconnecting", 2, (True, 2)),
        ("destination", "complete", 2, (False, 2)),
        ("destination", "lost", 7, (False, 7)),
        ("none", "none", 2, (False, 2)),  # the session was released since
        ("none", "none", 0, (False, 0)),
        ("source", "postcopy", 2, (False, 0)),  # of its destination
    ],
)
def test_what_is_still_to_come_and_what_never_will(ram, role, state, lost, expected):
    ram["/r/a.ram"] = {"role": role, "state": state, "pages_lost": lost}
    assert _qmp_vms._arrival("/r/a.ram") == expected


def test_memory_elsewhere_is_not_asked_for(ram):
    assert _qmp_vms._arrival("/dev/shm/a.ram") == (False, 0)


def test_a_file_that_is_gone_meanwhile_says_nothing(ram):
    ram["/r/a.ram"] = RemoteRamError("it is gone")
    assert _qmp_vms._arrival("/r/a.ram") == (False, 0)


def test_what_a_process_holds_of_memory_is_told_without_its_programs():
    held = _qmp_vms._resident(os.getpid())
    more = bytearray(64 << 20)
    more[::4096] = b"x" * len(more[::4096])
    assert 60 << 20 < _qmp_vms._resident(os.getpid()) - held < 80 << 20
    assert _qmp_vms._resident(1 << 30) is None
