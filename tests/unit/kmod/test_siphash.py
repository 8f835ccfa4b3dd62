# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="module")
def siphash():
    path = pathlib.Path(__file__).resolve().parents[2] / "kmod" / "siphash.py"
    spec = importlib.util.spec_from_file_location("hecaton_siphash", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.siphash


@pytest.mark.parametrize(("length", "value"), [(0, 0x726FDB47DD0E0E31), (15, 0xA129CA6149BE45E5), (8, 0x93F5F5799A932462), (63, 0x958A324CEB064572)])
def test_the_vectors_of_its_authors(siphash, length, value):
    assert siphash(bytes(range(16)), bytes(range(length))) == value
