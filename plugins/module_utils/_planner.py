# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""Decides which VM goes to which host, in which order and with how much pre-copy.

Facts of all hosts and options in, a plan out; docs/data.md has the shapes. Nothing here reads or changes anything else,
and the same input always gives the same plan.

Read it from top to bottom: options, facts, what fits together (CPU, machine type, driver, engine), groups, placement
(where), schedule (when, and how much pre-copy), the plan, and the table.
"""

from __future__ import annotations

import bisect
import heapq
import math
import re
from collections import defaultdict, deque
from dataclasses import dataclass, field

# Best first: what `auto` looks for.
ENGINES = ("remote_ram", "userfault", "precopy")

# A dirty rate that was not measured counts as this share of the VM's part of the link.
UNKNOWN_DIRTY_SHARE = 0.25
# Pre-copy that has to converge is given at most 1 / (1 - this) times the time of one pass over the memory.
MAX_DIRTY_SHARE = 0.75
# Where the rest follows after the switch, a second pass over memory that is dirtied faster than this sends more than it spares.
HYBRID_DIRTY_SHARE = 0.5
# Pre-copy is scaled so that the schedule ends in this share of the deadline.
DEADLINE_MARGIN = 0.9
# The precopy engine has to converge: its bound is a multiple of the time expected.
PRECOPY_ONLY_SLACK = 1.5
# Why a VM that is onboarded moves as it does.
ONBOARDED = "its memory goes onto remote_ram, where QEMU's post-copy can't put it; the next move is by the kernel engine"

# How hard placement tries before it says no_room.
SPREAD_WIDTH = 8
REPAIR_HOSTS = 32
REPAIR_BUDGET = 20000
SEARCH_UNITS = 40
SEARCH_BUDGET = 600000

# Flags of /proc/cpuinfo that describe the host's kernel, power management or hypervisor side, which no guest sees: they
# differ between kernel versions on one and the same CPU.
HOST_ONLY_FEATURES = frozenset("""acc_power acpi aperfmperf arat art bts cat_l2 cat_l3 cdp_l2 cdp_l3 constant_tsc cpuid cqm cqm_llc cqm_mbm_local
    cqm_mbm_total cqm_occup_llc dtes64 dtherm dts ept ept_ad epb est extd_apicid flexpriority hw_pstate hwp hwp_act_window hwp_epp
    hwp_notify hwp_pkg_req ibrs_enhanced ida intel_ppin intel_pt invpcid_single mba monitor nonstop_tsc nonstop_tsc_s3 nopl pbe
    pebs pln proc_feedback pti pts rapl rep_good retpoline retpoline_amd ring3mwait rsb_ctxsw rdt_a sdbg split_lock_detect swap
    tm tm2 tpr_shadow tsc_known_freq tsc_reliable user_shstk vnmi vpid xtopology xtpr""".split())


class PlanError(Exception):
    """The input can't be planned: says what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------------------------------------------- options


@dataclass
class Options:
    """What the operator asks for. Memory in MiB, time in seconds, rates in MiB/s."""

    sources: list = field(default_factory=list)  # hosts to empty; none with vms and destinations: every other host
    destinations: list | None = None  # None: every host that is no source
    vms: list | None = None  # None: every VM of the sources
    exclude: list = field(default_factory=list)
    pinned: dict = field(default_factory=dict)  # VM name to host, or to None: it stays where it is
    affinity: dict = field(default_factory=dict)  # group name to VM names
    anti_affinity: dict = field(default_factory=dict)
    memory_reserve_mib: float = 1024
    cpu_overcommit: float | None = None  # vCPUs per CPU of a destination; None: no limit
    per_source: int = 2
    per_destination: int = 2
    bandwidth_mib_s: float = 1000
    deadline_s: float | None = None
    elapsed_s: float = 0  # of the deadline, that have passed already
    setup_s: float = 1.0  # for a move besides its data: preparing both hosts, the devices' state
    precopy_min_s: int = 2
    engine: str = "auto"
    onboard: bool = False  # VMs that can have their memory on remote_ram where they arrive

    def check(self):
        for name in ("sources", "destinations", "vms", "exclude"):
            value = getattr(self, name)
            if value is not None:
                _check_names(value, name)
        for name in ("affinity", "anti_affinity"):
            groups = getattr(self, name)
            if not isinstance(groups, dict):
                raise PlanError(f"{name} must be a mapping of group names to lists of VM names, not {_kind_of(groups)}")
            for group, members in groups.items():
                _check_names(members, f"{name}[{group}]")
        if not isinstance(self.pinned, dict):
            raise PlanError(f"pinned must be a mapping of VM names to a host or null, not {_kind_of(self.pinned)}")
        for vm, host in self.pinned.items():
            if host is not None and not isinstance(host, str):
                raise PlanError(f"pinned[{vm}] must be the name of a host, or null to keep the VM where it is, not {_kind_of(host)}")
        self._check_range("memory_reserve_mib", 0)
        self._check_range("per_source", 1, whole=True)
        self._check_range("per_destination", 1, whole=True)
        self._check_range("precopy_min_s", 0, whole=True)
        self._check_range("bandwidth_mib_s", 0, above=True)
        if self.cpu_overcommit is not None:
            self._check_range("cpu_overcommit", 0, above=True)
        if self.deadline_s is not None:
            self._check_range("deadline_s", 0, above=True)
        self._check_range("elapsed_s", 0)
        self._check_range("setup_s", 0)
        if self.engine != "auto" and self.engine not in ENGINES:
            raise PlanError(f"engine must be one of auto, {', '.join(ENGINES)}, not {self.engine!r}")

    def _check_range(self, name, least, above=False, whole=False):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
            raise PlanError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}")
        if value < least or (above and value == least):
            raise PlanError(f"{name} must be {f'above {least}' if above else f'{least} or more'}, not {value}")


def _check_names(value, where):
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PlanError(f"{where} must be a list of names, not {value!r:.80}")


# ------------------------------------------------------------------------------------------------------------------ facts


@dataclass(eq=False)
class Host:
    name: str
    rank: int = 0  # place in the order of names: the last tie-break
    free: float = 0.0  # MiB free now, less what VMs that are still arriving will need
    cpus: float = 0
    vcpus_used: float = 0
    kind: HostKind | None = None
    cordoned: bool = False
    usable: bool = True  # as a destination of this plan
    reason: str = ""
    vms: dict = field(default_factory=dict)


@dataclass(eq=False)
class HostKind:
    """What decides which VMs can run on a host; hosts that agree in all of it share one."""

    number: int
    vendor: str
    arch: str
    features: frozenset
    machines: frozenset
    drivers: frozenset
    engines: dict


@dataclass(eq=False)
class Vm:
    name: str
    host: Host
    uuid: str
    driver: str
    state: str
    memory: float
    vcpus: float
    machine: str | None
    cpu_mode: str
    features: frozenset
    engines: dict
    dirty_rate: float | None
    affinity: list
    anti_affinity: list
    blockers: list
    onboards: bool = False  # its memory can be put on remote_ram while it moves
    kind: int = 0  # VMs with the same number fit the same hosts

    @property
    def active(self):
        return self.state in ("running", "paused", "incoming")


_KINDS = {"text": (str,), "a number": (int, float), "a list": (list, tuple), "a mapping": (dict,), "true or false": (bool,)}
_REQUIRED = object()


def _kind_of(value):
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"


