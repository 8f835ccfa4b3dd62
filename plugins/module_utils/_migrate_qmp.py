# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Drives a migration of a QEMU that runs as a systemd unit, without libvirt.

Each side has a unit of its own that talks to its QEMU alone: :class:`Outgoing` on the source, :class:`Incoming` on the
destination. They need no connection to each other besides QEMU's own stream, because each can tell from its QEMU what
the other did: a stream that breaks after the switch leaves both in ``postcopy-paused``, whereupon the destination
listens again and the source connects again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import time

from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Aborted, MigrationError, Record, Stall, record_path, write_json
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpClient, QmpError
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import is_remote_ram

CONFIG_DIR = "/etc/hecaton/vms"
RUN_DIR = "/run/hecaton"
POLL = 0.25
#: States of a QEMU that a VM has not arrived in.
WAITS = ("inmigrate", "prelaunch")
#: The line by which QEMU waits for a VM, after its definition.
WAITING = "QEMU_INCOMING=-incoming defer\n"
#: States of query-migrate in which a migration is under way, before and after the switch.
PRECOPY_STATES = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")
POSTCOPY_STATES = ("postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup")
UNFINISHED = PRECOPY_STATES + POSTCOPY_STATES
#: Seconds between attempts to reconnect a post-copy whose stream broke: first, and at most.
BACKOFF = (1.0, 15.0)


def vm_unit(name: str) -> str:
    return f"hecaton-vm@{name}.service"


def agent_socket(name: str) -> str:
    return f"{RUN_DIR}/vm/{name}/agent.sock"


def config_path(name: str) -> str:
    return f"{CONFIG_DIR}/{name}.conf"


def incoming_env(name: str) -> str:
    return f"{RUN_DIR}/incoming/{name}.env"


