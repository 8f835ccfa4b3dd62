# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report's page in a real browser: it shows the figures of report.json, asks the network for nothing, and fits."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils._report import build, dump
from ansible_collections.hecaton.fleet.plugins.module_utils._report_html import milliseconds, render

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium from PyPI")

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
START = 1795428000.0
FIGURES = ("started_s", "switched_s", "finished_s", "downtime_ms", "total_ms", "bytes", "memory_mib", "dirty_rate_mib_s", "precopy_timeout_s")
HOSTILE = (
    "<script>document.title='owned'</script>",
    "\"><img src=http://192.0.2.1/x onerror=\"document.title='owned'\">",
    "'</style><style>*{display:none}",
    "{{ lookup('pipe', 'id') }} &amp; &lt;b&gt;",
    "\u202egnp.exe",
    "a-very-long-name-" + "x" * 160,
    "tab\tand\u0007bell",
)


# --- Reports ----------------------------------------------------------------------------------------------------------

def move(name: str, to: str = "hv2", order: int = 1, memory: int = 256, **more) -> dict:
    return {"vm": name, "driver": "libvirt", "from": "hv1", "to": to, "engine": "userfault", "engine_reason": "", "memory_mib": memory,
            "dirty_rate_mib_s": 12.5, "precopy_timeout_s": 8, "order": order, "estimated_start_s": 0.0, "estimated_s": 9.5, "reason": "", **more}


def migration(name: str, start: float, pre: float, post: float, downtime: float | None, to: str = "hv2", **more) -> dict:
    """A migration that copied ahead for ``pre`` seconds, then pulled for ``post`` seconds."""
    samples = [[round(t / 2, 3), "precopy", 30 + 12 * math.sin(t / 2.1 + start), max(0.0, 256 - 15.0 * t)] for t in range(int(pre * 2))]
    samples += [[round(pre + t / 4, 3), "postcopy", 24 + 9 * math.cos(t + start), max(0.0, 60 - 6.0 * t)] for t in range(int(post * 4))]
    return {"id": f"id-{name}", "vm": name, "driver": "libvirt", "engine": "userfault", "from": "hv1", "to": to,
            "phase": "finished", "result": "moved", "reason": "", "on": "destination",
            "started": START + start, "switched": START + start + pre, "finished": START + start + pre + post, "downtime_ms": downtime,
            "total_ms": round(1000 * (pre + post)), "bytes": int(1048576 * sum(s[2] for s in samples) / 3), "samples": samples, **more}


HOSTS = [{"name": name, "cordoned": not usable, "usable": usable, "reason": reason,
          "memory_free_before_mib": before, "memory_free_after_mib": after, "incoming": n}
         for name, usable, reason, before, after, n in (
             ("hv2", True, "", 2700, 1932, 3), ("hv3", True, "", 3100, 2076, 3), ("hv4", False, "cordoned: firmware update", 2900, 2900, 0))]
CLIENTS = [
    {"name": "valkey-client", "requests": 70213, "failed": 0, "worst_ms": 143.2, "p50_ms": 0.8, "p99_ms": 6.1},
    {"name": "http-probe", "requests": 1402, "failed": 3, "worst_ms": 1220.5, "p50_ms": 2.4, "p99_ms": 38},
]


