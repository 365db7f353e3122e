"""Commands to a process that serves: answered, whatever clients do; by root's leave alone."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import threading
from contextlib import closing, suppress

import pytest

from xen_disk_py.errors import DeviceError, UsageError, XenUnavailable
from xen_disk_py.recovery import control as module
from xen_disk_py.recovery import record as records
from xen_disk_py.recovery.control import Control, ask
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record
from xen_disk_py.xenbus.states import Address

ADDRESS = Address(0, 5, 51728, "vbd3")


@pytest.fixture
def directory(tmp_path):
    """A directory whose name is longer than a socket's may be."""
    path = tmp_path / ("long" * 30)
    path.mkdir(mode=0o700)
    return str(path)


@pytest.fixture
def record(directory):
    with Record(directory, ADDRESS) as record:
        record.describe(Facts(pid=os.getpid()))
        yield record
    assert [] == os.listdir(directory)


@pytest.fixture
def control(record):
    with Control(record) as control:
        control.register("echo", lambda request: {"got": request})
        control.start()
        yield control


def connected(record):
    fd = os.open(os.path.dirname(record.path), os.O_PATH)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(f"/proc/self/fd/{fd}/{os.path.basename(record.path)}.control")
    os.close(fd)
    return closing(client)


def rest(client):
    """Return what comes until the other end closes; an end that does not read resets."""
    found = b""
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


@pytest.mark.usefixtures("control")
def test_a_handler_answers(directory):
    value = {"text": "☃\n" * 1000, "number": 1}
    assert {"got": {"value": value}} == ask(directory, ADDRESS, "echo", value=value)
    assert {"got": {}} == ask(directory, ADDRESS, "echo")


@pytest.mark.parametrize("error", [UsageError, DeviceError])
def test_what_a_handler_raises_is_raised_again(directory, control, error):
    def fail(request):
        raise error("what to do")

    control.register("fail", fail)
    with pytest.raises(error, match=r"^what to do$"):
        ask(directory, ADDRESS, "fail")


def test_a_handler_of_nonsense_is_an_error_and_no_end(directory, control, caplog):
    control.register("raise", lambda request: {}["nothing"])
    control.register("odd", lambda request: {"odd": object()})
    for verb, said in (("raise", "KeyError"), ("odd", "TypeError")):
        with pytest.raises(DeviceError, match=said):
            ask(directory, ADDRESS, verb)
    assert {"got": {}} == ask(directory, ADDRESS, "echo")
    assert 2 == caplog.text.count("a command failed")


@pytest.mark.usefixtures("control")
def test_an_unknown_verb(directory):
    with pytest.raises(DeviceError, match=r"does not know that command.*xen-disk upgrade"):
        ask(directory, ADDRESS, "dance")


@pytest.mark.parametrize(
    "line", [b"[]", b"nonsense", b"\xff\xfe", b"[" * 60000, b'{"verb": ["echo"]}', b"{}", b""]
)
def test_lines_of_nonsense(directory, control, record, line):
    with connected(record) as client:
        client.sendall(line + b"\n")
        assert "error" in json.loads(rest(client))
    assert {"got": {}} == ask(directory, ADDRESS, "echo")


def talk(client, word):
    """Say the same until the other end has had enough."""
    with suppress(OSError):
        while True:
            client.sendall(word)


def test_clients_that_say_too_much_or_nothing_or_leave(directory, control, record, monkeypatch):
    with connected(record) as client:
        talk(client, b"x" * 65536)
        assert b"" == rest(client)
    monkeypatch.setattr(module, "_CLIENT", 0.01)
    with connected(record) as client:
        assert b"" == rest(client)
    with connected(record) as client:  # a byte now and then does not make it longer
        talk(client, b"x")
        assert b"" == rest(client)
    monkeypatch.undo()
    with connected(record) as client:
        client.sendall(b'{"verb": "echo"')
    assert {"got": {}} == ask(directory, ADDRESS, "echo")


