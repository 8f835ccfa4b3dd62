# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control node's part of a migration: prepares the destination, starts the unit on the source, and watches it.

Nothing here is needed for the migration to go on once it was started.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import time

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import become_loader, connection_loader
from ansible.utils.display import Display
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import write_json

MODULE = "hecaton.fleet.vm_migrate"
INCOMING = "hecaton.fleet.vm_incoming"
#: Seconds to wait for a source that can't be reached; its migration goes on meanwhile.
LOST_PATIENCE = 300
#: Seconds between two looks whether a busy destination has become free.
BUSY_POLL = 5.0
#: Seconds that a destination which has every page may take to say what became of the VM.
ARRIVAL_PATIENCE = 30

display = Display()


def progress_line(vm: str, to: str, record: dict) -> str:
    """One line of progress that a person reads."""
    words = [f"{vm} -> {to}: {record['phase']}"]
    if record["phase"] == "finished":
        words[0] = f"{vm} -> {to}: {record['result']}"
        if record["result"] == "moved":
            words.append(f"in {record['total_ms'] / 1000:.1f} s" if record.get("total_ms") is not None else "")
            words.append(f"downtime {record['downtime_ms']} ms" if record.get("downtime_ms") is not None else "")
        words.append(record["reason"])
        return ", ".join(word for word in words if word)
    if record.get("remaining_mib") is not None:
        words.append(f"{record['percent']} %")
        words.append(f"{record['rate_mib_s'] or 0:.1f} MiB/s")
        words.append(f"{record['remaining_mib']:.0f} MiB left")
        if record.get("eta_s") is not None:
            words.append(f"ETA {record['eta_s']:.0f} s")
    counted = record.get("remote_ram")
    if counted:
        words.append(f"pages ahead {counted['pages_ahead']}")
        if record["on"] == "destination":
            background = counted["pages_bubble"] + counted["pages_background"]
            words.append(f"missing at the switch {counted['pages_dirty']}, on demand {counted['pages_demand']}, in the background {background}")
            waits = sum(counted["wait_hist"])
            if waits:
                words.append(f"mean wait {counted['wait_ns_total'] / waits / 1e6:.1f} ms")
    if record["phase"] == "recovering":
        words.append("connection lost, reconnecting")
    if record.get("abort_refused"):
        words.append(f"can't be aborted: {record['abort_refused']}")
    return ", ".join(words)


