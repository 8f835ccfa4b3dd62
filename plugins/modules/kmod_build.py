#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kmod_build
short_description: Builds a kernel module from source
version_added: 0.1.0
description:
  - Builds a kernel module for a kernel of the host and installs it there. It is not loaded; M(hecaton.fleet.kmod) does that.
  - With DKMS, where the host has it, the module is built again for each kernel that is installed later. Otherwise the kernel's own
    build system is used, and the task has to be run again after the host got another kernel.
  - Builds only when the source, the way it is built or the kernel is another one than before.
  - What was built is installed only if its vermagic and its symbol versions are those of the kernel. Until then, what was
    installed before stays as it is.
  - The record of what was built is kept in C(/var/lib/hecaton/kmod).
author:
  - The hecaton.fleet authors (@hecaton-fleet)
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  name:
    description: Name of the module, and of its package in DKMS.
    type: str
    required: true
  state:
    description:
      - V(present) builds and installs the module for O(kernel).
      - V(absent) removes it for all kernels, with its source. A module that is loaded stays loaded.
    type: str
    choices: [present, absent]
    default: present
  src:
    description:
      - Folder or tar archive with the source, which has a C(Kbuild) file or a C(Makefile) that the kernel's build system understands.
        Required if O(state=present).
      - It is looked for on the control node, unless O(remote_src) is set.
      - A C(dkms.conf) in it is used with DKMS. Its C(BUILD_EXCLUSIVE_KERNEL) says, with both ways, for which kernels the source is.
    type: path
  remote_src:
    description: Whether O(src) is on the host already.
    type: bool
    default: false
  src_path:
    description:
      - Folder in O(src) that is the source of the module. In an archive, it is looked for below any folder.
      - An archive of a whole kernel is read only when it is another file than the last time.
    type: str
  exclude:
    description: Files and folders in O(src) that are no part of it, as patterns of the shell. What builds leave behind is left out anyway.
    type: list
    elements: str
    default: []
  patches:
    description:
      - Changes to the source, each the text of a unified diff with one leading folder in its names, such as what C(git format-patch) writes.
        They are applied in order, with C(patch), which the host has to have.
      - One that the source has already is left out, with a warning. One that does not fit is an error, and nothing is built.
    type: list
    elements: str
    default: []
  version:
    description: Version of the source. By default that of its C(dkms.conf), or V(0) without one. A hash of the source is appended to it.
    type: str
  kernel:
    description: Release of the kernel to build for. By default the one that runs.
    type: str
  kernels:
    description: Extended regular expression for the releases of the kernels that the source is for. Others are refused.
    type: str
  modules:
    description: Names of the modules that the build makes. By default O(name).
    type: list
    elements: str
  make_args:
    description: Arguments for C(make), such as V(CONFIG_RDMA_SIW=m). Not used with a C(dkms.conf) of the source's own and DKMS.
    type: list
    elements: str
    default: []
  method:
    description: How to build. V(auto) takes DKMS if the host has it, else the kernel's build system.
    type: str
    choices: [auto, dkms, kbuild]
    default: auto
  archive:
    description:
      - Also write what is installed to this file on the host, a tar archive for the option O(built) of hosts with the same kernel.
        It is unsigned, and has neither a key nor the source.
      - It is left alone if it is of this source and this kernel already.
    type: path
  built:
    description:
      - Archives that this module wrote with O(archive) on another host. The first that is of this source and of O(kernel) is taken
        instead of running the compiler. Without one that fits the module is built, and a warning says why.
      - What is in it is checked, signed and installed like what was built here. With DKMS, later kernels are built for from source.
      - They are looked for on the control node. Whoever can write them can put anything into the kernel of the host.
    type: list
    elements: path
    default: []
  sign_key:
    description:
      - Private key, a file on the host, that the module is signed with for Secure Boot. Without it, DKMS signs with the key of its own.
      - With DKMS this is written to C(/etc/dkms/framework.conf.d), and DKMS then signs everything that it builds on the host with it.
    type: path
  sign_cert:
    description: Certificate of O(sign_key), a file on the host, which its firmware has to know.
    type: path
seealso:
  - module: hecaton.fleet.kmod
"""

EXAMPLES = r"""
- name: Build a module whose source is beside the playbook
  hecaton.fleet.kmod_build:
    name: example
    src: files/example

