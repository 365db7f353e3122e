"""Copy-before-write: what was at one instant, or a failure; the guest waits for nobody."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from contextlib import closing, contextmanager, suppress

import pytest

from xen_disk_py.backends import before_images, exporting, holes
from xen_disk_py.backends.before_images import CHUNK, BeforeImages, put_over, receive
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.vhd import export as vhd_export
from xen_disk_py.backends.vhd.backend import VhdBackend
from xen_disk_py.backends.vhd.create import create as create_vhd
from xen_disk_py.errors import DeviceError, ImageError

SIZE = 5 * CHUNK + 512


class Exporter:
    """Receives before-images of a disk in a thread, as another process does."""

    def __init__(self, path, size):
        self.fd = os.open(path, os.O_CREAT | os.O_RDWR)
        self.size = size
        self.socket, self.disk = socket.socketpair()
        self.here = None
        self.error = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.here = receive(self.socket, self.size, self.fd)
        except OSError as error:
            self.error = error
        self.socket.close()

    def close(self):
        with suppress(OSError):  # it has ended
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.disk.close()
        os.close(self.fd)


class Kept:
    """Before-images of a disk of ``bytearray``."""

    def __init__(self, exporter, **more):
        self.disk = bytearray(os.urandom(SIZE))
        self.ended = threading.Event()
        self.images = BeforeImages(
            SIZE,
            more.pop("read", self.read),
            exporter,
            on_end=lambda images: self.ended.set(),
            **more,
        )

    def read(self, buffers, offset):
        length = len(buffers[0])
        buffers[0][:] = self.disk[offset : offset + length]
        return length

    def write(self, offset, data):
        self.images.save(offset, offset + len(data))
        self.disk[offset : offset + len(data)] = data


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(before_images, "_CHECK", 0.01)


@pytest.fixture
def exporter(tmp_path):
    with closing(Exporter(tmp_path / "images", SIZE)) as exporter:
        yield exporter


@pytest.fixture
def stopped():
    """An exporter that takes nothing and lives."""
    ours, theirs = socket.socketpair()
    for end in ours, theirs:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with ours, theirs:
        yield theirs


def test_put_over_a_copy_they_make_it_what_was(exporter, tmp_path):
    kept = Kept(exporter.disk)
    kept.disk[CHUNK : 2 * CHUNK] = bytes(CHUNK)
    then = bytes(kept.disk)
    kept.write(CHUNK - 512, b"a" * 1024)
    kept.write(CHUNK, b"b" * 512)
    raw = os.open(tmp_path / "raw", os.O_CREAT | os.O_RDWR)
    os.pwrite(raw, kept.disk, 0)
    kept.write(SIZE - 512, b"c" * 512)
    kept.images.finish(30)
    exporter.thread.join()
    assert exporter.error is None
    assert 2 * CHUNK + 512 == put_over(exporter.fd, exporter.here, SIZE, raw)
    assert then == os.pread(raw, SIZE + 1, 0)
    os.close(raw)
    assert kept.ended.wait(30)


@pytest.mark.parametrize("says", [0, -1])
def test_zeros_are_put_over_where_no_hole_is_made(exporter, tmp_path, monkeypatch, says):
    monkeypatch.setattr(holes, "_fallocate", lambda *_: says)
    raw = os.open(tmp_path / "raw", os.O_CREAT | os.O_RDWR)
    os.pwrite(raw, b"x" * SIZE, 0)
    os.ftruncate(exporter.fd, SIZE)
    put_over(exporter.fd, bytearray(b"\1\0\0\0\0\1"), SIZE, raw)
    assert bytes(CHUNK) + b"x" * 4 * CHUNK + bytes(512) == os.pread(raw, SIZE, 0)
    os.close(raw)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "sends no more"),
        (struct.pack(">QI", 0, CHUNK) + b"x", "sends no more"),
        (struct.pack(">QI", 512, CHUNK) + bytes(CHUNK), "what is none"),
        (struct.pack(">QI", 0, 512) + bytes(512), "what is none"),
        (struct.pack(">QI", 0, 1 << 31), "what is none"),
        (struct.pack(">QI", 6 * CHUNK, CHUNK) + bytes(CHUNK), "what is none"),
        (struct.pack(">QI", 5 * CHUNK, CHUNK) + bytes(CHUNK), "what is none"),
        (2 * (struct.pack(">QI", 0, CHUNK) + bytes(CHUNK)), "what is none"),
    ],
)
def test_who_sends_what_is_no_before_image_is_not_believed(exporter, sent, said):
    with exporter.disk as disk, suppress(BrokenPipeError, ConnectionResetError):
        disk.sendall(sent)
        disk.shutdown(socket.SHUT_WR)
        disk.recv(1)
    exporter.thread.join(30)
    assert said in str(exporter.error)


def test_when_the_exporter_has_ended_nothing_is_kept(exporter):
    kept = Kept(exporter.disk)
    exporter.socket.shutdown(socket.SHUT_RDWR)
    assert kept.ended.wait(30)
    assert not kept.images.is_active
    kept.write(0, b"x" * 512)
    with pytest.raises(DeviceError, match="the exporter has ended"):
        kept.images.finish(30)


def test_a_disk_that_cannot_be_read_fails_the_export_alone(exporter):
    def read(buffers, offset):
        raise OSError(5, "Input/output error")

    kept = Kept(exporter.disk, read=read)
    kept.write(0, b"x" * 512)
    with pytest.raises(DeviceError, match=r"cannot be read: .*Input/output error"):
        kept.images.finish(30)
    assert kept.ended.wait(30)


def test_an_exporter_that_takes_nothing_fails_the_export_alone(stopped, monkeypatch):
    monkeypatch.setattr(before_images, "WAIT", 0.01)
    kept = Kept(stopped, room=CHUNK)
    for at in range(0, SIZE, CHUNK):
        kept.write(at, b"x" * 512)  # returns, since nobody waits longer than that
    assert kept.ended.wait(30)  # not even the thread that sends
    with pytest.raises(DeviceError, match="more than the exporter takes"):
        kept.images.finish(30)


def test_an_exporter_that_takes_nothing_keeps_no_end_waiting(stopped):
    kept = Kept(stopped)
    kept.write(0, b"x" * 512)
    with pytest.raises(DeviceError, match="does not take it"):
        kept.images.finish(0.01)
    assert kept.ended.wait(30)


def test_once_the_copy_is_there_nothing_more_is_kept(tmp_path, monkeypatch):
    """A guest that never stops waits for nobody, and keeps no export from its end."""
    monkeypatch.setattr(before_images, "WAIT", 60.0)
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    kept = Kept(theirs, room=CHUNK)
    then = bytes(kept.disk)
    kept.write(0, b"x" * 512)  # takes all the room
    more = threading.Thread(target=kept.write, args=(CHUNK, b"y" * (SIZE - CHUNK)))
    finish = threading.Thread(target=kept.images.finish, args=(60.0,))
    more.start()
    finish.start()
    more.join(30)
    assert not more.is_alive()
    with ours, open(tmp_path / "images", "w+b", buffering=0) as file:
        here = receive(ours, SIZE, file.fileno())
        assert bytearray(b"\1\0\0\0\0\0") == here
        assert then[:CHUNK] == os.pread(file.fileno(), SIZE, 0)
    finish.join()
    assert "" == kept.images.failure
    kept.write(CHUNK, b"z" * 512)
    assert kept.ended.wait(30)


def test_what_is_needed_no_more_is_not_missed(exporter):
    """Its read fails when the copy is there."""
    go, reading = threading.Event(), threading.Event()

    def read(buffers, offset):
        reading.set()
        assert go.wait(30)
        raise OSError(5, "Input/output error")

    kept = Kept(exporter.disk, read=read)
    thread = threading.Thread(target=kept.write, args=(0, b"x"))
    thread.start()
    assert reading.wait(30)
    kept.images.finish(30)
    go.set()
    thread.join()
    assert kept.ended.wait(30)
    assert "" == kept.images.failure


def test_a_request_waits_no_longer_for_another_that_reads(exporter, monkeypatch):
    monkeypatch.setattr(before_images, "WAIT", 0.01)
    go, reading = threading.Event(), threading.Event()

    def read(buffers, offset):
        reading.set()
        assert go.wait(30)
        return len(buffers[0])

    kept = Kept(exporter.disk, read=read)
    thread = threading.Thread(target=kept.write, args=(0, b"x"))
    thread.start()
    assert reading.wait(30)
    kept.write(CHUNK, b"y" * 512)
    go.set()
    thread.join()
    with pytest.raises(DeviceError, match="too slow"):
        kept.images.finish(30)
    assert kept.ended.wait(30)


def keep_of(disk, tmp_path):
    """Have a disk of this process keep them, as another process asks for it."""

    @contextmanager
    def keep(fd, size, images):
        assert os.path.samestat(os.fstat(fd), os.fstat(disk.exported_fd))
        assert size == disk.size
        with closing(Exporter(tmp_path / "kept", size)) as exporter:
            os.unlink(tmp_path / "kept")
            os.dup2(images, exporter.fd)
            kept = BeforeImages(disk.size, disk.read, exporter.disk)
            disk.keep_before_images(kept)

            class Keeping:
                def check(self):
                    assert kept.is_active

                def finish(self):
                    kept.finish(30)
                    exporter.thread.join()
                    return exporter.here

            yield Keeping()
            disk.keep_before_images(None)

    return keep


def overlay(tmp_path):
    with open(tmp_path / "image", "wb") as file:
        file.write(os.urandom(SIZE))
    disk = OverlayBackend(str(tmp_path / "image"), overlay=str(tmp_path / "in-use"))
    return disk, maintenance.export


def vhd(tmp_path):
    create_vhd(str(tmp_path / "in-use"), SIZE)
    return VhdBackend(str(tmp_path / "in-use")), vhd_export.export


@pytest.mark.parametrize("make", [overlay, vhd])
def test_what_changes_at_any_moment_of_an_export_is_not_in_it(tmp_path, monkeypatch, make):
    """A write and a discard before each read of the exporter."""
    monkeypatch.setattr(exporting, "_clone", lambda fd, path: None)
    disk, export = make(tmp_path)
    rng = random.Random(1)

    def change():
        offset = rng.randrange(SIZE // 512 - 8) * 512
        buffers = [memoryview(rng.randbytes(4096))]
        assert 4096 == (disk.write_nowait(buffers, offset) or disk.write(buffers, offset))
        disk.discard(rng.randrange(SIZE // 512 - 32) * 512, 16384)

    with closing(disk):
        for _ in range(10):
            change()
        then = bytearray(SIZE)
        disk.read([memoryview(then)], 0)
        calls = []

        def copy(real):
            def copy(*arguments):
                calls.append(change())
                real(*arguments)
                calls.append(change())

            return copy

        monkeypatch.setattr(maintenance, "_copy", copy(maintenance._copy))
        monkeypatch.setattr(vhd_export, "_copy", copy(vhd_export._copy))
        new = tmp_path / "new"
        export(
            str(tmp_path / "in-use"),
            str(new),
            force=False,
            progress=lambda *_: None,
            keep=keep_of(disk, tmp_path),
        )
        assert calls
        assert bytes(then) == new.read_bytes()[:SIZE]
        now = bytearray(SIZE)
        disk.read([memoryview(now)], 0)
        assert then != now
    assert ["image", "in-use", "new"][make is vhd :] == sorted(os.listdir(tmp_path))


def test_one_that_is_not_complete_is_tried_again_and_then_none(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_clone", lambda fd, path: None)
    monkeypatch.setattr(exporting, "_SETTLING", 0.015)  # more than a step of times
    disk, export = overlay(tmp_path)
    tried = []

    def keep(fd, size, images):
        tried.append(images)
        raise DeviceError("has ended")

    def copy(*arguments, real=maintenance._copy):
        real(*arguments)
        disk.write([memoryview(b"x" * 512)], 0)

    monkeypatch.setattr(maintenance, "_copy", copy)
    with closing(disk), pytest.raises(ImageError, match=r"\(has ended\): pause the guest"):
        export(
            str(tmp_path / "in-use"),
            str(tmp_path / "new"),
            force=False,
            progress=lambda *_: None,
            keep=keep,
        )
    assert 3 == len(tried)
    assert ["image", "in-use"] == sorted(os.listdir(tmp_path))
