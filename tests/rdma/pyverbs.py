# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs rdma-core's tests of pyverbs on a lab host, against the devices that the role rdma sets up: python3 pyverbs.py [siw] [rxe]

The result of every test is in build/test/pyverbs-<transport>.json. Which may fail, and why, is in pyverbs.json.
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

import build
import image
import lab as lab_module
from image import LabError

HOST = "hv1"
OUT = ROOT / "build" / "test"
FOLDER = "/root/pyverbs"
#: Where Debian keeps the suite; documentation isn't installed otherwise.
SUITE = "usr/share/doc/rdma-core/tests"
SECONDS = 3000  # for the whole suite on an emulated host
#: A line of unittest: the test, its class, and how it ended; what the test printed may stand between.
LINE = re.compile(r"^(test_\w+) \(tests\.([\w.]+?)(?:\.test_\w+)?\)(.*?) \.\.\. (.*?)(ok|FAIL|ERROR|skipped [^\n]*|expected failure)$", re.M | re.S)


def suite() -> pathlib.Path:
    """The folder of the tests of the Debian release that the hosts run."""
    root = build.debian("pyverbs", "with pyverbs and its tests", ["python3-pyverbs"], (), f"--dpkgopt=path-include=/{SUITE}/*")
    return root / SUITE


def copy(lab, folder: pathlib.Path) -> None:
    """Puts the tests on the host, unpacked: Debian compresses long documentation."""
    with tempfile.TemporaryDirectory(prefix="hecaton-pyverbs-") as name:
        stage = pathlib.Path(name) / "tests"
        stage.mkdir()
        for path in folder.iterdir():
            if path.suffix == ".gz":
                (stage / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            elif path.suffix == ".py":
                (stage / path.name).write_bytes(path.read_bytes())
        image.run(["tar", "-C", name, "-cf", f"{name}/tests.tar", "tests"])
        lab.put(HOST, pathlib.Path(name) / "tests.tar", f"{FOLDER}/tests.tar", before=f"rm -rf {FOLDER} && mkdir -p {FOLDER}")
    lab.ssh(HOST, f"tar -C {FOLDER} -xf {FOLDER}/tests.tar")


def results(text: str) -> dict:
    """``{"file.Class.test": "ok" | "FAIL" | "ERROR" | "skipped '...'"}`` from what unittest -v prints."""
    found = {}
    for test, where, _doc, _printed, result in LINE.findall(text):
        found[f"{where}.{test}"] = result
    return found


def run(lab, transport: str) -> list:
    """Runs the suite. :returns: what is wrong with its results, a sentence each."""
    if playbook.run(lab, str(HERE / "device.yml"), OUT, {"rdma_transport": transport}):
        raise LabError(f"the role rdma did not set {transport} up")
    device = lab.ssh(HOST, "ls /sys/class/infiniband").stdout.split()
    if len(device) != 1:
        raise LabError(f"{HOST} has not one RDMA device but {device}")
    # The status says whether a test failed; which one is read from the lines.
    command = f"cd {FOLDER} && ulimit -l unlimited && timeout {SECONDS} python3 tests/run_tests.py --dev {device[0]} -v 2>&1"
    said = lab.ssh(HOST, command, check=False, timeout=SECONDS + 60).stdout
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"pyverbs-{transport}.log").write_text(said)
    found = results(said)
    (OUT / f"pyverbs-{transport}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    ran = re.search(r"^Ran (\d+) tests", said, re.M)
    if not ran or int(ran.group(1)) != len(found):
        raise LabError(f"the suite did not come to its end, or {len(found)} lines were read of {ran and ran.group(1)} tests:\n{said[-1500:]}")
    counts = {kind: sum(result.startswith(kind) for result in found.values()) for kind in ("ok", "skipped", "FAIL", "ERROR")}
    print(f"pyverbs on {device[0]}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}", flush=True)
    known = json.loads((HERE / "pyverbs.json").read_text())[transport]
    wrong = [f"{transport}: {test} ended with {result}" for test, result in found.items() if result in ("FAIL", "ERROR") and test not in known]
    return wrong + [f"{transport}: {test} passes; take it off the list" for test in known if found.get(test) == "ok"]


def main(arguments: list) -> int:
    unknown = set(arguments) - {"siw", "rxe"}
    if unknown:
        sys.exit(__doc__)
    try:
        lab = lab_module.Lab(ROOT / "build" / "lab")
        lab.up()
        copy(lab, suite())
        wrong = [sentence for transport in arguments or ["siw", "rxe"] for sentence in run(lab, transport)]
    except LabError as err:
        print(f"pyverbs: {err}", file=sys.stderr)
        return 1
    for sentence in wrong:
        print(f"pyverbs: {sentence}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
