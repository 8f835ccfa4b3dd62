# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

HOSTS = pathlib.Path(__file__).resolve().parents[2] / "kmod" / "hosts.py"
# As Linux 6.12 writes it, after the words "unreferenced object".
LOST = """ 0xffff8881052d1a00 (size 128):
  comm "kworker/u4:2", pid 71, jiffies 4294905129
  hex dump (first 32 bytes):
    00 00 00 00 2b 30 78 31 00 00 00 00 00 00 00 00  ....+0x1........
  backtrace (crc 5f0c1e9d):
    kmalloc_trace_noprof+0x2a1/0x340
    siw_accept_newconn+0x8d/0x4f0 [siw]
    process_one_work+0x2d6/0x600
"""


@pytest.fixture(scope="module")
def hosts():
    spec = importlib.util.spec_from_file_location("kmod_hosts_for_tests", HOSTS)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_what_was_lost_is_told_with_who_made_it(hosts):
    assert hosts.made_by(LOST) == "128 bytes, by kworker/u4:2: kmalloc_trace_noprof < siw_accept_newconn [siw] < process_one_work"
