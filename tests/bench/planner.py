# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long the planner takes for a big fleet, and how well it packs.

The time is that of 1,000 hosts with 20,000 VMs on one core. The packing of small random fleets is held against the optimum
that scipy.optimize.milp finds; without scipy that part is left out. Writes build/bench/planner.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import platform
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = ("evacuate 50 hosts", "evacuate 50 hosts, too little room", "move all 20,000 VMs")


def load_planner():
    path = ROOT / "plugins" / "module_utils" / "_planner.py"
    spec = importlib.util.spec_from_file_location("_planner", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------------ fleets

ENGINES = {name: {"usable": True, "blockers": []} for name in ("precopy", "userfault")}
FEATURES = [f"feature{number}" for number in range(120)]


def host_facts(name, free_mib, generation=0):
    return {
        "name": name,
        "memory_total_mib": 524288,
        "memory_available_mib": free_mib,
        "cpus": 64,
        "cpu": {"vendor": "AuthenticAMD", "arch": "x86_64", "features": FEATURES[: 100 + 10 * generation]},
        "machines": ["pc-q35-9.2", "pc-q35-10.0"][: 1 + (generation > 0)],
        "drivers": ["libvirt"],
        "cordoned": False,
    }


def vm_facts(name, memory_mib, mode="custom", dirty=5.0, anti=()):
    return {
        "name": name,
        "uuid": name,
        "driver": "libvirt",
        "state": "running",
        "memory_mib": memory_mib,
        "vcpus": 2,
        "machine": "pc-q35-9.2",
        "cpu": {"mode": mode, "features": FEATURES[:40] if mode == "custom" else []},
        "groups": {"affinity": [], "anti_affinity": list(anti)},
        "engines": ENGINES,
        "dirty_rate_mib_s": dirty,
        "blockers": [],
    }


def big_fleet(case, seed=1):
    """1,000 hosts of three CPU generations with 20,000 VMs; every twentieth VM is in an anti-affinity group of four."""
    rng = random.Random(seed)
    hosts = [f"hv{number:04}" for number in range(1000)]
    loaded = hosts[:500] if case == "move all 20,000 VMs" else hosts
    vms = {name: [] for name in hosts}
    for number in range(20000):
        anti = [f"group{number // 80}"] if number % 20 == 0 else []
        mode = "host-passthrough" if number % 10 == 1 else "custom"
        memory = rng.choice([2048, 4096, 8192, 16384])
        vms[loaded[number % len(loaded)]].append(vm_facts(f"vm{number:05}", memory, mode, rng.uniform(0, 200), anti))
    room = 4096 if "too little" in case else 524288
    facts = [{"host": host_facts(name, room + rng.randrange(16384), number % 3), "vms": vms[name]} for number, name in enumerate(hosts)]
    return facts, hosts[:500] if loaded is not hosts else hosts[:50]


def measure(planner, case, repeat):
    facts, sources = big_fleet(case)
    seconds = []
    for _round in range(repeat):
        options = planner.Options(sources=sources, deadline_s=3600, per_source=4, per_destination=2)
        begin = time.process_time()
        plan = planner.make_plan(facts, options)
        seconds.append(time.process_time() - begin)
    return {
        "case": case,
        "seconds": round(min(seconds), 3),
        "hosts": len(facts),
        "vms": sum(len(entry["vms"]) for entry in facts),
        "moves": len(plan["moves"]),
        "blocked": len(plan["blocked"]),
        "estimated_s": plan["estimated_s"],
    }


# ----------------------------------------------------------------------------------------------------------------- packing


def small_instance(rng):
    """A few VMs and destinations with about as much room as is needed, unequal, with an anti-affinity group at times."""
    count = rng.randint(4, 16)
    sizes = [rng.randrange(4, 65) * 64 for _vm in range(count)]
    bins = rng.randint(2, 5)
    room = sum(sizes) * rng.uniform(0.95, 1.25)
    weights = [rng.uniform(0.5, 1.5) for _bin in range(bins)]
    free = [int(room * weight / sum(weights)) for weight in weights]
    group = rng.sample(range(count), min(bins, count)) if rng.random() < 0.5 else []
    return sizes, free, group


def planned(planner, sizes, free, group):
    vms = [vm_facts(f"vm{number}", size, anti=["group"] if number in group else []) for number, size in enumerate(sizes)]
    facts = [{"host": host_facts("source", 0), "vms": vms}]
    facts += [{"host": host_facts(f"hv{number}", space), "vms": []} for number, space in enumerate(free)]
    plan = planner.make_plan(facts, planner.Options(sources=["source"], memory_reserve_mib=0))
    return len(plan["moves"]), sum(move["memory_mib"] for move in plan["moves"])


def optimum(milp_tools, sizes, free, group):
    """The most VMs that can be placed, by integer programming."""
    numpy, optimize = milp_tools
    vms, bins = len(sizes), len(free)
    rows, limits = [], []
    for vm in range(vms):
        row = numpy.zeros(vms * bins)
        row[vm * bins : (vm + 1) * bins] = 1
        rows.append(row)
        limits.append(1)
    for host in range(bins):
        row = numpy.zeros(vms * bins)
        row[host::bins] = sizes
        rows.append(row)
        limits.append(free[host])
        row = numpy.zeros(vms * bins)
        row[[vm * bins + host for vm in group]] = 1
        rows.append(row)
        limits.append(1)
    result = optimize.milp(
        -numpy.ones(vms * bins),
        constraints=optimize.LinearConstraint(numpy.array(rows), -numpy.inf, numpy.array(limits)),
        integrality=numpy.ones(vms * bins),
        bounds=optimize.Bounds(0, 1),
    )
    if result.status != 0:
        raise RuntimeError(f"milp found no optimum: {result.message}")
    return round(-result.fun)


def packing(planner, instances, seed=1):
    try:
        import numpy
        from scipy import optimize
    except ImportError:
        print("packing is left out: it needs scipy (pip install scipy)")
        return {"instances": 0}
    rng = random.Random(seed)
    gaps, all_fit, all_placed = [], 0, 0
    begin = time.process_time()
    ours_s = 0.0
    for _instance in range(instances):
        sizes, free, group = small_instance(rng)
        before = time.process_time()
        moved = planned(planner, sizes, free, group)[0]
        ours_s += time.process_time() - before
        best = optimum((numpy, optimize), sizes, free, group)
        if moved > best:
            raise RuntimeError(f"the planner placed {moved} VMs where {best} is the most: {sizes} into {free}")
        gaps.append((best - moved) / best if best else 0.0)
        if best == len(sizes):
            all_fit += 1
            all_placed += moved == best
    return {
        "instances": instances,
        "optimal": sum(gap == 0 for gap in gaps),
        "gap_max": round(max(gaps), 4),
        "gap_mean": round(sum(gaps) / len(gaps), 5),
        "all_fit_instances": all_fit,
        "all_fit_placed": all_placed,
        "planner_seconds": round(ours_s, 2),
        "solver_seconds": round(time.process_time() - begin - ours_s, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=500, help="small fleets to solve to the optimum (default: 500)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each big fleet; the best counts (default: 3)")
    parser.add_argument("--limit-s", type=float, default=10, help="exit 1 if a big fleet takes longer (default: 10)")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "bench" / "planner.json")
    args = parser.parse_args()
    planner = load_planner()
    cases = []
    for case in CASES:
        cases.append(measure(planner, case, args.repeat))
        print("{case}: {seconds} s for {hosts} hosts, {vms} VMs, {moves} moves, {blocked} blocked".format(**cases[-1]))
    slowest = max(cases, key=lambda case: case["seconds"])
    result = {
        "seconds": slowest["seconds"],
        "hosts": slowest["hosts"],
        "vms": slowest["vms"],
        "cases": cases,
        **packing(planner, args.instances),
        "python": platform.python_version(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=2))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["seconds"] <= args.limit_s else 1


if __name__ == "__main__":
    sys.exit(main())
