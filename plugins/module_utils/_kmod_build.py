# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Builds a kernel module and installs it, with DKMS or with plain Kbuild.

Each way is a class with the same methods: ``installed`` says what is there, ``build`` makes a module beside what is there
(of its source, or of modules that were built before), ``install`` puts it in place, ``forget`` drops a build that failed, ``remove`` leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
import tempfile

from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod, _kmod_host
from ansible_collections.hecaton.fleet.plugins.module_utils._kmod_host import MODULES, KmodError, run

SOURCES = "/usr/src"
DKMS_STATE = "/var/lib/dkms"
DKMS_CONF = "/etc/dkms/framework.conf.d"


class BuildError(KmodError):
    """The compiler, or what drives it, failed; ``log`` is the end of what it wrote."""

    def __init__(self, message: str, log: str):
        super().__init__(message)
        self.log = log


# ---- the source


def read_source(src: str, path: str | None, exclude: list) -> dict:
    """The files of a source, ``{path: (is executable, content)}``.

    :param src: a folder, or a tar archive.
    :param path: the folder in ``src`` that is meant; in an archive, below its topmost folder if it has one.
    :raises KmodError: there is nothing there.
    """
    if not os.path.exists(src):
        raise KmodError(f"there is no {src}")
    if os.path.isdir(src):
        folder = os.path.join(src, path) if path else src
        if not os.path.isdir(folder):
            raise KmodError(f"there is no folder {folder}")
        files = {}
        for root, folders, names in os.walk(folder):
            folders.sort()
            for name in names:
                full = os.path.join(root, name)
                relative = os.path.relpath(full, folder)
                if os.path.isfile(full) and _kmod.is_source(relative, exclude):
                    with open(full, "rb") as stream:
                        files[relative] = (os.access(full, os.X_OK), stream.read())
    else:
        files = _from_archive(src, path, exclude)
    if not any(os.path.basename(name) in ("Kbuild", "Makefile") for name in files):
        raise KmodError(f"{src}{' has no ' + path if path else ''} is no source of a kernel module: it has neither a Kbuild file nor a Makefile")
    return files


def patched(files: dict, patches: list) -> tuple[dict, list[int]]:
    """A source with patches applied in order, and the numbers, from 1 on, of those that it had already.

    :param files: as of ``read_source``.
    :param patches: texts of unified diffs, for ``patch -p1``.
    :raises KmodError: one does not fit, or there is no patch on the host.
    """
    if not patches:
        return files, []
    there = []
    with tempfile.TemporaryDirectory(prefix="hecaton-kmod-") as folder:
        tree = os.path.join(folder, "tree")
        write_source(files, tree)
        for number, text in enumerate(patches, 1):
            diff = os.path.join(folder, "diff")
            with open(diff, "w", encoding="utf-8") as out:
                out.write(text if text.endswith("\n") else f"{text}\n")
            command = ["patch", "--strip=1", "--batch", "--no-backup-if-mismatch", "--reject-file=-", f"--directory={tree}", f"--input={diff}"]
            # First whether it fits as a whole: one that does not is not to leave half of itself.
            tried = run(*command, "--forward", "--dry-run", check=False)
            if not tried.returncode:
                run(*command, "--forward")
            elif not run(*command, "--reverse", "--dry-run", check=False).returncode:
                there.append(number)
            else:
                raise KmodError(f"number {number} of the patches does not fit the source: {_kmod.tail(tried.stdout or tried.stderr, 10)}")
        return read_source(tree, None, []), there


def _from_archive(src: str, path: str | None, exclude: list) -> dict:
    files = {}
    try:
        # As a stream, and left as soon as the folder is over: a kernel's source takes long to unpack.
        with tarfile.open(src, "r|*") as archive:
            for member in archive:
                name = os.path.normpath(member.name)
                if path:
                    found, name = f"/{name}".partition(f"/{path.strip('/')}/")[1:]
                    if not found:
                        if files:
                            break
                        continue
                if member.isfile() and _kmod.is_source(name, exclude):
                    files[name] = (bool(member.mode & 0o100), archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError) as err:
        raise KmodError(f"{src} can't be read as an archive: {err}") from err
    if not files:
        raise KmodError(f"{src} has no files" + (f" in {path}" if path else ""))
    return files


def write_source(files: dict, folder: str) -> None:
    for name, (executable, content) in files.items():
        full = os.path.join(folder, name)
        os.makedirs(os.path.dirname(full), mode=0o755, exist_ok=True)
        with open(full, "wb") as out:
            out.write(content)
        os.chmod(full, 0o755 if executable else 0o644)


