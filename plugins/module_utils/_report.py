# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""The report of an evacuation, as data: what became of each VM, decided by where it now is.

Pure functions. ``build`` makes the report, ``SCHEMA`` says what is in it (docs/report.schema.json is the same),
``dump`` writes it as text. The page for people is in ``_report_html``.
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone

MAX_SAMPLES = 600
LOST = "lost: it runs on no host"    # how the reason starts for a VM that nobody found


class ReportError(Exception):
    """The report can't be made from what was given. The message is a sentence for the user."""


# --- What the data looks like -----------------------------------------------------------------------------------------

TEXT = {"type": "string"}
NAME = {"type": "string", "minLength": 1}
NUMBER = {"type": "number"}
POSITIVE = {"type": "number", "minimum": 0}
COUNT = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}


def _or_null(schema: dict, **more) -> dict:
    return {**schema, "type": [schema["type"], "null"], **more}


def _list(items: dict, **more) -> dict:
    return {"type": "array", "items": items, **more}


def _object(required: dict, optional: dict | None = None, closed: bool = False, **more) -> dict:
    schema = {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required), **more}
    if closed:
        schema["additionalProperties"] = False
    return schema


SAMPLE = {
    "description": "[seconds since the migration started, phase, MiB/s, MiB that remain]",
    "type": "array",
    "prefixItems": [NUMBER, TEXT, _or_null(POSITIVE), _or_null(POSITIVE)],
    "minItems": 4,
    "maxItems": 4,
}

PLAN = _object({}, {
    "source": _or_null(NAME),  # null when VMs leave several hosts, as on the way back or when they are onboarded
    "deadline_s": _or_null(POSITIVE),
    "elapsed_s": _or_null(POSITIVE),  # of the deadline, when the plan was made
    "estimated_s": _or_null(POSITIVE),
    "feasible": FLAG,
    "moves": _list(_object({"vm": NAME}, {
        "driver": _or_null(TEXT),
        "from": _or_null(NAME),
        "to": _or_null(NAME),
        "engine": _or_null(TEXT),
        "engine_reason": _or_null(TEXT),
        "onboard": FLAG,
        "memory_mib": _or_null(POSITIVE),
        "dirty_rate_mib_s": _or_null(POSITIVE),
        "precopy_timeout_s": _or_null(POSITIVE),
        "order": _or_null(COUNT),
        "wave": _or_null(COUNT),
        "estimated_start_s": _or_null(POSITIVE),
        "estimated_s": _or_null(POSITIVE),
        "reason": _or_null(TEXT),
    })),
    "waves": _list(COUNT),  # moves of each, when VMs are onboarded
    "blocked": _list(_object({"vm": NAME}, {
        "driver": _or_null(TEXT),
        "blockers": _list(_object({"code": NAME, "message": TEXT})),
    })),
    "skipped": _list(_object({"vm": NAME}, {"driver": _or_null(TEXT), "reason": _or_null(TEXT)})),
    "hosts": _list(_object({"name": NAME}, {
        "usable": FLAG,
        "reason": _or_null(TEXT),
        "memory_free_before_mib": _or_null(NUMBER),
        "memory_free_after_mib": _or_null(NUMBER),
        "incoming": _or_null(COUNT),
    })),
    "warnings": _list(TEXT),
})

#: What the kernel engine counted: pages by cause, faults and how long they waited (buckets: below 1 us, then [2^(n-1), 2^n) us).
REMOTE_RAM = _object({}, {
    **{name: COUNT for name in ("pages", "pages_ahead", "pages_zero", "pages_demand", "pages_bubble", "pages_background", "pages_missing",
                                "bytes_ahead", "bytes_after", "faults_nowait", "faults_retry", "faults_plain", "faults_joined",
                                "wait_ns_max", "wait_ns_total", "reconnects", "switch_us", "late_writes")},
    "wait_hist": _list(COUNT),
})

MIGRATION = _object({"vm": NAME}, {
    "driver": _or_null(TEXT),
    "engine": _or_null(TEXT),
    "from": _or_null(NAME),
    "to": _or_null(NAME),
    "phase": _or_null(TEXT),
    "result": {"enum": ["moved", "failed", "aborted", None]},
    "reason": _or_null(TEXT),
    "started": _or_null(NUMBER),
    "switched": _or_null(NUMBER),
    "finished": _or_null(NUMBER),
    "downtime_ms": _or_null(POSITIVE),
    "total_ms": _or_null(POSITIVE),
    "bytes": _or_null(COUNT),
    "samples": _list(SAMPLE),
    "remote_ram": _or_null(REMOTE_RAM),
})

