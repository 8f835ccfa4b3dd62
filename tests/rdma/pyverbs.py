# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs rdma-core's tests of pyverbs on a lab host, against the devices that the role rdma sets up: python3 pyverbs.py [siw] [rxe]

The result of every test is in build/test/pyverbs-<transport>.json, and what did not pass by its reason in pyverbs-<transport>.md.
Which may fail, and why, is in pyverbs.json; a file of the suite that is named there is left out.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lab"), str(HERE.parent / "kmod")]

import playbook
import ready

import build
import image
import lab as lab_module
from image import LabError

HOST = "hv1"
OUT = ROOT / "build" / "test"
FOLDER = "/root/pyverbs"
#: Where Debian keeps the suite; documentation isn't installed otherwise, and dpkg wants the folders above a file too.
SUITE = "usr/share/doc/rdma-core/tests"
SECONDS = 600  # for one file of it on an emulated host
#: How often a test that fails is run again, alone: the suite draws sizes of queues at random, and has races of its own, as when it
#: makes a completion queue smaller in the hope that all completions are in it by then.
AGAIN = 2
#: Files with tests of what only the cards of one maker have.
MAKERS = ("test_mlx5_", "test_efa", "test_hns_", "test_hbl", "test_cuda_")
#: A line of unittest: the test, its class, and how it ended; what the test printed may stand between.
LINE = re.compile(r"^(test_\w+) \(tests\.([\w.]+?)(?:\.test_\w+)?\)(.*?) \.\.\. (.*?)(ok|FAIL|ERROR|skipped [^\n]*|expected failure)$", re.M | re.S)

#: What unittest says at the end of each test that failed, up to the next one or the count.
REPORT = re.compile(r"^={70}\n(?:FAIL|ERROR): (test_\w+) \(tests\.([\w.]+?)(?:\.test_\w+)?\).*?\n-{70}\n(.*?)(?=^={70}\n|^-{70}\nRan |\Z)", re.M | re.S)
#: The line of it that names the exception.
RAISED = re.compile(r"^[A-Za-z_][\w.]*(?:: .*)?$", re.M)


def suite() -> pathlib.Path:
    """The folder of the tests of the Debian release that the hosts run."""
    root = build.debian("pyverbs", "with pyverbs and its tests", ["python3-pyverbs"], (), f"--dpkgopt=path-include=/{SUITE.removesuffix('/tests')}*")
    return root / SUITE


