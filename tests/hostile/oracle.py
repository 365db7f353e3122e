"""What any slot must lead to, read from blkif.h anew: nothing here knows the product's decoder.

A request is judged first and done later, on the oracle's own copy of the disk and the pages.
"""

from __future__ import annotations

import struct

READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6
OKAY, ERROR, NOT_SUPPORTED = 0, -1, -2


class Oracle:
    """A disk and a guest's pages.

    Args:
        padding: bytes between the four leading bytes of a slot and the id.
        most: indirect segments offered; 0 for none.
        sectors: of the disk, of 512 bytes.
        pages: the guest's; the last two are granted for reading only.
        references: the number of a page, by reference.
        keeps: pages stay mapped, which takes all of them to be writable.
        step: sectors that requests are aligned to.
    """

    def __init__(
        self,
        *,
        padding,
        most,
        sectors,
        pages,
        references,
        keeps,
        read_only=False,
        step=1,
    ):
        self.layout = padding
        self.most = most
        self.read_only = read_only
        self.step = step
        self.pages = pages  # the model's own
        self.number_of = references  # of each page, by reference
        self.fixed = len(pages) - 2  # from this on they are granted for reading only
        self.keeps = keeps
        self.sectors = sectors
        self.disk = bytearray(sectors * 512)

    def judge(self, slot):
        """Return (operation answered, status, what to do) for a slot; nothing to do: None."""
        pad = f"{self.layout}x"
        operation, count, wide, _, sector = struct.unpack_from(f"<BBH{pad}QQ", slot)
        head = 20 + self.layout
        if operation in (READ, WRITE, BARRIER, FLUSH):
            if count > 11 or (not count and operation in (READ, WRITE)):
                return operation, ERROR, None
            return self._transfer(operation, sector, count, slot[head:])
        if operation == DISCARD:
            (sectors,) = struct.unpack_from("<Q", slot, head)
            if self.read_only:
                return operation, ERROR, None
            if count & 1:
                return operation, NOT_SUPPORTED, None
            if sector + sectors > self.sectors or sector % self.step or sectors % self.step:
                return operation, ERROR, None
            return operation, OKAY, (DISCARD, sector, sectors, [])
        if operation == INDIRECT and self.most:
            if count not in (READ, WRITE) or not 1 <= wide <= self.most:
                return count, ERROR, None
            refs = struct.unpack_from("<8I", slot, head + 4)[: -(-wide // 512)]
            if not self._granted(refs, writable=self.keeps):
                return count, ERROR, None
            data = b"".join(bytes(self.pages[self.number_of[ref]]) for ref in refs)
            return self._transfer(count, sector, wide, data)
        return operation, NOT_SUPPORTED, None

    def _transfer(self, operation, sector, count, data):
        segments = [struct.unpack_from("<IBB", data, 8 * index) for index in range(count)]
        if any(not first <= last <= 7 for _, first, last in segments):
            return operation, ERROR, None
        sectors = sum(last - first + 1 for _, first, last in segments)
        if sectors:
            if sector + sectors > self.sectors or (self.read_only and operation != READ):
                return operation, ERROR, None
            if sector % self.step or any(
                first % self.step or (last + 1) % self.step for _, first, last in segments
            ):
                return operation, ERROR, None
            refs = [ref for ref, _, _ in segments]
            if not self._granted(refs, writable=self.keeps or operation == READ):
                return operation, ERROR, None
        return operation, OKAY, (operation, sector, sectors, segments)

    def _granted(self, refs, *, writable):
        numbers = [self.number_of.get(ref) for ref in refs]
        return not any(n is None or (writable and n >= self.fixed) for n in numbers)

    def do(self, operation, sector, sectors, segments):
        """Do what :meth:`judge` has allowed."""
        at = sector * 512
        if operation == DISCARD:
            self.disk[at : at + sectors * 512] = bytes(sectors * 512)
        for ref, first, last in segments:
            page = self.pages[self.number_of[ref]]
            start, stop = first * 512, (last + 1) * 512
            if operation == READ:
                page[start:stop] = self.disk[at : at + stop - start]
            else:
                self.disk[at : at + stop - start] = page[start:stop]
            at += stop - start