- name: Build soft-iWARP from the distribution's kernel source, for the kernels of that series
  hecaton.fleet.kmod_build:
    name: siw
    src: /usr/src/linux-source-6.12.tar.xz
    src_path: drivers/infiniband/sw/siw
    remote_src: true
    version: "6.12"
    kernels: "^6\\.12\\."
    make_args: [CONFIG_RDMA_SIW=m]
    patches: ["{{ lookup('ansible.builtin.file', 'files/siw.patch') }}"]

- name: Build a module that a host with Secure Boot takes
  hecaton.fleet.kmod_build:
    name: example
    src: files/example
    sign_key: /var/lib/shim-signed/mok/MOK.priv
    sign_cert: /var/lib/shim-signed/mok/MOK.der

- name: Build a module on one host, and keep what was built
  hecaton.fleet.kmod_build:
    name: example
    src: files/example
    archive: /root/example.tar.gz

- name: Take it on hosts with the same kernel, after it was fetched to the control node
  hecaton.fleet.kmod_build:
    name: example
    src: files/example
    built: [files/example.tar.gz]

- name: Remove it from all kernels
  hecaton.fleet.kmod_build:
    name: example
    state: absent
"""

RETURN = r"""
kernel:
  description: Release of the kernel that the module is for.
  returned: O(state=present)
  type: str
  sample: 6.12.117+deb13-amd64
method:
  description: How it was built, V(dkms) or V(kbuild).
  returned: O(state=present)
  type: str
  sample: dkms
version:
  description: Version of the source and a hash of it.
  returned: O(state=present)
  type: str
  sample: 6.12.h0c9f1e2d3a4b
modules:
  description: What is installed.
  returned: O(state=present) and not in check mode, unless nothing would change
  type: list
  elements: dict
  contains:
    name:
      description: Name of the module.
      type: str
    path:
      description: Its file.
      type: str
    vermagic:
      description: What it says about the kernel that it is for.
      type: str
    signer:
      description: Who signed it, null if nobody did.
      type: str
    symbols:
      description: How many symbols of the kernel it uses whose version was compared with the headers of the kernel.
      type: int
    confirmed:
      description: For how many of them modules that the kernel has were built with, or export, the same version.
      type: int
  sample:
    - name: siw
      path: /lib/modules/6.12.117+deb13-amd64/updates/dkms/siw.ko.xz
      vermagic: "6.12.117+deb13-amd64 SMP preempt mod_unload modversions "
      signer: DKMS module signing key
      symbols: 133
      confirmed: 128
taken:
  description: Whether it was taken from one of O(built) instead of being built.
  returned: O(state=present) and not in check mode, unless nothing would change
  type: bool
  sample: false
log:
  description: The end of what the compiler wrote.
  returned: when the build failed
  type: str
  sample: "example.c:7:1: error: expected ';'"