def copy(lab, folder: pathlib.Path) -> list:
    """Puts the tests on the host, unpacked: Debian compresses long documentation.

    :returns: the names of the files to run, without those for cards of one maker.
    """
    with tempfile.TemporaryDirectory(prefix="hecaton-pyverbs-") as name:
        stage = pathlib.Path(name) / "tests"
        stage.mkdir()
        for path in folder.iterdir():
            if path.suffix == ".gz":
                (stage / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            elif path.suffix == ".py":
                (stage / path.name).write_bytes(path.read_bytes())
        files = sorted(path.stem for path in stage.glob("test_*.py") if not path.name.startswith(MAKERS))
        image.run(["tar", "-C", name, "-cf", f"{name}/tests.tar", "tests"])
        lab.put(HOST, pathlib.Path(name) / "tests.tar", f"{FOLDER}/tests.tar", before=f"rm -rf {FOLDER} && mkdir -p {FOLDER}")
    lab.ssh(HOST, f"tar -C {FOLDER} -xf {FOLDER}/tests.tar")
    return files


def results(text: str) -> dict:
    """``{"file.Class.test": "ok" | "FAIL: why" | "ERROR: why" | "skipped '...'"}`` from what unittest -v prints."""
    why = {}
    for test, where, report in REPORT.findall(text):
        raised = RAISED.findall(report)
        why[f"{where}.{test}"] = raised[-1] if raised else report.strip().rsplit("\n", 1)[-1]
    found = {}
    for test, where, _doc, _printed, result in LINE.findall(text):
        name = f"{where}.{test}"
        found[name] = f"{result}: {why[name]}" if name in why and result in ("FAIL", "ERROR") else result
    return found


def by_reason(found: dict, known: dict, at_first: dict) -> str:
    """What did not pass, at all or ``at_first``, as a table for docs/rdma.md: a row for each reason."""
    rows: dict = {}
    for name, result in at_first.items():
        rows.setdefault((f"at first fails, then {found[name].split()[0]}", result), []).append(name)
    for name, result in found.items():
        if result.startswith(("FAIL", "ERROR")):
            rows.setdefault(("fails", known.get(name, result)), []).append(name)
        elif result.startswith("skipped"):
            rows.setdefault(("skipped", result.removeprefix("skipped ").strip("'\"")), []).append(name)
    for name in known.keys() - found.keys():
        rows.setdefault(("left out", known[name]), []).append(name)
    lines = ["| tests | how they end | why | which |", "|---|---|---|---|"]
    for (how, reason), names in sorted(rows.items()):
        lines.append(f"| {len(names)} | {how} | {reason.replace('|', '/')} | {', '.join(f'`{name}`' for name in sorted(names))} |")
    return "\n".join(lines) + "\n"


def gid(lab, device: str) -> int:
    """The index of the device's GID that the tests are to use. Left to themselves, they take the first of RoCE, the link-local
    address, which needs a scope that a GID hasn't; and none of iWARP, as the second half of its GID is zero."""
    said = lab.ssh(HOST, f"cd /sys/class/infiniband/{device}/ports/1/gids && grep -l :ffff: * | sort -n | head -n 1").stdout.strip()
    return int(said or 0)


def run_file(lab, device: str, index: int, name: str) -> tuple[dict, str | None, str]:
    """Runs one file of the suite, or one test, with this GID of the device, so that one that hangs or crashes doesn't take the others with it.

    :returns: its results, what is wrong when it did not come to its end, and what it printed.
    """
    # The status says whether a test failed; which one is read from the lines.
    tests = f"python3 tests/run_tests.py --dev {device} --port 1 --gid {index} -v tests.{name}"
    command = f"cd {FOLDER} && ulimit -l unlimited && timeout --kill-after=10 {SECONDS} {tests} 2>&1"
    try:
        done = lab.ssh(HOST, command, check=False, timeout=SECONDS + 120)
    except LabError as err:
        return {}, f"{name}: {err}", ""
    found = results(done.stdout)
    ran = re.search(r"^Ran (\d+) tests?", done.stdout, re.M)
    if not ran:
        return found, f"{name} did not come to its end (status {done.returncode}): {done.stdout[-600:]}", done.stdout
    if len(found) < int(ran.group(1)):
        return found, f"of {name}, {len(found)} results were read, and {ran.group(1)} tests ran", done.stdout
    return found, None, done.stdout


def run_again(lab, device: str, index: int, test: str, log) -> str | None:
    """What a test that failed ends with when it is run again, if it doesn't fail then."""
    for _turn in range(AGAIN):
        found, _problem, said = run_file(lab, device, index, test)
        log.write(f"==== {test}, again\n{said}\n")
        result = found.get(test, "ERROR: it did not come to its end")
        if not result.startswith(("FAIL", "ERROR")):
            return result
    return None


def run(lab, transport: str, files: list) -> list:
    """Runs the suite. :returns: what is wrong with its results, a sentence each."""
    if playbook.run(lab, str(HERE / "device.yml"), OUT, {"rdma_transport": transport, **ready.archives()}):
        raise LabError(f"the role rdma did not set {transport} up")
    device = lab.ssh(HOST, "ls /sys/class/infiniband").stdout.split()
    if len(device) != 1:
        raise LabError(f"{HOST} has not one RDMA device but {device}")
    known = json.loads((HERE / "pyverbs.json").read_text())[transport]
    index, found, at_first, wrong = gid(lab, device[0]), {}, {}, []
    with open(OUT / f"pyverbs-{transport}.log", "w") as log:
        for name in files:
            if name in known:
                continue
            of_file, problem, said = run_file(lab, device[0], index, name)
            log.write(f"==== {name}\n{said}\n")
            log.flush()
            for test, result in of_file.items():
                if result.startswith(("FAIL", "ERROR")) and test not in known:
                    again = run_again(lab, device[0], index, test, log)
                    if again:
                        at_first[test], of_file[test] = result, again
            found.update(of_file)
            if problem:
                wrong.append(f"{transport}: {problem}")
            print(f"pyverbs on {device[0]}: {name}: {counted(of_file)}", flush=True)
            # After each, so that a run that is interrupted has them.
            (OUT / f"pyverbs-{transport}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (OUT / f"pyverbs-{transport}.md").write_text(by_reason(found, known, at_first))
    for test, result in at_first.items():
        print(f"pyverbs on {device[0]}: {test} failed at first ({result}), and ended with {found[test]} when it was run again")
    print(f"pyverbs on {device[0]}: {counted(found)}", flush=True)
    wrong += [f"{transport}: {test} ended with {result}" for test, result in found.items() if result.startswith(("FAIL", "ERROR")) and test not in known]
    return wrong + [f"{transport}: {test} passes; take it off the list" for test in known if found.get(test) == "ok"]


def counted(found: dict) -> str:
    counts = {kind: sum(result.startswith(kind) for result in found.values()) for kind in ("ok", "skipped", "FAIL", "ERROR")}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def main(arguments: list) -> int:
    unknown = set(arguments) - {"siw", "rxe"}
    if unknown:
        sys.exit(__doc__)
    try:
        lab = lab_module.Lab(ROOT / "build" / "lab")
        lab.up()
        files = copy(lab, suite())
        if not files:
            raise LabError(f"Debian's package has no tests in {SUITE}")
        wrong = [sentence for transport in arguments or ["siw", "rxe"] for sentence in run(lab, transport, files)]
    except LabError as err:
        print(f"pyverbs: {err}", file=sys.stderr)
        return 1
    for sentence in wrong:
        print(f"pyverbs: {sentence}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