def write_modules(modules: dict, folder: str) -> list[str]:
    """Writes modules, ``{name: content}``, and returns their paths."""
    paths = []
    for name, content in modules.items():
        paths.append(os.path.join(folder, f"{name}.ko"))
        with open(paths[-1], "wb") as out:
            out.write(content)
    return paths


def plain(path: str) -> bytes:
    """A module's content, unpacked, without a signature and without what a debugger wants."""
    with tempfile.TemporaryDirectory(prefix="hecaton-kmod-") as folder:
        (copy,) = write_modules({"module": _kmod_host.read_module(path)}, folder)
        # Makes the file anew, of what is in its sections; a signature is behind them.
        run("strip", "--strip-debug", copy)
        return _kmod_host.read_module(copy)


# ---- what both ways do


class Builder:
    """What is the same for DKMS and Kbuild.

    :param wanted: ``name``, ``version`` (without the hash), ``modules``, ``make_args``, ``kernels``, ``sign_key``, ``sign_cert``.
    """

    def __init__(self, wanted: dict):
        self.wanted = wanted
        self.name = wanted["name"]

    def refuse_kernel(self, conf: str | None, kernel: str) -> None:
        """:raises KmodError: the source says that it is not for this kernel."""
        pattern = self.wanted["kernels"] or _kmod.dkms_setting(conf or "", "BUILD_EXCLUSIVE_KERNEL")
        try:
            fits = not pattern or re.search(pattern, kernel)
        except re.error as err:
            raise KmodError(f"{pattern!r}, which says what kernels {self.name} is for, is no regular expression: {err}") from err
        if not fits:
            raise KmodError(f"{self.name} {self.wanted['version']} can't be built for kernel {kernel}: it is for kernels that match {pattern}")


