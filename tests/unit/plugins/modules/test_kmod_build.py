# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module kmod_build with Kbuild, on a made-up /lib/modules, with tools that only play: real ones are used in the lab."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.action.kmod_build import pack
from ansible_collections.hecaton.fleet.plugins.module_utils import _kmod_archive, _kmod_build, _kmod_host
from ansible_collections.hecaton.fleet.plugins.modules import kmod_build

KERNEL = "6.12.1-test"

# The compiler makes a module of the text of its source; the source says what its symbols are.
TOOLS = {
    "make": """
for word; do case $word in M=*) cd "${word#M=}" ;; esac; done
echo "  CC [M]  example.o"
if grep -q broken example.c; then echo "example.c:1: error: broken" >&2; exit 2; fi
cp example.c example.ko; if test -e user.c; then cp user.c user.ko; fi; echo build >> "$PLAY/log"
""",
    "strip": "exit 0",
    "depmod": "exit 0",
    "modinfo": """
test "$2" != filename || exit 1
case "$2" in vermagic) grep -q other "$3" && echo "6.12.0-other SMP modversions" || echo "6.12.1-test SMP modversions" ;; esac
""",
    "modprobe": """
case "$1 $2" in
"--show-exports "*/example.ko) printf '0x09\\texample_symbol\\n'; exit 0 ;;
"--dump-modversions "*/user.ko) printf '0x09\\texample_symbol\\n' ;;
esac
case "$2" in */updates/*|*/example.ko) grep -q stale "$2" && printf '0x02\\tkfree\\n' || printf '0x01\\tkfree\\n' ;; *) printf '0x01\\tkfree\\n' ;; esac
""",
}


class Ended(Exception):
    def __init__(self, result):
        super().__init__(result.get("msg"))
        self.result = result


@pytest.fixture
def host(tmp_path, monkeypatch):
    for name, text in TOOLS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)
    headers = tmp_path / "lib" / KERNEL / "build"
    headers.mkdir(parents=True)
    (headers / "Makefile").touch()
    (headers / "Module.symvers").write_text("0x00000001\tkfree\tvmlinux\tEXPORT_SYMBOL\t\n")
    (tmp_path / "lib" / KERNEL / "modules.dep").write_text("kernel/fs/ext4.ko:\n")
    (tmp_path / "lib" / KERNEL / "modules.order").touch()
    source = tmp_path / "source"
    source.mkdir()
    (source / "Kbuild").write_text("obj-m := example.o\n")
    (source / "example.c").write_text("one\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PLAY", str(tmp_path))
    for module in (_kmod_host, _kmod_build):
        monkeypatch.setattr(module, "MODULES", str(tmp_path / "lib"))
    monkeypatch.setattr(_kmod_host, "SYSFS", str(tmp_path / "sys"))
    monkeypatch.setattr(kmod_build, "RECORDS", str(tmp_path / "records"))
    # These machines may have DKMS or not; what it does is tested with the real one.
    monkeypatch.setattr(kmod_build.KmodBuild, "has_dkms", staticmethod(lambda: False))
    return tmp_path


@pytest.fixture
def run(host, monkeypatch):
    def end(failed):
        def ended(self, **result):
            raise Ended(dict(result, failed=failed))

        return ended

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", end(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", end(True))

    def runner(**args):
        given = {"name": "example", "kernel": KERNEL, "src": str(host / "source"), **args}
        with patch_module_args(given), pytest.raises(Ended) as ended:
            kmod_build.main()
        return ended.value.result

    return runner


def builds(host):
    log = host / "log"
    return log.read_text().count("build") if log.exists() else 0


def test_it_builds_once_for_a_source(run, host):
    first = run()
    assert first["changed"] and first["method"] == "kbuild"
    (module,) = first["modules"]
    assert (module["symbols"], module["confirmed"]) == (1, 0)
    assert open(module["path"]).read() == "one\n"
    again = run()
    assert not again["changed"] and again["modules"] == first["modules"] and builds(host) == 1
    (host / "source" / "example.o").touch()  # what a build leaves behind is no change
    assert not run()["changed"]


