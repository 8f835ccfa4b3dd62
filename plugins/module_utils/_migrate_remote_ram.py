# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Drives a migration whose RAM is moved by the kernel module ``remote_ram``, for a QEMU that runs as a systemd unit.

QEMU's own stream carries nothing but the devices' state. RAM is copied ahead for a bounded time by the kernel; then QEMU
stops the guest and drains its I/O (``pre-switchover``), the kernel hands the RAM files over, QEMU goes on, and the guest
runs on the destination, which fetches what it does not have. The source's QEMU ends at that point; its RAM files go on
serving until the last page has left.
"""

from __future__ import annotations

import hashlib
import re
import time

from ansible_collections.hecaton.fleet.plugins.module_utils import _migrate_qmp
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_qmp import POLL, PRECOPY_STATES, forget, is_active, vm_unit
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Aborted, MigrationError, Record
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpClient, QmpError
from ansible_collections.hecaton.fleet.plugins.module_utils._remote_ram import ENDED, RamFile, RemoteRamError, is_remote_ram

#: States in which a source's file has pages that a VM that has left lacks.
NEEDED = ("postcopy", "reconnecting")
#: Those in which it serves that VM, or has just done so.
SERVING = (*NEEDED, "complete")
#: What systemd says of a QEMU that did not end by itself.
KILLED = ("signal", "core-dump", "oom-kill")
#: Seconds between two looks at a guest that stands still, if QEMU says nothing before.
SWITCH_POLL = 0.1
#: Seconds for QEMU to stop the guest, and for the destination to take the devices' state.
SWITCH_PATIENCE = 60
#: What of the kernel's statistics goes into the record.
FIGURES = (
    "pages", "pages_ahead", "pages_zero", "pages_demand", "pages_bubble", "pages_background", "pages_stale", "pages_missing", "pages_dirty",
    "bytes_ahead", "bytes_after", "late_writes", "faults_nowait", "faults_retry", "faults_plain", "faults_joined", "wait_ns_total",
    "wait_ns_max", "read_ns_total", "reconnects", "switch_us", "precopy_us", "rounds",
)  # fmt: skip


def ram_blocks(qmp: QmpClient) -> list:
    """The RAM files of a VM: ``[{"id", "path", "size"}]``.

    :raises MigrationError: some of its RAM is not a shared file on a remote_ram file system.
    """
    blocks = []
    for memory in qmp.execute("query-memdev"):
        ident = memory.get("id")
        kind = qmp.execute("qom-get", {"path": f"/objects/{ident}", "property": "type"}) if ident else "anonymous memory"
        path = qmp.execute("qom-get", {"path": f"/objects/{ident}", "property": "mem-path"}) if kind == "memory-backend-file" else ""
        if not path or not memory.get("share") or not is_remote_ram(path):
            raise MigrationError(
                f"the RAM block {ident or 'pc.ram'} is {f'the file {path}' if path else kind}, and not a shared file on a remote_ram file system; "
                "the engine remote_ram needs -object memory-backend-file,share=on with mem-path there"
            )
        blocks.append({"id": ident, "path": path, "size": memory["size"]})
    if not blocks:
        raise MigrationError("the VM has no memory backend; its RAM can't be on a remote_ram file system")
    return blocks


def check_devices(qmp: QmpClient) -> None:
    """:raises MigrationError: the VM has a device with which QEMU can't leave the memory to somebody else."""
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for entry in qmp.execute("qom-list", {"path": folder}):
            if entry["type"].startswith("child<virtio-balloon"):
                device = f"{folder}/{entry['name']}"
                # QEMU clears hinted pages in its dirty bitmap, and has none of memory that it leaves to us.
                if qmp.execute("qom-get", {"path": device, "property": "free-page-hint"}):
                    raise MigrationError("its balloon has free-page-hint=on, with which QEMU does not survive that the kernel moves the memory")


