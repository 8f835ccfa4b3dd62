# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _qmp_vms
from ansible_collections.hecaton.fleet.plugins.module_utils._qmp import QmpClient, QmpError

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 13, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}\r\n'


class Server:
    """A QEMU as far as QMP goes: one client at a time, each request answered by ``answer(request, send)``."""

    def __init__(self, path, answer=None, greeting=GREETING):
        self.path = str(path)
        self.answer = answer or (lambda request, send: send({"return": {}, "id": request["id"]}))
        self.greeting = greeting
        self.requests = []
        self._ending = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._listener.settimeout(0.05)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        self._ending.set()
        self._thread.join(5)
        self._listener.close()

    def _serve(self):
        while not self._ending.is_set():
            try:
                client, _address = self._listener.accept()
            except socket.timeout:
                continue
            with client:
                client.settimeout(0.05)
                self._talk(client)

    def _talk(self, client):
        def send(message):
            client.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n")

        pending = b""
        try:
            if self.greeting is not None:
                send(self.greeting)
            while not self._ending.is_set():
                try:
                    data = client.recv(4096)
                except socket.timeout:
                    continue
                if not data:
                    return
                pending += data
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    self.requests.append(request["execute"])
                    if request["execute"] == "qmp_capabilities":
                        send({"return": {}, "id": request["id"]})
                    elif self.answer(request, send) == "hang up":
                        return
        except OSError:
            return


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(answer=None, path=None, **more):
        servers.append(Server(path or tmp_path / "qmp.sock", answer, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_an_answer_is_what_follows_return(serve):
    server = serve(lambda request, send: send({"return": {"status": request["arguments"]["which"]}, "id": request["id"]}))
    with QmpClient(server.path, 5) as client:
        assert client.execute("query-status", {"which": "running"}) == {"status": "running"}
        assert client.peer_pid() == os.getpid()
    assert server.requests == ["qmp_capabilities", "query-status"]


def test_an_error_of_qemu_has_its_class_and_its_sentence(serve):
    server = serve(lambda request, send: send({"error": {"class": "CommandNotFound", "desc": "no such command"}, "id": request["id"]}))
    with QmpClient(server.path, 5) as client, pytest.raises(QmpError, match="frob: no such command") as caught:
        client.execute("frob")
    assert caught.value.kind == "CommandNotFound"


def test_events_between_answers_are_kept_in_order(serve):
    def answer(request, send):
        send({"event": "STOP", "timestamp": {}})
        send({"event": "RESUME", "timestamp": {}})
        send({"return": 1, "id": request["id"]})
        send({"event": "MIGRATION", "data": {"status": "active"}})

    with QmpClient(serve(answer).path, 5) as client:
        assert client.execute("a") == 1
        found = client.events()
        deadline = time.monotonic() + 5
        while len(found) < 3 and time.monotonic() < deadline:
            found += client.events(wait=0.5)
        assert [event["event"] for event in found] == ["STOP", "RESUME", "MIGRATION"]
        assert client.events() == []


def test_events_are_there_when_the_connection_is_lost_after_them(serve):
    def answer(request, send):
        send({"event": "RESUME", "timestamp": {}})
        return "hang up"

    with QmpClient(serve(answer).path, 5) as client:
        with pytest.raises(QmpError):
            client.execute("a")
        assert [event["event"] for event in client.events()] == ["RESUME"]
        with pytest.raises(QmpError) as caught:
            client.events()
        assert caught.value.kind == "ConnectionError"


def test_waiting_for_an_event_ends_without_one(serve):
    with QmpClient(serve().path, 5) as client:
        begun = time.monotonic()
        assert client.events(wait=0.2) == []
        assert 0.15 < time.monotonic() - begun < 2


def test_an_answer_in_pieces_is_put_together(serve):
    def answer(request, send):
        text = json.dumps({"return": "x" * 200000, "id": request["id"]}).encode() + b"\r\n"
        for start in range(0, len(text), 70000):
            send(text[start : start + 70000])
            time.sleep(0.02)

    with QmpClient(serve(answer).path, 5) as client:
        assert len(client.execute("a")) == 200000


def test_a_silent_qemu_is_given_up(serve):
    server = serve(lambda request, send: None)
    with QmpClient(server.path, 0.3) as client, pytest.raises(QmpError, match="gave no answer for 0.3 s") as caught:
        client.execute("query-status")
    assert caught.value.kind == "ConnectionError"


def test_the_late_answer_to_one_command_is_not_taken_for_the_next(serve):
    def answer(request, send):
        if request["execute"] == "slow":
            time.sleep(0.5)
        send({"return": request["execute"], "id": request["id"]})

    with QmpClient(serve(answer).path, 0.3) as client:
        with pytest.raises(QmpError):
            client.execute("slow")
        time.sleep(0.4)
        assert client.execute("quick") == "quick"


def test_a_connection_that_is_lost_is_an_error_and_not_a_hang(serve):
    server = serve(lambda request, send: "hang up")
    with QmpClient(server.path, 5) as client:
        with pytest.raises(QmpError, match="closed the connection") as caught:
            client.execute("quit")
        assert caught.value.kind == "ConnectionError"
        with pytest.raises(QmpError, match="lost QEMU|closed the connection"):
            client.execute("query-status")


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH\r\n", {"hello": 1}, b"5\n", b"[]\n", b"\xff\xfe\n"])
def test_what_is_not_qmp_is_refused(serve, greeting):
    with pytest.raises(QmpError, match="does not speak QMP"):
        QmpClient(serve(greeting=greeting).path, 5)


def test_garbage_instead_of_an_answer_is_refused(serve):
    with QmpClient(serve(lambda request, send: send(b"{garbage\n")).path, 5) as client, pytest.raises(QmpError, match="does not speak QMP"):
        client.execute("a")


def test_a_qemu_without_a_greeting_is_given_up(serve):
    with pytest.raises(QmpError, match="gave no answer for 0.3 s"):
        QmpClient(serve(greeting=None).path, 0.3)


def test_no_socket_and_no_listener_are_told_apart_from_a_busy_one(tmp_path):
    with pytest.raises(QmpError, match="cannot reach QEMU") as caught:
        QmpClient(str(tmp_path / "none.sock"), 1)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(tmp_path / "dead.sock"))
    left_behind.close()
    with pytest.raises(QmpError, match="cannot reach QEMU") as caught:
        QmpClient(str(tmp_path / "dead.sock"), 1)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_a_second_client_waits_until_the_first_has_gone(serve):
    server = serve()
    first = QmpClient(server.path, 5)
    threading.Timer(0.3, first.close).start()
    begun = time.monotonic()
    with QmpClient(server.path, 5) as second:
        assert second.execute("a") == {}
    assert time.monotonic() - begun > 0.2


def test_a_full_queue_of_clients_is_not_waited_for_without_limit(tmp_path):
    path = str(tmp_path / "hung.sock")
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(path)
        hung.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for number in range(2)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(path)
        begun = time.monotonic()
        with pytest.raises(QmpError, match="gave no answer for 0.4 s"):
            QmpClient(path, 0.4)
        assert time.monotonic() - begun < 3
        for client in waiting:
            client.close()


# ---- the VMs of the driver qmp

OBJECTS = {
    ("/machine", "type"): "pc-q35-10.0-machine",
    ("/machine/unattached/device[0]", "type"): "host-x86_64-cpu",
    ("/objects/pc.ram", "share"): True,
    ("/objects/pc.ram", "mem-path"): "/dev/shm/x",
    ("/machine/peripheral/gpu", "host"): "0000:65:00.0",
    ("/machine/peripheral-anon/device[1]", "free-page-hint"): True,
}
CHILDREN = {
    "/objects": {"pc.ram": "memory-backend-file", "rng0": "rng-random"},
    "/machine/peripheral": {"gpu": "vfio-pci"},
    "/machine/peripheral-anon": {"device[0]": "virtio-net-pci", "device[1]": "virtio-balloon-pci"},
}
ANSWERS = {
    "query-status": {"status": "running"},
    "query-uuid": {"UUID": "0"},
    "query-memory-size-summary": {"base-memory": 1 << 28},
    "query-cpus-fast": [{"qom-path": "/machine/unattached/device[0]"}],
    "query-block": [],
    "query-migrate": {},
    "query-block-jobs": [],
    "calc-dirty-rate": {},
}


def answer_like_qemu(rates=()):
    rates = iter(rates)

    def answer(request, send):
        command, arguments = request["execute"], request.get("arguments", {})
        error = {"error": {"class": "GenericError", "desc": "Property not found"}, "id": request["id"]}
        if command == "qom-list":
            found = [{"name": "type", "type": "string"}]
            found += [{"name": name, "type": f"child<{kind}>"} for name, kind in CHILDREN[arguments["path"]].items()]
            send({"return": found, "id": request["id"]})
        elif command == "qom-get":
            key = (arguments["path"], arguments["property"])
            send({"return": OBJECTS[key], "id": request["id"]} if key in OBJECTS else error)
        elif command == "query-dirty-rate":
            send({"return": next(rates), "id": request["id"]})
        else:
            send({"return": ANSWERS[command], "id": request["id"]})

    return answer


@pytest.fixture
def vm_socket(tmp_path):
    (tmp_path / "vm" / "web2").mkdir(parents=True)
    return tmp_path / "vm" / "web2" / "agent.sock"


def test_what_is_asked_of_a_qemu(serve, tmp_path, vm_socket):
    serve(answer_like_qemu(), vm_socket)
    with _qmp_vms.open_agent(str(tmp_path), "web2") as client:
        found = _qmp_vms.query(client)
    assert found["query-status"] == {"status": "running"}
    assert (found["machine"], found["cpu"]) == ("pc-q35-10.0-machine", "host-x86_64-cpu")
    assert found["memory"] == [{"id": "pc.ram", "type": "memory-backend-file", "mem-path": "/dev/shm/x", "share": True, "hugetlb": None}]
    assert found["objects"] == ["memory-backend-file", "rng-random"]
    assert (found["devices"][0]["type"], found["devices"][0]["host"], found["devices"][0]["id"]) == ("vfio-pci", "0000:65:00.0", "gpu")
    assert found["devices"][1] == {"type": "virtio-net-pci"}
    assert found["devices"][2] == {"type": "virtio-balloon-pci", "free-page-hint": True}
    # The listening process is this one.
    assert any("pytest" in argument for argument in found["arguments"])


def test_a_qemu_that_does_not_run_is_none_and_a_busy_one_an_error(serve, tmp_path, vm_socket):
    assert _qmp_vms.open_agent(str(tmp_path), "web2") is None
    server = serve(None, vm_socket)
    with QmpClient(server.path, 5), pytest.raises(QmpError, match="gave no answer"):
        _qmp_vms.open_agent(str(tmp_path), "web2", timeout=0.3)


def test_vms_are_those_configured_and_those_running(tmp_path):
    assert _qmp_vms.names(str(tmp_path / "none"), str(tmp_path / "none")) == []
    config = tmp_path / "config"
    config.mkdir()
    for name in ("a.conf", "web1.conf", ".hidden.conf", "web1.conf.bak"):
        (config / name).touch()
    for name in ("web1", "left", "stopped"):
        (tmp_path / "vm" / name).mkdir(parents=True)
    (tmp_path / "vm" / "left" / "agent.sock").touch()
    assert _qmp_vms.names(str(config), str(tmp_path)) == ["a", "left", "web1"]


def test_dirty_rates_are_collected_when_they_are_ready(serve, tmp_path, vm_socket):
    server = serve(answer_like_qemu([{"status": "measuring"}, {"status": "measured", "dirty-rate": 12}]), vm_socket)
    collect = _qmp_vms.start_dirty_rates(str(tmp_path), ["web2", "gone"], 1)
    assert collect(5) == {"web2": 12.0, "gone": "its QEMU has ended"}
    assert "calc-dirty-rate" in server.requests


def test_a_dirty_rate_that_never_comes_is_given_up(serve, tmp_path, vm_socket):
    serve(answer_like_qemu([{"status": "measuring"}] * 100), vm_socket)
    collect = _qmp_vms.start_dirty_rates(str(tmp_path), ["web2"], 1)
    assert collect(0.3) == {"web2": "QEMU gave no result in time"}
