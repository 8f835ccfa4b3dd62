# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds the lab's two guests, through the lab's cache of images. ``python3 guest_image.py`` builds both and prints where."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lab"))

import image  # noqa: E402

INIT_FLAGS = ("-static", "-O2", "-Wall", "-Wextra", "-Werror")


def tiny_initramfs() -> pathlib.Path:
    """The initramfs of the guest that dirties memory; it boots with the lab host's ``vmlinuz``."""

    def build(folder):
        image.run(["gcc", *INIT_FLAGS, "-o", str(folder / "init"), str(HERE / "init.c")])
        image.run(["strip", str(folder / "init")])
        # Not compressed: an emulated CPU copies faster than it unpacks.
        image.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "--reproducible", "-R", "0:0", "-F", "initramfs.cpio"],
            input="init\n", cwd=folder,
        )  # fmt: skip

    return image.entry("tiny", image.digest(*INIT_FLAGS, HERE / "init.c"), build) / "initramfs.cpio"


def valkey_image() -> pathlib.Path:
    """Folder with ``root.raw``, the disk of the valkey guest; it boots with the lab host's kernel and initrd."""
    key = image.digest(
        image.SUITE, image.GUEST_DISK_MIB, HERE / "lab-init", HERE / "valkey.conf", HERE / "customize.sh",
        image.HERE / "image" / "guest-packages.txt",
    )  # fmt: skip

    def build(folder):
        tar = folder / "root.tar"
        with tempfile.TemporaryDirectory(prefix="hecaton-guest-") as stage:
            # mmdebstrap as an ordinary user runs its hooks under another id: give it copies that it may read.
            os.chmod(stage, 0o755)
            for name in ("lab-init", "valkey.conf", "customize.sh"):
                shutil.copy(HERE / name, stage)
                os.chmod(f"{stage}/{name}", 0o755)
            image.mmdebstrap(
                tar, image.packages("guest-packages.txt"),
                f'--customize-hook={stage}/customize.sh "$1"', env={"GUEST_HERE": stage},
            )  # fmt: skip
        image.tree_to_ext4(tar, folder / "root.raw", image.GUEST_DISK_MIB, "guest")
        tar.unlink()

    return image.entry("valkey", key, build)


if __name__ == "__main__":
    try:
        print(tiny_initramfs())
        print(valkey_image() / "root.raw")
    except image.LabError as error:
        sys.exit(str(error))
