# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compiles the kernel module, siw and the test programs for the lab's hosts, natively: python3 build.py [archives | sparse | checkpatch]

The compiler lives in a small Debian with the headers of the lab hosts' kernel, made once and kept in the lab's cache.
What is compiled is cached too, by the content of its sources.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.insert(0, str(REPO / "tests" / "lab"))

import image
from image import LabError

KMOD = REPO / "kmod-src"
SIW = "drivers/infiniband/sw/siw"
#: What the role changes in siw.
SIW_PATCHES = sorted((REPO / "roles" / "rdma" / "files").glob("siw-*.patch"))
#: How the roles have both modules made; what is made otherwise they don't take.
SIW_ARGS = ["CONFIG_RDMA_SIW=m", "CONFIG_DEBUG_INFO_BTF_MODULES="]
EXCLUDE = ["tests", "README.md"]
#: Test programs of this folder; those of kmod-src/tests come by its Makefile.
PROGRAMS = ("flags.c", "ram.c")
#: Besides the headers: what compiles modules and programs, checks sources, and the source of siw and checkpatch.
PACKAGES = ("gcc", "libc6-dev", "make", "sparse", "libibverbs-dev", "librdmacm-dev", "linux-source", "xz-utils", "perl", "python3-minimal", "kmod")
#: From linux-source: siw, which Debian doesn't build, and the kernel's own style checker.
WANTED = (SIW, "scripts/checkpatch.pl", "scripts/spelling.txt", "scripts/const_structs.checkpatch")

#: What checkpatch may say, by files. Everywhere: an operations structure that is a changed copy can't be const, and a macro
#: that makes names of its argument can't have it in brackets. compat/ is there to compare versions, and its macros stand for
#: functions with fewer arguments. In trace.h nobody writes TRACE_EVENT() as checkpatch wants it, the kernel's own files neither.
IGNORED = "LINUX_VERSION_CODE,FILE_PATH_CHANGES,CONST_STRUCT,MACRO_ARG_REUSE,MACRO_ARG_PRECEDENCE"
STYLE = {
    "$(find src include -name '*.[ch]' ! -name trace.h)": IGNORED,
    "src/trace.h": f"{IGNORED},OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT",
    "compat/compat.h": f"{IGNORED},CONSTANT_COMPARISON,MACRO_ARG_UNUSED,SPACING",
}


def kernel() -> str:
    """The release of the lab hosts' kernel, as their image's vmlinuz tells it."""
    header = (image.host_image() / "vmlinuz").read_bytes()[:65536]
    (offset,) = struct.unpack_from("<H", header, 0x20E)  # struct setup_header: kernel_version, counted from the second sector
    return header[offset + 0x200 :].split(b"\0")[0].split()[0].decode()


def debian(kind: str, what: str, include: list, wanted: tuple, *options: str, suite: str = image.SUITE) -> pathlib.Path:
    """The folder of a small Debian with these packages, and of linux-source what is wanted. Options are mmdebstrap's.

    It counts as made when its mark is there, which is written last.
    """
    key = image.digest("2", suite, *include, *wanted, *options)
    root = image.devenv.cache()
    folder = root / f"{kind}-{key}"
    with image.devenv.locked(root / f"{kind}.lock"):
        if (folder / "complete").exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        print(f"kmod: making a Debian {what} (cached in {root})", flush=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=f"{kind}-{key}.", suffix=".tmp", dir=root))
        try:
            tar = work / "root.tar"
            image.mmdebstrap(tar, include, *options, suite=suite)
            # All files are ours: an ordinary user can change and remove them without subordinate ids.
            image.run(["tar", "-C", str(work), "--no-same-owner", "--no-same-permissions", "--exclude=./dev/*", "-xf", str(tar)])
            tar.unlink()
            for name in ("null", "zero", "urandom"):
                (work / "dev" / name).touch()
            if wanted:
                inside(work, "set -e; cd /usr/src; mkdir -p wanted; tar -C wanted --strip-components=1 -xJf linux-source-*.tar.xz --wildcards "
                       + " ".join(f"'*/{name}'" for name in wanted) + "; rm linux-source-*.tar.xz")  # fmt: skip
            (work / "complete").touch()
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for old in sorted((p for p in root.glob(f"{kind}-*") if p.is_dir() and p != folder), key=lambda p: p.stat().st_mtime)[:-1]:
            shutil.rmtree(old, ignore_errors=True)
        return folder


def tree() -> pathlib.Path:
    """The folder of the small Debian with the headers of the lab hosts' kernel."""
    release = kernel()
    return debian("kmodtree", f"with the headers of {release}", [*PACKAGES, f"linux-headers-{release}"], WANTED)


