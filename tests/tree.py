# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies of this checkout in the places where Ansible's tools want a collection.

    python3 tests/tree.py           the sources, as git sees them, in build/ansible_collections/hecaton/fleet
    python3 tests/tree.py install   the collection, built and installed in build/collections as a user has it
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import devenv

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
COLLECTION = pathlib.Path("ansible_collections/hecaton/fleet")
SOURCES = BUILD / COLLECTION
INSTALLED = BUILD / "collections"


def files() -> list[str]:
    """Files that are in git, or would be: neither ignored nor deleted."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return sorted(name for name in set(listed.stdout.split("\0")) - {""} if os.path.lexists(ROOT / name))


def copy() -> pathlib.Path:
    """Brings the copy of the sources up to date, and into a git repository of its own, which ansible-test asks for."""
    SOURCES.mkdir(parents=True, exist_ok=True)
    wanted = files()
    for name in wanted:
        source, target = ROOT / name, SOURCES / name
        if target.is_file() and target.stat().st_mode == source.stat().st_mode and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(source, target)
    git = ["git", "-C", str(SOURCES)]
    if not (SOURCES / ".git").exists():
        subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    copied = subprocess.run([*git, "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    for name in set(copied) - set(wanted) - {""}:
        (SOURCES / name).unlink(missing_ok=True)
        for folder in (SOURCES / name).parents:
            if folder == SOURCES or any(folder.iterdir()):
                break
            folder.rmdir()
    subprocess.run([*git, "add", "--all"], check=True)
    return SOURCES


def install() -> pathlib.Path:
    """Builds and installs the collection, unless the one that is installed was made of the same files."""
    sources = copy()
    total = hashlib.sha256()
    for name in files():
        total.update(f"{name}\0{(sources / name).lstat().st_mode}\0".encode() + hashlib.sha256((sources / name).read_bytes()).digest())
    mark = INSTALLED / ".made-of"
    if mark.exists() and mark.read_text() == total.hexdigest():
        return INSTALLED / COLLECTION
    shutil.rmtree(INSTALLED, ignore_errors=True)
    INSTALLED.mkdir(parents=True)
    galaxy, environment = devenv.make() / "bin" / "ansible-galaxy", {**devenv.environment(), "ANSIBLE_COLLECTIONS_PATH": str(INSTALLED)}
    subprocess.run([galaxy, "collection", "build", "--force", "--output-path", INSTALLED, sources], check=True, env=environment)
    archive = next(INSTALLED.glob("*.tar.gz"))
    subprocess.run([galaxy, "collection", "install", "--offline", "--force", "--collections-path", INSTALLED, archive], check=True, env=environment)
    mark.write_text(total.hexdigest())
    return INSTALLED / COLLECTION


if __name__ == "__main__":
    with devenv.locked(BUILD / "tree.lock"):
        print(install() if sys.argv[1:] == ["install"] else copy())
