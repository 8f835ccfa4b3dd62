# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page of the comparison: well formed, sufficient to itself, and with every figure as text."""

from __future__ import annotations

import re

import pytest
from ansible_collections.hecaton.fleet.tests.unit.html_page import Page


@pytest.fixture
def served(row):
    def made(engine, transport=None, **more):
        course = {"first_s": -6.0, "started_s": -4.2, "finished_s": 2.5, "per_second": [100, 98, 100, 99, 60, 0, 20, 80, 100]}
        return row(engine, transport, workload="valkey", data_mib=131.0, latency_ms=[[1.0, 600], [8.0, 20], [900.0, 3]], latency_worst_ms=950.0, course=course,
                   **{"stall_p50_us": None, "stall_p99_us": None, "stall_max_us": None, **more})  # fmt: skip

    return made


def found(figures, rows, eviction=()):
    return {
        "rows": rows, "medians": figures.medians(rows), "eviction": list(eviction), "goals": figures.verdicts(rows, list(eviction), 300), "machine": "x86_64",
        "accelerator": "tcg", "started": "2026-01-02T03:04:05Z", "notes": ["A note with <b> & more."],
        "sizes": {"hot": {"memory_mib": 192, "working_set_mib": 64, "words": "dirty.rate=0"},
                  "valkey": {"memory_mib": 256, "working_set_mib": 132, "words": ""}},
    }  # fmt: skip


@pytest.fixture
def full(figures, page, row, served):
    rows = [row("precopy"), row("userfault"), row("remote_ram", "siw", total_ms=4000, pages_demand=200, faults_per_working_set=0.012, wait_p50_us=700.0),
            row("remote_ram", "rxe", total_ms=9500), served("precopy"), served("userfault"), served("remote_ram", "siw"), served("remote_ram", "siw"),
            {"engine": "precopy", "transport": None, "driver": "qmp", "workload": "hot", "result": "failed", "reason": "no <end>", "corrupt": 0,
             "failed": 0}]  # fmt: skip
    eviction = [{"how": "loop", "engine": "precopy", "transport": None, "play_s": 300.0},
                {"how": "evacuate", "engine": "remote_ram", "transport": "siw", "play_s": 120.0}]  # fmt: skip
    return page.render(found(figures, rows, eviction))


def test_it_is_well_formed_and_needs_nothing_else(full):
    read = Page(full)
    assert not {"script", "img", "iframe", "object"} & set(read.tags)
    for name, value in read.attributes:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert value in ("data:,", "engines.json")
    assert "http://" not in full and "https://" not in full and "url(" not in full and "@import" not in full


def test_goals_stand_there_with_what_was_measured(full):
    lines = [re.sub(r"<[^>]*>", " ", line) for line in re.findall(r"<tr>.*?</tr>", full)]
    lines = [" ".join(line.split()) for line in lines]
    assert "Figure Goal hot siw hot rxe valkey siw" in lines
    assert "Total time of stock ≤ 0.8 ✓ 0.444 4 s / 9 s ✕ 1.056 9.50 s / 9 s ✕ 1 9 s / 9 s" in lines
    assert "Downtime worst run ≤ 300 ms ✓ 200 ms ✓ 200 ms ✓ 200 ms" in lines
    assert "Stall on a missing page, median of stock ≤ 0.5 ✕ 1 800 µs / 800 µs ✕ 1 800 µs / 800 µs –" in lines
    assert "Corrupt pages all runs ≤ 0 ✓ 0 ✓ 0 ✓ 0" in lines
    assert "Eviction of six VMs, siw of stock ≤ 0.5 ✓ 0.4 120 s / 300 s" in lines


def test_each_engine_has_one_picture_of_the_database_and_a_line_for_each_run(full):
    pictures = re.findall(r'<svg class="picture".*?</svg>', full, re.DOTALL)
    assert [picture.count("<polyline") for picture in pictures] == [1, 1, 2]
    for label in ("50 %", "90 %", "99 %", "99.9 %", "longest", "950 ms", "0 s", "requests per second"):
        assert label in pictures[2]
    assert "userfault, qmp" in pictures[1]


def test_what_was_not_moved_says_why_and_nothing_is_taken_for_a_tag(full):
    text = Page(full).text
    assert "no <end>" in text
    assert "A note with <b> & more." in text


def test_dots_are_runs_and_the_median_is_text(figures, page, row):
    text = page.render(found(figures, [row(downtime_ms=ms) for ms in (100, 200, 400)]))
    section = re.search(r"<h2>Downtime</h2>.*?</section>", text, re.DOTALL)[0]
    assert section.count("<circle") == 3
    assert "<span>200 ms</span>" in section


def test_a_figure_that_nobody_has_is_left_out(figures, page, row):
    text = page.render(found(figures, [row(degraded_ms=None)]))
    assert "<h2>Degraded time</h2>" not in text
    assert "<h2>The database</h2>" not in text


def test_nothing_at_all_is_a_page_too(figures, page):
    assert "no goal was measured" in Page(page.render(found(figures, []))).text


@pytest.mark.parametrize("figure, value, text", [
    ("total_ms", None, "–"), ("total_ms", 12.34, "12.3 ms"), ("total_ms", 1234, "1.23 s"), ("stall_p50_us", 640.5, "640 µs"), ("stall_p99_us", 4200, "4.20 ms"),
    ("stall_max_us", 2500000, "2.50 s"), ("bytes", 3 << 20, "3 MiB"), ("cpu_s_per_gib", 12.5, "12.5 s"), ("faults_per_working_set", 0.0625, "6.25 %"),
    ("corrupt", 0, "0"),
])  # fmt: skip
def test_values_have_units(page, figure, value, text):
    assert page.shown(figure, value) == text