@pytest.mark.parametrize("what", ["source", "arguments", "installed", "record"])
def test_it_builds_again_when_something_is_another(run, host, what):
    path = run()["modules"][0]["path"]
    if what == "source":
        (host / "source" / "example.c").write_text("two\n")
    elif what == "installed":
        open(path, "w").write("somebody else's\n")
    elif what == "record":
        (host / "records" / "example.json").write_text("{")
    result = run(make_args=["A=m"] if what == "arguments" else [])
    assert result["changed"] and builds(host) == 2
    assert not run(make_args=["A=m"] if what == "arguments" else [])["changed"]


def test_modules_of_one_source_may_need_each_other(run, host):
    (host / "source" / "user.c").write_text("uses example\n")
    result = run(modules=["example", "user"])
    assert result["changed"] and [module["name"] for module in result["modules"]] == ["example", "user"]


def test_check_mode_builds_nothing_and_shows_what_would_change(run, host):
    result = run(_ansible_check_mode=True)
    assert result["changed"] and builds(host) == 0 and not (host / "records").exists()
    version = run()["version"]
    (host / "source" / "example.c").write_text("two\n")
    diff = run(_ansible_check_mode=True)["diff"]
    assert version in diff["before"] and version not in diff["after"]


@pytest.mark.parametrize(("text", "said"), [
    ("broken\n", "could not be built"), ("stale\n", "other versions of symbols"), ("other\n", "is built for '6.12.0-other"),
])  # fmt: skip
def test_what_fails_or_does_not_fit_leaves_the_build_before_in_place(run, host, text, said):
    path = run()["modules"][0]["path"]
    (host / "source" / "example.c").write_text(text)
    result = run()
    assert result["failed"] and said in result["msg"]
    assert ("error: broken" in result.get("log", "")) == (text == "broken\n")
    assert open(path).read() == "one\n"
    (host / "source" / "example.c").write_text("one\n")
    assert not run()["changed"]


@pytest.mark.parametrize("fails", [False, True])
def test_dkms_finds_no_build_of_the_other_kind_to_keep(run, host, fails):
    """It would put it back when its own goes. The lab has DKMS itself do it."""
    before = sorted(str(path) for path in (host / "lib").rglob("*"))
    path = run()["modules"][0]["path"]
    with contextlib.suppress(ZeroDivisionError), _kmod_build.Kbuild({"name": "example"}).aside(KERNEL):
        assert not os.path.exists(os.path.dirname(path))
        1 / (0 if fails else 1)
    if fails:
        assert open(path).read() == "one\n" and not run()["changed"]
    else:
        assert sorted(str(path) for path in (host / "lib").rglob("*")) == before


def test_absent_leaves_nothing(run, host):
    before = sorted(str(path) for path in (host / "lib").rglob("*"))
    run()
    assert run(state="absent")["changed"]
    assert sorted(str(path) for path in (host / "lib").rglob("*")) == before
    assert not (host / "records").exists()
    assert not run(state="absent")["changed"]


def test_missing_headers_say_which_package(run, host):
    (host / "lib" / KERNEL / "build" / "Makefile").unlink()
    assert f"linux-headers-{KERNEL}" in run()["msg"] or f"kernel-devel-{KERNEL}" in run()["msg"]
    assert "is not installed" in run(kernel="9.9")["msg"]


def test_headers_of_another_kernel_are_refused(run, host):
    (host / "lib" / KERNEL / "build" / "include" / "config").mkdir(parents=True)
    (host / "lib" / KERNEL / "build" / "include" / "config" / "kernel.release").write_text("6.12.0-other\n")
    assert "those of kernel 6.12.0-other" in run()["msg"]


def test_a_kernel_that_the_source_is_not_for(run, host):
    assert "it is for kernels that match ^6[.]13" in run(kernels="^6[.]13")["msg"]
    (host / "source" / "dkms.conf").write_text('PACKAGE_NAME="example"\nPACKAGE_VERSION="2.1"\nBUILD_EXCLUSIVE_KERNEL="^7"\n')
    assert "example 2.1 can't be built for kernel" in run()["msg"]


