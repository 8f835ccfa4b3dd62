# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""The report of an evacuation as one HTML page, for people.

``render`` is a pure function of the report that ``_report.build`` makes. The page needs nothing but itself: no script,
no font, no network. Every figure stands on it as text; colours and shapes only repeat what the text says.
"""

from __future__ import annotations

import html
import math
import re

from ansible_collections.hecaton.fleet.plugins.module_utils._report import LOST

MANY = 24           # more VMs than this are drawn in a denser way
BINS = 160          # steps of the chart of rates
UNSAFE = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
SPARK_BINS = 60     # steps of the small chart of one VM

STATES = {          # result → its label, its class, and the shape that goes with it
    "moved": ("moved", "ok", "✓"),
    "failed": ("failed", "bad", "✕"),
    "blocked": ("blocked", "warn", "■"),
    "skipped": ("skipped", "calm", "–"),
    "would": ("would move", "plan", "→"),
}


def render(report: dict) -> str:
    """The page, as text."""
    vms = report["vms"]
    axis = _Axis(report)
    body = [
        _head(report),
        _tiles(report),
        _left(report),
        _warnings(report),
        _timeline(report, axis),
        _pauses(report),
        _rates(report, axis),
        _fetches(report),
        _waits(report),
        _planned(report),
        _table(report),
        f'<div class="pair">{_hosts(report)}{_clients(report)}</div>',
    ]
    footer = f'<footer><p>{_plural(len(vms), "VM")} · <a href="report.json">report.json</a> has every figure of this page</p></footer>'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'; img-src data:">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f'<title>{"Check: " if report["check"] else ""}{_what(report)} {_text(report["host"])}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n{DEFS}\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n{footer}\n</body>\n</html>\n"
    )


# --- Text -------------------------------------------------------------------------------------------------------------

def _text(value) -> str:
    """Text that is safe between tags and in attributes.

    Characters that HTML can't hold, and those that turn the direction of what follows, become a visible one.
    """
    return html.escape(re.sub(UNSAFE, "\ufffd", str(value)), quote=True)


def _name(value) -> str:
    """A name that somebody chose. ``bdi`` keeps letters that run from right to left from reordering what stands around it."""
    return f"<bdi>{_text(value)}</bdi>"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _number(value: float) -> str:
    """Three digits that count, and no more."""
    value = round(value, 6)
    if value >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 0:
        return "−" + duration(-seconds)
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def limit(seconds: float) -> str:
    """A deadline, which somebody chose: a round number stays one."""
    if seconds < 60:
        return f"{seconds:g} s"
    return duration(seconds).replace(" min 00 s", " min").replace(" h 00 min", " h")


def milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 60000:
        return duration(value / 1000)
    if value < 999.5:
        return f"{_number(value)} ms"
    return f"{value / 1000:.2f} s" if value < 9995 else f"{value / 1000:.1f} s"


def mebibytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("MiB", "GiB"):
        if abs(value) < 1024:
            return f"{_number(value)} {unit}"
        value /= 1024
    return f"{_number(value)} TiB"


def octets(value: int | None) -> str:
    if value is None:
        return "–"
    if value < 1024:
        return f"{value} B"
    return f"{_number(value / 1024)} KiB" if value < 1048576 else mebibytes(value / 1048576)


def rate(value: float | None) -> str:
    return "–" if value is None else f"{_number(value)} MiB/s"


def _data(value, shown: str) -> str:
    """A figure: what a person reads, with the value of report.json beside it."""
    return "–" if value is None else f'<data value="{_text(value)}">{_text(shown)}</data>'


def _state(report: dict, vm: dict) -> str:
    return "would" if report["check"] and vm["result"] == "skipped" and vm["to"] else vm["result"]


def _badge(state: str) -> str:
    label, kind, shape = STATES[state]
    return f'<span class="badge {kind}"><span aria-hidden="true">{shape}</span> {label}</span>'


def _section(title: str, note: str, content: str, kind: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="{kind}"><h2>{title}</h2>{note}{content}</section>'


def _of(report: dict, *states: str) -> list:
    return [vm for vm in report["vms"] if _state(report, vm) in states]


# --- Top of the page --------------------------------------------------------------------------------------------------

def _what(report: dict) -> str:
    return {"back": "Return to", "onboard": "Onboarding of VMs of"}.get(report["direction"], "Evacuation of")


def _back(report: dict) -> bool:
    return report["direction"] == "back"


def _run(report: dict) -> str:
    return {"back": "return", "onboard": "onboarding"}.get(report["direction"], "evacuation")


def _onboard(report: dict) -> bool:
    return report["direction"] == "onboard"


def _head(report: dict) -> str:
    host = _name(report["host"])
    lost = [vm for vm in _of(report, "failed") if vm["reason"].startswith(LOST)]
    left = len(_of(report, "failed", "blocked", "skipped")) - len(lost)
    if report["check"]:
        would = len(_of(report, "would"))
        # Who is not onboarded stays anyway.
        stay = len(_of(report, "blocked")) if _onboard(report) else len(report["vms"]) - would
        kind = "plan" if not stay else "warn"
        does = f"be onboarded on {host}" if _onboard(report) else f"return to {host}" if _back(report) else f"leave {host}"
        title = f"Check: {_plural(would, 'VM')} would {does}" + (f", {stay} would stay" if stay else "")
    elif _onboard(report):
        left = len(_of(report, "failed", "blocked")) - len(lost)
        kind = "bad" if report["failed"] else "ok"
        title = f"{_plural(len(_of(report, 'moved')), 'VM')} onboarded on {host}"
        title += "".join(f", {number} {word}" for number, word in ((left, "not"), (len(lost), "lost")) if number)
    elif _back(report):
        kind = "ok" if not left and not lost else "bad" if report["failed"] else "warn"
        title = f"{_plural(len(_of(report, 'moved')), 'VM')} returned to {host}"
        title += "".join(f", {number} {word}" for number, word in ((left, "did not"), (len(lost), "lost")) if number)
    elif report["empty"] and lost:
        kind, title = "bad", f"{host} is empty, but {_plural(len(lost), 'VM')} {'is' if len(lost) == 1 else 'are'} lost"
    elif report["empty"]:
        kind, title = "ok", f"{host} is empty"
    else:
        kind = "bad" if report["failed"] else "warn"
        title = f"{host} is not empty: {_plural(left, 'VM')} {'is' if left == 1 else 'are'} left"
        if lost:
            title += f", {len(lost)} lost"
    shape = {"ok": "✓", "bad": "✕", "warn": "!", "plan": "→"}[kind]
    when = f'<p class="when">From <time>{_text(_moment(report["started"]))}</time> to <time>{_text(_moment(report["finished"]))}</time></p>'
    return (f'<header class="head {kind}"><p class="kicker">{_run(report).capitalize()}{", check mode" if report["check"] else ""}</p>'
            f'<h1><span class="mark" aria-hidden="true">{shape}</span><span>{title}</span></h1>{_against_deadline(report)}{when}</header>')


def _moment(timestamp: str) -> str:
    return timestamp.replace("T", " ").replace("Z", " UTC")


def _against_deadline(report: dict) -> str:
    """The sentence that says how long it took against how long it may take, and the bar that shows it."""
    plan, deadline = report["plan"], report["deadline_s"]
    freed = None if report["check"] or deadline is None else report["freed_s"]
    estimated = plan.get("estimated_s")
    planned = None if estimated is None else estimated + (plan.get("elapsed_s") or 0)
    took = planned if report["check"] else report["elapsed_s"] if freed is None else freed
    if took is None:
        return '<p class="lead">The plan gives no estimate of the time.</p>'
    shown = f"<strong>{duration(took)}</strong>"
    verb = "It would take about" if report["check"] else "It took" if freed is None else "All were back after" if _back(report) else "It was free after"
    if deadline is None:
        return f'<p class="lead">{verb} {shown}; there was no deadline.</p>'
    late = took - deadline
    verdict = f'<strong class="late">{duration(late)} too long</strong>' if late > 0 else f"{duration(-late)} to spare"
    longest = max(took, deadline) or 1
    edge = 100 * deadline / longest
    drawn = f'<rect class="track" width="{edge:.2f}%" height="14" rx="3"/>'
    drawn += f'<rect class="fill" width="{100 * min(took, deadline) / longest:.2f}%" height="14" rx="3"/>'
    if late > 0:
        drawn += f'<rect class="over" x="{edge:.2f}%" width="{100 - edge:.2f}%" height="14" rx="3"/>'
    return (f'<p class="lead">{verb} {shown} of the {limit(deadline)} allowed: {verdict}.</p>'
            f'<svg class="deadline" width="100%" height="14" aria-hidden="true">{drawn}</svg>')


def _tiles(report: dict) -> str:
    vms = report["vms"]
    tiles = []
    if report["check"]:
        would = _of(report, "would")
        tiles.append(("Would move", f"{len(would)} of {len(vms)}", mebibytes(sum(vm["memory_mib"] or 0 for vm in would)) + " of memory"))
        tiles.append(("Blocked", str(len(_of(report, "blocked"))), "cannot move"))
        tiles.append(("Skipped", str(len(_of(report, "skipped"))), "left out on purpose"))
        feasible = report["plan"].get("feasible")
        tiles.append(("Plan", {True: "feasible", False: "not feasible"}.get(feasible, "–"), "all VMs, in time" if feasible else "see below"))
    else:
        paused = _paused(vms)
        sent = [vm["bytes"] for vm in vms if vm["bytes"] is not None]
        moved = _of(report, "moved")
        tiles.append(("Moved", f"{len(moved)} of {len(vms)}", mebibytes(sum(vm["memory_mib"] or 0 for vm in moved)) + " of memory"))
        counts = [f"{len(_of(report, state))} {state}" for state in ("failed", "blocked", "skipped") if _of(report, state)]
        tiles.append(("Not moved", str(len(_of(report, "failed", "blocked", "skipped"))), ", ".join(counts) or "none"))
        tiles.append(("Longest pause", milliseconds(paused[0]["downtime_ms"]) if paused else "–", _name(paused[0]["name"]) if paused else "no VM was paused"))
        tiles.append(("Median pause", milliseconds(_rank(paused, 0.5)), f"of {_plural(len(paused), 'VM')}"))
        took = report["elapsed_s"]
        mean = f"{rate(sum(sent) / 1048576 / took)} over {duration(took)}" if sent and took else "nothing was sent"
        tiles.append(("Data sent", octets(sum(sent)) if sent else "–", mean))
        counted = _counted(report)
        if counted:
            demand, pages = (sum(each.get(key, 0) for each in counted) for key in ("pages_demand", "pages"))
            late = _wait(_pooled(counted), 0.99)
            note = "no guest waited for one" if late is None else f"99 % of waits within {milliseconds(late)}"
            tiles.append(("Pages on demand", f"{demand:,}", (f"{100 * demand / pages:.2g} % of all; " if pages else "") + note))
    cells = "".join(f'<div class="tile"><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>' for label, value, note in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _left(report: dict) -> str:
    """Every VM that did not move, by name, with why."""
    vms = _of(report, "failed", "blocked", "skipped")
    if not vms:
        return ""
    blockers = {entry["vm"]: entry.get("blockers", []) for entry in report["plan"].get("blocked", [])}
    groups = []
    for state, title in (("failed", "Failed"), ("blocked", "Blocked"), ("skipped", "Skipped")):
        items = []
        for vm in _of(report, state):
            named = blockers.get(vm["name"]) if state == "blocked" else None
            if named:
                why = "".join(f'<li><code>{_text(b["code"])}</code> {_text(b["message"])}</li>' for b in named)
                why = f'<ul class="blockers">{why}</ul>'
            else:
                why = f"<p>{_text(vm['reason'])}</p>"
            items.append(f'<li><div class="who">{_badge(state)} <strong>{_name(vm["name"])}</strong></div>{why}</li>')
        if items:
            groups.append(f'<h3>{title} <span class="count">{len(items)}</span></h3><ul class="left">{"".join(items)}</ul>')
    title = "What would stay, and why" if report["check"] else "What did not move, and why"
    return _section(title, _codes(report, blockers), "".join(groups), "left-behind")


def _codes(report: dict, blockers: dict) -> str:
    """How often each blocker occurs, when there are several VMs to count."""
    names = {vm["name"] for vm in _of(report, "blocked")}
    counts: dict = {}
    for name, found in blockers.items():
        for code in {blocker["code"] for blocker in found} if name in names else ():
            counts[code] = counts.get(code, 0) + 1
    if len(names) < 2:
        return ""
    return "Blockers: " + ", ".join(f"<code>{_text(code)}</code> on {_plural(n, 'VM')}" for code, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def _warnings(report: dict) -> str:
    warnings = report["plan"].get("warnings", [])
    return _section("Warnings of the plan", "", f'<ul class="plain">{"".join(f"<li>{_text(w)}</li>" for w in warnings)}</ul>') if warnings else ""


# --- Timeline ---------------------------------------------------------------------------------------------------------

class _Axis:
    """The axis of time, the same for the timeline and for the rates."""

    def __init__(self, report: dict):
        moments = [0.0, report["elapsed_s"]]
        for vm in report["vms"]:
            moments += [vm[key] for key in ("started_s", "switched_s", "finished_s") if vm[key] is not None]
        if report["check"]:
            moments = [0.0] + [(m.get("estimated_start_s") or 0) + (m.get("estimated_s") or 0) for m in report["plan"].get("moves", [])]
        self.low = min(moments)
        self.high = max(moments)
        if self.high <= self.low:
            self.high = self.low + 1
        deadline = report["deadline_s"]
        self.deadline = deadline
        if deadline is not None and self.high < deadline <= 1.6 * self.high:
            self.high = deadline
        self.high += (self.high - self.low) * 0.01
        self.step = _step((self.high - self.low) / 5, (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600))
        self.ticks = [n * self.step for n in range(math.ceil(self.low / self.step), math.floor(self.high / self.step) + 1)]

    def x(self, moment: float) -> float:
        """Percent of the width."""
        return 100 * (min(max(moment, self.low), self.high) - self.low) / (self.high - self.low)

    def shows_deadline(self) -> bool:
        return self.deadline is not None and self.low <= self.deadline <= self.high

    def lines(self) -> str:
        """Lines through a chart of any height."""
        return "".join(self._line("grid", tick) for tick in self.ticks)

    def limit(self) -> str:
        return self._line("limit", self.deadline) if self.shows_deadline() else ""

    def _line(self, kind: str, moment: float) -> str:
        return f'<line class="{kind}" x1="{self.x(moment):.2f}%" x2="{self.x(moment):.2f}%" y1="0" y2="100%"/>'

    def labels(self) -> str:
        labels = ""
        for tick in self.ticks:
            x = self.x(tick)
            edge = " first" if x < 3 else " last" if x > 93 else ""
            labels += f'<span class="tick{edge}" style="left:{x:.2f}%">{self._label(tick)}</span>'
        return f'<div class="ticks">{labels}</div>'

    def _label(self, moment: float) -> str:
        if self.step < 60:
            return f"{moment:g} s"
        return f"{moment / 60:g} min" if self.step < 3600 else f"{moment / 3600:g} h"


def _step(least: float, nice: tuple) -> float:
    """The smallest round number that is not less than ``least``."""
    for step in nice:
        if step >= least:
            return step
    return 10 ** math.ceil(math.log10(least))


def _timeline(report: dict, axis: _Axis) -> str:
    estimates = {move["vm"]: move for move in report["plan"].get("moves", [])} if report["check"] else {}

    def order(vm):
        start = (estimates.get(vm["name"], {}).get("estimated_start_s") or 0) if _state(report, vm) == "would" else vm["started_s"]
        return start is None, start or 0

    rows = "".join(_timeline_row(report, axis, vm, estimates.get(vm["name"])) for vm in sorted(report["vms"], key=order))
    if not rows:
        return _section("Timeline", "", '<p class="empty">There was no VM to move.</p>')
    if report["check"]:
        legend = f'<span>{_key("estimate")} estimated</span>'
    else:
        legend = (f'<span>{_key("pre")} pre-copy, on the source</span>'
                  '<span><svg width="12" height="14" aria-hidden="true"><path class="switch" d="M6 0L12 7L6 14L0 7Z"/></svg> switch</span>'
                  f'<span>{_key("post")} post-copy, on the destination</span>')
        if any(vm["started_s"] is not None and vm["result"] == "failed" for vm in report["vms"]):
            legend += '<span><b class="cross" aria-hidden="true">✕</b> failed</span>'
    if axis.shows_deadline():
        mark = '<svg width="8" height="14" aria-hidden="true"><line class="limit" x1="4" x2="4" y1="0" y2="14"/></svg>'
        legend += f'<span>{mark} deadline, {limit(axis.deadline)}</span>'
    elif axis.deadline is not None:
        legend += f"<span>The deadline, {limit(axis.deadline)}, lies beyond the right edge.</span>"
    dense = " dense" if len(report["vms"]) > MANY else ""
    what = "At the right of each VM: how long its migration took, until the last page had arrived."
    if report["check"]:
        what = "When each VM would start, and how long it would take."
    return _section("Timeline", what, f'<div class="legend">{legend}</div><div class="gantt{dense}">'
                    f'<div class="row axis"><span></span>{axis.labels()}<span></span></div>{rows}</div>')


def _key(kind: str) -> str:
    """A piece of a bar, for the legend."""
    return f'<svg width="24" height="14" aria-hidden="true"><rect class="{kind}" x="1" y="1" width="22" height="12" rx="2"/></svg>'


def _timeline_row(report: dict, axis: _Axis, vm: dict, estimate: dict | None) -> str:
    state = _state(report, vm)
    label, kind, _shape = STATES[state]
    bars, value, said = "", "", label
    if state == "would" and estimate and estimate.get("estimated_s") is not None:
        start = estimate.get("estimated_start_s") or 0
        end = start + estimate["estimated_s"]
        bars = _rect("estimate", axis, start, end)
        value = "≈ " + duration(estimate["estimated_s"])
        said = f"would move from {duration(start)} to {duration(end)}"
    elif vm["started_s"] is not None:
        bars, value, said = _bars(axis, vm, report["elapsed_s"])
    if state == "failed":
        value = f'<b class="cross">✕ failed</b>{", " + value if value else ""}'
    if not value:
        value = f'<span class="{kind}-text">{label}</span>'
    target = f' <span class="to">→ {_name(vm["to"])}</span>' if vm["to"] else ""
    return (f'<div class="row"><span class="who">{_name(vm["name"])}{target}</span>'
            f'<svg class="bar" width="100%" role="img" aria-label="{_text(vm["name"])}: {_text(said)}">{axis.lines()}{bars}{axis.limit()}</svg>'
            f'<span class="value">{value}</span></div>')


def _bars(axis: _Axis, vm: dict, now: float) -> tuple[str, str, str]:
    """The bars of one migration, its total time, and the same in words."""
    start, switch = vm["started_s"], vm["switched_s"]
    end = vm["finished_s"] if vm["finished_s"] is not None else max(now, start, switch or start)
    said = f"pre-copy from {duration(start)}"
    bars = _rect("pre", axis, start, end if switch is None else switch)
    if switch is not None:
        said += f", switch at {duration(switch)}"
        bars += _rect("post", axis, switch, end)
        x = f"{axis.x(switch):.2f}%"
        bars += f'<svg class="at" x="{x}" y="50%"><path class="switch" d="M0 -8L6 0L0 8L-6 0Z"/></svg>'
    if vm["result"] == "failed":
        bars += f'<svg class="at" x="{axis.x(end):.2f}%" y="50%"><path class="stop" d="M-5 -5L5 5M5 -5L-5 5"/></svg>'
    if vm["finished_s"] is None:
        return bars, "not finished", said + ", not finished"
    return bars, milliseconds(vm["total_ms"]) if vm["total_ms"] is not None else duration(end - start), f"{said}, finished at {duration(end)}"


def _rect(kind: str, axis: _Axis, start: float, end: float) -> str:
    x = axis.x(start)
    return f'<rect class="{kind}" x="{x:.2f}%" y="18%" width="{max(axis.x(end) - x, 0):.2f}%" height="64%" rx="2"/>'


# --- Pauses -----------------------------------------------------------------------------------------------------------

def _paused(vms: list) -> list:
    """The VMs whose pause is known, longest first."""
    return sorted((vm for vm in vms if vm["downtime_ms"] is not None), key=lambda vm: -vm["downtime_ms"])


def _rank(paused: list, share: float) -> float | None:
    """The pause that ``share`` of the VMs did not exceed (nearest rank)."""
    if not paused:
        return None
    return paused[len(paused) - max(math.ceil(share * len(paused)), 1)]["downtime_ms"]


def _pauses(report: dict) -> str:
    paused = _paused(report["vms"])
    title = "Pause of each VM"
    if not paused:
        return _section(title, "", f'<p class="empty">{"Nothing was moved, so no VM was paused." if report["check"] else "No VM was paused."}</p>')
    longest = paused[0]["downtime_ms"] or 1
    rows = "".join(
        f'<div class="row"><span class="who">{_name(vm["name"])}</span>'
        f'<svg class="bar" width="100%" aria-hidden="true"><rect class="track" y="18%" width="100%" height="64%" rx="2"/>'
        f'<rect class="pause" y="18%" width="{max(100 * vm["downtime_ms"] / longest, 0.5):.2f}%" height="64%" rx="2"/></svg>'
        f'<span class="value">{milliseconds(vm["downtime_ms"])}</span></div>' for vm in paused)
    note = "How long the guest stood still (downtime), longest first."
    if len(paused) > 2:
        note += f" Median {milliseconds(_rank(paused, 0.5))}, 95 % within {milliseconds(_rank(paused, 0.95))}, longest {milliseconds(longest)}."
    unknown = sum(vm["result"] == "moved" for vm in report["vms"]) - sum(vm["result"] == "moved" for vm in paused)
    if unknown:
        note += f" The pause of {_plural(unknown, 'moved VM')} is not known."
    return _section(title, note, f'<div class="pauses{" dense" if len(paused) > MANY else ""}">{rows}</div>')


# --- Pages of the kernel engine ---------------------------------------------------------------------------------------


def _wait(histogram: list, share: float) -> float | None:
    """Milliseconds within which that share of the waits ended: the upper edge of its bucket."""
    total = sum(histogram)
    if not total:
        return None
    seen = 0
    for bucket, count in enumerate(histogram):
        seen += count
        if seen >= share * total:
            return (1 << bucket) / 1000
    return None


def _counted(report: dict) -> list:
    """What the kernel counted, for each VM that moved by its engine."""
    return [vm["remote_ram"] for vm in report["vms"] if vm.get("remote_ram")]


def _pooled(counted: list) -> list:
    """The waits of all VMs by duration."""
    histograms = [each.get("wait_hist", []) for each in counted]
    return [sum(histogram[bucket] for histogram in histograms if bucket < len(histogram)) for bucket in range(max(map(len, histograms), default=0))]


def _microseconds(value: int) -> str:
    return f"{value} µs" if value < 1000 else milliseconds(value / 1000)


def _waits(report: dict) -> str:
    """How long all guests waited for pages, a row for each duration."""
    histogram = _pooled(_counted(report))
    used = [bucket for bucket, count in enumerate(histogram) if count]
    if not used:
        return ""
    total, most, rows = sum(histogram), max(histogram), ""
    for bucket in range(used[0], used[-1] + 1):
        count = histogram[bucket]
        edges = f"below {_microseconds(1)}" if not bucket else f"{_microseconds(1 << bucket - 1)} – {_microseconds(1 << bucket)}"
        rows += (
            f'<div class="row"><span class="who">{edges}</span>'
            f'<svg class="bar" width="100%" aria-hidden="true"><rect class="track" y="18%" width="100%" height="64%" rx="2"/>'
            f'<rect class="pause" y="18%" width="{100 * count / most:.2f}%" height="64%" rx="2"/></svg>'
            f'<span class="value">{_data(count, f"{count:,}")}</span></div>'
        )
    note = f"{total:,} waits of all guests together: half within {milliseconds(_wait(histogram, 0.5))}, 99 % within {milliseconds(_wait(histogram, 0.99))}."
    return _section("How long guests waited for pages on demand", note, f'<div class="waits">{rows}</div>')


def _histogram(histogram: list) -> str:
    """Waits by duration, as bars; each bucket is twice as long as the one before."""
    used = [bucket for bucket, count in enumerate(histogram) if count]
    if not used:
        return ""
    first, last, most = used[0], used[-1], max(histogram)
    width = 100 / (last - first + 1)
    bars = "".join(
        f'<rect class="pause" x="{(bucket - first) * width + 0.5:.2f}%" y="{100 - 100 * histogram[bucket] / most:.1f}%" '
        f'width="{width - 1:.2f}%" height="{100 * histogram[bucket] / most:.1f}%"><title>{histogram[bucket]} within '
        f'{milliseconds((1 << bucket) / 1000)}</title></rect>' for bucket in used)
    low, high = milliseconds((1 << first) / 2000), milliseconds((1 << last) / 1000)
    return f'<svg width="100%" height="44" role="img" aria-label="waits from {low} to {high}">{bars}</svg>'


def _fetches(report: dict) -> str:
    rows = []
    for vm in report["vms"]:
        counted = vm.get("remote_ram")
        if not counted:
            continue
        waits = counted.get("wait_hist", [])
        figures = [counted.get(key, 0) for key in ("pages_ahead", "pages_zero", "pages_demand", "pages_bubble", "pages_background")]
        figures.append(sum(counted.get(key, 0) for key in ("faults_nowait", "faults_retry", "faults_plain")))
        median, late = _wait(waits, 0.5), _wait(waits, 0.99)
        rows.append((
            _name(vm["name"]), *(_data(value, f"{value:,}") for value in figures), _data(sum(waits), f"{sum(waits):,}"),
            *("-" if value is None else _data(value, milliseconds(value)) for value in (median, late)),
            _data(round(counted.get("wait_ns_max", 0) / 1e6, 3), milliseconds(counted.get("wait_ns_max", 0) / 1e6)), _histogram(waits),
        ))  # fmt: skip
    if not rows:
        return ""
    headings = ("VM", "Ahead", "Zero", "On demand", "Around those", "Background", "Faults", "Waits", "Median", "99 %", "Longest", "By duration")
    return _section(
        "Pages by cause", "What moved before the switch and after it, the faults on pages that were not there, and how long the guest waited for them "
        "(upper edges of buckets that double; the longest as measured).", _figures(headings, rows))


# --- Plan -------------------------------------------------------------------------------------------------------------


def _planned(report: dict) -> str:
    """What the plan said of time, and what became of it; who got onto the kernel engine."""
    rows, onboarded = [], [vm["name"] for vm in report["vms"] if vm["onboarded"]]
    for vm in report["vms"]:
        if vm["started_s"] is None or vm["planned_start_s"] is None or report["check"]:
            continue
        keys = ("precopy_timeout_s", "precopy_s", "planned_start_s", "started_s", "planned_finish_s", "finished_s")
        rows.append((_name(vm["name"]), *(_data(vm[key], duration(vm[key])) for key in keys)))
    if not rows:
        return ""
    headings = ("VM", "Pre-copy planned", "Pre-copy", "Start planned", "Start", "End planned", "End")
    note = "Times count from the start; a pre-copy that has nothing more to send ends before its time, one that starts late is cut short."
    if onboarded:
        note += f" With their memory on remote_ram from now on: {', '.join(map(_name, onboarded))}."
    return _section("Planned and real", note, _figures(headings, rows))


# --- Rates ------------------------------------------------------------------------------------------------------------

def _pieces(vm: dict) -> list:
    """The samples of a VM as (from, to, phase, rate): each rate holds until the next sample."""
    start = vm["started_s"] or 0
    samples = sorted(vm["samples"], key=lambda sample: sample[0])
    ends = [start + sample[0] for sample in samples[1:]]
    if samples:
        last = start + samples[-1][0]
        ends.append(max(last, vm["finished_s"] if vm["finished_s"] is not None else last))
    return [(start + sample[0], end, sample[1], sample[2] or 0) for sample, end in zip(samples, ends)]


def _binned(pieces: list, low: float, high: float, bins: int) -> tuple[list, list]:
    """Mean rates per bin: in pre-copy, and in post-copy."""
    pre, post = [0.0] * bins, [0.0] * bins
    width = (high - low) / bins
    for start, end, phase, value in pieces:
        start, end = max(start, low), min(end, high)
        if end <= start or not value:
            continue
        series = post if phase in ("postcopy", "recovering") else pre
        for i in range(int((start - low) / width), min(int((end - low) / width), bins - 1) + 1):
            overlap = min(end, low + (i + 1) * width) - max(start, low + i * width)
            series[i] += value * max(overlap, 0) / width
    return pre, post


def _columns(pre: list, post: list, scale: float) -> str:
    """The same as columns in percent of any box, which leaves the pattern of post-copy its shape."""
    out = []
    for i, (low, high) in enumerate(zip(pre, post)):
        for kind, bottom, value in (("pre", 0, low), ("post", low, high)):
            if value:
                out.append(f'<rect class="{kind}" x="{100 * i / len(pre):.3f}%" width="{100 / len(pre):.3f}%" '
                           f'y="{100 - 100 * (bottom + value) / scale:.2f}%" height="{100 * value / scale:.2f}%"/>')
    return "".join(out)


def _area(base: list, top: list, scale: float) -> str:
    """An SVG path between two stepped lines, in a box of len(base) x 100."""
    forward = [f"{i} {100 - 100 * v / scale:.2f}H{i + 1}" for i, v in enumerate(top)]
    back = [f"{i + 1} {100 - 100 * v / scale:.2f}H{i}" for i, v in reversed(list(enumerate(base)))]
    return "M" + "L".join(forward + back) + "Z"


def _rates(report: dict, axis: _Axis) -> str:
    title = "Rate of the copy"
    sampled = [vm for vm in report["vms"] if vm["samples"]]
    pieces = {vm["name"]: _pieces(vm) for vm in sampled}
    every = [piece for some in pieces.values() for piece in some]
    pre, post = _binned(every, axis.low, axis.high, BINS)
    total = [a + b for a, b in zip(pre, post)]
    if not any(total):
        return _section(title, "", f'<p class="empty">{"Nothing was moved, so there is no rate." if report["check"] else "No rate was sampled."}</p>')
    busy = [value for value in total if value]
    scale = _step(max(total), tuple(m * 10 ** e for e in range(-2, 7) for m in (1, 2, 3, 4, 5, 6, 8)))
    levels = "".join(f'<span style="bottom:{share}%">{rate(scale * share / 100)}</span>' for share in (0, 50, 100))
    said = f"Rate of all migrations over time, peak {rate(max(total))}; the figures are in the table below"
    chart = (
        f'<div class="chart"><div class="levels" aria-hidden="true">{levels}</div><div class="plot">'
        f'<svg width="100%" height="100%" role="img" aria-label="{said}">{axis.lines()}<line class="grid" x1="0" x2="100%" y1="50%" y2="50%"/>'
        f'<g class="columns">{_columns(pre, post, scale)}</g>{axis.limit()}</svg></div>{axis.labels()}</div>')
    legend = f'<div class="legend"><span>{_key("pre")} pre-copy</span><span>{_key("post")} post-copy</span></div>'
    note = f"All migrations together: {rate(max(total))} at the peak, {rate(sum(busy) / len(busy))} on average while anything was sent."
    sparks = f'<div class="sparks">{"".join(_spark(vm, pieces[vm["name"]]) for vm in sampled)}</div>'
    many = f"<details><summary>The rate of each of {len(sampled)} VMs</summary>{sparks}</details>"
    each = "" if len(sampled) == 1 else many if len(sampled) > MANY else f"<h3>Each VM</h3>{sparks}"
    return _section(title, note, legend + chart + _rate_table(every, axis) + each)


def _rate_table(every: list, axis: _Axis) -> str:
    """The chart as figures."""
    bins = max(1, min(24, round((axis.high - axis.low) / axis.step * 4)))
    pre, post = _binned(every, axis.low, axis.high, bins)
    width = (axis.high - axis.low) / bins
    rows = [(f"{duration(axis.low + i * width)} – {duration(axis.low + (i + 1) * width)}", rate(a), rate(b), rate(a + b))
            for i, (a, b) in enumerate(zip(pre, post))]
    return f'<details><summary>The rates as figures</summary>{_figures(("Time", "Pre-copy", "Post-copy", "Both"), rows)}</details>'


def _spark(vm: dict, pieces: list) -> str:
    low, high = pieces[0][0], pieces[-1][1]
    if high <= low:
        high = low + 1
    pre, post = _binned(pieces, low, high, SPARK_BINS)
    total = [a + b for a, b in zip(pre, post)]
    scale = max(total) or 1
    peak = max(piece[3] for piece in pieces)
    areas = f'<path class="pre" d="{_area([0.0] * SPARK_BINS, pre, scale)}"/><path class="post" d="{_area(pre, total, scale)}"/>'
    return (f'<figure><figcaption>{_name(vm["name"])}</figcaption>'
            f'<svg width="100%" height="36" viewBox="0 0 {SPARK_BINS} 100" preserveAspectRatio="none" aria-hidden="true">{areas}</svg>'
            f"<p>peak {rate(peak)}<br>mean {rate(sum(total) / SPARK_BINS)}</p></figure>")


# --- Tables -----------------------------------------------------------------------------------------------------------

NUM = ' class="num"'
COLUMNS = (         # key in the report, heading, how it is shown
    ("engine", "Engine", None),
    ("to", "To", None),
    ("location", "Found on", None),
    ("started_s", "Start", duration),
    ("switched_s", "Switch", duration),
    ("finished_s", "End", duration),
    ("downtime_ms", "Pause", milliseconds),
    ("total_ms", "Total", milliseconds),
    ("bytes", "Sent", octets),
    ("memory_mib", "Memory", mebibytes),
    ("dirty_rate_mib_s", "Dirtied", rate),
    ("precopy_timeout_s", "Pre-copy limit", duration),
)


def _figures(headings: tuple, rows: list) -> str:
    """A table of HTML cells: the first of a row names it, the others are figures."""
    heads = "".join(f'<th role="columnheader" scope="col"{NUM if n else ""}>{heading}</th>' for n, heading in enumerate(headings))
    body = ""
    for name, *cells in rows:
        body += f'<tr role="row"><th role="rowheader" scope="row">{name}</th>'
        body += "".join(f'<td role="cell"{NUM} data-label="{heading}">{cell}</td>' for heading, cell in zip(headings[1:], cells)) + "</tr>"
    return (f'<div class="scroll"><table role="table" class="figures"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
            f'<tbody role="rowgroup">{body}</tbody></table></div>')


def _table(report: dict) -> str:
    if not report["vms"]:
        return ""
    columns = [column for column in COLUMNS if any(vm[column[0]] is not None for vm in report["vms"])]
    if all(vm["location"] == vm["to"] for vm in report["vms"]):
        columns = [column for column in columns if column[0] != "location"]  # it would say the same twice
    heads = "".join(f'<th role="columnheader" scope="col"{NUM if shown else ""}>{heading}</th>'
                    for _key, heading, shown in (("", "VM", None), ("", "Result", None), *columns))
    body = "".join(_table_rows(report, vm, columns) for vm in report["vms"])
    note = f"{'To' if _back(report) else 'On' if _onboard(report) else 'From'} {_name(report['host'])}."
    if not report["check"]:
        note += f" Start, switch and end count from the start of the {_run(report)}."
    return _section("All VMs", note, '<div class="scroll"><table role="table" class="vms">'
                    f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>{body}</table></div>')


def _table_rows(report: dict, vm: dict, columns: list) -> str:
    """One VM: the row of its figures, and under it the reason, if there is one."""
    result = f'<data value="{_text(vm["result"])}">{_badge(_state(report, vm))}</data>'
    cells = f'<td role="cell" data-field="result" data-label="Result">{result}</td>'
    for key, heading, shown in columns:
        value = vm[key]
        kind = " ".join((["none"] if value is None else []) + (["num"] if shown else []))
        content = _data(value, shown(value)) if shown else "–" if value is None else _name(value)
        cells += f'<td role="cell" class="{kind}" data-field="{key}" data-label="{heading}">{content}</td>'
    why = ""
    if vm["reason"]:
        why = f'<tr role="row" class="why"><td role="cell" data-field="reason" colspan="{len(columns) + 2}">{_text(vm["reason"])}</td></tr>'
    return (f'<tbody role="rowgroup" data-vm="{_text(vm["name"])}"><tr role="row"><th role="rowheader" scope="row">{_name(vm["name"])}</th>'
            f"{cells}</tr>{why}</tbody>")


def _hosts(report: dict) -> str:
    """The hosts that took the VMs in: planned, and found."""
    arrived: dict = {}
    for vm in report["vms"]:
        if vm["result"] == "moved":
            arrived[vm["location"]] = arrived.get(vm["location"], 0) + 1
    rows = []
    for host in report["plan"].get("hosts", []):
        if host["name"] == report["host"] and report["direction"] == "away":
            continue
        name = _name(host["name"])
        if not host.get("usable", True):
            name += f"<small>not used: {_text(host.get('reason') or 'no reason given')}</small>"
        before, after, planned = (host.get(key) for key in ("memory_free_before_mib", "memory_free_after_mib", "incoming"))
        count = arrived.get(host["name"], 0)
        found = [] if report["check"] else [_data(count, str(count))]
        rows.append((name, _data(planned, str(planned)), *found, _data(before, mebibytes(before)), _data(after, mebibytes(after))))
    headings = ("Host", "VMs planned", *(() if report["check"] else ("VMs arrived",)), "Free memory", "Free afterwards, by the plan")
    return _section("The hosts" if _onboard(report) else "The other hosts", "", _figures(headings, rows)) if rows else ""


def _clients(report: dict) -> str:
    rows = []
    for client in report["clients"]:
        lost, requests = client["failed"], client["requests"]
        share = f" ({100 * lost / requests:.2g} %)" if lost and requests else ""
        failed = f'<data value="{lost}">' + (f'<b class="cross">✕ {lost:,}{share}</b>' if lost else "0") + "</data>"
        rows.append((_name(client["name"]), _data(requests, f"{requests:,}"), failed,
                     *(_data(client[key], milliseconds(client[key])) for key in ("worst_ms", "p50_ms", "p99_ms"))))
    headings = ("Client", "Requests", "Failed", "Worst", "Median", "99 % within")
    return _section("What clients outside saw", "", _figures(headings, rows)) if rows else ""


# --- Looks ------------------------------------------------------------------------------------------------------------

# Patterns, so that post-copy differs from pre-copy without colour too.
DEFS = ('<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
        '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect class="hatch-ground" width="6" height="6"/><rect class="hatch-line" width="2" height="6"/></pattern></defs></svg>')

# A table whose rows become cards, with the headings inside, where the screen is too narrow for it.
CARDS = """
% thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}%,% tbody,% tr,% td{display:block}
% tr:not(.why){display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:6px 8px;padding:10px 0}% .badge{padding:0 5px;font-size:12px}
% th[scope=row]{grid-column:1/-1;padding:0;font-size:15px}
% td{padding:0!important;text-align:left!important;white-space:normal!important}% td.none{display:none}
% td[data-label]::before{content:attr(data-label);display:block;font-size:12.5px;color:var(--soft);line-height:1.3}
% .why td{padding:0 0 10px!important}
"""

CSS = """
:root{--page:#f3f5f8;--card:#fff;--ink:#17202b;--soft:#536071;--line:#dde2e9;--track:#e7ebf0;
--pre:#3f86d8;--post:#8b45c9;--post-line:#c79bee;--pause:#b45f06;
--ok:#14733f;--ok-bg:#e0f3e7;--bad:#b3261e;--bad-bg:#fce5e3;--warn:#8a5200;--warn-bg:#fcefd8;--calm:#4a5665;--calm-bg:#e9edf2;--plan:#1b5fa8;
--plan-bg:#e2eefb}
@media screen and (prefers-color-scheme:dark){:root{--page:#0e1218;--card:#171d26;--ink:#e9edf3;--soft:#a5b0bf;--line:#2c3541;--track:#252d38;
--pre:#4e97ea;--post:#a064e0;--post-line:#d9bcf8;--pause:#e09a3e;
--ok:#5fd394;--ok-bg:#12331f;--bad:#ff8f86;--bad-bg:#431b18;--warn:#f0b65a;--warn-bg:#3d2b0c;--calm:#b3bdca;--calm-bg:#28313d;--plan:#86bcf7;
--plan-bg:#15304e}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,footer{max-width:1240px;margin:0 auto;padding:0 20px}
main{padding-top:20px;display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
section,.head,.tile{background:var(--card);border:1px solid var(--line);border-radius:10px}
section{padding:18px 22px 20px;min-width:0}
h1,h2,h3,p,dl,dd,ul,figure{margin:0}
h2{font-size:18px;line-height:1.3}h3{font-size:15px;margin:16px 0 8px}
.note,.when,.empty,footer{color:var(--soft)}.note{font-size:14px;margin-top:2px}.empty{margin-top:6px}
.note+*{margin-top:14px}h2+div,h2+ul,h2+table{margin-top:12px}
a{color:var(--plan)}code{font:13px/1.4 ui-monospace,"DejaVu Sans Mono",Consolas,monospace;background:var(--calm-bg);border-radius:4px;padding:1px 5px}
.pair{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}.pair:empty{display:none}
footer{padding-top:14px;padding-bottom:30px;font-size:14px}
.head{padding:20px 24px 18px;border-left:8px solid var(--kind)}
.head.ok{--kind:var(--ok);--kind-bg:var(--ok-bg)}.head.bad{--kind:var(--bad);--kind-bg:var(--bad-bg)}
.head.warn{--kind:var(--warn);--kind-bg:var(--warn-bg)}.head.plan{--kind:var(--plan);--kind-bg:var(--plan-bg)}
.kicker{color:var(--soft);font-size:13px;letter-spacing:.04em}
h1{font-size:30px;line-height:1.25;display:flex;gap:12px;align-items:flex-start;margin:4px 0 6px}
.mark{flex:none;width:38px;height:38px;border-radius:50%;background:var(--kind-bg);color:var(--kind);display:grid;place-items:center;font-size:21px}
.lead{font-size:17px}.late{color:var(--bad)}.when{font-size:14px;margin-top:8px}
svg.deadline{display:block;margin-top:10px;max-width:640px}.deadline .fill{fill:var(--kind)}.head.bad .fill{fill:var(--soft)}
.deadline .over{fill:var(--bad)}
.track{fill:var(--track)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.tile{padding:12px 16px}.tile dt{color:var(--soft);font-size:14px}.tile dd{font-size:25px;font-weight:600;line-height:1.25}
.tile small{display:block;font-size:13px;font-weight:400;color:var(--soft);line-height:1.4}
.badge{display:inline-block;white-space:nowrap;border-radius:20px;padding:0 9px;font-size:13px;font-weight:600;line-height:22px}
.badge.ok{color:var(--ok);background:var(--ok-bg)}.badge.bad{color:var(--bad);background:var(--bad-bg)}.badge.warn{color:var(--warn);
background:var(--warn-bg)}
.badge.calm{color:var(--calm);background:var(--calm-bg)}.badge.plan{color:var(--plan);background:var(--plan-bg)}
.cross,.bad-text{color:var(--bad)}.warn-text{color:var(--warn)}.calm-text,.ok-text{color:var(--soft)}
.count{color:var(--soft);font-weight:400}
ul.left{list-style:none;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:10px}
ul.left>li{border:1px solid var(--line);border-radius:8px;padding:9px 12px;min-width:0}.left p,.blockers{font-size:14px;margin-top:4px}
.blockers{padding:0;list-style:none;display:grid;gap:3px}.plain{padding-left:20px;margin-top:8px}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:14px;color:var(--soft)}.legend span{display:inline-flex;align-items:center;gap:7px}
.pre{fill:var(--pre)}.post{fill:url(#hatch);stroke:var(--post);stroke-width:1;vector-effect:non-scaling-stroke}
.hatch-ground{fill:var(--post)}.hatch-line{fill:var(--post-line)}
.switch{fill:var(--ink);stroke:var(--card);stroke-width:1.5}.stop{stroke:var(--bad);stroke-width:3.5;stroke-linecap:round}
.estimate{fill:var(--plan-bg);stroke:var(--plan);stroke-width:1.5;stroke-dasharray:5 3}
.pause{fill:var(--pause)}.grid{stroke:var(--line);stroke-width:1}.limit{stroke:var(--bad);stroke-width:2;stroke-dasharray:4 3}
svg.at{overflow:visible}.columns{shape-rendering:crispEdges}.columns .post{stroke:none}.sparks .post{fill:var(--post);stroke:none}
.row{display:grid;grid-template-columns:minmax(0,220px) minmax(0,1fr) 150px;gap:0 14px;align-items:center}
.bar{display:block;height:26px;overflow:visible}.row .value{text-align:right;font-size:14px;white-space:nowrap}.pauses .row .value{font-weight:600}
.row .who{line-height:1.25;padding:2px 0;font-size:14px}.to{color:var(--soft)}
.gantt{margin-top:10px}.row.axis{position:sticky;top:0;background:var(--card);z-index:1;padding:4px 0;border-bottom:1px solid var(--line)}
.ticks{position:relative;height:20px;font-size:13px;color:var(--soft)}.tick{position:absolute;transform:translateX(-50%);white-space:nowrap}
.tick.first{transform:none}.tick.last{transform:translateX(-100%)}
.dense .bar{height:17px}.dense .switch{transform:scale(.65)}.dense .who,.dense .value,.dense.pauses .value{font-size:12.5px;line-height:1.2;padding:0}
.pauses.dense{columns:3 300px;column-gap:30px}.pauses.dense .row{grid-template-columns:minmax(0,1fr) minmax(0,1.2fr) 62px;gap:0 8px;
break-inside:avoid}
.pauses .row,.waits .row{grid-template-columns:minmax(0,220px) minmax(0,1fr) 80px}
.chart{margin-top:12px;padding-left:84px;position:relative}.plot{height:190px;position:relative;border-bottom:1px solid var(--soft);
border-top:1px solid var(--line)}
.plot svg{position:absolute;inset:0;display:block}.levels{position:absolute;left:0;width:76px;top:0;height:190px;text-align:right;font-size:13px;
color:var(--soft)}
.levels span{position:absolute;right:0;transform:translateY(50%)}.chart .ticks{margin-top:4px}
details{margin-top:12px}summary{cursor:pointer;color:var(--plan);font-size:14px}summary+*{margin-top:10px}
.sparks{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px 20px}
.sparks figcaption{font-weight:600;font-size:14px}.sparks figure{display:flex;flex-direction:column;justify-content:flex-end}
.sparks p{font-size:13px;color:var(--soft);line-height:1.35}.sparks svg{display:block;
border-bottom:1px solid var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;font-weight:600}thead th{color:var(--soft);font-weight:400;font-size:13px;
vertical-align:bottom}
th,td{padding:6px 9px;vertical-align:top}th:first-child,td:first-child{padding-left:0}tr>:last-child{padding-right:0}.num{text-align:right}
td.num{white-space:nowrap}.figures tbody tr,.vms tbody{border-top:1px solid var(--line)}
.vms th[scope=row]{min-width:120px}.figures th[scope=row]{min-width:120px}.figures td,.figures thead th{padding:6px}.figures th:first-child{padding-left:0}
th[scope=row] small{display:block;font-weight:400;color:var(--soft)}
thead th{overflow-wrap:normal}.vms td:not(.num):not([colspan]){min-width:74px}.vms td[data-field=engine]{white-space:nowrap}
.vms td,.vms th{padding:7px 6px}.vms th:first-child{padding-left:0}.vms thead th{padding-bottom:4px}
.vms .why td{padding:0 0 8px;color:var(--soft)}
@media (max-width:1000px){%vms%}
@media (max-width:640px){%figures%}
@media (max-width:640px){
main,footer{padding-left:12px;padding-right:12px}main{padding-top:12px;gap:12px}.pair{gap:12px}section{padding:14px 14px 16px}
.head{padding:14px 14px 14px;border-left-width:6px}
h1{font-size:23px}.mark{width:30px;height:30px;font-size:17px}.lead{font-size:16px}.tiles{grid-template-columns:1fr 1fr;gap:10px}
.tile{padding:10px 12px}.tile dd{font-size:21px}
.row,.pauses .row,.waits .row{grid-template-columns:minmax(0,1fr) auto;padding:3px 0}.row>svg,.row>.ticks{grid-column:1/-1;grid-row:2}
.row.axis>span{display:none}
.bar{height:20px}
.dense .bar{height:14px}.chart{padding-left:0;padding-top:20px}.levels{position:static;width:auto;height:auto}.levels span{left:0;right:auto;
bottom:auto!important;transform:none;top:0}
.levels span:not(:last-child){display:none}.plot{height:150px}.sparks{grid-template-columns:1fr 1fr}}
@media print{body{background:#fff;font-size:12px}main{display:block;max-width:none}section,.head,.tiles{margin-bottom:12px}
.row,.tile,.left>li,.vms tbody,figure{break-inside:avoid}
h2,h3{break-after:avoid}.row.axis{position:static}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.scroll{overflow:visible}
details::details-content{content-visibility:visible}}
""".replace("%vms%", CARDS.replace("%", ".vms")).replace("%figures%", CARDS.replace("%", ".figures"))
