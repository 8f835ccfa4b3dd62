# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reader of the guest's serial log: nothing that the guest told may be lost to damage around it."""

from __future__ import annotations

import json
import pathlib
import random
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "guest"))

import report  # noqa: E402


def line(seq, **fields):
    whole = {
        "seq": seq, "uptime_ms": seq * 1000, "pages": 100, "touched": seq * 10, "checked": seq, "sweeps": 0,
        "corrupt": 0, "dropped": 0, "rate_mib_s": 8.0, "stall_max_us": 5, "stall_worst_us": 9, "gap_max_us": 7,
        "stall_hist": [1, 2, 3], **fields,
    }  # fmt: skip
    return b"@hecaton " + json.dumps(whole, separators=(",", ":")).encode() + b"\n"


STARTED = b'@hecaton {"started":true,"pages":100}\n'


def test_the_latest_report_is_the_one_with_the_highest_number_over_all_logs():
    source = STARTED + line(1) + line(2, stall_worst_us=4000)
    destination = line(4, stall_worst_us=90000) + line(3, stall_worst_us=5000)
    summary = report.parse(source, destination)
    assert summary.latest["seq"] == 4
    assert summary.max_stall_us == 90000
    assert len(summary.started) == 1


def test_corruption_is_counted_from_whichever_line_survived():
    error = b'@hecaton {"error":"corrupt","page":3,"kind":"stale"}\n'
    check = b'@hecaton {"full_check":true,"pages":100,"corrupt":1,"corrupt_total":4}\n'
    assert report.parse(line(1)).corrupt == 0
    assert report.parse(error + error).corrupt == 2
    assert report.parse(line(1, corrupt=3) + line(2, corrupt=3) + error).corrupt == 3
    assert report.parse(line(1, corrupt=3) + check).corrupt == 4
    assert report.parse(error).corruptions[0]["page"] == 3


def test_a_log_that_ends_inside_a_line_is_not_garbled():
    whole = line(1) + line(2)
    for end in range(len(whole)):
        summary = report.parse(whole[:end])
        assert summary.garbled == 0
        assert len(summary.reports) <= 2
    assert report.parse(whole).latest["seq"] == 2


def test_lines_of_the_kernel_around_and_inside_ours():
    text = (
        b"[    0.1] booting\r\n" + b"noise" + line(1) + b'@hecaton {"seq":2,"uptime_ms":20[   5.0] virtio: hello\n'
        + line(3)[:-1] + b"[    6.0] printk behind it\n" + b"@hecaton {\"seq\":4,\"upt" + line(5)
    )  # fmt: skip
    summary = report.parse(text)
    assert [r["seq"] for r in summary.reports] == [1, 3, 5]
    assert summary.garbled == 2
    assert summary.trouble == []


@pytest.mark.parametrize(
    "item",
    [{"seq": 1}, {"seq": "x"}, {"full_check": True}, {"full_check": True, "pages": 1, "corrupt": "no"}],
)
def test_a_line_with_fields_missing_or_of_another_type_is_garbled(item):
    summary = report.parse(b"@hecaton " + json.dumps(item).encode() + b"\n")
    assert summary.garbled == 1
    assert summary.latest is None
    assert summary.full_checks == []


def test_negative_numbers_and_booleans_are_no_numbers():
    assert report.parse(line(1, corrupt=-1) + line(2, corrupt=True)).garbled == 2


def test_damage_that_the_kernel_reports_is_kept():
    summary = report.parse(b"[ 9.0] EXT4-fs error (device vda): bad\r\n" + line(1) + b"Kernel panic - not syncing\n")
    assert len(summary.trouble) == 2
    assert summary.trouble[1].startswith("Kernel panic")


def test_plain_messages():
    summary = report.parse(b"@hecaton valkey ready\r\n@hecaton valk")
    assert summary.messages == ["valkey ready"]


def test_stalls_over_counts_the_buckets_from_there_up():
    # Bucket 0 is below 1 us, bucket n from 2^(n-1) to 2^n us.
    summary = report.parse(line(1, stall_hist=[1000, 100, 10, 1, 2]))
    assert summary.stalls_over(0) == 1113
    assert summary.stalls_over(1) == 113
    assert summary.stalls_over(2) == 13
    assert summary.stalls_over(4) == 3
    assert summary.stalls_over(8) == 2
    assert report.parse(b"").stalls_over(1) == 0


def test_nothing_and_noise():
    empty = report.parse(b"")
    assert (empty.latest, empty.corrupt, empty.max_stall_us, empty.garbled) == (None, 0, 0, 0)
    noise = random.Random(1)
    for _line in range(200):
        text = bytearray(STARTED + line(1) + line(2))
        for _byte in range(noise.randrange(1, 20)):
            text[noise.randrange(len(text))] = noise.randrange(256)
        report.parse(bytes(text)).as_dict()


def test_read_takes_files(tmp_path):
    (tmp_path / "a").write_bytes(line(1))
    (tmp_path / "b").write_bytes(line(2))
    assert report.read(tmp_path / "a", tmp_path / "b").as_dict()["latest"]["seq"] == 2