def test_no_source(run, host):
    assert "there is no /nowhere" in run(src="/nowhere")["msg"]
    (host / "source" / "Kbuild").unlink()
    assert "neither a Kbuild file nor a Makefile" in run()["msg"]


def test_a_folder_in_an_archive_is_the_same_source(run, host):
    archive = host / "linux.tar.xz"
    with tarfile.open(archive, "w:xz") as out:
        out.add(host / "source", "linux-6.12/drivers/example")
        out.add(host / "source" / "example.c", "linux-6.12/fs/example.c")
    version = run()["version"]
    result = run(src=str(archive), src_path="drivers/example", remote_src=True)
    assert result["version"] == version
    record = json.loads((host / "records" / "example.json").read_text())
    assert record["source"].startswith(version.split(".h")[1])
    assert "has no files" in run(src=str(archive), src_path="drivers/none", remote_src=True)["msg"]
    assert "can't be read as an archive" in run(src=str(host / "source" / "Kbuild"), remote_src=True)["msg"]


PATCH = """A line that says why.

--- a/example.c
+++ b/example.c
@@ -1 +1 @@
-one
+two
"""


def test_patches(run, host):
    plain = run()["version"]
    result = run(patches=[PATCH])
    assert result["changed"]
    assert result["version"] != plain
    assert not run(patches=[PATCH])["changed"]
    assert (host / "source" / "example.c").read_text() == "one\n"
    # The same source, patched by hand, is the same build.
    (host / "source" / "example.c").write_text("two\n")
    assert run()["version"] == result["version"]


def test_a_patch_that_is_in_the_source_already_is_left_out(run, host):
    (host / "source" / "example.c").write_text("two\n")
    assert run(patches=[PATCH])["version"] == run()["version"]


def test_a_patch_that_does_not_fit_is_an_error(run, host):
    """Nothing of it is applied, nothing is built."""
    second = PATCH.replace("-one", "-three").replace("+two", "+four")
    msg = run(patches=[PATCH, second])["msg"]
    assert "number 2 of the patches does not fit" in msg
    assert "FAILED" in msg
    assert not builds(host)


def test_patches_without_the_program(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "patch is not installed" in run(patches=[PATCH])["msg"]


def test_an_archive_that_is_known_is_not_read_again(run, host, monkeypatch):
    archive = host / "linux.tar.xz"
    with tarfile.open(archive, "w:xz") as out:
        out.add(host / "source", "linux-6.12/drivers/example")
    args = {"src": str(archive), "src_path": "drivers/example", "remote_src": True}
    run(**args)
    monkeypatch.setattr(_kmod_build, "read_source", None)
    assert not run(**args)["changed"]


def test_what_was_built_on_one_host_is_taken_by_another(run, host):
    archive = host / "built.tar.gz"
    first = run(archive=str(archive))
    assert first["taken"] is False
    run(state="absent")
    taken = run(built=[str(archive)])
    assert taken["taken"] and builds(host) == 1 and taken["version"] == first["version"]
    assert open(taken["modules"][0]["path"]).read() == "one\n"
    assert not run(built=[str(archive)])["changed"]


def test_an_archive_is_written_of_what_is_installed_when_it_is_not_there(run, host):
    archive = host / "built.tar.gz"
    run()
    assert run(archive=str(archive), _ansible_check_mode=True)["changed"] and not archive.exists()
    for content in (None, b"damaged"):
        if content:
            archive.write_bytes(content)
        assert run(archive=str(archive))["changed"]
        assert not run(archive=str(archive))["changed"]
    assert builds(host) == 1
    (host / "source" / "example.c").write_text("two\n")
    run(archive=str(archive))
    run(state="absent")
    assert run(built=[str(archive)])["taken"] and builds(host) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "other"}, "it is of other, not of example"),
        ({"kernel": "6.1"}, "it is for kernel 6.1, not 6.12.1-test"),
        ({"source": "0"}, "it was built from another source"),
        ({"modules": {}}, "it has no example"),
    ],
)
def test_an_archive_that_does_not_fit_is_not_taken_and_it_is_said_why(run, host, change, said, monkeypatch):
    warnings = []
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda self, text: warnings.append(text))
    archive = str(host / "built.tar.gz")
    run(archive=archive)
    run(state="absent")
    what, modules = _kmod_archive.read(archive)
    hashes = change.get("modules", what["modules"])
    _kmod_archive.write(archive, {**what, **change}, {name: modules[name] for name in hashes})
    result = run(built=[archive])
    assert result["taken"] is False and builds(host) == 2
    assert [said in text for text in warnings] == [True]


