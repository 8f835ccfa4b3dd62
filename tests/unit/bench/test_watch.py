# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is watched around a move, with guests, hosts and a database that are played by the test."""

from __future__ import annotations

import json
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
import time
import types

import pytest


@pytest.fixture
def watch(engines):
    return engines.watch


class Lab:
    """Hosts whose clocks go wrong, each by so many seconds, and whose processors are busy for half of the time."""

    ahead = {"hv1": 100.0, "hv2": -50.0}

    def __init__(self):
        self.scripts = []
        self.events = {}

    def talk(self, host, command):
        name, option, script = shlex.split(command)
        assert (name, option) == ("python3", "-c")
        script = script.replace("time.time()", f"(time.time() + {self.ahead[host]})")
        return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ssh(self, host, *command, stdin=None):
        self.scripts.append(stdin or command[0])
        now = time.time() + self.ahead[host]
        if "bench-events" in (stdin or command[0]):
            return types.SimpleNamespace(stdout="" if stdin else self.events.get(host, ""))
        if stdin:
            return types.SimpleNamespace(stdout=f"{now}\n")
        busy = range(-20, 20)
        return types.SimpleNamespace(stdout="\n".join(f"{now + n} cpu 0 0 {50 * (n + 20)} 0 0 0 0 0 0 0" for n in busy))


def test_processors_are_read_by_the_clock_of_their_own_host(watch):
    lab = Lab()
    with watch.Processors(lab, ["hv1", "hv2"]) as processors:
        now = time.time()
    record = {"started": now + 100 - 6, "finished": now + 100 - 2}  # by the clock of hv1
    assert processors.seconds("hv1", record) == pytest.approx(4, abs=0.1)
    assert processors.clock("hv1")(record["finished"]) == pytest.approx(now - 2, abs=0.1)
    assert processors.clock("hv2")(now - 50) == pytest.approx(now, abs=0.1)


def guest(driver="qmp"):
    return types.SimpleNamespace(name="g", driver=driver)


def test_a_pause_is_measured_between_two_clocks(watch):
    lab = Lab()
    with watch.Pause(lab, guest(), ["hv1", "hv2"]) as pause:
        now = time.time()
        lab.events = {"hv1": f"STOP {now + 100 - 2:.6f}\n", "hv2": f"RESUME {now - 50 - 1.8:.6f}\n"}
    seen = pause.measured("hv1", "hv2")
    assert abs(seen["downtime_ms"] - 200) <= seen["downtime_error_ms"]
    assert seen["resumed"] == pytest.approx(now - 1.8, abs=seen["downtime_error_ms"] / 1000)
    assert pause.measured("hv2", "hv1") == {"downtime_ms": None, "downtime_error_ms": None, "resumed": None}


@pytest.mark.parametrize(("driver", "program"), [("qmp", "python3 /run/bench-events.py g\n"), ("libvirt", "virsh qemu-monitor-event --loop\n")])
def test_each_driver_has_its_way_to_tell_of_events(watch, driver, program):
    lab = Lab()
    with watch.Pause(lab, guest(driver), ["hv1"]):
        pass
    assert program in lab.scripts[0]
    assert subprocess.run(["bash", "-n"], input=lab.scripts[0], text=True, check=False).returncode == 0


