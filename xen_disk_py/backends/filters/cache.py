"""``cache``: a read cache in memory, for a slow source.

``--filter cache:size=256M`` caches blocks of 64 KiB and evicts the least recently used. It is
write-through: a write is answered when the source has done it, and a flush goes to the source, so
nothing is lost with the process. Changes that others make to the source are not seen.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Callable, TypeVar

from ...errors import UsageError
from .. import Backend
from ..filter import Filter, do_all

T = TypeVar("T")


class Cache(Filter):
    """Keeps what was read.

    Args:
        source: the disk below.
        size: bytes of memory, at most.
        block: bytes that are read and kept together.
    """

    def __init__(self, source: Backend, *, size: int = 64 << 20, block: int = 64 << 10) -> None:
        super().__init__(source)
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._fetching: dict[int, object] = {}
        self._hits = self._misses = 0
        self._block = block
        if not 4096 <= block <= 16 << 20 or block % source.sector_size:
            raise UsageError(
                f"--filter {self._called}: block={block} is not from 4K to 16M, in whole sectors"
            )
        self.configure(size=size, block=block)

    _called = "cache"

    def configure(self, *, size: int, block: int) -> None:
        """Keep so much from now on; blocks stay as long as they are."""
        if block != self._block:
            raise UsageError(f"{self._called} keeps its block={self._block} while it is in use")
        if size < block:
            raise UsageError(f"--filter {self._called}: size={size} is less than a block, {block}")
        with self._lock:
            self._most = size // block
            self._shrink()

    def counters(self) -> dict[str, int]:
        """Blocks that were there when they were read, and not; bytes that are kept."""
        return {"hits": self._hits, "misses": self._misses, "kept": self._kept()}

    @property
    def memory(self) -> int:
        """The source's, and what is kept."""
        return self.source.memory + self._kept()

    def _kept(self) -> int:
        return len(self._blocks) * self._block

    def _shrink(self) -> None:
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is kept, if that is all."""
        length = sum(map(len, buffers))
        blocks = self._numbers(offset, length)
        with self._lock:
            found = [self._blocks.get(number) for number in blocks]
            if None in found:
                return 0
            for number in blocks:
                self._blocks.move_to_end(number)
            self._hits += len(found)
        self._copy([each for each in found if each is not None], buffers, offset)
        return length

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write if the source does at once."""
        numbers = self._numbers(offset, sum(map(len, buffers)))
        self._forget(numbers)
        try:
            return self.source.write_nowait(buffers, offset)
        finally:
            self._forget(numbers)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, what is missing from the source."""
        length = sum(map(len, buffers))
        numbers = self._numbers(offset, length)
        if len(numbers) > self._most:
            return do_all(self.source.read, buffers, offset)
        found: dict[int, bytes] = {}
        missing: list[int] = []
        token = object()
        with self._lock:
            for number in numbers:
                content = self._blocks.get(number)
                if content is None:
                    missing.append(number)
                    self._fetching[number] = token
                else:
                    found[number] = content
                    self._blocks.move_to_end(number)
            self._hits += len(found)
            self._misses += len(missing)
            missing = self._more(missing, token)
        try:
            for first, last in _extents(missing):
                self._fetch(first, last, token, found)
        finally:
            with self._lock:
                for number in missing:
                    if self._fetching.get(number) is token:
                        del self._fetching[number]
        self._copy([found[number] for number in numbers], buffers, offset)
        return length

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write to the source, and forget what was kept of that."""
        return self._changing(
            offset,
            sum(map(len, buffers)),
            lambda: do_all(self.source.write, buffers, offset),
        )

    def discard(self, offset: int, length: int) -> None:
        """Discard, and forget what was kept of that."""
        self._changing(offset, length, lambda: self.source.discard(offset, length))

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard, and forget what was kept of that."""
        self._changing(offset, length, lambda: self.source.discard_securely(offset, length))

    def resize(self, size: int | None) -> int:
        """As the source does; forget everything if that changes."""
        done = super().resize(size)
        if size is not None:
            with self._lock:
                self._blocks.clear()
                self._fetching.clear()
        return done

    def _changing(self, offset: int, length: int, call: Callable[[], T]) -> T:
        """Forget blocks before and after: what a read fetches meanwhile is not kept."""
        numbers = self._numbers(offset, length)
        self._forget(numbers)
        try:
            return call()
        finally:
            self._forget(numbers)

    def _forget(self, numbers: range) -> None:
        with self._lock:
            for number in numbers:
                self._blocks.pop(number, None)
                self._fetching.pop(number, None)

    def _numbers(self, offset: int, length: int) -> range:
        return range(offset // self._block, -(-(offset + length) // self._block))

    def _more(self, missing: list[int], token: object) -> list[int]:
        """Add to what a read misses; the lock is held."""
        return missing

    def _fetch(self, first: int, last: int, token: object, found: dict[int, bytes]) -> None:
        """Read contiguous blocks from the source, and keep what nobody writes meanwhile."""
        start, end = first * self._block, min((last + 1) * self._block, self.source.size)
        content = memoryview(bytearray(end - start))
        if do_all(self.source.read, [content], start) != len(content):
            raise OSError(errno.EIO, "the disk below did not read all")
        with self._lock:
            for number in range(first, last + 1):
                at = (number - first) * self._block
                found[number] = bytes(content[at : at + self._block])
                if self._fetching.get(number) is token:
                    self._blocks[number] = found[number]
            self._shrink()

    def _copy(self, blocks: Sequence[bytes], buffers: Sequence[memoryview], offset: int) -> None:
        place = offset % self._block
        number = 0
        for buffer in buffers:
            at = 0
            while at < len(buffer):
                count = min(len(buffer) - at, self._block - place)
                buffer[at : at + count] = blocks[number][place : place + count]
                at += count
                place += count
                if place == self._block:
                    place, number = 0, number + 1


def _extents(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last of what is contiguous."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
