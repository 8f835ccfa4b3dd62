# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a host of the lab counts as ready."""

from __future__ import annotations

import subprocess

import pytest


@pytest.fixture
def ready(lab, tmp_path):
    """Whether it is, with those of its units active that are named."""

    def ask(*active):
        systemctl = tmp_path / "systemctl"
        systemctl.write_text(f'#!/bin/sh\nfor unit; do :; done\ncase "$unit" in {"|".join(active)}) exit 0;; *) exit 3;; esac\n')
        systemctl.chmod(0o755)
        # Here need not be a /dev/kvm.
        command = lab.READY.replace("/dev/kvm", "/dev/null")
        return subprocess.run(["/bin/sh", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False).returncode == 0

    return ask


def test_libvirtd_that_nobody_asked_for_two_minutes_has_ended_and_is_there(ready):
    assert ready("libvirtd.socket")


def test_a_host_without_libvirtd_is_not_ready(ready):
    assert not ready("ssh.service")
