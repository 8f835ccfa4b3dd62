# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import time

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _cordon


class Clock:
    """Time that passes while somebody sleeps. ``at``: what happens at which second."""

    def __init__(self):
        self.start = time.time()
        self.now = 0.0
        self.at = {}

    def time(self):
        return self.start + self.now

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert self.now < 1000, "waits for ever"
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_cordon, "time", clock)
    return clock


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


def cordon(folder, owner):
    _cordon.write({"reason": "disk 3", "since": "2026-01-02T03:04:05Z", "by": "alice", "owner": owner, "also": []}, folder)


def claim(folder, clock, age=0.0):
    stamp = clock.time() - age
    with open(_cordon.claim_path(folder), "a"):
        os.utime(_cordon.claim_path(folder), (stamp, stamp))


def test_nothing_is_taken_over_where_no_other_evacuation_is(folder, clock):
    assert _cordon.await_lapse(folder, "mine", 60) is False
    for owner in (None, "mine"):
        cordon(folder, owner)
        claim(folder, clock)
        assert _cordon.await_lapse(folder, "mine", 60) is False
    assert clock.now == 0


def test_a_cordon_of_one_that_never_gave_a_sign_has_lapsed(folder, clock):
    cordon(folder, "other")
    assert _cordon.await_lapse(folder, "mine", 60) is True


def test_one_that_was_silent_long_enough_has_lapsed_at_once(folder, clock):
    cordon(folder, "other")
    claim(folder, clock, age=61)
    assert _cordon.await_lapse(folder, "mine", 60) is True
    assert clock.now == 0


def test_one_that_is_silent_while_it_is_watched_lapses_when_its_time_is_over(folder, clock):
    cordon(folder, "other")
    claim(folder, clock, age=20)
    assert _cordon.await_lapse(folder, "mine", 60) is True
    assert 39 <= clock.now <= 41


def test_a_sign_of_life_while_we_wait_refuses_at_once_and_says_who(folder, clock):
    cordon(folder, "other")
    claim(folder, clock)
    clock.at[3] = lambda: claim(folder, clock)
    with pytest.raises(_cordon.CordonError, match=r"other, by alice since 2026-01-02T03:04:05Z \(disk 3\)"):
        _cordon.await_lapse(folder, "mine", 60)
    assert clock.now < 5


def test_a_clock_that_was_set_back_does_not_make_a_living_one_lapse(folder, clock):
    cordon(folder, "other")
    claim(folder, clock, age=-3600)
    clock.at[3] = lambda: claim(folder, clock)
    with pytest.raises(_cordon.CordonError):
        _cordon.await_lapse(folder, "mine", 60)


def test_with_a_clock_that_was_set_back_nobody_waits_longer_than_the_lapse(folder, clock):
    cordon(folder, "other")
    claim(folder, clock, age=-3600)
    assert _cordon.await_lapse(folder, "mine", 60) is True
    assert 60 <= clock.now <= 61


def test_one_that_ends_while_we_wait_needs_no_taking_over(folder, clock):
    cordon(folder, "other")
    claim(folder, clock)
    clock.at[3] = lambda: _cordon.write(None, folder)
    assert _cordon.await_lapse(folder, "mine", 60) is False


def test_a_sign_of_life_makes_the_claim_young_again(folder):
    claim(folder, time, age=500)
    _cordon.sign_of_life(folder)
    assert abs(time.time() - os.stat(_cordon.claim_path(folder)).st_mtime) < 30
