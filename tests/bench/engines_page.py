# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The comparison of the engines as one HTML page, which needs nothing but itself. ``render`` is a pure function of engines.json."""

from __future__ import annotations

import html
import math
import statistics

import figures

#: What is drawn of each run.
PLOTS = (
    ("downtime_ms", "Downtime"), ("total_ms", "Total time"), ("degraded_ms", "Degraded time"), ("stall_p50_us", "Stall on a missing page, median"),
    ("stall_p99_us", "Stall on a missing page, 99 %"), ("stall_max_us", "Longest access"), ("bytes", "Sent"),
    ("cpu_s_per_gib", "CPU time of both hosts for a GiB of memory"),
)  # fmt: skip
NAMES = {**dict(PLOTS), "faults_per_working_set": "Faults over the network, of the working set", "corrupt": "Corrupt pages", "failed": "Failed requests",
         "given_up": "Migrations given up", "play_s": "Eviction of six VMs"}  # fmt: skip
PARTS = ((0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"))


def render(found: dict, source: str = "engines.json") -> str:
    """The page, as text.

    :param source: the name of the file beside it that has all figures.
    """
    body = [_head(found), _goals(found["goals"]), _eviction(found["eviction"]), _database(found["rows"]),
            *(_plot(found["rows"], figure, title) for figure, title in PLOTS), _pages(found["medians"]), _failed(found["rows"]),
            _notes(found, source)]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n<title>Engines compared</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n" + "\n".join(part for part in body if part) + "\n</main>\n</body>\n</html>\n"
    )


# --- Text ---------------------------------------------------------------------------------------------------------------


def _text(value) -> str:
    return html.escape(str(value), quote=True)


def _digits(value: float) -> str:
    """Three digits that count."""
    if value >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shown(figure: str, value: float | None) -> str:
    """A value with its unit, which the name of its figure ends with."""
    if value is None:
        return "–"
    if figure == "bytes":
        return f"{_digits(value / (1 << 20))} MiB"
    if figure == "faults_per_working_set":
        return f"{_digits(100 * value)} %"
    if figure.endswith("_us"):
        figure, value = ("_ms", value / 1000) if value >= 1000 else ("µs", value)
    if figure.endswith("_ms"):
        figure, value = ("_s", value / 1000) if value >= 1000 else ("ms", value)
    unit = "s" if figure.endswith("_s") or figure == "cpu_s_per_gib" else figure if figure in ("µs", "ms") else ""
    return f"{_digits(value)} {unit}".strip()


def _engine(row: dict) -> str:
    return f"{row['engine']}, {row['transport']}" if row["transport"] else row["engine"]


def _colour(row: dict) -> str:
    return row["transport"] or row["engine"]


def _section(title: str, note: str, content: str) -> str:
    return f"<section><h2>{title}</h2>" + (f'<p class="note">{note}</p>' if note else "") + f"{content}</section>"


def _table(headings: tuple, rows: list) -> str:
    """Cells are HTML; the first of a row names it."""
    heads = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for name, *cells in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


# --- Parts of the page --------------------------------------------------------------------------------------------------


def _head(found: dict) -> str:
    met = [goal["met"] for goal in found["goals"]]
    said = f"{met.count(True)} of {len(met)} goals met, {met.count(False)} missed, {met.count(None)} not measured" if met else "no goal was measured"
    return (f'<header><h1>Engines compared</h1><p>{len(found["rows"])} runs of migrations, {len(found["eviction"])} of evictions; {said}.</p>'
            f'<p class="note">{_text(found["started"])}, {_text(found["machine"])}, hosts emulated by {_text(found["accelerator"])}</p></header>')  # fmt: skip


MARKS = {True: '<b class="ok">✓</b>', False: '<b class="bad">✕</b>', None: '<span class="soft">–</span>'}
JUDGED = {"ratio": "of stock", "worst run": "worst run", "sum": "all runs"}


def _goals(goals: list) -> str:
    """A line for each goal, a column for each workload and transport."""
    lines: dict = {}
    for goal in goals:
        lines.setdefault((goal["figure"], goal["judged"], goal["goal"]), {})[goal["workload"], goal["transport"]] = goal
    places = [place for place in dict.fromkeys((goal["workload"], goal["transport"]) for goal in goals) if place[0] != "eviction"]
    evictions = [goal for goal in goals if goal["workload"] == "eviction"]
    rows = []
    for (figure, judged, most), cells in lines.items():
        if figure != "play_s":
            rows.append((f"{NAMES.get(figure, figure)} <small>{JUDGED[judged]}</small>", f"≤ {_judged(figure, judged, most)}",
                         *(_cell(cells.get(place)) for place in places)))  # fmt: skip
    headings = ("Figure", "Goal", *(f"{_text(workload)}<br>{_text(transport)}" for workload, transport in places))
    parts = _table(headings, rows) if rows else ""
    if evictions:
        rows = [(f"{NAMES['play_s']}, {_text(goal['transport'])} <small>{JUDGED['ratio']}</small>", f"≤ {goal['goal']:g}", _cell(goal)) for goal in evictions]
        parts += _table(("Figure", "Goal", "Measured"), rows)
    note = ("remote_ram beside userfault of the same driver and workload, medians of all runs; the eviction beside a loop of stock pre-copies. "
            "✓ met, ✕ missed, – not measured. Small: ours / stock.")  # fmt: skip
    return _section("Goals", note, parts) if parts else ""


def _judged(figure: str, judged: str, value: float) -> str:
    return f"{value:g}" if judged == "ratio" else shown(figure, value)


def _cell(goal: dict | None) -> str:
    if goal is None or goal["met"] is None:
        return MARKS[None]
    ours, stock = shown(goal["figure"], goal["ours"]), shown(goal["figure"], goal["stock"])
    both = f"<br><small>{ours} /<br>{stock}</small>" if goal["judged"] == "ratio" else ""
    return f"{MARKS[goal['met']]} {_judged(goal['figure'], goal['judged'], goal['value'])}{both}"


def _strip(name: str, colour: str, values: list, most: float, figure: str) -> str:
    """One engine: a dot for each run, and a bar to the median."""
    middle = statistics.median(values)
    dots = "".join(f'<circle class="{colour}" cx="{_percent(value, most)}" cy="50%" r="4"><title>{shown(figure, value)}</title></circle>' for value in values)
    column = f'<rect class="{colour} pale" y="20%" height="60%" width="{_percent(middle, most)}"/>'
    return (f'<div class="row"><span>{_text(name)}</span><svg width="100%" height="22" role="img" aria-label="{_text(name)}: {shown(figure, middle)}">'
            f"{column}{dots}</svg><span>{shown(figure, middle)}</span></div>")  # fmt: skip


def _percent(value: float, most: float) -> str:
    return f"{98 * value / most if most else 0:.2f}%"


def _plot(rows: list, figure: str, title: str) -> str:
    groups = []
    for place in dict.fromkeys((row["workload"], row["driver"]) for row in rows):
        values: dict = {}
        for row in rows:
            if (row["workload"], row["driver"]) == place and row.get(figure) is not None:
                values.setdefault((_engine(row), _colour(row)), []).append(row[figure])
        if values:
            most = max(max(some) for some in values.values())
            strips = "".join(_strip(name, colour, some, most, figure) for (name, colour), some in values.items())
            groups.append(f"<div><h3>{_text(place[0])} <small>{_text(place[1])}</small></h3>{strips}</div>")
    return _section(title, "", f'<div class="groups">{"".join(groups)}</div>') if groups else ""


def _eviction(rows: list) -> str:
    if not rows:
        return ""
    values: dict = {}
    for row in rows:
        name = "evacuate, " + row["transport"] if row["transport"] else f"one by one, {row['engine']}"
        values.setdefault((name, _colour(row)), []).append(row["play_s"])
    most = max(max(some) for some in values.values())
    strips = "".join(_strip(name, colour, some, most, "play_s") for (name, colour), some in values.items())
    return _section("Eviction of a host of six VMs", "The whole playbook, from its start until the host is empty.", strips)


def _pages(medians: list) -> str:
    rows = [
        (f"{_text(each['workload'])}, {_text(each['transport'])}", shown("", each["pages_demand"]),
         shown("faults_per_working_set", each["faults_per_working_set"]), shown("_us", each["wait_p50_us"]), shown("_us", each["wait_p99_us"]))
        for each in medians if each["engine"] == "remote_ram"
    ]  # fmt: skip
    headings = ("Workload", "Pages on demand", "Of the working set", "Wait, median", "Wait, 99 %")
    return _section("Faults of remote_ram", "Medians of all runs, as the kernel module counted them.", _table(headings, rows)) if rows else ""


def _failed(rows: list) -> str:
    failed = [row for row in rows if row["result"] != "moved"]
    cells = [(_text(f"{row['workload']}, {_engine(row)}, {row['driver']}"), f'<span class="wrap">{_text(row["reason"])}</span>') for row in failed]
    return _section("What did not move", "", _table(("Run", "Why"), cells)) if cells else ""


def _notes(found: dict, source: str) -> str:
    sizes = [(_text(name), f"{size['memory_mib']} MiB", f"{size['working_set_mib']} MiB", f"<code>{_text(size['words'] or '–')}</code>")
             for name, size in found["sizes"].items()]  # fmt: skip
    notes = "".join(f"<li>{_text(note)}</li>" for note in found["notes"])
    link = f'<p class="note">Every figure is in <a href="{_text(source)}">{_text(source)}</a>.</p>'
    return _section("What was measured, and how", "", f"<ul>{notes}</ul>" + _table(("Workload", "Memory", "Working set", "Load"), sizes) + link)


# --- The database -------------------------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM = 56, 600, 30, 270  # of the course, in a picture of 960 x 320
BARS, EDGE = 700, 880  # of the percentiles


def _database(rows: list) -> str:
    rows = [row for row in rows if row.get("course")]
    if not rows:
        return ""
    first = min(row["course"]["first_s"] for row in rows)
    last = max(row["course"]["first_s"] + len(row["course"]["per_second"]) for row in rows)
    busiest = max((max(row["course"]["per_second"], default=0) for row in rows), default=0)
    slowest = max(row["latency_worst_ms"] or 1 for row in rows)
    fastest = min((figures.slower_than(row["latency_ms"], 0.5) or 1 for row in rows), default=1)
    scale = _Scale(first, last, busiest, fastest / 2, max(slowest, fastest))
    pictures = ""
    for kind in dict.fromkeys(map(figures.kind, rows)):
        pictures += _picture([row for row in rows if figures.kind(row) == kind], scale)
    data = statistics.median(row["data_mib"] for row in rows)
    note = (
        f"valkey with {_digits(data)} MiB of data, read and written from outside, moved by each engine. Left: requests answered in each second, a line a run, "
        "around the switch (0 s); pale: pre-copy and post-copy of the first run. Right: the latency of all requests from the migration on."
    )
    return _section("The database", note, pictures)


class _Scale:
    """The same for all engines, so that pictures can be compared."""

    def __init__(self, first: float, last: float, busiest: float, fastest_ms: float, slowest_ms: float):
        self.first, self.last, self.most = first, max(last, first + 1), max(busiest * 1.1, 1)
        self.low, self.high = math.floor(math.log10(fastest_ms)), math.ceil(math.log10(slowest_ms))
        self.high = max(self.high, self.low + 1)

    def x(self, second: float) -> float:
        return LEFT + (RIGHT - LEFT) * (min(max(second, self.first), self.last) - self.first) / (self.last - self.first)

    def y(self, requests: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * requests / self.most

    def right(self, ms: float) -> float:
        return BARS + (EDGE - BARS) * (min(max(math.log10(ms), self.low), self.high) - self.low) / (self.high - self.low) if ms else BARS

    def ticks(self, count: int = 6) -> list:
        step = next((step for step in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600) if (self.last - self.first) / step <= count), 1200)
        return [number * step for number in range(math.ceil(self.first / step), math.floor(self.last / step) + 1)]


def _picture(rows: list, scale: _Scale) -> str:
    name, colour, shade = _engine(rows[0]), _colour(rows[0]), rows[0]["course"]
    title = f"{name}, {rows[0]['driver']}"
    parts = [f'<text x="{LEFT}" y="18" class="title">{_text(title)}</text>']
    for what, start, end in (("pre", shade["started_s"], 0), ("post", 0, shade["finished_s"])):
        left, right = scale.x(start), scale.x(end)
        parts.append(f'<rect class="{what}" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0):.1f}" height="{BOTTOM - TOP}"/>')
    for share in (0, 0.5, 1):
        y = scale.y(share * scale.most / 1.1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{_digits(share * scale.most / 1.1)}</text>')
    for second in scale.ticks():
        parts.append(f'<text x="{scale.x(second):.1f}" y="{BOTTOM + 18}" class="mid">{second:g} s</text>')
    parts.append(f'<line class="switch" x1="{scale.x(0):.1f}" x2="{scale.x(0):.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
    for row in rows:
        course = row["course"]
        points = " ".join(f"{scale.x(course['first_s'] + number + 0.5):.1f},{scale.y(value):.1f}" for number, value in enumerate(course["per_second"]))
        parts.append(f'<polyline class="line {colour}" points="{points}"/>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 40}" class="mid">requests per second, around the switch</text>')
    hist = figures.pooled(rows)
    latencies = [(label, figures.slower_than(hist, part)) for part, label in PARTS]
    latencies.append(("longest", max((row["latency_worst_ms"] for row in rows if row["latency_worst_ms"] is not None), default=None)))
    for number, (label, value) in enumerate(latencies):
        y = TOP + 10 + number * 44
        parts.append(f'<text x="{BARS - 8}" y="{y + 19}" class="end">{label}</text>')
        if value is not None:
            parts.append(f'<rect class="{colour}" x="{BARS}" y="{y}" width="{max(scale.right(value) - BARS, 1):.1f}" height="28" rx="2"/>')
            parts.append(f'<text x="{scale.right(value) + 6:.1f}" y="{y + 19}">{shown("_ms", value)}</text>')
    parts.append(f'<text x="{(BARS + EDGE) / 2}" y="{BOTTOM + 40}" class="mid">latency, on a scale of logarithms</text>')
    degraded = statistics.median([row["degraded_ms"] for row in rows if row["degraded_ms"] is not None] or [0])
    said = f"{title}: latency " + ", ".join(f"{label} {shown('_ms', value)}" for label, value in latencies) + f"; degraded {shown('_ms', degraded)}"
    return f'<svg class="picture" viewBox="0 0 960 320" role="img" aria-label="{_text(said)}">{"".join(parts)}</svg>'


CSS = """
:root{--page:#f3f5f8;--card:#fff;--ink:#17202b;--soft:#536071;--line:#dde2e9;--ok:#14733f;--bad:#b3261e;
--precopy:#7a8696;--userfault:#2f7ac9;--siw:#8b45c9;--rxe:#c0541f}
@media screen and (prefers-color-scheme:dark){:root{--page:#0e1218;--card:#171d26;--ink:#e9edf3;--soft:#a5b0bf;--line:#2c3541;--ok:#5fd394;--bad:#ff8f86;
--precopy:#94a1b3;--userfault:#5fa4ee;--siw:#b27cec;--rxe:#ec8a53}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main{max-width:1160px;margin:0 auto;padding:20px;display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
section,header{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 20px 18px;min-width:0}
h1,h2,h3,p{margin:0}h1{font-size:28px}h2{font-size:18px}h3{font-size:15px;margin:12px 0 4px}
.note,.soft,small{color:var(--soft)}.note{font-size:14px}small{font-size:13px;font-weight:400}.ok{color:var(--ok)}.bad{color:var(--bad)}
ul{margin:8px 0 14px;padding-left:20px}a{color:var(--userfault)}code{font:13px ui-monospace,"DejaVu Sans Mono",monospace}
.groups{display:grid;gap:6px 32px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.row{display:grid;grid-template-columns:150px minmax(0,1fr) 78px;gap:0 10px;align-items:center;font-size:14px}.row span:last-child{text-align:right}
.row svg{display:block;overflow:visible}
.precopy{fill:var(--precopy)}.userfault{fill:var(--userfault)}.siw{fill:var(--siw)}.rxe{fill:var(--rxe)}.pale{opacity:.3}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.line.precopy{stroke:var(--precopy)}.line.userfault{stroke:var(--userfault)}
.line.siw{stroke:var(--siw)}.line.rxe{stroke:var(--rxe)}
.picture{display:block;width:100%;height:auto;margin-top:14px;border-top:1px solid var(--line)}.picture text{fill:var(--soft);font-size:13px}
.picture .title{fill:var(--ink);font-size:15px;font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--line)}.switch{stroke:var(--ink);stroke-dasharray:4 3}.pre,.post{fill:var(--soft);opacity:.1}.post{opacity:.2}
.scroll{overflow-x:auto;margin-top:10px}table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;font-weight:600}
thead th{color:var(--soft);font-weight:400;font-size:13px}th,td{padding:5px 10px 5px 0;vertical-align:top}
tbody th{min-width:170px;overflow-wrap:normal}td{white-space:nowrap}td code,.wrap{white-space:normal}tbody tr{border-top:1px solid var(--line)}
@media print{body{background:#fff}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}section{break-inside:avoid}}
"""