def onboarded(config: str, name: str, memory: list, folder: str = "/run/remote_ram") -> tuple:
    """The definition of a VM with its anonymous memory on a remote_ram file instead, and that file's block.

    QEMU's RAM block keeps its name, so a stream that was made without the file fits.

    :param memory: what QEMU answers to ``query-memdev``.
    :raises MigrationError: its memory is not one anonymous block, or the definition has no place for another.
    """
    plain = [entry for entry in memory if not entry.get("share")]
    if len(memory) != 1 or len(plain) != 1 or not memory[0].get("id"):
        raise MigrationError(f"{name} has {len(memory)} memory backends of its own; only a VM with one block of anonymous memory can be onboarded")
    block = {"id": memory[0]["id"], "path": f"{folder}/{name}.ram", "size": memory[0]["size"]}
    line = re.search(r"""^QEMU_ARGS=(?:"(.*)"|'([^'\n]*)'|([^"'\s\\][^\\\n]*))$""", config, re.MULTILINE)
    if not line:
        raise MigrationError(f'the definition of {name} has no single line QEMU_ARGS="..." to put the memory backend in')
    place = line.lastindex
    arguments = line.group(place)
    if re.search(r"(^|\s)-(mem-path|numa)\s|memory-backend", arguments):
        raise MigrationError(f"the definition of {name} says itself where its memory is (memory-backend, -mem-path or -numa); change it by hand")
    backend = f"memory-backend-file,id={block['id']},mem-path={block['path']},share=on,prealloc=off,size={block['size']}"
    arguments, found = re.subn(r"((?:^|\s)-(?:machine|M)\s+)(\S+)", rf"\1\2,memory-backend={block['id']}", arguments, count=1)
    if not found:
        arguments += f" -machine memory-backend={block['id']}"
    return config[: line.start(place)] + f"{arguments} -object {backend}" + config[line.end(place) :], block


def session_uuid(vm: str, block: str) -> bytes:
    """What both sides call the session of one RAM block of one VM."""
    return hashlib.sha256(f"{vm}/{block}".encode()).digest()[:16]


def is_serving(blocks: list, states: tuple = SERVING) -> bool:
    """Whether RAM files on this host serve a VM that has left it."""
    for block in blocks:
        try:
            with RamFile(block["path"]) as ram:
                if _serves(ram.stats(), states):
                    return True
        except RemoteRamError:
            continue  # no such file any more
    return False


def is_needed(blocks: list) -> bool:
    """Whether RAM files on this host have pages that a VM that has left it lacks."""
    return is_serving(blocks, NEEDED)


def _serves(entry: dict, states: tuple = SERVING) -> bool:
    return entry["role"] == "source" and entry["state"] in states


def figures(stats: list) -> dict:
    """The sum over RAM blocks of what the kernel counted; times are the longest, histograms are added up."""
    total: dict = {}
    for name in FIGURES:
        pick = max if name in ("wait_ns_max", "switch_us", "precopy_us", "rounds") else sum
        total[name] = pick(entry[name] for entry in stats)
    for name in ("wait_hist", "read_hist"):
        total[name] = [sum(column) for column in zip(*(entry[name] for entry in stats))]
    return total


class Silence(MigrationError):
    """QEMU has neither done what was asked nor failed."""