def _get(mapping, key, kind, where, default=_REQUIRED):
    """The value of a key, once its type is known to be right; a default also stands in for null."""
    value = mapping.get(key)
    if value is None:
        if default is not _REQUIRED:
            return default
        raise PlanError(f"facts: {where} has no {key!r}; it must be {kind}. Gather the facts with hecaton.fleet.vm_info")
    if not isinstance(value, _KINDS[kind]) or (kind == "a number" and (isinstance(value, bool) or not 0 <= value < math.inf)):
        wanted = "a number, 0 or more" if kind == "a number" else kind
        raise PlanError(f"facts: {key!r} of {where} must be {wanted}, not {_kind_of(value)}")
    return value


def _texts(mapping, key, where, default=_REQUIRED):
    values = _get(mapping, key, "a list", where, default)
    for value in values:
        if not isinstance(value, str):
            raise PlanError(f"facts: {key!r} of {where} must be a list of texts, but holds {_kind_of(value)}")
    return values


def _blockers(mapping, where):
    blockers = []
    for blocker in _get(mapping, "blockers", "a list", where, ()):
        if not isinstance(blocker, dict):
            raise PlanError(f"facts: 'blockers' of {where} must be a list of {{code, message}}, but holds {_kind_of(blocker)}")
        blockers.append(
            {"code": _get(blocker, "code", "text", f"a blocker of {where}"), "message": _get(blocker, "message", "text", f"a blocker of {where}", "")}
        )
    return blockers


def _engines(mapping, where, default=_REQUIRED):
    engines = {}
    for name, engine in _get(mapping, "engines", "a mapping", where, default).items():
        if not isinstance(engine, dict):
            raise PlanError(f"facts: engine {name!r} of {where} must be {{usable, blockers}}, not {_kind_of(engine)}")
        engines[name] = (_get(engine, "usable", "true or false", f"engine {name!r} of {where}"), _blockers(engine, f"engine {name!r} of {where}"))
    return engines


def _feature_set(names):
    return frozenset(re.sub(r"[.-]", "_", name.lower()) for name in names)


class Fleet:
    """All hosts and their VMs, read from the facts."""

    def __init__(self, facts):
        if not isinstance(facts, (list, tuple)):
            raise PlanError(f"facts must be a list with one {{host, vms}} for each hypervisor, not {_kind_of(facts)}")
        self.hosts = {}
        self._kinds = {}
        self._feature_sets = {}
        for position, entry in enumerate(facts):
            self._read_entry(entry, f"entry {position}")
        for rank, name in enumerate(sorted(self.hosts)):
            self.hosts[name].rank = rank

    def _read_entry(self, entry, where):
        if not isinstance(entry, dict):
            raise PlanError(f"facts: {where} must be a mapping with host and vms, not {_kind_of(entry)}")
        facts = _get(entry, "host", "a mapping", where)
        name = _get(facts, "name", "text", f"host of {where}")
        where = f"host {name}"
        if name in self.hosts:
            raise PlanError(f"facts: {where} is there twice; give each hypervisor's facts once")
        host = self.hosts[name] = Host(name=name)
        unreachable = facts.get("unreachable")
        if unreachable:
            host.usable = False
            host.reason = f"unreachable: {unreachable}" if isinstance(unreachable, str) else "unreachable"
            return
        host.free = float(_get(facts, "memory_available_mib", "a number", where))
        host.cpus = _get(facts, "cpus", "a number", where, 0)
        host.kind = self._host_kind(facts, where)
        if _get(facts, "cordoned", "true or false", where, False):
            host.cordoned = True
            host.usable = False
            host.reason = _cordon_reason(facts.get("cordon"))
        for position, vm_facts in enumerate(_get(entry, "vms", "a list", where)):
            self._read_vm(host, vm_facts, f"VM {position} on {where}")

    def _host_kind(self, facts, where):
        cpu = _get(facts, "cpu", "a mapping", where)
        engines = _engines(facts, where, {})
        key = (
            _get(cpu, "vendor", "text", f"cpu of {where}", ""),
            _get(cpu, "arch", "text", f"cpu of {where}"),
            self._features(_texts(cpu, "features", f"cpu of {where}")),
            frozenset(_texts(facts, "machines", where)),
            frozenset(_texts(facts, "drivers", where)),
            repr(sorted(engines.items())),
        )
        if key not in self._kinds:
            self._kinds[key] = HostKind(len(self._kinds), *key[:5], engines)
        return self._kinds[key]

    def _features(self, names):
        key = tuple(names)
        if key not in self._feature_sets:
            self._feature_sets[key] = _feature_set(key)
        return self._feature_sets[key]

    def _read_vm(self, host, facts, where):
        if not isinstance(facts, dict):
            raise PlanError(f"facts: {where} must be a mapping, not {_kind_of(facts)}")
        name = _get(facts, "name", "text", where)
        where = f"VM {name} on host {host.name}"
        if name in host.vms:
            raise PlanError(f"facts: {where} is there twice; two drivers must not manage VMs of the same name")
        cpu = _get(facts, "cpu", "a mapping", where, {})
        groups = _get(facts, "groups", "a mapping", where, {})
        vm = host.vms[name] = Vm(
            name=name,
            host=host,
            uuid=_get(facts, "uuid", "text", where, ""),
            driver=_get(facts, "driver", "text", where),
            state=_get(facts, "state", "text", where),
            memory=_get(facts, "memory_mib", "a number", where),
            vcpus=_get(facts, "vcpus", "a number", where, 0),
            machine=_get(facts, "machine", "text", where, None),
            cpu_mode=_get(cpu, "mode", "text", f"cpu of {where}", "custom"),
            features=self._features(_texts(cpu, "features", f"cpu of {where}", ())),
            engines=_engines(facts, where),
            dirty_rate=_get(facts, "dirty_rate_mib_s", "a number", where, None),
            affinity=_texts(groups, "affinity", f"groups of {where}", ()),
            anti_affinity=_texts(groups, "anti_affinity", f"groups of {where}", ()),
            blockers=_blockers(facts, where),
            onboards=_get(_get(facts, "onboarding", "a mapping", where, {}), "usable", "true or false", f"onboarding of {where}", False),
        )
        if vm.active:
            host.vcpus_used += vm.vcpus
        if vm.state == "incoming":
            host.free -= vm.memory  # promised to it, although most of it is not in use yet


def _cordon_reason(cordon):
    if not isinstance(cordon, dict):
        return "cordoned"
    by = f" by {cordon['by']}" if cordon.get("by") else ""
    return f"cordoned{by}: {cordon['reason']}" if cordon.get("reason") else f"cordoned{by}"


# ------------------------------------------------------------------------------------------------- what fits together


def _needed_features(vm):
    """CPU features that the destination must have.

    A guest that sees its host's own CPU needs all of that host's. Features that a model names and the source doesn't list are
    known by another name there, since the guest runs on it: nothing can be said about them.
    """
    features = vm.host.kind.features
    if vm.cpu_mode in ("host-passthrough", "host-model", "maximum"):
        return features - HOST_ONLY_FEATURES
    return vm.features & features


def _usable_engines(vm, options):
    wanted = ENGINES if options.engine == "auto" else (options.engine,)
    return tuple(name for name in wanted if vm.engines.get(name, (False, ()))[0])


def _pair_engines(engines, kind):
    """Of a VM's engines, those that work towards hosts of this kind. A host says nothing of engines that it has no objection to."""
    return tuple(name for name in engines if kind.engines.get(name, (True, ()))[0])


