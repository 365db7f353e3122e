"""A disk on an NBD server, through the contract that every disk keeps."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import threading
import time

import pytest

from backends.blocks import read, write
from xen_disk_py.backends import StorageError
from xen_disk_py.backends.asynchronous import READ, WRITE
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.copies import SpareMemory
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.nbd import NbdBackend, libnbd, wire
from xen_disk_py.backends.nbd import backend as backend_module
from xen_disk_py.backends.nbd import client as client_module
from xen_disk_py.errors import BackendError, UsageError

from .conftest import stop

MIB = 1 << 20
PATIENCE = 30.0


class OnAServer(BackendConformance):
    @pytest.fixture(autouse=True)
    def _server(self, serve):
        self.server = serve(*self.command)

    def open_disk(self, tmp_path):
        return NbdBackend(self.server.uri)


class TestMemory(OnAServer):
    command = ("nbdkit", "memory", "4M")


class TestSmallRequests(OnAServer):
    """A server that takes no more than 64 KiB at once."""

    command = (
        "nbdkit",
        "--filter=blocksize-policy",
        "memory",
        "4M",
        "blocksize-minimum=512",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    )


class TestEncrypted(OnAServer):
    """As if it were: requests and replies go through libnbd."""

    command = ("nbdkit", "memory", "4M")

    @pytest.fixture(autouse=True)
    def _by_libnbd(self, monkeypatch):
        monkeypatch.setattr(backend_module, "is_plain", lambda where: False)


class TestLittleAtATime(OnAServer):
    """What arrives is cut anywhere, replies' headers as well."""

    command = ("nbdkit", "memory", "4M")

    @pytest.fixture(autouse=True)
    def _little(self, monkeypatch):
        monkeypatch.setattr(wire, "_BUFFER", 41)
        monkeypatch.setattr(wire, "_PIECES", 3)


class TestReadOnly(OnAServer):
    command = ("nbdkit", "-r", "memory", "4M")


@pytest.fixture
def qcow2(tmp_path):
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    return path


class TestQcow2(BackendConformance):
    @pytest.fixture(autouse=True)
    def _server(self, serve, qcow2):
        self.server = serve("qemu-nbd", "-f", "qcow2", "--discard=unmap", str(qcow2))

    def open_disk(self, tmp_path):
        return NbdBackend(self.server.uri)


def test_a_command_is_one_server_whatever_it_says_of_several_connections(tmp_path):
    """Each connection would start another, whose disk is another."""
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")
    disk = NbdBackend("[ nbdkit --exit-with-parent memory 1M ]")
    try:
        pages = [bytes([number + 1]) * 4096 for number in range(16)]
        many = disk.asynchronous
        for number, page in enumerate(pages):
            many.submit(WRITE, [memoryview(page)], 4096 * number, 4096, number)
        while many.unfinished:
            select.select([many], [], [], PATIENCE)
            many.collect()
        for _ in range(2):
            assert pages == [read(disk, 4096 * number, 4096) for number in range(16)]
    finally:
        disk.close()


class TestCommand(BackendConformance):
    """A server of our own, which ends with the disk."""

    @pytest.fixture(autouse=True)
    def _command(self, tmp_path):
        if shutil.which("nbdkit") is None:
            pytest.skip("needs nbdkit")
        image = tmp_path / "disk.raw"
        image.write_bytes(bytes(4 * MIB))
        self.path = f"[ nbdkit --exit-with-parent file {image} ]"

    def open_disk(self, tmp_path):
        return NbdBackend(self.path)


