# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads what a guest of the lab wrote on its serial port: ``python3 report.py LOG...`` prints a summary as JSON.

A log may be cut anywhere, and hold lines of the kernel, also in the middle of ours. Several logs of one guest (one of
each host that it ran on) are read as one.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys

MARKER = b"@hecaton "
REPORT_NUMBERS = (
    "seq", "uptime_ms", "pages", "touched", "checked", "sweeps", "corrupt", "dropped", "stall_max_us",
    "stall_worst_us", "gap_max_us",
)  # fmt: skip
TROUBLE = re.compile(
    rb"Kernel panic|Oops|BUG:|general protection fault|segfault|I/O error|EXT4-fs error|Out of memory|Machine check"
)


@dataclasses.dataclass
class Summary:
    """What a guest told; ``trouble`` are lines of its kernel that tell of damage, ``messages`` plain words."""

    started: list = dataclasses.field(default_factory=list)
    reports: list = dataclasses.field(default_factory=list)
    errors: list = dataclasses.field(default_factory=list)
    warnings: list = dataclasses.field(default_factory=list)
    full_checks: list = dataclasses.field(default_factory=list)
    others: list = dataclasses.field(default_factory=list)
    messages: list = dataclasses.field(default_factory=list)
    trouble: list = dataclasses.field(default_factory=list)
    garbled: int = 0

    @property
    def latest(self) -> dict | None:
        """The report with the highest number, whichever log it is in."""
        return max(self.reports, key=lambda r: r["seq"], default=None)

    @property
    def corrupt(self) -> int:
        """Pages found corrupt. No line alone is enough: each may have been lost."""
        reported = [r["corrupt"] for r in self.reports]
        checked = [c.get("corrupt_total", c["corrupt"]) for c in self.full_checks]
        return max([len(self.corruptions), *reported, *checked])

    @property
    def corruptions(self) -> list:
        return [e for e in self.errors if e["error"] == "corrupt"]

    @property
    def max_stall_us(self) -> int:
        """The longest access to a page."""
        return max((r["stall_worst_us"] for r in self.reports), default=0)

    @property
    def max_gap_us(self) -> int:
        """The longest time in which the program did not run, or ran but got nowhere."""
        return max((r["gap_max_us"] for r in self.reports), default=0)

    def stalls_over(self, us: int) -> int:
        """How many accesses took at least about so long (a power of two at or above ``us``)."""
        bucket = (us - 1).bit_length() + 1 if us > 0 else 0
        return sum(self.latest["stall_hist"][bucket:]) if self.latest else 0

    def as_dict(self) -> dict:
        return {
            "boots": len(self.started), "latest": self.latest, "corrupt": self.corrupt,
            "max_stall_us": self.max_stall_us, "max_gap_us": self.max_gap_us, "full_checks": self.full_checks,
            "errors": self.errors, "warnings": self.warnings, "messages": self.messages, "trouble": self.trouble,
            "garbled": self.garbled,
        }  # fmt: skip


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _whole_report(item: dict) -> bool:
    hist = item.get("stall_hist")
    return all(_number(item.get(n)) for n in REPORT_NUMBERS) and isinstance(hist, list) and all(map(_number, hist))


def _take(summary: Summary, item: dict) -> bool:
    """Files one line; false when it doesn't look like any that the guest writes."""
    if "seq" in item:
        if _whole_report(item):
            summary.reports.append(item)
            return True
        return False
    if item.get("full_check") is True:
        if _number(item.get("pages")) and _number(item.get("corrupt")):
            summary.full_checks.append(item)
            return True
        return False
    if item.get("started") is True:
        summary.started.append(item)
    elif isinstance(item.get("error"), str):
        summary.errors.append(item)
    elif isinstance(item.get("warning"), str):
        summary.warnings.append(item)
    else:
        summary.others.append(item)
    return True


def parse(*logs: bytes) -> Summary:
    summary = Summary()
    for log in logs:
        head, *chunks = log.split(MARKER)
        _trouble(summary, head)
        for number, chunk in enumerate(chunks):
            line, newline, rest = chunk.partition(b"\n")
            _trouble(summary, rest)
            text = line.strip().decode("ascii", errors="replace")
            if text.startswith("{"):
                try:
                    # What follows the object on its line is somebody else's.
                    item = json.JSONDecoder().raw_decode(text)[0]
                except (ValueError, RecursionError):
                    # The end of the log may be a line that is still being written.
                    summary.garbled += bool(newline) or number < len(chunks) - 1
                    continue
                if not _take(summary, item):
                    summary.garbled += 1
            elif newline:
                summary.messages.append(text)
    return summary


def _trouble(summary: Summary, text: bytes) -> None:
    summary.trouble += [
        line.strip().decode("ascii", errors="replace") for line in text.splitlines() if TROUBLE.search(line)
    ]


def read(*paths) -> Summary:
    return parse(*(pathlib.Path(p).read_bytes() for p in paths))


if __name__ == "__main__":
    print(json.dumps(read(*sys.argv[1:]).as_dict(), indent=1))