def test_who_does_not_read_the_answer_is_left(directory, control, record, monkeypatch):
    much = {"much": "x" * 900_000}

    def hurry(request):
        monkeypatch.setattr(module, "_CLIENT", 0.01)
        return much

    control.register("much", lambda request: much)
    control.register("hurry", hurry)
    assert much == ask(directory, ADDRESS, "much")
    with connected(record) as client:
        client.sendall(b'{"verb": "hurry"}\n')
        closed = select.poll()
        closed.register(client, 0)
        assert closed.poll(30_000)  # nothing was read
        monkeypatch.undo()
        assert {"got": {}} == ask(directory, ADDRESS, "echo")
        assert len(rest(client)) < 900_000


@pytest.mark.usefixtures("control")
def test_many_at_once_wait_for_their_turns(directory):
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(ask(directory, ADDRESS, "echo", n=n)))
        for n in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(range(40)) == sorted(answer["got"]["n"] for answer in found)


def test_somebody_else_is_not_listened_to(control, monkeypatch):
    monkeypatch.setattr(control, "_owner", 1)
    peer = type("Peer", (), {"getsockopt": lambda *_: module._PEER.pack(1, 1234, 1234)})()
    control._converse(peer)  # asks it nothing: it has no other method


def test_only_root_gets_to_it(directory, control, record):
    assert stat.S_IMODE(os.stat(f"{record.path}.control").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[]", b"7", b"{}", b'{"answer": 5}', b'{"answer": null}', b"[" * 100_000],
)
def test_a_process_that_a_guest_has_taken_over_is_not_believed(directory, record, line):
    with Control(record) as control:

        def play():
            peer, _ = control._listener.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(line + b"\n")

        control._listener.setblocking(True)
        thread = threading.Thread(target=play)
        thread.start()
        with pytest.raises(DeviceError, match="answers what makes no sense"):
            ask(directory, ADDRESS, "echo")
        thread.join()


def test_no_error_reaches_the_terminal_as_it_stands(directory, control):
    def fail(request):
        raise DeviceError("\x1b[2J" + "x" * 9000)

    control.register("fail", fail)
    with pytest.raises(DeviceError, match="x") as raised:
        ask(directory, ADDRESS, "fail")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 2100


def test_nobody_serves(directory):
    with pytest.raises(DeviceError, match="no process that lives serves xvdb"):
        ask(directory, ADDRESS, "echo")


def test_one_of_a_version_without_commands(directory, record, monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 0)
    with pytest.raises(DeviceError, match=r"takes no commands.*xen-disk upgrade"):
        ask(directory, ADDRESS, "echo")


def test_one_that_is_stopped(directory, record):
    with Control(record), pytest.raises(DeviceError, match=r"does not answer within 0\.01 s"):
        ask(directory, ADDRESS, "echo", timeout=0.01)


def test_a_directory_that_is_not_ours(directory, record, monkeypatch):
    monkeypatch.setattr(records, "find", lambda *_: None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(XenUnavailable, match="run as root"):
        ask(directory, ADDRESS, "echo")


def test_the_socket_of_a_killed_process_is_bound_anew(directory, record):
    before = Control(record)
    before._listener.close()  # as the kernel does; the name stays
    with Control(record) as control:
        control.register("echo", lambda request: {"got": request})
        control.start()
        assert {"got": {}} == ask(directory, ADDRESS, "echo")
    before.close()


def test_a_name_that_is_taken_ends_no_disk(directory, record, caplog):
    os.mkdir(f"{record.path}.control")
    with Control(record) as control:
        control.start()
        assert "this disk takes no commands (xen-disk filter)" in caplog.text
    os.rmdir(f"{record.path}.control")


def test_the_socket_goes_with_a_record_that_was_left_empty(directory):
    record = Record(directory, ADDRESS)
    Control(record).close()
    record._facts.clear()
    record.leave()
    assert 2 == len(os.listdir(directory))
    records.sweep(directory)
    assert [] == os.listdir(directory)