def systemctl(*arguments: str, check: bool = True) -> str:
    """:raises MigrationError: systemctl failed (with ``check``)."""
    done = subprocess.run(["systemctl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if check and done.returncode:
        raise MigrationError(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def is_active(unit: str) -> bool:
    return systemctl("is-active", unit, check=False) in ("active", "activating", "deactivating")


def ram_files(qmp: QmpClient) -> list:
    """The files on a remote_ram file system that a QEMU has its guest's memory in."""
    found = []
    for memory in qmp.execute("query-memdev"):
        try:
            path = qmp.execute("qom-get", {"path": f"/objects/{memory.get('id')}", "property": "mem-path"})
        except QmpError as err:
            if err.kind == "ConnectionError":
                raise
            continue  # no file
        if path and is_remote_ram(path):
            found.append(path)
    return found


def remove(paths: list) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def capabilities(engine: str, throttle: bool = False) -> list:
    """QMP capabilities of an engine, the same on both sides, but that only the source can throttle the guest."""
    userfault = engine == "userfault"
    wanted = {
        # The source learns from the destination that the VM has landed, instead of assuming it.
        "return-path": True,
        "events": True,
        "postcopy-ram": userfault,
        # A demanded page does not wait behind the stream. Has to be set before the destination listens.
        "postcopy-preempt": userfault,
        # The kernel engine moves RAM by itself: QEMU leaves it out, and stops before it hands the VM over.
        "x-ignore-shared": engine == "remote_ram",
        "pause-before-switchover": engine == "remote_ram",
        "auto-converge": throttle,
    }
    return [{"capability": name, "state": state} for name, state in wanted.items()]


class Outgoing:
    """The source's side.

    :param job: vm, engine, uri, precopy_timeout_s, and the optional limits bandwidth_mib_s, postcopy_bandwidth_mib_s,
        max_downtime_ms, timeout_s (pre-copy given up after), stall_timeout_s (given up when nothing was sent for so long before
        the switch), recovery_timeout_s; onboard: the guest is slowed down when pre-copy does not converge.
    """

    def __init__(self, job: dict, record: Record):
        self.job = job
        self.record = record
        self.name = job["vm"]
        self.qmp: QmpClient | None = None
        self._postcopy_asked = False
        self._cancelled = ""
        self._stall = Stall(job.get("stall_timeout_s") or 0)

    def run(self) -> None:
        """Moves the VM. :raises MigrationError: it stays here, running."""
        self.qmp = QmpClient(agent_socket(self.name))
        status = self.qmp.execute("query-migrate").get("status", "none")
        if status in POSTCOPY_STATES:
            # An earlier unit died in the middle: what it began can only be finished.
            self._postcopy_asked = True
            self.record.phase("postcopy", on="destination")
        elif status in PRECOPY_STATES and self.job.get("resume"):
            self.record.phase("precopy")
        elif status in PRECOPY_STATES:
            raise MigrationError(f"{self.name} is being migrated by somebody else (QEMU says {status}); wait for that or cancel it first")
        elif status == "completed" and self.qmp.execute("query-status")["status"] == "postmigrate":
            self._landed(self.qmp.execute("query-migrate"))
            return
        else:
            self._start()
        self._follow()

    def _start(self) -> None:
        job, qmp = self.job, self.qmp
        qmp.execute("migrate-set-capabilities", {"capabilities": capabilities(job["engine"], bool(job.get("onboard")))})
        mib = 1 << 20
        parameters = {"max-bandwidth": int((job.get("bandwidth_mib_s") or 1 << 20) * mib), "downtime-limit": job.get("max_downtime_ms") or 300}
        parameters["max-postcopy-bandwidth"] = int((job.get("postcopy_bandwidth_mib_s") or 0) * mib)
        qmp.execute("migrate-set-parameters", parameters)
        self.record.phase("precopy")
        qmp.execute("migrate", {"uri": job["uri"]})

    def _follow(self) -> None:
        """Watches QEMU until the migration ended, and says the word where QEMU waits for one."""
        job = self.job
        begun = time.monotonic()
        broken_since, attempt_at, pause = None, 0.0, BACKOFF[0]
        while True:
            try:
                info = self.qmp.execute("query-migrate")
            except QmpError as err:
                self._lost_qemu(err)
            status = info.get("status", "none")
            elapsed = time.monotonic() - begun
            self._note(info)
            if status == "completed":
                self._landed(info)
                return
            if status in ("failed", "cancelled"):
                self._stayed(info)
            if status in ("setup", "active", "cancelling"):
                self._precopy_step(status, elapsed, (info.get("ram") or {}).get("transferred", 0))
            elif status in ("postcopy-active", "device") and self.record.abort_requested():
                self.record.refuse_abort("the VM already runs on the destination; its memory is still arriving, so it can only go on")
            if status == "postcopy-active":
                broken_since, pause = None, BACKOFF[0]
                self.record.phase("postcopy", on="destination")
            elif status == "postcopy-paused":
                now = time.monotonic()
                if broken_since is None:
                    broken_since = now
                    self.record.phase("recovering", on="destination", recoveries=self.record.data["recoveries"] + 1)
                if now - broken_since > job.get("recovery_timeout_s", 3600):
                    raise MigrationError(
                        f"the connection for {self.name}'s memory was lost after the switch and did not come back in {now - broken_since:.0f} s; the VM waits "
                        f"on {job['to']} with its missing pages here: keep both QEMUs running, mend the network and run the evacuation again to resume it"
                    )
                if now >= attempt_at:
                    attempt_at, pause = now + pause, min(pause * 2, BACKOFF[1])
                    self._reconnect()
            time.sleep(POLL)

    def _precopy_step(self, status: str, elapsed: float, sent: int) -> None:
        job = self.job
        if status == "cancelling":
            return
        if self.record.abort_requested():
            self._cancel("aborted on request")
        elif self._stall.over(sent, time.monotonic()):
            self._cancel(self._stall.reason(job["to"]))
        elif job["engine"] == "userfault" and not self._postcopy_asked and status == "active" and elapsed >= (job.get("precopy_timeout_s") or 0):
            try:
                self.qmp.execute("migrate-start-postcopy")
                self._postcopy_asked = True
                self.record.phase("switch")
            except QmpError as err:
                # It may have completed between the question and the order.
                if err.kind == "ConnectionError":
                    raise
        elif job["engine"] == "precopy" and job.get("timeout_s") and elapsed > job["timeout_s"]:
            self._cancel(f"pre-copy did not converge within timeout_s={job['timeout_s']:g}; allow more bandwidth or downtime, or use engine userfault")

    def _cancel(self, reason: str) -> None:
        if not self._cancelled:
            self._cancelled = reason
            self.qmp.execute("migrate_cancel")

    def _reconnect(self) -> None:
        try:
            self.qmp.execute("migrate", {"uri": self.job["uri"], "resume": True})
        except QmpError as err:
            if err.kind == "ConnectionError":
                self._lost_qemu(err)
            self.record.save(reason=f"reconnecting: {err}")

    def _note(self, info: dict) -> None:
        ram = info.get("ram")
        if ram and info["status"] not in ("completed", "failed", "cancelled"):
            self.record.progress(ram["transferred"], ram["remaining"], ram["total"], ram.get("mbps", 0) * 125000)

    def _lost_qemu(self, err: QmpError) -> None:
        if self.record.data["on"] == "destination":
            raise MigrationError(
                f"the source's QEMU of {self.name} ended after the switch and before its last page was sent ({err}); the guest on {self.job['to']} has lost "
                f"those pages. Look at journalctl -u {vm_unit(self.name)} on {self.job['from']}"
            ) from err
        raise MigrationError(f"the QEMU of {self.name} ended or stopped answering during pre-copy ({err}); look at journalctl -u {vm_unit(self.name)}") from err

    def _stayed(self, info: dict) -> None:
        if self._cancelled.startswith("aborted"):
            raise Aborted(self._cancelled)
        reason = self._cancelled or info.get("error-desc") or f"QEMU says the migration {info['status']}"
        raise MigrationError(reason)

    def _landed(self, info: dict) -> None:
        """The destination has everything. Ends the QEMU here and forgets the VM's definition here."""
        ram = info.get("ram") or {}
        self.record.phase(
            "postcopy" if self._postcopy_asked else "switch", on="destination", downtime_ms=info.get("downtime"), total_ms=info.get("total-time"),
            bytes=ram.get("transferred"), rate_mib_s=None,
        )  # fmt: skip
        try:
            left = ram_files(self.qmp)
        except QmpError:
            left = []  # a QEMU that has ended can't say
        self._end_qemu()
        remove(left)
        forget(self.name)
        self.record.finish("moved", on="destination")

    def _end_qemu(self) -> None:
        """Ends the QEMU that the VM has left."""
        try:
            self.qmp.execute("quit")
        except QmpError:
            pass  # QEMU may close the connection before it answers; the unit is waited for below
        deadline = time.monotonic() + 60
        while is_active(vm_unit(self.name)):
            if time.monotonic() > deadline:
                systemctl("kill", "--signal=KILL", vm_unit(self.name), check=False)
                break
            time.sleep(0.1)
        systemctl("reset-failed", vm_unit(self.name), check=False)
        systemctl("disable", vm_unit(self.name), check=False)


def define(name: str, config: str) -> None:
    """Keeps a VM's definition on a host that is its home from now on."""
    os.makedirs(CONFIG_DIR, mode=0o750, exist_ok=True)
    handle = os.open(config_path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as out:
        out.write(config.rstrip() + "\n")


def adopt(name: str, look_only: bool = False) -> bool:
    """Makes this host the home of a VM that arrived while nobody followed it, because the unit that did was killed. Whether it did arrive.

    :param look_only: only says so.
    :raises MigrationError: its QEMU, which may be running the VM, gives no answer.
    """
    if not os.path.exists(incoming_env(name)) or not is_active(vm_unit(name)):
        return False
    try:
        qmp = QmpClient(agent_socket(name), 10)
        try:
            running = qmp.execute("query-status")["status"]
        finally:
            qmp.close()
    except QmpError as err:
        raise MigrationError(
            f"{name} was to arrive on this host, and what followed it there has ended; its QEMU may have got it but gives no answer ({err}); "
            f"look at journalctl -u {vm_unit(name)}"
        ) from err
    if running in WAITS:
        return False
    if not look_only:
        with open(incoming_env(name)) as stream:
            define(name, stream.read().replace(f"\n{WAITING}", "\n"))
        remove([incoming_env(name)])
    return True


def forget(name: str) -> None:
    """Removes a VM's definition from a host that it left."""
    remove([config_path(name), incoming_env(name)])


def listens(address: str, port: int) -> None:
    """Looks whether a program can listen there.

    :raises OSError: it can't; EADDRINUSE: another one does.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    socket.create_server((address, port), family=family).close()


class Incoming:
    """The destination's side: starts QEMU to receive the VM and follows it until it runs here, or cleans up.

    :param job: vm, engine, config (text of the VM's definition), address, port_min, port_max, wait_s (how long an
        announced VM may take to come), and optionally ram (blocks whose files are on a remote_ram file system here).
    """

    #: What ends an arrival and is told in its record.
    ENDS: tuple = (QmpError, MigrationError, OSError)

    def __init__(self, job: dict, state_dir: str):
        self.job = job
        self.name = job["vm"]
        self.path = record_path(state_dir, self.name, incoming=True)
        self.data = {"id": job["id"], "vm": self.name, "driver": "qmp", "engine": job["engine"], "phase": "starting", "result": None, "reason": "",
                     "uri": None, "ram": job.get("ram") or [], "started": time.time(), "finished": None}  # fmt: skip
        self.arrived = False
        self.resumed = False  # QEMU said so, before it was seen
        self.began = False
        self._port = None

    def save(self, **changes) -> None:
        self.data.update(changes)
        write_json(self.path, self.data)

    def run(self) -> None:
        self.save()
        try:
            qmp = self._listen()
            self._receive(qmp)
        except self.ENDS as err:
            # Only before the VM runs here: after that, this QEMU is the VM.
            if not self.arrived:
                self._clean_up()
            self.save(phase="finished", result="failed", reason=str(err), finished=time.time())

    def _clean_up(self) -> None:
        """Leaves nothing on this host of a VM that did not come."""
        systemctl("stop", vm_unit(self.name), check=False)
        systemctl("reset-failed", vm_unit(self.name), check=False)
        # Unlinking a RAM file ends its session, and with it what the source would wait for.
        remove([incoming_env(self.name), *(block["path"] for block in self.data["ram"])])

    def _make_ram(self) -> None:
        """Makes place for the RAM files: what is left of an earlier attempt goes. A VM that runs here would have been found before."""
        remove([block["path"] for block in self.data["ram"]])

    def _look(self) -> None:
        """What else there is to look at while the VM arrives.

        :raises MigrationError: it can't arrive any more.
        """

    def _whole(self) -> bool:
        """Whether the VM that runs here has all it needs."""
        return True

    def _came_and_went(self) -> bool:
        """Whether the VM ran here before its QEMU ended, although it was never asked meanwhile: then QEMU said so by itself."""
        if not self.resumed:
            return False
        # If the source did not hear of it, the VM goes on there: it must not start with this host.
        self.job["enabled"] = False
        self._settle("completed")
        return True

    def _left(self) -> str:
        """What there still is of a VM whose QEMU ended here, for the message."""
        return ""

    def _listen(self) -> QmpClient:
        job = self.job
        self._make_ram()
        os.makedirs(os.path.dirname(incoming_env(self.name)), mode=0o755, exist_ok=True)
        handle = os.open(incoming_env(self.name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as out:
            out.write(f"{job['config'].rstrip()}\n{WAITING}")
        systemctl("start", vm_unit(self.name))
        deadline = time.monotonic() + 60
        while True:
            try:
                qmp = QmpClient(agent_socket(self.name))
                break
            except QmpError as err:
                if not is_active(vm_unit(self.name)):
                    log = subprocess.run(["journalctl", "-q", "-n", "5", "-o", "cat", "-u", vm_unit(self.name)], capture_output=True, text=True, check=False)
                    raise MigrationError(f"QEMU for {self.name} did not start: {log.stdout.strip()[-500:]}") from err
                if time.monotonic() > deadline:
                    raise MigrationError(f"QEMU for {self.name} did not open its monitor in 60 s") from err
                time.sleep(0.1)
        qmp.execute("migrate-set-capabilities", {"capabilities": capabilities(job["engine"])})
        address = f"[{job['address']}]" if ":" in job["address"] else job["address"]
        uri = f"tcp:{address}:{self._take_port()}"
        # Once only: a QEMU that could not listen takes no second address.
        qmp.execute("migrate-incoming", {"uri": uri})
        self.save(phase="listening", uri=uri)
        return qmp

    def _take_port(self) -> int:
        """A free port, kept from other VMs that arrive here until this one's unit ends: after a lost stream it is listened on again.

        :raises MigrationError: there is none.
        """
        job = self.job
        folder = os.path.join(RUN_DIR, "ports")
        os.makedirs(folder, mode=0o755, exist_ok=True)
        problem = os.strerror(errno.EADDRINUSE)
        for port in range(job["port_min"], job["port_max"] + 1):
            lock = open(os.path.join(folder, str(port)), "w")  # noqa: SIM115 - it is held for as long as this process lives
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                listens(job["address"], port)
            except OSError as err:
                lock.close()
                if err.errno in (errno.EWOULDBLOCK, errno.EADDRINUSE):
                    continue
                problem = err.strerror
                break
            self._port = lock
            return port
        raise MigrationError(f"{self.name} can't be listened for on {job['address']} ports {job['port_min']}-{job['port_max']}: {problem}")

    def _receive(self, qmp: QmpClient) -> None:
        since = time.monotonic()
        while True:
            try:
                status = qmp.execute("query-migrate").get("status", "none")
                running = qmp.execute("query-status")["status"]
            except QmpError as err:
                qmp = self._ask_again(qmp, err)
                continue
            if not self.arrived and running not in WAITS and status in ("completed", "postcopy-active", "postcopy-paused"):
                self._settle(status)
            self._look()
            if status == "completed" and self.arrived and self._whole():
                self.save(phase="finished", result="moved", finished=time.time())
                return
            if status == "failed" and not self.arrived:
                raise MigrationError("QEMU says that the incoming migration failed")
            if status == "postcopy-paused":
                self._listen_again(qmp)
            elif status in ("none", "setup") and not self.began and time.monotonic() - since > self.job["wait_s"]:
                raise MigrationError(f"nothing arrived within {self.job['wait_s']:g} s")
            elif status in ("active", "device", "postcopy-active", "completed"):
                self.began = True
                if self.data["phase"] not in ("receiving", "arrived"):
                    self.save(phase="receiving")
            time.sleep(POLL)

    def _ask_again(self, qmp: QmpClient, err: QmpError) -> QmpClient:
        """A new connection to a QEMU that gave no answer: while it waits for a page that is still to come, it can't, also before the VM runs.

        :raises MigrationError: it has ended, or the VM can't arrive any more.
        """
        try:
            self.resumed = self.resumed or any(event.get("event") == "RESUME" for event in qmp.events())
        except QmpError:
            pass  # there was nothing more to hear
        qmp.close()
        time.sleep(POLL)  # for systemd to notice that it has ended
        while is_active(vm_unit(self.name)):
            try:
                return QmpClient(agent_socket(self.name))
            except QmpError:
                self._look()
                time.sleep(POLL)
        if not self.arrived and not self._came_and_went():
            raise MigrationError(f"the stream ended before the VM had arrived ({err})") from err
        raise MigrationError(f"the QEMU of {self.name} ended on this host after the VM had switched to it ({err})" + self._left()) from err

    def _settle(self, status: str) -> None:
        """From here on this host is the VM's home: its definition survives a reboot."""
        self.arrived = True
        define(self.name, self.job["config"])
        if self.job.get("enabled"):
            systemctl("enable", vm_unit(self.name), check=False)
        remove([incoming_env(self.name)])
        self.save(phase="arrived", arrived=time.time())

    def _listen_again(self, qmp: QmpClient) -> None:
        try:
            qmp.execute("migrate-recover", {"uri": self.data["uri"]})
            self.save(phase="arrived", reason="the stream was lost; listening for the source again")
        except QmpError as err:
            if err.kind == "ConnectionError":
                raise
            # Already listening, or the port is not free yet: the next round tries again.
