"""What a serving process tells the others on this host: a small file in /run.

The file's first page is a JSON object (who serves what), the second the disk's counters,
memory-mapped, so that ``list`` reads them at no cost to the disk. The process holds a lock
on the file as long as it lives: a record without a lock is what a killed process left.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import DeviceTaken, XenUnavailable
from .hypervisor import Closing
from .statistics import WORDS, Statistics
from .xenbus import Address

DIRECTORY = "/run/xen_disk_py"
_PAGE = 4096
_SIZE = _PAGE + mmap.PAGESIZE


def _path(directory: str, address: Address) -> str:
    return os.path.join(directory, f"{address.frontend_domid}-{address.devid}")


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
            self._fd = self._open()
        except OSError as error:
            raise XenUnavailable(
                f"cannot write {self._path}: {error.strerror}; run as root"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while not self._is_current():  # its owner removed it between our open and our lock
                os.close(self._fd)
                self._fd = self._open()
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, _SIZE)
            self._map = mmap.mmap(self._fd, _SIZE)
        except OSError as error:
            os.close(self._fd)
            if error.errno == errno.EWOULDBLOCK:
                raise DeviceTaken(
                    f"another process serves device {address.devid} of that guest"
                ) from error
            raise
        self._words = memoryview(self._map)[_PAGE : _PAGE + 8 * WORDS].cast("Q")
        self.statistics = Statistics(self._words)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

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
            os.unlink(self._path)
        except FileNotFoundError:
            pass  # somebody tidied up
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
        facts = {}
    words = memoryview(data)[_PAGE : _PAGE + 8 * WORDS].cast("Q")
    return Found(facts, Statistics(words).as_dict(), alive)


def forget(directory: str, address: Address) -> None:
    """Remove what a killed process left."""
    try:
        os.unlink(_path(directory, address))
    except FileNotFoundError:
        pass