def inside(root: pathlib.Path, script: str, folder: pathlib.Path | None = None, kernel_tree: pathlib.Path | None = None) -> str:
    """Runs a shell script in a small Debian, with a folder of ours at /build and one more at /kernel, and returns what it prints."""
    outer = 'r=$1; for d in null zero urandom; do mount --bind "/dev/$d" "$r/dev/$d"; done; '
    outer += 'mount -t proc proc "$r/proc" 2>/dev/null || mount --rbind /proc "$r/proc"; '
    outer += 'if [ "$3" ]; then mkdir -p "$r/build"; mount --bind "$3" "$r/build"; fi; '
    outer += 'if [ "$4" ]; then mkdir -p "$r/kernel"; mount --bind "$4" "$r/kernel"; fi; '
    outer += 'exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/ chroot "$r" sh -c "$2"'
    command = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "sh", "-ec", outer, "sh", str(root), script]
    done = subprocess.run([*command, str(folder or ""), str(kernel_tree or "")], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise LabError("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
    return done.stdout + done.stderr


def sources() -> list:
    return [KMOD / "Kbuild", KMOD / "Makefile", KMOD / "compat", KMOD / "include", KMOD / "src"]


def programs() -> list:
    return [*(HERE / name for name in PROGRAMS), KMOD / "tests" / "Makefile", *sorted((KMOD / "tests").glob("*.[ch]"))]


def stage(folder: pathlib.Path) -> None:
    """Copies the sources into a folder that the small Debian sees."""
    (folder / "kmod").mkdir()
    for part in sources():
        if part.is_dir():
            shutil.copytree(part, folder / "kmod" / part.name, ignore=shutil.ignore_patterns("*.o", "*.cmd", "*.ko", "*.mod*"))
        else:
            shutil.copy(part, folder / "kmod")
    (folder / "kmod" / "tests").mkdir()
    for path in programs():
        shutil.copy(path, folder if path.parent == HERE else folder / "kmod" / "tests")


def compile_module(root: pathlib.Path, folder: pathlib.Path, make: str, kernel_tree: pathlib.Path | None = None) -> None:
    """Compiles remote_ram.ko and the test programs into a folder; ``make`` is how modules are made for one kernel."""
    stage(folder)
    script = f"set -e; cd /build; {make} M=/build/kmod KCFLAGS=-Werror modules; strip -g kmod/remote_ram.ko; mv kmod/remote_ram.ko .; "
    for name in PROGRAMS:
        script += f"gcc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread -o {pathlib.Path(name).stem} {name}; "
    inside(root, script + "make -s -C kmod/tests programs BUILD=/build; rm -r kmod *.c", folder, kernel_tree)


def compile_siw(root: pathlib.Path, folder: pathlib.Path, make: str, fetch: str, kernel_tree: pathlib.Path | None = None) -> None:
    """Compiles siw.ko into a folder, as the role does; ``fetch`` makes its source the folder siw, ``make`` is how modules are made."""
    inside(root, f"set -e; cd /build; {fetch}", folder)
    for path in SIW_PATCHES:
        image.run(["patch", "--quiet", "--strip=1", f"--directory={folder / 'siw'}", f"--input={path}"])
    inside(root, f"set -e; cd /build; {make} M=/build/siw CONFIG_RDMA_SIW=m modules; strip -g siw/siw.ko; mv siw/siw.ko .; rm -r siw", folder, kernel_tree)


def built() -> pathlib.Path:
    """A folder with remote_ram.ko, siw.ko and the test programs."""
    root, release = tree(), kernel()
    make = f"make -s -C /lib/modules/{release}/build CONFIG_DEBUG_INFO_BTF_MODULES= -j$(nproc)"
    siw = image.entry("siw", image.digest(root.name, *SIW_PATCHES), lambda folder: compile_siw(root, folder, make, f"cp -r /usr/src/wanted/{SIW} siw"))

    def build(folder):
        compile_module(root, folder, make)
        shutil.copy(siw / "siw.ko", folder)

    return image.entry("kmod", image.digest(root.name, siw.name, *sources(), *programs()), build)


def archives() -> dict:
    """Archives of siw and remote_ram for the roles, by role variable: emulated hosts would compile for minutes.

    The collection has to be installed in build/collections.
    """
    sys.path.insert(0, str(REPO / "build" / "collections"))
    from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod_archive, _kmod_build

    root, release, compiled = tree(), kernel(), built()

    def build(folder):
        siw = _kmod_build.read_source(str(root / "usr" / "src" / "wanted" / SIW), None, [])
        siw, _there = _kmod_build.patched(siw, [path.read_text() for path in SIW_PATCHES])
        for name, files, make_args in (("siw", siw, SIW_ARGS), ("remote_ram", _kmod_build.read_source(str(KMOD), None, EXCLUDE), [])):
            what = _kmod_archive.manifest(name, files, make_args, release)
            _kmod_archive.write(str(folder / f"{name}.tar.gz"), what, {name: (compiled / f"{name}.ko").read_bytes()})

    code = [pathlib.Path(module.__file__) for module in (_kmod_archive, _kmod_build)]
    folder = image.entry("kmodarchives", image.digest(compiled.name, root.name, pathlib.Path(__file__), *code, KMOD, *SIW_PATCHES), build)
    return {"rdma_siw_built": [str(folder / "siw.tar.gz")], "remote_ram_built": [str(folder / "remote_ram.tar.gz")]}


def check(how: str) -> str:
    """What sparse, or checkpatch, says of the module's sources; nothing if they are clean."""
    root, release = tree(), kernel()
    with tempfile.TemporaryDirectory(prefix="hecaton-kmod-") as name:
        folder = pathlib.Path(name)
        stage(folder)
        if how == "sparse":
            command = f"make -s -C /lib/modules/{release}/build M=/build/kmod CONFIG_DEBUG_INFO_BTF_MODULES= C=2 CF=-D__CHECK_ENDIAN__ modules 2>&1"
            text = inside(root, command, folder)
            # What the kernel's own headers are warned of is not ours.
            return "\n".join(line for line in text.splitlines() if "/build/kmod/" in line or line.startswith(("src/", "kmod/")))
        script = "cd /build/kmod"
        for files, ignored in STYLE.items():
            script += f"; perl /usr/src/wanted/scripts/checkpatch.pl --no-tree --strict --terse --no-summary --ignore {ignored} -f {files} || true"
        return inside(root, script, folder)


def main(arguments: list) -> int:
    try:
        if not arguments:
            print(built())
            return 0
        if arguments == ["archives"]:
            print(json.dumps(archives()))
            return 0
        found = [text for text in map(check, arguments) if text.strip()]
        print("\n".join(found), end="")
        return int(bool(found))
    except LabError as err:
        print(f"kmod: {err}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
