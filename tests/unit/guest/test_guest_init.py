# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guest's program as an ordinary process: each way in which migration could damage a page has to be noticed."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time
from unittest.mock import ANY

import pytest

GUEST = pathlib.Path(__file__).resolve().parents[2] / "guest"
sys.path.insert(0, str(GUEST))

import report  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")

FLAGS = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-DSELFTEST"]
QUIET = ("dirty.rate=-1", "dirty.sweep=0", "dirty.report=0", "dirty.zero_every=0")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("init") / "init"
    built = subprocess.run(["gcc", *FLAGS, "-o", path, GUEST / "init.c"], capture_output=True, text=True, check=False)
    if "cannot find -lc" in built.stderr:
        pytest.skip("there is no static C library to link with")
    assert built.returncode == 0, built.stderr
    return path


class Guest:
    """The program, what it is told and what it tells."""

    def __init__(self, program, *words):
        self.process = subprocess.Popen([program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.log = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def tell(self, text):
        self.process.stdin.write(text.encode() + b"\n")

    def summary(self):
        return report.parse(self.log)

    def until(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition(self.summary()):
            assert time.monotonic() < end, self.log.decode()
            self.log += os.read(self.process.stdout.fileno(), 65536)
        return self.summary()

    def check(self):
        before = len(self.summary().full_checks)
        self.tell("check")
        return self.until(lambda s: len(s.full_checks) > before).full_checks[-1]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        ("flip", "body"), ("zero", "zero"), ("foreign", "foreign"), ("stale", "stale"), ("half", "torn"),
        ("tail", "torn"), ("shadow", "shadow"), ("mirror", "shadow"),
    ],
)  # fmt: skip
def test_a_full_check_finds_each_damage_once(program, damage, kind):
    with Guest(program, "dirty.mib=2", *QUIET) as guest:
        assert guest.check() == {"full_check": True, "pages": 512, "corrupt": 0, "corrupt_total": 0, "ms": ANY}
        guest.tell(f"damage {damage} 77")
        assert guest.check()["corrupt"] == 1
        (error,) = guest.summary().corruptions
        assert (error["page"], error["kind"], error["by"]) == (77, kind, "check")
        assert guest.check()["corrupt"] == 0
        assert guest.summary().corrupt == 1


@pytest.mark.parametrize("damage", ["zero", "foreign", "stale", "half", "tail", "shadow", "mirror"])
def test_a_page_is_checked_before_it_is_written_again(program, damage):
    """A write that went over the damage would hide it for ever."""
    with Guest(program, "dirty.mib=1", "dirty.rate=1", "dirty.sweep=0", "dirty.zero_every=0") as guest:
        guest.until(lambda s: s.started)
        guest.tell(f"damage {damage} 200")
        (error,) = guest.until(lambda s: s.corruptions).corruptions
        assert (error["page"], error["by"]) == (200, "touch")


@pytest.mark.parametrize("page", [300, 900, 1300])
def test_the_sweep_finds_damage_in_pages_that_are_not_written(program, page):
    """Page 900 is written once only, and 1300 never: migration must carry both."""
    words = ("dirty.mib=2", "dirty.bloat_mib=2", "dirty.zero_mib=2", "dirty.rate=-1", "dirty.sweep=1")
    with Guest(program, *words) as guest:
        guest.until(lambda s: s.started)
        guest.tell(f"damage flip {page}")
        (error,) = guest.until(lambda s: s.corruptions).corruptions
        assert (error["page"], error["by"]) == (page, "sweep")
        assert guest.until(lambda s: s.latest and s.latest["sweeps"] > 1).corrupt == 1


@pytest.mark.parametrize("words", [(), ("dirty.zero_every=0",), ("dirty.zero_every=1",), ("dirty.zero_every=3",)])
@pytest.mark.parametrize("pattern", ["seq", "random", "hot"])
def test_nothing_is_found_where_nothing_is_wrong(program, pattern, words):
    given = ("dirty.mib=4", "dirty.hot_mib=1", "dirty.bloat_mib=1", "dirty.zero_mib=1", f"dirty.pattern={pattern}")
    with Guest(program, *given, "dirty.sweep=1", *words) as guest:
        latest = guest.until(lambda s: s.latest and s.latest["sweeps"] > 0).latest
        assert latest["touched"] > latest["pages"] == 6 * 256
        assert guest.check()["corrupt"] == 0
        assert guest.summary().corrupt == 0


def test_the_rate_is_kept_and_can_be_changed(program):
    with Guest(program, "dirty.mib=4", "dirty.rate=4") as guest:
        slow = guest.until(lambda s: len(s.reports) > 1).latest
        assert 2 < slow["rate_mib_s"] < 5
        guest.tell("rate 16")
        fast = guest.until(lambda s: s.latest["seq"] > slow["seq"] + 2).latest
        assert 8 < fast["rate_mib_s"] < 20


def test_what_does_not_fit_is_said_and_left_out(program):
    with Guest(program, "dirty.mib=64", "dirty.available_mib=12", *QUIET) as guest:
        summary = guest.until(lambda s: s.started)
        assert summary.warnings[0]["wanted_mib"] == 64
        assert summary.warnings[0]["using_mib"] == 7
        assert summary.started[0]["pages"] == 7 * 256
        assert guest.check()["pages"] == 7 * 256
    with Guest(program, "dirty.mib=64", "dirty.available_mib=2") as guest:
        assert guest.until(lambda s: s.errors).errors[0]["error"] == "no memory"


def test_an_unknown_word_is_said(program):
    with Guest(program, "dirty.mbi=64", "dirty.mib=1", *QUIET) as guest:
        assert guest.until(lambda s: s.errors).errors[0]["word"] == "dirty.mbi"


def test_a_port_that_nobody_reads_does_not_stop_it(program):
    """Lines are dropped and counted; the answer to a check is kept until there is room for it."""
    with Guest(program, "dirty.mib=1", "dirty.rate=1", "dirty.report=1") as guest:
        fcntl.fcntl(guest.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        guest.until(lambda s: s.latest)
        for _number in range(120):
            guest.tell("nonsense")
        guest.tell("check")
        time.sleep(2.5)
        latest = guest.until(lambda s: s.full_checks and s.latest["dropped"] > 0 and s.latest["seq"] > 3).latest
        assert latest["touched"] > 2.5 * 256 * 0.5
        assert guest.summary().garbled == 0


def test_every_line_fits(program):
    with Guest(program, "dirty.mib=4", "dirty.seed=18446744073709551615") as guest:
        guest.until(lambda s: s.latest and s.latest["seq"] > 1)
        assert max(map(len, guest.log.splitlines())) < 400
