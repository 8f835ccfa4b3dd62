# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the development environment of tests/requirements.txt, when it is missing, and prints its folder.

It lies outside the repository, in a folder named after what is in it: clones share it, and other requirements are
another folder. It counts as made only when its mark is there, which is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import needs

REQUIREMENTS = pathlib.Path(__file__).resolve().parent / "requirements.txt"
OLDEST, NEWEST = (3, 11), (3, 13)  # what ansible-core 2.19 runs on


def cache() -> pathlib.Path:
    """Where things are kept that are worth keeping: $HECATON_CACHE, else hecaton in the user's cache folder."""
    given = os.environ.get("HECATON_CACHE")
    folder = pathlib.Path(given) if given else pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "hecaton"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.resolve()


@contextlib.contextmanager
def locked(path: pathlib.Path):
    """Holds a lock file, so that two runs don't make the same thing at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def path() -> pathlib.Path:
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + repr(sys.version_info[:2]).encode()).hexdigest()[:16]
    return cache() / f"venv-{key}"


def usable(folder: pathlib.Path) -> bool:
    """Whether the environment is complete, and the interpreter that it was made with still exists."""
    python = folder / "bin" / "python"
    return (folder / "complete").exists() and python.exists() and subprocess.run([python, "-c", ""], check=False).returncode == 0


def make() -> pathlib.Path:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit("the development environment needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 ...")
    folder = path()
    if usable(folder):
        return folder
    needs.install("venv")
    with locked(folder.with_suffix(".lock")):
        if not usable(folder):
            print(f"making {folder}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
            pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "-qq", "--requirement", REQUIREMENTS], check=True, stdout=sys.stderr)
            (folder / "complete").touch()
    return folder


def environment() -> dict[str, str]:
    """The environment for the tools in it: they come first, then the real interpreter, and no pyenv shims.

    A shim answers for every version that pyenv knows, and fails for most; ansible-test would try them all.
    """
    real = pathlib.Path(sys.base_prefix) / "bin"
    rest = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if not entry.rstrip("/").endswith("/shims")]
    given = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    return {**given, "PATH": os.pathsep.join([str(path() / "bin"), str(real), *rest])}


if __name__ == "__main__":
    try:
        print(make())
    except subprocess.CalledProcessError as err:
        sys.exit(f"the development environment could not be made (exit status {err.returncode} of {err.cmd[0]})")
    except KeyboardInterrupt:
        sys.exit("interrupted; the next run makes it anew")
