# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds the lab's disk images and keeps them in a cache that is addressed by content.

An image's key is the hash of everything it is made of (package list, recipe, files); a changed recipe is a new
key, so a stale image can't be used by mistake. An image counts as present only when its manifest says so, which
is written last: a build that was interrupted is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import devenv  # noqa: E402

SUITE = "trixie"
HOST_DISK_MIB = 8192
GUEST_DISK_MIB = 768


class LabError(Exception):
    """Something the person who runs the lab can act on; the message says what."""


def digest(*parts) -> str:
    """A short hash over strings and the contents of files and folders."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, pathlib.Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                total.update(str(file.relative_to(part.parent)).encode() + b"\0" + bytes([file.stat().st_mode >> 6 & 1]))
                total.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            total.update(str(part).encode() + b"\0")
    return total.hexdigest()[:16]


def entry(kind: str, key: str, build) -> pathlib.Path:
    """The cache folder for (kind, key), made by ``build(folder)`` if it isn't there and whole.

    Only the newest three keys of a kind are kept.
    """
    root = devenv.cache()
    folder = root / f"{kind}-{key}"
    with devenv.locked(root / f"{kind}.lock"):
        # We have the lock, so nobody builds one of this kind: these were interrupted, and what they had started went on writing.
        for stale in root.glob(f"{kind}-*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        if whole(folder):
            os.utime(folder)
            return folder
        if folder.exists():
            shutil.rmtree(folder)
        print(f"lab: building {kind} {key} (cached in {root})", flush=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=f"{kind}-{key}.", suffix=".tmp", dir=root))
        try:
            build(work)
            seal(work)
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        kept = sorted((p for p in root.glob(f"{kind}-*") if p.is_dir() and p.suffix != ".tmp"), key=lambda p: p.stat().st_mtime)
        for old in kept[:-3]:
            shutil.rmtree(old, ignore_errors=True)
        return folder


def seal(folder: pathlib.Path) -> None:
    """Writes the manifest: each file's size and time stamp, by which :func:`whole` knows damage."""
    files = {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in folder.rglob("*") if p.is_file()}
    (folder / "manifest.json").write_text(json.dumps(files, indent=1))


def whole(folder: pathlib.Path) -> bool:
    """Whether a cache folder is complete and unchanged since it was sealed."""
    try:
        files = json.loads((folder / "manifest.json").read_text())
        return all([(folder / n).stat().st_size, (folder / n).stat().st_mtime_ns] == stamp for n, stamp in files.items())
    except (OSError, ValueError):
        return False


def drop(folder: pathlib.Path) -> None:
    """Forgets a cache entry that turned out not to work."""
    shutil.rmtree(folder, ignore_errors=True)


def run(command: list, **options) -> subprocess.CompletedProcess:
    """Runs a command; its output is shown only when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False, **options)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise LabError(f"{' '.join(map(str, command[:4]))} ... ended with {done.returncode}:\n{tail}")
    return done


#: Kernel modules that a host of the lab has no use for, and those among them that it has: depmod, which DKMS calls, reads all there are,
#: and an emulated host took 33 s of its CPU for 2200.
UNUSED = ("drivers/*", "fs/*", "net/*", "sound/*")
USED = (
    "drivers/block/*", "drivers/char/hw_random/*", "drivers/crypto/ccp/*", "drivers/infiniband/[!h]*", "drivers/net/dummy*",
    "drivers/net/net_failover*", "drivers/net/t[au][pn].*", "drivers/net/veth*", "drivers/net/virtio_net*", "drivers/net/wireguard/*",
    "drivers/scsi/libiscsi.*", "drivers/scsi/s[dg]*", "drivers/scsi/scsi_*", "drivers/vhost/*", "drivers/virtio/*", "fs/autofs/*",
    "fs/binfmt_misc*", "fs/configfs/*", "fs/ext4/*", "fs/fuse/*", "fs/jbd2/*", "fs/mbcache*", "net/802/*", "net/bridge/*", "net/core/*",
    "net/ipv[46]/*", "net/llc/*", "net/netfilter/n*", "net/netfilter/x_*", "net/packet/*", "net/sched/sch_*", "net/sunrpc/*",
)  # fmt: skip


def debian_mirror() -> list:
    """The machine's own Debian mirror as an argument for mmdebstrap; nothing (the tool's default) if it can't be told."""
    try:
        text = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(REPO_URI)"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    uris = [line.split("|", 1)[1] for line in text.splitlines() if line.startswith("Debian|")]
    uris = [u for u in dict.fromkeys(uris) if "security" not in u]
    return uris[:1]


