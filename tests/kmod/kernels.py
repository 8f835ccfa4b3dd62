# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compiles remote_ram, without a warning, for the kernels of the Debian releases that it is for: python3 kernels.py

Each with the headers and the compiler of its release; a line for each says which kernel it was.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import build
from image import LabError

#: The oldest one, the one that the tests run on, and the newest one there is in its backports.
SUITES = ("bookworm", "trixie", "trixie-backports")
PACKAGES = ["gcc", "libc6-dev", "make", "kmod"]


def compile_for(suite: str) -> str:
    """The release of the suite's kernel, for which the module was compiled."""
    headers = f"linux-headers-amd64/{suite}" if suite.endswith("-backports") else "linux-headers-amd64"
    root = build.debian(f"kmodheaders{suite.replace('-', '')}", f"with the headers of {suite}", [*PACKAGES, headers], (), suite=suite)
    (release,) = sorted(path.name for path in (root / "usr/lib/modules").glob("*") if (path / "build").is_symlink())
    with tempfile.TemporaryDirectory(prefix="hecaton-kmod-") as name:
        folder = pathlib.Path(name)
        build.stage(folder)
        make = f"make -s -C /lib/modules/{release}/build M=/build/kmod CONFIG_DEBUG_INFO_BTF_MODULES= KCFLAGS=-Werror modules"
        said = build.inside(root, f"set -e; cd /build; {make} 2>&1; modinfo -F vermagic kmod/remote_ram.ko", folder)
    *warnings, vermagic = said.strip().splitlines()
    if warnings or vermagic.split()[0] != release:
        raise LabError("\n".join([*warnings, vermagic]))
    return release


def main() -> int:
    failed = 0
    for suite in SUITES:
        try:
            print(f"kmod: remote_ram compiles for {suite}: Linux {compile_for(suite)}", flush=True)
        except LabError as err:
            print(f"kmod: remote_ram does not compile for {suite}: {err}", file=sys.stderr, flush=True)
            failed += 1
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
