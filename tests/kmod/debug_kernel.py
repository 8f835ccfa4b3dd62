# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds the debug kernel (debug.config says with which checks) from Debian's linux-source, and modules for it; cached by content."""

from __future__ import annotations

import pathlib
import shutil

import build
from build import HERE, image, inside

CONFIG = HERE / "debug.config"
PACKAGES = ("gcc", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "linux-source", "xz-utils", "perl", "python3-minimal", "kmod",
            "libibverbs-dev", "librdmacm-dev")  # fmt: skip
#: What looks for mistakes: those of debug.config, without which there would be no such kernel.
CHECKS = [name for name in ("KASAN", "PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_KMEMLEAK", "DEBUG_VM", "DEBUG_LIST")
          if f"CONFIG_{name}=y" in CONFIG.read_text().splitlines()]  # fmt: skip
RELEASE = "-hecaton-debug"  # how its release ends
#: Of a kernel tree after its build, what modules are not built from.
PRUNE = (
    "find . -name '*.o' ! -path './scripts/*' ! -path './tools/*' -delete; find . -name '*.a' ! -path './tools/*' -delete; find . -name '*.ko' -delete; "
    "rm -rf Documentation sound samples vmlinux .tmp_vmlinux* System.map; find drivers fs net -name '*.c' -delete"
)


def debian() -> pathlib.Path:
    """The folder of a small Debian that can build a kernel, whose source is in its /usr/src."""
    return build.debian("kmoddebian", "that can build a kernel", list(PACKAGES), ())


def kernel() -> pathlib.Path:
    """A folder with vmlinuz, lib/modules and the tree that modules are built against."""
    root = debian()

    def make(folder):
        print("kmod: building the debug kernel, which takes a while (cached)", flush=True)
        shutil.copy(CONFIG, folder / "debug.config")
        inside(root, (
            "set -e; cd /build; mkdir tree; tar -C tree --strip-components=1 -xJf /usr/src/linux-source-*.tar.xz; cd tree; "
            "make -s x86_64_defconfig; scripts/kconfig/merge_config.sh -m .config ../debug.config >/dev/null; make -s olddefconfig; "
            # An option that Kconfig dropped would be a check that isn't made.
            "grep '^CONFIG' ../debug.config | while read -r line; do grep -qxF \"$line\" .config || { echo \"not taken: $line\"; exit 1; }; done; "
            "make -s -j$(nproc) bzImage modules; make -s modules_install INSTALL_MOD_PATH=/build INSTALL_MOD_STRIP=1; "
            f"cp arch/x86/boot/bzImage ../vmlinuz; rm -f ../lib/modules/*/build; {PRUNE}"
        ), folder)  # fmt: skip

    return image.entry("kmoddebug", image.digest("1", root.name, CONFIG), make)


def built() -> pathlib.Path:
    """A folder with remote_ram.ko for the debug kernel, its modules, and the test programs."""
    root, debug = debian(), kernel()

    def build_all(folder):
        make = "make -s -C /kernel -j$(nproc)"
        build.compile_module(root, folder, make, debug / "tree")
        fetch = f"mkdir siw; tar -C siw --strip-components=5 -xJf /usr/src/linux-source-*.tar.xz --wildcards '*/{build.SIW}'"
        build.compile_siw(root, folder, make, fetch, debug / "tree")
        image.run(["tar", "-C", str(debug), "-cf", str(folder / "modules.tar"), "lib"])

    return image.entry("kmodfordebug", image.digest(debug.name, *build.SIW_PATCHES, *build.sources(), *build.programs()), build_all)


if __name__ == "__main__":
    print(built())
