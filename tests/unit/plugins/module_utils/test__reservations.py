# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import threading
import time

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _reservations


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "reserved"
    with _reservations.locked(str(path)):
        pass
    return str(path)


def test_a_fresh_reservation_counts_although_nothing_arrives_yet(folder):
    _reservations.reserve("web1", 512, "hv1", folder)
    found = _reservations.live(set(), folder)
    assert list(found) == ["web1"]
    assert (found["web1"]["memory_mib"], found["web1"]["source"]) == (512, "hv1")


def test_one_that_nothing_followed_lapses_and_is_removed(folder):
    _reservations.reserve("web1", 512, "hv1", folder)
    assert _reservations.live(set(), folder, time.time() + _reservations.FRESH - 5)
    assert _reservations.live(set(), folder, time.time() + _reservations.FRESH + 5) == {}
    assert not os.path.exists(os.path.join(folder, "web1.json"))


def test_one_whose_vm_is_arriving_counts_however_old_it_is(folder):
    _reservations.reserve("web1", 512, "hv1", folder)
    assert list(_reservations.live({"web1"}, folder, time.time() + 86400)) == ["web1"]


def test_one_from_the_future_does_not_count(folder):
    _reservations.reserve("web1", 512, "hv1", folder)
    assert _reservations.live(set(), folder, time.time() - 3600) == {}


@pytest.mark.parametrize("text", ["", "{", "{}", '{"vm": "web1"}'])
def test_a_file_that_is_not_understood_keeps_no_room_and_is_removed(folder, text):
    path = os.path.join(folder, "web1.json")
    with open(path, "w") as out:
        out.write(text)
    assert _reservations.live(set(), folder) == {}
    assert not os.path.exists(path)


def test_reserving_again_replaces_the_earlier_one(folder):
    _reservations.reserve("web1", 512, "hv1", folder)
    _reservations.reserve("web1", 1024, "hv1", folder)
    assert _reservations.live(set(), folder)["web1"]["memory_mib"] == 1024


def test_release_gives_back_one_vm_only_and_says_whether_there_was_any(folder):
    _reservations.reserve("web1", 512, "hv1", folder)
    _reservations.reserve("web2", 512, "hv1", folder)
    assert _reservations.release("web1", folder)
    assert not _reservations.release("web1", folder)
    assert list(_reservations.live(set(), folder)) == ["web2"]


def test_only_one_decides_at_a_time(folder):
    order = []

    def other():
        with _reservations.locked(folder):
            order.append("other")

    with _reservations.locked(folder):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


def test_room_is_what_is_free_less_what_is_kept_for_others():
    assert _reservations.shortage(1000, 500, 2000, 500) == 0
    assert _reservations.shortage(1000, 500, 2000, 501) == 1
    assert _reservations.shortage(1000, 0, 4000, 0) == -3000


def test_who_only_looks_leaves_nothing_behind(tmp_path):
    folder = str(tmp_path / "reserved")
    with _reservations.locked(folder, look_only=True):
        assert _reservations.live(set(), folder, look_only=True) == {}
    assert not (tmp_path / "reserved").exists()
    _reservations.reserve("old", 1, "hv1", folder)
    assert _reservations.live(set(), folder, now=9e9, look_only=True) == {}
    assert (tmp_path / "reserved" / "old.json").exists()
