# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import builtins
import io

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _remote_ram
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import RemoteRamError
from ansible_collections.hecaton.fleet.plugins.modules import remote_ram_info

STATS = {
    **dict.fromkeys(_remote_ram._STATS_COUNTS, 0),
    "role": "destination", "state": "postcopy", "reason": "", "rounds": 0, "pages": 512, "pages_missing": 100, "pages_demand": 5,
    "faults_retry": 4, "faults_joined": 1, "wait_ns_total": 400_000, "wait_ns_max": 210_000, "remaining_us": None, "rate": 3 << 20,
    "memory": 4096, "switch_us": 4000, "precopy_us": 2_000_000,
    "wait_hist": [0] * 6 + [3] + [0] + [1] + [0] * 23, "read_hist": [0] * 32,
}  # fmt: skip


def test_mounts_are_found_by_their_type():
    text = "proc /proc proc rw 0 0\nnone /run/remote_ram remote_ram rw,size=2G 0 0\nnone /srv/guest\\040memory remote_ram rw 0 0\nnone /run/x tmpfs rw 0 0\n"
    assert remote_ram_info.mounts(text) == ["/run/remote_ram", "/srv/guest memory"]
    assert remote_ram_info.mounts("none /srv/m\\303\\274 remote_ram rw 0 0\n".replace("\\303\\274", "\xc3\xbc")) == ["/srv/mü"]


def test_times_from_a_histogram():
    assert remote_ram_info.times([0] * 32, 0) == {"mean_us": None, "median_below_us": None, "p99_below_us": None, "histogram": []}
    found = remote_ram_info.times(STATS["wait_hist"], STATS["wait_ns_total"])
    assert found == {"mean_us": 100.0, "median_below_us": 64, "p99_below_us": 256, "histogram": [{"below_us": 64, "count": 3}, {"below_us": 256, "count": 1}]}
    # Bucket 0 is what took less than 1 us.
    assert remote_ram_info.times([7] + [0] * 31, 700)["median_below_us"] == 1


def test_a_file_as_it_is_returned():
    found = remote_ram_info.describe("web1.ram", 2 << 20, 1 << 20, STATS)
    assert (found["size_mib"], found["resident_mib"], found["role"], found["state"]) == (2, 1, "destination", "postcopy")
    assert found["pages"]["total"] == 512 and found["pages"]["missing"] == 100 and found["pages"]["demand"] == 5
    assert found["faults"]["retry"] == 4 and found["faults"]["joined"] == 1 and found["faults"]["max_us"] == 210.0
    assert found["reads"]["mean_us"] is None
    assert (found["rate_mib"], found["remaining_seconds"], found["switch_seconds"], found["overhead_kib"]) == (3.0, None, 0.004, 4)


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """A folder that the kernel says is a mount, with files that answer."""
    opened = builtins.open

    def fake(path, *arguments, **options):
        if path == "/proc/self/mounts":
            return io.StringIO(f"none {tmp_path} remote_ram rw 0 0\n")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", fake)
    monkeypatch.setattr(_remote_ram.RamFile, "stats", lambda self: STATS)
    (tmp_path / "sub").mkdir()
    for name in ("b.ram", "a.ram", "sub/c.ram"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    return tmp_path


def test_files_of_all_mounts(mounted):
    found = remote_ram_info.run({"path": None, "files": None})
    assert [(each["path"], [file["name"] for file in each["files"]]) for each in found["mounts"]] == [(str(mounted), ["a.ram", "b.ram", "sub/c.ram"])]
    assert found["changed"] is False
    assert [file["name"] for file in remote_ram_info.run({"path": str(mounted), "files": ["b.ram"]})["mounts"][0]["files"]] == ["b.ram"]


def test_a_path_that_is_no_mount(mounted):
    with pytest.raises(RemoteRamError, match=f"no remote_ram file system is mounted on /srv/x .mounted: {mounted}"):
        remote_ram_info.run({"path": "/srv/x", "files": None})


def test_a_file_that_goes_meanwhile_is_left_out_and_other_errors_are_not(mounted, monkeypatch):
    def gone(self):
        (mounted / "a.ram").unlink(missing_ok=True)
        raise RemoteRamError("x: stats: no such file")

    monkeypatch.setattr(_remote_ram.RamFile, "stats", gone)
    assert remote_ram_info.look(str(mounted), "a.ram") is None
    with pytest.raises(RemoteRamError, match="stats"):
        remote_ram_info.look(str(mounted), "b.ram")
