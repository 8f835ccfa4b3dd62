# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the benchmark makes figures of what a guest told."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")


@pytest.fixture(scope="module")
def engines():
    spec = importlib.util.spec_from_file_location("bench_engines", TESTS / "bench" / "engines.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def told(seq, rate, hist, uptime_ms=None, stall=10):
    return {"seq": seq, "rate_mib_s": rate, "stall_hist": hist, "uptime_ms": seq * 1000 if uptime_ms is None else uptime_ms, "stall_max_us": stall}


def test_percentiles_are_upper_edges_of_buckets(engines):
    assert engines.percentile([0, 98, 1, 0, 1], 0.5) == 2
    assert engines.percentile([0, 98, 1, 0, 1], 0.99) == 4
    assert engines.percentile([0, 98, 1, 0, 1], 1) == 16
    assert engines.percentile([], 0.5) is None


def test_only_stalls_of_the_move_count(engines):
    before = [told(n, 6, [100 * n]) for n in range(1, engines.REPORTS + 1)] + [told(9, 6, [900])]
    after = [told(10, 6, [900, 0, 0, 7], stall=6000)]
    seen = engines.measure(before, after, 0)
    assert (seen["stall_p99_us"], seen["stall_max_us"]) == (8, 6000)


def test_degraded_until_nine_tenths_of_the_earlier_rate_and_the_pause_counts(engines):
    before = [told(n, 6, [n]) for n in range(1, engines.REPORTS + 2)]
    after = [told(10, 1, [10]), told(11, 5.3, [11]), told(12, 5.4, [12])]
    assert engines.measure(before, after, 250)["degraded_ms"] == 3250
    assert engines.measure(before, after[:2], 250)["degraded_ms"] is None


def test_medians_are_of_one_engine_driver_and_workload(engines):
    row = {"engine": "precopy", "transport": None, "driver": "qmp", "workload": "w", **dict.fromkeys(engines.MEDIANS, 5), "corrupt": 0}
    rows = [row, {**row, "downtime_ms": 9}, {**row, "downtime_ms": 7, "degraded_ms": None}, {**row, "driver": "libvirt", "corrupt": 2}]
    qmp, libvirt = engines.medians(rows)
    assert (qmp["runs"], qmp["downtime_ms"], qmp["degraded_ms"], qmp["corrupt"]) == (3, 7, 5, 0)
    assert (libvirt["runs"], libvirt["corrupt"]) == (1, 2)
