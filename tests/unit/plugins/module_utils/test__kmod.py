# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import subprocess

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod

VERMAGIC = "6.12.117+deb13-amd64 SMP preempt mod_unload modversions "


@pytest.mark.parametrize("path", [
    "siw.o", "a/siw.ko", ".siw.o.cmd", "siw.mod.c", "Module.symvers", "modules.order", ".git/config", ".tmp_versions/x", "siw.c~",
])  # fmt: skip
def test_what_a_build_leaves_behind_is_no_source(path):
    assert not _kmod.is_source(path)


def test_source_files_and_what_is_excluded():
    assert _kmod.is_source("src/main.c")
    assert _kmod.is_source("include/uapi/remote_ram.h")
    assert not _kmod.is_source("tests/order.c", ["tests"])
    assert not _kmod.is_source("src/tests/order.c", ["tests/"])
    assert not _kmod.is_source("src/notes.md", ["*.md"])
    assert not _kmod.is_source("src/a.c", ["src/a.c"])
    assert _kmod.is_source("a.c", ["src/a.c"])


def test_the_hash_follows_names_contents_modes_and_recipe():
    files = {"Kbuild": (False, b"obj-m := a.o\n"), "a.c": (False, b"int a;\n")}
    base = _kmod.source_hash(files, {"make_args": []})
    assert base == _kmod.source_hash(dict(reversed(files.items())), {"make_args": []})
    others = [
        _kmod.source_hash({**files, "a.c": (False, b"int b;\n")}, {"make_args": []}),
        _kmod.source_hash({**files, "a.c": (True, b"int a;\n")}, {"make_args": []}),
        _kmod.source_hash({"Kbuild": files["Kbuild"], "b.c": files["a.c"]}, {"make_args": []}),
        _kmod.source_hash(files, {"make_args": ["A=m"]}),
    ]
    assert len({base, *others}) == 5


def test_a_sources_own_dkms_conf_keeps_all_but_its_identity():
    given = 'PACKAGE_NAME="x"\nPACKAGE_VERSION="1.0"\nBUILT_MODULE_NAME[0]="x"\nBUILD_EXCLUSIVE_KERNEL="^6\\."\n'
    conf = _kmod.dkms_conf(given, "x", "1.0.habc", ["x"], [], None)
    assert _kmod.dkms_setting(conf, "PACKAGE_VERSION") == "1.0.habc"
    assert conf.count("PACKAGE_VERSION=") == 1
    assert _kmod.dkms_setting(conf, "BUILD_EXCLUSIVE_KERNEL") == "^6\\."
    assert 'BUILT_MODULE_NAME[0]="x"' in conf


def test_a_dkms_conf_that_is_made_here_is_one_for_the_shell():
    conf = _kmod.dkms_conf(None, "siw", "6.12.h1", ["siw", "other"], ["CONFIG_RDMA_SIW=m", "CC=gcc -O1"], "^6[.]12[.]")
    script = conf + 'echo "$PACKAGE_NAME $PACKAGE_VERSION ${BUILT_MODULE_NAME[1]} ${BUILD_EXCLUSIVE_KERNEL}"; eval "printf \'<%s>\' ${MAKE[0]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"kernel_source_dir": "/k", "dkms_tree": "/d"})
    assert done.stdout == "siw 6.12.h1 other ^6[.]12[.]\n<make><-C></k><M=/d/siw/6.12.h1/build><CONFIG_RDMA_SIW=m><CC=gcc -O1><modules>"


def test_dkms_status_of_old_and_new_releases():
    text = (
        "siw/6.12.h0123, 6.12.117+deb13-amd64, x86_64: installed (WARNING! Diff between built and installed module!)\n"
        "siw/6.12.h4567: added\n"
        "nvidia-current, 535.1, 6.1.0-18-amd64, x86_64: built\n"
        "Deprecated feature: CLEAN\n"
    )
    assert _kmod.parse_dkms_status(text) == [
        {"name": "siw", "version": "6.12.h0123", "kernel": "6.12.117+deb13-amd64", "state": "installed",
         "note": "WARNING! Diff between built and installed module!"},
        {"name": "siw", "version": "6.12.h4567", "kernel": None, "state": "added", "note": None},
        {"name": "nvidia-current", "version": "535.1", "kernel": "6.1.0-18-amd64", "state": "built", "note": None},
    ]


def test_symbol_versions_as_the_tools_print_them():
    assert _kmod.parse_versions("0x037a0cba\tkfree\n0x00053730\tpcpu_hot\nmodprobe: ERROR: no\n") == {"kfree": 0x37A0CBA, "pcpu_hot": 0x53730}
    symvers = "0x037a0cba\tkfree\tvmlinux\tEXPORT_SYMBOL\t\n0x22f3cf93\tib_pack\tdrivers/infiniband/core/ib_core\tEXPORT_SYMBOL\t\n"
    assert _kmod.parse_symvers(symvers) == {"kfree": 0x37A0CBA, "ib_pack": 0x22F3CF93}


