# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the natively built module on all hosts of the lab that run: python3 install.py [siw | rxe]

What an operator does with the playbook prepare, in seconds instead of minutes of emulated compiling.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import build
import hosts
from image import LabError


def main(arguments: list) -> int:
    transport = arguments[0] if arguments else "siw"
    lab = hosts.lab_module.Lab(hosts.lab_module.REPO / "build" / "lab")
    folder = build.built()

    def install(name):
        host = hosts.Host(lab, name)
        host.install(folder, transport)
        host.disconnect()

    try:
        hosts.lab_module.each(install, [name for name in hosts.lab_module.HOSTS if lab.running(name)])
    except LabError as err:
        print(f"install: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