CLIENT = _object({"name": NAME, "requests": COUNT, "failed": COUNT}, {
    "worst_ms": _or_null(POSITIVE),
    "p50_ms": _or_null(POSITIVE),
    "p99_ms": _or_null(POSITIVE),
})

VM = _object({
    "name": NAME,
    "driver": _or_null(TEXT),
    "result": {"enum": ["moved", "failed", "skipped", "blocked"]},
    "reason": TEXT,
    "engine": _or_null(TEXT),
    "from": NAME,
    "to": _or_null(NAME, description="where it went, or was to go"),
    "location": _or_null(NAME, description="where it was found at the end; null when it was found nowhere, or nobody looked"),
    "downtime_ms": _or_null(POSITIVE),
    "total_ms": _or_null(POSITIVE),
    "bytes": _or_null(COUNT),
    "started_s": _or_null(NUMBER, description="seconds since the evacuation started; negative when an earlier run started it"),
    "switched_s": _or_null(NUMBER),
    "finished_s": _or_null(NUMBER),
    "memory_mib": _or_null(POSITIVE),
    "dirty_rate_mib_s": _or_null(POSITIVE),
    "precopy_timeout_s": _or_null(POSITIVE, description="seconds of pre-copy that the plan allows"),
    "precopy_s": _or_null(POSITIVE, description="seconds from its start to the switch"),
    "planned_start_s": _or_null(NUMBER, description="when it was to start by the plan, counted as started_s"),
    "planned_finish_s": _or_null(NUMBER),
    "onboarded": {**FLAG, "description": "its memory was elsewhere, and is on remote_ram now"},
    "samples": _list(SAMPLE, maxItems=MAX_SAMPLES),
}, {
    "remote_ram": {**REMOTE_RAM, "description": "only for the engine remote_ram: what the kernel counted"},
}, closed=True)

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Report of the evacuation of one hypervisor, of the return of its VMs, or of VMs whose memory went onto remote_ram",
    **_object({
        "format": {"const": 1},
        "host": {**NAME, "description": "a hypervisor; or the group of all, when VMs were onboarded"},
        "direction": {
            "enum": ["away", "back", "onboard"],
            "description": "away: the VMs were to leave the host; back: they were to return to it; onboard: they were to have their memory on remote_ram",
        },
        "started": {"type": "string", "format": "date-time"},
        "finished": {"type": "string", "format": "date-time"},
        "failed": {**COUNT, "description": "VMs that should have moved and did not: those with the result failed or blocked"},
        "deadline_s": _or_null(POSITIVE),
        "elapsed_s": POSITIVE,
        "freed_s": _or_null(NUMBER, description="seconds until the last VM had left with all of its memory, or was back, or onboarded; null when one did not"),
        "empty": {**FLAG, "description": "no VM runs on the host, and none still fetches its memory from it; false when VMs were onboarded"},
        "check": {**FLAG, "description": "nothing was moved: this is what would happen"},
        "vms": _list(VM),
        "plan": PLAN,
        "clients": _list(CLIENT),
    }, closed=True),
}

_TYPES = {
    "object": ("a dictionary", lambda v: isinstance(v, dict)),
    "array": ("a list", lambda v: isinstance(v, (list, tuple))),
    "string": ("a string", lambda v: isinstance(v, str)),
    "boolean": ("true or false", lambda v: isinstance(v, bool)),
    "null": ("null", lambda v: v is None),
    "number": ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)),
    "integer": ("a whole number", lambda v: _TYPES["number"][1](v) and float(v).is_integer()),
}


def validate(value, schema: dict, where: str) -> None:
    """Checks ``value`` against the part of JSON Schema that this file uses.

    :param where: how the message names the value.
    :raises ReportError: the first thing that is wrong, with the place where it is.
    """
    if "const" in schema and value != schema["const"]:
        raise ReportError(f"{where} must be {schema['const']!r}, not {_short(value)}.")
    if "enum" in schema and value not in schema["enum"]:
        raise ReportError(f"{where} must be one of {', '.join('null' if v is None else v for v in schema['enum'])}, not {_short(value)}.")
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_TYPES[name][1](value) for name in types):
            raise ReportError(f"{where} must be {' or '.join(_TYPES[name][0] for name in types)}, not {_short(value)}.")
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        raise ReportError(f"{where} must not be empty.")
    if isinstance(value, (int, float)) and value < schema.get("minimum", -math.inf):
        raise ReportError(f"{where} must not be less than {schema['minimum']}, and is {value}.")
    if isinstance(value, (list, tuple)):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            raise ReportError(f"{where} has {len(value)} items, which is not the number it must have.")
        items = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        for number, (item, item_schema) in enumerate(zip(value, items)):
            validate(item, item_schema, f"{where}[{number}]")
    if isinstance(value, dict):
        _validate_object(value, schema, where)


