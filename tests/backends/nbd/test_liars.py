"""Servers that lie, break off, or say nothing: an error in a line, in bounded time."""

from __future__ import annotations

import errno
import random

import pytest

from backends.blocks import read, write
from xen_disk_py.backends import StorageError
from xen_disk_py.backends.nbd import NbdBackend, client, libnbd
from xen_disk_py.errors import BackendError

from .liar import GREETING, READ, Liar, reply


@pytest.fixture
def lie(tmp_path):
    servers = []

    def lie(**what):
        servers.append(Liar(tmp_path / f"liar{len(servers)}", **what))
        return servers[-1]

    yield lie
    for server in servers:
        server.close()


def well(kind, cookie, length):
    return reply(cookie, 0, bytes(length) if kind == READ else b"")


@pytest.mark.parametrize("size", [0, 1000, 1 << 63, (1 << 64) - 1])
def test_a_size_that_is_none(lie, size):
    with pytest.raises(BackendError) as caught:
        NbdBackend(lie(size=size).uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n" * 9, GREETING[:12], bytes(99)]
)
def test_what_is_no_nbd_server(lie, greeting, monkeypatch):
    """One of them sends nothing, and waits."""
    monkeypatch.setattr(libnbd, "_PATIENCE", 0.2)
    server = lie(greeting=greeting)
    with pytest.raises(BackendError) as caught:
        NbdBackend(server.uri)
    assert "\n" not in str(caught.value)
    assert ("has not answered for 0.2 s" in str(caught.value)) == (greeting in (b"", GREETING[:12]))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, errno.EPERM),
        (5, errno.EIO),
        (22, errno.EINVAL),
        (28, errno.ENOSPC),
        (12345, errno.EINVAL),
    ],
)
def test_an_error_for_each_reply(lie, number, expected):
    disk = NbdBackend(lie(answer=lambda kind, cookie, length: reply(cookie, number)).uri)
    for call in (lambda: read(disk, 0, 512), lambda: write(disk, 0, bytes(512))):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - of whatever kind
            call()
        assert expected == caught.value.errno
    disk.close()


@pytest.mark.parametrize("answer", [lambda *_: None, lambda kind, cookie, length: reply(cookie, 5)])
def test_a_flush_that_fails_ends_the_connection_and_not_the_process(lie, answer):
    disk = NbdBackend(lie(answer=answer).uri)
    with pytest.raises(StorageError):
        disk.flush()
    disk.close()


@pytest.mark.parametrize(
    "answer",
    [
        lambda kind, cookie, length: None,
        lambda kind, cookie, length: reply(cookie + 1, 0, bytes(length)),
        lambda kind, cookie, length: b"no NBD at all, but long enough to be a reply",
    ],
)
def test_a_server_that_breaks_off_is_away_and_connected_again(lie, answer, monkeypatch):
    monkeypatch.setattr(client, "_PAUSES", (0.001, 0.001))
    server = lie(answer=answer)
    disk = NbdBackend(server.uri)
    with pytest.raises(StorageError):
        read(disk, 0, 512)
    server.answer = well
    for _ in range(100_000):
        try:
            assert bytes(512) == read(disk, 0, 512)
        except StorageError:
            continue
        break
    else:
        pytest.fail("never again")
    disk.close()


def test_a_server_that_breaks_off_in_the_middle_of_the_data(lie):
    server = lie(answer=lambda kind, cookie, length: reply(cookie, 0, bytes(100)))
    disk = NbdBackend(server.uri)
    many, page = disk.asynchronous, memoryview(bytearray(4096))
    many.submit(0, [page], 0, 4096, "token")
    assert [] == many.collect()
    disk.close()  # it does not wait for the rest


def test_replies_at_random_harm_nobody(lie):
    """Each is a good one with some bytes changed, left out or added; then the server hangs up."""
    dice = random.Random(4)

    def answer(kind, cookie, length):
        data = bytearray(reply(cookie, 0, bytes(length)))
        for _ in range(dice.randint(0, 2)):
            data[dice.randrange(16)] ^= 1 << dice.randrange(8)
        if dice.random() < 0.3:
            data = data[: dice.randrange(len(data))]
        if dice.random() < 0.3:
            data += dice.randbytes(dice.randrange(64))
        return bytes(data)

    server = lie(answer=answer, hangs_up=True)
    answers = {"data": 0, "error": 0}
    for _ in range(100):
        disk = NbdBackend(server.uri)
        try:
            assert bytes(512) == read(disk, 0, 512)
            answers["data"] += 1
        except OSError:
            answers["error"] += 1
        disk.close()
    assert min(answers.values()) > 10