def packages(name: str) -> list:
    lines = (HERE / "image" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def tree_to_ext4(tar: pathlib.Path, image: pathlib.Path, mib: int, label: str) -> None:
    """Makes an ext4 image from a root file system's tar. An ordinary user does it with the subordinate ids they have."""
    script = (
        'set -e; PATH=$PATH:/usr/sbin:/sbin; d=$(mktemp -d); trap "rm -rf $d" EXIT; '
        'tar -C "$d" --numeric-owner $5 -xpf "$1"; truncate -s "$3M" "$2"; '
        'mke2fs -q -t ext4 -L "$4" -E root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0 -O ^metadata_csum_seed -d "$d" "$2"'
    )
    command = ["sh", "-c", script, "sh", str(tar), str(image), str(mib), label]
    if os.geteuid() != 0:
        # Device nodes, which devtmpfs makes anyway, are not for an ordinary user.
        command = ["unshare", "--map-root-user", "--map-auto", "--", *command, "--exclude=./dev/*"]
    run(command, env={**os.environ, "TMPDIR": str(image.parent)})


def mmdebstrap(target: pathlib.Path, include: list, *options, env=None, suite: str = SUITE) -> None:
    """Makes a small Debian. Packages of a release's backports are asked for as ``package/release-backports``."""
    mirror = debian_mirror()
    if suite.endswith("-backports"):
        if not mirror:
            raise LabError(f"apt-get indextargets names no mirror of Debian on this machine, from which {suite} could be taken")
        base = suite.removesuffix("-backports")
        suite, mirror = base, [f"deb {mirror[0]} {name} main" for name in (base, suite)]
    command = [
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(include)}",
        '--dpkgopt=path-exclude=/usr/share/doc/*', '--dpkgopt=path-exclude=/usr/share/man/*',
        '--dpkgopt=path-exclude=/usr/share/locale/*', '--dpkgopt=path-exclude=/usr/share/info/*',
        '--aptopt=APT::Install-Recommends "false"', *options, suite, str(target), *mirror,
    ]  # fmt: skip
    # As an ordinary user it works under another id, which has to get there: a home folder may be the user's alone.
    with tempfile.TemporaryDirectory(prefix="hecaton-debian-", dir="/var/tmp") as scratch:
        os.chmod(scratch, 0o711)
        run(command, env={**os.environ, **(env or {}), "TMPDIR": scratch})


def keys() -> pathlib.Path:
    """The lab's ssh keys, generated once a user: ``host`` (the hosts' own), ``peer`` (host to host), ``control`` (ours)."""

    def build(folder):
        for name in ("host", "peer", "control"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab-{name}", "-f", str(folder / name)])

    return entry("keys", "v1", build)


def host_image() -> pathlib.Path:
    """Folder with ``root.raw``, ``vmlinuz`` and ``initrd.img`` of a lab hypervisor."""
    lab_keys = keys()
    key = digest(SUITE, HOST_DISK_MIB, *UNUSED, "but", *USED, (lab_keys / "host.pub").read_text(), HERE / "image" / "packages.txt",
                 HERE / "image" / "customize.sh", HERE / "image" / "rootfs")  # fmt: skip

    def build(folder):
        tar = folder / "root.tar"
        hook = HERE / "image" / "customize.sh"
        with tempfile.TemporaryDirectory(prefix="hecaton-image-") as stage:
            # mmdebstrap as an ordinary user runs its hooks under another id: give it copies that it may read.
            os.chmod(stage, 0o755)
            shutil.copytree(HERE / "image", f"{stage}/image")
            shutil.copytree(lab_keys, f"{stage}/keys")
            os.chmod(f"{stage}/keys", 0o755)
            for name in os.listdir(f"{stage}/keys"):
                os.chmod(f"{stage}/keys/{name}", 0o644)
            mmdebstrap(tar, packages("packages.txt"), f"--customize-hook={stage}/image/{hook.name} \"$1\"",
                       *(f"--dpkgopt=path-exclude=/usr/lib/modules/*/kernel/{name}" for name in UNUSED),
                       *(f"--dpkgopt=path-include=/usr/lib/modules/*/kernel/{name}" for name in USED),
                       env={"LAB_HERE": f"{stage}/image", "LAB_KEYS": f"{stage}/keys"})  # fmt: skip
        tree_to_ext4(tar, folder / "root.raw", HOST_DISK_MIB, "lab")
        run(["tar", "-C", str(folder), "--strip-components=2", "--wildcards", "-xf", str(tar), "./boot/vmlinuz-*", "./boot/initrd.img-*"])
        for name in ("vmlinuz", "initrd.img"):
            next(folder.glob(f"{name}-*")).rename(folder / name)
        tar.unlink()

    return entry("host", key, build)
