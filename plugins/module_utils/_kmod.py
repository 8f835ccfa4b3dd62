# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""What is decided about kernel modules: what their source is, whether one fits a kernel, what has to be done.

Pure functions over text and bytes. ``_kmod_host`` reads the files and runs the commands.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re

# What a build leaves behind. It is no part of a source.
_PRODUCTS = ("*.o", "*.ko", "*.a", "*.mod", "*.mod.c", "*.cmd", "*.symvers", "*.order", ".tmp_*", "*.dwo", ".git", "*~", "*.rej", "*.orig")

#: Notes of this kind hold the build id: owner "GNU" (4 bytes), 20 bytes of SHA-1, type 3.
_BUILD_ID = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"

#: Under this mark a signature is appended to a module.
SIGNED = b"~Module signature appended~\n"


def is_source(path: str, exclude: list | tuple = ()) -> bool:
    """Whether a file belongs to a module's source.

    :param path: relative to the source's folder, with slashes.
    :param exclude: patterns of the shell; one that has no slash is matched with each part of the path.
    """
    parts = path.split("/")
    if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in _PRODUCTS):
        return False
    for pattern in exclude:
        pattern = pattern.rstrip("/")
        if fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern + "/"):
            return False
        if "/" not in pattern and any(fnmatch.fnmatchcase(part, pattern) for part in parts):
            return False
    return True


def source_hash(files: dict, recipe: dict) -> str:
    """A hash over what a module is built from.

    :param files: ``{path: (is executable, content)}``.
    :param recipe: what else the build depends on; anything whose ``repr`` is stable.
    """
    total = hashlib.sha256(repr(sorted(recipe.items())).encode())
    for path in sorted(files):
        executable, content = files[path]
        total.update(f"\0{path}\0{int(bool(executable))}\0".encode() + hashlib.sha256(content).digest())
    return total.hexdigest()


# ---- DKMS


def dkms_version(version: str, source: str) -> str:
    """The version under which DKMS knows a source: another source is another version, so that the one before can stay
    until the new one is built."""
    return f"{version}.h{source[:12]}"


def dkms_setting(conf: str, name: str) -> str | None:
    """What a ``dkms.conf`` sets a variable to; None when it doesn't."""
    found = re.findall(rf"^[ \t]*{re.escape(name)}=(.*)$", conf, re.MULTILINE)
    if not found:
        return None
    value = found[-1].strip()
    if value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1:
        return value[1:-1]
    return value


def dkms_conf(given: str | None, name: str, version: str, modules: list, make_args: list, kernels: str | None) -> str:
    """A ``dkms.conf`` for this version: the source's own with its version replaced, or one made here.

    :param given: the source's own, None when it has none.
    :param modules: names of the modules that the build makes.
    :param make_args: arguments for ``make``, such as ``CONFIG_RDMA_SIW=m``.
    :param kernels: extended regular expression of the kernel releases that DKMS may build it for.
    """
    identity = {"PACKAGE_NAME": name, "PACKAGE_VERSION": version}
    if given is not None:
        kept = [line for line in given.splitlines() if not re.match(r"[ \t]*(PACKAGE_NAME|PACKAGE_VERSION)=", line)]
        return "\n".join([f'{key}="{value}"' for key, value in identity.items()] + kept) + "\n"
    arguments = " ".join(shell_quote(argument) for argument in make_args)
    lines = [f'{key}="{value}"' for key, value in identity.items()]
    for number, module in enumerate(modules):
        lines += [f'BUILT_MODULE_NAME[{number}]="{module}"', f'DEST_MODULE_LOCATION[{number}]="/updates/dkms"']
    lines += [
        f'MAKE[0]="make -C $kernel_source_dir M=$dkms_tree/$PACKAGE_NAME/$PACKAGE_VERSION/build {arguments} modules"',
        f'CLEAN="make -C $kernel_source_dir M=$dkms_tree/$PACKAGE_NAME/$PACKAGE_VERSION/build {arguments} clean"',
        'AUTOINSTALL="yes"',
    ]
    if kernels:
        lines.append(f'BUILD_EXCLUSIVE_KERNEL="{kernels}"')
    return "\n".join(lines) + "\n"


def shell_quote(text: str) -> str:
    """``text`` for a command inside a pair of double quotes of a ``dkms.conf``."""
    return text if re.fullmatch(r"[\w@%+=:,./-]*", text) else "'" + text.replace("'", "'\\''") + "'"


def parse_dkms_status(text: str) -> list[dict]:
    """``dkms status`` as ``{name, version, kernel, state, note}``; ``kernel`` is None for what is only added.

    ``state`` is ``added``, ``built`` or ``installed``. ``note`` is what DKMS warns of, such as a file that isn't the one it made.
    """
    found = []
    for line in text.splitlines():
        # "siw/6.12.h0123, 6.12.117+deb13-amd64, x86_64: installed (WARNING! ...)", before DKMS 3: "siw, 6.12, ..."
        matched = re.match(r"([^,/: ]+)(?:/|, )([^,: ]+)(?:, ([^, ]+), [^,: ]+)?: (added|built|installed)(?: \((.*)\))?", line)
        if matched:
            found.append(dict(zip(("name", "version", "kernel", "state", "note"), matched.groups())))
    return found


# ---- whether a module fits a kernel