def _mismatches(vm, engines, needed, kind):
    """Why hosts of a kind can't run a VM: (code, text) for each reason."""
    found = []
    if vm.driver not in kind.drivers:
        found.append(("driver_missing", f"driver {vm.driver} is missing"))
    if vm.machine and vm.machine not in kind.machines:
        found.append(("machine_unknown", f"machine type {vm.machine} is unknown"))
    source = vm.host.kind
    if source.arch != kind.arch:
        found.append(("cpu_incompatible", f"architecture is {kind.arch}, the VM's is {source.arch}"))
    elif source.vendor != kind.vendor:
        found.append(("cpu_incompatible", f"CPU vendor is {kind.vendor}, the VM's is {source.vendor}"))
    elif not needed <= kind.features:
        missing = sorted(needed - kind.features)
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        found.append(("cpu_incompatible", f"CPU lacks {', '.join(missing[:8])}{more}"))
    if engines and not _pair_engines(engines, kind):
        for engine in engines:
            for blocker in kind.engines[engine][1] or [{"code": "no_destination", "message": "not possible"}]:
                found.append((blocker["code"], f"engine {engine}: {blocker['message']}"))
    return found


class Compatibility:
    """Answers for (VM, host kind), each worked out once for VMs that need the same."""

    def __init__(self, options):
        self.options = options
        self._numbers = {}
        self._needed = {}
        self._mismatches = {}

    def add(self, vm):
        needed_key = (vm.host.kind.number, vm.cpu_mode, vm.features)
        if needed_key not in self._needed:
            self._needed[needed_key] = _needed_features(vm)
        engines = _usable_engines(vm, self.options)
        key = (vm.driver, vm.machine, vm.host.kind.number, vm.cpu_mode, vm.features, engines)
        vm.kind = self._numbers.setdefault(key, len(self._numbers))

    def mismatches(self, vm, kind):
        key = (vm.kind, kind.number)
        if key not in self._mismatches:
            needed = self._needed[(vm.host.kind.number, vm.cpu_mode, vm.features)]
            self._mismatches[key] = _mismatches(vm, _usable_engines(vm, self.options), needed, kind)
        return self._mismatches[key]


def _onboards(vm, host, options):
    """Whether a VM gets its memory on remote_ram by this move. That is pre-copy's: QEMU's post-copy takes no such file."""
    can = _pair_engines(("remote_ram", "precopy"), host.kind)
    return options.onboard and vm.onboards and len(can) == 2 and "precopy" in _usable_engines(vm, options)


def _choose_engine(vm, host, options):
    """The engine for a VM and its destination, and why."""
    if options.engine == "auto" and _onboards(vm, host, options):
        return "precopy", ONBOARDED
    engine = _pair_engines(_usable_engines(vm, options), host.kind)[0]
    if options.engine != "auto":
        return engine, "asked for"
    better = ENGINES[: ENGINES.index(engine)]
    if not better:
        return engine, "best engine that the VM and both hosts can use"
    why = []
    for name in better:
        usable, blockers = vm.engines.get(name, (False, [{"message": f"the facts of {vm.name} don't mention it"}]))
        if usable:
            why.append(f"not {name}: on {host.name}, {_messages(host.kind.engines[name][1])}")
        else:
            why.append(f"not {name}: {_messages(blockers)}")
    return engine, "; ".join(why)


def _messages(blockers):
    return ", ".join(blocker["message"] or blocker["code"] for blocker in blockers) or "not usable"


# ----------------------------------------------------------------------------------------------------------------- groups


@dataclass(eq=False)
class Unit:
    """VMs that go to one host together: an affinity group, or a single VM."""

    vms: list
    need: float = 0.0
    vcpus: float = 0
    anti: tuple = ()
    only: list | None = None  # hosts that a pin or an affinity group leaves
    only_reason: str = ""
    kinds: tuple = ()  # host kinds that can run all of its VMs
    number: int = 0

    @property
    def label(self):
        return _list_of([vm.name for vm in self.vms])


def _list_of(names, most=5):
    names = list(names)
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names)


def _group_map(groups, vms, attribute):
    """VM name to the names of its groups, from the options and from the VMs' own facts."""
    by_vm = defaultdict(dict)
    for group, names in groups.items():
        for name in names:
            by_vm[name][group] = None
    for vm in vms:
        for group in getattr(vm, attribute):
            by_vm[vm.name][group] = None
    return {name: tuple(found) for name, found in by_vm.items()}


# -------------------------------------------------------------------------------------------------------------- placement


class Placement:
    """Who goes where, and what is left on each destination."""

    def __init__(self, hosts, options, anti_by_host):
        self.hosts = hosts
        self.free = {host: host.free - options.memory_reserve_mib for host in hosts}
        limit = options.cpu_overcommit
        self.vcpus_free = {host: math.inf if limit is None else host.cpus * limit - host.vcpus_used for host in hosts}
        self.anti = {host: defaultdict(int, anti_by_host.get(host, {})) for host in hosts}
        self.incoming = dict.fromkeys(hosts, 0.0)
        self.units_on = {host: {} for host in hosts}
        self.host_of = {}
        self.reason_of = {}
        self._by_rank = {host.rank: host for host in hosts}
        # Host kind to its hosts, ordered by free memory; among equals the first name comes last.
        self._index = defaultdict(list)
        for host in hosts:
            self._index[host.kind].append((self.free[host], -host.rank))
        for index in self._index.values():
            index.sort()

    def admits(self, host, unit):
        if unit.need > self.free[host] or unit.vcpus > self.vcpus_free[host]:
            return False
        return not self.conflicts(host, unit)

    def accepts(self, host, unit):
        """Like admits, for a host that may be of the wrong kind or not be among those that the unit is bound to."""
        return host.kind in unit.kinds and (unit.only is None or host in unit.only) and self.admits(host, unit)

    def conflicts(self, host, unit):
        """Is there something on the host that the unit must not meet?"""
        anti = self.anti[host]
        return any(anti.get(group) for group in unit.anti) or any(_name_taken(host, vm) for vm in unit.vms)

    def put(self, unit, host, reason):
        self._account(unit, host, 1)
        self.units_on[host][unit] = None
        self.host_of[unit] = host
        self.reason_of[unit] = reason

    def take(self, unit):
        host = self.host_of.pop(unit)
        del self.units_on[host][unit]
        self._account(unit, host, -1)
        return host

    def _account(self, unit, host, sign):
        index = self._index[host.kind]
        del index[bisect.bisect_left(index, (self.free[host], -host.rank))]
        self.free[host] -= sign * unit.need
        bisect.insort(index, (self.free[host], -host.rank))
        self.vcpus_free[host] -= sign * unit.vcpus
        self.incoming[host] += sign * unit.need
        for group in unit.anti:
            self.anti[host][group] += sign

    def candidates(self, unit, most_free, count, avoid=None):
        """Hosts that admit the unit: the `count` with the most (or the least) free memory of each kind."""
        if unit.only is not None:
            found = [host for host in unit.only if host is not avoid and host.kind in unit.kinds and self.admits(host, unit)]
        else:
            found = []
            for kind in unit.kinds:
                index = self._index[kind]
                first = bisect.bisect_left(index, (unit.need, -len(self._by_rank) - 1e9))
                order = range(len(index) - 1, first - 1, -1) if most_free else range(first, len(index))
                seen = 0
                for position in order:
                    host = self._by_rank[-index[position][1]]
                    if host is not avoid and self.admits(host, unit):
                        found.append(host)
                        seen += 1
                        if seen == count:
                            break
        found.sort(key=lambda host: (-self.free[host] if most_free else self.free[host], host.rank))
        return found

    def best_fit(self, unit, avoid=None):
        found = self.candidates(unit, most_free=False, count=1, avoid=avoid)
        return found[0] if found else None

    def spread(self, unit):
        """Of the hosts with about the most free memory, the one that gets the least so far: their links work side by side."""
        found = self.candidates(unit, most_free=True, count=SPREAD_WIDTH)[:SPREAD_WIDTH]
        if not found:
            return None, ""
        enough = (self.free[found[0]] - unit.need) / 2
        host = min((host for host in found if self.free[host] - unit.need >= enough), key=lambda host: (self.incoming[host], -self.free[host], host.rank))
        return host, "most free memory" if host is found[0] else "enough free memory, and fewer VMs arrive there"

    def score(self):
        return (sum(len(unit.vms) for unit in self.host_of), sum(unit.need for unit in self.host_of))