def six_moved() -> dict:
    names = ["db1", "web1", "web2", "cache1", "queue1", "build-runner-07"]
    moves = [move(name, "hv2" if n % 2 else "hv3", n + 1, 512 if n == 0 else 256) for n, name in enumerate(names)]
    states = [migration(name, 11.0 * (n // 2) + 1.7 * (n % 2), 8.0 - n / 2, 1.5 + n / 3, [212, 120.4, 96, 61.5, 143, 88][n], "hv2" if n % 2 else "hv3")
              for n, name in enumerate(names)]
    plan = {"source": "hv1", "deadline_s": 60, "estimated_s": 42.0, "feasible": True, "moves": moves, "hosts": HOSTS}
    return build(plan, states, {m["vm"]: m["to"] for m in moves}, "hv1", START, START + 33.4, CLIENTS)


def one_moved() -> dict:
    plan = {"source": "hv1", "deadline_s": 600, "moves": [move("web1")]}
    return build(plan, [migration("web1", 0.4, 6.1, 1.2, 120)], {"web1": "hv2"}, "hv1", START, START + 7.9)


def mixed() -> dict:
    moves = [move("db1", order=1, memory=2048), move("web1", order=2), move("web2", "hv3", 3), move("cache1", "hv3", 4), move("queue1", "hv3", 5),
             move("late1", "hv2", 6)]
    states = [
        migration("db1", 0.2, 30, 22, 2310),
        migration("web1", 3.0, 8, 2.5, 130, result="failed", reason="lost the connection to libvirt on hv1"),
        migration("web2", 12.0, 8, 0, None, "hv3", result="failed", reason="QEMU on hv3: Unable to read from socket: Connection reset by peer",
                  switched=None, total_ms=None),
        migration("cache1", 22.0, 6, 2, 75, "hv3"),
        migration("queue1", 31.0, 5, 4, 90, "hv3", phase="recovering", result=None, finished=None, total_ms=None),
    ]
    plan = {
        "source": "hv1", "deadline_s": 45, "estimated_s": 42.0, "feasible": False, "moves": moves,
        "blocked": [
            {"vm": "gpu1", "driver": "libvirt", "blockers": [{"code": "host_device", "message": "uses the host's PCI device 0000:00:05.0"},
                                                             {"code": "local_disk", "message": "vda is /var/lib/libvirt/images/gpu1.raw, which only hv1 has"}]},
            {"vm": "big1", "driver": "libvirt", "blockers": [{"code": "no_room", "message": "needs 9000 MiB, and no host has more than 3100 MiB free"}]},
        ],
        "skipped": [{"vm": "lab9", "driver": "libvirt", "reason": "excluded by evacuate_exclude"}],
        "hosts": HOSTS, "warnings": ["The deadline of 45 s leaves db1 no time for a second round of pre-copy."],
    }
    locations = {"db1": "hv2", "web1": "hv2", "web2": "hv1", "cache1": None, "queue1": "hv3", "late1": "hv1", "gpu1": "hv1", "big1": "hv1", "lab9": "hv1"}
    return build(plan, states, locations, "hv1", START, START + 58.2, CLIENTS)


def nothing_moved() -> dict:
    plan = {"source": "hv1", "deadline_s": None, "moves": [move("web1"), move("web2")]}
    return build(plan, [], {"web1": "hv1", "web2": "hv1"}, "hv1", START, START + 2.0)


def no_vms() -> dict:
    return build({}, [], {}, "hv1", START, START + 0.4)


def checked() -> dict:
    moves = [move(f"web{n}", "hv2", n, estimated_start_s=4.0 * (n - 1), estimated_s=9.5 + n) for n in range(1, 6)]
    plan = {"source": "hv1", "deadline_s": 600, "estimated_s": 30.5, "feasible": False, "moves": moves, "hosts": HOSTS, "warnings": [],
            "blocked": [{"vm": "gpu1", "driver": "libvirt", "blockers": [{"code": "host_device", "message": "uses the host's PCI device 0000:00:05.0"}]}],
            "skipped": [{"vm": "lab9", "driver": "libvirt", "reason": "excluded by evacuate_exclude"}]}
    return build(plan, [], {}, "hv1", START, START + 1.3, check=True)


def two_hundred() -> dict:
    names = [f"tenant{n % 7}-vm{n:03d}" for n in range(200)]
    moves = [move(name, f"hv{2 + n % 9}", n + 1, 2048 + 1024 * (n % 5)) for n, name in enumerate(names[:195])]
    states = [migration(m["vm"], 12.0 * (n // 8) + 1.1 * (n % 8), 8 + n % 5, 2 + n % 7 / 2, 50 + 997 * n % 240 + (900 if n == 77 else 0), m["to"])
              for n, m in enumerate(moves)]
    locations = {m["vm"]: m["to"] for m in moves} | {name: "hv1" for name in names[195:]}
    locations[names[60]] = "hv1"
    states[60].update(result="failed", reason="hv8 refused the connection", switched=None, downtime_ms=None)
    blocked = [{"vm": name, "driver": "libvirt", "blockers": [{"code": "local_disk", "message": "vda is on a local disk"}]} for name in names[195:]]
    plan = {"source": "hv1", "deadline_s": 600, "moves": moves, "blocked": blocked}
    return build(plan, states, locations, "hv1", START, START + 321.7)


def hostile() -> dict:
    moves = [move(name, "hv2<b>", n) for n, name in enumerate(HOSTILE[:4])]
    states = [migration(name, 2.0 * n, 4, 1, 50 + n, "hv2<b>") for n, name in enumerate(HOSTILE[:3])]
    states[2].update(result="failed", reason="<script>document.title='owned'</script>")
    blocked = [{"vm": name, "blockers": [{"code": "<i>code", "message": "<img src=x onerror=\"document.title='owned'\">"}]} for name in HOSTILE[4:6]]
    plan = {"deadline_s": 100, "moves": moves, "blocked": blocked,
            "skipped": [{"vm": HOSTILE[6], "reason": "</p></main><script>document.title='owned'</script>"}],
            "warnings": ["<script>document.title='owned'</script>"], "hosts": [{"name": "<u>hv2", "usable": False, "reason": "<s>"}]}
    locations = {name: "hv2<b>" for name in HOSTILE[:2]} | {HOSTILE[2]: "hv1\"><script>x</script>"}
    return build(plan, states, locations, "hv1\"><script>x</script>", START, START + 12, [{"name": "<script>c", "requests": 0, "failed": 0}])


def kernel_engine() -> dict:
    """Four by the kernel engine, two that got onto it, and when all that was to be."""
    counted = {"pages": 65536, "pages_ahead": 51239, "pages_zero": 8650, "pages_demand": 312, "pages_bubble": 3937, "pages_background": 1398,
               "pages_missing": 0, "bytes_ahead": 209874944, "bytes_after": 23130112, "faults_nowait": 260, "faults_retry": 147, "faults_plain": 1,
               "faults_joined": 96, "wait_ns_max": 95522315, "wait_ns_total": 912345678, "reconnects": 0, "switch_us": 41532, "late_writes": 0}  # fmt: skip
    names = ["db1", "web1", "batch1", "batch2", "web2", "idle1"]
    moves, states = [], []
    for n, name in enumerate(names):
        start, onboard = 11.0 * (n // 2), n > 3
        engine = "precopy" if onboard else "remote_ram"
        to = "hv2" if n % 2 else "hv3"
        moves.append(move(name, to, n + 1, engine=engine, onboard=onboard, estimated_start_s=start, estimated_s=10.5))
        waits = [0] * 9 + [3 * n, 26, 59, 50 + 11 * n, 44, 17, 1, 0, 1] + [0] * 14
        more = {} if onboard else {"remote_ram": {**counted, "wait_hist": waits}}
        states.append(migration(name, start + 7, 8.0 - n / 2, 1.5 + n / 3, [212, 120.4, 96, 61.5, 143, 88][n], to, engine=engine, **more))
    plan = {"source": "hv1", "deadline_s": 60, "elapsed_s": 6.5, "estimated_s": 42.0, "feasible": True, "moves": moves, "hosts": HOSTS}
    return build(plan, states, {m["vm"]: m["to"] for m in moves}, "hv1", START, START + 47.4, CLIENTS)


REPORTS = {case.__name__: case for case in (kernel_engine, six_moved, one_moved, mixed, nothing_moved, no_vms, checked, two_hundred, hostile)}


# --- The browser ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("needs the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=REPORTS)
def page(request, browser, tmp_path):
    """A report as its module leaves it, opened in the browser."""
    report = REPORTS[request.param]()
    (tmp_path / "report.json").write_text(dump(report))
    (tmp_path / "report.html").write_text(render(report))
    browser.get_log("browser")
    browser.get_log("performance")
    look(browser, 1280)
    browser.get((tmp_path / "report.html").as_uri())
    yield json.loads((tmp_path / "report.json").read_text()), browser
    if os.environ.get("REPORT_SCREENSHOTS"):
        screenshots(browser, Path(os.environ["REPORT_SCREENSHOTS"]), request.param)


def look(browser, width: int, scheme: str = "light", height: int = 900) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def screenshots(browser, folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            look(browser, width, scheme)
            height = min(browser.execute_script("return document.documentElement.scrollHeight"), 6000)
            look(browser, width, scheme, height)
            browser.save_screenshot(str(folder / f"{name}-{width}-{scheme}.png"))


def shown(browser) -> dict:
    """What the table of VMs says: name → field → (value, text)."""
    return dict(browser.execute_script("""
        const vms = [];
        for (const body of document.querySelectorAll('tbody[data-vm]')) {
            const fields = {};
            for (const cell of body.querySelectorAll('[data-field]')) {
                const data = cell.querySelector('data');
                fields[cell.dataset.field] = [data ? data.value : null, cell.innerText.trim()];
            }
            vms.push([body.querySelector('th').innerText, fields]);
        }
        return vms;"""))


def visible(name: str) -> str:
    """A name as the page shows it: white space folded; control characters, and those that turn the direction, replaced."""
    return " ".join(re.sub("[\u0007\u202e]", "\ufffd", name).split())


# --- The tests --------------------------------------------------------------------------------------------------------

def test_page_shows_the_figures_of_the_json(page):
    report, browser = page
    vms = shown(browser)
    nowhere = [None, "–"]   # a column in which no VM has a figure is left out
    assert list(vms) == [visible(vm["name"]) for vm in report["vms"]]
    for vm in report["vms"]:
        fields = vms[visible(vm["name"])]
        assert fields["result"][0] == vm["result"]
        assert fields.get("reason", [None, ""])[1] == visible(vm["reason"])
        for key in FIGURES:
            value, text = fields.get(key, nowhere)
            assert (None if value is None else float(value)) == vm[key], (vm["name"], key)
            assert (text == "–") == (vm[key] is None), (vm["name"], key)
        for key in ("engine", "to"):
            assert fields.get(key, nowhere)[1] == (vm[key] or "–")
        # Where each was found has a column of its own only if one was found elsewhere than it was to go.
        looked = any(each["location"] for each in report["vms"])
        assert fields.get("location", fields.get("to", nowhere) if looked else nowhere)[1] == (vm["location"] or "–")
        assert fields.get("downtime_ms", nowhere)[1] == milliseconds(vm["downtime_ms"])


def test_every_vm_is_on_the_timeline_and_every_pause_has_its_bar(page):
    report, browser = page
    rows = browser.execute_script("return [...document.querySelectorAll('.gantt .row:not(.axis) .who > bdi')].map(e => e.innerText)")
    assert sorted(rows) == sorted(visible(vm["name"]) for vm in report["vms"])
    pauses = browser.execute_script(
        "return [...document.querySelectorAll('.pauses .row')].map(e => [e.querySelector('.who').innerText, e.querySelector('.value').innerText])")
    known = [(visible(vm["name"]), milliseconds(vm["downtime_ms"])) for vm in report["vms"] if vm["downtime_ms"] is not None]
    assert sorted(map(tuple, pauses)) == sorted(known)


def test_every_vm_that_stayed_is_named_with_why(page):
    report, browser = page
    left = browser.execute_script("return [...document.querySelectorAll('.left > li')].map(e => [e.querySelector('strong').innerText, e.innerText])")
    stayed = [vm for vm in report["vms"] if vm["result"] != "moved" and not (report["check"] and vm["result"] == "skipped" and vm["to"])]
    assert sorted(name for name, _text in left) == sorted(visible(vm["name"]) for vm in stayed)
    blockers = {visible(entry["vm"]): entry["blockers"] for entry in report["plan"].get("blocked", [])}
    for name, text in left:
        assert all(blocker["code"] in text and blocker["message"] in text for blocker in blockers.get(name, []))


def test_headline_says_whether_the_host_is_empty(page):
    report, browser = page
    headline = browser.execute_script("return document.querySelector('h1').innerText")
    if report["check"]:
        assert "would leave" in headline
    else:
        assert ("is empty" in headline) == report["empty"]
        assert ("is not empty" in headline) != report["empty"]


def test_page_asks_for_nothing_and_complains_of_nothing(page):
    _report, browser = page
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [message["params"]["request"]["url"] for message in asked if message["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [browser.current_url]
    assert browser.title != "owned"
    assert browser.execute_script("return document.querySelectorAll('script, img, iframe, object, main u, main s, main i').length") == 0


def test_page_shows_what_the_kernel_counted(page):
    report, browser = page
    tables = browser.execute_script("""
        const found = {};
        for (const section of document.querySelectorAll('section')) {
            const rows = [...section.querySelectorAll('tbody tr, .waits .row')], values = row => [...row.querySelectorAll('data')].map(d => d.value);
            found[section.querySelector('h2').innerText] = rows.map(row => [row.firstElementChild.innerText, values(row)]);
        }
        return found;""")
    counted = {visible(vm["name"]): vm["remote_ram"] for vm in report["vms"] if vm.get("remote_ram")}
    rows = dict(tables.get("Pages by cause", []))
    assert rows.keys() == counted.keys()
    keys = ("pages_ahead", "pages_zero", "pages_demand", "pages_bubble", "pages_background")
    for name, said in counted.items():
        faults = said["faults_nowait"] + said["faults_retry"] + said["faults_plain"]
        assert [int(value) for value in rows[name][:7]] == [*(said[key] for key in keys), faults, sum(said["wait_hist"])]
    waits = [int(values[0]) for _edges, values in tables.get("How long guests waited for pages on demand", [])]
    pooled = [sum(column) for column in zip(*(said["wait_hist"] for said in counted.values()), strict=True)]
    assert sum(waits) == sum(pooled) and [count for count in waits if count] == [count for count in pooled if count]
    planned = {visible(vm["name"]): vm for vm in report["vms"] if vm["planned_start_s"] is not None and vm["started_s"] is not None and not report["check"]}
    rows = dict(tables.get("Planned and real", []))
    assert rows.keys() == planned.keys()
    for name, vm in planned.items():
        keys = ("precopy_timeout_s", "precopy_s", "planned_start_s", "started_s", "planned_finish_s", "finished_s")
        assert [float(value) for value in rows[name]] == [vm[key] for key in keys if vm[key] is not None]


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits(page, width):
    _report, browser = page
    look(browser, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    inside = """const out = [];
        for (const e of document.querySelectorAll('main *')) {
            if (e.closest('.scroll, details:not([open])') && !e.matches('.scroll') || e.closest('svg svg, thead')) continue;
            const box = e.getBoundingClientRect();
            if (box.width && (box.right > innerWidth + 1 || box.left < -1)) out.push([e.tagName, e.className.baseVal ?? e.className, box.left, box.right]);
        }
        return out;"""
    assert browser.execute_script(inside) == []
    cells = """return [...document.querySelectorAll('td > *')].filter(e => e.getBoundingClientRect().right > e.parentElement.getBoundingClientRect().right + 1)
        .map(e => e.innerText)"""
    assert browser.execute_script(cells) == []
    assert browser.execute_script("return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth).filter(d => d > 0)") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page, scheme):
    """WCAG AA: 4.5 to 1 for text, against the nearest background that is painted."""
    _report, browser = page
    look(browser, 1280, scheme)
    faint = browser.execute_script("""
        const parse = c => c.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const ground = e => {
            for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; }
            return [255, 255, 255];
        };
        const faint = new Set();
        for (const e of document.querySelectorAll('body *')) {
            if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
            if ((a + .05) / (b + .05) < 4.5) faint.add(e.tagName + '.' + e.className + ' ' + ((a + .05) / (b + .05)).toFixed(2));
        }
        return [...faint];""")
    assert faint == []
