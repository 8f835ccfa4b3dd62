# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark's programs, which find each other by their folder."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

BENCH = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests") / "bench"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@pytest.fixture(scope="session")
def figures():
    return load("figures")


@pytest.fixture(scope="session")
def page():
    return load("engines_page")


@pytest.fixture(scope="session")
def engines():
    return load("engines")


@pytest.fixture(scope="session")
def deadline():
    return load("deadline")


@pytest.fixture
def row():
    """A run of one engine with one workload, and what it is to differ in."""

    def made(engine="userfault", transport=None, workload="hot", **more):
        return {
            "engine": engine, "transport": transport, "driver": "qmp", "workload": workload, "from": "hv1", "to": "hv2", "result": "moved", "reason": "",
            "downtime_ms": 200, "total_ms": 9000, "degraded_ms": 4000, "stall_p50_us": 800.0, "stall_p99_us": 9000.0, "stall_max_us": 12000, "stalls": 500,
            "bytes": 1 << 27, "cpu_s": 4.0, "cpu_s_per_gib": 20.0, "corrupt": 0, "failed": 0, **more,
        }  # fmt: skip

    return made
