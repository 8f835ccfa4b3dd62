# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The binding against the header that the kernel module is compiled with."""

from __future__ import annotations

import errno
import pathlib
import shutil
import socket
import subprocess

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _remote_ram
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import RamFile, RemoteRamError, sockaddr

UAPI = pathlib.Path(__file__).parents[4] / "kmod-src" / "include" / "uapi"
STRUCTS = {"_SESSION": "session_args", "_PRECOPY": "precopy_args", "_SWITCH": "switch_args", "_WAIT": "wait_args", "_TUNE": "tune_args", "_STATS": "stats"}
CALLS = ("EXPORT", "ATTACH", "PRECOPY", "SWITCH", "WAIT", "STATS", "TUNE", "ABORT", "RELEASE", "TAKE_BACK")


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Numbers of the header, by name."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc to ask what the C header says")
    lines = [f'P("size {struct}", sizeof(struct rram_{struct}));' for struct in STRUCTS.values()]
    lines += [f'P("call {call}", RRAM_IOC_{call});' for call in CALLS]
    fields = (*_remote_ram._STATS_WORDS, *_remote_ram._STATS_COUNTS, "wait_hist", "read_hist")
    lines += [f'P("field {name}", offsetof(struct rram_stats, {name}));' for name in fields]
    lines += [f'P("state {name}", RRAM_STATE_{name.upper()});' for name in _remote_ram.STATES]
    lines += ['P("reasons", RRAM_REASON_DEVICE);', 'P("magic", RRAM_FS_MAGIC);']
    folder = tmp_path_factory.mktemp("header")
    source = folder / "ask.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/remote_ram.h>\n"
        '#define P(name, value) printf("%s=%lu\\n", name, (unsigned long)(value))\nint main(void)\n{\n' + "\n".join(lines) + "\n}\n"
    )
    subprocess.run(["gcc", "-I", str(UAPI), "-o", str(folder / "ask"), str(source)], check=True)
    told = subprocess.run([str(folder / "ask")], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split("=") for line in told.splitlines())}


def test_structures_have_the_sizes_of_the_header(header):
    for name, struct in STRUCTS.items():
        assert getattr(_remote_ram, name).size == header[f"size {struct}"], name


def test_calls_have_the_numbers_of_the_header(header):
    for name in CALLS:
        assert getattr(_remote_ram, name) == header[f"call {name}"], name


def test_statistics_are_where_the_header_has_them(header):
    offset = 0
    for name in _remote_ram._STATS_WORDS:
        assert header[f"field {name}"] == offset, name
        offset += 4
    for name in _remote_ram._STATS_COUNTS:
        assert header[f"field {name}"] == offset, name
        offset += 8
    assert (header["field wait_hist"], header["field read_hist"]) == (offset, offset + 256)


def test_states_reasons_and_magic_are_those_of_the_header(header):
    assert [header[f"state {name}"] for name in _remote_ram.STATES] == list(range(len(_remote_ram.STATES)))
    assert header["reasons"] == len(_remote_ram.REASONS) - 1
    assert header["magic"] == _remote_ram.FS_MAGIC


def test_addresses():
    four = sockaddr("10.77.1.12", 7000)
    assert (len(four), int.from_bytes(four[:2], "little"), four[2:8]) == (128, socket.AF_INET, b"\x1b\x58\x0a\x4d\x01\x0c")
    six = sockaddr("fd00::1", 7000)
    assert (len(six), six[2:4], six[8:24]) == (128, b"\x1b\x58", socket.inet_pton(socket.AF_INET6, "fd00::1"))


@pytest.mark.parametrize(("address", "port"), [("not an address", 1), ("10.77.1.12", 1 << 20)])
def test_what_is_no_address_is_refused(address, port):
    with pytest.raises(RemoteRamError, match="is not an address"):
        sockaddr(address, port)


def test_a_refusal_is_said_in_words(monkeypatch, tmp_path):
    def ioctl(fd, number, argument, mutate=False):
        values = list(_remote_ram._SESSION.unpack(argument))
        values[10] = _remote_ram.REASONS.index("the token is not the destination's")
        argument[:] = _remote_ram._SESSION.pack(*values)
        raise OSError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(_remote_ram.fcntl, "ioctl", ioctl)
    with RamFile(str(tmp_path / "ram"), 4096) as ram, pytest.raises(RemoteRamError, match="export: the token is not the destination's") as caught:
        ram.export("10.77.1.12", 7000, bytes(16), bytes(16))
    assert caught.value.errno == errno.ECONNREFUSED and caught.value.reason == "the token is not the destination's"


def test_a_file_of_another_file_system_says_so(tmp_path):
    with RamFile(str(tmp_path / "ram"), 4096) as ram, pytest.raises(RemoteRamError) as caught:
        ram.stats()
    assert caught.value.errno == errno.ENOTTY
    assert not _remote_ram.is_remote_ram(str(tmp_path))


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(RemoteRamError, match="can't be opened"):
        RamFile(str(tmp_path / "absent"))
