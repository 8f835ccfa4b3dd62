# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import fcntl
import json
import pathlib
import re
import shutil
import socket
import struct
import subprocess

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _remote_ram
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import RamFile, RemoteRamError

INCLUDE = pathlib.Path(__file__).resolve().parents[4] / "kmod-src" / "include" / "uapi"
HEADER = (INCLUDE / "linux" / "remote_ram.h").read_text()
STRUCTS = {
    "rram_session_args": _remote_ram._SESSION,
    "rram_precopy_args": _remote_ram._PRECOPY,
    "rram_switch_args": _remote_ram._SWITCH,
    "rram_wait_args": _remote_ram._WAIT,
    "rram_tune_args": _remote_ram._TUNE,
    "rram_process_args": _remote_ram._PROCESS,
    "rram_stats": _remote_ram._STATS,
}
CALLS = ("EXPORT", "ATTACH", "PRECOPY", "SWITCH", "WAIT", "STATS", "TUNE", "ABORT", "RELEASE", "TAKE_BACK", "ALLOW_COLLAPSE")


def fields(name):
    """(name, is an array) of each field of a struct in the header."""
    body = re.search(rf"^struct {name} {{(.*?)^}};", HEADER, re.S | re.M).group(1)
    return [(field, bool(array)) for field, array in re.findall(r"__u\d+ (\w+)(\[\w+\])?;", body)]


def constants(prefix):
    """The enumerators, or defines, with a prefix: {name: number}."""
    return {name: int(number) for name, number in re.findall(rf"\b{prefix}_(\w+) = (\d+),", HEADER)}