def test_a_host_that_tells_no_time_ends_the_measurement(watch):
    lab = types.SimpleNamespace(talk=lambda host, command: subprocess.Popen(["cat", "/dev/null"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    with pytest.raises(watch.LabError, match="hv1 does not tell its time"):
        watch.ahead(lab, "hv1")


def test_qemus_events_are_noted_also_of_one_that_comes_later(watch, tmp_path):
    note = subprocess.Popen([sys.executable, "-c", watch.NOTE.replace("/run/hecaton/vm", str(tmp_path)), "g"], stdout=subprocess.PIPE, text=True)
    try:
        (tmp_path / "g").mkdir()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "g" / "qmp.sock"))
            server.listen()
            for event in ("STOP", "RESUME"):  # QEMU goes after each, and another comes
                with server.accept()[0] as monitor:
                    monitor.sendall(b'{"QMP": {}}\r\n')
                    assert json.loads(monitor.recv(100)) == {"execute": "qmp_capabilities"}
                    for each in ("MIGRATION", event):
                        monitor.sendall(json.dumps({"event": each, "timestamp": {"seconds": 17, "microseconds": 250}}).encode() + b"\r\n")
                assert note.stdout.readline() == f"{event} 17.000250\n"
    finally:
        note.kill()
        note.communicate()


def told(seq, rate):
    fields = dict.fromkeys(("pages", "touched", "checked", "sweeps", "corrupt", "dropped", "stall_worst_us", "gap_max_us"), 1)
    line = {"seq": seq, "uptime_ms": seq * 1000, "rate_mib_s": rate, "stall_max_us": 9, "stall_hist": [seq], **fields}
    return b"@hecaton " + json.dumps(line).encode() + b"\n"


def test_a_guest_is_followed_by_the_numbers_of_its_reports(watch, monkeypatch):
    logs = {"hv1": [told(n, 50) for n in range(1, 6)], "hv2": []}

    def grow(_seconds):
        """Each time that there is waited, the guest goes on: on hv1, and on hv2 once it was moved, where it is slow until report 25."""
        here = logs["hv2"] or logs["hv1"]
        last = len(logs["hv1"]) + len(logs["hv2"])
        here.extend(told(n, 5 if logs["hv2"] and n < 26 else 50) for n in range(last + 1, last + 6))

    monkeypatch.setattr(watch.time, "sleep", grow)
    guests = types.SimpleNamespace(_logs=lambda names, hosts: {"g": b"".join(logs[hosts[0]])})
    watcher = watch.Reports(guests, types.SimpleNamespace(name="g"))
    watcher.before("hv1")
    logs["hv2"] = [told(len(logs["hv1"]) + 1, 5)]
    seen = watcher.after("hv2", {"downtime_ms": 200}, None)
    assert seen["rate_before_mib_s"] == 50
    assert seen["degraded_ms"] == (26 - len(logs["hv1"])) * 1000 + 200


class Valkey(socketserver.StreamRequestHandler):
    """Enough of a database for the client and for what is asked of it."""

    def handle(self):
        while header := self.rfile.readline():
            words = []
            for _number in range(int(header[1:])):
                words.append(self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2])
            self.wfile.write(self.answer(*words))

    def answer(self, name, *rest):
        data = self.server.data
        if name == b"PING":
            return b"+PONG\r\n"
        if name == b"INFO":
            said = b"# Memory\r\nused_memory:2097152\r\nused_memory_human:2.00M\r\n"
            return b"$%d\r\n%b\r\n" % (len(said), said)
        if name == b"CONFIG":
            self.server.set[rest[1]] = rest[2]
            return b"+OK\r\n"
        if name == b"SET":
            data[rest[0]] = rest[1]
            return b"+OK\r\n"
        if name == b"INCR":
            data[rest[0]] = b"%d" % (int(data[rest[0]]) + 1)
            return b":%b\r\n" % data[rest[0]]
        return b"$%d\r\n%b\r\n" % (len(data[rest[0]]), data[rest[0]])


@pytest.fixture
def valkey():
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Valkey)
    server.data, server.set = {}, {}
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_the_client_of_the_database_works_around_the_move(watch, valkey, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "KEYS", 40)
    monkeypatch.setattr(watch.figures, "REPORTS", 1)
    guests = types.SimpleNamespace(lab=types.SimpleNamespace(forward=lambda name: valkey.server_address[1]))
    database = watch.Database(guests, types.SimpleNamespace(name="db"), tmp_path)
    try:
        assert database.data_mib == 2.0
        assert set(valkey.set) == {b"maxmemory", b"auto-aof-rewrite-percentage"}
        database.before("hv1")
        now = time.time()
        seen = database.after("hv2", {"started": now - 1, "switched": now, "finished": now + 0.3, "downtime_ms": 5}, lambda moment: moment)
        assert seen["rate_before_s"] > 50
        assert 0 < seen["degraded_ms"] < 3000
        assert len(seen["course"]["per_second"]) > 1
        assert database.check() == {"corrupt": 0, "failed": 0}
    finally:
        database.close()
    assert database.process.returncode == 0


# --- One run ------------------------------------------------------------------------------------------------------------


class Watcher:
    def before(self, host):
        self.on = [host]

    def after(self, host, record, clock):
        self.on.append(host)
        self.record = record
        return {"degraded_ms": 900, "stall_p50_us": 700.0, "stall_p99_us": 900.0}

    def check(self):
        return {"corrupt": 0, "failed": 0}


RECORD = {"result": "moved", "reason": "", "downtime_ms": 100, "total_ms": 5000, "bytes": 7, "started": 1.0, "switched": 2.0, "finished": 3.0}
EVENTS = {"hv1": "STOP 1100.5", "hv2": "RESUME 950.75"}  # each by its clock: 0.25 s
COUNTED = {"wait_hist": [0] * 10 + [4], **{f"pages_{cause}": 8 for cause in ("ahead", "zero", "demand", "bubble", "background")}}