"""

import contextlib
import hashlib
import json
import os
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod, _kmod_archive, _kmod_build, _kmod_host
from ansible_collections.hecaton.fleet.plugins.module_utils._kmod_host import KmodError

RECORDS = "/var/lib/hecaton/kmod"


class KmodBuild:
    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.name: str = module.params["name"]
        self.kernel: str = module.params["kernel"] or _kmod_host.release()
        self.record_path = os.path.join(RECORDS, f"{self.name}.json")

    def run(self) -> dict:
        return self.absent() if self.params["state"] == "absent" else self.present()

    # ---- state: absent

    def absent(self) -> dict:
        builders = [_kmod_build.Kbuild(self.wanted("0"))]
        if self.has_dkms():
            builders.append(_kmod_build.Dkms(self.wanted("0")))
        before = [line for builder in builders for line in builder.present()]
        recorded = os.path.exists(self.record_path)
        if not self.module.check_mode:
            for builder in builders:
                if builder.present():
                    builder.remove()
            if recorded:
                os.unlink(self.record_path)
                for folder in (RECORDS, os.path.dirname(RECORDS)):
                    if not os.listdir(folder):
                        os.rmdir(folder)
        return {"changed": bool(before) or recorded, "diff": {"before": "".join(f"{line}\n" for line in before), "after": ""}}

    # ---- state: present

    def present(self) -> dict:
        self.check_keys()
        record = self.record()
        stamp = self.stamp()
        files = None
        if stamp and record.get("archive") == stamp and record.get("of"):
            source, version, of = record["source"], record["version"], {**record["of"], "kernel": self.kernel}
        else:
            files = self.files()
            source, version = self.identify(files)
            of = _kmod_archive.manifest(self.name, files, self.params["make_args"], self.kernel)
        builder = self.builder(version)
        result = {"kernel": self.kernel, "method": builder.method, "version": _kmod.dkms_version(version, source)}
        found = builder.installed(source, self.kernel)
        facts = record.get("kernels", {}).get(self.kernel, {}).get(result["version"])
        if found and facts and [each["path"] for each in facts] == list(found.values()) and record.get("method") == builder.method:
            packed = self.pack(of, found)
            return {"changed": packed, "modules": facts, "diff": {"before": self.shown(result), "after": self.shown(result)}, **result}
        if found and not facts and record.get("source") == source:
            return self.adopt(builder, found, record, {"archive": stamp, "source": source, "version": version, "of": of, "method": builder.method}, result)
        before = record.get("kernels", {}).get(self.kernel, {})
        diff = {"before": "".join(f"{self.name} {each}, kernel {self.kernel}\n" for each in before), "after": self.shown(result)}
        _kmod_host.headers(self.kernel)
        if self.module.check_mode:
            return {"changed": True, "diff": diff, **result}
        if files is None:
            files = self.files()
        ready = self.ready(of, builder.wanted["modules"])
        facts = self.build(builder, files, source, ready)
        kernels = {kernel: versions for kernel, versions in record.get("kernels", {}).items() if kernel != self.kernel and result["version"] in versions}
        self.save({"archive": stamp, "source": source, "version": version, "of": of, "method": builder.method,
                   "kernels": {**kernels, self.kernel: {result["version"]: facts}}})  # fmt: skip
        self.pack(of, {each["name"]: each["path"] for each in facts})
        return {"changed": True, "modules": facts, "taken": bool(ready), "diff": diff, **result}

    def adopt(self, builder: _kmod_build.Builder, found: dict, record: dict, now: dict, result: dict) -> dict:
        """Takes over what DKMS has built from this source by itself, for a kernel that came since. Nothing is built.

        :raises KmodError: it does not fit its kernel.
        """
        facts = self.checked(found, builder.wanted["modules"])
        if not self.module.check_mode:
            self.save({**now, "kernels": {**record.get("kernels", {}), self.kernel: {result["version"]: facts}}})
        packed = self.pack(now["of"], found)
        return {"changed": packed, "modules": facts, "diff": {"before": self.shown(result), "after": self.shown(result)}, **result}

    def checked(self, found: dict, modules: list) -> list[dict]:
        """What is known of installed modules, ``{name: path}``, that were compared with the kernel."""
        return [
            {"name": name, "path": path, "signer": _kmod_host.info(path, "signer") or None,
             **_kmod_host.check(path, self.kernel, name, [found[other] for other in modules if other != name])} for name, path in found.items()
        ]  # fmt: skip

    def ready(self, of: dict, modules: list) -> dict | None:
        """The modules, ``{name: content}``, that were built before; None if there are none that fit."""
        found, reasons = _kmod_archive.fitting(self.params["built"], of, modules)
        if not found and reasons:
            self.module.warn(f"{self.name} is built on this host, for none of the archives in built fits: {'; '.join(reasons)}")
        return found

    def pack(self, of: dict, paths: dict) -> bool:
        """Writes the archive that is asked for, if it is not there as it should be. Returns whether it was not."""
        path = self.params["archive"]
        if not path:
            return False
        if os.path.exists(path):
            try:
                if _kmod_archive.fitting([path], of, list(paths))[0]:
                    return False
            except KmodError:
                pass  # no archive of ours, or a damaged one: written anew
        if not self.module.check_mode:
            _kmod_archive.write(path, of, {name: _kmod_build.plain(each) for name, each in paths.items()})
        return True

    def build(self, builder: _kmod_build.Builder, files: dict, source: str, ready: dict | None) -> list[dict]:
        try:
            built = builder.build(files, source, self.kernel, ready)
            checks = {name: _kmod_host.check(path, self.kernel, name, [built[other] for other in built if other != name]) for name, path in built.items()}
        except BaseException:
            # What was in place before stays in place.
            builder.forget(source, self.kernel)
            raise
        # What was built the other way before.
        left = (_kmod_build.Dkms if builder.method == "kbuild" else _kmod_build.Kbuild)(self.wanted("0"))
        with left.aside(self.kernel) if left.method == "kbuild" else contextlib.nullcontext():
            warnings = builder.install(built, source, self.kernel)
        for warning in warnings:
            self.module.warn(warning)
        if (left.method == "kbuild" or self.has_dkms()) and left.present():
            left.remove()
        found = builder.installed(source, self.kernel)
        if not found:
            where = {name: _kmod_host.find(name, self.kernel) for name in built}
            raise KmodError(f"{self.name} was built and installed, but modprobe would take another file: {where}; remove what is in its way")
        return [{"name": name, "path": path, "signer": _kmod_host.info(path, "signer") or None, **checks[name]} for name, path in found.items()]

    def files(self) -> dict:
        """The source, as it is to be built."""
        files = _kmod_build.read_source(self.params["src"], self.params["src_path"], self.params["exclude"])
        files, there = _kmod_build.patched(files, self.params["patches"])
        for number in there:
            self.module.warn(f"the source of {self.name} has number {number} of the patches already; it can be taken off the list")
        return files

    def identify(self, files: dict) -> tuple[str, str]:
        """The hash and the version of a source."""
        conf = files.get("dkms.conf", (False, b""))[1].decode(errors="replace")
        version = self.params["version"] or _kmod.dkms_setting(conf, "PACKAGE_VERSION") or "0"
        named = _kmod.dkms_setting(conf, "PACKAGE_NAME")
        if named and named != self.name:
            raise KmodError(f"the dkms.conf in {self.params['src']} is that of {named}, not of {self.name}")
        recipe = {key: self.params[key] for key in ("make_args", "kernels", "modules", "sign_key")}
        recipe["sign_cert"] = self.certificate()
        return _kmod.source_hash(files, {**recipe, "version": version}), version

    def stamp(self) -> list | None:
        """By what an archive on the host is known again without reading it."""
        src = self.params["src"]
        if not self.params["remote_src"] or not os.path.isfile(src):
            return None
        found = os.stat(src)
        settings = [self.params[key] for key in ("src_path", "exclude", "patches", "version", "make_args", "kernels", "modules", "sign_key")]
        return [src, found.st_size, found.st_mtime_ns, *settings, self.certificate()]

    def certificate(self) -> str | None:
        """What tells one certificate from another that takes its place."""
        path = self.params["sign_cert"]
        if not path:
            return None
        with open(path, "rb") as stream:
            return f"{path} {hashlib.sha256(stream.read()).hexdigest()}"

    def check_keys(self) -> None:
        for option in ("sign_key", "sign_cert"):
            path = self.params[option]
            if path and not os.path.isfile(path):
                raise KmodError(f"{option} {path} is not a file on this host")

    @staticmethod
    def has_dkms() -> bool:
        return bool(shutil.which("dkms", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin"))

    def builder(self, version: str) -> _kmod_build.Builder:
        method = self.params["method"]
        if method == "dkms" and not self.has_dkms():
            raise KmodError("dkms is not installed on this host; install the package dkms, or let method be kbuild")
        if method == "auto":
            method = "dkms" if self.has_dkms() else "kbuild"
        return (_kmod_build.Dkms if method == "dkms" else _kmod_build.Kbuild)(self.wanted(version))

    def wanted(self, version: str) -> dict:
        wanted = {key: self.params[key] for key in ("name", "make_args", "kernels", "sign_key", "sign_cert")}
        return {**wanted, "version": version, "modules": self.params["modules"] or [self.name]}

    def shown(self, result: dict) -> str:
        return f"{self.name} {result['version']}, kernel {self.kernel}\n"

    # ---- the record

    def record(self) -> dict:
        try:
            return json.loads(_kmod_host.read_text(self.record_path) or "{}")
        except ValueError:
            return {}  # damaged: built anew

    def save(self, record: dict) -> None:
        os.makedirs(RECORDS, mode=0o755, exist_ok=True)
        temporary = f"{self.record_path}.new"
        with open(temporary, "w") as out:
            json.dump(record, out, indent=1)
        os.replace(temporary, self.record_path)


def main():
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "src": {"type": "path"},
            "remote_src": {"type": "bool", "default": False},
            "src_path": {"type": "str"},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "patches": {"type": "list", "elements": "str", "default": []},
            "version": {"type": "str"},
            "kernel": {"type": "str"},
            "kernels": {"type": "str"},
            "modules": {"type": "list", "elements": "str"},
            "make_args": {"type": "list", "elements": "str", "default": []},
            "method": {"type": "str", "choices": ["auto", "dkms", "kbuild"], "default": "auto"},
            "archive": {"type": "path"},
            "built": {"type": "list", "elements": "path", "default": []},
            "sign_key": {"type": "path", "no_log": False},
            "sign_cert": {"type": "path"},
        },
        required_if=[("state", "present", ["src"])],
        required_together=[("sign_key", "sign_cert")],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**KmodBuild(module).run())
    except _kmod_build.BuildError as err:
        module.fail_json(msg=str(err), log=err.log)
    except (KmodError, OSError) as err:
        module.fail_json(msg=str(err))


if __name__ == "__main__":
    main()
