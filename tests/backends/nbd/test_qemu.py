"""Images of QEMU's formats, by a qemu-nbd of our own; what other tools read in them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from backends.blocks import read, write
from xen_disk_py.backends import StorageError, qemu_img
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.finding import QEMU_FORMATS
from xen_disk_py.backends.nbd import qemu
from xen_disk_py.backends.nbd.qemu import QemuBackend
from xen_disk_py.errors import BackendError, ImageError, UsageError
from xen_disk_py.host import program

MIB = 1 << 20
pytestmark = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None,
    reason="needs qemu-nbd and qemu-img",
)


def make(path, format_, *options, size="8M"):
    words = ["qemu-img", "create", "-q", "-f", format_, *options, str(path), size]
    subprocess.run(words, check=True)
    return str(path)


class TestContract(BackendConformance):
    @pytest.fixture(autouse=True)
    def _image(self, tmp_path):
        self.path = make(tmp_path / "disk.qcow2", "qcow2")

    def open_disk(self, tmp_path):
        return QemuBackend(self.path, "qcow2")


@pytest.mark.parametrize("format_", QEMU_FORMATS)
def test_qemu_reads_what_was_written(format_, tmp_path):
    path = make(tmp_path / "disk", format_)
    disk = QemuBackend(path, format_)
    expected = bytearray(8 * MIB)
    for number, offset in enumerate(range(0, 8 * MIB, 700 << 10)):
        data = bytes([number + 1]) * 8192
        write(disk, offset, data)
        expected[offset : offset + len(data)] = data
    disk.flush()
    disk.close()
    raw = tmp_path / "raw"
    convert = ["qemu-img", "convert", "-f", format_, "-O", "raw", path, str(raw)]
    subprocess.run(convert, check=True)
    assert expected == raw.read_bytes()


def children():
    """The qemu-nbd processes that we have started."""
    found = []
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        for pid in map(int, file.read().split()):
            with open(f"/proc/{pid}/comm") as name:
                if name.read() == "qemu-nbd\n":
                    found.append(pid)
    return found


def test_another_takes_the_place_of_one_that_was_killed(tmp_path):
    path = make(tmp_path / "disk", "qcow2")
    disk = QemuBackend(path, "qcow2")
    write(disk, 0, b"a" * 4096)
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    pause = threading.Event()
    for _ in range(3000):
        try:
            write(disk, MIB, b"b" * 4096)
            disk.flush()
        except StorageError:
            pause.wait(0.01)
        else:
            break
    assert b"a" * 4096 == read(disk, 0, 4096)
    disk.close()
    again = QemuBackend(path, "qcow2", read_only=True)
    assert (b"a" * 4096, b"b" * 4096) == (read(again, 0, 4096), read(again, MIB, 4096))
    again.close()
    assert [] == children()


def test_the_format_is_not_guessed(tmp_path):
    path = make(tmp_path / "disk", "vmdk")
    before = (tmp_path / "disk").read_bytes()
    with pytest.raises(BackendError, match="does not serve it as qcow2") as caught:
        QemuBackend(path, "qcow2")
    assert "\n" not in str(caught.value)
    assert before == (tmp_path / "disk").read_bytes()


def test_a_backing_file_that_is_missing_or_the_image_itself(tmp_path):
    path, base = make(tmp_path / "disk", "qcow2"), make(tmp_path / "base", "qcow2")
    for backing, gone, says in (
        (base, True, "base': No such file or directory: put that backing file there, or name"),
        (path, False, "infinite loop.*: give it another backing file: qemu-img rebase"),
    ):
        command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, path]
        subprocess.run(command, check=True)
        if gone:
            (tmp_path / "base").unlink()
        with pytest.raises(BackendError, match=says) as caught:
            QemuBackend(path, "qcow2")
        assert "\n" not in str(caught.value)


def refers(tmp_path, how):
    """An image that has what a guest reads in another file."""
    path, other = tmp_path / "disk", tmp_path / "other.raw"
    other.write_bytes(b"secret" + bytes(8 * MIB - 6))
    if how == "backing":
        make(path, "qcow2", "-b", str(other), "-F", "raw", size="8M")
    elif how == "data":
        make(path, "qcow2", "-o", f"data_file={tmp_path / 'data'}")
    elif how == "extents":
        make(path, "vmdk", "-o", "subformat=monolithicFlat")
    else:
        make(tmp_path / "other", "vmdk")
        make(path, "vmdk", "-b", str(tmp_path / "other"), "-F", "vmdk", size="8M")
    return str(path), "qcow2" if how in ("backing", "data") else "vmdk"


@pytest.mark.parametrize("how", ["backing", "data", "extents", "parent"])
def test_a_stranger_names_no_other_file(tmp_path, how):
    """Root would read it for a guest of his."""
    path, format_ = refers(tmp_path, how)
    QemuBackend(path, format_).close()  # ours
    os.chmod(path, 0o666)
    with pytest.raises(ImageError, match=r"names another file .* can be written by everybody: see"):
        QemuBackend(path, format_)
    alone = make(tmp_path / "alone", format_)
    os.chmod(alone, 0o666)
    QemuBackend(alone, format_).close()


@pytest.mark.parametrize("how", ["backing", "data", "extents"])
def test_nor_does_one_whose_image_is_the_backing_file(tmp_path, how):
    path, format_ = refers(tmp_path, how)
    mine = make(tmp_path / "mine", format_, "-b", path, "-F", format_, size="8M")
    QemuBackend(mine, format_).close()
    os.chmod(path, 0o666)
    said = r"mine: its backing file .*/disk names another file .* can be written by everybody: see"
    with pytest.raises(ImageError, match=said):
        QemuBackend(mine, format_)
    alone = make(tmp_path / "alone", format_)
    os.chmod(alone, 0o666)
    mine = make(tmp_path / "over", format_, "-b", alone, "-F", format_, size="8M")
    QemuBackend(mine, format_).close()


def test_qemu_img_is_not_waited_for_without_end(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = make(tmp_path / "disk", "qcow2", "-u", "-b", str(pipe), "-F", "raw")
    monkeypatch.setattr(qemu_img, "_PATIENCE", 0.2)
    with pytest.raises(ImageError, match=r"disk: qemu-img has not answered for 0\.2 s"):
        qemu_img.describe(path, "qcow2")


def test_an_image_that_qemu_uses_already(tmp_path):
    path = make(tmp_path / "disk", "qcow2")
    disk = QemuBackend(path, "qcow2")
    with pytest.raises(BackendError, match="does not serve it"):
        QemuBackend(path, "qcow2")
    disk.close()


def test_what_cannot_be_served(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="no such file"):
        QemuBackend(str(tmp_path / "missing"), "qcow2")
    with pytest.raises(UsageError, match="one of qcow2"):
        QemuBackend(str(tmp_path), "raw")
    monkeypatch.setattr(program, "SYSTEM_PATH", str(tmp_path))
    with pytest.raises(BackendError, match="install qemu-utils"):
        QemuBackend(str(tmp_path), "qcow2")


def test_one_that_still_has_the_image_is_waited_for(tmp_path, monkeypatch):
    """As after a kill of its client, when it stores what it has before it ends."""
    path, number = make(tmp_path / "disk", "qcow2"), tmp_path / "pid"
    command = ["qemu-nbd", "--fork", "--persistent", "--pid-file", str(number), "-f", "qcow2"]
    subprocess.run([*command, "--socket", str(tmp_path / "socket"), path], check=True)
    with socket.socket(socket.AF_UNIX) as client:  # until it serves, SIGTERM may be lost to it
        client.connect(str(tmp_path / "socket"))
        assert b"NBDMAGIC" == client.recv(8)
    slept = []

    def sleep(seconds):
        if not slept:
            os.kill(int(number.read_text()), signal.SIGTERM)
        slept.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(qemu, "time", SimpleNamespace(monotonic=lambda: 0, sleep=sleep))
    QemuBackend(path, "qcow2").close()
    assert slept


def grown(tmp_path, length, *options):
    """A qcow2 with 4 MiB of data, of which the file keeps ``length`` bytes."""
    path = str(tmp_path / "disk")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "8M"]
    subprocess.run(command, check=True)
    with contextlib.closing(QemuBackend(path, "qcow2")) as disk:
        write(disk, 0, b"a" * 4 * MIB)
        disk.flush()
    os.truncate(path, os.path.getsize(path) + length)
    return path


@pytest.mark.parametrize("length", [-MIB, -(64 << 10), -4 * MIB])
@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "extended_l2=on"])
def test_one_that_was_cut_short(tmp_path, length, options):
    """QEMU would read zeros there (7.2)."""
    path = grown(tmp_path, length, "-o", options)
    for read_only in (True, False):
        with pytest.raises(ImageError, match=r"cut short: .*: restore a copy"):
            QemuBackend(path, "qcow2", read_only=read_only)


@pytest.mark.parametrize("length", [0, -4096, MIB])
def test_one_whose_end_is_no_whole_cluster_or_more_is_whole(tmp_path, length):
    QemuBackend(grown(tmp_path, length), "qcow2").close()


def test_a_cluster_that_nobody_uses_may_lie_beyond_the_end(tmp_path):
    """A crash leaves such: it is counted before anything is written there."""
    path = grown(tmp_path, 0)
    with open(path, "r+b") as file:
        file.seek(48)
        counts = int.from_bytes(file.read(8), "big")  # the refcount table
        file.seek(counts)
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + 2 * 1000)
        file.write(b"\0\1")
    QemuBackend(path, "qcow2").close()


def test_compressed_clusters(tmp_path):
    raw, path = tmp_path / "raw", str(tmp_path / "small")
    raw.write_bytes(os.urandom(2048) * 1024)
    command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), path]
    subprocess.run(command, check=True)
    QemuBackend(path, "qcow2").close()
    os.truncate(path, os.path.getsize(path) - (128 << 10))
    with pytest.raises(ImageError, match="cut short"):
        QemuBackend(path, "qcow2")


def test_a_vmdk_that_qemu_does_not_overwrite(tmp_path):
    raw, path = tmp_path / "raw", str(tmp_path / "disk.vmdk")
    raw.write_bytes(b"a" * MIB)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*command, str(raw), path], check=True)
    with pytest.raises(ImageError, match=r"streamOptimized VMDK.*add --read-only, or convert it"):
        QemuBackend(path, "vmdk")
    with contextlib.closing(QemuBackend(path, "vmdk", read_only=True)) as disk:
        assert b"a" * 4096 == read(disk, 0, 4096)


def test_nothing_but_our_own_line_is_printed(tmp_path, capfd):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with pytest.raises(BackendError, match="Image is not in qcow2 format: name the format"):
        QemuBackend(str(tmp_path / "disk"), "qcow2")
    assert ("", "") == capfd.readouterr()
