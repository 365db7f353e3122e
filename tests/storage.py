"""Storage that really fails, for tests: loop devices, file systems that are shut down."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

_EXT4_IOC_SHUTDOWN = 0x8004587D  # fs/ext4/ext4.h
_WITHOUT_THE_LOG = 2


def run(*command: str) -> str:
    """Run a command that needs root; skip the test where it cannot be."""
    if os.geteuid():
        pytest.skip("devices and mounts need root")
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def write_back(path: str | Path, start: int, stop: int) -> None:
    """Have a part of a file written from the page cache, as the kernel does by itself at times."""
    fd = os.open(path, os.O_RDWR)
    try:
        everything = 1 | 2 | 4  # wait before, write, wait after: sync_file_range(2)
        extent = (ctypes.c_int64(start), ctypes.c_int64(stop - start))
        assert 0 == ctypes.CDLL(None).sync_file_range(fd, *extent, everything)
    finally:
        os.close(fd)


def drop(path: str | Path) -> None:
    """Have the system forget what it has of a file in memory and could store."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _mount(stack: ExitStack, directory: Path, *arguments: str) -> None:
    directory.mkdir(exist_ok=True)
    run("mount", *arguments, str(directory))
    stack.callback(subprocess.run, ["umount", "--lazy", str(directory)], check=True)


def loop(stack: ExitStack, file: Path) -> str:
    device = run("losetup", "--find", "--show", str(file))
    stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
    return device


def small_file_system(tmp_path: Path, stack: ExitStack, size: str) -> Path:
    """Mount a tmpfs of a size."""
    _mount(stack, tmp_path / "tmpfs", "-t", "tmpfs", "-o", f"size={size}", "none")
    return tmp_path / "tmpfs"


class FullDevice:
    """An ext4 file system on a loop device whose backing file has no room for all of it.

    A loop device takes a write for done of which its backing file could take the beginning (seen in
    Linux 6.18): write where nothing is yet.
    """

    def __init__(self, directory: Path, backing: Path) -> None:
        self.directory = directory
        self._filler = backing / "filler"

    def fill(self) -> None:
        """Leave no room: write-back fails from now on, except into what is there already."""
        with open(self._filler, "wb", buffering=0) as file:  # what is buffered fails once more
            try:
                while True:
                    file.write(bytes(65536))
                    file.flush()
            except OSError:
                pass

    def make_room(self) -> None:
        """Have it work again."""
        self._filler.unlink()


def full_device(tmp_path: Path, stack: ExitStack) -> FullDevice:
    """Make one, with room until it is filled."""
    backing, directory = tmp_path / "backing", tmp_path / "thin"
    _mount(stack, backing, "-t", "tmpfs", "-o", "size=24m", "none")
    with open(backing / "disk", "wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-b", "4096", str(backing / "disk"))
    _mount(stack, directory, "-o", "errors=continue", loop(stack, backing / "disk"))
    return FullDevice(directory, backing)


def cloning_file_system(tmp_path: Path, stack: ExitStack) -> Path:
    """Make and mount one whose files can be cloned."""
    with open(tmp_path / "cloning", "wb") as file:
        file.truncate(512 << 20)
    run("mkfs.xfs", "-q", "-m", "reflink=1", str(tmp_path / "cloning"))
    _mount(stack, tmp_path / "xfs", loop(stack, tmp_path / "cloning"))
    return tmp_path / "xfs"


class FileSystem:
    """An ext4 file system on a loop device."""

    def __init__(self, directory: Path, device: str, stack: ExitStack) -> None:
        self.directory = directory
        self._device = device
        self._stack = stack

    def shut_down(self) -> None:
        """Have its storage vanish: what is only in the page cache is lost."""
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _WITHOUT_THE_LOG))
        finally:
            os.close(fd)

    def mount_again(self) -> None:
        """Unmount it, and mount it again.

        A namespace of mounts that somebody has made meanwhile still has it: then it is the same,
        shut down or not, until that namespace ends.
        """
        run("umount", str(self.directory))
        mounted = Path("/sys/fs/ext4", os.path.basename(self._device))
        until = time.monotonic() + 60
        while mounted.exists() and time.monotonic() < until:
            time.sleep(0.01)
        run("mount", self._device, str(self.directory))

    def bind(self, directory: Path) -> Path:
        """Mount it at another place, too."""
        _mount(self._stack, directory, "--bind", str(self.directory))
        return directory


def file_system(tmp_path: Path, stack: ExitStack) -> FileSystem:
    """Make and mount one."""
    directory = tmp_path / "mounted"
    with open(tmp_path / "file-system", "wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-F", str(tmp_path / "file-system"))
    device = loop(stack, tmp_path / "file-system")
    _mount(stack, directory, device)
    return FileSystem(directory, device, stack)
