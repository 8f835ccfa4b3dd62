# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Archives of modules that were built before: built once, taken by each host that has the same kernel.

An archive is a tar file with a ``manifest.json``, which says of what source and for what kernel the modules are, and the
modules themselves, plain and without a signature: each host signs them with its own key.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod
from ansible_collections.hecaton.fleet.plugins.module_utils._kmod_host import KmodError

MANIFEST = "manifest.json"


def manifest(name: str, files: dict, make_args: list, kernel: str) -> dict:
    """What an archive has to be of to be taken.

    :param files: the source, as of ``_kmod_build.read_source``, patched.
    :param make_args: arguments for ``make``.
    """
    return {"name": name, "source": _kmod.source_hash(files, {"make_args": list(make_args)}), "kernel": kernel}


def write(path: str, what: dict, modules: dict) -> None:
    """Writes an archive, at once or not at all.

    :param what: as of ``manifest``.
    :param modules: ``{name: content}``, ELF files.
    """
    hashes = {module: hashlib.sha256(content).hexdigest() for module, content in modules.items()}
    parts = {MANIFEST: json.dumps({**what, "modules": hashes}, indent=1, sort_keys=True).encode(), **{f"{name}.ko": modules[name] for name in sorted(modules)}}
    temporary = f"{path}.new"
    try:
        with tarfile.open(temporary, "w:gz") as archive:
            for name, content in parts.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read(path: str) -> tuple[dict, dict]:
    """The manifest of an archive, and its modules, ``{name: content}``.

    :raises KmodError: it is no such archive, or not whole.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            parts = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
        what = json.loads(parts[MANIFEST])
        modules = {name: parts[f"{name}.ko"] for name in what["modules"]}
        damaged = [name for name in modules if hashlib.sha256(modules[name]).hexdigest() != what["modules"][name]]
    except (tarfile.TarError, EOFError, OSError, KeyError, TypeError, ValueError) as err:
        raise KmodError(f"{path} is no archive of kernel modules that kmod_build wrote: {err!r}") from err
    if damaged:
        raise KmodError(f"{path} is damaged: {', '.join(damaged)} is not what its manifest says; write it again with kmod_build's option archive")
    return what, modules


def fitting(paths: list, wanted: dict, modules: list) -> tuple[dict | None, list[str]]:
    """The modules, ``{name: content}``, of the first archive that fits, or None, and why each one before it does not.

    :param wanted: as of ``manifest``.
    :param modules: names of the modules that it has to have.
    """
    reasons = []
    for path in paths:
        what, found = read(path)
        for key, text in (("name", "it is of {0}, not of {1}"), ("kernel", "it is for kernel {0}, not {1}"), ("source", "it was built from another source")):
            if what.get(key) != wanted[key]:
                reasons.append(text.format(what.get(key), wanted[key]))
                break
        else:
            missing = [module for module in modules if module not in found]
            if not missing:
                return {module: found[module] for module in modules}, reasons
            reasons.append(f"it has no {', '.join(missing)}")
    return None, reasons
