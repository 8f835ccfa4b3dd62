#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_cordon
short_description: Cordons a hypervisor
version_added: 0.1.0
description:
  - Marks a hypervisor as one that no virtual machine may move to, and says why, since when and who asked. The plan of an
    evacuation leaves cordoned hosts alone.
  - Runs on the hypervisor. The mark is the file C(cordon.json) there, so it holds for every control node.
  - A person's cordon and that of an evacuation are kept side by side. A host is cordoned for as long as one of them is left.
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
  state:
    description:
      - V(present) cordons the host. The same cordon with another O(reason) is a change and keeps the time since which it holds.
      - V(absent) removes the cordon of O(owner), or all cordons when O(owner) is not given.
    type: str
    choices: [present, absent]
    default: present
  reason:
    description: Why the host is cordoned, for people to read. Required if O(state=present).
    type: str
  by:
    description: Who cordons it. By default, the user who became the one that the module runs as.
    type: str
  owner:
    description:
      - The evacuation, or any other job, that the cordon belongs to. Without it, the cordon is a person's own.
      - With O(state=absent), only the cordon of this owner is removed. Others stay, and a warning says so.
    type: str
  exclusive:
    description: Refuse to cordon a host that is cordoned for another O(owner). A person's own cordon is no obstacle.
    type: bool
    default: false
  force:
    description: Take the cordon over from any other O(owner), whose work must have ended. A person's own cordon stays.
    type: bool
    default: false
  claim_lapses:
    description:
      - With O(exclusive), an O(owner) that has given no sign of life for so many seconds counts as dead, and its cordon is taken
        over. The module waits that long at most, and refuses as soon as the other gives one. V(0) for never.
      - M(hecaton.fleet.vm_migrate) gives a sign while it watches a migration of O(hecaton.fleet.vm_migrate#module:evacuation).
    type: float
    default: 0
  hook:
    description:
      - Command with its arguments that tells the site's own systems, run on the hypervisor when the cordon changes.
      - It finds C(cordon) or C(uncordon) in the environment variable E(HECATON_ACTION), the host in E(HECATON_HOST) and the
        reason in E(HECATON_REASON). It is told C(cordon) for as long as the host stays cordoned.
      - When it fails, nothing is recorded, and the next run tries it again. It must therefore bear being run twice.
    type: list
    elements: str
  host_name:
    description: The name of this host that O(hook) is told, such as its inventory name. By default, the host's own name.
    type: str
  state_dir:
    description: Folder in which the host keeps its cordon. It is created if it is missing.
    type: path
    aliases: [path]
    default: /var/lib/hecaton
seealso:
  - module: hecaton.fleet.vm_info
"""

EXAMPLES = r"""
- name: Keep virtual machines away while a disk is replaced
  hecaton.fleet.host_cordon:
    reason: Disk 3 is being replaced

- name: Take the cordon away
  hecaton.fleet.host_cordon:
    state: absent

- name: Cordon for one evacuation, and refuse if another one is under way
  hecaton.fleet.host_cordon:
    reason: Evacuation for a kernel update
    owner: "{{ evacuation_id }}"
    exclusive: true

- name: End that evacuation's cordon, and leave a person's own in place
  hecaton.fleet.host_cordon:
    state: absent
    owner: "{{ evacuation_id }}"

- name: Tell the monitoring as well
  hecaton.fleet.host_cordon:
    reason: Evacuation for a kernel update
    host_name: "{{ inventory_hostname }}"
    hook: [/usr/local/sbin/silence-alerts, --service, kvm]
"""

RETURN = r"""
cordon:
  description: The cordon that is in force now, or would be in check mode; null when there is none.
  returned: success
  type: dict
  contains:
    reason:
      description: Why the host is cordoned.
      type: str
    since:
      description: Since when, in ISO 8601, UTC.
      type: str
    by:
      description: Who cordoned it.
      type: str
    owner:
      description: The evacuation that it belongs to; null for a person's own.
      type: str
    also:
      description: Other cordons of this host, newest first, each with the same four fields.
      type: list
      elements: dict
  sample:
    reason: Evacuation for a kernel update
    since: "2026-11-23T10:00:00Z"
    by: alice
    owner: 3c1f7d
    also: []
hook:
  description: What O(hook) returned.
  returned: when it was run
  type: dict
  contains:
    rc:
      description: Exit status.
      type: int
    stdout:
      description: Its standard output.
      type: str
    stderr:
      description: Its standard error.
      type: str
  sample:
    rc: 0
    stdout: "silenced kvm on hv1\n"
    stderr: ""
"""

import os
import pwd
import socket
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils import _cordon


class HookError(Exception):
    """The site's command failed; ``result`` is what it returned."""

    def __init__(self, message: str, result: dict):
        super().__init__(message)
        self.result = result


class HostCordon:
    def __init__(self, module: AnsibleModule):
        self.module = module
        self.params = module.params
        self.state_dir: str = module.params["state_dir"]
        self.name: str = module.params["host_name"] or socket.gethostname()
        self.hook: dict | None = None

    def run(self) -> dict:
        if self.module.check_mode:
            before = _cordon.read(self.state_dir)
            return self.result(before, self.wanted(before))
        if self.params["exclusive"] and self.params["claim_lapses"] > 0 and not self.params["force"]:
            self.params["force"] = _cordon.await_lapse(self.state_dir, self.params["owner"], self.params["claim_lapses"])
        claims = self.params["state"] == "present" and self.params["owner"]
        before = _cordon.read(self.state_dir)
        after = self.wanted(before)
        if after == before and not claims:
            return self.result(before, after)  # nothing to do, and nothing left behind
        with _cordon.locked(self.state_dir):
            before = _cordon.read(self.state_dir)
            after = self.wanted(before)
            if after != before:
                self.tell(before, after)
                _cordon.write(after, self.state_dir)
            if claims:
                _cordon.sign_of_life(self.state_dir)
            else:
                _cordon.forget_claim(after, self.state_dir)
        return self.result(before, after)

    def wanted(self, before: dict | None) -> dict | None:
        if self.params["state"] == "absent":
            return _cordon.remove(before, self.params["owner"])
        new = {
            "reason": self.params["reason"],
            "since": _cordon.timestamp(time.time()),
            "by": self.params["by"] or user(),
            "owner": self.params["owner"],
        }
        return _cordon.add(before, new, self.params["exclusive"], self.params["force"])

    def tell(self, before: dict | None, after: dict | None) -> None:
        if not self.params["hook"]:
            return
        action = "cordon" if after else "uncordon"
        environment = {"HECATON_ACTION": action, "HECATON_HOST": self.name, "HECATON_REASON": (after or before)["reason"]}
        try:
            rc, stdout, stderr = self.module.run_command(self.params["hook"], environ_update=environment, handle_exceptions=False)
        except (OSError, ValueError) as err:
            rc, stdout, stderr = 127, "", str(err)
        self.hook = {"rc": rc, "stdout": stdout, "stderr": stderr}
        if rc != 0:
            told = (stderr.strip() or stdout.strip() or "it said nothing")[-2000:]
            command = " ".join(self.params["hook"])
            raise HookError(f"the hook '{command}' failed to {action} {self.name} (exit status {rc}), so nothing was changed: {told}", self.hook)

    def result(self, before: dict | None, after: dict | None) -> dict:
        if self.params["state"] == "absent" and after:
            self.module.warn(f"{self.name} stays cordoned by {after['by']} since {after['since']}: {after['reason']}")
        result = {"changed": after != before, "cordon": after, "diff": {"before": before or {}, "after": after or {}}}
        if self.hook:
            result["hook"] = self.hook
        return result


def user() -> str:
    """Who is at work: the one who became another user, else the one that runs this."""
    given = os.environ.get("SUDO_USER") or os.environ.get("DOAS_USER")
    if given:
        return given
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "reason": {"type": "str"},
            "by": {"type": "str"},
            "owner": {"type": "str"},
            "exclusive": {"type": "bool", "default": False},
            "force": {"type": "bool", "default": False},
            "claim_lapses": {"type": "float", "default": 0},
            "hook": {"type": "list", "elements": "str"},
            "host_name": {"type": "str"},
            "state_dir": {"type": "path", "aliases": ["path"], "default": _cordon.DIRECTORY},
        },
        required_if=[("state", "present", ["reason"])],
        supports_check_mode=True,
    )
    if module.params["owner"] == "":
        module.fail_json(msg="owner is empty; leave it out for a person's own cordon")
    try:
        module.exit_json(**HostCordon(module).run())
    except HookError as err:
        module.fail_json(msg=str(err), hook=err.result)
    except _cordon.CordonError as err:
        module.fail_json(msg=str(err))
    except OSError as err:
        module.fail_json(msg=f"cannot keep the cordon in {module.params['state_dir']}: {err}")


if __name__ == "__main__":
    main()
