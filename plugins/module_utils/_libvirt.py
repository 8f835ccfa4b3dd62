# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Talks to libvirt on the host this runs on. What its answers mean is decided in ``_vm_facts``.

Stands alone: it needs the Python standard library and, when something is called, the distribution's libvirt binding.
"""

from __future__ import annotations

import os
import time
from xml.etree import ElementTree

#: libvirtd that is started by its socket ends when nobody has used it for two minutes; who connects at that moment is cut off.
ATTEMPTS, PAUSE = 3, 1.0

DAEMONS = ("/usr/sbin/libvirtd", "/usr/sbin/virtqemud", "/usr/bin/libvirtd", "/usr/bin/virtqemud")


class LibvirtError(Exception):
    """libvirt refused, or can't be reached."""


def installed() -> bool:
    """Whether this host has a libvirt daemon for QEMU, running or not."""
    return any(os.path.exists(path) for path in DAEMONS)


def libvirt_module():
    """The libvirt binding, imported when it is first needed.

    :raises LibvirtError: it is not installed.
    """
    try:
        import libvirt
    except ImportError as err:
        raise LibvirtError(f"the Python binding of libvirt is missing; install the package python3-libvirt ({err})") from err
    # Errors are raised as well: printing them too would spoil what the caller writes to standard error.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt


def connect(uri: str = "qemu:///system", readonly: bool = True):
    """A connection to libvirt, which the caller closes.

    :raises LibvirtError: there is no binding, or no libvirt answers.
    """
    libvirt = libvirt_module()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return libvirt.openReadOnly(uri) if readonly else libvirt.open(uri)
        except libvirt.libvirtError as err:
            if attempt == ATTEMPTS:
                raise LibvirtError(f"cannot connect to libvirt at {uri}: {err}") from err
            time.sleep(PAUSE)


def version(conn) -> dict:
    """``libvirt`` and ``qemu``: version numbers as libvirt packs them, None for one that it doesn't know."""
    libvirt = libvirt_module()
    found = {}
    for key, call in (("libvirt", conn.getLibVersion), ("qemu", conn.getVersion)):
        try:
            found[key] = call()
        except libvirt.libvirtError:
            found[key] = None
    return found


def domains(conn, names: list | None = None) -> list[dict]:
    """All domains, or those of these names: ``{domain, name, xml, state, reason, operation, volumes}``.

    ``operation`` is the virDomainJobOperation of a job under way, 0 without one. ``volumes`` is
    ``{(pool, volume): (pool type, path)}`` of the disks that are volumes of storage pools.

    :raises LibvirtError: the connection was lost.
    """
    libvirt = libvirt_module()
    found = []
    try:
        listed = conn.listAllDomains()
    except libvirt.libvirtError as err:
        raise LibvirtError(f"cannot list the domains: {err}") from err
    for domain in listed:
        if names is not None and domain.name() not in names:
            continue
        try:
            state, reason = domain.state()
            entry = {"domain": domain, "name": domain.name(), "xml": domain.XMLDesc(), "state": state, "reason": reason,
                     "operation": _operation(libvirt, domain)}
            entry["volumes"] = _volumes(libvirt, conn, entry["xml"])
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue  # it went away while the list was read
            raise LibvirtError(f"cannot read the domain {domain.name()}: {err}") from err
        found.append(entry)
    return found


def _operation(libvirt, domain) -> int:
    if not domain.isActive():
        return 0
    try:
        stats = domain.jobStats()
    except libvirt.libvirtError as err:
        if err.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return 0  # it stopped, or has no statistics yet
    if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) not in (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED):
        return 0
    return stats.get("operation", 0)


def _volumes(libvirt, conn, xml: str) -> dict:
    found = {}
    for source in ElementTree.fromstring(xml).iterfind("devices/disk[@type='volume']/source"):
        pool_name, volume_name = source.get("pool"), source.get("volume")
        try:
            pool = conn.storagePoolLookupByName(pool_name)
            kind = ElementTree.fromstring(pool.XMLDesc()).get("type")
            found[(pool_name, volume_name)] = (kind, pool.storageVolLookupByName(volume_name).path())
        except libvirt.libvirtError:
            continue  # a pool that isn't active tells nothing, so the disk counts as local
    return found


def start_dirty_rates(conn, entries: list[dict], seconds: int):
    """Starts to measure how fast guests write; returns a function that takes the patience in seconds and returns
    {name: MiB/s, or an error message}.

    :param conn: a connection that is not read-only.
    :param entries: running domains, from :func:`domains`.
    """
    libvirt = libvirt_module()
    results: dict = {}
    waiting = {}
    # Only memory's hashes are compared, so that measuring costs the guest nothing and can't harm it.
    for entry in entries:
        try:
            domain = conn.lookupByName(entry["name"])
            domain.startDirtyRateCalc(seconds, 0)
            waiting[entry["name"]] = domain
        except libvirt.libvirtError as err:
            results[entry["name"]] = str(err)

    def collect(patience: float = 10.0) -> dict:
        deadline = time.monotonic() + patience
        while waiting:
            for name, domain in list(waiting.items()):
                try:
                    stats = conn.domainListGetStats([domain], libvirt.VIR_DOMAIN_STATS_DIRTYRATE)
                except libvirt.libvirtError as err:
                    results[name] = str(err)
                    del waiting[name]
                    continue
                values = stats[0][1] if stats else {}
                if values.get("dirtyrate.calc_status") == libvirt.VIR_DOMAIN_DIRTYRATE_MEASURED:
                    results[name] = float(values.get("dirtyrate.megabytes_per_second", 0))
                    del waiting[name]
            if waiting and time.monotonic() >= deadline:
                results.update((name, "libvirt gave no result in time") for name in waiting)
                break
            if waiting:
                time.sleep(0.1)
        return results

    return collect