@pytest.fixture
def run(engines, monkeypatch, tmp_path):
    """Runs a move whose playbook leaves this record, or none."""

    def moved(engine, record, status=0, events=None):
        def play(lab, name, folder, variables, quiet):
            if record:
                (folder / "record.json").write_text(json.dumps(record))
            moved.told = variables
            return status

        monkeypatch.setattr(engines.playbook, "run", play)
        setting = engines.Setting(Lab(), tmp_path)
        setting.lab.events = events or EVENTS
        setting.guest, setting.watch = engines.workloads.WORKLOADS["hot"].guest("qmp", True), Watcher()
        return engines.move(setting, engine, "hot"), setting

    return moved


def test_a_row_of_the_kernel_engine(run):
    row, setting = run("remote_ram:siw", {**RECORD, "remote_ram": COUNTED})
    assert (row["engine"], row["transport"], row["workload"], row["driver"], row["result"]) == ("remote_ram", "siw", "hot", "qmp", "moved")
    assert (row["total_ms"], row["degraded_ms"], row["bytes"], row["corrupt"]) == (5000, 900, 7, 0)
    assert abs(row["downtime_ms"] - 250) <= row["downtime_error_ms"]
    assert row["downtime_told_ms"] == 100 and "resumed" not in row
    # What watches the guest counts from there on, by the clock of the source.
    assert setting.watch.record["downtime_ms"] == row["downtime_ms"]
    assert setting.watch.record["switched"] == pytest.approx(1100.75, abs=0.2)
    assert row["pages_demand"] == 8 and row["faults_per_working_set"] == pytest.approx(8 / 16384, abs=1e-4)
    assert setting.watch.on == ["hv1", "hv2"] and setting.place == ["hv2", "hv1"]
    assert run.told["bench_engine"] == "remote_ram"


def test_precopy_has_no_missing_pages(run):
    row, _setting = run("precopy", RECORD)
    assert row["stall_p50_us"] is None and "pages_demand" not in row


def test_what_qemu_tells_is_not_taken_for_what_was_not_measured(run):
    row, setting = run("userfault", RECORD, events={"hv1": "STOP 1100.5"})
    assert (row["downtime_ms"], row["downtime_error_ms"], row["downtime_told_ms"]) == (None, None, 100)
    assert setting.watch.record["downtime_ms"] is None and setting.watch.record["switched"] == RECORD["switched"]


def test_a_move_that_was_given_up_is_a_row_and_the_guest_is_where_it_was(run):
    row, setting = run("precopy", {**RECORD, "result": "failed", "reason": "it did not converge"})
    assert (row["result"], row["reason"]) == ("failed", "it did not converge")
    assert "downtime_ms" not in row and setting.place == ["hv1", "hv2"]


def test_a_move_without_a_record_ends_the_benchmark(engines, run):
    with pytest.raises(engines.LabError):
        run("userfault", None, status=2)


# --- Eviction -----------------------------------------------------------------------------------------------------------


class Guests:
    """Six guests that have left hv1, but for those that stay."""

    stay: tuple = ()

    def __init__(self, lab):
        self.ended = False

    def deploy(self, guests, host):
        self.names = [guest.name for guest in guests]

    def where(self):
        return {name: ["hv1" if name in self.stay else "hv2"] for name in self.names}

    def full_check(self, names, timeout):
        return {name: {"corrupt_total": 0} for name in names}

    def destroy(self):
        self.ended = True


@pytest.fixture
def evict(engines, monkeypatch, tmp_path):
    def play(lab, name, folder, variables, quiet):
        if name == "hecaton.fleet.evacuate":
            vms = [{"engine": "remote_ram", "downtime_ms": 90 + n, "started_s": n, "finished_s": n + 5} for n in range(6)]
            (folder / "report.json").write_text(json.dumps({"vms": vms}))
        else:
            moved = range(len(variables["bench_moves"]))
            moves = [{"engine": "precopy", "downtime_ms": 90, "started": 10.0 * n, "finished": 10.0 * n + 9} for n in moved]
            (folder / "records.json").write_text(json.dumps(moves))
        return 0

    monkeypatch.setattr(engines.eviction.playbook, "run", play)
    monkeypatch.setattr(engines.eviction.lab_guests, "Guests", Guests)
    return lambda transport: engines.eviction.run(None, tmp_path, transport)


def test_rows_of_evictions(evict):
    row = evict("siw")
    assert (row["how"], row["engine"], row["transport"], row["vms"], row["moving_s"], row["downtime_max_ms"]) == ("evacuate", "remote_ram", "siw", 6, 10, 95)
    row = evict(None)
    assert (row["how"], row["engine"], row["transport"], row["vms"], row["moving_s"]) == ("loop", "precopy", None, 6, 59)


def test_a_vm_that_did_not_leave_is_not_timed(engines, evict, monkeypatch):
    monkeypatch.setattr(Guests, "stay", ("six3",))
    with pytest.raises(engines.LabError, match="six3 did not leave hv1"):
        evict("rxe")