@pytest.mark.parametrize("damage", ["text", "short", "module", "manifest"])
def test_an_archive_that_is_damaged_is_an_error(run, host, damage):
    archive = host / "built.tar.gz"
    run(archive=str(archive))
    run(state="absent")
    if damage == "text":
        archive.write_text("nothing")
    elif damage == "short":
        archive.write_bytes(archive.read_bytes()[:-30])
    else:
        with tarfile.open(archive) as whole:
            parts = {member.name: whole.extractfile(member).read() for member in whole}
        name = "example.ko" if damage == "module" else "manifest.json"
        parts[name] = b"another\n" if damage == "module" else b"[]"
        with tarfile.open(archive, "w:gz") as out:
            for name, content in parts.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    result = run(built=[str(archive)])
    assert result["failed"] and ("is damaged" if damage == "module" else "is no archive of kernel modules") in result["msg"]
    assert builds(host) == 1


def test_what_is_taken_is_checked_like_what_is_built(run, host):
    archive = str(host / "built.tar.gz")
    run(archive=archive)
    run(state="absent")
    what = _kmod_archive.read(archive)[0]
    _kmod_archive.write(archive, what, {"example": b"other\n"})
    result = run(built=[archive])
    assert result["failed"] and "6.12.0-other" in result["msg"]
    assert run(state="absent")["changed"] is False


def test_the_archive_that_is_sent_holds_the_source_alone(host):
    (host / "source" / "tests").mkdir()
    (host / "source" / "tests" / "a.c").touch()
    (host / "source" / "example.ko").touch()
    (host / "sent.tar").write_bytes(pack(str(host / "source"), ["tests"]))
    with tarfile.open(host / "sent.tar") as archive:
        assert archive.getnames() == ["Kbuild", "example.c"]


def test_what_was_built_for_a_kernel_that_came_since_is_not_built_again(run, host):
    """DKMS does that by itself: what it installed is checked and noted, and stays."""
    first = run()
    record = json.loads((host / "records" / "example.json").read_text())
    record["kernels"] = {}
    (host / "records" / "example.json").write_text(json.dumps(record))
    again = run()
    assert not again["changed"] and again["modules"] == first["modules"] and builds(host) == 1
    assert json.loads((host / "records" / "example.json").read_text())["kernels"][KERNEL]


def test_another_certificate_in_the_place_of_the_one_before_is_another_build(host):
    """A module that was signed with the old key would be refused."""
    for name in ("key", "cert"):
        (host / name).write_text("one")

    class Module:
        params = {"sign_cert": str(host / "cert")}

    builder = object.__new__(kmod_build.KmodBuild)
    builder.params = Module.params
    first = builder.certificate()
    (host / "cert").write_text("two")
    assert first and builder.certificate() != first
    builder.params = {"sign_cert": None}
    assert builder.certificate() is None


def test_a_pattern_of_kernels_that_is_none_is_an_error(run, host):
    result = run(kernels="6.12[")
    assert result["failed"] and "is no regular expression" in result["msg"]


@pytest.mark.parametrize("name", ["example.ko.xz", "example.ko.gz", "example.ko.zst"])
def test_a_damaged_module_is_told_by_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"no module")
    with pytest.raises((_kmod_host.KmodError, FileNotFoundError)) as caught:
        _kmod_host.read_module(str(path))
    # Without zstd it can't be known.
    assert "is damaged" in str(caught.value) or (name.endswith("zst") and "zstd" in str(caught.value))