def unpacked_offsets(layout, names):
    """Where a struct of Python has each field, if the fields are these."""
    pieces = []
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format.lstrip("=")):
        if kind == "s" or count == str(_remote_ram._BUCKETS):
            pieces.append(count + kind)
        else:
            pieces += [kind] * int(count or 1)
    assert len(pieces) == len(names)
    return {name: struct.calcsize("=" + "".join(pieces[:number])) for number, name in enumerate(names)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler makes of the header."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("layout")
    lines = []
    for name in STRUCTS:
        lines.append(f'printf("\\"{name}\\": {{\\"\\": %zu", sizeof(struct {name}));')
        lines += [f'printf(", \\"{field}\\": %zu", offsetof(struct {name}, {field}));' for field, _array in fields(name)]
        lines.append('printf("}, ");')
    lines += [f'printf("\\"{call}\\": %lu, ", (unsigned long)RRAM_IOC_{call});' for call in CALLS]
    lines.append('printf("\\"FS_MAGIC\\": %lu, \\"BUCKETS\\": %lu", (unsigned long)RRAM_FS_MAGIC, (unsigned long)RRAM_HIST_BUCKETS);')
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/remote_ram.h>\nint main(void) { printf(\"{\");\n" + "\n".join(lines)
    (folder / "layout.c").write_text(source + '\nputs("}"); return 0; }\n')
    command = ["gcc", "-Wall", "-Werror", "-I", str(INCLUDE), "-o", str(folder / "layout"), str(folder / "layout.c")]
    subprocess.run(command, check=True)
    return json.loads(subprocess.run([str(folder / "layout")], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_the_kernels(compiled, name):
    layout, there = STRUCTS[name], dict(compiled[name])
    assert layout.size == there.pop("")
    assert unpacked_offsets(layout, [field for field, _array in fields(name)]) == there


def test_stats_have_the_kernels_names():
    names = [field for field, _array in fields("rram_stats")]
    assert names == [*_remote_ram._STATS_WORDS, *_remote_ram._STATS_COUNTS, "wait_hist", "read_hist"]


@pytest.mark.parametrize("call", CALLS)
def test_calls_have_the_kernels_numbers(compiled, call):
    assert getattr(_remote_ram, call) == compiled[call]


def test_every_call_of_the_header_is_known():
    assert set(re.findall(r"#define RRAM_IOC_(\w+)", HEADER)) - {"MAGIC"} == set(CALLS)


def test_constants_are_the_kernels(compiled):
    assert compiled["FS_MAGIC"] == _remote_ram.FS_MAGIC
    assert compiled["BUCKETS"] == _remote_ram._BUCKETS
    assert constants("RRAM_STATE") == {name.upper(): number for number, name in enumerate(_remote_ram.STATES)}
    assert constants("RRAM_ROLE") == {name.upper(): number for number, name in enumerate(_remote_ram.ROLES)}
    assert constants("RRAM_TUNE") == {name.upper(): number for name, number in _remote_ram.TUNABLES.items()}
    assert sorted(constants("RRAM_REASON").values()) == list(range(len(_remote_ram.REASONS)))
    assert len(set(_remote_ram.REASONS)) == len(_remote_ram.REASONS)


@pytest.mark.parametrize(("address", "port", "family", "packed"), [
    ("10.77.1.11", 7471, socket.AF_INET, (">H4s", 2, (7471, bytes([10, 77, 1, 11])))),
    ("0.0.0.0", 0, socket.AF_INET, (">H4s", 2, (0, bytes(4)))),
    ("::1", 65535, socket.AF_INET6, (">HI16sI", 2, (65535, 0, bytes(15) + b"\x01", 0))),
])  # fmt: skip
def test_addresses(address, port, family, packed):
    made = _remote_ram.sockaddr(address, port)
    layout, offset, values = packed
    assert len(made) == 128
    assert struct.unpack_from("=H", made) == (family,)
    assert struct.unpack_from(layout, made, offset) == values
    assert _remote_ram.port_of(made) == port


@pytest.mark.parametrize(("address", "port"), [("10.77.1.300", 1), ("10.77.1.11", 70000), ("no such host\0", 1)])
def test_what_is_no_address(address, port):
    with pytest.raises(RemoteRamError, match="is not an address"):
        _remote_ram.sockaddr(address, port)


@pytest.fixture
def ram(tmp_path, monkeypatch):
    """An open file, and what the kernel is told and answers."""
    calls = []

    def ioctl(fd, number, argument=0, mutate=True):
        calls.append((number, bytes(argument) if number not in (_remote_ram.ABORT, _remote_ram.RELEASE, _remote_ram.TAKE_BACK) else b""))
        answer = calls.answer
        if callable(answer):
            answer = answer(argument)
        return 0

    class Calls(list):
        answer = None

    calls = Calls()
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    path = tmp_path / "vm.ram"
    with RamFile(str(path), 1 << 20) as file:
        yield file, calls


def test_a_file_is_made_with_its_size(ram):
    file, _calls = ram
    with open(file.path, "rb") as stream:
        assert len(stream.read()) == 1 << 20
    with RamFile(file.path, read_only=True) as again:
        assert again.fd >= 0
    assert again.fd == -1


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RemoteRamError, match="can't be opened: No such file") as caught:
        RamFile(str(tmp_path / "none.ram"))
    assert caught.value.errno == errno.ENOENT


def test_attach_returns_the_port_that_was_taken(ram):
    file, calls = ram

    def answer(argument):
        struct.pack_into(">H", argument, 40 + 2, 4711)

    calls.answer = answer
    assert file.attach("10.77.1.12", 0, bytes(range(16)), b"t" * 16, reconnect_ms=5) == 4711
    number, told = calls[0]
    values = _remote_ram._SESSION.unpack(told)
    assert number == _remote_ram.ATTACH
    assert (values[0], values[2], values[3], values[5:9]) == (len(told), bytes(range(16)), b"t" * 16, (0, 5, 0, 0))


def test_a_refusal_is_told_in_words(ram):
    file, calls = ram

    def answer(argument):
        values = list(_remote_ram._SESSION.unpack(argument))
        values[10] = 2
        argument[:] = _remote_ram._SESSION.pack(*values)
        raise OSError(errno.ECONNREFUSED, "refused")

    calls.answer = answer
    with pytest.raises(RemoteRamError) as caught:
        file.export("10.77.1.12", 7, bytes(16), bytes(16))
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.reason == "the token is not the destination's"
    assert str(caught.value) == f"{file.path}: export: the token is not the destination's"


def test_a_call_without_a_session_is_told_in_words(ram):
    file, calls = ram

    def answer(_argument):
        raise OSError(errno.ENOTCONN, "not connected")

    calls.answer = answer
    with pytest.raises(RemoteRamError, match="abort: no session"):
        file.abort()
    with pytest.raises(RemoteRamError, match="tune bandwidth: no session"):
        file.tune(bandwidth=1)


def test_wait_and_states_that_are_not_known(ram):
    file, calls = ram

    def answer(argument):
        values = list(_remote_ram._WAIT.unpack(argument))
        assert values[1] == 1 << 6 | 1 << 8
        values[3:5] = 99, 99
        argument[:] = _remote_ram._WAIT.pack(*values)

    calls.answer = answer
    assert file.wait("postcopy", "complete", timeout_ms=10) == ("state 99", "reason 99")


def test_stats(ram):
    file, calls = ram

    def answer(argument):
        words = [len(argument), 1, 2, 6, 10, 3]
        counts = list(range(100, 100 + len(_remote_ram._STATS_COUNTS)))
        counts[_remote_ram._STATS_COUNTS.index("remaining_us")] = 2**64 - 1
        argument[:] = _remote_ram._STATS.pack(*words, *counts, *range(32), *range(32, 64))

    calls.answer = answer
    stats = file.stats()
    assert (stats["role"], stats["state"], stats["reason"], stats["rounds"]) == ("destination", "postcopy", "the connection was lost", 3)
    assert stats["pages"] == 100 and stats["memory"] == 100 + len(_remote_ram._STATS_COUNTS) - 1
    assert stats["remaining_us"] is None
    assert stats["wait_hist"] == list(range(32)) and stats["read_hist"] == list(range(32, 64))


def test_switch_and_tune(ram):
    file, calls = ram

    def answer(argument):
        if isinstance(argument, bytearray):
            argument[:] = _remote_ram._SWITCH.pack(32, 0, 9, 0, 1234, 5678)

    calls.answer = answer
    assert file.switch(9) == (1234, 5678)
    file.tune(background=0, batch_pages=8)
    assert [_remote_ram._TUNE.unpack(told) for number, told in calls[1:]] == [(16, 4, 0), (16, 3, 8)]


def test_what_is_not_remote_ram(tmp_path):
    assert not _remote_ram.is_remote_ram(str(tmp_path))
    assert not _remote_ram.is_remote_ram(str(tmp_path / "none"))
