#!/usr/bin/python
# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: evacuation_report
short_description: Writes the report of an evacuation
version_added: 0.1.0
description:
  - Says what became of each VM of a hypervisor that was evacuated, and writes it as C(report.json) and as C(report.html).
  - The result of a VM is decided by where the VM was found at the end, in O(locations). What its migration claims only
    explains the result. A VM whose migration was reported as failed, but which runs on another host, has moved; a VM
    that its migration claims to have moved, but which is still on the source, has failed.
  - A VM that runs on another host while its migration has not finished counts as failed, since the source may still hold
    a part of its memory.
  - Talks to no hypervisor. Run it on the control node, with C(delegate_to=localhost).
author:
  - The hecaton.fleet authors (@hecaton-fleet)
extends_documentation_fragment:
  - hecaton.fleet._attributes
  - hecaton.fleet._attributes.actiongroup_fleet
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing. To get the report of a C(--check) run as files, set C(check_mode=false) on the task and O(check=true).
  diff_mode:
    support: full
    details:
      - Shows the difference of C(report.json).
  idempotent:
    support: full
options:
  report:
    description:
      - A report that was written before, as in C(report.json), to write its two files again.
      - Instead of all other options but O(path).
    type: dict
  host:
    description:
      - The hypervisor that was to become empty, or that VMs were to return to; or what those are called whose VMs were to be onboarded.
      - Required without O(report), like O(plan), O(locations), O(started) and O(finished).
    type: str
  direction:
    description:
      - Whether the VMs were to leave O(host), to return to it, or to have their memory on C(remote_ram).
    type: str
    choices: [away, back, onboard]
    default: away
  plan:
    description:
      - The plan that the evacuation followed, as the module that makes the plan returns it in RV(ignore:plan).
      - V({}) when there was none.
    type: dict
  migrations:
    description:
      - The state of each migration of this evacuation.
      - Of several for one VM, the last to start counts.
    type: list
    elements: dict
    default: []
  locations:
    description:
      - Where each VM was found after the evacuation, by name of the VM.
      - The value is the name of a host, or V(null) for a VM that runs on no host.
      - A VM that is missing here was not looked for, and so does not count as moved.
      - A VM that was found on O(host) without being in the plan counts as failed.
    type: dict
  started:
    description:
      - When the evacuation started, in seconds since the epoch.
    type: float
  finished:
    description:
      - When the evacuation finished, in seconds since the epoch.
    type: float
  clients:
    description:
      - What clients outside the hypervisors saw during the evacuation.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: What the client is called.
        type: str
        required: true
      requests:
        description: How many requests it made.
        type: int
        required: true
      failed:
        description: How many of them failed.
        type: int
        required: true
      worst_ms:
        description: The longest that a request took, in milliseconds.
        type: float
      p50_ms:
        description: The time that half of the requests did not exceed, in milliseconds.
        type: float
      p99_ms:
        description: The time that 99 % of the requests did not exceed, in milliseconds.
        type: float
  check:
    description:
      - Whether nothing was moved, so that the report says what would be.
    type: bool
    default: false
  path:
    description:
      - The directory for the two files. It is created if it does not exist.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Write the report of the evacuation of hv07
  hecaton.fleet.evacuation_report:
    host: hv07
    plan: "{{ evacuation.plan }}"
    migrations: "{{ evacuation.migrations }}"
    locations:
      web1: hv08
      web2: hv09
      gpu1: hv07
    started: 1795428000.0
    finished: 1795428070.2
    path: "{{ playbook_dir }}/reports/hv07"
  delegate_to: localhost
  register: report

- name: Fail unless every VM has left
  ansible.builtin.assert:
    that: report.report.failed == 0
    fail_msg: "{{ report.report.failed }} VMs did not leave hv07, see {{ report.paths.html }}"
"""

RETURN = r"""
table:
  description: The report as text for a terminal.
  returned: success
  type: str
  sample: |
    VM    result  from  to    engine     pause    took    sent
    web1  moved   hv07  hv08  userfault  98 ms  16.1 s  120 MiB
