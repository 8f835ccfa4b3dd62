# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Watches a guest and its hosts around a move: what they told goes through figures.py into the row of the run.

Whatever watches a guest has ``before(host)``, then ``after(host, record, clock)`` once it was moved there (the figures that it saw),
and ``check()``, the requests or pages that are wrong.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "lab"), str(HERE.parent / "guest"), str(HERE)]

import client
import figures
import guests as lab_guests
import report as guest_report
from image import LabError

#: The data set: so many values of so many bytes take 132 MiB of a guest of 256, and its kernel and the rest most of what is left.
KEYS, VALUE_BYTES, MAXMEMORY = 64000, 2000, "170mb"
RATE, CONNECTIONS = 100, 4  # requests a second, half of them writes
LOAD_SECONDS = 900  # for the data set to be written


class Reports:
    """A guest that reports each second on its console."""

    def __init__(self, guests: lab_guests.Guests, guest: lab_guests.Guest):
        self.guests, self.name = guests, guest.name
        self.source, self.first = "", 0

    def close(self) -> None:
        pass

    def reports(self, host: str) -> list:
        """What it told on a host, oldest first."""
        found = guest_report.parse(self.guests._logs([self.name], [host]).get(self.name, b"")).reports
        return sorted(found, key=lambda each: each["seq"])

    def await_reports(self, host: str, since: int, settled=lambda found: True, timeout: float = 240) -> list:
        """Its reports after number ``since``, once there are enough, and ``settled`` is content or the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            found = [each for each in self.reports(host) if each["seq"] > since]
            if len(found) >= figures.REPORTS and (settled(found) or time.monotonic() > deadline):
                return found
            if time.monotonic() > deadline + timeout:
                raise LabError(f"{self.name} on {host} reports nothing any more")
            time.sleep(2)

    def before(self, host: str) -> None:
        told = self.reports(host)
        self.source = host
        self.first = self.await_reports(host, told[-1]["seq"] if told else 0)[0]["seq"]

    def after(self, host: str, record: dict, clock) -> dict:
        before = [each for each in self.reports(self.source) if each["seq"] >= self.first]
        usual = statistics.median(each["rate_mib_s"] for each in before[: figures.REPORTS])
        again = self.await_reports(host, before[-1]["seq"], lambda found: any(each["rate_mib_s"] >= figures.RECOVERED * usual for each in found))
        return figures.measure(before, again, record["downtime_ms"])

    def check(self) -> dict:
        return {"corrupt": self.guests.full_check([self.name], timeout=300)[self.name]["corrupt_total"], "failed": 0}


class Database:
    """A guest that runs valkey, whose client outside knows what each key has to hold. The client works from here until it is closed."""

    def __init__(self, guests: lab_guests.Guests, guest: lab_guests.Guest, folder: pathlib.Path):
        self.port = guests.lab.forward("valkey")
        self.result = folder / "client.json"
        self.result.unlink(missing_ok=True)
        self._make_room()
        self.process = subprocess.Popen([
            sys.executable, str(HERE.parent / "guest" / "client.py"), "--port", str(self.port), "--name", guest.name, "--result", str(self.result),
            "--connections", str(CONNECTIONS), "--rate", str(RATE), "--keys", str(KEYS), "--value-bytes", str(VALUE_BYTES), "--wait", "300",
            # As in the demo: late is late, not lost.
            "--timeout", "300", "--grace", "60",
        ])  # fmt: skip
        try:
            self._await(lambda seen: seen["requests"], LOAD_SECONDS, "got no answer from the database")
            self.data_mib = self._data_mib()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _call(self, *command: bytes):
        try:
            connection = client.Connection("127.0.0.1", self.port, 60)
            try:
                return connection.call(*command)
            finally:
                connection.close()
        except client.Broken as err:
            raise LabError(f"the database did not answer {command[0].decode()}: {err}") from err

    def _make_room(self) -> None:
        # Rewriting the file of writes would fork a server that has no room for that.
        for key, value in ((b"maxmemory", MAXMEMORY.encode()), (b"auto-aof-rewrite-percentage", b"0")):
            said = self._call(b"CONFIG", b"SET", key, value)
            if said != b"OK":
                raise LabError(f"the database answered {said!r} when {key.decode()} was set")

    def _data_mib(self) -> float:
        found = re.search(rb"^used_memory:(\d+)", self._call(b"INFO", b"memory"), re.MULTILINE)
        return round(int(found[1]) / (1 << 20), 1)

    def seen(self) -> dict | None:
        with contextlib.suppress(OSError):
            return json.loads(self.result.read_text())
        return None

    def _await(self, settled, seconds: float, otherwise: str | None = None) -> dict:
        """The client's result, once ``settled`` is content with it. ``otherwise`` says what is wrong with one that never is."""
        deadline = time.monotonic() + seconds
        while True:
            seen = self.seen()
            if seen and settled(seen):
                return seen
            if self.process.poll() is not None or time.monotonic() > deadline:
                if self.process.poll() is not None or otherwise:
                    raise LabError(f"the client outside {otherwise or 'has ended'}")
                return seen
            time.sleep(0.5)

    def before(self, host: str) -> None:
        count = len(self.seen()["per_second"])
        self.start = self._await(lambda seen: len(seen["per_second"]) > count + figures.REPORTS, 120, "counts no seconds any more")

    def after(self, host: str, record: dict, clock) -> dict:
        times = {key: clock(record[key]) for key in ("started", "switched", "finished")}
        paused, usual = record["downtime_ms"], statistics.median(self.start["per_second"][-figures.REPORTS - 1 : -1])
        done = times["finished"] + figures.REPORTS
        last = self._await(lambda seen: seen["updated"] > done and figures.until_again(seen, times["switched"], paused or 0, usual), 240)
        return {"data_mib": self.data_mib, **figures.served(self.start, last, times, paused)}

    def check(self) -> dict:
        now = self.seen()
        return {"corrupt": now["wrong"] - self.start["wrong"], "failed": now["failed"] - self.start["failed"]}


