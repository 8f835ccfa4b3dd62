# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[3] / "kmod-src"

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def build(kernel):
    """What make says in the source's folder, and how it ends, with the headers of a kernel."""
    # As by hand, also where make runs the tests.
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-s", "-C", SOURCE, f"KDIR={kernel}", "KERNEL=5.10.0-30-amd64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    return done.returncode, [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make: ")]


def headers(folder, version):
    """Headers of a kernel, of which nothing is compiled: what is asked of them is answered here."""
    major, minor = version
    (folder / "include/generated/uapi/linux").mkdir(parents=True)
    told = f"#define LINUX_VERSION_CODE {major << 16 | minor << 8 | 99}\n#define LINUX_VERSION_MAJOR {major}\n"
    (folder / "include/generated/uapi/linux/version.h").write_text(told)
    (folder / "Makefile").write_text("modules:\n\t@echo compiled\n")
    return folder


def test_headers_that_are_missing_are_named(tmp_path):
    code, said = build(tmp_path)
    assert code == 2 and said == [f"no headers of kernel 5.10.0-30-amd64 in {tmp_path}; install the package linux-headers-5.10.0-30-amd64"]


@pytest.mark.parametrize("version", [(5, 10), (6, 0)])
def test_a_kernel_that_is_too_old_is_refused_in_one_line(tmp_path, version):
    code, said = build(headers(tmp_path, version))
    assert code == 2 and said == ["remote_ram needs Linux 6.1 or later, and {} is of {}.{}".format(tmp_path, *version)]


@pytest.mark.parametrize("version", [(6, 1), (6, 12), (7, 3)])
def test_other_kernels_are_compiled_for(tmp_path, version):
    assert build(headers(tmp_path, version)) == (0, ["compiled"])


def test_headers_that_do_not_say_are_left_to_the_compiler(tmp_path):
    (tmp_path / "Makefile").write_text("modules:\n\t@echo compiled\n")
    assert build(tmp_path) == (0, ["compiled"])
