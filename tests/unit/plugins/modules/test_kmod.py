# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module kmod on a made-up sysfs, with tools that only play: real ones are used in the lab's scenario ``rdma``."""

from __future__ import annotations

import os

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod_host
from ansible_collections.hecaton.fleet.plugins.modules import kmod

RELEASE = os.uname().release

# What the tools do: loading makes a folder in sysfs with the parameters that were given, unloading removes it.
TOOLS = {
    "modprobe": """
case $1 in
--dump-modversions) printf '0x01\\tkfree\\n'; exit 0 ;;
-r) rm -rf "$SYSFS/$2"; echo "modprobe: FATAL: Module rdma_cm is in use." >&2; exit 1 ;;
esac
test ! -e "$PLAY/refused" || { cat "$PLAY/refused" >&2; exit 1; }
mkdir -p "$SYSFS/$1/parameters" "$SYSFS/$1/holders"; echo live > "$SYSFS/$1/initstate"; echo 0 > "$SYSFS/$1/refcnt"
name=$1; shift
for word in window=32 "$@"; do echo "${word#*=}" > "$SYSFS/$name/parameters/${word%%=*}"; done
chmod 444 "$SYSFS/$name/parameters"/*
echo load >> "$PLAY/log"
""",
    "rmmod": """
rm -rf "$SYSFS/$1"
""",
    "modinfo": """
case "$*" in
*"-F filename example"*) echo "$PLAY/lib/$RELEASE/kernel/example.ko" ;;
*"-F parm"*) echo "window:size (int)"; echo "secret:not shown (int)" ;;
*"-F vermagic"*) echo "$RELEASE SMP" ;;
*"-F filename"*) exit 1 ;;
esac
""",
    "dmesg": "echo example: nothing",
}


class Ended(Exception):
    def __init__(self, result):
        super().__init__(result.get("msg"))
        self.result = result


@pytest.fixture
def host(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, text in TOOLS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "lib" / RELEASE / "kernel").mkdir(parents=True)
    (tmp_path / "lib" / RELEASE / "kernel" / "example.ko").write_bytes(b"\x7fELF")
    (tmp_path / "sys").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SYSFS", str(tmp_path / "sys"))
    monkeypatch.setenv("PLAY", str(tmp_path))
    monkeypatch.setenv("RELEASE", RELEASE)
    monkeypatch.setattr(_kmod_host, "SYSFS", str(tmp_path / "sys"))
    monkeypatch.setattr(_kmod_host, "MODULES", str(tmp_path / "lib"))
    monkeypatch.setattr(kmod, "LOAD_DIR", str(tmp_path / "load.d"))
    monkeypatch.setattr(kmod, "OPTIONS_DIR", str(tmp_path / "modprobe.d"))
    return tmp_path


@pytest.fixture
def run(host, monkeypatch):
    warnings = []

    def end(failed):
        def ended(self, **result):
            raise Ended(dict(result, failed=failed, warnings=list(warnings)))

        return ended

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", end(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", end(True))
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda self, text: warnings.append(text))

    def runner(**args):
        warnings.clear()
        with patch_module_args({"name": "example", **args}), pytest.raises(Ended) as ended:
            kmod.main()
        return ended.value.result

    return runner


def loads(host):
    log = host / "log"
    return log.read_text().count("load") if log.exists() else 0


def test_it_is_loaded_once_and_again_at_the_next_start(run, host):
    result = run(parameters={"window": 64})
    assert result["changed"] and result["loaded"] and result["parameters"] == {"window": "64"}
    assert (host / "load.d" / "hecaton-example.conf").read_text().endswith("\nexample\n")
    assert (host / "modprobe.d" / "hecaton-example.conf").read_text().endswith("options example window=64\n")
    assert not run(parameters={"window": 64})["changed"]
    assert loads(host) == 1


def test_check_mode_and_diff(run, host):
    result = run(parameters={"window": 64}, _ansible_check_mode=True)
    assert result["changed"] and not (host / "sys" / "example").exists() and not (host / "load.d").exists()
    assert result["diff"]["before"] == "example not loaded\n"
    assert "example loaded\nwindow=64\n" in result["diff"]["after"]


