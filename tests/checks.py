# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks that need no hypervisor: python3 tests/checks.py lint | sanity | units | report [arguments of pytest]

Each works on the copy of the sources that tests/tree.py makes, with the tools that tests/devenv.py installs.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import devenv
import needs
import tree

# Where ansible-test looks for the installer of pip before it downloads it, by the release of ansible-core: 2.19, 2.21.
PIP_INSTALLERS = ("get_pip_24_2.py", "get_pip_25_2.py")


def sources() -> pathlib.Path:
    with devenv.locked(tree.BUILD / "tree.lock"):
        return tree.copy()


def scripts(folder: pathlib.Path) -> list[str]:
    """Shell scripts: what ends in .sh, or starts with the line of a shell."""
    found = []
    for name in tree.files():
        with open(folder / name, "rb") as handle:
            first = handle.readline(64)
        if name.endswith(".sh") or (first.startswith(b"#!") and first.split()[-1].rsplit(b"/")[-1] in (b"sh", b"bash", b"dash")):
            found.append(name)
    return found


def lint(*arguments: str) -> int:
    """Runs every linter, even after one failed, so that one run shows all there is to do."""
    needs.install("test")
    folder, environment = sources(), {**devenv.environment(), "ANSIBLE_COLLECTIONS_PATH": str(tree.BUILD)}
    linters = [
        ["ruff", "check", "--no-cache", "."],
        ["yamllint", "--strict", "."],
        ["shellcheck", *scripts(folder)],
        ["antsibull-changelog", "lint"],
        ["ansible-lint", "--offline"],
    ]
    if all(shutil.which(tool) for tool in ("mmdebstrap", "unshare")):
        # The kernel module's sources, by the kernel's own tools; their Debian is made once, with the lab's cache.
        linters += [[sys.executable, "tests/kmod/build.py", "sparse"], [sys.executable, "tests/kmod/build.py", "checkpatch"]]
    else:
        print("== sparse and checkpatch are left out: they need mmdebstrap and unshare, as the lab does")
    failed = []
    for linter in linters:
        print(f"== {' '.join(linter[-2:] if linter[0] == sys.executable else linter[:2])}", flush=True)
        if subprocess.run(linter, cwd=folder, env=environment, check=False).returncode != 0:
            failed.append(linter[-1] if linter[0] == sys.executable else linter[0])
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def sanity(*arguments: str) -> int:
    """ansible-test sanity, in a home of its own, where it finds a pip without the internet and keeps what it installs."""
    needs.install("test")
    home = devenv.cache() / "ansible-test"
    installers = home / ".ansible" / "test" / "cache"
    installers.mkdir(parents=True, exist_ok=True)
    for name in PIP_INSTALLERS:
        (installers / name).write_text("import ensurepip\nensurepip.bootstrap()\n")
    given = pathlib.Path.home()
    environment = {
        **devenv.environment(),
        "HOME": str(home),
        # What the tools in it are told by the user's own home all the same.
        "GIT_CONFIG_GLOBAL": os.environ.get("GIT_CONFIG_GLOBAL", str(given / ".gitconfig")),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(given / ".cache")),
        "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", str(given / ".config")),
    }
    folder = sources()
    with devenv.locked(home / "lock"):
        return subprocess.run(["ansible-test", "sanity", "--venv", "--color", "no", *arguments], cwd=folder, env=environment, check=False).returncode


def pytest(*arguments: str) -> int:
    folder = sources()
    environment = {**devenv.environment(), "PYTHONPATH": str(tree.BUILD), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def units(*arguments: str) -> int:
    return pytest(*(arguments or ["tests/unit"]))


def report(*arguments: str) -> int:
    needs.install("test")
    return pytest(*(arguments or ["tests/report"]))


CHECKS = {"lint": lint, "sanity": sanity, "units": units, "report": report}

if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in CHECKS:
        sys.exit(__doc__)
    devenv.make()
    sys.exit(CHECKS[sys.argv[1]](*sys.argv[2:]))