def test_it_is_opened_by_name(serve):
    server = serve("nbdkit", "memory", "1M")
    with_options = {"path": server.uri, "connections": "2"}
    disk = open_backend("nbd", with_options)
    assert (MIB, 512, False) == (disk.size, disk.sector_size, disk.read_only)
    disk.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nbdkit", "memory", "1000"), "1000 bytes, not a positive multiple of the sector, 512"),
        (
            (
                "nbdkit",
                "--filter=blocksize-policy",
                "memory",
                "1M",
                "blocksize-minimum=8K",
                "blocksize-preferred=8K",
                "blocksize-maximum=64K",
            ),
            "smallest request is 8192 bytes",
        ),
    ],
)
def test_a_disk_that_no_guest_could_use(serve, arguments, message):
    server = serve(*arguments)
    with pytest.raises(BackendError, match=message):
        NbdBackend(server.uri)


def test_a_server_that_is_not_there_is_named(tmp_path):
    uri = f"nbd+unix:///?socket={tmp_path}/nobody"
    with pytest.raises(BackendError, match="No such file or directory") as caught:
        NbdBackend(uri)
    assert uri in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nbd://localhost:1/x", "Connection refused: is the server running"),
        ("nbd+unix:///?socket=/nonexistent", "No such file or directory: is the server running"),
        ("[ nosuchprogram ]", "no program nosuchprogram in /usr/.*: install it, or give its path"),
        ("[ ./nosuchprogram ]", r"there is no program \./nosuchprogram: install it"),
        ("[ nbdkit file /nonexistent ]", r"\]: nbdkit: error: .*No such file or directory"),
        ("[ true ]", "it has to be an NBD server that takes its socket from systemd"),
    ],
)
def test_what_to_do_is_said(path, says):
    with pytest.raises(BackendError, match=says):
        NbdBackend(path)


def test_a_server_is_not_looked_for_where_a_stranger_may_put_one(tmp_path, monkeypatch):
    """But one that is named by its path is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f":.:{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "xen-disk-server").write_text("#!/bin/sh\necho started >&2\n")
    (tmp_path / "xen-disk-server").chmod(0o755)
    with pytest.raises(BackendError, match="there is no program xen-disk-server in /usr/"):
        NbdBackend("[ xen-disk-server ]")
    for path in ("./xen-disk-server", f"{tmp_path}/xen-disk-server"):
        with pytest.raises(BackendError, match=r" \]: started"):
            NbdBackend(f"[ {path} ]")


def test_a_server_of_our_own_that_does_not_end_is_killed(monkeypatch, caplog):
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")
    monkeypatch.setattr(libnbd, "_TERM", 0.1)
    disk = NbdBackend(["nbdkit", "memory", "1M"])
    monkeypatch.setattr(libnbd.Connection, "_has_ended", lambda connection: False)
    disk.close()
    assert "has not ended 0.1 s after SIGTERM: killed" in caplog.text


@pytest.mark.parametrize(
    ("words", "option", "survives"),
    [
        (["memory", "1M"], None, False),
        (["--filter=cow", "pattern", "1M"], None, False),
        (["pattern", "1M"], None, True),
        (["pattern", "1M"], False, False),
        (["memory", "1M"], True, True),
    ],
)
def test_what_a_server_keeps_in_memory_ends_with_it(words, option, survives):
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")
    disk = NbdBackend(["nbdkit", *words], survives=option)
    assert survives is disk.survives
    disk.close()


def test_a_command_that_is_none():
    with pytest.raises(UsageError, match="stands between"):
        NbdBackend("[ nbdkit")


def test_a_server_that_comes_back_is_used_again(serve, tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    server = serve("nbdkit", "file", str(image))
    disk = NbdBackend(server.uri)
    write(disk, 0, b"a" * 512)
    server.kill()
    fails(disk)
    server.start()
    wait_for(disk)
    assert b"a" * 512 == read(disk, 0, 512)
    disk.close()


def test_what_a_killed_server_had_not_flushed_is_written_again(serve, qcow2, tmp_path):
    """qemu-nbd keeps a qcow2's new tables in its memory until it is told to flush."""
    server = serve("qemu-nbd", "-f", "qcow2", str(qcow2))
    disk = NbdBackend(server.uri)
    expected = bytearray(8 * MIB)
    for number, offset in enumerate(range(0, 8 * MIB, 256 << 10)):
        data = bytes([number + 1]) * 4096
        write(disk, offset, data)
        expected[offset : offset + 4096] = data
    server.kill()
    with pytest.raises(StorageError):
        disk.flush()
    server.start()
    wait_for(disk)
    disk.flush()
    disk.close()
    server.kill()
    raw = tmp_path / "disk.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(raw)], check=True
    )
    assert expected == raw.read_bytes()


