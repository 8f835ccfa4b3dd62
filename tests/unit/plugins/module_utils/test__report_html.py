# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the page says, without a browser. tests/report looks at it in one."""

from __future__ import annotations

import re

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _report_html as page
from ansible_collections.hecaton.fleet.plugins.module_utils._report import build
from ansible_collections.hecaton.fleet.tests.unit.html_page import Page

START = 1795428000.0


def move(name, **more):
    return {"vm": name, "from": "hv1", "to": "hv2", "engine": "userfault", "memory_mib": 256, **more}


def migration(name, **more):
    return {"vm": name, "from": "hv1", "to": "hv2", "engine": "userfault", "phase": "finished", "result": "moved", "started": START + 1, "switched": START + 5,
            "finished": START + 8, "downtime_ms": 120.5, "total_ms": 7000, "bytes": 158000000,
            "samples": [[0, "precopy", 30, 200], [4, "postcopy", 20, 60]], **more}


def render(plan, migrations=(), locations=None, elapsed=10.0, **more):
    text = page.render(build(plan, list(migrations), locations or {}, "hv1", START, START + elapsed, **more))
    return Page(text), text


def test_moved():
    read, text = render({"deadline_s": 60, "moves": [move("web1")]}, [migration("web1")], {"web1": "hv2"})
    assert "hv1 is empty" in read.text
    assert "It was free after 8.0 s of the 60 s allowed" not in read.text
    assert re.search(r"It was free after 8\.0 s of the 1 min allowed: 52\.0 s to spare", read.text)
    for value in ("120.5", "7000", "158000000"):
        assert f'<data value="{value}">' in text
    assert "30 MiB/s at the peak" in read.text


@pytest.mark.parametrize("locations, migrations, headline", [
    ({"web1": "hv1", "web2": "hv2"}, ["web2"], "hv1 is not empty: 1 VM is left"),
    ({"web1": "hv1", "web2": "hv1"}, [], "hv1 is not empty: 2 VMs are left"),
    ({"web1": None, "web2": "hv2"}, ["web1", "web2"], "hv1 is empty, but 1 VM is lost"),
    ({"web1": None, "web2": "hv1"}, [], "hv1 is not empty: 1 VM is left, 1 lost"),
])
def test_headline(locations, migrations, headline):
    read, _text = render({"moves": [move("web1"), move("web2")]}, [migration(name) for name in migrations], locations)
    assert headline in read.text
    assert "there was no deadline" in read.text


def test_late():
    read, _text = render({"deadline_s": 4, "moves": [move("web1")]}, [migration("web1")], {"web1": "hv2"})
    assert re.search(r"It was free after 8\.0 s of the 4 s allowed: 4\.0 s too long", read.text)


def test_a_host_that_is_not_free_has_taken_all_the_time_there_was():
    read, _text = render({"deadline_s": 4, "moves": [move("web1"), move("web2")]}, [migration("web1")], {"web1": "hv2", "web2": "hv1"})
    assert re.search(r"It took 10\.0 s of the 4 s allowed: 6\.0 s too long", read.text)


def test_planned_and_real():
    plan = {"deadline_s": 60, "elapsed_s": 2, "moves": [move("web1", estimated_start_s=1.5, estimated_s=9.25, onboard=True), move("web2")]}
    read, text = render(plan, [migration("web1", engine="precopy"), migration("web2")], {"web1": "hv2", "web2": "hv2"})
    said = read.text.split("Planned and real")[1].split("All VMs")[0]
    assert "With their memory on remote_ram from now on: web1" in said and "web2" not in said  # which has no planned times
    for value in ("3.5", "12.75"):
        assert f'<data value="{value}">' in text


def test_skipped_alone_is_no_failure():
    read, text = render({"skipped": [{"vm": "lab9", "reason": "excluded"}]}, [], {"lab9": "hv1"})
    assert '<header class="head warn">' in text
    assert "hv1 is not empty: 1 VM is left" in read.text


def test_blockers_are_named():
    blocked = [{"vm": name, "blockers": [{"code": "local_disk", "message": f"the disk of {name}"}]} for name in ("a1", "b2")]
    read, _text = render({"blocked": blocked}, [], {})
    assert "the disk of a1" in read.text and "the disk of b2" in read.text
    assert re.search(r"Blockers: local_disk on 2 VMs", read.text)


