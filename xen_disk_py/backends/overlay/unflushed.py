"""Which sectors of a disk no flush has covered, and which of them storage may have lost."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

_BLOCK = 4096
_SECTOR = 512
_ALL = 0xFF  # the sectors of a block, a bit each

Map = Callable[[], mmap.mmap]


class Unflushed:
    """Sectors that were written since the last good flush.

    The caller sees to it that one thread at a time is in here.

    Args:
        blocks: of 4096 bytes, that the disk has.
        make_map: makes a map of zeros, a byte for each of them; it takes no memory until written.

    Attributes:
        failed: a flush failed, and no later one was good.
        inherited: a process before this one may have written something that no flush has covered;
            nobody knows what.
    """

    def __init__(self, blocks: int, make_map: Map) -> None:
        self._blocks = blocks
        self._make_map = make_map
        self._written = make_map()  # since the last flush began
        self._pages: set[int] = set()  # of these maps, where there may be something
        self._flushing: dict[int, bytearray] = {}  # what the flush under way is to cover
        self._lost: mmap.mmap | None = None  # what one that failed did not, and nobody wrote since
        self._lost_pages: set[int] = set()
        self._copied: dict[int, int] = {}  # of blocks, the sectors that are copies of the image's
        self._copied_flushing: dict[int, int] = {}
        self.failed = False
        self.inherited = False
        self._lost_for_good = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written since the last flush."""
        return not self._pages and not self.failed

    def write(self, start: int, stop: int) -> None:
        """Note that the bytes from ``start`` to ``stop`` of the disk were written."""
        first, last = start // _BLOCK, (stop - 1) // _BLOCK
        written = self._written
        if first == last:  # by far the most writes
            self._pages.add(first // _BLOCK)
            bits = _ALL
            if stop - start != _BLOCK:
                bits = _bits(start - first * _BLOCK, stop - first * _BLOCK)
            written[first] |= bits
            if self.failed or self._copied:
                self._settle(first, bits)
            return
        self._pages.update(range(first // _BLOCK, last // _BLOCK + 1))
        head = _bits(start - first * _BLOCK, _BLOCK)
        tail = _bits(0, stop - last * _BLOCK)
        written[first] |= head
        written[first + 1 : last] = b"\xff" * (last - first - 1)
        written[last] |= tail
        if self.failed or self._copied:
            self._settle(first, head)
            for block in range(first + 1, last):
                self._settle(block, _ALL)
            self._settle(last, tail)

    def copy(self, start: int, stop: int) -> None:
        """Note that what lies there in one block, was written, and is a copy of the image's."""
        block = start // _BLOCK
        bits = _bits(start - block * _BLOCK, stop - block * _BLOCK)
        self._copied[block] = self._copied.get(block, 0) | bits

    def forget(self, first: int, last: int) -> None:
        """Note that the blocks from ``first`` to before ``last`` need not be stored any more."""
        nothing = bytes(last - first)
        self._written[first:last] = nothing
        if self._lost is not None:
            self._lost[first:last] = nothing
        for page, flushing in self._flushing.items():
            start = page * _BLOCK
            cut = slice(max(first - start, 0), min(max(last - start, 0), len(flushing)))
            flushing[cut] = bytes(len(range(*cut.indices(len(flushing)))))
        for copied in (self._copied, self._copied_flushing):
            for block in [block for block in copied if first <= block < last]:
                del copied[block]

    def begin(self) -> None:
        """Begin a flush: of all that was noted before."""
        self._flushing = {page: bytearray(self._page(self._written, page)) for page in self._pages}
        for page, content in self._flushing.items():
            self._written[page * _BLOCK : page * _BLOCK + len(content)] = bytes(len(content))
        self._pages = set()
        self._copied, self._copied_flushing = {}, self._copied

    def succeed(self) -> None:
        """End it: all that is on storage."""
        self._flushing = {}
        self._copied_flushing = {}
        self.failed = self.inherited = False

    def fail(self) -> None:
        """End it: neither that is known to be on storage, nor what was written meanwhile."""
        self.failed = True
        self._lost_for_good |= self.inherited
        if self._lost is None:
            self._lost = self._make_map()
        # Of a sector that was written meanwhile the image's is no longer wanted.
        for block, bits in self._copied_flushing.items():
            left = bits & ~self._written[block]
            if left:
                self._copied[block] = self._copied.get(block, 0) | left
        for page in self._pages | self._flushing.keys():
            was = self._page(self._lost, page)
            now = self._flushing.get(page, b"")
            since = self._page(self._written, page)
            merged = (_number(was) | _number(now) | _number(since)).to_bytes(len(was), "little")
            self._lost[page * _BLOCK : page * _BLOCK + len(was)] = merged
            self._written[page * _BLOCK : page * _BLOCK + len(was)] = bytes(len(was))
            self._lost_pages.add(page)
        self._pages = set()
        self._flushing = {}
        self._copied_flushing = {}

    def copies(self) -> Iterator[tuple[int, int]]:
        """Name what is to be copied from the image again: from, to, in bytes of the disk."""
        for block, bits in sorted(self._copied.items()):
            at = 0
            while at < 8:
                end = at
                while bits >> end & 1:
                    end += 1
                if end > at:
                    yield block * _BLOCK + at * _SECTOR, block * _BLOCK + end * _SECTOR
                at = end + 1

    @property
    def is_lost(self) -> bool:
        """Whether something was not written again that a flush which failed was to cover."""
        if self._lost is None or self._lost_for_good:
            return self._lost_for_good
        left = {page for page in self._lost_pages if any(self._page(self._lost, page))}
        self._lost_pages = left
        return bool(left)

    def close(self) -> None:
        """Give the memory back."""
        self._written.close()
        if self._lost is not None:
            self._lost.close()

    def _settle(self, block: int, bits: int) -> None:
        """Note that sectors were written: not lost any more, and no copies of the image's."""
        if self._lost is not None:
            self._lost[block] &= ~bits
        left = self._copied.get(block)
        if left is not None:
            left &= ~bits
            if left:
                self._copied[block] = left
            else:
                del self._copied[block]

    def _page(self, of: mmap.mmap, page: int) -> bytes:
        return of[page * _BLOCK : min((page + 1) * _BLOCK, self._blocks)]


def _bits(start: int, stop: int) -> int:
    """Return the bits of a block's sectors from ``start`` to ``stop``, in bytes of the block."""
    return (1 << -(-stop // _SECTOR)) - (1 << start // _SECTOR)


def _number(page: bytes | bytearray) -> int:
    return int.from_bytes(page, "little")
