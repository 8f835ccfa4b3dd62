# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes figures of what guests, clients, hosts and migrations told: pure functions, which touch nothing."""

from __future__ import annotations

import math
import re
import statistics

RECOVERED = 0.9  # of the earlier rate
#: Reports of the guest that are waited for before a move, and after it: what "earlier" and "again" mean.
REPORTS = 8
#: Accesses below this many µs did not wait for a page: no network of the lab is so fast.
FLOOR_US = 64
MEDIANS = ("downtime_ms", "downtime_told_ms", "total_ms", "degraded_ms", "stall_p50_us", "stall_p99_us", "stall_max_us", "stalls",
           "wait_p50_us", "wait_p99_us", "bytes", "cpu_s", "cpu_s_per_gib",
           "pages_demand", "faults_per_working_set", "latency_p50_ms", "latency_p99_ms", "latency_worst_ms")  # fmt: skip
#: What remote_ram has to reach, as a ratio to userfault.
RATIO_GOALS = {"stall_p50_us": 0.5, "stall_p99_us": 0.5, "degraded_ms": 0.5, "downtime_ms": 1.0, "total_ms": 0.8, "cpu_s_per_gib": 0.7}
#: What it has to reach by itself; no run may be worse, and no row of any engine may be wrong.
WORKING_SET_GOAL = 0.15
EVICTION_GOAL = 0.5
KIND = ("engine", "transport", "driver", "workload")


# --- Histograms ---------------------------------------------------------------------------------------------------------


def percentile(hist: list, part: float) -> float | None:
    """The µs within which so much of a histogram lies, whose bucket n ends at 2^n µs; within a bucket on a scale of logarithms."""
    total, seen = sum(hist), 0
    if not total:
        return None
    for bucket, count in enumerate(hist):
        if count and seen + count >= part * total:
            return round(2 ** (bucket - 1 + (part * total - seen) / count), 1)
        seen += count
    return None


def difference(after: list, before: list) -> list:
    return [count - (before[bucket] if bucket < len(before) else 0) for bucket, count in enumerate(after)]


def waits(usual: list, moving: list) -> list:
    """The histogram of accesses that waited for a page: those beyond FLOOR_US, less what there was of such in the same time without a move.

    :param usual: reports of the guest from before the move, oldest first.
    :param moving: its reports from the last one before the switch on.
    """
    usual, moving = ([each for each in some if each["stall_hist"]] for some in (usual, moving))
    if len(usual) < 2 or len(moving) < 2:
        return []
    times = [some[-1]["uptime_ms"] - some[0]["uptime_ms"] for some in (usual, moving)]
    if times[0] <= 0:
        return []
    expected, seen = (difference(some[-1]["stall_hist"], some[0]["stall_hist"]) for some in (usual, moving))
    scale = times[1] / times[0]
    first = FLOOR_US.bit_length()
    return [
        max(0, round(count - scale * (expected[bucket] if bucket < len(expected) else 0))) if bucket >= first else 0 for bucket, count in enumerate(seen)
    ]


# --- Two hosts' clocks --------------------------------------------------------------------------------------------------


def ahead(exchanges: list) -> tuple:
    """How many seconds a host's clock is ahead of ours, and by how many that may be wrong: half of the quickest way there and back.

    :param exchanges: when the host was asked by our clock, what its clock said, when the answer was here.
    """
    asked, said, answered = min(exchanges, key=lambda each: each[2] - each[0])
    return said - (asked + answered) / 2, (answered - asked) / 2


def agreed(first: tuple, second: tuple) -> tuple:
    """The better of two such results. By what they differ beyond their own errors, a clock has gone wrong in between."""
    drift = max(0.0, abs(first[0] - second[0]) - first[1] - second[1])
    value, error = min(first, second, key=lambda each: each[1])
    return value, error + drift


def pause(source: str, target: str) -> tuple | None:
    """When a guest stood still at the source and ran at the target, each by its host's clock; None if one of them did not tell.

    :param source: what its QEMU told there, a line an event: of our own watcher, or of virsh qemu-monitor-event.
    """
    stopped, resumed = (
        [float(moment) for event, moment in re.findall(r"\b(STOP|RESUME)(?: at)? (\d+\.\d+)", text) if event == wanted]
        for text, wanted in ((source, "STOP"), (target, "RESUME"))
    )
    return (stopped[-1], resumed[0]) if stopped and resumed else None