class Outgoing(_migrate_qmp.Outgoing):
    """The source's side.

    :param job: as :class:`_migrate_qmp.Outgoing` takes it, and ram (blocks of :func:`ram_blocks`, each with the port its
        destination listens on), address (of the destination), token (hex).
    """

    def __init__(self, job: dict, record: Record):
        super().__init__(job, record)
        self.files: list = []

    def run(self) -> None:
        """Moves the VM. :raises MigrationError: it stays here, running, unless the record says otherwise."""
        try:
            self.files = [RamFile(block["path"]) for block in self.job["ram"]]
            self._run()
        except RemoteRamError as err:
            raise MigrationError(str(err)) from err
        finally:
            for ram in self.files:
                ram.close()

    def _run(self) -> None:
        if self.job.get("resume"):
            self._take_up()
        else:
            self._connect()
            self._copy_ahead()
            self._hand_over()
        self._serve()

    def _stats(self) -> list:
        return [ram.stats() for ram in self.files]

    # -- before the switch -----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        job = self.job
        self.qmp = QmpClient(_migrate_qmp.agent_socket(self.name))
        status = self.qmp.execute("query-migrate").get("status", "none")
        if status in _migrate_qmp.UNFINISHED:
            raise MigrationError(f"{self.name} is being migrated by somebody else (QEMU says {status}); wait for that or cancel it first")
        limit = int((job.get("bandwidth_mib_s") or 0) * (1 << 20))
        for ram in self.files:
            entry = ram.stats()
            if entry["role"] == "destination" and entry["state"] not in ENDED:
                raise MigrationError(f"the memory of {self.name} is itself still arriving on this host; the VM can leave once all of it is here")
            if entry["state"] in ("postcopy", "reconnecting"):
                raise MigrationError(f"{ram.path} still serves an earlier destination of {self.name}")
        # A unit that was killed leaves a session that it had begun.
        self._let_go()
        try:
            for ram, block in zip(self.files, job["ram"]):
                ram.export(
                    job["address"], block["port"], session_uuid(self.name, block["id"]), bytes.fromhex(job["token"]), bandwidth=limit,
                    reconnect_ms=int(job.get("recovery_timeout_s", 3600) * 1000) or 1,
                )  # fmt: skip
        except RemoteRamError as err:
            self._let_go()
            raise MigrationError(f"the RAM of {self.name} can't be sent to {job['to']} ({job['address']}): {err}") from err

    def _let_go(self) -> None:
        """Ends all sessions to the destination; the VM goes on here."""
        for ram in self.files:
            entry = ram.stats()
            try:
                if entry["state"] not in ENDED:
                    ram.take_back() if _serves(entry) else ram.abort()
            except RemoteRamError:
                # The last page may leave meanwhile: that does no harm to what is here.
                if ram.stats()["state"] not in ENDED:
                    raise
            ram.release()

    def _check_early(self, stats: list) -> None:
        """Ends the migration where it still can be ended, if somebody wants that or a connection is gone."""
        if self.record.abort_requested():
            self._let_go()
            raise Aborted("aborted on request")
        for entry in stats:
            if entry["state"] in ENDED:
                self._let_go()
                raise MigrationError(f"the connection for {self.name}'s RAM ended before the switch: {entry['reason'] or entry['state']}")

    def _copy_ahead(self) -> None:
        seconds = self.job.get("precopy_timeout_s") or 0
        self.record.phase("precopy")
        if not seconds:
            return
        for ram in self.files:
            ram.precopy(max(1, round(seconds * 1000)), stop_pages=1)
        while True:
            stats = self._stats()
            self._progress(stats)
            self._check_early(stats)
            if all(entry["state"] == "connected" for entry in stats):
                return
            time.sleep(POLL)

    def _progress(self, stats: list) -> None:
        after = self.record.data["on"] == "destination"
        remaining = sum(entry["pages_missing" if after else "pages_dirty"] for entry in stats) << 12
        sent = sum(entry["bytes_ahead"] + entry["bytes_after"] for entry in stats)
        self.record.data["remote_ram"] = figures(stats)
        self.record.progress(sent, remaining, sum(entry["pages"] for entry in stats) << 12, sum(entry["rate"] for entry in stats))

    # -- the switch ------------------------------------------------------------------------------------------------

    def _status(self) -> dict:
        try:
            return self.qmp.execute("query-migrate")
        except QmpError as err:
            self._lost_qemu(err)
            raise

    def _pause(self) -> None:
        """Waits until QEMU tells of a step, which it does by itself: each question costs it time while the guest stands still."""
        try:
            self.qmp.events(SWITCH_POLL)
        except QmpError as err:
            self._lost_qemu(err)

    def _await_status(self, wanted: str, patience: float = SWITCH_PATIENCE) -> dict:
        """:raises MigrationError: QEMU says failed; the VM is here.
        :raises Silence: it takes too long.
        """
        deadline = time.monotonic() + patience
        while True:
            info = self._status()
            if info.get("status") == wanted:
                return info
            if info.get("status") in ("failed", "cancelled"):
                raise MigrationError(info.get("error-desc") or f"QEMU says the migration {info['status']}")
            if time.monotonic() > deadline:
                raise Silence(f"QEMU did not get to {wanted!r} in {patience:g} s (it says {info.get('status')})")
            self._pause()

    def _hand_over(self) -> None:
        self.record.phase("switch")
        try:
            self.qmp.execute("migrate-set-capabilities", {"capabilities": _migrate_qmp.capabilities("remote_ram")})
            self.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 50, "downtime-limit": self.job.get("max_downtime_ms") or 300})
            self.qmp.execute("migrate", {"uri": self.job["uri"]})
            self._await_status("pre-switchover")
            self._check_early(self._stats())
            for ram in self.files:
                ram.switch(SWITCH_PATIENCE * 1000)
        except (MigrationError, QmpError, RemoteRamError):
            # Nothing has run at the destination yet, and its QEMU can't start without the end of the stream.
            if not self._qemu_ended():
                self._cancel_qemu()
            self._let_go()
            raise
        self._go_on("pre-switchover")

    def _go_on(self, status: str) -> None:
        """Sees QEMU, which is in this state, through the rest of the switch. The RAM is the destination's already."""
        try:
            if status == "pre-switchover":
                self.qmp.execute("migrate-continue", {"state": "pre-switchover"})
            # It waits for the destination's word that the VM is there. While the network is down that may take as long as pages may.
            info = self._await_status("completed", self.job.get("recovery_timeout_s", 3600))
        except Silence as err:
            # The destination may have all and run the VM: taking it back here could make two of it.
            self.record.save(on="unknown")
            raise MigrationError(
                f"{self.job['to']} has not answered whether {self.name} runs there ({err}); here it stands still. Run the migration again to go on waiting; "
                f"only if it does not run on {self.job['to']}, and never will, stop {vm_unit(self.name)} here and start it again"
            ) from err
        except (MigrationError, QmpError):
            if not self._qemu_ended():
                self._cancel_qemu()
                self._let_go()
                raise
            # Whether it had sent all is known at the destination alone, which fetches the rest of the RAM if so, and ends the session if not.
            info = {}
        self._arrived(info)

    def _qemu_ended(self) -> bool:
        """Whether QEMU has ended. Its unit may notice a little later than we do."""
        try:
            self.qmp.execute("query-status")
            return False
        except QmpError:
            deadline = time.monotonic() + SWITCH_PATIENCE
        while is_active(vm_unit(self.name)):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def _cancel_qemu(self) -> None:
        """Sees to it that QEMU is not migrating and the guest runs here."""
        status = self._status().get("status", "none")
        if status in PRECOPY_STATES:
            self.qmp.execute("migrate_cancel")
            deadline = time.monotonic() + SWITCH_PATIENCE
            while self._status().get("status") in PRECOPY_STATES and time.monotonic() < deadline:
                self._pause()

    def _arrived(self, info: dict) -> None:
        self._postcopy_asked = True
        self.record.phase("postcopy", on="destination", downtime_ms=info.get("downtime"))
        self._end_qemu()

    # -- after the switch ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Watches until the destination has every page, and gives the RAM here back."""
        while True:
            stats = self._stats()
            states = {entry["state"] for entry in stats}
            if states == {"complete"}:
                break
            self._progress(stats)
            if "lost" in states or "failed" in states:
                why = next(entry["reason"] for entry in stats if entry["state"] in ("lost", "failed"))
                missing = sum(entry["pages_missing"] for entry in stats)
                raise MigrationError(
                    f"the destination {self.job['to']} lacks {missing} pages of {self.name} and will not get them: {why}. Its guest is told so by machine "
                    f"checks when it touches them; what it had before the switch is still in {', '.join(b['path'] for b in self.job['ram'])}"
                )
            self.record.phase("recovering" if "reconnecting" in states else "postcopy", on="destination")
            if self.record.abort_requested():
                self.record.refuse_abort("the VM already runs on the destination; its memory is still arriving, so it can only go on")
            time.sleep(POLL)
        self.record.data["remote_ram"] = figures(stats)
        sent = sum(entry["bytes_ahead"] + entry["bytes_after"] for entry in stats)
        for ram in self.files:
            ram.release()
        _migrate_qmp.remove([ram.path for ram in self.files])
        forget(self.name)
        lost = sum(entry["pages_lost"] for entry in stats)
        # Bad memory here: all else has moved, and the guest learns of these as it would have here.
        reason = f"{lost} pages could not be read here; the guest gets a machine check when it touches one of them" if lost else ""
        self.record.finish("moved", reason, on="destination", bytes=sent)

    def _take_up(self) -> None:
        """Goes on where a unit that died had got to."""
        served = any(_serves(entry) for entry in self._stats())
        if is_active(vm_unit(self.name)):
            self.qmp = QmpClient(_migrate_qmp.agent_socket(self.name))
            info = self._status()
            if served and info.get("status") in ("pre-switchover", "device", "completed"):
                self._go_on(info["status"])
                return
            self._cancel_qemu()
            self._let_go()
            raise MigrationError(f"what drove the migration of {self.name} ended before the switch; the VM is here, and can be moved again")
        if not served:
            raise MigrationError(f"neither the QEMU of {self.name} nor a session of its RAM is on this host any more")
        self.record.phase("postcopy", on="destination")


