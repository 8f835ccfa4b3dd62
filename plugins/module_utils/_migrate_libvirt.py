# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Drives a migration through libvirt, peer to peer: the source's libvirtd talks to the destination's.

libvirt does the work in a call that blocks; this watches the job beside it, says when to switch, and takes up a
post-copy whose stream broke. After any error the question is where the domain is, not what the call said.
"""

from __future__ import annotations

import threading
import time

from ansible_collections.hecaton.fleet.plugins.module_utils._libvirt import libvirt_module
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_qmp import BACKOFF, POLL
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Aborted, MigrationError, Record, Stall

#: Seconds to wait for a libvirtd that went away to come back.
DAEMON_PATIENCE = 120


class Outgoing:
    """The source's side; the destination's is libvirt's own.

    :param job: vm, engine, destination_uri (libvirt's, as the source's libvirtd reaches it), uri (of QEMU's stream, or
        null for libvirt's choice), libvirt_uri, and the limits that :class:`_migrate_qmp.Outgoing` takes.
    """

    def __init__(self, job: dict, record: Record):
        self.job = job
        self.record = record
        self.name = job["vm"]
        self.libvirt = libvirt_module()
        self._stats: dict = {}
        self._cancelled = ""
        self._postcopy_asked = False
        self._stall = Stall(job.get("stall_timeout_s") or 0)
        threading.Thread(target=self._event_loop, daemon=True).start()
        self._loop_ready.wait()

    _loop_ready = threading.Event()

    def _event_loop(self) -> None:
        self.libvirt.virEventRegisterDefaultImpl()
        self._loop_ready.set()
        while True:
            self.libvirt.virEventRunDefaultImpl()

    def _connect(self):
        """A connection to the source's libvirtd, which may be restarting.

        :raises MigrationError: it did not come back.
        """
        deadline = time.monotonic() + DAEMON_PATIENCE
        while True:
            try:
                conn = self.libvirt.open(self.job.get("libvirt_uri") or "qemu:///system")
                conn.domainEventRegisterAny(None, self.libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._job_completed, None)
                return conn
            except self.libvirt.libvirtError as err:
                if time.monotonic() > deadline:
                    raise MigrationError(f"libvirtd on {self.job['from']} can't be reached: {err}") from err
                time.sleep(1)

    def _job_completed(self, conn, domain, stats, opaque) -> None:
        if domain.name() == self.name:
            self._stats = dict(stats)

    def run(self) -> None:
        """Moves the VM. :raises MigrationError: it stays here, running, unless the record says otherwise."""
        conn = self._connect()
        domain = self._lookup(conn)
        if domain is None:
            raise MigrationError(f"libvirt on {self.job['from']} has no domain {self.name}")
        state, reason = domain.state()
        if self._postcopy_failed(state, reason):
            self._postcopy_asked = True
            self.record.phase("recovering", on="destination")
            self._resume(domain)
            return
        if not domain.isActive():
            raise MigrationError(f"{self.name} is not running; a live migration needs a running VM")
        if domain.jobInfo()[0] != self.libvirt.VIR_DOMAIN_JOB_NONE:
            raise MigrationError(f"{self.name} is busy with another libvirt job; wait for it or cancel it: virsh domjobabort {self.name}")
        self.record.phase("precopy")
        self._migrate(domain, self._flags())

    def _flags(self) -> int:
        lv = self.libvirt
        flags = lv.VIR_MIGRATE_LIVE | lv.VIR_MIGRATE_PEER2PEER | lv.VIR_MIGRATE_PERSIST_DEST | lv.VIR_MIGRATE_UNDEFINE_SOURCE
        if self.job["engine"] == "userfault":
            flags |= lv.VIR_MIGRATE_POSTCOPY
        return flags

    def _parameters(self) -> dict:
        lv, job = self.libvirt, self.job
        parameters = {}
        if job.get("uri"):
            parameters[lv.VIR_MIGRATE_PARAM_URI] = job["uri"]
        if job.get("bandwidth_mib_s"):
            parameters[lv.VIR_MIGRATE_PARAM_BANDWIDTH] = max(1, int(job["bandwidth_mib_s"]))
        if job.get("postcopy_bandwidth_mib_s"):
            parameters[lv.VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY] = max(1, int(job["postcopy_bandwidth_mib_s"]))
        return parameters

    def _migrate(self, domain, flags: int) -> None:
        outcome: list = []

        def call():
            try:
                domain.migrateToURI3(self.job["destination_uri"], self._parameters(), flags)
                outcome.append(None)
            except self.libvirt.libvirtError as err:
                outcome.append(err)

        worker = threading.Thread(target=call, daemon=True)
        worker.start()
        begun, limited = time.monotonic(), False
        while worker.is_alive():
            worker.join(POLL)
            if not limited and self.job.get("max_downtime_ms"):
                limited = self._quietly(domain.migrateSetMaxDowntime, int(self.job["max_downtime_ms"]))
            self._watch(domain, time.monotonic() - begun)
        self._conclude(outcome[0])

    def _quietly(self, call, *arguments) -> bool:
        """Whether a request to a running job was taken; there may be no job yet, or no longer."""
        try:
            call(*arguments)
            return True
        except self.libvirt.libvirtError:
            return False

    def _watch(self, domain, elapsed: float) -> None:
        job = self.job
        try:
            stats = domain.jobStats()
        except self.libvirt.libvirtError:
            return  # the call that migrates will say what is wrong
        if "memory_total" in stats and stats.get("type") == self.libvirt.VIR_DOMAIN_JOB_UNBOUNDED:
            self.record.progress(stats.get("memory_processed", 0), stats.get("memory_remaining", 0), stats["memory_total"], stats.get("memory_bps"))
            # Its clock starts when RAM starts to flow, ours when libvirt was asked: what counts as pre-copy is the former.
            elapsed = min(elapsed, stats.get("time_elapsed", 0) / 1000)
        else:
            elapsed = 0.0
        in_postcopy = self._in_postcopy(domain)
        if in_postcopy:
            self.record.phase("postcopy", on="destination")
        if self.record.abort_requested():
            if in_postcopy:
                self.record.refuse_abort("the VM already runs on the destination; its memory is still arriving, so it can only go on")
            elif not self._cancelled and self._quietly(domain.abortJob):
                self._cancelled = "aborted on request"
        elif not in_postcopy and not self._cancelled and elapsed > 0 and self._stall.over(stats.get("memory_processed", 0), time.monotonic()):
            if self._quietly(domain.abortJob):
                self._cancelled = self._stall.reason(job["to"])
        elif job["engine"] == "userfault" and not self._postcopy_asked and elapsed > 0 and elapsed >= (job.get("precopy_timeout_s") or 0):
            if self._quietly(domain.migrateStartPostCopy):
                self._postcopy_asked = True
                self.record.phase("switch")
        elif job["engine"] == "precopy" and job.get("timeout_s") and elapsed > job["timeout_s"] and not self._cancelled:
            if self._quietly(domain.abortJob):
                self._cancelled = f"pre-copy did not converge within timeout_s={job['timeout_s']:g}; allow more bandwidth or downtime, or use engine userfault"

    def _in_postcopy(self, domain) -> bool:
        lv = self.libvirt
        try:
            state, reason = domain.state()
        except lv.libvirtError:
            return False
        return state == lv.VIR_DOMAIN_PAUSED and reason == lv.VIR_DOMAIN_PAUSED_POSTCOPY

    def _postcopy_failed(self, state: int, reason: int) -> bool:
        lv = self.libvirt
        return state == lv.VIR_DOMAIN_PAUSED and reason == lv.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED

    def _lookup(self, conn):
        try:
            return conn.lookupByName(self.name)
        except self.libvirt.libvirtError as err:
            if err.get_error_code() == self.libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    def _conclude(self, error) -> None:
        """Decides by where the domain is what became of it."""
        conn = self._connect()
        domain = self._lookup(conn)
        if error is None or domain is None:
            self._landed()
            return
        deadline = time.monotonic() + DAEMON_PATIENCE
        while True:
            state, reason = domain.state()
            if self._postcopy_failed(state, reason):
                self.record.phase("recovering", on="destination", reason=str(error))
                self._resume(domain)
                return
            busy = domain.isActive() and domain.jobInfo()[0] != self.libvirt.VIR_DOMAIN_JOB_NONE
            if not busy or time.monotonic() > deadline:
                break
            time.sleep(POLL)
        if self._cancelled.startswith("aborted"):
            raise Aborted(self._cancelled)
        raise MigrationError(self._cancelled or f"libvirt: {error}")

    def _resume(self, domain) -> None:
        """Takes up a post-copy whose stream broke, again and again, until it is through or the time for it is."""
        patience = self.job.get("recovery_timeout_s", 3600)
        begun, pause = time.monotonic(), BACKOFF[0]
        while True:
            self.record.save(recoveries=self.record.data["recoveries"] + 1)
            try:
                domain.migrateToURI3(self.job["destination_uri"], self._parameters(), self._flags() | self.libvirt.VIR_MIGRATE_POSTCOPY_RESUME)
                self._landed()
                return
            except self.libvirt.libvirtError as err:
                domain = self._lookup(self._connect())
                if domain is None:
                    self._landed()
                    return
                if time.monotonic() - begun > patience:
                    raise MigrationError(
                        f"the connection for {self.name}'s memory was lost after the switch and did not come back in {patience:g} s ({err}); the VM waits on "
                        f"{self.job['to']} with its missing pages here: leave both as they are, mend the network and run the evacuation again to resume it"
                    ) from err
                time.sleep(pause)
                pause = min(pause * 2, BACKOFF[1])

    def _landed(self) -> None:
        deadline = time.monotonic() + 5
        while not self._stats and time.monotonic() < deadline:
            time.sleep(0.05)
        stats = self._stats
        changes = {}
        if stats:
            changes = {"downtime_ms": stats.get("downtime_net", stats.get("downtime")), "total_ms": stats.get("time_elapsed"),
                       "bytes": stats.get("memory_processed")}  # fmt: skip
        self.record.phase("postcopy" if self._postcopy_asked else "switch", on="destination")
        self.record.finish("moved", on="destination", **{k: v for k, v in changes.items() if v is not None})