def test_nulls_are_dashes_and_nothing_breaks():
    """Each field that may be null is, one migration each, and all at once."""
    empty = {"started": None, "switched": None, "finished": None, "downtime_ms": None, "total_ms": None, "bytes": None, "engine": None, "samples": []}
    states = [migration(key, **{key: value}) for key, value in empty.items()]
    states += [migration("all", **empty), migration("rates", samples=[[0, "precopy", None, None]])]
    moves = [{"vm": state["vm"]} for state in states]
    for elapsed in (0.0, 10.0):
        read, _text = render({"moves": moves}, states, {state["vm"]: "hv2" for state in states}, elapsed=elapsed)
        assert "None" not in read.text and "nan" not in read.text.lower().split()


def test_check():
    plan = {"deadline_s": 60, "estimated_s": 30, "feasible": True, "moves": [move("web1", estimated_start_s=2, estimated_s=9.5), move("web2")]}
    read, _text = render(plan, check=True)
    assert "Check: 2 VMs would leave hv1" in read.text
    assert "≈ 9.5 s" in read.text
    assert "Nothing was moved" in read.text
    assert re.search(r"It would take about 30\.0 s of the 1 min allowed", read.text)


def test_clients():
    read, _text = render({}, clients=[{"name": "probe", "requests": 1402, "failed": 3, "worst_ms": 1220.5}])
    assert "probe 1,402 ✕ 3 (0.21 %) 1.22 s – –" in read.text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "\"' onload=x", "</style><b>", "a\u202eb\x07c\udcff", "&amp;"])
def test_whatever_is_given_stays_text(name):
    plain, _text = render({"moves": [move("x")], "blocked": [{"vm": "y", "blockers": [{"code": "z", "message": "z"}]}]}, [migration("x")], {"x": "hv2"})
    plan = {"moves": [move(name)], "blocked": [{"vm": name + "2", "blockers": [{"code": name, "message": name}]}]}
    read, text = render(plan, [migration(name, engine=name)], {name: "hv2"})
    assert read.tags == plain.tags
    assert [key for key, _value in read.attributes] == [key for key, _value in plain.attributes]
    assert not re.search("[\u202e\x07\udcff]", text)
    text.encode()


def test_page_is_self_contained():
    read, text = render({"moves": [move("web1")]}, [migration("web1")], {"web1": "hv2"})
    assert not {"script", "img", "iframe", "object", "image", "use"} & set(read.tags)
    assert [value for key, value in read.attributes if key in ("src", "href")] == ["data:,", "report.json"]
    assert "default-src 'none'" in dict(read.attributes)["content"] or "default-src 'none'" in text
    assert "@import" not in text and "http" not in re.sub("http-equiv", "", text)


def test_same_report_same_page():
    given = ({"moves": [move("web1")]}, [migration("web1")], {"web1": "hv2"}, "hv1", START, START + 9)
    assert page.render(build(*given)) == page.render(build(*given))


@pytest.mark.parametrize("value, text", [
    (None, "–"), (0, "0.0 s"), (7.34, "7.3 s"), (59.96, "1 min 00 s"), (70.2, "1 min 10 s"), (3599.7, "1 h 00 min"), (-5, "−5.0 s"),
])
def test_duration(value, text):
    assert page.duration(value) == text


@pytest.mark.parametrize("value, text", [
    (None, "–"), (0, "0 ms"), (0.25, "0.25 ms"), (61.53, "61.5 ms"), (120.4, "120 ms"), (999.6, "1.00 s"), (9995, "10.0 s"), (61000, "1 min 01 s"),
])
def test_milliseconds(value, text):
    assert page.milliseconds(value) == text


