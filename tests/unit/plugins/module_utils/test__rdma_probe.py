# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a probe needs no RDMA: the pattern, and the process that is watched."""

from __future__ import annotations

import os
import time

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _rdma_probe
from ansible_collections.hecaton.fleet.plugins.module_utils._rdma_probe import ProbeError


def test_the_pattern_is_that_of_its_seed_and_does_not_repeat():
    pattern = _rdma_probe.pattern("a", 1 << 16)
    assert pattern == _rdma_probe.pattern("a", 1 << 16) != _rdma_probe.pattern("b", 1 << 16)
    pages = {pattern[start:start + 4096] for start in range(0, len(pattern), 4096)}
    assert len(pages) == 16


def test_what_the_watched_process_found_comes_back():
    result = _rdma_probe.watched(lambda tell: {"memory": bytes(range(256)) * 4096, "latencies": [0.5], "pid": os.getpid()}, 30)
    assert result["memory"] == bytes(range(256)) * 4096
    assert result["latencies"] == [0.5] and result["pid"] != os.getpid()


def test_a_call_that_hangs_is_ended_and_its_stage_is_told():
    pids = []

    def work(tell):
        tell("connect")
        time.sleep(3600)

    fork = os.fork

    def remember():
        pid = fork()
        pids.append(pid)
        return pid

    os.fork = remember
    try:
        with pytest.raises(ProbeError) as raised:
            _rdma_probe.watched(work, 1)
    finally:
        os.fork = fork
    assert raised.value.stage == "connect" and "not done in 1 s" in str(raised.value)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize(("error", "stage", "text"), [
    (ProbeError("route", "RDMA_CM_EVENT_ROUTE_ERROR"), "route", "ROUTE_ERROR"), (ValueError("odd"), "internal", "ValueError"),
])  # fmt: skip
def test_what_fails_in_it_is_told_without_a_traceback(error, stage, text, capfd):
    def work(tell):
        raise error

    with pytest.raises(ProbeError) as raised:
        _rdma_probe.watched(work, 30)
    assert raised.value.stage == stage and text in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_process_that_dies_is_told():
    with pytest.raises(ProbeError, match="ended without a word"):
        _rdma_probe.watched(lambda tell: os._exit(139), 30)