class Dkms(Builder):
    """DKMS builds the module, and builds it again for each kernel that is installed later."""

    method = "dkms"

    def status(self) -> list[dict]:
        return [row for row in _kmod.parse_dkms_status(run("dkms", "status", "-m", self.name, check=False).stdout) if row["name"] == self.name]

    def version(self, source: str) -> str:
        return _kmod.dkms_version(self.wanted["version"], source)

    def installed(self, source: str, kernel: str) -> dict | None:
        """The modules of this source that are in place for a kernel, ``{name: path}``; None when there are none."""
        rows = [row for row in self.status() if (row["version"], row["kernel"], row["state"]) == (self.version(source), kernel, "installed")]
        if not rows or any(row["note"] for row in rows) or not self._signing_is_set():
            return None
        found = {module: _kmod_host.find(module, kernel) for module in self.wanted["modules"]}
        return found if all(path and f"{MODULES}/{kernel}/" in os.path.realpath(path) for path in found.values()) else None

    def _signing(self) -> tuple[str, str | None]:
        text = None
        if self.wanted["sign_key"]:
            text = f"# Written by hecaton.fleet.kmod_build.\nmok_signing_key=\"{self.wanted['sign_key']}\"\nmok_certificate=\"{self.wanted['sign_cert']}\"\n"
        return os.path.join(DKMS_CONF, f"hecaton-{self.name}.conf"), text

    def _signing_is_set(self) -> bool:
        path, text = self._signing()
        return _kmod_host.read_text(path) == text

    def _set_signing(self) -> None:
        path, text = self._signing()
        if text is None:
            _remove_file(path)
        else:
            os.makedirs(DKMS_CONF, mode=0o755, exist_ok=True)
            with open(path, "w") as out:
                out.write(text)

    def build(self, files: dict, source: str, kernel: str, before: dict | None = None) -> dict:
        version = self.version(source)
        given = files["dkms.conf"][1].decode(errors="replace") if "dkms.conf" in files else None
        self.refuse_kernel(given, kernel)
        self._set_signing()
        folder = os.path.join(SOURCES, f"{self.name}-{version}")
        rows = [row for row in self.status() if row["version"] == version]
        if not rows:
            shutil.rmtree(folder, ignore_errors=True)
            conf = _kmod.dkms_conf(given, self.name, version, self.wanted["modules"], self.wanted["make_args"], self.wanted["kernels"])
            write_source({**files, "dkms.conf": (False, conf.encode())}, folder)
            run("dkms", "add", "-m", self.name, "-v", version)
        elif any(row["kernel"] == kernel for row in rows):
            # In place but not as it should be: made anew.
            run("dkms", "unbuild", "-m", self.name, "-v", version, "-k", kernel)
        if not before:
            return self._build(version, kernel)
        with tempfile.TemporaryDirectory(prefix=f"hecaton-{self.name}-") as folder:
            copies = [_kmod.shell_quote(path) for path in write_modules(before, folder)]
            # In place of the compiler, this once. All else is as with a build: DKMS signs, packs and installs, and later kernels are built for.
            return self._build(version, kernel, f"--directive=MAKE=cp {' '.join(copies)} .", "--directive=CLEAN=true")

    def _build(self, version: str, kernel: str, *directives: str) -> dict:
        done = run("dkms", "build", "-m", self.name, "-v", version, "-k", kernel, *directives, check=False)
        if done.returncode:
            log = _kmod_host.read_text(os.path.join(DKMS_STATE, self.name, version, "build", "make.log")) or done.stdout + done.stderr
            raise BuildError(f"{self.name} {version} could not be built for kernel {kernel} (dkms build ended with {done.returncode})", _kmod.tail(log))
        folder = os.path.join(DKMS_STATE, self.name, version, kernel)
        found = {}
        for root, folders, names in os.walk(folder):
            if os.path.basename(root) == "module":
                found.update({name.split(".ko", 1)[0]: os.path.join(root, name) for name in names if ".ko" in name})
        missing = [module for module in self.wanted["modules"] if module not in found]
        if missing:
            raise KmodError(f"the build of {self.name} made no {', '.join(missing)}.ko; its dkms.conf names {', '.join(sorted(found)) or 'nothing'}")
        return {module: found[module] for module in self.wanted["modules"]}

    def install(self, built: dict, source: str, kernel: str) -> list[str]:
        """Puts the build in place of the one before. Returns warnings."""
        version, warnings = self.version(source), []
        run("dkms", "install", "--force", "-m", self.name, "-v", version, "-k", kernel)
        others = [row for row in self.status() if row["version"] != version]
        for row in others:
            if row["kernel"] not in (None, kernel) and row["state"] == "installed":
                # Another kernel has the source before: it is to have this one as well.
                try:
                    _kmod_host.headers(row["kernel"])
                    self._build(version, row["kernel"])
                    run("dkms", "install", "--force", "-m", self.name, "-v", version, "-k", row["kernel"])
                except KmodError as err:
                    warnings.append(f"{self.name} is no longer there for kernel {row['kernel']}: {err}")
        for old in sorted({row["version"] for row in others}):
            self._remove(old)
        return warnings

    def forget(self, source: str, kernel: str) -> None:
        """Drops a build that failed or does not fit; what was in place before stays."""
        version = self.version(source)
        rows = [row for row in self.status() if row["version"] == version]
        if any(row["kernel"] == kernel for row in rows):
            run("dkms", "unbuild", "-m", self.name, "-v", version, "-k", kernel, check=False)
        if not any(row["kernel"] not in (None, kernel) for row in rows):
            self._remove(version)

    def _remove(self, version: str) -> None:
        done = run("dkms", "remove", "-m", self.name, "-v", version, "--all", check=False)
        left = [row for row in self.status() if row["version"] == version]
        if left:
            raise KmodError(f"dkms could not remove {self.name} {version}: {_kmod.tail(done.stderr or done.stdout, 5)}")
        shutil.rmtree(os.path.join(SOURCES, f"{self.name}-{version}"), ignore_errors=True)

    def present(self) -> list[str]:
        """What there is of this module, for people: versions and files."""
        found = sorted({f"dkms {row['name']}/{row['version']}" for row in self.status()})
        return found + [path for path in (self._signing()[0],) if os.path.exists(path)]

    def remove(self) -> None:
        for version in sorted({row["version"] for row in self.status()}):
            self._remove(version)
        _remove_file(self._signing()[0])


