#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kmod
short_description: Loads a kernel module with its parameters
version_added: 0.1.0
description:
  - Loads a kernel module, sees that it has its parameters, and that it is loaded again when the host starts.
  - A loaded module that has other parameters, or that is another build than the one that is installed, is unloaded and loaded
    again only when nothing uses it. A parameter that can be changed at run time is changed at run time.
  - Before a module that did not come with the kernel is loaded, its vermagic and symbol versions are compared with those of the kernel.
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
    description: Name of the module.
    type: str
    required: true
  state:
    description:
      - V(loaded) loads it.
      - V(absent) unloads it, and it is not loaded again when the host starts. It is refused while something uses the module.
    type: str
    choices: [loaded, absent]
    default: loaded
  parameters:
    description:
      - Parameters of the module. Those that are not given are left as they are.
      - A list becomes values with commas between them.
    type: dict
    default: {}
  persistent:
    description: Whether the module is loaded with these parameters when the host starts, by C(/etc/modules-load.d) and C(/etc/modprobe.d).
    type: bool
    default: true
  in_use:
    description:
      - What to do when the module has to be loaded again and something uses it. V(fail) says what uses it, and changes nothing.
      - V(keep) leaves it as it is for now and warns. With O(persistent), it is as it should be from the next start of the host on.
    type: str
    choices: [fail, keep]
    default: fail
  reload:
    description:
      - Whether a module that is loaded may be unloaded to be loaded again. With V(false) it stays as it is for now, with a warning.
      - For modules of which the kernel doesn't know all that depends on them, such as the driver of an RDMA device that has connections.
    type: bool
    default: true
seealso:
  - module: hecaton.fleet.kmod_build
"""

EXAMPLES = r"""
- name: Load a module with a parameter, now and when the host starts
  hecaton.fleet.kmod:
    name: example
    parameters:
      window: 64

- name: Unload it
  hecaton.fleet.kmod:
    name: example
    state: absent

- name: Load a new build if nothing uses the one before
  hecaton.fleet.kmod:
    name: example
    in_use: keep
"""

RETURN = r"""
loaded:
  description: Whether the module is in the running kernel.
  returned: success
  type: bool
  sample: true
parameters:
  description: The parameters of the loaded module that can be read.
  returned: success
  type: dict
  sample: {window: "64"}
reload_pending:
  description: Whether the module is loaded with other parameters, or from another build, than it should be, because it is in use.
  returned: success
  type: bool
  sample: false
actions:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: [load example]
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod, _kmod_host
from ansible_collections.hecaton.fleet.plugins.module_utils._kmod_host import KmodError, run

LOAD_DIR = "/etc/modules-load.d"
OPTIONS_DIR = "/etc/modprobe.d"


