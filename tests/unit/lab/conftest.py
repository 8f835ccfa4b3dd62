# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's own modules, for tests that ask them without hosts."""

from __future__ import annotations

import pathlib
import sys

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")


@pytest.fixture
def lab(monkeypatch):
    """The module ``lab`` of the folder tests/lab; nothing of it stays imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(TESTS / "lab"))
    import lab

    yield lab
    for name in ("lab", "image", "interrupts", "devenv", "needs"):
        sys.modules.pop(name, None)
