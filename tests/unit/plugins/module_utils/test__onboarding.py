# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM's definition with its memory on remote_ram: the same RAM block, in another place."""

from __future__ import annotations

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils._migrate_remote_ram import onboarded
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import MigrationError

MEMORY = [{"id": "pc.ram", "size": 134217728, "share": False}]
BACKEND = "-object memory-backend-file,id=pc.ram,mem-path=/run/remote_ram/web1.ram,share=on,prealloc=off,size=134217728"


def test_the_block_keeps_its_name_and_size():
    config, block = onboarded('QEMU_ARGS="-machine pc,accel=kvm -m 128"\n', "web1", MEMORY)
    assert config == f'QEMU_ARGS="-machine pc,accel=kvm,memory-backend=pc.ram -m 128 {BACKEND}"\n'
    assert block == {"id": "pc.ram", "path": "/run/remote_ram/web1.ram", "size": 134217728}


def test_other_lines_stay_and_a_short_option_is_known():
    config, _block = onboarded('# web1\nQEMU_ARGS="-M q35"\nOTHER=1\n', "web1", MEMORY)
    assert config == f'# web1\nQEMU_ARGS="-M q35,memory-backend=pc.ram {BACKEND}"\nOTHER=1\n'


def test_a_machine_that_is_not_named_gets_its_backend_too():
    config, _block = onboarded('QEMU_ARGS="-m 128"\n', "web1", MEMORY)
    assert config == f'QEMU_ARGS="-m 128 -machine memory-backend=pc.ram {BACKEND}"\n'


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_arguments_are_quoted_as_systemd_takes_them(quote):
    config, _block = onboarded(f"QEMU_ARGS={quote}-M q35 -m 128{quote}\n", "web1", MEMORY)
    assert config == f"QEMU_ARGS={quote}-M q35,memory-backend=pc.ram -m 128 {BACKEND}{quote}\n"


@pytest.mark.parametrize(
    ("config", "memory", "says"),
    [
        ('QEMU_ARGS="-numa node"\n', MEMORY, "change it by hand"),
        ('QEMU_ARGS="-mem-path /dev/shm -m 1"\n', MEMORY, "change it by hand"),
        ('QEMU_ARGS="-machine pc,memory-backend=m"\n', MEMORY, "change it by hand"),
        ("OTHER=1\n", MEMORY, "no single line QEMU_ARGS"),
        ('QEMU_ARGS="-machine pc \\\n -m 128"\n', MEMORY, "no single line QEMU_ARGS"),
        ("QEMU_ARGS=-machine pc \\\n -m 128\n", MEMORY, "no single line QEMU_ARGS"),
        ('QEMU_ARGS="-m 128"\n', MEMORY * 2, "2 memory backends"),
        ('QEMU_ARGS="-m 128"\n', [{**MEMORY[0], "share": True}], "only a VM with one block"),
    ],
)
def test_what_can_not_be_onboarded_says_why(config, memory, says):
    with pytest.raises(MigrationError, match=says):
        onboarded(config, "web1", memory)
