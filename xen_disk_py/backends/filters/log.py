"""``log``: one line for each request, in a file.

``--filter log:file=/var/log/xen-disk-requests`` writes lines of text, with ``format=json`` a JSON
object each. What cannot be written is lost: the guest does not wait for a log.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from ...errors import UsageError
from .. import Backend, sharing
from ..filter import Filter
from ..newfile import why

T = TypeVar("T")

_LINE = re.compile(rb"\d+\.\d{6} [a-z]+ \d|\{\"time\": ")


class Log(Filter):
    """Writes a line about each request: when it began, what it was, how long it took, its outcome.

    Args:
        source: the disk below.
        file: appended to; made for its owner alone if it does not exist; no symbolic link.
        format: ``text`` or ``json``.
        on: no: write nothing.
    """

    def __init__(
        self,
        source: Backend,
        *,
        file: str,
        format: Literal["text", "json"] = "text",  # noqa: A002
        on: bool = True,
    ) -> None:
        super().__init__(source)
        self._lock = threading.Lock()  # of the descriptor: a line is not to go to another's file
        self._fd = -1
        self._file = ""
        self._lines = self._lost = 0
        self.configure(file=file, format=format, on=on)

    def configure(self, *, file: str, format: str, on: bool) -> None:  # noqa: A002
        """Write so from now on; with the file's name it is opened anew, if that is another one."""
        fd = _open(file) if file != self._file and not sharing.is_looking() else -1
        with self._lock:
            self._is_json, self._is_on = format == "json", on
            if fd >= 0:
                before, self._fd, self._file = self._fd, fd, file
                if before >= 0:
                    os.close(before)

    def passes_on(self, method: str) -> bool:
        """Everything while it is off."""
        return not self._is_on

    def counters(self) -> dict[str, int]:
        """How many lines were written, and how many lost."""
        return {"lines": self._lines, "lost": self._lost}

    def _logged(self, operation: str, offset: int, length: int, call: Callable[[], T]) -> T:
        """Do a request and write its line."""
        if not self._is_on:
            return call()
        begin, start = time.time(), time.perf_counter()
        outcome = "ok"
        try:
            return call()
        except BaseException as error:
            outcome = _name(error)
            raise
        finally:
            self._write_line(begin, operation, offset, length, time.perf_counter() - start, outcome)

    def _write_line(
        self, begin: float, operation: str, offset: int, length: int, took: float, outcome: str
    ) -> None:
        facts: dict[str, Any] = {
            "time": round(begin, 6),
            "operation": operation,
            "offset": offset,
            "length": length,
            "seconds": round(took, 6),
            "outcome": outcome,
        }
        if self._is_json:
            line = json.dumps(facts)
        else:
            line = "{time:.6f} {operation} {offset} {length} {seconds:.6f} {outcome}"
            line = line.format(**facts)
        with self._lock:
            try:
                os.write(self._fd, f"{line}\n".encode())
                self._lines += 1
            except OSError:
                self._lost += 1

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, if no line is to be written."""
        return 0 if self._is_on else self.source.read_nowait(buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write, if no line is to be written."""
        return 0 if self._is_on else self.source.write_nowait(buffers, offset)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read, and write a line."""
        if not self._is_on:
            return self.source.read(buffers, offset)
        length = sum(map(len, buffers))
        return self._logged("read", offset, length, lambda: self.source.read(buffers, offset))

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write, and write a line."""
        if not self._is_on:
            return self.source.write(buffers, offset)
        length = sum(map(len, buffers))
        return self._logged("write", offset, length, lambda: self.source.write(buffers, offset))

    def flush(self) -> None:
        """Flush, and write a line."""
        self._logged("flush", 0, 0, self.source.flush)

    def discard(self, offset: int, length: int) -> None:
        """Discard, and write a line."""
        self._logged("discard", offset, length, lambda: self.source.discard(offset, length))

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard, and write a line."""
        call = self.source.discard_securely
        self._logged("discard", offset, length, lambda: call(offset, length))

    def close(self) -> None:
        """Close the file and the source."""
        with self._lock:
            fd, self._fd, self._is_on = self._fd, -1, False
            if fd >= 0:
                os.close(fd)
        super().close()


def _open(file: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(file, flags | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        reason = why(error, file) if isinstance(error, OSError) else error
        raise UsageError(f"--filter log: file={file}: {reason}") from error
    if _is_of_another(fd):
        os.close(fd)
        raise UsageError(f"--filter log: file={file}: there is something else: give another name")
    return fd


def _is_of_another(fd: int) -> bool:
    """Whether it may be somebody's disk: a block device, or a file with anything but such lines."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return stat.S_ISBLK(status.st_mode)
    if not status.st_size:
        return False
    try:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return _LINE.match(os.pread(reader, 200, 0)) is None
    finally:
        os.close(reader)


def _name(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, type(error).__name__) if number else type(error).__name__