def _validate_object(value: dict, schema: dict, where: str) -> None:
    properties = schema.get("properties", {})
    for key in schema.get("required", []):
        if key not in value:
            raise ReportError(f"{where} lacks '{key}'.")
    for key, item in value.items():
        if key in properties:
            validate(item, properties[key], f"{where}.{key}")
        elif schema.get("additionalProperties") is False:
            raise ReportError(f"{where} must not have '{key}'.")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- The report -------------------------------------------------------------------------------------------------------

def build(plan: dict, migrations: list, locations: dict, host: str, started: float, finished: float,
          clients: list | None = None, check: bool = False, direction: str = "away") -> dict:
    """Makes the report.

    :param plan: what evacuation_plan returned. ``{}`` when there is none.
    :param migrations: states of the migrations of this evacuation. Of several for one VM the last to start counts.
    :param locations: where each VM was found at the end: name of the VM → name of the host, or None when it runs nowhere.
        A VM that is missing here was not looked for.
    :param host: the hypervisor that was to become empty, or that the VMs were to return to; or what the hypervisors are called whose VMs
        were to be onboarded.
    :param started: seconds since the epoch, like ``finished``.
    :param clients: what clients outside saw.
    :param check: nothing was moved; the report says what would be.
    :param direction: ``away`` from the host, ``back`` to it, or ``onboard``.
    :raises ReportError: the input is not what it should be.
    """
    validate(plan, PLAN, "plan")
    validate(migrations, _list(MIGRATION), "migrations")
    validate(locations, {"type": "object"}, "locations")
    for vm, place in locations.items():
        validate(vm, NAME, "a name in locations")
        validate(place, _or_null(NAME), f"locations.{vm}")
    validate(host, NAME, "host")
    validate(started, NUMBER, "started")
    validate(finished, NUMBER, "finished")
    validate(clients or [], _list(CLIENT), "clients")
    if finished < started:
        raise ReportError(f"The evacuation can't have finished ({finished}) before it started ({started}).")
    away, back, onboard = (direction == known for known in ("away", "back", "onboard"))
    if away and (plan.get("source") or host) != host:
        raise ReportError(f"The plan is for {plan['source']}, but the report is for {host}.")

    last = _last_attempts(migrations)
    vms = []
    empty = True
    # Of VMs that are not to be onboarded it does not matter what else moves them.
    for name, (fate, entry) in _fates(plan, {} if onboard else last, locations, host if away else None).items():
        migration = last.get(name, {})
        source = host if away else (migration.get("from") or entry.get("from") or "unknown")
        place = locations.get(name)
        if back and place not in (None, source, host):
            result, reason, gone = "failed", f"is on {place}, not back on {host}", True
        elif onboard and fate != "move":
            result, reason, gone = _outcome(name, fate, entry, {}, {name: source}, source, check)
            migration, reason = {}, reason if place in (None, source) else f"{reason}; it is on {place} now"
        elif onboard and not migration and place not in (None, source):
            result, reason, gone = "failed", f"is on {place}, where no migration of this run brought it: its memory is as it was", True
        else:
            result, reason, gone = _outcome(name, fate, entry, migration, locations, source, check)
        vms.append(_vm(name, entry, migration, result, reason, place, source, started, plan.get("elapsed_s") or 0))
        empty = empty and gone
    if not away:
        empty = back and host not in locations.values()

    report = {
        "format": 1,
        "host": host,
        "direction": direction,
        "started": _timestamp(started),
        "finished": _timestamp(finished),
        "failed": sum(vm["result"] in ("failed", "blocked") for vm in vms),
        "deadline_s": plan.get("deadline_s"),
        "elapsed_s": round(finished - started, 3),
        "freed_s": _freed(vms, empty or not away),
        "empty": empty,
        "check": check,
        "vms": vms,
        "plan": plan,
        "clients": [{"worst_ms": None, "p50_ms": None, "p99_ms": None, **client} for client in clients or []],
    }
    validate(report, SCHEMA, "the report")
    return report


