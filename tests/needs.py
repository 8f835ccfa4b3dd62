# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sees to the Debian packages that the checks and the lab need: python3 tests/needs.py [venv] [test] [lab]

Installs what is missing when root; otherwise prints the one command that does, and ends with status 2.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys

# For each purpose, the packages and how to tell that one is there: a command, a file, or a module of this Python.
PACKAGES = {
    "venv": {"python3-venv": "module ensurepip"},
    "test": {
        "chromium": "command chromium",
        "chromium-driver": "command chromedriver",
        "git": "command git",
        "shellcheck": "command shellcheck",
    },
    "lab": {
        "cpio": "command cpio",
        "e2fsprogs": "command mke2fs",
        "gcc": "command gcc",
        "libc6-dev": "file /usr/include/stdio.h",
        "mmdebstrap": "command mmdebstrap",
        "nbdkit": "command nbdkit",
        "openssh-client": "command ssh",
        "patch": "command patch",
        "qemu-system-x86": "command qemu-system-x86_64",
        "qemu-utils": "command qemu-img",
        "uidmap": "command newuidmap",
        "util-linux": "command unshare",
        "vde2": "command vde_switch",
        "zstd": "command zstd",
    },
}


def present(sign: str) -> bool:
    kind, name = sign.split()
    if kind == "command":
        # mke2fs and its like are for everyone, though not on everyone's PATH.
        return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin") is not None
    if kind == "file":
        return os.path.exists(name)
    return importlib.util.find_spec(name) is not None


def missing(*purposes: str) -> list[str]:
    return sorted({package for purpose in purposes for package, sign in PACKAGES[purpose].items() if not present(sign)})


def install(*purposes: str) -> None:
    packages = missing(*purposes)
    if not packages:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"missing packages; install them with: sudo apt-get install {' '.join(packages)}", file=sys.stderr)
        sys.exit(2)
    # Two checks may miss something at once; apt-get's own lock for its lists is not waited for.
    with open("/run/lock/hecaton-needs", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        apt_install(missing(*purposes))
    left = missing(*purposes)
    if left:
        sys.exit(f"still missing after apt-get installed them: {' '.join(left)}")


def apt_install(packages: list[str]) -> None:
    if not packages:
        return
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=300"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        if subprocess.run([*apt, *command], env=environment, stdout=sys.stderr, check=False).returncode != 0:
            sys.exit(f"apt-get {command[0]} failed; these packages are needed: {' '.join(packages)}")


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(PACKAGES)
    if unknown:
        sys.exit(f"unknown purpose: {' '.join(sorted(unknown))} (known: {' '.join(PACKAGES)})")
    install(*(sys.argv[1:] or PACKAGES))
