# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import stat

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.hecaton.fleet.plugins.modules import evacuation_report

START = 1795428000.0


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the module: options in, what it returns out. An option that is ``...`` is left out."""

    def _run(path=tmp_path, check_mode=False, diff=False, **options) -> dict:
        given = {
            "host": "hv1", "plan": {"source": "hv1", "moves": [{"vm": "web1", "to": "hv2"}]}, "locations": {"web1": "hv2"},
            "migrations": [{"vm": "web1", "to": "hv2", "result": "moved", "started": START, "downtime_ms": 120, "samples": [[0, "precopy", 1, 2]]}],
            "started": START, "finished": START + 9, "path": str(path), **options, "_ansible_check_mode": check_mode, "_ansible_diff": diff,
        }
        given = {key: value for key, value in given.items() if value is not ...}
        with patch_module_args(given), pytest.raises(SystemExit):
            evacuation_report.main()
        return json.loads(capsys.readouterr().out)

    return _run


def test_writes_both_files(run, tmp_path):
    folder = tmp_path / "reports" / "hv1"
    result = run(folder)
    assert result["changed"]
    assert result["paths"] == {"json": str(folder / "report.json"), "html": str(folder / "report.html")}
    written = json.loads((folder / "report.json").read_text())
    assert written["vms"][0]["samples"] == [[0, "precopy", 1, 2]]
    assert result["report"]["vms"] == [{**written["vms"][0], "samples": []}]
    assert "hv1</bdi> is empty" in (folder / "report.html").read_text()
    assert sorted(os.listdir(folder)) == ["report.html", "report.json"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


def test_second_run_changes_nothing(run, tmp_path):
    run()
    before = {file.name: file.stat().st_ino for file in tmp_path.iterdir()}
    assert not run()["changed"]
    assert {file.name: file.stat().st_ino for file in tmp_path.iterdir()} == before
    assert run(finished=START + 10)["changed"]


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_mends_mode_and_content(run, tmp_path, name):
    run()
    (tmp_path / name).chmod(0o600)
    assert run(check_mode=True)["changed"]
    assert run()["changed"]
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644
    (tmp_path / name).unlink()
    assert run()["changed"]
    assert (tmp_path / name).exists()


def test_check_mode_writes_nothing(run, tmp_path):
    folder = tmp_path / "new"
    result = run(folder, check_mode=True, diff=True)
    assert result["changed"]
    assert result["report"]["failed"] == 0
    assert not folder.exists()
    run(folder)
    assert not run(folder, check_mode=True)["changed"]


def test_diff_shows_the_json(run, tmp_path):
    first = run(diff=True)["diff"]
    assert first["before"] == "" and json.loads(first["after"])["elapsed_s"] == 9
    second = run(diff=True, finished=START + 10)["diff"]
    assert second["before"] == first["after"] and json.loads(second["after"])["elapsed_s"] == 10
    assert "diff" not in run()


def test_check_report(run):
    assert run(check=True, locations={}, migrations=[])["report"]["vms"][0]["result"] == "skipped"


@pytest.mark.parametrize("options, message", [
    ({"plan": {"moves": [{"to": "hv2"}]}}, "plan.moves[0] lacks 'vm'."),
    ({"migrations": [{"vm": "web1", "started": "yesterday"}]}, "migrations[0].started must be a number or null, not 'yesterday'."),
    ({"locations": {"web1": ["hv2"]}}, "locations.web1 must be a string or null, not ['hv2']."),
    ({"finished": START - 1}, f"The evacuation can't have finished ({START - 1}) before it started ({START})."),
    ({"finished": "nan"}, "finished must be a number, not nan."),
    ({"clients": [{"name": "c", "requests": -1, "failed": 0}]}, "clients[0].requests must not be less than 0, and is -1."),
    ({"clients": [{"name": "c"}]}, "missing required arguments: failed, requests found in clients"),
    ({"host": ...}, "one of the following is required: report, host"),
    ({"plan": ...}, "missing parameter(s) required by 'host': plan"),
    ({"report": {}}, "parameters are mutually exclusive: report|host"),
    ({"report": {"format": 1}, "host": ...}, "report lacks 'host'."),
])
def test_bad_input_is_a_sentence(run, tmp_path, options, message):
    result = run(**options)
    assert result["failed"] and result["msg"] == message
    assert list(tmp_path.iterdir()) == []


def test_writes_a_report_again(run, tmp_path):
    run(tmp_path / "first")
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    again = run(tmp_path / "second", report=report, host=..., plan=..., locations=..., migrations=..., started=..., finished=...)
    for name in ("report.json", "report.html"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()
    assert again["table"].splitlines()[1].split() == ["web1", "moved", "hv1", "hv2", "-", "120", "ms", "-", "-"]


def test_path_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert run(tmp_path / "file")["msg"] == f"The report can't be written to {tmp_path}/file: Not a directory."
    assert (tmp_path / "file").read_text() == "mine"


def test_report_that_is_a_directory(run, tmp_path):
    (tmp_path / "report.json").mkdir()
    assert run()["msg"] == f"The report can't be written to {tmp_path}: Is a directory."


def test_documentation_names_every_option(run):
    yaml = pytest.importorskip("yaml")
    documented = yaml.safe_load(evacuation_report.DOCUMENTATION)["options"]
    assert run(nonsense=1)["msg"].endswith(f"Supported parameters include: {', '.join(sorted(documented))}.")
