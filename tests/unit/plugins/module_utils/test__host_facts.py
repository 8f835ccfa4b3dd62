# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _host_facts

MOUNTS = """\
/dev/vda1 / ext4 rw 0 0
filer:/a /mnt/with\\040space nfs rw 0 0
filer:/b /srv nfs4 rw 0 0
/dev/vdb /srv/local xfs rw 0 0
/dev/vdc /twice ext4 rw 0 0
filer:/c /twice nfs rw 0 0
short line
"""


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/a", "ext4", False),
        ("/mnt/with space/x", "nfs", True),
        ("/srv/x", "nfs4", True),
        ("/srv", "nfs4", True),
        ("/srvx", "ext4", False),
        ("/srv/local/x", "xfs", False),
        ("/srv/../a", "ext4", False),
        ("/twice/x", "nfs", True),
        ("relative", None, False),
    ],
)
def test_which_files_are_shared(path, kind, shared):
    storage = _host_facts.Storage(MOUNTS)
    assert (storage.file_system(path), storage.is_shared(path)) == (kind, shared)


def test_links_are_followed():
    storage = _host_facts.Storage(MOUNTS, ["/real"], lambda path: path.replace("/link", "/srv").replace("/alias", "/real"))
    assert storage.is_shared("/link/x") and storage.declared("/alias/x") and not storage.declared("/link/x")


def test_memory():
    text = "MemTotal:        3993600 kB\nMemFree:          100000 kB\nMemAvailable:    2764800 kB\n"
    assert _host_facts.parse_meminfo(text) == {"memory_total_mib": 3900, "memory_available_mib": 2700}


def test_cpu():
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: sse avx aes\n\nprocessor\t: 1\nflags\t\t: other\n"
    assert _host_facts.parse_cpuinfo(text, "x86_64") == {
        "vendor": "AuthenticAMD",
        "model": "AMD EPYC",
        "arch": "x86_64",
        "features": ["aes", "avx", "sse"],
    }
    assert _host_facts.parse_cpuinfo("Features\t: fp asimd\n", "aarch64")["features"] == ["asimd", "fp"]


def test_machines_and_versions():
    text = "Supported machines are:\n"
    text += "q35                  Standard PC (alias of pc-q35-10.0)\npc-q35-10.0          Standard PC\nnone                 empty machine\n"
    assert _host_facts.parse_machines(text) == ["pc-q35-10.0", "q35"]
    assert _host_facts.parse_qemu_version("QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)\n") == "10.0.13"
    assert _host_facts.parse_qemu_version("nonsense") is None
    assert _host_facts.version_text(11003000) == "11.3.0"


@pytest.mark.parametrize(
    ("drivers", "unprivileged", "device", "version", "code"),
    [
        (["qmp"], "0\n", False, None, None),
        (["qmp"], None, False, None, "userfaultfd_missing"),
        (["libvirt"], "1\n", False, "9.0.0", None),
        (["libvirt"], "0\n", True, "11.3.0", None),
        (["libvirt", "qmp"], "0\n", True, "9.0.0", "userfaultfd_forbidden"),
        (["libvirt"], "0\n", False, "11.3.0", "userfaultfd_forbidden"),
        (["libvirt"], None, True, "11.3.0", "userfaultfd_missing"),
    ],
)
def test_post_copy_needs_userfaultfd_on_the_destination(drivers, unprivileged, device, version, code):
    engines = _host_facts.engines(drivers, unprivileged, device, version)
    assert [blocker["code"] for blocker in engines["userfault"]["blockers"]] == ([code] if code else [])
    assert engines["userfault"]["usable"] is (code is None)
    assert engines["precopy"]["usable"] is True


@pytest.mark.parametrize(
    ("mounts", "devices", "codes"),
    [
        ("none /run/remote_ram remote_ram rw 0 0\n", ["siw0"], []),
        ("tmpfs /run/remote_ram tmpfs rw 0 0\n", ["siw0"], ["remote_ram_missing"]),
        ("none /run/remote_ram remote_ram rw 0 0\n", [], ["rdma_missing"]),
        ("", None, ["remote_ram_missing", "rdma_missing"]),
    ],
)
def test_remote_ram_needs_its_file_system_and_a_device(mounts, devices, codes):
    engine = _host_facts.engines(["qmp"], "1", True, None, mounts, devices)["remote_ram"]
    assert [blocker["code"] for blocker in engine["blockers"]] == codes
    assert engine["usable"] is not bool(codes)