def test_a_module_that_fits():
    assert _kmod.misfits("siw", VERMAGIC, VERMAGIC.strip(), {"kfree": 1}, {"kfree": 1, "ib_pack": 2}, {"kfree": 1}) == []


def test_a_module_for_another_kernel_is_refused():
    (problem,) = _kmod.misfits("siw", "6.12.94+deb13-amd64 SMP preempt mod_unload modversions ", VERMAGIC, {"kfree": 1}, {"kfree": 1}, {})
    assert "6.12.94" in problem and "6.12.117" in problem


def test_a_symbol_that_another_package_replaced_is_refused_although_the_headers_agree():
    (problem,) = _kmod.misfits("siw", VERMAGIC, VERMAGIC, {"ib_pack": 2}, {"ib_pack": 2}, {"ib_pack": 7})
    assert "ib_pack" in problem and "0x00000002" in problem and "0x00000007" in problem and "installed modules" in problem


def test_a_stale_build_is_refused():
    problems = _kmod.misfits("siw", VERMAGIC, VERMAGIC, {f"s{n}": 1 for n in range(8)}, {f"s{n}": 2 for n in range(8)}, {})
    assert len(problems) == 1 and "3 more" in problems[0]


def test_symbols_that_the_kernel_does_not_have_and_a_module_without_versions():
    (problem,) = _kmod.misfits("siw", VERMAGIC, VERMAGIC, {"gone": 1, "kfree": 1}, {"kfree": 1}, {})
    assert "gone" in problem
    (problem,) = _kmod.misfits("siw", VERMAGIC, VERMAGIC, {}, {"kfree": 1}, {})
    assert "no symbol versions" in problem
    # A symbol of another module that was built on the host: not in the headers, and there all the same.
    assert _kmod.misfits("mine", VERMAGIC, VERMAGIC, {"theirs": 4}, {"kfree": 1}, {"theirs": 4}) == []


def test_a_kernel_without_symbol_versions_is_compared_by_vermagic_only():
    plain = "6.12.1 SMP mod_unload "
    assert _kmod.misfits("siw", plain, plain, {}, {"kfree": 0}, {}) == []


def test_the_build_id():
    note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0" + bytes(range(20))
    assert _kmod.build_id(b"\x7fELF" + b"x" * 33 + note + b"rest") == bytes(range(20)).hex()
    assert _kmod.build_id(b"\x7fELF") is None


@pytest.mark.parametrize(("given", "shown", "same"), [
    (True, "Y", True), ("yes", "1", True), (False, "N", True), (16, "0x10", True), ("0x10", "16", True), ("a,b", "a,b", True), (1, "N", False),
    (64, "65", False), ("a", "b", False), (" x ", "x\n", True),
])  # fmt: skip
def test_parameters_are_compared_as_the_kernel_means_them(given, shown, same):
    assert _kmod.same_value(given, shown) is same


def test_files_for_the_next_start():
    assert _kmod.options_file("x", {}) is None
    assert _kmod.options_file("x", {"b": True, "a": [1, 2]}).splitlines()[-1] == "options x a=1,2 b=1"
    assert _kmod.load_file("x").splitlines()[-1] == "x"


@pytest.mark.parametrize("parameters", [{"a b": 1}, {"a": "1 b=2"}, {"a": "1\ninstall x rm"}, {"a": '"'}, {"a": "#"}])
def test_a_parameter_that_would_be_more_than_one_word_is_refused(parameters):
    assert _kmod.bad_parameters(parameters)


def test_ordinary_parameters_are_not():
    assert _kmod.bad_parameters({"depth": 16, "names": ["a", "b"], "path": "/run/x"}) is None


def test_secure_boot_is_named_with_what_to_do():
    text = _kmod.refusal("siw", "/m/siw.ko", "modprobe: ERROR: could not insert 'siw': Key was rejected by service", "", True, "me")
    assert all(word in text for word in ("Secure Boot", "signed by 'me'", "mokutil --import", "sign_key"))
    text = _kmod.refusal("siw", "/m/siw.ko", "could not insert: Operation not permitted", "Lockdown: unsigned module loading is restricted", True, None)
    assert "not signed" in text and "Secure Boot" in text


def test_another_refusal_shows_what_the_kernel_said():
    text = _kmod.refusal("siw", "/m/siw.ko", "Invalid argument", "usb: hello\nsiw: Unknown symbol x (err -2)", False, None)
    assert "Unknown symbol x" in text and "usb" not in text and "Secure Boot" not in text


def test_the_end_of_a_log():
    assert _kmod.tail("a\nb\nc\n\n", 2) == "b\nc"