def _name_taken(host, vm):
    """A VM of that name on the destination is in the way, unless it is this VM's own definition left there."""
    other = host.vms.get(vm.name)
    return other is not None and (other.active or other.uuid != vm.uuid)


def _place(units, hosts, options, anti_by_host):
    """Place units: spread them first, and pack them tightly only if that leaves one without room."""
    by_size = sorted(units, key=lambda unit: (unit.only is None, -unit.need, len(unit.kinds), unit.number))
    by_size_up = sorted(units, key=lambda unit: (unit.need / len(unit.vms), unit.number))
    best = None
    for order, tight in ((by_size, False), (by_size, True), (by_size_up, True)):
        placement = Placement(hosts, options, anti_by_host)
        left = []
        for unit in order:
            host, reason = (placement.best_fit(unit), "best fit") if tight else placement.spread(unit)
            if host is None:
                left.append(unit)
            else:
                placement.put(unit, host, reason)
        if left:
            left = _repair(placement, left)
        if best is None or placement.score() > best.score():
            best = placement
        if not left:
            break
    missing = len(units) - len(best.host_of)
    if missing and len(units) <= SEARCH_UNITS:
        _search(best, by_size)
    return best


def _repair(placement, left):
    """Make room for units that found none, by moving others that were placed before. Returns those still left."""
    budget = REPAIR_BUDGET
    still_left = []
    for unit in left:
        host = placement.best_fit(unit)
        if host is not None:  # an earlier repair made room
            placement.put(unit, host, "best fit")
            continue
        hosts = placement.hosts if unit.only is None else unit.only
        hosts = [host for host in hosts if host.kind in unit.kinds]
        hosts = heapq.nlargest(REPAIR_HOSTS, hosts, key=lambda host: (placement.free[host], -host.rank))
        for make_room in (_send_one_away, _swap_two):
            budget, done = make_room(placement, unit, hosts, budget)
            if done:
                break
        else:
            still_left.append(unit)
    return still_left


def _send_one_away(placement, unit, hosts, budget):
    """Make room on one of the hosts by moving one unit to another host. Returns the budget left, and whether it worked."""
    for host in hosts:
        short = unit.need - placement.free[host]
        for other in sorted(placement.units_on[host], key=lambda other: (other.need, other.number)):
            if other.need < short:
                continue
            if budget <= 0:
                return 0, False
            budget -= 1
            elsewhere = placement.best_fit(other, avoid=host)
            if elsewhere and _rearrange(placement, [(other, elsewhere), (unit, host)], unit):
                return budget, True
    return budget, False


def _swap_two(placement, unit, hosts, budget):
    """Make room on one of the hosts by swapping one unit there with a smaller one elsewhere."""
    for host in hosts:
        short = unit.need - placement.free[host]
        for big in list(placement.units_on[host]):
            for other_host in hosts:
                for small in list(placement.units_on[other_host]) if other_host is not host else ():
                    if budget <= 0:
                        return 0, False
                    budget -= 1
                    gain = big.need - small.need
                    if gain < short or gain > placement.free[other_host]:
                        continue
                    if _rearrange(placement, [(big, other_host), (small, host), (unit, host)], unit):
                        return budget, True
    return budget, False


def _rearrange(placement, new_hosts, unit):
    """Put units on new hosts, those that have one already too; all of them or none."""
    before = [(other, placement.reason_of[other], placement.take(other)) for other, _new in new_hosts if other is not unit]
    done = []
    for other, host in new_hosts:
        if not placement.accepts(host, other):
            break
        placement.put(other, host, "best fit" if other is unit else f"leaves room for {unit.label}")
        done.append(other)
    else:
        return True
    for other in done:
        placement.take(other)
    for other, reason, host in before:
        placement.put(other, host, reason)
    return False


def _search(placement, units):
    """Branch and bound over all placements of a few units; keeps what placed the most VMs, then the most memory.

    It stops after SEARCH_BUDGET looks at a host, so its result is the best of those seen. The placement is changed in place.
    """
    units = sorted(units, key=lambda unit: (-unit.need, unit.number))
    reasons = dict(placement.reason_of)
    best_score, best = placement.score(), dict(placement.host_of)
    for unit in list(placement.host_of):
        placement.take(unit)
    groups = {group for unit in units for group in unit.anti}
    told_apart = {host for unit in units for host in unit.only or ()}
    told_apart.update(host for host in placement.hosts if any(_name_taken(host, vm) for unit in units for vm in unit.vms))
    single = all(len(unit.vms) == 1 for unit in units)
    budget = SEARCH_BUDGET
    total_free = sum(max(0.0, free) for free in placement.free.values())
    everything = sum(len(unit.vms) for unit in units)
    # Sums over the smallest units of each rest: what could be placed at most if memory were one pool.
    sums_up = []
    total = 0.0
    for unit in reversed(units):
        total += unit.need
        sums_up.append(total)

    def bound(position, free_pool):
        rest = sums_up[: len(units) - position]
        if not rest:
            return 0, 0.0
        count = bisect.bisect_right(rest, free_pool) if single else sum(len(unit.vms) for unit in units[position:])
        return count, min(rest[-1], free_pool)

    def step(position, count, memory, free_pool):
        nonlocal budget, best_score, best
        if (count, memory) > best_score:
            best_score, best = (count, memory), dict(placement.host_of)
        if position == len(units) or budget <= 0 or best_score[0] == everything:
            return
        budget -= len(placement.hosts)
        more_count, more_memory = bound(position, free_pool)
        if (count + more_count, memory + more_memory) <= best_score:
            return
        unit = units[position]
        tried = set()
        for host in placement.candidates(unit, most_free=False, count=len(placement.hosts)):
            looks = (
                host.rank if host in told_apart else -1,
                host.kind.number,
                placement.free[host],
                placement.vcpus_free[host],
                tuple(sorted(group for group in groups if placement.anti[host].get(group))),
            )
            if looks in tried:
                continue  # a host just like it was tried
            tried.add(looks)
            placement.put(unit, host, "best fit")
            step(position + 1, count + len(unit.vms), memory + unit.need, free_pool - unit.need)
            placement.take(unit)
        step(position + 1, count, memory, free_pool)

    step(0, 0, 0.0, total_free)
    for unit, host in best.items():
        placement.put(unit, host, reasons.get(unit, "best fit"))


# --------------------------------------------------------------------------------------------------------------- schedule


