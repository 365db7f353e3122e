"""A disk on an NBD server, through the contract that every disk keeps."""

from __future__ import annotations

import select
import shutil
import subprocess
import threading

import pytest

from backends.blocks import read, write
from xen_disk_py.backends import StorageError
from xen_disk_py.backends.asynchronous import WRITE
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.nbd import NbdBackend
from xen_disk_py.backends.nbd import client as client_module
from xen_disk_py.errors import BackendError, UsageError

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
