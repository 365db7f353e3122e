"""The file that an overlay is: its layout, who may open it, which blocks of the image it has.

::

    0            a header of 4096 bytes, twice: whose changes these are, see :mod:`.header`
    4096         the live map: a byte for each block of 4096 bytes, 1 where it is allocated in here
    + map        the durable map, of the same length (both rounded up to 4096 bytes)
    + map        the blocks, each as far in here as it is in the image: what is not allocated is a
                 hole

A block is marked in the live map only *after* its data is in the file, so a process that is killed
at any instant leaves the old content or the new: what it had written is in the page cache, in the
order in which it was written. A host that crashes loses the page cache, and may have put a mark on
storage before its data. So a flush waits for the data, then copies the marks that stood *before*
that wait into the durable map, and waits again. Whoever opens the file while the page cache is
surely still there (see :mod:`.epoch`) goes by the live map, anybody else by the durable one.

Storage may also lose what was written while all this lives: after an error of write-back the page
cache may drop it, and the next ``fdatasync`` succeeds. So it is known which sectors no flush has
covered, and after a flush that failed none succeeds until they have been written again. What of
them is the image's is copied again here, the rest is up to whoever wrote it. Until then nobody
else goes by the live map.

The map is used from a private copy, and written with ``pwrite``: a mapping of the file would be a
signal that kills the process (``SIGBUS``) where somebody cuts it short.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from ...errors import ImageError
from ...hypervisor import Closing
from ..holes import data_extents, punch_hole
from ..image import Image, lock, transfer_all
from ..newfile import NewFile, why
from .epoch import Epoch
from .header import BLOCK, COPY, Commit, Header, damaged
from .trust import require_trusted
from .unflushed import Unflushed

log = logging.getLogger("xen_disk_py")

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
_NOT = (b"\1", b"\0")  # by the byte of a map, the other one


class OverlayFile(Closing):
    """An open overlay, locked until it is closed.

    Attributes:
        fd: the descriptor.
        path: absolute.
        header: whose changes it holds.
        blocks: how many the image has.
        used: how many of them are allocated in here.
        allocated: the map, a byte for each block: 0 or 1. To be changed through :meth:`allocate`
            and :meth:`deallocate` only.
        data: where the blocks start in the file, in bytes.
        reader: the file as an image, which has the disk's blocks from ``data`` on.
        lock: to be held by whoever changes the map.
        in_use: somebody else may be changing the file.
    """

    def __init__(
        self, fd: int, path: str, header: Header, *, writable: bool, in_use: bool = False
    ) -> None:
        self.fd = fd
        self.in_use = in_use
        self.path = os.path.abspath(path)
        self.header = header
        self.blocks = -(-header.size // BLOCK)
        self._map_length = _map_length(header.size)
        self.data = BLOCK + 2 * self._map_length
        self.used = 0
        self.lock = threading.Lock()
        self._flushing = threading.Lock()
        self._changed: set[int] = set()  # pages in which the durable map may not be the live one
        self._image: Image | None = None  # what it lies over, once attached
        self._reserved: set[int] = set()  # pages of the durable map that have their space
        self.check_length()
        try:
            self.allocated = self._make_map()
            self._unflushed = Unflushed(self.blocks, self._make_map)
        except (OSError, OverflowError, ValueError) as error:
            raise ImageError(f"{path}: its map does not fit into memory: {error}") from error
        try:
            self._is_live = self.header.live and self.header.epoch.lasts(Epoch.of(fd))
            self._load()
        except BaseException:
            self._close_maps()
            raise
        self.reader = Image(
            fd,
            self.path,
            self.data + header.size,
            sector_size=header.sector_size,
            read_only=not writable,
            is_block_device=False,
        )

    @classmethod
    def create(cls, path: str, image: Image) -> OverlayFile:
        """Make an empty one for ``image``, whole or not at all, and on stable storage.

        Raises:
            ImageError: it cannot be made, or there is such a file.
        """
        try:
            with NewFile(path) as new:
                header = Header.of(image, Epoch.of(new.fd))
                os.ftruncate(new.fd, _file_length(header.size))
                transfer_all(os.pwritev, new.fd, [memoryview(2 * header.pack())], 0)
                file = cls(new.fd, path, header, writable=True)
                file._image = image
                os.fsync(new.fd)
                new.put(path, replacing=False)
                new.detach()
        except OSError as error:
            raise ImageError(f"{path}: cannot be made: {why(error, path)}") from error
        return file

    @classmethod
    def open(cls, path: str, *, writable: bool, alone: bool | None = True) -> OverlayFile:
        """Open one that exists; nothing of it is changed yet.

        Args:
            path: the file.
            writable: for reading and writing.
            alone: True, nobody else may have it; False, nobody who writes may; None, anybody may,
                see ``in_use``.

        Raises:
            ImageError: it cannot be used; the message says why and what to do.
        """
        try:
            # O_NONBLOCK: opening a pipe would wait for its other end
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK)
        except OSError as error:
            raise ImageError(f"{path}: the overlay cannot be opened: {error.strerror}") from error
        try:
            header = _read_header(fd, path)  # what is no overlay is not locked either
            in_use = False
            try:
                lock(fd, path, bool(alone), False)
            except ImageError:
                if alone is not None:
                    raise
                in_use = True
            header = _read_header(fd, path)  # the last one to use it may just have written it
            return cls(fd, path, header, writable=writable, in_use=in_use)
        except OSError as error:
            os.close(fd)
            raise ImageError(f"{path}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def look_at(cls, path: str) -> OverlayFile:
        """Open it for reading without a lock: a disk may be using it.

        Raises:
            ImageError: it cannot be used.
        """
        try:
            return cls.of(os.open(path, os.O_RDONLY | os.O_NONBLOCK), path)
        except OSError as error:
            raise ImageError(f"{path}: the overlay cannot be opened: {error.strerror}") from error

    @classmethod
    def of(cls, fd: int, path: str) -> OverlayFile:
        """Read the overlay that is open as ``fd``, which it closes: a clone of ``path``.

        Raises:
            ImageError: it cannot be used.
            OSError: it cannot be read.
        """
        try:
            return cls(fd, path, _read_header(fd, path), writable=False)
        except BaseException:
            os.close(fd)
            raise

    @property
    def is_live(self) -> bool:
        """Whether the live map counts: so it does for whoever is writing, unless a flush failed."""
        return self._is_live

    def check_length(self) -> None:
        """See that nobody has cut it short.

        Raises:
            ImageError: it has not the length that it was made with.
        """
        length, whole = os.fstat(self.fd).st_size, _file_length(self.header.size)
        if length != whole:
            raise damaged(self.path, f"it has {length} bytes, not {whole}: perhaps cut short")

    def open_image(self, path: str, *, writable: bool) -> Image:
        """Open an image for this overlay; whether it fits is not looked at.

        Raises:
            ImageError: it cannot be opened.
        """
        if not os.path.exists(path):
            raise ImageError(
                f"{path}: no such file, but {self.path} has the changes to it: put it back, or "
                f"name a copy of it: xen-disk rebase {self.path} COPY"
            )
        return Image.open(path, writable=writable, sector_size=self.header.sector_size)

    def attach(self, image: Image) -> None:
        """Make it ready to be changed, as what lies over ``image``.

        Raises:
            ImageError: it was made for another image, or this one has changed since.
            OSError: it cannot be written.
        """
        self.header.check(image, self.path)
        self.rebase(image)

    def rebase(self, image: Image) -> None:
        """Do that, whether it was made for ``image`` or not.

        Raises:
            OSError: it cannot be written.
        """
        self._image = image
        self._unflushed.inherited = True
        now = Header.of(image, Epoch.of(self.fd))._replace(sector_size=self.header.sector_size)
        if not self._is_live:
            if self._changed:
                log.warning(
                    "%s: what was not flushed is lost, as after a crash of this host, since %s",
                    self.path,
                    "its page cache did not survive" if self.header.live else "a flush failed",
                )
            if not self.header.live:  # read what storage has, not what it could not take
                with suppress(OSError):
                    os.fdatasync(self.fd)
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._write_pages(BLOCK, self._pages(self._changed))
            self._is_live = True
        self._write_header(now)  # last: until then the durable map is what counts

    def note(self, commit: Commit | None) -> None:
        """Note that a commit is about to replace the image, or that it is not; on stable storage.

        Raises:
            OSError: it is not noted, or perhaps not on storage.
        """
        self._write_header(self.header._replace(commit=commit))
        os.fsync(self.fd)

    def empty(self, image: Image) -> None:
        """Drop all changes, and begin anew over ``image``: after a commit, which is noted.

        Takes no space, and can be killed at any instant: then it is done again.

        Raises:
            ImageError: the image has another size.
            OSError: the file cannot be written.
        """
        if image.size != self.header.size:
            raise ImageError(
                f"{image.path}: has {image.size} bytes now, not {self.header.size}: remove the "
                f"overlay {self.path}, whose changes are in the image, and begin a new one"
            )
        for start, stop in [*data_extents(self.fd, BLOCK, self.data)]:
            self._zero(start, stop)
        os.fdatasync(self.fd)
        now = Header.of(image, Epoch.of(self.fd))._replace(sector_size=self.header.sector_size)
        self._write_header(now)
        os.fsync(self.fd)
        with suppress(OSError):  # not every file system can: then the space stays taken
            punch_hole(self.fd, self.data, self.header.size)
        self._close_maps()
        self.allocated, self.used = self._make_map(), 0
        self._unflushed = Unflushed(self.blocks, self._make_map)
        self._changed, self._reserved = set(), set()
        self._is_live = True

    def _zero(self, start: int, stop: int) -> None:
        try:
            punch_hole(self.fd, start, stop - start)
        except OSError:
            for at in range(start, stop, 1 << 20):
                zeros = memoryview(bytes(min(1 << 20, stop - at)))
                transfer_all(os.pwritev, self.fd, [zeros], at)

    def _write_header(self, header: Header, *, waits: bool = True) -> None:
        """Write it; whatever a power cut tears, it or the one before can be read.

        Args:
            header: what is to be there.
            waits: for the storage; else only those who read it in this boot are told.
        """
        if header == self.header:
            return
        page = memoryview(header.pack())
        if waits:
            os.fdatasync(self.fd)  # the first may have been written a moment ago
            transfer_all(os.pwritev, self.fd, [page], COPY)
            os.fdatasync(self.fd)
        transfer_all(os.pwritev, self.fd, [page], 0)
        self.header = header

    def extents(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut the bytes from ``start`` to ``stop`` of the disk into extents: from, to, allocated.

        The last is 1 for what is in here, 0 for what is in the image.
        """
        at, last = start // BLOCK, -(-stop // BLOCK)
        while at < last:
            allocated = self.allocated[at]
            end = self.allocated.find(_NOT[allocated], at + 1, last)
            if end < 0:
                end = last
            yield max(start, at * BLOCK), min(stop, end * BLOCK), allocated
            at = end

    def write(
        self, buffers: Sequence[memoryview], offset: int, copied: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Store ``buffers``, ``offset`` bytes into the disk; :meth:`allocate` makes them count.

        Args:
            buffers: the data.
            offset: where it belongs.
            copied: the parts of it that are copies of the image's content: from, to, each in one
                block.
        """
        try:
            stop = offset + transfer_all(os.pwritev, self.fd, buffers, self.data + offset)
        except OSError:  # no space left, mostly: what does not count must not take any
            stop = offset + sum(map(len, buffers))
            for start, end, allocated in self.extents(offset, stop):
                if not allocated:
                    self._punch(start, end)
            raise
        self._unflushed.write(offset, stop)
        for start, end in copied:
            self._unflushed.copy(start, end)

    def write_again(self, buffers: Sequence[memoryview], offset: int, length: int) -> None:
        """Do the same where all is allocated; ``length`` is that of all ``buffers``."""
        if len(buffers) == 1:
            done = os.pwrite(self.fd, buffers[0], self.data + offset)
        else:
            done = os.pwritev(self.fd, buffers, self.data + offset)
        if done == length:
            self._unflushed.write(offset, offset + length)
        else:
            self.write(buffers, offset)

    def write_first(self, buffer: memoryview, block: int) -> None:
        """Store a whole block that is not allocated, and have it count.

        This is :meth:`write` and :meth:`allocate`, with half of the calls; the mark is behind the
        data here, too.
        """
        offset, page = block * BLOCK, block // BLOCK
        if page not in self._reserved:
            self._reserve(page)
        try:
            is_done = os.pwrite(self.fd, buffer, self.data + offset) == len(buffer)
        except OSError:
            is_done = False  # what is to be done about it is known there
        if is_done:
            self._unflushed.write(offset, offset + len(buffer))
            is_done = os.pwrite(self.fd, b"\1", BLOCK + block) == 1
        else:
            self.write([buffer], offset)
        if is_done:
            self.used += 1
            self.allocated[block] = 1
            self._changed.add(page)
        else:
            self._mark(block, block + 1, b"\1")

    def allocate(self, first: int, last: int) -> None:
        """Have the blocks from ``first`` to before ``last`` count, whose data was written."""
        self._mark(first, last, b"\1")

    def deallocate(self, first: int, last: int) -> None:
        """Have the image's own content in these blocks, and give their space back."""
        self._mark(first, last, b"\0")
        self._unflushed.forget(first, last)
        self._punch(first * BLOCK, min(last * BLOCK, self.header.size))

    def sync(self) -> None:
        """Return when all of it is on stable storage, the header too.

        Raises:
            OSError: it is not, see :meth:`flush`.
        """
        self.flush()
        os.fsync(self.fd)

    def flush(self) -> None:
        """Return when all that was written and marked before is on stable storage.

        Raises:
            OSError: it is not. No later flush succeeds until all that was written since the last
                good one has been written again.
        """
        with self._flushing:  # a second one must not return before the marks of the first are safe
            with self.lock:
                if self._unflushed.failed:
                    self._write_again()
                changed, self._changed = self._changed, set()
                pages = self._pages(changed)  # before the wait, since later data may not be safe
                self._unflushed.begin()
            try:
                os.fdatasync(self.fd)
                if pages:
                    self._write_pages(BLOCK + self._map_length, pages)
                    os.fdatasync(self.fd)
            except BaseException:
                with self.lock:
                    self._changed |= changed
                    self._unflushed.fail()
                    with suppress(OSError):  # whoever opens it next must not trust the cache
                        self._write_header(self.header._replace(live=False), waits=False)
                        self._copy_again()
                raise
            with self.lock:
                self._unflushed.succeed()
                if not self.header.live:
                    self._write_header(self.header._replace(live=True))

    def _write_again(self) -> None:
        """Write again what is known here of what the last flush did not cover."""
        self._copy_again()
        if self._unflushed.is_lost:
            raise OSError(
                errno.EIO, "an earlier flush failed, and what was written before it may be lost"
            )
        self._write_pages(BLOCK, self._pages(self._changed))

    def _copy_again(self) -> None:
        """Copy what is the image's of blocks in here, which the page cache may have dropped."""
        for start, stop in [*self._unflushed.copies()]:
            assert self._image is not None
            buffer = memoryview(bytearray(stop - start))
            transfer_all(os.preadv, self._image.fd, [buffer], start)
            self.write([buffer], start, [(start, stop)])

    def close(self) -> None:
        """Bring the durable map up to date, unlock and close."""
        if self.fd < 0:
            return
        try:
            if self._unflushed.failed:
                log.warning(
                    "%s: a flush failed: what was written since the last good one may be lost",
                    self.path,
                )
            elif not self.reader.read_only and (self._changed or not self._unflushed.is_empty):
                self.flush()
        finally:
            self.fd = -1
            self._close_maps()
            self.reader.close()

    def _make_map(self) -> mmap.mmap:
        """Make a map in memory, a byte for each block: zeros, which take no room."""
        return mmap.mmap(-1, self.blocks, flags=_ANONYMOUS)

    def _close_maps(self) -> None:
        self.allocated.close()
        self._unflushed.close()

    def _punch(self, start: int, stop: int) -> None:
        with suppress(OSError):  # not every file system can: then the space stays taken
            punch_hole(self.fd, self.data + start, stop - start)

    def _mark(self, first: int, last: int, byte: bytes) -> None:
        content = byte * (last - first)
        pages = set(range(first // BLOCK, -(-last // BLOCK)))
        for page in pages - self._reserved:
            self._reserve(page)
        transfer_all(os.pwritev, self.fd, [memoryview(content)], BLOCK + first)
        self.used += content.count(1) - self.allocated[first:last].count(1)
        self.allocated[first:last] = content
        self._changed |= pages

    def _reserve(self, page: int) -> None:
        """Take the space of a page of the durable map, or a flush would find none for it."""
        try:
            os.posix_fallocate(self.fd, BLOCK + self._map_length + page * BLOCK, BLOCK)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
                raise
        self._reserved.add(page)

    def _pages(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Copy pages of the map, by where they are in it."""
        return {page * BLOCK: self.allocated[page * BLOCK : (page + 1) * BLOCK] for page in numbers}

    def _write_pages(self, at: int, pages: dict[int, bytes]) -> None:
        for start, page in sorted(pages.items()):
            transfer_all(os.pwritev, self.fd, [memoryview(page)], at + start)

    def _load(self) -> None:
        """Read the map that counts, and see where the two differ."""
        counts = 0 if self._is_live else self._map_length
        starts: set[int] = set()
        for start, stop in data_extents(self.fd, BLOCK, self.data):
            first = (start - BLOCK) // BLOCK * BLOCK
            starts.update(at % self._map_length for at in range(first, stop - BLOCK, BLOCK))
        for start in starts:
            pages = {
                at: os.pread(self.fd, BLOCK, BLOCK + at + start) for at in (0, self._map_length)
            }
            page = pages[counts]
            part = page[: self.blocks - start]
            allocated = part.count(1)
            if allocated + page.count(0) != BLOCK:
                raise damaged(self.path, "its map makes no sense")
            if allocated:
                self.allocated[start : start + len(part)] = part
                self.used += allocated
            if pages[0] != pages[self._map_length]:
                self._changed.add(start // BLOCK)


def image_path(path: str) -> str:
    """Return the path of the image that the overlay ``path`` was made for.

    Raises:
        ImageError: it is no overlay, or one whose author may be somebody else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            header = _read_header(fd, path)
            require_trusted(fd, path)
            return header.path
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"{path}: the overlay cannot be opened: {error.strerror}") from error


def _read_header(fd: int, path: str) -> Header:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ImageError(f"{path}: not an overlay, which is a file: give another name")
    return Header.parse(os.pread(fd, BLOCK, 0), path)


def _file_length(size: int) -> int:
    """Return the length of an overlay, in bytes, of an image of ``size`` bytes."""
    return BLOCK + 2 * _map_length(size) + size


def _map_length(size: int) -> int:
    """Return the length of a map, in bytes, of an image of ``size`` bytes."""
    return -(-size // BLOCK**2) * BLOCK