def test_another_parameter_loads_it_again_when_nothing_uses_it(run, host):
    run(parameters={"window": 64})
    result = run(parameters={"window": 65})
    assert result["actions"][:2] == ["unload example", "load example"]
    assert result["parameters"]["window"] == "65"


def test_in_use_it_is_not_loaded_again(run, host):
    run(parameters={"window": 64})
    (host / "sys" / "example" / "refcnt").write_text("3\n")
    (host / "sys" / "example" / "holders" / "other").mkdir()
    result = run(parameters={"window": 65})
    assert result["failed"] and "in use 3 times (by other)" in result["msg"]
    assert "window is 64 and should be 65" in result["msg"]
    kept = run(parameters={"window": 65}, in_use="keep")
    assert not kept["failed"] and kept["reload_pending"] and kept["parameters"]["window"] == "64"
    assert kept["warnings"]
    # From the next start on it has it.
    assert "window=65" in (host / "modprobe.d" / "hecaton-example.conf").read_text()
    assert loads(host) == 1


def test_one_that_is_not_to_be_loaded_again_stays(run, host):
    """The kernel doesn't count what uses the devices of a driver, and takes them along with it."""
    run(parameters={"window": 64})
    kept = run(parameters={"window": 65}, reload=False)
    assert not kept["failed"] and kept["reload_pending"] and kept["parameters"]["window"] == "64" and loads(host) == 1
    assert any("asked not to be loaded again" in warning for warning in kept["warnings"])


def test_a_parameter_that_can_be_written_is_written(run, host):
    run(parameters={"window": 64})
    (host / "sys" / "example" / "parameters" / "window").chmod(0o644)
    (host / "sys" / "example" / "refcnt").write_text("3\n")
    result = run(parameters={"window": 65})
    assert result["actions"][0] == "set window to 65" and loads(host) == 1
    assert (host / "sys" / "example" / "parameters" / "window").read_text() == "65"


def test_another_build_is_loaded_when_nothing_uses_the_one_before(run, host):
    note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"
    run()
    (host / "sys" / "example" / "notes").mkdir()
    (host / "sys" / "example" / "notes" / ".note.gnu.build-id").write_bytes(note + b"1" * 20)
    (host / "lib" / RELEASE / "kernel" / "example.ko").write_bytes(b"\x7fELF" + note + b"1" * 20)
    assert not run()["changed"]
    (host / "lib" / RELEASE / "kernel" / "example.ko").write_bytes(b"\x7fELF" + note + b"2" * 20)
    assert run()["actions"] == ["unload example", "load example"]


@pytest.mark.parametrize("before", [False, True])
def test_a_parameter_that_it_does_not_have_is_refused(run, host, before):
    if before:
        run()
    result = run(parameters={"windwo": 1})
    assert result["failed"] and "no parameter windwo; it has window, secret" in result["msg"]
    assert loads(host) == int(before)


def test_absent_removes_all_of_it_and_refuses_while_it_is_used(run, host):
    run(parameters={"window": 64})
    (host / "sys" / "example" / "refcnt").write_text("1\n")
    assert "in use" in run(state="absent")["msg"]
    assert (host / "load.d" / "hecaton-example.conf").exists()
    (host / "sys" / "example" / "refcnt").write_text("0\n")
    assert run(state="absent")["changed"]
    assert not (host / "sys" / "example").exists() and not list((host / "load.d").iterdir()) and not list((host / "modprobe.d").iterdir())
    assert not run(state="absent")["changed"]


def test_a_module_that_is_not_there_says_how_to_get_it(run, host):
    result = run(name="nowhere")
    assert result["failed"] and "kmod_build" in result["msg"] and RELEASE in result["msg"]


def test_what_the_kernel_refuses_leaves_no_file_behind(run, host):
    (host / "refused").write_text("modprobe: ERROR: could not insert 'example': Key was rejected by service\n")
    result = run()
    assert result["failed"] and "mokutil" in result["msg"]
    assert not (host / "load.d").exists()