def _freed(vms: list, done: bool) -> float | None:
    """When the last VM had moved, if all that were to move did."""
    ends = [vm["finished_s"] for vm in vms if vm["result"] == "moved"]
    if not done or not ends or None in ends or any(vm["result"] in ("failed", "blocked") for vm in vms):
        return None
    return max(ends)


def _last_attempts(migrations: list) -> dict:
    """The last migration of each VM."""
    last: dict = {}
    for migration in migrations:
        other = last.get(migration["vm"])
        if other is None or (migration.get("started") or 0) >= (other.get("started") or 0):
            last[migration["vm"]] = migration
    return last


def _fates(plan: dict, last: dict, locations: dict, host: str | None) -> dict:
    """What was to become of each VM: name → (move | blocked | skipped | stray, the plan's entry for it).

    :param host: the host on which no VM should be; None if there is none.
    """
    fates: dict = {}
    for fate, key in (("move", "moves"), ("blocked", "blocked"), ("skipped", "skipped")):
        for entry in plan.get(key, []):
            fates.setdefault(entry["vm"], (fate, entry))
    for name in last:
        if fates.get(name, ("stray",))[0] != "move":    # an earlier run started it, and this run saw it through
            fates[name] = ("move", fates.get(name, ("", {}))[1])
    for name in sorted(vm for vm, place in locations.items() if host and place == host):
        fates.setdefault(name, ("stray", {}))
    return fates


def _outcome(name: str, fate: str, entry: dict, migration: dict, locations: dict, host: str, check: bool) -> tuple[str, str, bool]:
    """What became of a VM: result, reason, and whether ``host`` is rid of it.

    Where the VM was found decides; what its migration claims only explains.
    """
    place = locations.get(name)
    known = name in locations
    if place not in (None, host):
        return _found_elsewhere(fate, entry, migration, place, host)
    if fate == "blocked":
        result, reason = "blocked", "; ".join(blocker["message"] for blocker in entry.get("blockers", [])) or "blocked, without a reason"
    elif fate == "skipped":
        result, reason = "skipped", entry.get("reason") or "skipped, without a reason"
    elif check:
        result = "skipped"
        reason = f"check mode: would move to {entry.get('to')}" if fate == "move" else f"is on {host}, but not in the plan"
    elif fate == "stray":
        result, reason = "failed", f"is on {host}, but not in the plan"
    else:
        result, reason = "failed", _why_not_moved(migration, known, place, host)
    return result, reason, known and place is None


def _found_elsewhere(fate: str, entry: dict, migration: dict, place: str, host: str) -> tuple[str, str, bool]:
    """The VM was found on a host that is not the one to empty."""
    planned = migration.get("to") or entry.get("to")
    claim = migration.get("result")
    if migration and claim is None:
        phase = migration.get("phase") or "unknown"
        return "failed", f"runs on {place}, but its migration has not finished (phase {phase}): keep {host} up, memory may still be there", False
    notes = [migration["reason"]] if claim == "moved" and migration.get("reason") else []
    if claim in ("failed", "aborted"):
        notes.append(f"runs on {place}, although its migration was reported as {claim}{_because(migration)}")
    elif not migration:
        before = {"blocked": "was blocked", "skipped": "was to be skipped"}.get(fate, "no migration of this run moved it")
        notes.append(f"{before}, but runs on {place}")
    if planned and planned != place:
        notes.append(f"was to go to {planned} and is on {place}")
    return "moved", "; ".join(notes), True


def _why_not_moved(migration: dict, known: bool, place: str | None, host: str) -> str:
    """Why a VM that was to move is not on another host."""
    claim = migration.get("result")
    if not known:
        says = {"moved": "its migration says that it moved", "failed": f"its migration failed{_because(migration)}",
                "aborted": f"its migration was aborted{_because(migration)}"}
        return f"nobody verified where it runs; {says.get(claim, 'its migration has not finished' if migration else 'no migration was started')}"
    lost = "" if place else f"{LOST}; "
    if claim == "moved":
        return f"{lost}its migration says that it moved to {migration.get('to')}" + (f", but it is still on {host}" if place else "")
    if claim:
        return f"{lost}its migration {'failed' if claim == 'failed' else 'was aborted'}{_because(migration)}"
    if migration:
        return f"{lost}its migration has not finished (phase {migration.get('phase') or 'unknown'}){_because(migration)}"
    return f"{lost}no migration was started"