class Incoming(_migrate_qmp.Incoming):
    """The destination's side.

    :param job: as :class:`_migrate_qmp.Incoming` takes it, and ram (blocks of :func:`ram_blocks`), token (hex).
    """

    ENDS = (*_migrate_qmp.Incoming.ENDS, RemoteRamError)

    def __init__(self, job: dict, state_dir: str):
        super().__init__(job, state_dir)
        self.files: list = []

    def run(self) -> None:
        try:
            super().run()
        finally:
            for ram in self.files:
                ram.close()

    def _make_ram(self) -> None:
        super()._make_ram()
        try:
            self._attach()
        except RemoteRamError as err:
            raise MigrationError(f"the RAM of {self.name} can't be received: {err}") from err

    def _attach(self) -> None:
        """Makes the RAM files, and lets each wait for its source."""
        job = self.job
        ports = iter(range(job["port_max"], job["port_min"] - 1, -1))
        blocks = []
        for block in job["ram"]:
            ram = RamFile(block["path"], block["size"])
            self.files.append(ram)
            port = self._attach_one(ram, block, ports)
            blocks.append({**block, "port": port})
        self.data["ram"] = blocks

    def _attach_one(self, ram: RamFile, block: dict, ports) -> int:
        job = self.job
        problem = None
        for port in ports:
            try:
                return ram.attach(
                    job["address"], port, session_uuid(self.name, block["id"]), bytes.fromhex(job["token"]),
                    bandwidth=int((job.get("postcopy_bandwidth_mib_s") or 0) * (1 << 20)), reconnect_ms=int(job.get("recovery_timeout_s", 3600) * 1000) or 1,
                )  # fmt: skip
            except RemoteRamError as err:
                problem = err
                if "in use" not in str(err).lower():
                    break
        raise MigrationError(f"the RAM of {self.name} can't listen on {job['address']} ports {job['port_min']}-{job['port_max']}: {problem}")

    def _look(self) -> None:
        stats = [ram.stats() for ram in self.files]
        if any(entry["state"] != "listening" for entry in stats):
            self.began = True
        self.data["remote_ram"] = figures(stats)
        for entry in stats:
            if not self.arrived and entry["state"] in ("failed", "lost"):
                raise MigrationError(f"the connection for the RAM of {self.name} ended before the VM had arrived: {entry['reason']}")
            if self.arrived and entry["state"] == "lost":
                raise MigrationError(
                    f"{entry['pages_lost']} pages of {self.name} are lost ({entry['reason']}); the guest gets a machine check when it touches one of them"
                )

    def _came_and_went(self) -> bool:
        if super()._came_and_went():
            return True
        # A QEMU that can't load the VM ends by itself, and the source takes the RAM back. One that was killed may have run the VM.
        result = _migrate_qmp.systemctl("show", "--property=Result", "--value", vm_unit(self.name), check=False)
        if result not in KILLED or any(ram.stats()["state"] not in SERVING for ram in self.files):
            return False
        self._left()
        if not self._whole():
            return False
        # It may go on at the source after all, so it must not start with this host.
        self.job["enabled"] = False
        self._settle("completed")
        return True

    def _left(self) -> str:
        """Waits until all of the RAM is here that can be, for those who want to look into it."""
        while True:
            stats = [ram.stats() for ram in self.files]
            self.data["remote_ram"] = figures(stats)
            if all(entry["state"] in ENDED for entry in stats):
                break
            time.sleep(POLL)
        paths = ", ".join(block["path"] for block in self.job["ram"])
        if all(entry["state"] == "complete" and not entry["pages_lost"] for entry in stats):
            return f"; its RAM is whole in {paths}"
        return f"; of its RAM in {paths}, {sum(entry['pages_lost'] for entry in stats)} pages are lost"

    def _whole(self) -> bool:
        # The sessions stay: a source that was not told of the end may ask again. The next migration releases them.
        return all(ram.stats()["state"] == "complete" for ram in self.files)