@dataclass(eq=False)
class Move:
    vm: Vm
    to: Host
    engine: str
    engine_reason: str
    reason: str
    onboard: bool = False  # its memory is on remote_ram once it has arrived
    share: float = 0.0  # MiB/s of the link while all slots are taken
    dirty: float = 0.0
    wanted_s: float = 0.0  # pre-copy until it has converged, or until more of it gains nothing
    precopy_s: int = 0
    work: float = 0.0  # MiB to send
    start_s: float = 0.0
    finish_s: float = 0.0


def _prepare_moves(moves, options):
    """Each move's share of the link and the pre-copy time that it would like."""
    leaving, pairs, arriving = defaultdict(int), defaultdict(int), defaultdict(int)
    for move in moves:
        leaving[move.vm.host] += 1
        pairs[(move.vm.host, move.to)] += 1
    for (_source, destination), count in pairs.items():
        arriving[destination] += min(options.per_source, count)
    for move in moves:
        side_by_side = max(min(options.per_source, leaving[move.vm.host]), min(options.per_destination, arriving[move.to]))
        move.share = options.bandwidth_mib_s / side_by_side
        move.dirty = UNKNOWN_DIRTY_SHARE * move.share if move.vm.dirty_rate is None else move.vm.dirty_rate
        if move.engine == "precopy":
            again = min(move.dirty, MAX_DIRTY_SHARE * move.share)
        else:
            again = move.dirty if move.dirty <= HYBRID_DIRTY_SHARE * move.share else 0
        move.wanted_s = move.vm.memory / (move.share - again)
    # Big and hot first: they take longest, and everything else fits around them.
    moves.sort(key=lambda move: (-(move.vm.memory + min(move.dirty, move.share) * move.wanted_s), move.vm.name, move.vm.host.rank))


def _converges(move):
    return move.dirty <= MAX_DIRTY_SHARE * move.share


def _set_precopy(moves, scale, options):
    """Bound each VM's pre-copy to a share of what it would like. What is not copied ahead is fetched after the switch."""
    for move in moves:
        if move.engine == "precopy":
            move.precopy_s = max(options.precopy_min_s, math.ceil(move.wanted_s * PRECOPY_ONLY_SLACK))
            precopy = move.wanted_s
        else:
            move.precopy_s = max(options.precopy_min_s, math.ceil(move.wanted_s * scale))
            precopy = min(move.wanted_s, move.precopy_s)
        sent_again = min(move.dirty, move.share) * precopy
        move.work = move.vm.memory + sent_again + options.setup_s * move.share


def _simulate(moves, options):
    """Run the moves in their order through the slots of sources and destinations; links are shared evenly.

    Sets the start and finish of each. Returns when the last one finishes and how many run at once at most.
    """
    limit, waiting, running = {}, defaultdict(deque), defaultdict(dict)
    for number, move in enumerate(moves):
        limit[move.vm.host] = options.per_source
        limit[move.to] = options.per_destination
        waiting[move.vm.host].append(number)
        waiting[move.to].append(number)
    left = [move.work for move in moves]
    rate = [0.0] * len(moves)
    since = [0.0] * len(moves)
    started = [False] * len(moves)
    due, due_at = [], [math.inf] * len(moves)
    now, active, peak = 0.0, 0, 0

    def start(number):
        nonlocal active, peak
        move = moves[number]
        source, destination = move.vm.host, move.to
        if started[number] or len(running[source]) >= limit[source] or len(running[destination]) >= limit[destination]:
            return
        started[number] = True
        move.start_s = since[number] = now
        running[source][number] = running[destination][number] = None
        active += 1
        peak = max(peak, active)
        changed.update(dict.fromkeys((source, destination)))

    def start_waiting(host):
        queue = waiting[host]
        while queue and started[queue[0]]:
            queue.popleft()
        for number in queue:
            if len(running[host]) >= limit[host]:
                break
            start(number)

    def share_links():
        for number in {number: None for host in changed for number in running[host]}:
            move = moves[number]
            new_rate = options.bandwidth_mib_s / max(len(running[move.vm.host]), len(running[move.to]))
            if new_rate != rate[number]:
                left[number] -= rate[number] * (now - since[number])
                since[number] = now
                rate[number] = new_rate
                due_at[number] = now + max(0.0, left[number]) / new_rate
                heapq.heappush(due, (due_at[number], number))

    changed = {}
    for number in range(len(moves)):
        start(number)
    share_links()
    while due:
        when, number = heapq.heappop(due)
        if when != due_at[number]:
            continue  # its share of the link has changed since
        due_at[number] = math.inf
        now = when
        active -= 1
        move = moves[number]
        move.finish_s = now
        del running[move.vm.host][number], running[move.to][number]
        changed = {move.vm.host: None, move.to: None}
        start_waiting(move.vm.host)
        start_waiting(move.to)
        share_links()
    return now, peak


def _schedule(moves, options, warnings):
    """Give each move its pre-copy time and its place in time. Returns the estimated end, the most moves at once, and if it is in time."""
    if not moves:
        return 0.0, 0, True
    _prepare_moves(moves, options)
    for move in moves:
        if move.onboard and not _converges(move):
            warnings.append(
                f"{move.vm.name} dirties {move.dirty:g} MiB/s and its share of the link is {move.share:g} MiB/s: it is slowed down until its memory is"
                " on remote_ram"
            )
        elif move.engine == "precopy" and not _converges(move):
            warnings.append(
                f"{move.vm.name} dirties {move.dirty:g} MiB/s and its share of the link is {move.share:g} MiB/s: pre-copy alone may never converge;"
                " use the userfault engine, or fewer VMs at once"
            )
    unknown = [move.vm.name for move in moves if move.vm.dirty_rate is None]
    if unknown:
        warnings.append(f"the dirty rate of {_list_of(unknown)} is not known: counted as {UNKNOWN_DIRTY_SHARE:.0%} of the VM's share of the link")

    def run(scale):
        _set_precopy(moves, scale, options)
        return _simulate(moves, options)

    end, peak = run(1.0)
    in_time = True
    if options.deadline_s is not None and end > DEADLINE_MARGIN * (options.deadline_s - options.elapsed_s):
        end, peak, in_time = _meet_deadline(moves, options, warnings, run)
    moves.sort(key=lambda move: move.start_s)
    return end, peak, in_time


def _meet_deadline(moves, options, warnings, run):
    left = options.deadline_s - options.elapsed_s
    target = DEADLINE_MARGIN * left
    end, peak = run(0.0)
    if end > left:
        data = sum(move.work for move in moves)
        passed = f", and {options.elapsed_s:.0f} s of it have passed" if options.elapsed_s else ""
        needed = f"; about {options.bandwidth_mib_s * end / left:.0f} MiB/s of bandwidth would do" if left > 0 else ""
        warnings.append(
            f"the deadline of {options.deadline_s:g} s can't be met{passed}: sending {data:.0f} MiB takes {end:.0f} s even with the least pre-copy,"
            f" {end - left:.0f} s too long{needed}"
        )
        return end, peak, False
    low, high = 0.0, 1.0
    if end <= target:
        for unused in range(6):
            middle = (low + high) / 2
            if run(middle)[0] <= target:
                low = middle
            else:
                high = middle
        end, peak = run(low)
    cut = f"{low:.0%} of what the VMs would like" if low else f"the minimum of {options.precopy_min_s} s"
    warnings.append(f"pre-copy is cut to {cut}, to meet the deadline of {options.deadline_s:g} s; more is fetched after the switch")
    return end, peak, True


# --------------------------------------------------------------------------------------------------------------- the plan


def make_plan(facts, options):
    """The plan (docs/data.md) that moves the VMs of options.sources away. Raises PlanError when the input makes no sense."""
    options.check()
    return _Planner(Fleet(facts), options).plan()


