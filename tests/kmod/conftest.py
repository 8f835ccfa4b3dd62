# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings up two hosts of the lab with the module on them, once per transport, and judges both after every test.

Each test waits for one host or the other most of the time, so the transports are tested side by side when there are processes
for that (pytest-xdist): the first one in the lab, the other one in a lab of its own that ends with the tests.
"""

from __future__ import annotations

import collections
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import build  # noqa: I001  (of this folder, wherever it is copied to)
import debug_kernel
import hosts as tools
import interrupts

TRANSPORTS = ("siw", "rxe")
BUILD = tools.lab_module.REPO / "build"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also what takes long")
    parser.addoption("--debug-kernel", action="store_true", help="on hosts that boot the debug kernel")
    parser.addoption("--transport", choices=TRANSPORTS, help="only with one of them")


#: What there is to say of each transport at the end of a run on the debug kernel.
NOTES = pytest.StashKey()


def side_by_side(config) -> bool:
    """Whether each transport has a process of its own. Known in these, and in the one that they report to."""
    processes = config.workerinput["workercount"] if hasattr(config, "workerinput") else config.getoption("numprocesses", None) or 0
    return processes > 1 and not config.getoption("--transport")


def lab_beside(transport):
    """The lab of a transport that is tested beside the first one."""
    return tools.lab_module.Lab(BUILD / f"lab-{transport}", tools.NAMES)


def pytest_configure(config):
    config.stash[NOTES] = []
    # Also when they are ended from outside, hosts of the debug kernel are not to stay.
    interrupts.once(KeyboardInterrupt)
    if config.getoption("--debug-kernel"):
        tools.slowness = tools.SLOW
    config.addinivalue_line("markers", "long: takes minutes")
    config.addinivalue_line("markers", "above: is about what is above the verbs, and takes long: with one transport, unless all is asked for")
    config.addinivalue_line("markers", "expect(*texts): what the kernel may say in this test though it is an alarm")


def pytest_unconfigure(config):
    if side_by_side(config) and not hasattr(config, "workerinput"):
        # A process that was ended, and not by its tests, has left its lab.
        for transport in TRANSPORTS[1:]:
            lab_beside(transport).down()


def pytest_generate_tests(metafunc):
    if "transport" in metafunc.fixturenames:
        only = metafunc.config.getoption("--transport")
        metafunc.parametrize("transport", [only] if only else TRANSPORTS, scope="session")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests of a transport are of one process: the others must not touch its hosts.

    The way of pytest-xdist itself, groups (loadgroup), does nothing with pytest 9.2, which doesn't take the node ids that it writes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByTransport(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            given = nodeid.rpartition("[")[2].rstrip("]").split("-")
            return next(transport for transport in TRANSPORTS if transport in given)

    return ByTransport(config, log)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    first_alone = not config.getoption("--debug-kernel") and not config.getoption("--transport")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: make test-kmod ARGS=--long"))
        elif first_alone and item.get_closest_marker("above") and item.callspec.params["transport"] != TRANSPORTS[0]:
            item.add_marker(pytest.mark.skip(reason=f"run with {TRANSPORTS[0]}, the verbs are not its subject; with each: make test-kmod ARGS=--long"))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--debug-kernel") or not config.stash[NOTES]:
        return
    terminalreporter.section("debug kernel")
    counts = {what: len(terminalreporter.stats.get(what, [])) for what in ("passed", "failed", "error", "skipped")}
    terminalreporter.line("tests: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    terminalreporter.line(f"checks: {', '.join(debug_kernel.CHECKS)}")
    for note in config.stash[NOTES]:
        terminalreporter.line(note)


@pytest.fixture(scope="session")
def debug_lab(request):
    """A lab of its own, which ends with the tests: nothing else can use hosts with that kernel. Both transports do."""
    lab = tools.lab_module.Lab(BUILD / "lab-debug", tools.NAMES, debug_kernel.kernel() / "vmlinuz")
    request.addfinalizer(lab.down)
    lab.up()
    return lab


@pytest.fixture(scope="session")
def lab(request, transport):
    if request.config.getoption("--debug-kernel"):
        return request.getfixturevalue("debug_lab")
    if side_by_side(request.config) and transport != TRANSPORTS[0]:
        lab = lab_beside(transport)
        request.addfinalizer(lab.down)
    else:
        lab = tools.lab_module.Lab(BUILD / "lab", tools.NAMES)
    tools.two_hosts(lab)
    return lab


class Pair:
    """Both hosts, with the module loaded."""

    def __init__(self, lab, transport):
        self.lab, self.transport = lab, transport
        self.folder = debug_kernel.built() if lab.kernel else build.built()
        self.hosts = [tools.Host(lab, name) for name in tools.NAMES]
        self.hosts[0].peer, self.hosts[1].peer = reversed(self.hosts)
        #: What the kernels have reported in all tests, and how often a host was started again for it.
        self.reports, self.restarts = [], 0
        self.install()

    def install(self):
        tools.lab_module.each(lambda host: host.install(self.folder, self.transport), self.hosts)
        # What the stack itself keeps, like the queue pair of a port.
        self.baseline = [host.do("state") for host in self.hosts]
        self.releases = [host.sh("uname -r").strip() for host in self.hosts]
        if self.lab.kernel:
            assert all(release.endswith(debug_kernel.RELEASE) for release in self.releases), self.releases
            assert all(state["lockdep"] == 1 for state in self.baseline), self.baseline

    def uninstall(self):
        """Unloads the modules. :returns: what is wrong with the hosts, and a note for the summary."""
        wrong, leaks, locks = [], {}, []
        tools.lab_module.each(lambda host: leaks.update({host: host.leaks()}), self.hosts)
        for host in self.hosts:
            lost = [text for text in leaks[host] or [] if "[remote_ram]" in text]
            if lost:
                wrong.append(f"{host.name} has lost objects: {lost}")
            locks.append(host.do("lockdep"))
            # Of leaks it has just been asked; the rest has happened since the last test was judged.
            said = [line for line in host.do("log") if not line.startswith("kmemleak:")]
            said = alarms(said + host.unload())
            if said:
                wrong.append(f"{host.name} says: " + "\n".join(said))
                self.reports += said
        if self.lab.kernel:
            if locks != [1] * len(self.hosts):
                wrong.append(f"lockdep has switched itself off: {locks}")
            if None in leaks.values():
                wrong.append("a host of the debug kernel does not look for leaks")
        found = [text for host in self.hosts for text in leaks[host] or []]
        ours = sum("[remote_ram]" in text for text in found)
        note = (
            f"{self.transport}, on {', '.join(sorted(set(self.releases)))}: lines reported by the kernels: {len(self.reports) or 'none'}; "
            f"lockdep at the end: {', '.join('on' if lock else 'off' for lock in locks)}; "
            f"objects lost (kmemleak): {ours or 'none'} of remote_ram, {len(found) - ours or 'none'} of others; hosts started again: {self.restarts}"
        )
        note += "".join(f"\n  lost, {count} of this: {what}" for what, count in collections.Counter(map(tools.made_by, found)).items())
        return wrong, note

    def restart(self, hurt):
        """Hosts whose kernel was hurt are no judges of the next test."""
        for each in self.hosts:
            each.disconnect()
        self.restarts += len(hurt)
        try:
            self.start_again(hurt)
        except tools.lab_module.LabError:
            # The other one may hold on to what it had with them.
            self.start_again(self.hosts)

    def start_again(self, hosts):
        for host in hosts:
            self.lab.kill(host.name)
        tools.two_hosts(self.lab)
        self.install()

    def judge(self, allowed):
        """Cleans up after a test. :returns: what is wrong with the hosts."""
        found = {}
        tools.lab_module.each(lambda host: found.update({host: self.look_at(host, allowed)}), self.hosts)
        hurt = [host for host in self.hosts if found[host]]
        if hurt:
            self.restart(hurt)
        return [text for host in hurt for text in found[host]]

    def look_at(self, host, allowed):
        """Cleans a host up. :returns: what is wrong with it."""
        wrong, baseline = [], self.baseline[self.hosts.index(host)]
        try:
            if host.cut:
                host.sh(tools.JOIN)
            host.do("clean")
            try:
                tools.wait_for(lambda: host.do("state") == baseline, 15)
            except AssertionError:
                wrong.append(f"{host.name} keeps {host.do('state')}, had {baseline}")
            said = alarms(host.do("log"), allowed)
            if said:
                wrong.append(f"{host.name} says: " + "\n".join(said))
                self.reports += said
        except (tools.HostGone, OSError, AssertionError) as err:
            wrong.append(f"{err}; its console:\n{tools.console(self.lab, host.name)}")
        return wrong


def alarms(said, allowed=()):
    """Alarms in lines of the kernel's log, each with what follows it."""
    found = []
    for at, line in enumerate(said):
        if any(text in line for text in tools.ALARMS) and not any(text in line for text in allowed):
            found += [x for x in said[at : at + 40] if x not in found]
    return found


@pytest.fixture(scope="session")
def pair(lab, transport, request):
    pair = Pair(lab, transport)
    yield pair
    wrong, note = pair.uninstall()
    request.config.stash[NOTES].append(note)
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def hosts(pair, request):
    """Both hosts, clean before the test and judged after it."""
    marker = request.node.get_closest_marker("expect")
    yield pair.hosts
    wrong = pair.judge(marker.args if marker else ())
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def ram(hosts, request):
    """Makes files: ``ram(mib)``, on both hosts, filled on the source."""
    made = []

    def make(mib=6, fill=True):
        file = tools.File(hosts, f"t{len(made)}.ram", mib).create()
        made.append(file)
        return file.fill() if fill else file

    return make