report:
  description:
    - The report, as in C(report.json), but with an empty RV(report.vms[].samples), which are most of its size.
    - The schema of the file is in C(docs/report.schema.json) of this collection.
  returned: success
  type: dict
  contains:
    format:
      description: The version of this format, V(1).
      type: int
    host:
      description: O(host).
      type: str
    started:
      description: When the evacuation started, in UTC.
      type: str
      sample: "2026-11-23T10:00:00Z"
    finished:
      description: When the evacuation finished, in UTC.
      type: str
      sample: "2026-11-23T10:01:10Z"
    direction:
      description: Whether the VMs were to leave the hypervisor, V(away), to return to it, V(back), or to have their memory on C(remote_ram), V(onboard).
      type: str
      sample: away
    failed:
      description: How many VMs should have moved and did not, those with the result V(failed) or V(blocked).
      type: int
    deadline_s:
      description: How long the evacuation was allowed to take, in seconds; V(null) without a deadline.
      type: float
    elapsed_s:
      description: How long the evacuation took, in seconds.
      type: float
    empty:
      description: Whether no VM runs on the hypervisor, and none still fetches its memory from it.
      type: bool
    check:
      description: Whether nothing was moved.
      type: bool
    vms:
      description: What became of each VM.
      type: list
      elements: dict
      contains:
        name:
          description: The name of the VM.
          type: str
        driver:
          description: What runs the VM, V(libvirt) or V(qmp).
          type: str
        result:
          description: V(moved), V(failed), V(skipped) or V(blocked). In a report with RV(report.check=true), a VM that would move is V(skipped).
          type: str
        reason:
          description: Why. Empty for a VM that moved as planned.
          type: str
        engine:
          description: The engine that moved the VM, or was to.
          type: str
        from:
          description: Where the VM was.
          type: str
        to:
          description: Where the VM went, or was to go.
          type: str
        location:
          description: Where the VM was found at the end; V(null) when it was found nowhere, or nobody looked.
          type: str
        downtime_ms:
          description: How long the guest was paused, in milliseconds.
          type: float
        total_ms:
          description: How long the migration took, in milliseconds.
          type: float
        bytes:
          description: How much was sent.
          type: int
        started_s:
          description: When the migration started, in seconds since the evacuation started.
          type: float
        switched_s:
          description: When the destination started to run the VM, in seconds since the evacuation started.
          type: float
        finished_s:
          description: When the migration finished, in seconds since the evacuation started.
          type: float
        memory_mib:
          description: The memory of the VM, in MiB.
          type: float
        dirty_rate_mib_s:
          description: How fast the VM wrote to its memory, in MiB/s.
          type: float
        precopy_timeout_s:
          description: How long the plan allowed for pre-copy, in seconds.
          type: float
        samples:
          description: Empty here. In the file, the progress of the migration, as seconds since it started, phase, MiB/s, and MiB that remain.
          type: list
          elements: list
    plan:
      description: The plan that the evacuation followed.
      type: dict
    clients:
      description: What clients outside saw.
      type: list
      elements: dict
paths:
  description: Where the files are, or would be in check mode.
  returned: success
  type: dict
  contains:
    json:
      description: The report for programs.
      type: str
      sample: /srv/reports/hv07/report.json
    html:
      description: The report for people. One file that needs nothing else.
      type: str
      sample: /srv/reports/hv07/report.html
"""

import errno
import os
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hecaton.fleet.plugins.module_utils._report import SCHEMA, ReportError, brief, build, dump, table, validate
from ansible_collections.hecaton.fleet.plugins.module_utils._report_html import render


class Folder:
    """The directory with the two files."""

    def __init__(self, module: AnsibleModule, path: str):
        self.module = module
        self.path = path
        if os.path.lexists(path) and not os.path.isdir(path):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def put(self, name: str, text: str) -> tuple[bool, str]:
        """Makes a file have this text: whether that was, or would be, a change, and what it held before."""
        path = os.path.join(self.path, name)
        content = text.encode("utf-8", "replace")
        before = None
        if os.path.lexists(path):
            with open(path, "rb") as file:
                before = file.read()
        changed = before != content
        if changed and not self.module.check_mode:
            os.makedirs(self.path, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)
            self.module.add_cleanup_file(temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            self.module.atomic_move(temporary, path)
        if before is not None or not self.module.check_mode:
            changed = self.module.set_mode_if_different(path, "0644", changed)
        return changed, (before or b"").decode("utf-8", "replace")


def main():
    module = AnsibleModule(
        argument_spec={
            "report": {"type": "dict"},
            "host": {"type": "str"},
            "direction": {"type": "str", "choices": ["away", "back", "onboard"], "default": "away"},
            "plan": {"type": "dict"},
            "migrations": {"type": "list", "elements": "dict", "default": []},
            "locations": {"type": "dict"},
            "started": {"type": "float"},
            "finished": {"type": "float"},
            "clients": {"type": "list", "elements": "dict", "default": [], "options": {
                "name": {"type": "str", "required": True},
                "requests": {"type": "int", "required": True},
                "failed": {"type": "int", "required": True},
                "worst_ms": {"type": "float"},
                "p50_ms": {"type": "float"},
                "p99_ms": {"type": "float"},
            }},
            "check": {"type": "bool", "default": False},
            "path": {"type": "path", "required": True},
        },
        supports_check_mode=True,
        required_one_of=[("report", "host")],
        mutually_exclusive=[("report", "host")],
        required_by={"host": ("plan", "locations", "started", "finished")},
    )
    given = dict(module.params)
    path, report = given.pop("path"), given.pop("report")
    try:
        if report is None:
            report = build(**given)
        else:
            validate(report, SCHEMA, "report")
        text = dump(report)
        folder = Folder(module, path)
        json_changed, before = folder.put("report.json", text)
        html_changed, _ignored = folder.put("report.html", render(report))
    except ReportError as err:
        module.fail_json(msg=str(err))
    except OSError as err:
        module.fail_json(msg=f"The report can't be written to {path}: {err.strerror or err}.")

    paths = {"json": os.path.join(path, "report.json"), "html": os.path.join(path, "report.html")}
    result = {"changed": json_changed or html_changed, "report": brief(report), "table": table(report), "paths": paths}
    if module._diff:
        result["diff"] = {"before": before, "after": text, "before_header": paths["json"], "after_header": paths["json"]}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