@pytest.mark.parametrize("value, text", [(None, "–"), (0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (158000000, "151 MiB"), (5 * 2**40, "5 TiB")])
def test_octets(value, text):
    assert page.octets(value) == text


@pytest.mark.parametrize("value, text", [(45, "45 s"), (60, "1 min"), (100, "1 min 40 s"), (3600, "1 h"), (600, "10 min")])
def test_limit(value, text):
    assert page.limit(value) == text


def test_rates_keep_what_was_sent():
    """The mean over the bins is the mean of the samples, weighted by how long each held."""
    pre, post = page._binned([(0.0, 4.0, "precopy", 30.0), (4.0, 7.0, "postcopy", 20.0)], 0.0, 10.0, 64)
    assert sum(pre) / 64 * 10 == pytest.approx(120)
    assert sum(post) / 64 * 10 == pytest.approx(60)


def test_rate_of_a_moment_is_no_rate():
    """One sample, and no end of the migration: nothing says how long the rate held."""
    states = [migration("web1", finished=None, samples=[[4, "postcopy", 20, 60]])]
    read, _text = render({"moves": [move("web1")]}, states, {"web1": "hv1"})
    assert "No rate was sampled." in read.text


def test_median_is_a_pause_that_a_vm_had():
    paused = page._paused([{"downtime_ms": value} for value in (10, 40, None, 20, 30)])
    assert [page._rank(paused, share) for share in (0.25, 0.5, 0.95)] == [10, 20, 40]


def test_the_page_of_a_return_says_so():
    plan = {"moves": [move("web1", **{"from": "hv2", "to": "hv1"}), move("web2", **{"from": "hv3", "to": "hv1"})]}
    back = [migration("web1", **{"from": "hv2", "to": "hv1"})]
    said = render(plan, back, {"web1": "hv1", "web2": "hv3"}, direction="back")[0].text
    assert "Return to hv1" in said and "1 VM returned to hv1 , 1 did not" in said and "evacuation" not in said.lower()


def test_the_page_of_an_onboarding_says_so():
    plan = {"source": None, "waves": [1, 1], "moves": [move("web1", onboard=True), move("web2", **{"from": "hv2", "to": "hv1"}, onboard=True)],
            "skipped": [{"vm": "old", "from": "hv1", "reason": "its memory is there already"}],
            "hosts": [{"name": "hv1", "incoming": 1}, {"name": "hv2", "incoming": 1}]}  # fmt: skip
    places = {"web1": "hv2", "web2": "hv2", "old": "hv1"}
    said = render(plan, [migration("web1")], places, direction="onboard")[0].text
    assert "Onboarding of VMs of hv1" in said and "1 VM onboarded on hv1 , 1 not" in said and "evacuation" not in said.lower()
    assert "empty" not in said and "It took" in said
    said = render(plan, [], {**places, "web1": "hv1"}, direction="onboard", check=True)[0].text
    assert "2 VMs would be onboarded on hv1" in said and ", 1 would stay" not in said


def test_pages_by_cause():
    counted = {"pages_ahead": 13239, "pages_demand": 137, "pages_bubble": 10937, "pages_background": 3732, "wait_ns_max": 35522315,
               "wait_hist": [0] * 11 + [60, 35, 5] + [0] * 18}  # fmt: skip
    read, text = render({"moves": [move("web1")]}, [migration("web1", engine="remote_ram", remote_ram=counted)], {"web1": "hv2"})
    assert "Pages by cause" in read.text
    for value in ("13239", "137", "10937", "3732", "100"):
        assert f'<data value="{value}">' in text
    # Half of the waits, and 99 in 100, by the upper edges of their buckets: 2^11 and 2^13 us; the longest as measured.
    for value in ("2.048", "8.192", "35.522"):
        assert f'<data value="{value}">' in text


def test_waits_and_faults_of_all_guests_together():
    hists = [[0] * 10 + [1, 20, 0, 4] + [0] * 18, [3] + [0] * 10 + [30] + [0] * 20]
    states = [migration(f"web{n}", engine="remote_ram", remote_ram={
        "pages": 10000, "pages_demand": 100 * n, "faults_nowait": 7 * n, "faults_retry": 5, "faults_plain": 1, "wait_hist": hist,
    }) for n, hist in enumerate(hists, 1)]  # fmt: skip
    read, text = render({"moves": [move("web1"), move("web2")]}, states, {"web1": "hv2", "web2": "hv2"})
    assert "Pages on demand 300 1.5 % of all; 99 % of waits within 8.19 ms" in read.text
    said = read.text.split("How long guests waited for pages on demand")[1].split("All VMs")[0]
    assert "58 waits of all guests together: half within 2.05 ms, 99 % within 8.19 ms" in said
    # A row for each duration, also for those between in which nothing ended.
    assert re.search(r"below 1 µs 3 1 µs – 2 µs 0 .* 512 µs – 1.02 ms 1 1.02 ms – 2.05 ms 50 2.05 ms – 4.10 ms 0 4.10 ms – 8.19 ms 4 ", said)
    for faults in (13, 20):
        assert f'<data value="{faults}">' in text


def test_no_pages_by_cause_without_the_kernel_engine():
    read, _text = render({"moves": [move("web1")]}, [migration("web1")], {"web1": "hv2"})
    assert "Pages by cause" not in read.text
