# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab's hosts keep of the code that Python compiles from archives: the same code, whoever compiled it."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import zipfile

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")
PACKAGES = TESTS / "lab" / "image" / "rootfs" / "usr" / "lib" / "python3" / "dist-packages"
PROGRAM = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import keep_compiled, zipimport
keep_compiled.FOLDER = sys.argv[3]
zipimport._compile_source = keep_compiled.compile_once
import carried
print(carried.answer(), carried.answer.__code__.co_filename)
"""


@pytest.fixture
def imported(tmp_path):
    """What a module that comes in an archive says, and from which file it says that its code is."""

    def run(name, source, folder=tmp_path / "kept"):
        archive = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as stream:
            stream.writestr("carried.py", source)
        done = subprocess.run([sys.executable, "-B", "-c", PROGRAM, archive, PACKAGES, folder], capture_output=True, text=True, check=True)
        answer, file = done.stdout.split()
        assert file == f"{archive}/carried.py"
        return answer

    return run


def kept(tmp_path):
    return {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}


def test_the_same_source_is_compiled_once(imported, tmp_path):
    assert imported("one", "def answer(): return 41\n") == "41"
    first = kept(tmp_path)
    assert len(first) == 1
    assert imported("two", "def answer(): return 41\n") == "41"
    assert kept(tmp_path) == first


def test_other_source_is_compiled_anew(imported, tmp_path):
    assert imported("one", "def answer(): return 41\n") == "41"
    assert imported("two", "def answer(): return 42\n") == "42"
    assert len(kept(tmp_path)) == 2


def test_what_is_kept_is_what_is_used(imported, tmp_path):
    imported("one", "def answer(): return 41\n")
    imported("two", "def answer(): return 42\n")
    one, two = kept(tmp_path)
    one.write_bytes(two.read_bytes())
    assert {imported("three", "def answer(): return 41\n"), imported("four", "def answer(): return 42\n")} in ({"41"}, {"42"})


def test_it_does_without_its_folder(imported, tmp_path):
    (tmp_path / "file").touch()
    assert imported("one", "def answer(): return 41\n", tmp_path / "file" / "kept") == "41"
