"""``checksum``: detects sectors that read back differently from what was written to them.

``--filter checksum`` keeps a CRC of each sector that was written since the disk was connected. If
a read does not match, the guest gets an I/O error (EIO), and the log a line with the offset.
Sectors that were not written are not checked.

Memory: about 2 % of what was written, at most ``limit``; beyond that the oldest CRCs are dropped, a
MiB of the disk at a time. They end with the process: one that takes the disk over starts with none.
"""

from __future__ import annotations

import errno
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from ...errors import UsageError
from .. import Backend
from ..filter import Filter, do_all

_CHUNK = 1 << 20  # bytes of the disk whose checksums are remembered together
_NONE = 1 << 32  # no CRC


class Checksum(Filter):
    """Compares what is read with what was written.

    Args:
        source: the disk below.
        limit: bytes of memory, at most.
    """

    threads = 1  # a read beside a write of the same sectors could be either

    def __init__(self, source: Backend, *, limit: int = 64 << 20) -> None:
        super().__init__(source)
        self._lock = threading.Lock()
        self._size = source.sector_size
        self._chunks: OrderedDict[int, array[int]] = OrderedDict()
        self._checked = self._wrong = self._forgotten = 0
        self._empty = array("Q", [_NONE]) * (_CHUNK // self._size)
        self.configure(limit=limit)

    def configure(self, *, limit: int) -> None:
        """Remember so much from now on."""
        if limit < 8 * len(self._empty):
            raise UsageError(f"--filter checksum: limit={limit} is less than 16K")
        with self._lock:
            self._most = limit // (8 * len(self._empty))
            self._shrink()

    def counters(self) -> dict[str, int]:
        """Sectors compared, and wrong; MiB of the disk whose checksums were forgotten."""
        return {
            "checked": self._checked,
            "wrong": self._wrong,
            "forgotten": self._forgotten,
        }

    @property
    def memory(self) -> int:
        """The source's, and that of the checksums."""
        return self.source.memory + 8 * len(self._empty) * len(self._chunks)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, and compare."""
        with self._lock:
            done = do_all(self.source.read, buffers, offset)
            for buffer in buffers:
                self._compare(buffer, offset)
                offset += len(buffer)
            return done

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write, and remember what; a copy, since the guest may change its pages meanwhile."""
        content = b"".join(buffers)
        with self._lock:
            self._forget(offset, len(content))  # if it fails, nobody knows what is there
            done = do_all(self.source.write, [memoryview(content)], offset)
            self._remember(memoryview(content)[:done], offset)
            return done

    def discard(self, offset: int, length: int) -> None:
        """Discard, and forget what was there."""
        with self._lock:
            self._forget(offset, length)
            self.source.discard(offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard, and forget what was there."""
        with self._lock:
            self._forget(offset, length)
            self.source.discard_securely(offset, length)

    def resize(self, size: int | None) -> int:
        """As the source does; what was cut off is forgotten."""
        with self._lock:
            done = super().resize(size)
            if size is not None:
                for number in [each for each in self._chunks if (each + 1) * _CHUNK > done]:
                    del self._chunks[number]
            return done

    def _shrink(self) -> None:
        while len(self._chunks) > self._most:
            self._chunks.popitem(last=False)
            self._forgotten += 1

    def _remember(self, content: memoryview, offset: int) -> None:
        size = self._size
        for at in range(0, len(content), size):
            number, rest = divmod(offset + at, _CHUNK)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = self._empty[:]
                self._shrink()
            if not rest or not at:
                self._chunks.move_to_end(number)
            chunk[rest // size] = zlib.crc32(content[at : at + size])

    def _forget(self, offset: int, length: int) -> None:
        if length >= _CHUNK:  # a discard may be of the whole disk
            end = offset + length
            for number in list(self._chunks):
                start = max(offset, number * _CHUNK)
                self._forget_in(number, start, min(end, (number + 1) * _CHUNK) - start)
            return
        for number in range(offset // _CHUNK, (offset + length - 1) // _CHUNK + 1):
            start = max(offset, number * _CHUNK)
            self._forget_in(number, start, min(offset + length, (number + 1) * _CHUNK) - start)

    def _forget_in(self, number: int, offset: int, length: int) -> None:
        chunk = self._chunks.get(number)
        if chunk is not None and length > 0:
            first, count = offset % _CHUNK // self._size, length // self._size
            chunk[first : first + count] = self._empty[:count]

    def _compare(self, content: memoryview, offset: int) -> None:
        size = self._size
        for at in range(0, len(content), size):
            number, rest = divmod(offset + at, _CHUNK)
            chunk = self._chunks.get(number)
            if chunk is None or chunk[rest // size] == _NONE:
                continue
            self._checked += 1
            if zlib.crc32(content[at : at + size]) != chunk[rest // size]:
                self._wrong += 1
                raise OSError(
                    errno.EIO, f"{size} bytes at {offset + at} are not what was written there"
                )
