"""What a guest asks for, as it reaches a real server: nbdkit's log of its requests."""

from __future__ import annotations

import re
import shutil

import pytest

from xen_disk_py.backends.nbd import NbdBackend
from xen_disk_py.blkif import WRITE_BARRIER
from xen_disk_py.errors import BackendError
from xen_disk_py.simulated.frontend import RequestFailed

MIB = 1 << 20
_LINE = re.compile(r"connection=\d+ (\w+) id=\d+(?: offset=(0x\w+) count=(0x\w+))?(?: fua=(\d))? ")


@pytest.fixture
def guest_of(host, serve, tmp_path):
    """Serve a disk on an nbdkit with some limits to a guest; give its frontend, disk and log."""
    log, opened = tmp_path / "log", []

    def guest_of(*arguments, plugin=("memory", "8M"), filters=()):
        names = [f"--filter={name}" for name in ("log", *filters)]
        server = serve("nbdkit", *names, *plugin, f"logfile={log}", *arguments)
        opened.append(NbdBackend(server.uri, connections=1))
        frontend = host.serving(opened[-1]).frontend()
        seen = []

        def requests():
            """What has come since the last time: (operation, offset, bytes, FUA)."""
            found = [
                (what, *(int(number, 0) for number in numbers if number))
                for what, *numbers in _LINE.findall(log.read_text())
            ]
            new = found[len(seen) :]
            seen[:] = found
            return new

        return frontend, requests

    yield guest_of
    host.end_sessions()
    for backend in opened:
        backend.close()


LIMITS = ("blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K")


def test_a_flush_is_a_flush_and_a_discard_a_trim(guest_of):
    frontend, requests = guest_of()
    frontend.write(4096, b"a" * 8192)
    frontend.flush()
    frontend.discard(MIB, 64 << 10)
    assert [
        ("Write", 4096, 8192, 0),
        ("Flush",),
        ("Trim", MIB, 64 << 10, 0),
    ] == requests()


def test_a_barrier_is_a_write_between_two_flushes(guest_of):
    """So that it is on stable storage, after all that was before it."""
    frontend, requests = guest_of()
    frontend.submit(WRITE_BARRIER, 4096, b"b" * 4096)
    frontend.drain()
    assert [("Flush",), ("Write", 4096, 4096, 0), ("Flush",)] == requests()


def test_a_server_that_can_neither_flush_nor_trim_is_not_asked_to(guest_of):
    plugin = ("eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null")
    frontend, requests = guest_of(plugin=plugin)
    assert not frontend.features.discard
    frontend.write(4096, b"a" * 4096)
    frontend.flush()
    assert [("Write", 4096, 4096, 0)] == requests()


def test_the_smallest_request_is_the_guest_s_sector(guest_of):
    frontend, requests = guest_of(*LIMITS, filters=["blocksize-policy"])
    assert (4096, 4096) == (frontend.features.sector_size, frontend.features.physical_sector_size)
    with pytest.raises(RequestFailed):
        frontend.write(512, b"c" * 512)
    with pytest.raises(RequestFailed):
        frontend.discard(512, 4096)
    assert [] == requests()  # the server has not seen them
    frontend.write(8192, b"c" * 4096)
    assert b"c" * 4096 == frontend.read(8192, 4096)
    assert [("Write", 8192, 4096, 0), ("Read", 8192, 4096)] == requests()


def test_the_largest_request_is_not_exceeded(guest_of):
    frontend, requests = guest_of(*LIMITS, filters=["blocksize-policy"])
    data = bytes(range(256)) * 800  # 200 KiB
    frontend.write(4096, data)
    assert data == frontend.read(4096, len(data))
    seen = requests()
    for what in ("Write", "Read"):
        parts = sorted((offset, length) for name, offset, length, *_ in seen if name == what)
        assert max(length for _, length in parts) <= 64 << 10
        at = 4096
        for offset, length in parts:
            assert at == offset
            at += length
        assert at == 4096 + len(data)


def test_a_trim_of_more_than_the_protocol_s_most_is_parts(guest_of):
    frontend, requests = guest_of(plugin=("memory", "5G"))
    frontend.discard(0, 5 << 30)
    assert [("Trim", at << 30, 1 << 30, 0) for at in range(5)] == sorted(requests())


def test_a_block_size_of_qemu_s(serve, tmp_path):
    if shutil.which("qemu-nbd") is None:
        pytest.skip("needs qemu-nbd")
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    options = f"driver=blkdebug,align=4096,image.driver=file,image.filename={image}"
    server = serve("qemu-nbd", "--image-opts", options)
    with pytest.raises(BackendError, match="smallest request is 4096 bytes"):
        NbdBackend(server.uri, sector_size=512)
    disk = NbdBackend(server.uri)
    assert 4096 == disk.sector_size
    disk.write([memoryview(b"d" * 4096)], 4096)
    disk.close()
    assert b"d" * 4096 == image.read_bytes()[4096:8192]