def parse_versions(text: str) -> dict:
    """``modprobe --dump-modversions`` and ``--show-exports`` as ``{symbol: CRC}``."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 2 and fields[0].startswith("0x"):
            found[fields[1]] = int(fields[0], 16)
    return found


def parse_symvers(text: str) -> dict:
    """``Module.symvers`` as ``{symbol: CRC}``."""
    found = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) >= 3 and fields[0].startswith("0x"):
            found[fields[1]] = int(fields[0], 16)
    return found


def misfits(module: str, vermagic: str, kernel_vermagic: str, wanted: dict, headers: dict, kernel: dict) -> list[str]:
    """Why a module must not be loaded into a kernel; empty when it fits.

    :param module: its name, for the messages.
    :param vermagic: of the module.
    :param kernel_vermagic: of a module that came with the kernel.
    :param wanted: symbols that the module was built with, ``{symbol: CRC}``.
    :param headers: symbols that the kernel's headers promise (``Module.symvers``); empty when not known.
    :param kernel: symbols as the kernel's installed modules have them, which need not be all.
    """
    found = []
    if vermagic.split() != kernel_vermagic.split():
        found.append(f"{module} is built for '{vermagic.strip()}', and the kernel is '{kernel_vermagic.strip()}'")
    if "modversions" in kernel_vermagic.split() and not wanted:
        found.append(f"{module} has no symbol versions, and the kernel asks for them; was it built without the Module.symvers of its headers?")
    for source, known in (("its headers", headers), ("its installed modules", kernel)):
        differing = sorted(name for name, crc in wanted.items() if name in known and known[name] != crc)
        if differing:
            shown = ", ".join(f"{name} ({wanted[name]:#010x}, {known[name]:#010x} there)" for name in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            found.append(f"{module} was built with other versions of symbols than the kernel has, according to {source}: {shown}{more}")
    if headers:
        missing = sorted(set(wanted) - set(headers) - set(kernel))
        if missing:
            found.append(f"{module} needs symbols that the kernel does not have: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return found


def build_id(content: bytes) -> str | None:
    """The build id in a module or in a note of sysfs, as hexadecimal digits; None when there is none."""
    start = content.find(_BUILD_ID)
    if start < 0:
        return None
    start += len(_BUILD_ID)
    return content[start:start + 20].hex()


# ---- loading


def same_value(given: object, shown: str) -> bool:
    """Whether a parameter that was given is the one that the kernel shows: 1, yes and Y are one, and so are 16 and 0x10."""
    return _plain(given) == _plain(shown)


def _plain(value: object) -> object:
    text = str(value).strip()
    if text.lower() in ("y", "yes", "true", "on"):
        return 1
    if text.lower() in ("n", "no", "false", "off"):
        return 0
    try:
        return int(text, 0)
    except ValueError:
        return text


def parameter_text(value: object) -> str:
    """A parameter as the kernel takes it."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, (list, tuple)):
        return ",".join(parameter_text(each) for each in value)
    return str(value)


def bad_parameters(parameters: dict) -> str | None:
    """What is wrong with parameters that would become words of a file; None when nothing is."""
    for key, value in parameters.items():
        if not re.fullmatch(r"\w+", key):
            return f"'{key}' is not a name of a parameter"
        if re.search(r"[\s\"'#\\]", parameter_text(value)):
            return f"the parameter {key} must not have white space, quotes, '#' or a backslash in it"
    return None


def options_file(name: str, parameters: dict) -> str | None:
    """What ``/etc/modprobe.d`` is told about a module; None when there is nothing to tell."""
    if not parameters:
        return None
    words = " ".join(f"{key}={parameter_text(value)}" for key, value in sorted(parameters.items()))
    return f"# Written by hecaton.fleet.kmod.\noptions {name} {words}\n"


def load_file(name: str) -> str:
    """What ``/etc/modules-load.d`` is told, so that the module is loaded when the host starts."""
    return f"# Written by hecaton.fleet.kmod.\n{name}\n"


def refusal(name: str, path: str, said: str, log: str, secure_boot: bool, signer: str | None) -> str:
    """Why the kernel didn't take a module, and what to do.

    :param said: what ``modprobe`` said.
    :param log: the end of the kernel's log.
    :param secure_boot: whether the host was started with Secure Boot.
    :param signer: who signed the module, None when nobody did.
    """
    text = f"{said}\n{log}".lower()
    signs = ("key was rejected", "required key not available", "lockdown", "module verification failed", "loading of unsigned module")
    unsigned = any(sign in text for sign in signs)
    if unsigned or (secure_boot and "operation not permitted" in text):
        who = f"it is signed by '{signer}', whose key the kernel does not trust" if signer else "it is not signed"
        return (
            f"the kernel refuses {name} ({path}) because of {'Secure Boot' if secure_boot else 'its rule for signatures'}: {who}. Build it with sign_key and "
            f"sign_cert, enrol the certificate on this host (mokutil --import CERTIFICATE, then confirm it when the host starts), and run this again"
        )
    last = [line for line in log.splitlines() if name in line][-3:]
    return f"{name} ({path}) can't be loaded: {said.strip() or 'modprobe said nothing'}" + (f"; the kernel says: {' / '.join(last)}" if last else "")


def tail(text: str, lines: int = 40) -> str:
    """The last lines of a log."""
    return "\n".join(text.rstrip().splitlines()[-lines:])