class Kmod:
    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.name: str = module.params["name"]
        self.wanted: dict = module.params["parameters"]
        self.actions: list[str] = []
        self.pending = False
        self.diff = {"before": "", "after": ""}

    def run(self) -> dict:
        problem = _kmod.bad_parameters(self.wanted)
        if problem:
            raise KmodError(problem)
        before = self.shown(_kmod_host.loaded(self.name), _kmod_host.parameters(self.name))
        if self.params["state"] == "absent":
            self.absent()
        else:
            self.present()
        now = _kmod_host.loaded(self.name)
        has = _kmod_host.parameters(self.name)
        if self.module.check_mode and self.actions:
            now, has = self.params["state"] == "loaded", {**has, **{key: _kmod.parameter_text(value) for key, value in self.wanted.items()}}
        self.diff["before"] = before + self.diff["before"]
        self.diff["after"] = self.shown(now, has) + self.diff["after"]
        return {"changed": bool(self.actions), "actions": self.actions, "loaded": now, "parameters": has, "reload_pending": self.pending, "diff": self.diff}

    def shown(self, loaded: bool, parameters: dict) -> str:
        return f"{self.name} {'loaded' if loaded else 'not loaded'}\n" + "".join(f"{key}={value}\n" for key, value in parameters.items() if key in self.wanted)

    # ---- state: absent

    def absent(self) -> None:
        if _kmod_host.loaded(self.name):
            if not _kmod_host.removable(self.name):
                raise KmodError(f"{self.name} is built into the kernel and can't be unloaded")
            self.refuse_in_use("unloaded")
            self.unload()
        self.keep_file(LOAD_DIR, None)
        self.keep_file(OPTIONS_DIR, None)

    # ---- state: loaded

    def present(self) -> None:
        files = (_kmod.load_file(self.name), _kmod.options_file(self.name, self.wanted)) if self.params["persistent"] else (None, None)
        if not _kmod_host.loaded(self.name):
            path = self.file()
            self.check(path)
            self.load(path)
        else:
            self.bring_up_to_date()
        self.keep_file(LOAD_DIR, files[0])
        self.keep_file(OPTIONS_DIR, files[1])

    def bring_up_to_date(self) -> None:
        reasons, settable = [], {}
        has = _kmod_host.parameters(self.name)
        for key, value in self.wanted.items():
            if key in has and _kmod.same_value(value, has[key]):
                continue
            path = os.path.join(_kmod_host.SYSFS, self.name.replace("-", "_"), "parameters", key)
            if os.path.exists(path) and os.stat(path).st_mode & 0o200:
                settable[key] = path
            elif os.path.exists(path):
                reasons.append(f"{key} is {has.get(key, 'not readable')} and should be {_kmod.parameter_text(value)}")
            else:
                self.refuse_unknown(key)
        if not _kmod_host.removable(self.name):
            if reasons:
                raise KmodError(f"{self.name} is built into the kernel, so its parameters can only be set on the kernel's command line: {'; '.join(reasons)}")
        else:
            path = self.file()
            running = _kmod_host.loaded_build_id(self.name)
            if running and _kmod.build_id(_kmod_host.read_module(path)) not in (None, running):
                reasons.append(f"another build of it is installed in {path}")
            if reasons:
                self.reload(path, reasons)
                if not self.pending:
                    return
        for key, path in settable.items():
            self.actions.append(f"set {key} to {_kmod.parameter_text(self.wanted[key])}")
            if self.module.check_mode:
                continue
            try:
                with open(path, "w") as out:
                    out.write(_kmod.parameter_text(self.wanted[key]))
            except OSError as err:
                raise KmodError(f"{self.name} refuses {key}={_kmod.parameter_text(self.wanted[key])}: {err.strerror}") from err

    def refuse_unknown(self, key: str) -> None:
        """A parameter that sysfs doesn't show may still exist, and then can't be compared."""
        known = [line.split(":", 1)[0] for line in run("modinfo", "-F", "parm", self.name, check=False).stdout.splitlines()]
        if key not in known:
            raise KmodError(f"{self.name} has no parameter {key}; it has {', '.join(known) or 'none'}")
        self.module.warn(f"{self.name} does not show its parameter {key}, so it is not known whether it has to be loaded again")

    def reload(self, path: str, reasons: list) -> None:
        count, holders = _kmod_host.users(self.name)
        if not self.params["reload"] or (count and self.params["in_use"] == "keep"):
            self.pending = True
            why = f"it is in use{self.by(holders)}" if count else "it was asked not to be loaded again"
            self.module.warn(f"{self.name} stays as it is because {why}, although {'; '.join(reasons)}")
            return
        self.refuse_in_use(f"loaded again, although {'; '.join(reasons)}")
        self.check(path)
        self.unload()
        self.load(path)

    def refuse_in_use(self, what: str) -> None:
        count, holders = _kmod_host.users(self.name)
        if count:
            raise KmodError(f"{self.name} is in use {count} times{self.by(holders)}, so it can't be {what}; end what uses it and run this again")

    @staticmethod
    def by(holders: list) -> str:
        return f" (by {', '.join(holders)})" if holders else ""

    def file(self) -> str:
        path = _kmod_host.find(self.name, _kmod_host.release())
        if path is None:
            raise KmodError(f"the running kernel {_kmod_host.release()} has no module {self.name}; build it with hecaton.fleet.kmod_build, or install it")
        if not path:
            raise KmodError(f"{self.name} is built into the kernel {_kmod_host.release()}, which doesn't show it as loaded; there is nothing to load")
        return path

    def check(self, path: str) -> None:
        """Compares a module that did not come with the kernel with the kernel."""
        known = [line.split(":", 1)[0] for line in run("modinfo", "-F", "parm", path).stdout.splitlines()]
        unknown = sorted(set(self.wanted) - set(known))
        if unknown:
            raise KmodError(f"{self.name} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        if f"/{_kmod_host.release()}/kernel/" not in path:
            _kmod_host.check(path, _kmod_host.release(), self.name)

    def load(self, path: str) -> None:
        self.actions.append(f"load {self.name}")
        if self.module.check_mode:
            return
        arguments = [f"{key}={_kmod.parameter_text(value)}" for key, value in sorted(self.wanted.items())]
        done = run("modprobe", self.name, *arguments, check=False)
        if done.returncode or not _kmod_host.loaded(self.name):
            log = run("dmesg", check=False).stdout
            raise KmodError(_kmod.refusal(self.name, path, done.stderr, _kmod.tail(log), _kmod_host.secure_boot(), _kmod_host.info(path, "signer") or None))

    def unload(self) -> None:
        self.actions.append(f"unload {self.name}")
        if not self.module.check_mode:
            # modprobe -r would go on to the modules that this one needs, and fail when somebody else uses them.
            run("rmmod", self.name)

    def keep_file(self, folder: str, text: str | None) -> None:
        path = os.path.join(folder, f"hecaton-{self.name}.conf")
        before = _kmod_host.read_text(path)
        if before == text:
            return
        self.actions.append(f"{'remove' if text is None else 'write'} {path}")
        self.diff["before"] += before or ""
        self.diff["after"] += text or ""
        if self.module.check_mode:
            return
        if text is None:
            os.unlink(path)
            return
        os.makedirs(folder, mode=0o755, exist_ok=True)
        with open(f"{path}.new", "w") as out:
            out.write(text)
        os.chmod(f"{path}.new", 0o644)
        os.replace(f"{path}.new", path)


def main():
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["loaded", "absent"], "default": "loaded"},
            "parameters": {"type": "dict", "default": {}},
            "persistent": {"type": "bool", "default": True},
            "in_use": {"type": "str", "choices": ["fail", "keep"], "default": "fail"},
            "reload": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**Kmod(module).run())
    except (KmodError, OSError) as err:
        module.fail_json(msg=str(err))


if __name__ == "__main__":
    main()
