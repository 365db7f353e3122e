"""``overlay``: copy-on-write into a file. What the guest writes is kept there, beside the image.

The image is opened for reading only, and many overlays can share one. ``diff``, ``commit`` and
``export`` say what an overlay holds, put it into the image, or make a new image of both.

A write puts its data into the file first, then marks its blocks (4096 bytes each) as allocated
there. A process that is killed at any instant leaves each sector old or new, and nothing else
changed. After a crash of the host all that was flushed is there: see :mod:`.file` for why.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from typing import Callable

from ...errors import DeviceError, UsageError
from ...host import memory
from ...units import format_size
from .. import Backend, sharing
from ..before_images import WAIT, BeforeImages
from ..image import Image, cut, file_system
from ..newfile import sync_directory
from ..sharing import Storage, storage_of
from .file import OverlayFile
from .header import BLOCK

log = logging.getLogger("xen_disk_py")

_DISCARD_BLOCKS = 4096  # looked at in one go: a page of the map

_Read = Callable[["Sequence[memoryview]", int], int]


class OverlayBackend(Backend):
    """An image that is never changed, under a file that holds the changes.

    A discard gives the blocks that lie wholly inside it back to the file system: the *image's own*
    content is read there afterwards, not zeros; but zeros may be read at the same time, and after
    a crash of the host, until the next flush. What it covers of other blocks stays as it is.

    Changes are counted by blocks (4096 bytes each). A write that would go beyond ``cow_limit``
    fails whole (``ENOSPC``), one for which the file system has no room may be done in part; blocks
    that are allocated can always be written again.

    Whoever changes the image makes the overlay useless, so it is refused then: the image must be
    the same file or device, with the same size and time of modification, as when it was made.

    Args:
        path: the image; its lock is shared: other readers may come, a writer may not.
        overlay: the file, for us alone; made if there is none.
        cow_limit: the bound in bytes; by default what the file system has room for.
        sector_size: the logical sector in bytes; by default that of the overlay, and of a new one
            the device's own, 512 for a file.
    """

    threads = 16
    survives = True
    discard_granularity = BLOCK

    def __init__(
        self,
        path: str,
        *,
        overlay: str,
        cow_limit: int | None = None,
        sector_size: int | None = None,
    ) -> None:
        if cow_limit is not None and cow_limit < 0:
            raise UsageError(f"--cow-limit: {cow_limit} bytes is less than nothing")
        self._image, self._file = _open(path, overlay, sector_size)
        self._readers = (self._image.read, self._file.reader.read)
        self._readers_nowait = (self._image.read_nowait, self._file.reader.read_nowait)
        self._starts = (0, self._file.data)  # in what they read
        self.path = self._image.path
        self.size = self._image.size
        self.sector_size = self._image.sector_size
        self.cow_limit = cow_limit
        in_memory = file_system(self._file.fd) in ("tmpfs", "ramfs")
        self._budget = memory.Budget(memory.room) if in_memory else None
        self._warned = False
        self._before: BeforeImages | None = None

    @property
    def exported_fd(self) -> int:
        """The file that an export of this disk, while it is in use, reads."""
        return self._file.fd

    def keep_before_images(self, images: BeforeImages | None) -> None:
        """Save there, from now on, what the disk has before that changes; None: no longer."""
        self._before = images

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read from the file what is allocated there, from the image what is not."""
        return self._read(buffers, offset, self._readers)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is in the page cache."""
        block = offset // BLOCK
        if len(buffers) == 1 and offset + len(buffers[0]) <= (block + 1) * BLOCK:  # most requests
            allocated = self._file.allocated[block]
            return self._readers_nowait[allocated](buffers, self._starts[allocated] + offset)
        return self._read(buffers, offset, self._readers_nowait)

    def _read(
        self, buffers: Sequence[memoryview], offset: int, readers: tuple[_Read, _Read]
    ) -> int:
        length, done = sum(map(len, buffers)), 0
        for start, stop, allocated in self._file.extents(offset, offset + length):
            whole = stop - start == length
            part = buffers if whole else cut(buffers, start - offset, stop - offset)
            moved = readers[allocated](part, self._starts[allocated] + start)
            done += moved
            if moved < stop - start:
                break
        return done

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write into the file, with the rest of blocks that are not allocated there yet."""
        before = self._before
        if before is not None:
            before.save(offset, offset + sum(map(len, buffers)))
        return self._write(buffers, offset, self._image.read)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write into the page cache, unless a part of the image is needed that is not there."""
        if self._before is not None:
            return 0
        return self._write(buffers, offset, self._image.read_nowait)

    def _write(self, buffers: Sequence[memoryview], offset: int, read_image: _Read) -> int:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        end = offset + length
        first, last = offset // BLOCK, -(-end // BLOCK)
        if not offset % BLOCK and (not end % BLOCK or end == self.size):  # most requests
            file = self._file
            with file.lock:
                if last - first != 1:
                    self._store(buffers, offset, first, last, ())
                elif file.allocated[first]:  # most of these: nothing to allocate
                    file.write_again(buffers, offset, length)
                elif len(buffers) == 1:
                    self._check_limit(1)
                    file.write_first(buffers[0], first)
                else:
                    self._store(buffers, offset, first, last, ())
            return length
        # What the first and the last block have before and behind the write: block, from, to
        edges = ((first, first * BLOCK, offset), (last - 1, end, min(last * BLOCK, self.size)))
        allocated = self._file.allocated
        copies: dict[int, memoryview] = {}  # of the image, by where they start; it never changes
        while True:
            # Not locked, since the image may take its time.
            for block, start, stop in edges:
                if start < stop and not allocated[block] and start not in copies:
                    copies[start] = memoryview(bytearray(stop - start))
                    if not _fill(copies[start], start, read_image):
                        return 0
            # Locked, or two writes to one block, or a discard in between, would lose something.
            with self._file.lock:
                wanted = [
                    (s, stop) for block, s, stop in edges if s < stop and not allocated[block]
                ]
                if not all(s in copies for s, _ in wanted):
                    continue  # a discard was quicker
                head = [copies[s] for s, _ in wanted if s < offset]
                tail = [copies[s] for s, _ in wanted if s >= end]
                start = offset - sum(map(len, head))
                self._store([*head, *buffers, *tail], start, first, last, wanted)
                return length

    def _store(
        self,
        buffers: Sequence[memoryview],
        offset: int,
        first: int,
        last: int,
        copied: Sequence[tuple[int, int]],
    ) -> None:
        """Write what fills the blocks from ``first`` to before ``last`` that are not allocated."""
        file = self._file
        fresh = file.allocated[first:last].count(0)
        if fresh:
            self._check_limit(fresh)
        file.write(buffers, offset, copied)
        if fresh:
            file.allocate(first, last)

    def _check_limit(self, fresh: int) -> None:
        limit = self.cow_limit
        if limit is not None and (self._file.used + fresh) * BLOCK > limit:
            self._refuse(
                f"the {format_size(limit)} that they may take: writes fail from now on; "
                "connect with a larger --cow-limit, or commit them"
            )
        if self._budget is not None and not self._budget.take(fresh * BLOCK):
            self._refuse(
                "the memory that this host can spare, in which the overlay is: writes fail until "
                "there is more"
            )

    def _refuse(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s: the guest's changes fill %s", self._file.path, what)
        used = format_size(self._file.used * BLOCK)
        raise OSError(errno.ENOSPC, f"the overlay is full ({used})")

    def flush(self) -> None:
        """``fdatasync``, and make sure of which blocks are allocated."""
        self._file.flush()

    def discard(self, offset: int, length: int) -> None:
        """Give space back; the image's own content is read there afterwards."""
        end = offset + length
        before, deadline = self._before, time.monotonic() + WAIT
        last = self._file.blocks if end == self.size else end // BLOCK
        for first in range(-(-offset // BLOCK), last, _DISCARD_BLOCKS):
            if not self._file.used:
                return
            stop = min(first + _DISCARD_BLOCKS, last)
            if before is not None and self._file.allocated.find(b"\1", first, stop) >= 0:
                before.save(first * BLOCK, min(stop * BLOCK, self.size), deadline)
            with self._file.lock:
                if self._file.allocated.find(b"\1", first, stop) >= 0:
                    self._file.deallocate(first, stop)

    def resize(self, size: int | None) -> int:
        """Refuse: the changes fit an image of one size."""
        raise DeviceError(
            "a disk with an overlay keeps its size: disconnect it, put its changes into the image "
            f"(commit {self._file.path}), change that (truncate -s SIZE {self.path}), and connect "
            "it with a new overlay"
        )

    @property
    def host_storage(self) -> Sequence[Storage]:
        """The image, which is only read, and the file of the changes."""
        file = self._file
        return [
            self._image.storage,
            storage_of(os.fstat(file.fd), file.path, writable=not self.read_only),
        ]

    def close(self) -> None:
        """Close both, with the changes on stable storage."""
        if self._before is not None:
            self._before.fail("the disk is closed")
        try:
            self._file.close()
        finally:
            self._image.close()


def _open(path: str, overlay: str, sector_size: int | None) -> tuple[Image, OverlayFile]:
    """Open an image and the overlay for it, or make one."""
    if os.path.exists(overlay) and os.path.exists(path) and os.path.samefile(path, overlay):
        raise UsageError(f"--overlay {overlay}: that is the image itself: give another name")
    if sharing.is_looking():
        return _look_at(path, overlay)
    if not os.path.lexists(overlay):
        image = Image.open(path, writable=False, sector_size=sector_size)
        try:
            return image, OverlayFile.create(overlay, image)
        except BaseException:
            image.close()
            raise
    file = OverlayFile.open(overlay, writable=True)
    try:
        own = file.header.sector_size
        if sector_size not in (None, own):
            raise UsageError(  # noqa: TRY301 - what is open is closed below, whatever it is
                f"--sector-size {sector_size}: the overlay {overlay} was made with {own}: leave "
                "out --sector-size"
            )
        image = file.open_image(path, writable=False)
        try:
            if file.header.was_committed(image):  # by a process that was killed
                sync_directory(os.path.realpath(image.path))
                file.empty(image)
            file.attach(image)
        except BaseException:
            image.close()
            raise
    except BaseException:
        file.close()
        raise
    return image, file


def _look_at(path: str, overlay: str) -> tuple[Image, OverlayFile]:
    """Open both for reading, and see that they fit; nothing is locked."""
    file = OverlayFile.look_at(overlay)
    try:
        image = file.open_image(path, writable=False)
        try:
            if not file.header.was_committed(image):
                file.header.check(image, file.path)
        except BaseException:
            image.close()
            raise
    except BaseException:
        file.close()
        raise
    return image, file


def _fill(buffer: memoryview, offset: int, read: _Read) -> bool:
    """Fill a buffer from the image; False if not all of it is there."""
    while buffer:
        done = read([buffer], offset)
        if not done:
            return False
        buffer, offset = buffer[done:], offset + done
    return True
