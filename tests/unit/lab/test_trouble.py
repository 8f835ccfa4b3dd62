# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host whose kernel warned or oopsed while it booted is not taken for one that tests can stand on."""

from __future__ import annotations

import subprocess

import pytest


@pytest.fixture
def check(lab, monkeypatch, tmp_path):
    """Looks at a host's kernel that is tainted so and has said that."""

    def look(tainted, log):
        def ssh(self, name, *command, **_kwargs):
            # The command itself is run, on a log that is a file here.
            here = command[0].replace("/proc/sys/kernel/tainted", str(tmp_path / "tainted")).replace("dmesg", f"cat {tmp_path / 'log'}")
            return subprocess.run(["/bin/sh", "-c", here], capture_output=True, text=True, check=False)

        (tmp_path / "tainted").write_text(f"{tainted}\n")
        (tmp_path / "log").write_text(log)
        monkeypatch.setattr(lab.Lab, "ssh", ssh)
        lab.Lab(tmp_path / "lab")._check_kernel("hv1")

    return look, lab.LabError


@pytest.mark.parametrize("bit", (5, 7, 9))
def test_a_bad_page_an_oops_and_a_warning_are_told_with_what_the_kernel_said(check, bit):
    look, error = check
    with pytest.raises(error, match=r"hv1's kernel is in trouble(.|\n)*Oops: invalid opcode(.|\n)*RIP: 0010:aes"):
        look(1 << bit, "[ 1.0] all well\n[ 86.2] Oops: invalid opcode: 0000 [#1] PREEMPT SMP\n[ 86.3] RIP: 0010:aes_gcm_precompute_aesni+0x6a/0x100\n")


def test_a_module_from_elsewhere_is_no_trouble(check):
    look, _error = check
    look(1 << 12 | 1 << 13, "[ 1.0] module verification failed\n")