# --- One run ------------------------------------------------------------------------------------------------------------


def measure(before: list, after: list, downtime_ms: float | None) -> dict:
    """What a guest that reports each second saw of a move.

    :param before: its reports up to the switch, oldest first; those from REPORTS before the move on.
    :param after: its reports from the switch on.
    :param downtime_ms: how long it stood still; None when that was not measured.
    """
    usual = statistics.median(each["rate_mib_s"] for each in before[:REPORTS])
    # A guest that writes nothing has no rate that could get worse.
    recovered = next((each for each in after if each["rate_mib_s"] >= RECOVERED * usual), None) if usual else None
    hist = waits(before[:REPORTS], [before[-1], *after])
    return {
        "rate_before_mib_s": usual,
        # The guest's clock stands still while it is paused.
        "degraded_ms": round(recovered["uptime_ms"] - before[-1]["uptime_ms"] + downtime_ms) if recovered and downtime_ms is not None else None,
        "stall_p50_us": percentile(hist, 0.5),
        "stall_p99_us": percentile(hist, 0.99),
        "stall_max_us": max((each["stall_max_us"] for each in [*before[REPORTS:], *after]), default=None),
        "stalls": sum(hist),
    }


def served(before: dict, after: dict, times: dict, downtime_ms: float | None) -> dict:
    """What the client of the database saw of a move.

    :param before: the client's result before the move, ``after``: the one when the database was itself again.
    :param times: started, switched, finished of the migration, by the client's clock.
    :param downtime_ms: how long the guest stood still before ``switched``; None when that was not measured.
    """
    begun = after["started"]
    first = before["updated"] - begun
    usual = statistics.median(before["per_second"][-REPORTS - 1 : -1])  # without the last second, which was not over
    hist = _since(after["latency_ms"], before["latency_ms"])
    start = max(0, math.floor(first) - REPORTS)
    return {
        "rate_before_s": usual,
        "degraded_ms": until_again(after, times["switched"], downtime_ms, usual) if downtime_ms is not None else None,
        "requests": after["requests"] - before["requests"],
        "latency_p50_ms": slower_than(hist, 0.5), "latency_p99_ms": slower_than(hist, 0.99),
        "latency_worst_ms": max(after["worst_ms_per_second"][math.floor(first) :], default=None), "latency_ms": hist,
        "course": {
            # Seconds from the switch.
            "first_s": round(begun + start - times["switched"], 2), "started_s": round(times["started"] - times["switched"], 2),
            "finished_s": round(times["finished"] - times["switched"], 2), "per_second": after["per_second"][start:-1],
        },
    }  # fmt: skip


def until_again(result: dict, switched: float, downtime_ms: float, usual: float) -> int | None:
    """Milliseconds from the pause to the end of the first whole second, after the switch, with nine tenths of the usual requests."""
    begun = result["started"]
    for second in range(max(0, math.ceil(switched - begun)), len(result["per_second"]) - 1):
        if result["per_second"][second] >= RECOVERED * usual:
            return round((begun + second + 1 - switched) * 1000 + downtime_ms)
    return None


def _since(after: list, before: list) -> list:
    earlier = dict(before)
    return [[edge, count - earlier.get(edge, 0)] for edge, count in after if count > earlier.get(edge, 0)]


def slower_than(hist: list, part: float) -> float | None:
    """The upper edge of the bucket in which so much of a list of [upper edge, count] lies."""
    left = part * sum(count for _edge, count in hist)
    for edge, count in sorted(hist):
        left -= count
        if left <= 0:
            return edge
    return None


def pooled(rows: list) -> list:
    """The histograms of some rows as one."""
    counts: dict = {}
    for row in rows:
        for edge, count in row["latency_ms"]:
            counts[edge] = counts.get(edge, 0) + count
    return sorted([edge, count] for edge, count in counts.items())


def cpu_between(samples: str, start: float, end: float) -> float | None:
    """Seconds that a host's processor worked from one moment to another, without what its guests computed.

    :param samples: lines of the time and the first line of /proc/stat.
    :param start: by the host's clock, like ``end``.
    """
    points = []
    for line in samples.splitlines():
        words = line.split()
        if len(words) < 11 or words[1] != "cpu":
            continue  # the last line may have been cut off
        user, nice, system, _idle, _iowait, irq, softirq, _steal, guest = map(int, words[2:11])
        # The kernel counts guests as user time too.
        points.append((float(words[0]), (user + nice + system + irq + softirq - guest) / 100))
    if len(points) < 2:
        return None
    return round(_at(points, end) - _at(points, start), 3)


