# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The cache of the lab's images repairs itself."""

from __future__ import annotations

import pathlib
import sys

import pytest

TESTS = next(folder for folder in pathlib.Path(__file__).resolve().parents if folder.name == "tests")


@pytest.fixture
def image(monkeypatch, tmp_path):
    monkeypatch.setenv("HECATON_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(TESTS / "lab"))
    import image as module

    yield module
    sys.modules.pop("image", None)


def build(folder):
    (folder / "root.raw").write_text("whole")


def test_what_an_interrupted_build_left_is_swept(image, tmp_path):
    stale = tmp_path / "host-0123.abcd.tmp"
    (stale / "root" / "proc").mkdir(parents=True)
    other = tmp_path / "valkey-0123.abcd.tmp"
    other.mkdir()
    folder = image.entry("host", "0123", build)
    assert (folder / "root.raw").read_text() == "whole"
    assert not stale.exists()
    assert other.exists(), "another kind may be being built right now"


def test_a_build_that_fails_leaves_nothing(image, tmp_path):
    def broken(folder):
        build(folder)
        raise image.LabError("no")

    with pytest.raises(image.LabError):
        image.entry("host", "0123", broken)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_damaged_image_is_built_again(image):
    folder = image.entry("host", "0123", build)
    (folder / "root.raw").write_text("half")
    assert (image.entry("host", "0123", build) / "root.raw").read_text() == "whole"
