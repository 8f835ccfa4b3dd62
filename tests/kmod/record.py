# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Records which pages a guest touches after a switch, for kmod-src/tests/order_sim: python3 record.py PATTERN SECONDS FILE

Moves a guest between two hosts of the lab without pre-copy and fetches nothing but what it waits for, so that each first touch
is a fault. The time that it waited is taken out. PATTERN is seq, random or hot; FILE is compressed.
"""

from __future__ import annotations

import gzip
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import kvm_guest

import build
import hosts as tools
from hosts import BACKGROUND, TRACING, wait_for

EVENT = re.compile(r" (\d+\.\d+): (rram_fault|rram_fault_done): ino=\d+ page=(\d+)")


def touches(text: str) -> list:
    """(microseconds, page) of each first touch, of what the kernel's trace says."""
    waiting, seen, found = set(), set(), []
    begin = late = since = None
    for at, event, page in EVENT.findall(text):
        now, page = float(at), int(page)
        if begin is None:
            begin, late = now, 0.0
        if event == "rram_fault":
            if page not in seen:
                seen.add(page)
                waited = now - since if waiting else 0.0
                found.append((round((now - begin - late - waited) * 1e6), page))
            if not waiting:
                since = now
            waiting.add(page)
        elif page in waiting:
            waiting.discard(page)
            if not waiting:
                late += now - since
    return found


def main(pattern: str, seconds: str, target: str) -> int:
    lab = tools.lab_module.Lab(tools.lab_module.REPO / "build" / "lab")
    folder, pair = build.built(), [tools.Host(lab, name) for name in tools.NAMES]
    tools.lab_module.each(lambda host: host.install(folder, "siw"), pair)
    for host in pair:
        kvm_guest.put_initramfs(host)
    file = tools.File(pair, "record.ram", kvm_guest.MIB).create()
    guests = []
    try:
        words = f"dirty.mib=64 dirty.rate=64 dirty.pattern={pattern} dirty.hot_mib=8 dirty.report=1"
        guests.append(kvm_guest.Guest(file.source, file, words=words))
        wait_for(lambda: '"started"' in file.source.sh(f"cat {guests[0].log}"), 240)
        time.sleep(5)
        file.attach()
        file.dst("tune", what=BACKGROUND, value=0)
        guests.append(kvm_guest.Guest(file.dest, file, incoming=kvm_guest.ARRIVES, words=words))
        file.dest.sh(f"cd {TRACING} && echo 16384 > buffer_size_kb && echo > trace && for e in fault fault_done; do "
                     "echo 1 > events/remote_ram/rram_$e/enable; done; echo 1 > tracing_on")  # fmt: skip
        kvm_guest.move(file, guests[0], guests[1], 0)
        time.sleep(float(seconds))
        found = touches(file.dest.sh(f"echo 0 > {TRACING}/tracing_on; cat {TRACING}/trace"))
        with gzip.GzipFile(target, "wb", mtime=0) as stream:
            stream.write(f"# tiny guest, {words}\npages {file.pages}\nm 0 {file.pages} 0\n".encode())
            stream.writelines(f"t {us} {page}\n".encode() for us, page in found)
        print(f"{target}: {len(found)} of {file.pages} pages in {found[-1][0] / 1e6:.2f} s")
        file.dst("tune", what=BACKGROUND, value=1)
        file.complete()
    finally:
        for guest in guests:
            guest.kill()
        for host in pair:
            host.sh(f"for e in fault fault_done; do echo 0 > {TRACING}/events/remote_ram/rram_$e/enable; done", check=False)
            wait_for(lambda h=host: h.sh("pgrep -c qemu-system || true").strip() == "0", 60)
            host.do("clean")
            host.disconnect()
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
