# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Decides how the VMs of a fleet get their memory onto remote_ram: they move once, from one host after the other.

Each host gets a plan of its own, made by ``_planner`` for the fleet as the plans before have left it, so what one host frees another may
take. Facts of all hosts and options in, one plan out (docs/data.md), whose moves come in waves: a wave may begin when the one before
has ended. Nothing here reads or changes anything else.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from ansible_collections.hecaton.fleet.plugins.module_utils._planner import ONBOARDED, Fleet, PlanError, check_pins, make_plan, strangers


def make_walk(facts, options):
    """The plan that onboards the VMs of options.sources, all hosts if there are none. Raises PlanError when the input makes no sense."""
    options.check()
    if options.engine not in ("auto", "precopy"):
        raise PlanError(f"engine {options.engine} can't put a VM's memory on remote_ram: leave engine at auto")
    if options.deadline_s is not None:
        raise PlanError("a walk that onboards VMs has no deadline: leave deadline_s out")
    return _Walk(Fleet(facts), facts, options).plan()


def _runs(vm):
    return vm["state"] in ("running", "paused")


class _Walk:
    """The fleet as it will be after the moves that were planned so far."""

    def __init__(self, fleet, facts, options):
        self.fleet = fleet
        self.options = options
        self.entries = {entry["host"]["name"]: {"host": dict(entry["host"]), "vms": list(entry.get("vms") or [])} for entry in facts}
        self.warnings = []
        self.by_name = defaultdict(list)  # (host, VM) of all hosts
        for name, entry in sorted(self.entries.items()):
            for vm in entry["vms"]:
                self.by_name[vm["name"]].append((name, vm))
        self._check_names()
        self.sources = self._find_sources()
        self.targets = self._find_targets()
        self.todo = defaultdict(dict)  # host to {VM: its facts}, of those that have not moved
        self.blocked = defaultdict(dict)  # host to {VM: entry of the plan}
        self.skipped = []
        self.moves, self.waves, self.peak, self.end = [], [], 0, 0.0

    # hosts

    def _check_names(self):
        for option in ("sources", "destinations"):
            for name in getattr(self.options, option) or ():
                if name not in self.entries:
                    raise PlanError(f"unknown {option[:-1]} host {name!r}: the facts are of {', '.join(sorted(self.entries)) or 'no host at all'}")
        check_pins(self.options, self.entries)
        self.warnings += strangers(self.options, ("exclude", "pinned", "vms"), self.by_name)

    def _find_sources(self):
        found = []
        for name in self.options.sources or sorted(self.entries):
            host, cordon = self.fleet.hosts[name], self.entries[name]["host"].get("cordon") or {}
            reason = ""
            if host.kind is None:
                reason = host.reason
            elif any(each.get("owner") for each in (cordon, *(cordon.get("also") or ()))):
                reason = f"being evacuated, or was and is {host.reason}"
            if not reason:
                found.append(name)
            elif self.options.sources:
                raise PlanError(f"source host {name} is {reason}: nothing can be onboarded there")
            else:
                self.warnings.append(f"{name} is {reason}: its VMs are left alone")
        if not found:
            raise PlanError(f"no source: {'; '.join(self.warnings) or 'there is no host'}")
        return list(dict.fromkeys(found))

    def _find_targets(self):
        """Hosts that may take VMs, and can have their memory on remote_ram."""
        asked = self.options.destinations
        for name, host in self.fleet.hosts.items():
            if host.kind is not None and host.usable:
                able, blockers = host.kind.engines.get("remote_ram", (True, ()))
                if not able:
                    host.usable, host.reason = False, "; ".join(blocker["message"] for blocker in blockers) or "it has no remote_ram"
                elif asked is not None and name not in asked:
                    host.usable, host.reason = False, "not among the destinations asked for"
        return [name for name, host in sorted(self.fleet.hosts.items()) if host.usable]

    # VMs

    def _sort_out(self, name):
        """Who is to move, who can't be told from another, and who stays, with the reason."""
        chosen = None if self.options.vms is None else set(self.options.vms)
        for vm in sorted(self.entries[name]["vms"], key=lambda vm: vm["name"]):
            others = [(host, other) for host, other in self.by_name[vm["name"]] if host != name and _runs(other)]
            if chosen is not None and vm["name"] not in chosen:
                continue
            if not _runs(vm) and any(other.get("uuid") == vm.get("uuid") for _host, other in others):
                continue  # only the definition of one that runs elsewhere
            reason = self._why_not(vm, name)
            if reason:
                self._skip(vm, name, reason)
            elif others:
                # Moves are known by the VM's name, also in the report.
                where = ", ".join(host for host, _other in others)
                self._block(vm, name, f"another VM of its name runs on {where}; rename one, or walk over {name} alone, with the other one excluded")
            else:
                self.todo[name][vm["name"]] = vm

    def _why_not(self, vm, name):
        onboarding = vm.get("onboarding") or {}
        if not _runs(vm):
            return f"it is {vm['state']}"
        if not onboarding.get("usable"):
            return "; ".join(blocker["message"] for blocker in (onboarding.get("blockers") or vm.get("blockers") or ())) or "it can't be onboarded"
        if vm["name"] in self.options.exclude:
            return "excluded"
        if self.options.pinned.get(vm["name"], "") in (None, name):
            return f"it is pinned to {name}"
        return ""

    def _skip(self, vm, name, reason):
        self.skipped.append({"vm": vm["name"], "driver": vm["driver"], "from": name, "reason": reason})

    def _block(self, vm, name, message, code="no_destination"):
        self.blocked[name][vm["name"]] = {"vm": vm["name"], "driver": vm["driver"], "from": name, "blockers": [{"code": code, "message": message}]}

    # the plan

    def plan(self):
        for name in self.sources:
            self._sort_out(name)
        moved = True
        while moved:
            # What found no room may find what others have left since.
            before = len(self.moves)
            for name in self.sources:
                if self.todo[name]:
                    self._plan_host(name)
            moved = len(self.moves) > before
        stuck = [self.blocked[name][vm] for name in self.sources for vm in sorted(self.blocked[name])]
        return {
            "source": self.sources[0] if len(self.sources) == 1 else None,
            "sources": self.sources,
            "deadline_s": None,
            "elapsed_s": round(self.options.elapsed_s, 1),
            "estimated_s": round(self.end, 1),
            "feasible": not stuck,
            "concurrency": {"per_source": self.options.per_source, "per_destination": self.options.per_destination, "peak": self.peak},
            "moves": self.moves,
            "waves": self.waves,
            "blocked": stuck,
            "skipped": self.skipped,
            "hosts": self._hosts(),
            "warnings": list(dict.fromkeys(self.warnings)),
        }

    def _plan_host(self, name):
        """Plan the moves of one host's VMs that have not moved, and apply them to the fleet."""
        todo = self.todo[name]
        targets = [target for target in self.targets if target != name]
        if not targets:
            others = [f"{other} is {host.reason}" for other, host in sorted(self.fleet.hosts.items()) if other != name]
            for vm in todo.values():
                self._block(vm, name, f"no other host can have its memory on remote_ram: {'; '.join(others) or 'there is none'}")
            return
        # Only pre-copy can: asked for, it is also pre-copy's blockers that are named.
        options = dataclasses.replace(
            self.options, sources=[name], destinations=targets, vms=list(todo), exclude=[], engine="precopy", onboard=True,
            pinned={vm: pin for vm, pin in self.options.pinned.items() if vm in todo},
        )  # fmt: skip
        plan = make_plan(list(self.entries.values()), options)
        self.warnings += plan["warnings"]
        for entry in plan["blocked"]:
            self.blocked[name][entry["vm"]] = entry
        if plan["moves"]:
            self.waves.append(len(plan["moves"]))
            self.peak = max(self.peak, plan["concurrency"]["peak"])
            for move in plan["moves"]:
                self._apply(move)
            self.end += plan["estimated_s"]

    def _apply(self, move):
        vm = self.todo[move["from"]].pop(move["vm"])
        self.blocked[move["from"]].pop(move["vm"], None)
        source, target = self.entries[move["from"]], self.entries[move["to"]]
        source["vms"].remove(vm)
        # Its definition may have been there.
        target["vms"] = [other for other in target["vms"] if other["name"] != vm["name"]] + [vm]
        # Memory that its guest has never touched is free there already.
        source["host"]["memory_available_mib"] += self._frees(vm)
        target["host"]["memory_available_mib"] -= vm["memory_mib"]
        start = round(self.end + move["estimated_start_s"], 1)
        more = {"engine_reason": ONBOARDED, "order": len(self.moves) + 1, "wave": len(self.waves), "estimated_start_s": start}
        self.moves.append({**move, **more})

    @staticmethod
    def _frees(vm):
        """MiB that a host has more once a VM has left; what is not known does not count."""
        return min(vm["memory_mib"], vm.get("memory_resident_mib") or 0)

    def _hosts(self):
        incoming = defaultdict(int)
        for move in self.moves:
            incoming[move["to"]] += 1
        return [
            {
                "name": name,
                "cordoned": host.cordoned,
                "usable": host.usable,
                "reason": host.reason,
                "memory_free_before_mib": round(host.free),
                "memory_free_after_mib": round(self.entries[name]["host"].get("memory_available_mib", 0) - self._promised(name)),
                "incoming": incoming[name],
            }
            for name, host in sorted(self.fleet.hosts.items())
        ]

    def _promised(self, name):
        """What VMs that are arriving by other moves will need, as it is in the host's free memory before."""
        return sum(vm["memory_mib"] for vm in self.entries[name]["vms"] if vm["state"] == "incoming")
