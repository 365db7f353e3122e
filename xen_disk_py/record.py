"""What a serving process tells the others on this host: a small file in /run.

The file's first page is a JSON object (who serves what), the second the disk's counters,
memory-mapped, so that ``list`` reads them at no cost to the disk. The process holds a lock
on the file as long as it lives: a record without a lock is what a killed process left.

A process that has become another user cannot remove its file; it empties the first page, and
whoever makes a record next removes what is empty.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import DeviceTaken, XenUnavailable
from .hypervisor import Closing
from .statistics import WORDS, Statistics
from .vdev import from_number
from .xenbus import Address

DIRECTORY = "/run/xen_disk_py"
_PAGE = 4096
_SIZE = _PAGE + mmap.PAGESIZE
_TRIES = 10  # one who looks has the lock for a moment, one who ends has it until the very end
_PAUSE = 0.01


def _path(directory: str, address: Address) -> str:
    return os.path.join(directory, f"{address.frontend_domid}-{address.devid}")


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _unlink(fd: int, path: str) -> None:
    """Remove the locked file, unless somebody who asks for no lock was quicker."""
    with contextlib.suppress(FileNotFoundError):
        if _is_at(fd, path):
            os.unlink(path)


def _lock(path: str, flags: int) -> int | None:
    """Open and lock the file of that name; None if it is locked, or lost its name meanwhile.

    A file is removed only under its lock, so what this returns keeps its name.
    """
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path):
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


class Record(Closing):
    """The record of a disk that this process serves; held open and locked until closed.

    Args:
        directory: where records live.
        address: which device.

    Raises:
        DeviceTaken: another process serves that device.
        XenUnavailable: the directory cannot be written.
    """

    def __init__(self, directory: str, address: Address) -> None:
        self._path = _path(directory, address)
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            _sweep(directory)
            fd = self._claim()
        except OSError as error:
            raise XenUnavailable(
                f"cannot write {self._path}: {error.strerror}; run as root"
            ) from error
        if fd is None:
            raise DeviceTaken(
                f"another process serves device {address.devid} of that guest "
                f"({from_number(address.devid)}): choose another --vdev"
            )
        try:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, _SIZE)  # not sparse: a full /run is an error now, not later
            self._map = mmap.mmap(fd, _SIZE)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._words = memoryview(self._map)[_PAGE : _PAGE + 8 * WORDS].cast("Q")
        self.statistics = Statistics(self._words)

    def _claim(self) -> int | None:
        for _ in range(_TRIES):
            fd = _lock(self._path, os.O_RDWR | os.O_CREAT)
            if fd is not None:
                return fd
            time.sleep(_PAUSE)
        return None

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write who serves what; at most 4096 bytes as JSON."""
        text = json.dumps(facts).encode()
        self._map[:_PAGE] = text[:_PAGE].ljust(_PAGE, b"\0")

    def close(self) -> None:
        """Remove the record. The counters stay readable for this process."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            _unlink(fd, self._path)
        except PermissionError:
            self._map[:_PAGE] = bytes(_PAGE)
            fcntl.flock(fd, fcntl.LOCK_UN)  # the mapping has a copy of the descriptor
        finally:
            os.close(fd)


def _sweep(directory: str) -> None:
    """Remove the records that their processes emptied."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):  # somebody else's business
            fd = _lock(path, os.O_RDONLY)
            if fd is None:
                continue
            try:
                data = os.pread(fd, _PAGE, 0)
                if len(data) == _PAGE and not any(data):
                    _unlink(fd, path)
            finally:
                os.close(fd)


class Found(NamedTuple):
    """A record read by another process."""

    facts: dict[str, Any]
    counters: dict[str, int]
    alive: bool


def find(directory: str, address: Address) -> Found | None:
    """Read the record of a device; None if there is none."""
    try:
        fd = os.open(_path(directory, address), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, _SIZE, 0)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except OSError:
            alive = True
    finally:
        os.close(fd)
    if len(data) < _SIZE:
        return None
    try:
        facts = json.loads(data[:_PAGE].rstrip(b"\0") or b"{}")
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        facts = {}
    words = memoryview(data)[_PAGE : _PAGE + 8 * WORDS].cast("Q")
    return Found(facts, Statistics(words).as_dict(), alive)


def forget(directory: str, address: Address) -> None:
    """Remove what a killed process left; not what one that lives has made of it."""
    path = _path(directory, address)
    try:
        fd = _lock(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    if fd is not None:
        try:
            _unlink(fd, path)
        finally:
            os.close(fd)
