"""A VHD that is not fixed: reads and writes by block and bitmap, in an order that keeps it whole.

A sector is in the file if its block is in the BAT and its bit in the bitmap is set; what is not
is the parent's, or zeros. What is written follows four rules, by which the file is a good VHD
after each single write, and after a crash of the host that kept any of what was not flushed:

* Room is made for several blocks at once: first the footer is written at its new place, which
  makes the file longer, then that is flushed, then the old footer is cleared. So there is a footer
  at the end at any moment, and all in between is zeros on stable storage: a BAT entry may point
  there any time, the block's bitmap is clear.
* A BAT entry never changes once it points somewhere, and a bit is never cleared again.
* A bit is set when the data of its sector is on stable storage: where a bit tells the parent's
  sector from ours, or might uncover what had lain there before. In a block that was added since the
  file was opened, with no parent, old and new bit both show zeros, and nothing needs waiting for.
* The copy of the footer at the start is what it was.

Room that is not used is given back when the file is closed.

A block device has all the room that it will have, and its footer at its end, as blktap has it. What
lies there is unknown: a new block is filled with zeros, and flushed, before the BAT points to it.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import ImageError
from ...units import format_size
from ..before_images import WAIT, BeforeImages
from ..holes import data_extents, punch_hole
from ..image import IOV_MAX, Image, cut, nowait_flags, transfer_all
from ..sharing import Storage, storage_of
from .layout import FOOTER, FREE, SECTOR, Batmap, Footer, blocks_of, checksum, whole_sectors
from .opening import Blocks, Vhd
from .stable import Stable
from .zeros import fill_zeros, is_zero

_ALIGNED = 4096  # in the file: what a block's data starts at, as blktap has it
_ROOM = 32 << 20  # bytes that the file grows by, in whole blocks
_CACHE = 32 << 20  # bytes that bitmaps may take
_MOST_SLACK = 1 << 20  # bytes looked at to see whether the end of a file is free
_ONE, _ZERO = b"1", b"0"  # of a bitmap in memory, a byte for each sector
_SET = _ONE[0]

_ABSENT = -1
_UNKNOWN = -2


class BlockLayer:
    """A dynamic or differencing VHD.

    Args:
        vhd: open; to be closed with this.
        blocks: its.
        parent: what has the sectors that this has not; None: they are zeros. Closed with this.
        writable: it was opened for writing.

    Attributes:
        stable: what flushes it.
        is_ordered: bits wait for their data; not needed where a crash need not leave the old
            content.
    """

    def __init__(
        self, vhd: Vhd, blocks: Blocks, parent: BlockLayer | Image | None, *, writable: bool
    ) -> None:
        self.fd = vhd.fd
        self.path = vhd.path
        self.size = vhd.size
        self.stable = Stable(vhd.fd)
        self.is_ordered = True
        self._vhd = vhd
        self._blocks = blocks
        self._parent = parent
        self._below = 0 if parent is None else min(parent.size, self.size)
        self._writable = writable
        header = blocks.header
        self._block_size = header.block_size
        self._shift = header.block_size.bit_length() - 1
        self._mask = header.block_size - 1
        self._bitmap_size = header.bitmap_size
        self._bat = blocks.bat
        self._absent = blocks.bat.count(FREE)  # blocks that are not in the file
        # Where a block's data starts in the file, if all of it is there and is known to be; -1 if
        # nothing of it is there; 0 for all others.
        self._whole = array("q", [-1 if entry == FREE else 0 for entry in blocks.bat])
        self._added = bytearray(len(blocks.bat))  # 1: below clear bits are zeros
        self._bitmaps: dict[int, bytearray] = {}
        self._most_bitmaps = max(4, _CACHE * SECTOR // header.block_size)
        self._lock = threading.Lock()  # for whoever changes anything above, or the end of the file
        self._nowait = nowait_flags(vhd.fd)
        self._tail = vhd.tail if vhd.tail is not None else vhd.length
        self._before: BeforeImages | None = None
        # What is not in order in a file is put in order with the first change, not before.
        self._is_prepared = not writable or not self._needs_preparation()
        self._is_slow = not self._is_prepared
        self._end = blocks.used  # what is used ends there
        self._is_ours = vhd.is_device  # what lies from there to the tail: in a file it is zeros

    # -- reading -----------------------------------------------------------------------

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill ``buffers`` from the file, the parent, or with zeros."""
        length = sum(map(len, buffers))
        return self._read_extents(buffers, offset, length, is_waiting=True)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill them as far as all that it takes is in memory."""
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        inside = offset & self._mask
        if inside + length <= self._block_size and len(buffers) <= IOV_MAX:
            # Nearly always in one file: found without a generator, which takes 1 µs a layer.
            block = offset >> self._shift
            place = self._whole[block]
            if not place:
                bitmap = self._bitmaps.get(block)
                if bitmap is not None:
                    first = inside // SECTOR
                    last = first + length // SECTOR
                    if bitmap[first] == _SET:
                        if bitmap.find(_ZERO, first, last) < 0:
                            place = self._bat[block] * SECTOR + self._bitmap_size
                    elif bitmap.find(_ONE, first, last) < 0:
                        place = _ABSENT
            if place > 0 and self._nowait is not None:
                try:
                    return os.preadv(self.fd, buffers, place + inside, self._nowait)
                except BlockingIOError:
                    return 0
            if place < 0 and offset + length <= self._below and self._parent is not None:
                return self._parent.read_nowait(buffers, offset)
        return self._read_extents(buffers, offset, length, is_waiting=False)

    def _read_extents(
        self, buffers: Sequence[memoryview], offset: int, length: int, *, is_waiting: bool
    ) -> int:
        done = 0
        for start, stop, place in self._extents(offset, offset + length, is_waiting=is_waiting):
            wanted = stop - start
            part = buffers if wanted == length else cut(buffers, start - offset, stop - offset)
            if place >= 0:
                moved = self._read_here(part, place, is_waiting=is_waiting)
            elif place == _UNKNOWN:
                break
            else:
                moved = self._read_below(part, start, wanted, is_waiting=is_waiting)
            done += moved
            if moved < wanted:
                break
        return done

    def _read_here(self, buffers: Sequence[memoryview], place: int, *, is_waiting: bool) -> int:
        if is_waiting:
            return os.preadv(self.fd, buffers[:IOV_MAX], place)
        if self._nowait is None:
            return 0
        try:
            return os.preadv(self.fd, buffers[:IOV_MAX], place, self._nowait)
        except BlockingIOError:
            return 0

    def _read_below(
        self, buffers: Sequence[memoryview], offset: int, length: int, *, is_waiting: bool
    ) -> int:
        inside = max(0, min(length, self._below - offset))
        if not inside or self._parent is None:
            return fill_zeros(buffers)
        read = self._parent.read if is_waiting else self._parent.read_nowait
        done = read(buffers if inside == length else cut(buffers, 0, inside), offset)
        if done == inside < length:
            done += fill_zeros(cut(buffers, inside, length))
        return done

    def extents(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut the bytes from ``start`` to ``stop`` of the disk: from, to, where in the file.

        The last is negative for what this file does not have.
        """
        return self._extents(start, stop, is_waiting=True)

    def _extents(
        self, start: int, stop: int, *, is_waiting: bool
    ) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            block = start >> self._shift
            base = block << self._shift
            end = min(stop, base + self._block_size)
            place = self._whole[block]
            if place > 0:
                yield start, end, place + start - base
            elif place < 0:
                yield start, end, _ABSENT
            else:
                bitmap = self._bitmaps.get(block) or self._load(block, is_waiting=is_waiting)
                if bitmap is None:
                    yield start, end, _UNKNOWN
                    return
                data = self._data(block)
                at, last = (start - base) // SECTOR, (end - base) // SECTOR
                while at < last:
                    is_here = bitmap[at] == _SET
                    after = bitmap.find(_ZERO if is_here else _ONE, at, last)
                    after = last if after < 0 else after
                    yield (
                        base + at * SECTOR,
                        base + after * SECTOR,
                        data + at * SECTOR if is_here else _ABSENT,
                    )
                    at = after
            start = end

    def _data(self, block: int) -> int:
        """Return where the data of a block that is in the file starts there."""
        return self._bat[block] * SECTOR + self._bitmap_size

    def _load(self, block: int, *, is_waiting: bool) -> bytearray | None:
        """Return the bitmap of a block that is in the file; None if that takes waiting."""
        if not self._lock.acquire(blocking=is_waiting):
            return None
        try:
            return self._load_locked(block, is_waiting=is_waiting)
        finally:
            self._lock.release()

    def _load_locked(self, block: int, *, is_waiting: bool) -> bytearray | None:
        bitmap = self._bitmaps.get(block)
        if bitmap is not None:
            return bitmap
        count = self._block_size // SECTOR
        packed = bytearray(count // 8)
        place = self._bat[block] * SECTOR
        if self._read_here([memoryview(packed)], place, is_waiting=is_waiting) != len(packed):
            if is_waiting:
                raise OSError(errno.EIO, f"the bitmap of block {block} cannot be read whole")
            return None
        bitmap = bytearray(f"{int.from_bytes(packed, 'big'):0{count}b}", "ascii")
        self._keep(block, bitmap)
        return bitmap

    def _keep(self, block: int, bitmap: bytearray) -> None:
        """Have a bitmap in memory; none is needed of a block that is here wholly."""
        sectors = min(self._block_size, self.size - (block << self._shift)) // SECTOR
        if bitmap.find(_ZERO, 0, sectors) < 0:
            self._whole[block] = self._data(block)
            self._bitmaps.pop(block, None)
            return
        while len(self._bitmaps) >= self._most_bitmaps and block not in self._bitmaps:
            del self._bitmaps[next(iter(self._bitmaps))]  # the oldest
        self._bitmaps[block] = bitmap

    # -- writing -----------------------------------------------------------------------

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write where only data changes: into the page cache."""
        if self._is_slow:
            return 0
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        inside = offset & self._mask
        if inside + length <= self._block_size and len(buffers) <= IOV_MAX:
            block = offset >> self._shift
            place = self._whole[block]
            if place > 0:
                return os.pwritev(self.fd, buffers, place + inside)
            if not place:
                bitmap = self._bitmaps.get(block)
                if bitmap is not None:
                    first = inside // SECTOR
                    if bitmap.find(_ZERO, first, first + length // SECTOR) < 0:
                        return os.pwritev(self.fd, buffers, self._data(block) + inside)
        return 0

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write all of it; see the module for the order."""
        length, done = sum(map(len, buffers)), 0
        if not self._is_prepared:
            with self._lock:
                self.prepare()
        before = self._before
        if before is not None:
            before.save(offset, offset + length)
        while done < length:
            start = offset + done
            inside = start & self._mask
            step = min(length - done, self._block_size - inside)
            part = buffers if step == length else cut(buffers, done, done + step)
            self._write_block(start >> self._shift, part, inside, step)
            done += step
        return length

    def _write_block(
        self, block: int, buffers: Sequence[memoryview], inside: int, length: int
    ) -> None:
        if self._bat[block] == FREE:
            if self._parent is None and is_zero(buffers):
                return  # so it reads already
            with self._lock:
                if self._bat[block] == FREE:
                    self._add(block)
        place = self._data(block) + inside
        first = inside // SECTOR
        last = first + length // SECTOR
        if self._is_here(block, first, last):
            transfer_all(os.pwritev, self.fd, buffers, place)
            return
        try:
            transfer_all(os.pwritev, self.fd, buffers, place)
            if self.is_ordered and (not self._added[block] or self._parent is not None):
                self.stable.sync()
            with self._lock:
                self._set_bits(block, first, last)
        except OSError:
            self._added[block] = 0  # there may be something below clear bits now
            raise

    def _is_here(self, block: int, first: int, last: int) -> bool:
        """Tell whether the bits of these sectors are set, of a block that is in the file."""
        if self._whole[block] > 0:
            return True
        bitmap = self._load(block, is_waiting=True)
        return bitmap is not None and bitmap.find(_ZERO, first, last) < 0

    def _set_bits(self, block: int, first: int, last: int) -> None:
        bitmap = self._load_locked(block, is_waiting=True)
        if bitmap is None or self._whole[block] > 0:
            return
        start, stop = first // 8, -(-last // 8)
        piece = bitmap[start * 8 : stop * 8]
        piece[first - start * 8 : last - start * 8] = _ONE * (last - first)
        packed = int(piece, 2).to_bytes(stop - start, "big")
        self._pwrite(packed, self._bat[block] * SECTOR + start)
        bitmap[first:last] = _ONE * (last - first)
        self._keep(block, bitmap)

    def _add(self, block: int) -> None:
        """Give a block its place in the file, with a clear bitmap."""
        if not self._is_ours:
            self._claim()
        start = self._aligned(self._end)
        if self._vhd.is_device:
            self._clear(start)
        elif start + self._blocks.span > self._tail:
            self._grow()
            start = self._aligned(self._end)
        entry = start // SECTOR
        self._pwrite(struct.pack(">I", entry), self._blocks.header.table + 4 * block)
        self._end = start + self._blocks.span
        self._added[block] = 1
        self._keep(block, bytearray(_ZERO * (self._block_size // SECTOR)))
        self._bat[block] = entry
        self._whole[block] = 0
        self._absent -= 1

    def _clear(self, start: int) -> None:
        """Fill the place of a new block, on a device, with zeros that are on stable storage."""
        if start + self._blocks.span > self._tail:
            raise OSError(
                errno.ENOSPC,
                f"{self.path} has no room for another block: make it larger (such as: lvextend -L "
                f"+1G {self.path}), then connect again",
            )
        self._pwrite(bytes(self._blocks.span), start)
        self.stable.sync()

    def _aligned(self, end: int) -> int:
        """Return where the next block starts if all before ``end`` is used: its data is aligned."""
        return -(-(end + self._bitmap_size) // _ALIGNED) * _ALIGNED - self._bitmap_size

    def _claim(self) -> None:
        """Own what lies between the last block and the footer, or what comes behind that.

        Whoever was killed has left zeros there, for blocks that it did not come to use.
        """
        if not self._is_free(self._end, self._tail):
            self._end = self._tail
        self.stable.sync()  # the zeros, too
        self._is_ours = True

    def _is_free(self, start: int, stop: int) -> bool:
        looked_at = 0
        for first, last in data_extents(self.fd, start, stop):
            looked_at += last - first
            if looked_at > _MOST_SLACK or any(os.pread(self.fd, last - first, first)):
                return False
        return True

    def _grow(self) -> None:
        """Make room for more blocks; see the module."""
        span, old = self._blocks.span, self._tail
        first = self._aligned(self._end)
        stride = self._aligned(first + span) - first
        count = max(1, min(_ROOM // stride, self._absent))
        tail = first + (count - 1) * stride + span
        if tail // SECTOR >= FREE:
            raise OSError(errno.ENOSPC, "a VHD's file cannot be longer: 2 TiB")
        self._pwrite(self._vhd.footer.raw, tail)
        self.stable.sync()
        self._pwrite(bytes(FOOTER), old)
        if old + FOOTER > first:
            self.stable.sync()  # a block's bitmap must not be what is there
        self._tail = tail

    @property
    def before(self) -> BeforeImages | None:
        """Saves what the disk has before that changes; None: nobody needs it."""
        return self._before

    @before.setter
    def before(self, images: BeforeImages | None) -> None:
        self._before = images
        self._is_slow = images is not None or not self._is_prepared

    def _needs_preparation(self) -> bool:
        return self._lacks_footer or self._vhd.has_old_copy or self._true_batmap() is not None

    @property
    def _lacks_footer(self) -> bool:
        vhd = self._vhd
        return vhd.tail is None or vhd.length - vhd.tail != FOOTER

    def check_room(self) -> None:
        """See that a footer that is missing has room.

        Raises:
            OSError: it has none.
        """
        if self._lacks_footer:
            self._place_of_footer()

    def _place_of_footer(self) -> int:
        length = whole_sectors(self._vhd.length)
        at = max(self._end, length - FOOTER)
        if self._vhd.is_device and at + FOOTER > length:
            raise OSError(errno.ENOSPC, "the device has no room for a footer at its end")
        return at

    def prepare(self) -> None:
        """Put it in order for writing: a footer at its end and its copy, and a true batmap.

        The first change does that by itself.

        Raises:
            OSError: it cannot be written.
        """
        if self._is_prepared:
            return
        vhd = self._vhd
        if self._lacks_footer:
            length, at = whole_sectors(vhd.length), self._place_of_footer()
            old = os.pread(self.fd, FOOTER, at)
            is_data = any(old) and not old.startswith(vhd.footer.raw[:8])  # no damaged footer
            if is_data and at != self._end and not vhd.is_device:
                at = length
            self._pwrite(vhd.footer.raw, at)
            self.stable.sync()
            self._tail = at
            self._vhd = replace(vhd, tail=at, length=at + FOOTER)  # done once is enough
        if vhd.has_old_copy:
            self._pwrite(vhd.footer.raw, 0)
            self.stable.sync()
            self._vhd = replace(self._vhd, has_old_copy=False)
        batmap = self._true_batmap()
        if batmap is not None:
            self._put_batmap(*batmap)
        self._is_prepared = True
        self._is_slow = self._before is not None

    def _true_batmap(self) -> tuple[Batmap, bytes] | None:
        """Make a batmap in which no block is full that is not in the file; None: it is like that.

        Of a block that counts as full blktap does not read the bitmap.
        """
        batmap = self._blocks.batmap
        if batmap is None:
            return None
        old = os.pread(self.fd, batmap.length, batmap.offset)
        if checksum(old) != batmap.checksum:
            return None  # it is no good to anybody
        new = bytearray(old)
        for block, entry in enumerate(self._bat):
            if entry == FREE and block // 8 < len(new):
                new[block // 8] &= ~(0x80 >> block % 8)
        return None if new == old else (batmap, bytes(new))

    def _put_batmap(self, batmap: Batmap, content: bytes) -> None:
        self._pwrite(content, batmap.offset)
        header = struct.pack(">I", checksum(content))
        self._pwrite(header, self._blocks.header.end_of_table + 24)
        self.stable.sync()

    def _pwrite(self, data: bytes | bytearray, offset: int) -> None:
        transfer_all(os.pwritev, self.fd, [memoryview(data)], offset)

    # -- the rest ----------------------------------------------------------------------

    def set_uuid(self, uuid: bytes) -> None:
        """Be another VHD from now on, on stable storage."""
        self._put_footer(self._vhd.footer.with_uuid(uuid))

    def _put_footer(self, footer: Footer) -> None:
        self._vhd = replace(self._vhd, footer=footer)
        for place in (self._tail, 0):
            self._pwrite(footer.raw, place)
            self.stable.sync()

    def grow(self, size: int) -> None:
        """Become a larger disk, while requests run inside the old size.

        After each single write it is a good VHD, of the old size or the new one. Blocks stay where
        they are, so that the table grows as far as nothing lies behind it.

        Raises:
            ImageError: the table has no room for that.
            OSError: it cannot be written.
        """
        with self._lock:
            self.prepare()
            count, old = len(self._bat), self.size
            extra = blocks_of(size, self._block_size) - count
            if extra > 0:
                self._extend_table(count, count + extra)
            self._absent += extra
            self._bat.extend([FREE] * extra)
            self._added.extend(bytes(extra))
            self._whole.extend([_ABSENT] * extra)
            before = self._vhd
            try:
                self._put_footer(before.footer.with_size(size))
            except OSError:
                self._vhd = before
                raise
            # The last block may have been whole up to the old end only: its bitmap will tell.
            last = (old - 1) >> self._shift
            self._whole[last] = min(self._whole[last], 0)
            self._below = 0 if self._parent is None else min(self._parent.size, size)
            self.size = size

    def _extend_table(self, count: int, needed: int) -> None:
        """Have the table end in free entries, from number ``count`` on."""
        header, batmap = self._blocks.header, self._blocks.batmap
        end = header.table + whole_sectors(4 * needed)
        behind = [entry * SECTOR for entry in self._bat if entry != FREE]
        behind += [each.offset for each in header.locators]
        behind.append(self._vhd.footer.data_offset)
        if batmap is not None:  # it stands behind the table, wherever that ends
            behind.append(header.end_of_table)
        if self._vhd.is_device:
            behind.append(self._tail)
        limit = min((place for place in behind if place >= header.table), default=end)
        most = (limit - header.table) // 4
        if batmap is not None:
            most = min(most, 8 * batmap.length)
        if needed > max(most, header.entries):
            most = max(most, header.entries)
            raise ImageError(f"its table has room for {format_size(most * self._block_size)}")
        if end > self._end:
            self._make_room_for_table(end)
        self._pwrite(b"\xff" * (4 * (needed - count)), header.table + 4 * count)
        self.stable.sync()
        if needed > header.entries:
            header = header.with_entries(needed)
            self._pwrite(header.raw[:SECTOR], self._vhd.footer.data_offset)
            self.stable.sync()
            self._blocks = replace(self._blocks, header=header)

    def _make_room_for_table(self, end: int) -> None:
        """Have what is used end at ``end`` at least, where there is no block yet."""
        if not self._is_ours:
            self._claim()
        self._end = max(self._end, end)
        if self._end > self._tail and not self._vhd.is_device:
            self._grow()

    def discard(self, offset: int, length: int) -> None:
        """Give the space of what is in the file back: zeros are read there.

        What only the parent has stays as it is.
        """
        before, deadline = self._before, time.monotonic() + WAIT
        for start, stop, place in self.extents(offset, offset + length):
            if place >= 0:
                if before is not None:
                    before.save(start, stop, deadline)
                punch_hole(self.fd, place, stop - start)

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Name the extents that this or what lies below has: from, to; all others are zeros."""
        first = last = start
        for begin, end in self._allocated(start, stop):
            if begin != last:
                if first < last:
                    yield first, last
                first = begin
            last = end
        if first < last:
            yield first, last

    def _allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for begin, end, place in self.extents(start, stop):
            below = min(end, self._below)
            if place >= 0:
                yield begin, end
            elif isinstance(self._parent, BlockLayer) and begin < below:
                yield from self._parent.allocated(begin, below)
            elif self._parent is not None and begin < below:
                yield from data_extents(self._parent.fd, begin, below)

    @property
    def descriptors(self) -> list[int]:
        """The files of this and what lies below."""
        below = self._parent
        if below is None:
            return [self.fd]
        return [self.fd, *(below.descriptors if isinstance(below, BlockLayer) else [below.fd])]

    @property
    def storages(self) -> list[Storage]:
        """Where this and what lies below is."""
        own = storage_of(os.fstat(self.fd), self.path, writable=self._writable)
        below = self._parent
        if below is None:
            return [own]
        return [own, *(below.storages if isinstance(below, BlockLayer) else [below.storage])]

    def close(self) -> None:
        """Give unused room back, and close this and what lies below."""
        if self.fd < 0:
            return
        try:
            if self._is_ours and self._end < self._tail and not self._vhd.is_device:
                self._trim()
        finally:
            fd, self.fd = self.fd, -1
            os.close(fd)
            if self._parent is not None:
                self._parent.close()

    def _trim(self) -> None:
        end = whole_sectors(self._end)
        self._pwrite(self._vhd.footer.raw, end)
        self.stable.sync()
        os.ftruncate(self.fd, end + FOOTER)
        self._tail = end