def _because(migration: dict) -> str:
    return f": {migration['reason']}" if migration.get("reason") else ""


def _vm(name: str, entry: dict, migration: dict, result: str, reason: str, place: str | None, host: str, started: float, passed: float) -> dict:
    """:param passed: how long the evacuation had lasted when the plan was made, whose times count from there."""
    def since(key):
        moment = migration.get(key)
        return None if moment is None else round(moment - started, 3)

    def first(key):
        value = migration.get(key)
        return entry.get(key) if value is None else value

    counted = migration.get("remote_ram")
    begin, takes = entry.get("estimated_start_s"), entry.get("estimated_s")
    began, switched = migration.get("started"), migration.get("switched")
    return {
        "name": name,
        "driver": first("driver"),
        "result": result,
        "reason": reason,
        "engine": first("engine"),
        "from": first("from") or host,
        "to": place if result == "moved" else first("to"),
        "location": place,
        "downtime_ms": migration.get("downtime_ms"),
        "total_ms": migration.get("total_ms"),
        "bytes": migration.get("bytes"),
        "started_s": since("started"),
        "switched_s": since("switched"),
        "finished_s": since("finished"),
        "memory_mib": entry.get("memory_mib"),
        "dirty_rate_mib_s": entry.get("dirty_rate_mib_s"),
        "precopy_timeout_s": entry.get("precopy_timeout_s"),
        "precopy_s": None if began is None or switched is None else max(0, round(switched - began, 3)),
        "planned_start_s": None if begin is None else round(passed + begin, 3),
        "planned_finish_s": None if begin is None or takes is None else round(passed + begin + takes, 3),
        "onboarded": bool(entry.get("onboard")) and result == "moved" and bool(migration),
        "samples": _thin(migration.get("samples", [])),
        **({"remote_ram": {key: counted[key] for key in REMOTE_RAM["properties"] if key in counted}} if counted else {}),
    }


def _thin(samples: list) -> list:
    """At most MAX_SAMPLES of them, evenly, with the first and the last."""
    if len(samples) <= MAX_SAMPLES:
        return samples
    return [samples[i * (len(samples) - 1) // (MAX_SAMPLES - 1)] for i in range(MAX_SAMPLES)]


def _timestamp(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError) as err:
        raise ReportError(f"{moment} is not a moment in seconds since the epoch.") from err


# --- Out --------------------------------------------------------------------------------------------------------------

def brief(report: dict) -> dict:
    """The report without the samples, which are most of its size."""
    return {**report, "vms": [{**vm, "samples": []} for vm in report["vms"]]}


def table(report: dict) -> str:
    """The report as text for a terminal: a line per VM, and the reason under it where there is one."""
    heads = ("VM", "result", "from", "to", "engine", "pause", "took", "sent")
    rows = [heads]
    for vm in report["vms"]:
        rows.append((
            vm["name"], vm["result"], vm["from"], vm["to"] or "-", vm["engine"] or "-",
            "-" if vm["downtime_ms"] is None else f"{vm['downtime_ms']:g} ms",
            "-" if vm["total_ms"] is None else f"{vm['total_ms'] / 1000:.1f} s",
            "-" if vm["bytes"] is None else f"{vm['bytes'] / 1048576:.0f} MiB",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.rjust(width) if column > 4 else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
        if number and report["vms"][number - 1]["reason"]:
            lines.append(f"    {report['vms'][number - 1]['reason']}")
    for client in report["clients"]:
        worst = "" if client["worst_ms"] is None else f", worst {client['worst_ms']:.0f} ms"
        lines.append(f"client {client['name']}: {client['requests']} requests, {client['failed']} failed{worst}")
    return "\n".join(lines)


def dump(report: dict) -> str:
    """The report as the text of report.json: indented, but with each sample on one line."""
    try:
        return _dump(report, "\n") + "\n"
    except (TypeError, ValueError) as err:
        raise ReportError(f"The report can't be written as JSON: {err}.") from err


def _dump(value, newline: str) -> str:
    inner = newline + "  "
    if isinstance(value, dict) and value:
        return "{" + inner + ("," + inner).join(f"{json.dumps(str(key))}: {_dump(item, inner)}" for key, item in value.items()) + newline + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple)) for item in value):
        return "[" + inner + ("," + inner).join(_dump(item, inner) for item in value) + newline + "]"
    return json.dumps(value, allow_nan=False)