def _at(points: list, moment: float) -> float:
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before <= moment <= after and after > before:
            return low + (high - low) * (moment - before) / (after - before)
    return points[0][1] if moment < points[0][0] else points[-1][1]


def kernel(counted: dict | None, working_set_mib: float) -> dict:
    """What the kernel module counted of a move; nothing for the other engines."""
    if not counted:
        return {}
    hist = counted["wait_hist"]
    return {
        **{f"pages_{cause}": counted[f"pages_{cause}"] for cause in ("ahead", "zero", "demand", "bubble", "background")},
        "wait_p50_us": percentile(hist, 0.5), "wait_p99_us": percentile(hist, 0.99),
        "faults_per_working_set": round(counted["pages_demand"] * 4096 / (working_set_mib * (1 << 20)), 4),
    }  # fmt: skip


# --- All runs -----------------------------------------------------------------------------------------------------------


def kind(row: dict) -> tuple:
    return tuple(row[key] for key in KIND)


def medians(rows: list) -> list:
    found = []
    for each in dict.fromkeys(map(kind, rows)):
        same = [row for row in rows if kind(row) == each]
        values = {key: [row[key] for row in same if row.get(key) is not None] for key in MEDIANS}
        found.append({
            **dict(zip(KIND, each, strict=True)), "runs": len(same), "moved": sum(row["result"] == "moved" for row in same),
            **{key: statistics.median(some) if some else None for key, some in values.items()},
            "corrupt": sum(row["corrupt"] for row in same), "failed": sum(row["failed"] for row in same),
        })  # fmt: skip
    return found


def ratio(mine: float | None, others: float | None) -> float | None:
    return round(mine / others, 3) if mine is not None and others else None


def verdicts(rows: list, eviction: list, max_downtime_ms: float) -> list:
    """Every goal beside what was measured: figure, workload, transport, ours, stock, value (what is judged), goal, met (null: not measured)."""
    found = []
    middle = medians(rows)
    for mine in (each for each in middle if each["engine"] == "remote_ram"):
        where = {"workload": mine["workload"], "transport": mine["transport"]}
        same = (each for each in middle if each["engine"] == "userfault" and each["driver"] == mine["driver"] and each["workload"] == mine["workload"])
        stock = next(same, {})
        for figure, goal in RATIO_GOALS.items():
            value = ratio(mine[figure], stock.get(figure))
            found.append(_verdict(figure, where, value, goal, mine[figure], stock.get(figure), "ratio"))
        runs = [row for row in rows if kind(row) == kind(mine)]
        for figure, goal in (("downtime_ms", max_downtime_ms), ("faults_per_working_set", WORKING_SET_GOAL)):
            value = max((row[figure] for row in runs if row.get(figure) is not None), default=None)
            found.append(_verdict(figure, where, value, goal, value, None, "worst run"))
        for figure in ("corrupt", "failed"):
            found.append(_verdict(figure, where, mine[figure], 0, mine[figure], stock.get(figure), "sum"))
        found.append(_verdict("given_up", where, mine["runs"] - mine["moved"], 0, None, None, "sum"))
    return found + evicted(eviction)


def evicted(rows: list) -> list:
    """The goal of the eviction, for each transport."""
    times = {key: statistics.median(row["play_s"] for row in rows if eviction_kind(row) == key) for key in dict.fromkeys(map(eviction_kind, rows))}
    loop = times.get(("loop", None))
    return [
        _verdict("play_s", {"workload": "eviction", "transport": transport}, ratio(value, loop), EVICTION_GOAL, value, loop, "ratio")
        for (how, transport), value in times.items() if how == "evacuate"
    ]  # fmt: skip


def eviction_kind(row: dict) -> tuple:
    return row["how"], row["transport"]


def _verdict(figure: str, where: dict, value, goal: float, ours, stock, judged: str) -> dict:
    met = None if value is None else value <= goal
    return {"figure": figure, **where, "ours": ours, "stock": stock, "judged": judged, "value": value, "goal": goal, "met": met}