def check_pins(options, hosts):
    """Raises PlanError when a VM is pinned to a host that is none."""
    for vm, host in options.pinned.items():
        if host is not None and host not in hosts:
            raise PlanError(f"pinned: {vm} is pinned to {host!r}, which is none of the hosts: {_list_of(sorted(hosts))}")


def strangers(options, names, known):
    """A warning for each of the options with these names that speaks of VMs that are not known."""
    found = {name: [vm for vm in getattr(options, name) or () if vm not in known] for name in names}
    return [f"{name} names {_list_of(vms)}, but no VM has that name" for name, vms in found.items() if vms]


class _Planner:
    """One pass: choose hosts, sort VMs into moving, blocked and skipped, place the moving ones, schedule them."""

    def __init__(self, fleet, options):
        self.fleet = fleet
        self.options = options
        self.warnings = []
        self.blocked = {}  # Vm to its blockers
        self.skipped = []
        self.sources = self._find_sources()
        self.destinations = self._find_destinations()
        self.usable = [host for host in self.destinations if host.usable]
        self.usable_by_kind = defaultdict(list)
        for host in self.usable:
            self.usable_by_kind[host.kind].append(host)
        self.most_free = max((host.free for host in self.usable), default=0) - options.memory_reserve_mib
        self.compatibility = Compatibility(options)
        everyone = [vm for _name, host in sorted(fleet.hosts.items()) for _vm_name, vm in sorted(host.vms.items())]
        self.affinity = _group_map(options.affinity, everyone, "affinity")
        self.anti_affinity = _group_map(options.anti_affinity, everyone, "anti_affinity")
        self.everyone = everyone
        self.by_name = defaultdict(list)
        for vm in everyone:
            self.by_name[vm.name].append(vm)

    # hosts

    def _find_sources(self):
        options, hosts = self.options, self.fleet.hosts
        names = options.sources
        if not names:
            if not (options.vms and options.destinations):
                raise PlanError("no source: name the host to evacuate, or the VMs to move and their destination")
            names = [name for name, host in sorted(hosts.items()) if name not in options.destinations and host.kind is not None]
        for name in names:
            if name not in hosts:
                raise PlanError(f"unknown source host {name!r}: the facts are of {_list_of(sorted(hosts)) or 'no host at all'}")
            if hosts[name].kind is None:
                raise PlanError(f"source host {name} is {hosts[name].reason}: nothing can be moved away from it")
        check_pins(options, hosts)
        return [hosts[name] for name in dict.fromkeys(names)]

    def _find_destinations(self):
        hosts, sources = self.fleet.hosts, set(self.sources)
        asked = self.options.destinations
        for name in asked or ():
            if name not in hosts:
                raise PlanError(f"unknown destination host {name!r}: the facts are of {_list_of(sorted(hosts))}")
        for host in hosts.values():
            if host in sources:
                host.usable, host.reason = False, "it is being evacuated"
            elif asked is not None and host.name not in asked and host.usable:
                host.usable, host.reason = False, "not among the destinations asked for"
        found = [host for _name, host in sorted(hosts.items()) if host not in sources and (asked is None or host.name in asked)]
        if not found:
            if asked == []:
                raise PlanError("no destination: the list of destinations is empty")
            raise PlanError(
                f"no destination: there is no host besides {_list_of(source.name for source in self.sources)}; gather the facts of the other hosts too"
            )
        return found

    # VMs

    def plan(self):
        moving = self._sort_out()
        units = self._make_units(moving)
        placement = _place(units, self.usable, self.options, self._anti_by_host(units))
        for unit in units:
            if unit not in placement.host_of:
                self._block_unplaced(unit, placement)
        moves = []
        for unit, host in placement.host_of.items():
            for vm in unit.vms:
                engine, engine_reason = _choose_engine(vm, host, self.options)
                why = unit.only_reason or placement.reason_of[unit]
                moves.append(Move(vm, host, engine, engine_reason, why, engine == "precopy" and _onboards(vm, host, self.options)))
        if self.options.onboard and self.options.engine not in ("auto", "precopy"):
            self.warnings.append(f"nothing is onboarded: that is done by pre-copy, and the engine {self.options.engine} was asked for")
        end, peak, in_time = _schedule(moves, self.options, self.warnings)
        return self._assemble(moves, end, peak, in_time)

    def _block(self, vm, code, message):
        blocker = {"code": code, "message": message}
        found = self.blocked.setdefault(vm, [])
        if blocker not in found:
            found.append(blocker)

    def _sort_out(self):
        """VMs that may move, in the order of hosts and names; the others land in blocked or skipped."""
        options = self.options
        wanted = None if options.vms is None else set(options.vms)
        chosen = [
            vm
            for source in sorted(self.sources, key=lambda source: source.rank)
            for _name, vm in sorted(source.vms.items())
            if wanted is None or vm.name in wanted
        ]
        exclude = set(options.exclude)
        moving = []
        for vm in chosen:
            if vm.name in exclude:
                self.skipped.append({"vm": vm.name, "driver": vm.driver, "from": vm.host.name, "reason": "excluded"})
                continue
            runs_on = None if vm.active else self._runs_elsewhere(vm)
            if runs_on:
                reason = f"it runs on {runs_on.name}; this is only its definition"
                self.skipped.append({"vm": vm.name, "driver": vm.driver, "from": vm.host.name, "reason": reason})
                continue
            self.compatibility.add(vm)
            self._find_blockers(vm)
            if vm not in self.blocked:
                moving.append(vm)
        self._look_for_strangers(chosen)
        self._keep_namesakes_apart(moving)
        return moving

    def _runs_elsewhere(self, vm):
        """The host that runs a VM of which only the definition is here."""
        for other in self.by_name[vm.name]:
            if other.active and other.uuid == vm.uuid and other.driver == vm.driver:
                return other.host
        return None

    def _keep_namesakes_apart(self, moving):
        """Different VMs of one name, from several sources, can't share a destination."""
        seen = set()
        for vm in moving:
            if vm.name in seen:
                group = f"of VMs named {vm.name}"
                self.anti_affinity[vm.name] = tuple(dict.fromkeys((*self.anti_affinity.get(vm.name, ()), group)))
            seen.add(vm.name)

    def _look_for_strangers(self, chosen):
        """Names in the options that no VM has."""
        chosen_names = {vm.name for vm in chosen}
        for name in dict.fromkeys(self.options.vms or ()):
            if name in chosen_names:
                continue
            where = sorted(self.by_name.get(name, ()), key=lambda vm: not vm.active)
            entry = {"vm": name, "driver": None, "from": None, "reason": "on none of the hosts"}
            if where:
                vm = where[0]
                already = "already" if vm.host in self.destinations else "not on a source, but"
                state = "" if vm.active else f", {vm.state}"
                entry.update({"driver": vm.driver, "from": vm.host.name, "reason": f"{already} on {vm.host.name}{state}"})
            self.skipped.append(entry)
            if not where:
                self.warnings.append(f"{name} should move, but is on none of the hosts")
        self.warnings += strangers(self.options, ("exclude", "pinned"), self.by_name)

    def _find_blockers(self, vm):
        """Everything that can be said of one VM without a look at the others."""
        for blocker in vm.blockers:
            self._block(vm, blocker["code"], blocker["message"])
        codes = {blocker["code"] for blocker in vm.blockers}
        if vm.state in ("shutoff", "crashed") and "not_running" not in codes:
            self._block(vm, "not_running", f"it is {vm.state}")
        if vm.state == "incoming" and "already_migrating" not in codes:
            self._block(vm, "already_migrating", f"it is still arriving on {vm.host.name}")
        self._check_engines(vm)
        usable = self._check_pin(vm)
        if not usable:
            self._block(vm, "no_destination", f"no destination can be used: {_list_of(f'{host.name} is {host.reason}' for host in self.destinations)}")
            return
        if usable is self.usable:
            kinds = self.usable_by_kind
        else:
            kinds = {host.kind: [host] for host in usable}
        if all(self.compatibility.mismatches(vm, kind) for kind in kinds):
            by_code = defaultdict(list)
            for kind, hosts in kinds.items():
                for code, text in self.compatibility.mismatches(vm, kind):
                    by_code[code].append(f"{_list_of([host.name for host in hosts], 3)}: {text}")
            for code, texts in by_code.items():
                self._block(vm, code, "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else ""))
        if vm in self.blocked and vm.memory > self.most_free:
            self._block(vm, "no_room", f"it needs {vm.memory:g} MiB, and no destination has more than {max(0, self.most_free):g} MiB above the reserve")

    def _check_engines(self, vm):
        if _usable_engines(vm, self.options):
            return
        wanted = ENGINES if self.options.engine == "auto" else (self.options.engine,)
        for name in wanted:
            if name not in vm.engines:
                self._block(vm, "driver_missing", f"engine {name} is not known for driver {vm.driver}")
                continue
            # Without a reason of its own it is what keeps the VM in any case, which has been said.
            for blocker in vm.engines[name][1] or ([] if vm in self.blocked else [{"code": "no_destination", "message": "not usable"}]):
                self._block(vm, blocker["code"], f"engine {name}: {blocker['message']}")

    def _check_pin(self, vm):
        """The destinations to check the VM against: the one that it is pinned to, else all."""
        if vm.name not in self.options.pinned:
            return self.usable
        pin = self.options.pinned[vm.name]
        if pin is None or pin == vm.host.name:
            self._block(vm, "pinned", f"it is pinned to {vm.host.name} and must stay")
            return self.usable
        host = self.fleet.hosts[pin]
        if not host.usable:
            self._block(vm, "pinned", f"it is pinned to {pin}, which can't be used: {host.reason}")
        return [host] if host.kind else self.usable

    # groups

    def _make_units(self, moving):
        """Join VMs of the same affinity group; leave out groups that can't move."""
        parent = {vm: vm for vm in moving}

        def root(vm):
            while parent[vm] is not vm:
                parent[vm] = parent[parent[vm]]
                vm = parent[vm]
            return vm

        first = {}
        for vm in moving:
            for group in self.affinity.get(vm.name, ()):
                parent[root(vm)] = root(first.setdefault(group, vm))
        together = defaultdict(list)
        for vm in moving:
            together[root(vm)].append(vm)
        staying = defaultdict(list)
        for vm in self.everyone:
            if vm.active and vm not in parent:
                for group in self.affinity.get(vm.name, ()):
                    staying[group].append(vm)
        kinds_of = {}
        units = []
        for vms in together.values():
            unit = Unit(vms, sum(vm.memory for vm in vms), sum(vm.vcpus for vm in vms), number=len(units))
            if self._apply_groups(unit, staying) and self._apply_kinds(unit, kinds_of):
                units.append(unit)
        return units

    def _apply_groups(self, unit, staying):
        """Work out what pins and groups ask of the unit; False when they can't be met."""
        pins = {self.options.pinned[vm.name]: vm for vm in unit.vms if vm.name in self.options.pinned}
        if len(pins) > 1:
            for vm in unit.vms:
                self._block(vm, "affinity", f"{unit.label} belong together, but are pinned to different hosts: {_list_of(sorted(pins))}")
            return False
        groups = [group for vm in unit.vms for group in self.anti_affinity.get(vm.name, ())]
        twice = sorted({group for group in groups if groups.count(group) > 1}) if len(unit.vms) > 1 else []
        if twice:
            for vm in unit.vms:
                self._block(vm, "anti_affinity", f"{unit.label} must share a host by affinity and must not by anti-affinity group {twice[0]}")
            return False
        unit.anti = tuple(dict.fromkeys(groups))
        if pins:
            ((pin, vm),) = pins.items()
            unit.only = [self.fleet.hosts[pin]]
            unit.only_reason = f"pinned to {pin}" if len(unit.vms) == 1 else f"{vm.name} is pinned to {pin}"
        return self._stay_together(unit, staying)

    def _stay_together(self, unit, staying):
        others = {other: group for vm in unit.vms for group in self.affinity.get(vm.name, ()) for other in staying.get(group, ())}
        if not others:
            return True
        elsewhere = [other for other in others if other.host not in self.sources]
        allowed = list(dict.fromkeys(other.host for other in elsewhere if other.host.usable and (unit.only is None or other.host in unit.only)))
        if not allowed:
            other = elsewhere[0] if elsewhere else next(iter(others))
            why = "stays there" if other.host in self.sources else f"that host can't be used: {other.host.reason or 'a pin names another one'}"
            for vm in unit.vms:
                self._block(vm, "affinity", f"affinity group {others[other]} wants it on one host with {other.name} on {other.host.name}, and {why}")
            return False
        if len(allowed) > 1:
            self.warnings.append(f"{unit.label} should be on one host with VMs that are on several: {_list_of(host.name for host in allowed)}")
        unit.only = sorted(allowed, key=lambda host: host.rank)
        other = next(other for other in elsewhere if other.host in allowed)
        unit.only_reason = f"with {other.name}, by affinity group {others[other]}"
        return True

    def _apply_kinds(self, unit, kinds_of):
        key = frozenset(vm.kind for vm in unit.vms)
        if key not in kinds_of:
            kinds_of[key] = tuple(kind for kind in self.usable_by_kind if not any(self.compatibility.mismatches(vm, kind) for vm in unit.vms))
        unit.kinds = kinds_of[key]
        hosts = unit.only if unit.only is not None else None
        if unit.kinds and (hosts is None or any(host.kind in unit.kinds for host in hosts)):
            return True
        if hosts is not None:
            where = f"on {_list_of(host.name for host in hosts)}"
            kinds = {host.kind: host for host in hosts}
        else:
            where = "together on any one destination"
            kinds = {kind: found[0] for kind, found in self.usable_by_kind.items()}
        reasons = [
            f"{host.name}: {vm.name}: {text}" for kind, host in kinds.items() for vm in unit.vms for _code, text in self.compatibility.mismatches(vm, kind)
        ]
        for vm in unit.vms:
            self._block(vm, "affinity", f"{unit.label} can't run {where}, as its affinity group asks: {'; '.join(reasons[:5])}")
        return False

    def _anti_by_host(self, units):
        """Members of anti-affinity groups that are on the destinations already."""
        in_play = {group for unit in units for group in unit.anti}
        found = defaultdict(lambda: defaultdict(int))
        if in_play:
            for host in self.usable:
                for vm in host.vms.values():
                    if vm.active:
                        for group in self.anti_affinity.get(vm.name, ()):
                            found[host][group] += 1
        return found

    # what found no room

    def _block_unplaced(self, unit, placement):
        hosts = [host for host in (unit.only if unit.only is not None else self.usable) if host.kind in unit.kinds]
        free_of_conflict = [host for host in hosts if not placement.conflicts(host, unit)]
        if len(free_of_conflict) < len(hosts):
            self._block_conflicts(unit, [host for host in hosts if placement.conflicts(host, unit)], placement)
        if not free_of_conflict:
            return
        who = "it needs" if len(unit.vms) == 1 else f"{unit.label} must stay together and need"
        roomy = [host for host in free_of_conflict if placement.free[host] >= unit.need]
        if roomy:
            host = max(roomy, key=lambda host: (placement.vcpus_free[host], -host.rank))
            has = max(0, placement.vcpus_free[host])
            text = f"{who} {unit.vcpus:g} vCPUs; closest is {host.name} with {has:g} within cpu_overcommit: {unit.vcpus - has:g} short"
        else:
            host = max(free_of_conflict, key=lambda host: (placement.free[host], -host.rank))
            has = placement.free[host]
            text = (
                f"{who} {unit.need:g} MiB; closest is {host.name} with {max(0, has):g} MiB left above the reserve of"
                f" {self.options.memory_reserve_mib:g} MiB: {unit.need - has:g} MiB short"
            )
        for vm in unit.vms:
            self._block(vm, "no_room", text)

    def _block_conflicts(self, unit, hosts, placement):
        for group in unit.anti:
            where = [host.name for host in hosts if placement.anti[host].get(group)]
            if where:
                for vm in unit.vms:
                    if group in self.anti_affinity.get(vm.name, ()):
                        self._block(vm, "anti_affinity", f"anti-affinity group {group} keeps it off {_list_of(where)}, where another of the group is or goes")
        for vm in unit.vms:
            where = [host.name for host in hosts if _name_taken(host, vm)]
            if where:
                self._block(vm, "no_destination", f"another VM of its name is on {_list_of(where)}")
        if len(unit.vms) > 1:
            for vm in unit.vms:
                if vm not in self.blocked:
                    self._block(vm, "affinity", f"{unit.label} must stay together, and not all of them can move")

    # the result

    def _assemble(self, moves, end, peak, in_time):
        options = self.options
        incoming, gained, lost = defaultdict(int), defaultdict(float), defaultdict(float)
        for move in moves:
            incoming[move.to] += 1
            gained[move.to] += move.vm.memory
            lost[move.vm.host] += move.vm.memory
        blocked = sorted(self.blocked, key=lambda vm: (vm.host.rank, vm.name))
        excluded = [entry["vm"] for entry in self.skipped if entry["reason"] == "excluded"]
        if excluded and options.vms is None:
            self.warnings.append(f"{_list_of(excluded)} will not be moved: excluded")
        return {
            "source": self.sources[0].name if len(self.sources) == 1 else None,
            "sources": [source.name for source in self.sources],
            "deadline_s": options.deadline_s,
            "elapsed_s": round(options.elapsed_s, 1),
            "estimated_s": round(end, 1),
            "feasible": in_time and not blocked,
            "concurrency": {"per_source": options.per_source, "per_destination": options.per_destination, "peak": peak},
            "moves": [_move_entry(order, move) for order, move in enumerate(moves, 1)],
            "blocked": [{"vm": vm.name, "driver": vm.driver, "from": vm.host.name, "blockers": self.blocked[vm]} for vm in blocked],
            "skipped": self.skipped,
            "hosts": [
                {
                    "name": host.name,
                    "cordoned": host.cordoned,
                    "usable": host.usable,
                    "reason": host.reason,
                    "memory_free_before_mib": round(host.free),
                    "memory_free_after_mib": round(host.free - gained[host] + lost[host]),
                    "incoming": incoming[host],
                }
                for _name, host in sorted(self.fleet.hosts.items())
            ],
            "warnings": self.warnings,
        }


def _move_entry(order, move):
    return {
        "vm": move.vm.name,
        "driver": move.vm.driver,
        "from": move.vm.host.name,
        "to": move.to.name,
        "engine": move.engine,
        "engine_reason": move.engine_reason,
        "onboard": move.onboard,
        "memory_mib": move.vm.memory,
        "dirty_rate_mib_s": move.vm.dirty_rate,
        "precopy_timeout_s": move.precopy_s,
        "order": order,
        "estimated_start_s": round(move.start_s, 1),
        "estimated_s": round(move.finish_s - move.start_s, 1),
        "reason": move.reason,
    }


# -------------------------------------------------------------------------------------------------------------- the table

TABLE_HOSTS = 20


def render_table(plan):
    """The plan as text for a person."""
    lines = [_headline(plan)]
    if plan["moves"]:
        rows = [("#", "start", "takes", "VM", "from", "to", "engine", "memory", "dirties", "pre-copy", "why there")]
        for move in plan["moves"]:
            dirty = move["dirty_rate_mib_s"]
            rows.append(
                (
                    str(move["order"]),
                    f"{move['estimated_start_s']:g} s",
                    f"{move['estimated_s']:g} s",
                    move["vm"],
                    move["from"],
                    move["to"],
                    move["engine"],
                    f"{move['memory_mib']:g} MiB",
                    "?" if dirty is None else f"{dirty:g} MiB/s",
                    f"{move['precopy_timeout_s']} s",
                    move["reason"],
                )
            )
        lines += ["", *_columns(rows, right={0, 1, 2, 7, 8, 9})]
    if plan["blocked"]:
        rows = [
            (entry["vm"] if first else "", entry["from"] if first else "", blocker["code"], blocker["message"])
            for entry in plan["blocked"]
            for first, blocker in zip([True] + [False] * len(entry["blockers"]), entry["blockers"])
        ]
        lines += ["", f"Blocked: these can't {'be onboarded' if 'waves' in plan else 'leave'}", *_columns(rows)]
    if plan["skipped"]:
        lines += ["", "Skipped", *_columns([(entry["vm"], entry["from"] or "-", entry["reason"]) for entry in plan["skipped"]])]
    lines += ["", "Hosts", *_host_lines(plan)]
    if plan["warnings"]:
        lines += ["", "Warnings", *(f"  {warning}" for warning in plan["warnings"])]
    return "\n".join(lines) + "\n"


def _headline(plan):
    parts = [f"{len(plan['moves'])} to move"]
    for key in ("blocked", "skipped"):
        if plan[key]:
            parts.append(f"{len(plan[key])} {key}")
    time = f"about {plan['estimated_s']:g} s"
    if plan["deadline_s"] is not None:
        time += f" of {plan['deadline_s']:g} s"
        if plan["elapsed_s"]:
            time += f", {plan['elapsed_s']:g} s of which have passed"
    verdict = "feasible" if plan["feasible"] else "NOT FEASIBLE"
    what = "Onboarding of the VMs of" if "waves" in plan else "Evacuation of"
    return f"{what} {_list_of(plan['sources'])}: {', '.join(parts)}, {time}: {verdict}"


def _host_lines(plan):
    sources = set(plan["sources"])
    hosts = plan["hosts"]
    if len(hosts) > TABLE_HOSTS:
        hosts = [host for host in hosts if host["incoming"] or host["name"] in sources]
    rows = [("host", "free now", "free after", "arriving", "")]
    for host in hosts:
        rows.append((host["name"], f"{host['memory_free_before_mib']} MiB", f"{host['memory_free_after_mib']} MiB", str(host["incoming"]), host["reason"]))
    lines = _columns(rows, right={1, 2, 3})
    if len(hosts) < len(plan["hosts"]):
        lines.append(f"  and {len(plan['hosts']) - len(hosts)} hosts that nothing moves to")
    return lines


def _columns(rows, right=frozenset()):
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.rjust(width) if column in right else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