#: What a host runs to tell its time, once for each line that it is sent.
TELL = "import sys, time\nfor _line in sys.stdin: print(repr(time.time()), flush=True)"
#: What a host runs to note when the QEMU of a VM stops and runs it, by QEMU's own account. QEMU may come later, and may go.
NOTE = """
import json, socket, sys, time
while True:
    try:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(f"/run/hecaton/vm/{sys.argv[1]}/qmp.sock")
            monitor.sendall(b'{"execute": "qmp_capabilities"}')
            for line in monitor.makefile():
                told = json.loads(line)
                if told.get("event") in ("STOP", "RESUME"):
                    print(told["event"], "{seconds}.{microseconds:06}".format(**told["timestamp"]), flush=True)
    except (OSError, ValueError):
        pass  # not there yet, or not any more
    time.sleep(0.2)
"""


def ahead(lab, host: str, count: int = 20) -> tuple:
    """How many seconds a host's clock is ahead of ours, and by how many that may be wrong."""
    exchanges = []
    try:
        with lab.talk(host, f"python3 -c {shlex.quote(TELL)}") as told:
            for _number in range(count):
                asked = time.time()
                told.stdin.write("\n")
                told.stdin.flush()
                said = told.stdout.readline()
                exchanges.append((asked, float(said), time.time()))
    except (OSError, ValueError) as err:
        raise LabError(f"{host} does not tell its time: {err}") from err
    return figures.ahead(exchanges)


class Pause:
    """How long a guest stands still while the block moves it: from QEMU's event STOP at the source to RESUME at the target.

    What QEMU itself tells of the downtime ends with the last byte sent for post-copy, and with the target's answer for all else.
    """

    FILE = "/run/bench-events"

    def __init__(self, lab, guest: lab_guests.Guest, hosts):
        self.lab, self.guest, self.hosts = lab, guest, hosts
        self.clocks: dict = {}
        self.told: dict = {}

    def __enter__(self):
        command = f"python3 {self.FILE}.py {self.guest.name}" if self.guest.driver == "qmp" else "stdbuf -oL virsh qemu-monitor-event --loop"
        script = f"""
            cat > {self.FILE}.py <<'END'{NOTE}END
            systemctl stop -q bench-events 2>/dev/null
            systemd-run -q --collect --unit bench-events -p StandardOutput=truncate:{self.FILE} {command}
        """
        for host in self.hosts:
            self.lab.ssh(host, "bash", stdin=script)
            self.clocks[host] = ahead(self.lab, host)
        return self

    def __exit__(self, *_error):
        for host in self.hosts:
            self.told[host] = self.lab.ssh(host, f"systemctl stop -q bench-events; cat {self.FILE}").stdout
            self.clocks[host] = figures.agreed(self.clocks[host], ahead(self.lab, host))

    def measured(self, source: str, target: str) -> dict:
        """``downtime_ms``, by how much it may be wrong, and ``resumed`` by our clock; None each if QEMU did not tell both."""
        found = figures.pause(self.told[source], self.told[target])
        if found is None:
            return {"downtime_ms": None, "downtime_error_ms": None, "resumed": None}
        (there, off), (here, off_too) = self.clocks[source], self.clocks[target]
        stopped, resumed = found[0] - there, found[1] - here
        return {"downtime_ms": round((resumed - stopped) * 1000), "downtime_error_ms": math.ceil((off + off_too) * 1000), "resumed": resumed}


class Processors:
    """How busy the processors of some hosts are while the block runs, a sample a second."""

    FILE = "/run/bench-cpu"

    def __init__(self, lab, hosts):
        self.lab, self.hosts = lab, hosts
        self.clocks: dict = {}
        self.samples: dict = {}

    def __enter__(self):
        # In a file: systemd-run would put its own variables into a command.
        script = f"""
            cat > {self.FILE}.sh <<'END'
            while read -r line < /proc/stat; do echo $EPOCHREALTIME $line; sleep 1; done > {self.FILE}
END
            systemctl stop -q bench-cpu 2>/dev/null
            systemd-run -q --collect --unit bench-cpu bash {self.FILE}.sh && date +%s.%N
        """
        for host in self.hosts:
            said = self.lab.ssh(host, "bash", stdin=script).stdout.split()[-1]
            self.clocks[host] = float(said) - time.time()
        return self

    def __exit__(self, *_error):
        for host in self.hosts:
            self.samples[host] = self.lab.ssh(host, f"systemctl stop -q bench-cpu; cat {self.FILE}").stdout

    def clock(self, host: str):
        """What makes a time of a host's clock one of ours."""
        return lambda moment: moment - self.clocks[host]

    def seconds(self, source: str, record: dict) -> float | None:
        """What all hosts together worked from start to end of a migration, which its record tells by the source's clock."""
        found = []
        for host in self.hosts:
            shift = self.clocks[host] - self.clocks[source]
            found.append(figures.cpu_between(self.samples[host], record["started"] + shift, record["finished"] + shift))
        return None if None in found else round(sum(found), 2)
