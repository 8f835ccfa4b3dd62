# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Talks to the kernel's module tools on the host this runs on. What their answers mean is decided in ``_kmod``."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import zlib

from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod

MODULES = "/lib/modules"
SYSFS = "/sys/module"
#: The variable of the firmware that says whether Secure Boot is on; its last byte is 1 then.
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


class KmodError(Exception):
    """Something that the operator can act on; the message says what."""


def run(*command: str, check: bool = True, cwd: str | None = None) -> subprocess.CompletedProcess:
    """Runs a command.

    :raises KmodError: it is not installed, or failed (with ``check``).
    """
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", cwd=cwd, env=environment, check=False)
    except FileNotFoundError as err:
        raise KmodError(f"{command[0]} is not installed on this host ({err})") from err
    if check and done.returncode:
        raise KmodError(f"'{' '.join(command)}' failed (exit status {done.returncode}): {_kmod.tail(done.stderr or done.stdout, 10)}")
    return done


def read_text(path: str) -> str | None:
    """A file's text, None when it isn't there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def release() -> str:
    return os.uname().release


def headers(kernel: str) -> str:
    """The folder of a kernel's headers.

    :raises KmodError: they are missing; the message says what to install.
    """
    folder = os.path.join(MODULES, kernel, "build")
    if os.path.exists(os.path.join(folder, "Makefile")):
        found = (read_text(os.path.join(folder, "include/config/kernel.release")) or kernel).strip()
        if found != kernel:
            raise KmodError(f"the headers in {folder} are those of kernel {found}, not of {kernel}; install the headers of {kernel}")
        return folder
    if not os.path.isdir(os.path.join(MODULES, kernel)):
        raise KmodError(f"kernel {kernel} is not installed on this host: there is no {MODULES}/{kernel}")
    package = f"kernel-devel-{kernel}" if os.path.exists("/etc/redhat-release") else f"linux-headers-{kernel}"
    raise KmodError(f"the headers of kernel {kernel} are missing; install the package {package}, or start the host with a kernel whose headers are installed")


def read_module(path: str) -> bytes:
    """A module's content, unpacked."""
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        if path.endswith(".xz"):
            return lzma.decompress(content)
        if path.endswith(".gz"):
            return gzip.decompress(content)
        if path.endswith(".zst"):
            return subprocess.run(["zstd", "-dcq", path], stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile, subprocess.CalledProcessError) as err:
        raise KmodError(f"{path} is damaged ({err}); install again what it belongs to") from err
    return content


def find(name: str, kernel: str) -> str | None:
    """The file that ``modprobe`` takes for a module; None when there is none, empty for one that is built into the kernel."""
    done = run("modinfo", "-k", kernel, "-F", "filename", name, check=False)
    if done.returncode:
        return None
    path = done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    return "" if path == "(builtin)" else path


def info(path: str, field: str) -> str:
    """One field of a module's description."""
    return run("modinfo", "-F", field, path).stdout.strip()


def loaded(name: str) -> bool:
    """Whether a module is in the running kernel, or built into it with something to show in sysfs."""
    return os.path.isdir(os.path.join(SYSFS, name.replace("-", "_")))


def removable(name: str) -> bool:
    """Whether a loaded module is one that can be unloaded at all, not built into the kernel."""
    return os.path.exists(os.path.join(SYSFS, name.replace("-", "_"), "initstate"))


def users(name: str) -> tuple[int, list[str]]:
    """How often a loaded module is in use, and by which modules."""
    folder = os.path.join(SYSFS, name.replace("-", "_"))
    count = int((read_text(os.path.join(folder, "refcnt")) or "0").strip())
    holders = os.path.join(folder, "holders")
    return count, sorted(os.listdir(holders)) if os.path.isdir(holders) else []


def parameters(name: str) -> dict:
    """The parameters of a loaded module that can be read, as ``{name: text}``."""
    folder = os.path.join(SYSFS, name.replace("-", "_"), "parameters")
    found = {}
    for key in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        try:
            found[key] = (read_text(os.path.join(folder, key)) or "").rstrip("\n")
        except OSError:
            continue  # write-only
    return found


def loaded_build_id(name: str) -> str | None:
    """The build id of the module in the running kernel."""
    try:
        with open(os.path.join(SYSFS, name.replace("-", "_"), "notes", ".note.gnu.build-id"), "rb") as stream:
            return _kmod.build_id(stream.read())
    except OSError:
        return None


def secure_boot() -> bool:
    try:
        with open(SECURE_BOOT, "rb") as stream:
            return stream.read()[-1:] == b"\x01"
    except OSError:
        return False


def check(path: str, kernel: str, name: str, beside: list | tuple = ()) -> dict:
    """Compares what a module was built with and what a kernel has.

    What the running kernel's own symbols are can't be asked. Modules that came with the kernel, and those that it has loaded,
    were accepted by it, though: what they were built with, and what they export, is what the kernel has. That also finds a
    driver that another package replaced, such as one of OFED.

    :param beside: files of modules that were built together with it, which it may depend on and which are not installed yet.
    :returns: ``vermagic``, ``symbols`` (how many were compared with the headers) and ``confirmed`` (with installed modules).
    :raises KmodError: it does not fit and must not be loaded.
    """
    vermagic = info(path, "vermagic")
    wanted = _kmod.parse_versions(run("modprobe", "--dump-modversions", path, check=False).stdout)
    promised = _kmod.parse_symvers(read_text(os.path.join(MODULES, kernel, "build", "Module.symvers")) or "")
    known, kernel_vermagic = _installed(kernel, set(wanted), info(path, "depends").split(","))
    if kernel_vermagic is None:
        raise KmodError(f"kernel {kernel} has no modules of its own in {MODULES}/{kernel}, so nothing can be compared with them")
    exported: dict = {}
    for other in beside:
        exported.update(_kmod.parse_versions(run("modprobe", "--show-exports", other, check=False).stdout))
    problems = _kmod.misfits(name, vermagic, kernel_vermagic, wanted, promised, {**known, **exported})
    if problems:
        raise KmodError(f"{path} does not fit kernel {kernel} and must not be loaded: {'; '.join(problems)}")
    return {"vermagic": vermagic, "symbols": len(set(wanted) & set(promised)), "confirmed": len(set(wanted) & set(known))}


def _installed(kernel: str, symbols: set, depends: list) -> tuple[dict, str | None]:
    """``{symbol: CRC}`` as the kernel's installed modules have them, until all are found; and the kernel's own vermagic."""
    folder = os.path.join(MODULES, kernel)
    files = {}
    for line in (read_text(os.path.join(folder, "modules.dep")) or "").splitlines():
        path = line.split(":", 1)[0]
        files.setdefault(os.path.basename(path).split(".ko", 1)[0].replace("-", "_"), os.path.join(folder, path))
    own = next((path for path in files.values() if f"{folder}/kernel/" in path), None)
    names = [name.replace("-", "_") for name in depends if name]
    present = sorted(os.listdir(SYSFS)) if kernel == release() else []
    known: dict = {}
    for name in [*names, *(name for name in present if name not in names)]:
        if name not in files or (name not in names and symbols <= set(known)):
            continue
        if name in names:
            for symbol, crc in _kmod.parse_versions(run("modprobe", "--show-exports", files[name], check=False).stdout).items():
                known.setdefault(symbol, crc)
        elif f"{folder}/kernel/" not in files[name]:
            continue  # built on this host as well: no witness
        for symbol, crc in _kmod.parse_versions(run("modprobe", "--dump-modversions", files[name], check=False).stdout).items():
            known.setdefault(symbol, crc)
    return known, info(own, "vermagic") if own else None