class Kbuild(Builder):
    """The kernel's own build system. A kernel that is installed later has to be built for by running the module again."""

    method = "kbuild"
    #: The end of what the compiler wrote.
    log = ""

    def folder(self, kernel: str) -> str:
        return os.path.join(MODULES, kernel, "updates", "hecaton", self.name)

    def installed(self, source: str, kernel: str) -> dict | None:
        found = {module: os.path.join(self.folder(kernel), f"{module}.ko") for module in self.wanted["modules"]}
        mark = _kmod_host.read_text(os.path.join(self.folder(kernel), "made-of"))
        try:
            return found if mark == self._mark(source, found) else None
        except FileNotFoundError:
            return None

    @staticmethod
    def _mark(source: str, modules: dict) -> str:
        lines = [f"source {source}"]
        for module in sorted(modules):
            with open(modules[module], "rb") as stream:
                lines.append(f"{module} {hashlib.sha256(stream.read()).hexdigest()}")
        return "\n".join(lines) + "\n"

    def build(self, files: dict, source: str, kernel: str, before: dict | None = None) -> dict:
        given = files["dkms.conf"][1].decode(errors="replace") if "dkms.conf" in files else None
        self.refuse_kernel(given, kernel)
        headers = _kmod_host.headers(kernel)
        self.work = tempfile.mkdtemp(prefix=f"hecaton-{self.name}-")
        if before:
            write_modules(before, self.work)
        else:
            self._make(files, headers, kernel)
        built = {}
        for root, folders, names in os.walk(self.work):
            built.update({name[:-3]: os.path.join(root, name) for name in names if name.endswith(".ko")})
        missing = [module for module in self.wanted["modules"] if module not in built]
        if missing:
            raise BuildError(f"the build of {self.name} made no {', '.join(missing)}.ko, but {', '.join(sorted(built)) or 'nothing'}", self.log)
        built = {module: built[module] for module in self.wanted["modules"]}
        for path in built.values():
            run("strip", "--strip-debug", path)
            if self.wanted["sign_key"]:
                signer = os.path.join(headers, "scripts", "sign-file")
                if not os.path.exists(signer):
                    raise KmodError(f"{signer} is missing, so {self.name} can't be signed; install the whole headers of kernel {kernel}")
                run(signer, "sha256", self.wanted["sign_key"], self.wanted["sign_cert"], path)
        return built

    def _make(self, files: dict, headers: str, kernel: str) -> None:
        write_source(files, self.work)
        done = run("make", "-C", headers, f"M={self.work}", f"-j{os.cpu_count() or 1}", *self.wanted["make_args"], "modules", check=False)
        self.log = _kmod.tail(done.stdout + done.stderr)
        if done.returncode:
            raise BuildError(f"{self.name} could not be built for kernel {kernel} (make ended with {done.returncode})", self.log)

    def install(self, built: dict, source: str, kernel: str) -> list[str]:
        folder = self.folder(kernel)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, mode=0o755)
        placed = {}
        for module, path in built.items():
            placed[module] = shutil.copyfile(path, os.path.join(folder, f"{module}.ko"))
        with open(os.path.join(folder, "made-of"), "w") as out:
            out.write(self._mark(source, placed))
        run("depmod", "-a", kernel)
        self.forget(source, kernel)
        return []

    def forget(self, source: str, kernel: str) -> None:
        if getattr(self, "work", None):
            shutil.rmtree(self.work, ignore_errors=True)

    def present(self) -> list[str]:
        kernels = os.listdir(MODULES) if os.path.isdir(MODULES) else []
        return [self.folder(kernel) for kernel in sorted(kernels) if os.path.isdir(self.folder(kernel))]

    @contextlib.contextmanager
    def aside(self, kernel: str):
        """The build for this kernel is out of the way meanwhile, and gone afterwards; it is back when what was done meanwhile fails.

        DKMS keeps files that have the names of its own, and puts them back when its own go.
        """
        folder = self.folder(kernel)
        if not os.path.isdir(folder):
            yield
            return
        with tempfile.TemporaryDirectory(prefix=f"hecaton-{self.name}-") as work:
            kept = shutil.move(folder, work)
            try:
                yield
            except BaseException:
                shutil.move(kept, folder)
                run("depmod", "-a", kernel)
                raise
        self._leave(folder)

    @staticmethod
    def _leave(folder: str) -> None:
        """Removes what was made above the folder, if nothing else is there."""
        parent = os.path.dirname(folder)
        while os.path.basename(parent) in ("hecaton", "updates") and not os.listdir(parent):
            os.rmdir(parent)
            parent = os.path.dirname(parent)

    def remove(self) -> None:
        for folder in self.present():
            shutil.rmtree(folder)
            self._leave(folder)
            kernel = os.path.relpath(folder, MODULES).split(os.sep)[0]
            if os.path.exists(os.path.join(MODULES, kernel, "modules.order")):
                run("depmod", "-a", kernel)


def _remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