def test_another_disk_on_the_same_socket_is_not_written_to(serve, tmp_path):
    images = [tmp_path / name for name in ("one.raw", "two.raw")]
    for image, size in zip(images, (MIB, 2 * MIB)):
        image.write_bytes(bytes(size))
    server = serve("nbdkit", "file", str(images[0]))
    disk = NbdBackend(server.uri)
    write(disk, 0, b"a" * 512)
    server.kill()
    other = serve("nbdkit", "file", str(images[1]))
    other.path.rename(server.path)
    client = disk._client
    refused = threading.Event()
    replay = client._replay
    client._replay = lambda connection: (refused.set(), replay(connection))
    fails(disk)
    assert refused.wait(30)
    disk.close()
    assert bytes(2 * MIB) == images[1].read_bytes()


def test_where_no_thread_is_to_be_had_the_next_request_asks_for_one(serve, tmp_path, monkeypatch):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    server = serve("nbdkit", "file", str(image))
    disk = NbdBackend(server.uri)
    server.kill()

    def none_left(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        fails(disk)
        fails(disk)
    server.start()
    wait_for(disk)
    disk.close()


def test_closing_does_not_wait_for_a_server(serve):
    server = serve("nbdkit", "memory", "1M")
    disk = NbdBackend(server.uri)
    server.kill()
    fails(disk)
    disk.close()
    disk.close()


def test_writes_wait_for_a_flush_when_too_much_is_not_flushed(serve, monkeypatch):
    """They are no errors: a guest that writes fast would get them."""
    monkeypatch.setattr(client_module, "UNFLUSHED", 64 << 10)
    server = serve("nbdkit", "memory", "1M")
    disk = NbdBackend(server.uri)
    many, page, errors = disk.asynchronous, memoryview(bytes([7]) * 4096), []
    for number in range(500):
        many.submit(WRITE, [page], 4096 * (number % 256), 4096, number)
        while many.unfinished > (24 if number < 499 else 0):
            select.select([many], [], [], PATIENCE)
            errors += [done.error for done in many.collect()]
    assert [None] * 500 == errors
    assert bytes([7]) * MIB == read(disk, 0, MIB)
    assert not many._waiting
    disk.close()


def test_writes_that_wait_for_a_flush_end_with_their_server(serve, monkeypatch):
    server = serve("nbdkit", "memory", "1M")
    disk = NbdBackend(server.uri)
    many, page = disk.asynchronous, memoryview(bytes(4096))
    write(disk, 0, bytes(8192))
    monkeypatch.setattr(client_module, "UNFLUSHED", 8 << 10)
    many._is_flushing = True  # which the server does not answer
    for number in range(4):
        many.submit(WRITE, [page], 0, 4096, number)
    assert many._waiting
    server.kill()
    errors = []
    while many.unfinished:
        select.select([many], [], [], PATIENCE)
        errors += [type(done.error) for done in many.collect()]
    assert [StorageError] * 4 == errors
    disk.close()


@pytest.mark.parametrize("is_plain", [True, False])
def test_large_requests_go_over_a_socket_that_takes_less_at_once(serve, monkeypatch, is_plain):
    monkeypatch.setattr(backend_module, "is_plain", lambda where: is_plain)
    disk = NbdBackend(serve("nbdkit", "memory", "8M").uri, connections=1)
    many, data = disk.asynchronous, [bytes([number + 1]) * MIB for number in range(8)]
    for operation in (WRITE, READ):
        pages = [memoryview(bytearray(each if operation == WRITE else MIB)) for each in data]
        errors = []
        for number, page in enumerate(pages):
            many.submit(operation, [page], number * MIB, MIB, number)
        while many.unfinished:
            select.select([many], [], [], PATIENCE)
            errors += [done.error for done in many.collect()]
        assert [None] * 8 == errors
    assert data == [bytes(page) for page in pages]
    disk.close()


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_server_that_does_not_answer_is_given_up(serve, tmp_path, monkeypatch, is_plain):
    """And is a disk again when it does."""
    monkeypatch.setattr(backend_module, "is_plain", lambda where: is_plain)
    image = tmp_path / "disk.raw"
    image.write_bytes(b"a" * MIB)
    server = serve("nbdkit", "file", str(image))
    disk = NbdBackend(server.uri, timeout=1)
    patience = libnbd._PATIENCE
    monkeypatch.setattr(libnbd, "_PATIENCE", 0.2)  # for the server that is stopped
    server.stop()
    many, page, errors = disk.asynchronous, memoryview(bytearray(512)), []
    for number in range(4):
        many.submit(READ, [page], 512 * number, 512, number)
    while many.unfinished:
        select.select([many], [], [], PATIENCE)
        errors += [type(done.error) for done in many.collect()]
    assert [StorageError] * 4 == errors
    fails(disk)  # at once: nobody is there
    monkeypatch.setattr(libnbd, "_PATIENCE", patience)
    server.resume()
    wait_for(disk)
    disk.close()


def test_a_server_of_our_own_that_does_not_answer_is_killed(tmp_path):
    """Else it could do what it has taken when others have done more."""
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")
    pid_file = tmp_path / "pid"
    disk = NbdBackend(f"[ nbdkit -f -P {pid_file} memory 1M ]", timeout=1)
    stopped = int(pid_file.read_text())
    stop(stopped)
    fails(disk)
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    wait_for(disk)
    disk.close()


def test_a_request_has_its_time_however_many_others_are_answered(serve):
    server = serve("nbdkit", "--filter=delay", "memory", "1M", "rdelay=1000")
    disk = NbdBackend(server.uri, timeout=1)
    many, page, done = disk.asynchronous, memoryview(bytearray(512)), {}
    many.submit(READ, [page], 0, 512, "read")
    while "read" not in done:
        if many.unfinished < 2:
            many.submit(WRITE, [memoryview(bytes(512))], 512, 512, "write")
        select.select([many], [], [], PATIENCE)
        done.update(many.collect())
        time.sleep(0.01)  # a hundred others are enough
    assert isinstance(done["read"], StorageError)
    disk.close()


def test_an_answer_that_is_there_counts_however_late_we_look(serve):
    disk = NbdBackend(serve("nbdkit", "memory", "1M").uri, timeout=1)
    many, page = disk.asynchronous, memoryview(bytes(512))
    many.submit(WRITE, [page], 0, 512, "write")
    many._first.progress(select.POLLOUT)  # it is sent
    answered = select.poll()
    answered.register(many._first.fileno(), select.POLLIN)
    assert answered.poll(PATIENCE * 1000)
    many._look_at_time(0.0)
    many._timer.start(0)  # and the time is over, too
    assert [("write", None)] == many.collect()
    disk.close()


def test_a_server_of_our_own_that_is_stopped_ends_with_the_disk(tmp_path):
    """SIGTERM alone would wait until somebody lets it continue, and closing would wait for it."""
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")
    pid_file = tmp_path / "pid"
    disk = NbdBackend(f"[ nbdkit -f -P {pid_file} memory 1M ]")
    stopped = int(pid_file.read_text())
    stop(stopped)
    closing = threading.Thread(target=disk.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    has_ended = not closing.is_alive()
    if not has_ended:
        os.kill(stopped, signal.SIGKILL)
    assert has_ended


def test_a_server_that_was_started_again_stays(tmp_path):
    """libnbd has it end with the thread that started it."""
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")
    pid_file = tmp_path / "pid"
    disk = NbdBackend(f"[ nbdkit -f -P {pid_file} memory 1M ]")
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    fails(disk)
    wait_for(disk)
    starter = disk.asynchronous._thread
    for _ in range(200):
        read(disk, 0, 512)
    assert starter.is_alive()
    disk.close()
    assert not starter.is_alive()


def test_no_time_is_no_limit():
    with pytest.raises(UsageError, match="timeout=-1"):
        NbdBackend("nbd://localhost", timeout=-1)


def fails(disk):
    """A request fails because the server is away."""
    with pytest.raises(StorageError):
        read(disk, 0, 512)


def wait_for(disk):
    """Wait until the disk answers again."""
    pause = threading.Event()
    for _ in range(3000):
        try:
            read(disk, 0, 512)
        except StorageError:
            pause.wait(0.01)
        else:
            return
    raise AssertionError("the disk does not answer")


def test_a_large_read_fills_scattered_pages_and_is_not_copied(serve):
    """Between small ones, so that replies are cut in all ways."""
    disk = NbdBackend(serve("nbdkit", "pattern", "8M").uri, connections=1)
    many, taken = disk.asynchronous, []
    many._spare.take = taken.append
    memory = memoryview(bytearray(4 * MIB))
    pages = [memory[at : at + 4096] for at in range(0, len(memory), 4096)]
    pages = pages[::2] + pages[1::2]
    lengths, at, number, expected = [4096, MIB, 8192, MIB, 512, 256 << 10, 4096], 0, 0, {}
    for length in lengths:
        count = -(-length // 4096)
        buffers = [page[: min(4096, length)] for page in pages[number : number + count]]
        many.submit(READ, buffers, at, length, at)
        expected[at] = buffers
        number, at = number + count, at + MIB
    done = {}
    while many.unfinished:
        select.select([many], [], [], PATIENCE)
        done.update(many.collect())
    assert dict.fromkeys(expected) == done
    for start, buffers in expected.items():
        content = b"".join(buffers)
        # nbdkit-pattern-plugin(1): each eight bytes are their own place, big-endian
        assert content == b"".join(
            place.to_bytes(8, "big") for place in range(start, start + len(content), 8)
        )
    assert [] == taken
    disk.close()


def test_memory_that_is_not_needed_is_used_again_up_to_a_bound():
    spare = SpareMemory(8192)
    first = spare.take(4096)
    assert 4096 == len(first)
    spare.give([first, b"of somebody else's"])
    assert spare.take(4096) is first
    assert spare.take(4096) is not first
    large, small = bytearray(8192), [bytearray(4096) for _ in range(3)]
    spare.give([large])
    spare.give(small)  # of another size, and one too many
    assert [spare.take(4096) is each for each in small[1::-1]] == [True, True]
    assert spare.take(4096) is not small[2]
    assert spare.take(8192) is not large


def test_a_request_whose_first_part_cannot_be_sent_ends_once(serve):
    disk = NbdBackend(serve("nbdkit", "memory", "1M").uri)
    many = disk.asynchronous
    connection, many.export = many._first, many.export._replace(maximum=4096)
    issue, errors = connection.issue, [StorageError(errno.EIO, "the first fails")]

    def fails_first(*arguments):
        return errors.pop() if errors else issue(*arguments)

    connection.issue = fails_first
    done = []
    many.submit(READ, [memoryview(bytearray(16384))], 0, 16384, "read")
    while many.unfinished:
        select.select([many], [], [], PATIENCE)
        done += many.collect()
    assert ["read"] == [each.token for each in done]
    assert "the first fails" in str(done[0].error)
    disk.close()