class ActionModule(ActionBase):
    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        try:
            result = {**result, **self._run(task_vars or {})}
        except AnsibleConnectionFailure as err:
            result.update(failed=True, unreachable=False, msg=f"{self._task.delegate_to or 'the source'} can't be reached: {err}")
        if result.get("failed") and self._task.args.get("journal") and not self._task.check_mode:
            write_json(os.path.join(self._task.args["journal"], f"{self.vm}.failed"), result.get("msg", ""))
        return result

    def _run(self, task_vars):
        self.args = dict(self._task.args)
        self.controller = os.getppid()
        self.vm = self.args.get("name") or self.args.get("vm")
        self.args.setdefault("source", self._task.delegate_to or task_vars.get("inventory_hostname"))
        if self.args.get("engine") == "remote_ram":
            # Known to the two hosts of this one migration.
            self.args["token"] = secrets.token_hex(16)
        self.interval = self._number("poll_interval", 3)
        wait = str(self.args.get("wait", True)).lower() not in ("false", "no", "0", "off")
        found = self._call(MODULE, self.args, task_vars)
        if found.get("failed"):
            return found
        if self.args.get("state", "migrated") == "aborted":
            return self._await_abort(found, task_vars) if found.get("changed") and not self._task.check_mode else self._clean(found)
        if found.get("already") or found.get("idle"):
            return self._clean(found)
        destination = None
        try:
            if not found.get("attached") and not found.get("started"):
                destination = self._destination(task_vars)
                prepared = self._prepare(destination, found)
                if prepared.get("failed") or prepared.get("present"):
                    return prepared
                if self._task.check_mode:
                    return self._clean(found)
                try:
                    found = self._call(MODULE, {**self.args, "incoming": prepared["incoming"]}, task_vars)
                except AnsibleConnectionFailure:
                    found = {"failed": True, "msg": "the source could not be reached to start the migration"}
                if found.get("failed"):
                    self._release(destination)
                    return found
                display.display(f"{self.vm} -> {self.args['destination']}: started")
            elif found.get("attached"):
                display.display(f"{self.vm}: a migration is under way already; following it")
            if not wait:
                return self._clean(found)
            record = self._watch(found, task_vars)
            if record["engine"] == "remote_ram" and record["result"] == "moved":
                destination = destination or self._destination(task_vars)
                record = self._arrival(destination, record)
            if destination:
                self._release(destination)
        finally:
            if destination:
                destination.cleanup(force=True)
        final = {**self._clean(found), "migration": record, "changed": True}
        if record["result"] != "moved":
            final.update(failed=True, msg=f"{self.vm} was not moved to {self.args['destination']}: {record['reason']}")
        elif record["to"] != self.args["destination"]:
            final.update(failed=True, msg=f"{self.vm} moved to {record['to']} by a migration that was already under way, not to {self.args['destination']}")
        return final

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _number(self, key: str, default: float) -> float:
        try:
            return max(0.1, float(self.args.get(key, default)))
        except (TypeError, ValueError):
            return default  # the module refuses it with a better message

    def _call(self, module: str, args: dict, task_vars: dict) -> dict:
        found = self._execute_module(module_name=module, module_args=args, task_vars=task_vars)
        found.pop("invocation", None)  # it holds the VM's definition, which is nobody's business
        return found

    @staticmethod
    def _clean(found: dict) -> dict:
        """A result without what only this plugin needs."""
        return {key: value for key, value in found.items() if key not in ("request", "record_path", "unit", "absent", "attached", "started", "reason", "idle")}

    def _destination(self, task_vars: dict) -> ActionModule:
        """This action, bound to the destination: its connection, its variables.

        :raises AnsibleActionFail: the inventory doesn't know it.
        """
        name = self.args.get("destination")
        hostvars = task_vars["hostvars"]
        if name not in hostvars:
            raise AnsibleActionFail(f"destination {name!r} is not a host of the inventory")
        variables = dict(hostvars.raw_get(name))
        variables["inventory_hostname"] = name
        task = self._task.copy()
        task.delegate_to = name
        merged = {**task_vars, "ansible_delegated_vars": {name: variables}}
        templar = self._templar.copy_with_new_env(available_variables=variables)
        context = self._play_context.copy()
        context.remote_addr = None
        context = context.set_task_and_variable_override(task=task, variables=merged, templar=templar)
        context.post_validate(templar=templar)
        if not context.remote_addr:
            context.remote_addr = name
        kind = templar.template(variables.get("ansible_connection") or task.connection)
        connection = connection_loader.get(kind, context, task_uuid=task._uuid)
        if connection is None:
            raise AnsibleActionFail(f"destination {name!r} wants the connection plugin {kind!r}, which does not exist")
        if context.become:
            connection.set_become_plugin(become_loader.get(context.become_method))
        keys = task.dump_attrs()
        keys["timeout"] = context.timeout
        keys.pop("retries", None)
        if context.password:
            keys["password"] = context.password
        for plugin in (connection, connection._shell, connection.become):
            if plugin is not None:
                if plugin is connection.become and context.become_pass:
                    keys["become_pass"] = context.become_pass
                plugin.set_options(task_keys=keys, var_options=plugin._resolve_option_variables(variables, templar)
                                   if hasattr(plugin, "_resolve_option_variables") else self._options(variables, templar))  # fmt: skip
        other = ActionModule(
            task=task, connection=connection, play_context=context, loader=self._loader, templar=templar, shared_loader_obj=self._shared_loader_obj
        )
        other.args, other.vm, other.variables = self.args, self.vm, merged
        address = self.args.get("migration_address") or variables.get("vm_migration_address") or variables.get("ansible_host") or name
        other.address = templar.template(address)
        return other

    @staticmethod
    def _options(variables: dict, templar) -> dict:
        return {key: templar.template(value) for key, value in variables.items() if key.startswith("ansible_")}

    def _prepare(self, destination: ActionModule, found: dict) -> dict:
        """Asks the destination whether the VM may come, and waits for its turn."""
        name = self.args["destination"]
        args = {"name": self.vm, "source": self.args["source"], "address": destination.address}
        for key in ("engine", "token", "postcopy_bandwidth", "recovery_timeout", "port_min", "port_max", "max_incoming", "memory_reserve", "state_dir"):
            if self.args.get(key) is not None:
                args[key] = self.args[key]
        args.update(found.get("request") or {})
        told = False
        while True:
            try:
                answer = destination._call(INCOMING, args, destination.variables)
            except AnsibleConnectionFailure as err:
                return {"failed": True, "msg": f"{self.vm} was not moved: its destination {name} can't be reached: {err}"}
            if answer.get("present"):
                return {"changed": False, "already": True, "present": True, "migration": found.get("migration")}
            if found.get("absent"):
                return {"failed": True, "msg": f"{found['reason']}, and not on {name} either"}
            if answer.get("failed"):
                return {"failed": True, "msg": f"{self.vm} was not moved to {name}: {answer.get('msg')}"}
            if not answer.get("busy"):
                return answer
            if not told:
                display.display(f"{self.vm} -> {name}: waits, {', '.join(answer['busy'])} on the way there")
                told = True
            self._check_controller()
            if self.args.get("evacuation"):
                self._low_level_execute_command(self._sign_of_life())
            time.sleep(BUSY_POLL)

    def _release(self, destination: ActionModule) -> None:
        """Gives back the room that was kept. Failing at that costs nothing: what isn't given back lapses."""
        try:
            destination._low_level_execute_command(f"rm -f /run/hecaton/reserved/{shlex.quote(self.vm)}.json")
        except AnsibleConnectionFailure as err:
            display.warning(f"{self.args['destination']} can't be reached to give back the room kept for {self.vm}; it lapses by itself ({err})")

    def _arrival(self, destination: ActionModule, record: dict) -> dict:
        """The record of a migration whose source is needed no more, corrected if the VM ended at the destination meanwhile, of which the source
        knows nothing: its pages go there all the same."""
        state_dir = str(self.args.get("state_dir") or "/var/lib/hecaton")
        command = f"cat {shlex.quote(os.path.join(state_dir, 'incoming', self.vm + '.json'))}"
        deadline = time.monotonic() + ARRIVAL_PATIENCE
        while True:
            try:
                arrival = json.loads(destination._low_level_execute_command(command)["stdout"])
            except (AnsibleConnectionFailure, ValueError):
                return record
            if arrival["id"] == record["id"] and arrival["result"] == "failed":
                record = {**record, "result": "failed", "reason": f"{record['to']}: {arrival['reason']}"}
                self._keep(record)
                display.display(progress_line(self.vm, record["to"], record))
                return record
            if arrival["id"] != record["id"] or arrival["result"] or time.monotonic() > deadline:
                return record
            time.sleep(self.interval)

    def _sign_of_life(self) -> str:
        return f"touch -c {shlex.quote(str(self.args.get('state_dir') or '/var/lib/hecaton'))}/claim"

    def _check_controller(self) -> None:
        """Ends this process, a worker of its own, if the play that it belongs to was killed: nobody hears it, and its signs of life would keep
        the next run from the job."""
        if os.getppid() != self.controller:
            raise AnsibleActionFail("what ran the play has ended; the migration goes on without it")

    def _watch(self, found: dict, task_vars: dict) -> dict:
        """Prints progress until the migration has ended, and returns its last record."""
        command = f"cat {shlex.quote(found['record_path'])}; echo; systemctl is-active {shlex.quote(found['unit'])} || true"
        if self.args.get("evacuation"):
            command = f"{self._sign_of_life()}; {command}"
        lost_since, last, gone = None, "", False
        while True:
            self._check_controller()
            try:
                done = self._low_level_execute_command(command)
                lost_since = None
            except AnsibleConnectionFailure as err:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_PATIENCE:
                    raise
                display.display(f"{self.vm}: {self.args['source']} can't be reached, its migration goes on without us ({str(err).splitlines()[0][:120]})")
                time.sleep(self.interval)
                continue
            text, _newline, active = done["stdout"].strip().rpartition("\n")
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            if record:
                self._keep(record)
                line = progress_line(self.vm, record["to"], record)
                if line != last:
                    display.display(line)
                    last = line
                if record["phase"] == "finished":
                    return record
            if active not in ("active", "activating", "deactivating"):
                if gone:
                    # The unit is gone without a last word: the module says what is known.
                    verdict = self._call(MODULE, {**self.args, "wait": False, "incoming": None}, {**task_vars})
                    if verdict.get("migration"):
                        return verdict["migration"]
                    raise AnsibleActionFail(f"the unit {found['unit']} on {self.args['source']} ended and left no record")
                gone = True
            time.sleep(self.interval if active else 0.5)

    def _keep(self, record: dict) -> None:
        """Writes the migration's state where the play can see it while it runs."""
        if self.args.get("journal"):
            write_json(os.path.join(self.args["journal"], f"{self.vm}.json"), record)

    def _await_abort(self, found: dict, task_vars: dict) -> dict:
        record = self._watch(found, task_vars)
        final = {**self._clean(found), "migration": record}
        if record["result"] != "aborted":
            final.update(failed=True, changed=False, msg=f"the migration of {self.vm} could not be aborted: it {record['result']}"
                         + (f" ({record.get('abort_refused') or record['reason']})" if record.get("abort_refused") or record["reason"] else ""))  # fmt: skip
        return final
