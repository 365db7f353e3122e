"""The file that an overlay is: its layout, who may open it, which blocks of the image it holds.

::

    0            a header of 4096 bytes: whose changes these are
    4096         the live map: a byte for each block of 4096 bytes, 1 where the file holds it
    + map        the durable map, of the same length (both rounded up to 4096 bytes)
    + map        the blocks, each as far in here as it is in the image: what is not held is a hole

A block is marked in the live map only *after* its data is in the file, so a process that is killed
at any instant leaves the old content or the new: what it had written is in the page cache, in the
order in which it was written. A host that crashes loses the page cache, and may have put a mark on
storage before its data. So a flush waits for the data, then copies the marks that stood *before*
that wait into the durable map, and waits again. Whoever opens the file while the host has not been
started anew since (it has the same boot id) goes by the live map, anybody else by the durable one.

The map is used from a private copy, and written with ``pwrite``: a mapping of the file would be a
signal that kills the process (``SIGBUS``) where somebody cuts it short.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...errors import ImageError
from ...hypervisor import Closing
from ..image import Image, lock, transfer_all
from ..signatures import OVERLAY
from ..trim import punch_hole

BLOCK = 4096
VERSION = 1

# version, block, size, sector size, boot id, st_dev, st_ino, st_mtime_ns, length of the path
_FIELDS = struct.Struct("<16sIIQI36sQQqH")
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
_NOT = (b"\1", b"\0")  # by the byte of a map, the other one


@dataclass(frozen=True)
class Header:
    """Whose changes a file holds.

    Attributes:
        size: of the image, in bytes.
        sector_size: of the disk, in bytes.
        boot_id: of the host when the live map was last written.
        identity: of the image: ``st_dev``, ``st_ino``, ``st_mtime_ns``. A block device has its own
            number, then zeros: that it was written cannot be seen.
        path: of the image, absolute.
    """

    size: int
    sector_size: int
    boot_id: str
    identity: tuple[int, int, int]
    path: str

    @classmethod
    def of(cls, fd: int, path: str, size: int, sector_size: int) -> Header:
        """Describe the image that is open as ``fd``."""
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if stat.S_ISBLK(status.st_mode):
            identity = (status.st_rdev, 0, 0)
        return cls(size, sector_size, boot_id(), identity, path)

    @classmethod
    def parse(cls, page: bytes, name: str) -> Header:
        """Read the first page of the file ``name``, which anybody may have written.

        Raises:
            ImageError: it is no header, or not one that can be understood.
        """
        if len(page) < BLOCK or not page.startswith(OVERLAY):
            raise ImageError(f"{name}: not an overlay: give a file that --overlay has made")
        _, version, block, size, sector_size, boot, *identity, length = _FIELDS.unpack_from(page)
        if version != VERSION:
            raise ImageError(
                f"{name}: an overlay of version {version}, this program knows {VERSION}: use the "
                "xen-disk that made it"
            )
        path, rest = page[_FIELDS.size :][:length], page[_FIELDS.size + length :]
        sane = (
            block == BLOCK
            and sector_size in (512, 1024, 2048, 4096)
            and size > 0
            and not size % sector_size
            and boot.isascii()
            and length <= BLOCK - _FIELDS.size
            and path.startswith(b"/")
            and b"\0" not in path
            and not any(rest)
        )
        if not sane:
            raise _damaged(name, "its header makes no sense")
        return cls(size, sector_size, boot.decode(), tuple(identity), os.fsdecode(path))

    def pack(self) -> bytes:
        """Return the page.

        Raises:
            ImageError: the path is too long for it.
        """
        path = os.fsencode(self.path)
        if len(path) > BLOCK - _FIELDS.size:
            raise ImageError(f"{self.path}: too long a path for an overlay: use a shorter one")
        fields = (VERSION, BLOCK, self.size, self.sector_size, self.boot_id.encode())
        page = _FIELDS.pack(OVERLAY, *fields, *self.identity, len(path)) + path
        return page.ljust(BLOCK, b"\0")

    def check(self, image: Image, name: str) -> None:
        """See that the overlay ``name`` was made for this image as it is now.

        Device numbers are the kernel's own of one boot: they count in that boot only.

        Raises:
            ImageError: it was not; the message says what to do.
        """
        now = Header.of(image.fd, image.path, image.size, self.sector_size)
        same_device = now.identity[0] == self.identity[0] or now.boot_id != self.boot_id
        if now.size == self.size and now.identity[1:] == self.identity[1:] and same_device:
            return
        if image.path == self.path or (same_device and now.identity[1] == self.identity[1]):
            raise ImageError(
                f"{image.path}: changed or replaced since the overlay {name} was made, whose "
                "blocks do not fit it any more: put the image back as it was, or begin a new "
                "overlay"
            )
        raise ImageError(
            f"{name}: made for another image, {self.path}: use it with that one, or begin a new "
            "overlay"
        )


class OverlayFile(Closing):
    """An open overlay, locked until it is closed.

    Attributes:
        fd: the descriptor.
        path: absolute.
        header: whose changes it holds.
        blocks: how many the image has.
        used: how many of them are held.
        held: the map, a byte for each block: 0 or 1. To be changed through :meth:`hold` and
            :meth:`forget` only.
        data: where the blocks start in the file, in bytes.
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
        self._changed: set[int] = set()  # pages in which the durable map is not the live one
        self._reserved: set[int] = set()  # pages of the durable map that have their space
        self.check_length()
        try:
            self.held = mmap.mmap(-1, self.blocks, flags=_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ImageError(f"{path}: its map does not fit into memory: {error}") from error
        try:
            self._load()
        except BaseException:
            self.held.close()
            raise
        self._file = Image(
            fd,
            self.path,
            self.data + header.size,
            sector_size=header.sector_size,
            read_only=not writable,
            is_block_device=False,
        )

    @classmethod
    def create(cls, path: str, header: Header, *, replacing: bool = False) -> OverlayFile:
        """Make an empty one, whole or not at all, and on stable storage.

        Args:
            path: no such file may exist, unless ``replacing``.
            header: whose changes it is to hold.
            replacing: put it in the place of what is there.

        Raises:
            ImageError: it cannot be made.
        """
        page = header.pack()
        try:
            fd, temporary = temporary_beside(path)
            try:
                lock(fd, path, True, False)
                os.ftruncate(fd, BLOCK + 2 * _map_length(header.size) + header.size)
                transfer_all(os.pwritev, fd, [memoryview(page)], 0)
                file = cls(fd, path, header, writable=True)
                os.fsync(fd)
                put_in_place(temporary, path, replacing=replacing)
            except BaseException:
                os.close(fd)
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise ImageError(f"{path}: cannot be made: {error.strerror}") from error
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

    def check_length(self) -> None:
        """See that nobody has cut it short.

        Raises:
            ImageError: it has not the length that it was made with.
        """
        length, whole = os.fstat(self.fd).st_size, self.data + self.header.size
        if length != whole:
            raise _damaged(self.path, f"it has {length} bytes, not {whole}: perhaps cut short")

    def attach(self, image: Image) -> None:
        """Make it ready to be changed, as what lies over ``image``.

        Raises:
            ImageError: it was made for another image, or this one has changed since.
            OSError: it cannot be written.
        """
        self.header.check(image, self.path)
        now = Header.of(image.fd, image.path, image.size, self.header.sector_size)
        if now.boot_id != self.header.boot_id:
            self._write_pages(BLOCK, self._pages(self._changed))
            self._changed.clear()
        if now != self.header:  # last: until then the durable map is what counts
            transfer_all(os.pwritev, self.fd, [memoryview(now.pack())], 0)
            self.header = now

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut the bytes from ``start`` to ``stop`` of the disk into runs: from, to, held or not."""
        at, last = start // BLOCK, -(-stop // BLOCK)
        while at < last:
            held = self.held[at]
            end = self.held.find(_NOT[held], at + 1, last)
            if end < 0:
                end = last
            yield max(start, at * BLOCK), min(stop, end * BLOCK), held
            at = end

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill ``buffers`` from blocks that are held, ``offset`` bytes into the disk."""
        return self._file.read(buffers, self.data + offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Do so as far as that takes no waiting."""
        return self._file.read_nowait(buffers, self.data + offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Store ``buffers``, ``offset`` bytes into the disk; :meth:`hold` makes them count."""
        try:
            transfer_all(os.pwritev, self.fd, buffers, self.data + offset)
        except OSError:  # no space left, mostly: what does not count must not take any
            for start, stop, held in self.runs(offset, offset + sum(map(len, buffers))):
                if not held:
                    self._punch(start, stop)
            raise

    def hold(self, first: int, last: int) -> None:
        """Have the blocks from ``first`` to before ``last`` count, whose data was written."""
        self._mark(first, last, b"\1")

    def forget(self, first: int, last: int) -> None:
        """Have the image's own content in these blocks, and give their space back."""
        self._mark(first, last, b"\0")
        self._punch(first * BLOCK, min(last * BLOCK, self.header.size))

    def flush(self) -> None:
        """Return when all that was written and marked before is on stable storage.

        Raises:
            OSError: it is not; the next flush tries all of it again.
        """
        with self._flushing:  # a second one must not return before the marks of the first are safe
            with self.lock:
                changed, self._changed = self._changed, set()
                pages = self._pages(changed)  # before the wait, since later data may not be safe
            try:
                os.fdatasync(self.fd)
                if pages:
                    self._write_pages(BLOCK + self._map_length, pages)
                    os.fdatasync(self.fd)
            except BaseException:
                with self.lock:
                    self._changed |= changed
                raise

    def close(self) -> None:
        """Bring the durable map up to date, unlock and close."""
        if self.fd < 0:
            return
        try:
            if self._changed and not self._file.read_only:
                self.flush()
        finally:
            self.fd = -1
            self.held.close()
            self._file.close()

    def _punch(self, start: int, stop: int) -> None:
        with suppress(OSError):  # not every file system can: then the space stays taken
            punch_hole(self.fd, self.data + start, stop - start)

    def _mark(self, first: int, last: int, byte: bytes) -> None:
        content = byte * (last - first)
        pages = set(range(first // BLOCK, -(-last // BLOCK)))
        for page in pages - self._reserved:  # or a flush would find no space for them
            self._reserve(BLOCK + self._map_length + page * BLOCK)
            self._reserved.add(page)
        transfer_all(os.pwritev, self.fd, [memoryview(content)], BLOCK + first)
        self.used += content.count(1) - self.held[first:last].count(1)
        self.held[first:last] = content
        self._changed |= pages

    def _reserve(self, at: int) -> None:
        try:
            os.posix_fallocate(self.fd, at, BLOCK)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
                raise

    def _pages(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Copy pages of the map, by where they are in it."""
        return {page * BLOCK: self.held[page * BLOCK : (page + 1) * BLOCK] for page in numbers}

    def _write_pages(self, at: int, pages: dict[int, bytes]) -> None:
        for start, page in sorted(pages.items()):
            transfer_all(os.pwritev, self.fd, [memoryview(page)], at + start)

    def _load(self) -> None:
        """Read the map that counts, and see where the two differ."""
        counts = 0 if self.header.boot_id == boot_id() else self._map_length
        starts: set[int] = set()
        for start, stop in extents(self.fd, BLOCK, self.data):
            first = (start - BLOCK) // BLOCK * BLOCK
            starts.update(at % self._map_length for at in range(first, stop - BLOCK, BLOCK))
        for start in starts:
            pages = {
                at: os.pread(self.fd, BLOCK, BLOCK + at + start) for at in (0, self._map_length)
            }
            page = pages[counts]
            part = page[: self.blocks - start]
            held = part.count(1)
            if held + page.count(0) != BLOCK:
                raise _damaged(self.path, "its map makes no sense")
            if held:
                self.held[start : start + len(part)] = part
                self.used += held
            if pages[0] != pages[self._map_length]:
                self._changed.add(start // BLOCK)


def image_path(path: str) -> str:
    """Return the path of the image that the overlay ``path`` was made for.

    Raises:
        ImageError: it is no overlay.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _read_header(fd, path).path
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"{path}: the overlay cannot be opened: {error.strerror}") from error


def boot_id() -> str:
    """Return what is another text each time that the host is started (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def extents(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Name the parts from ``start`` to ``stop`` of a file that are no holes: from, to, in bytes."""
    while start < stop:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), stop)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno != errno.EINVAL:
                raise
            end = stop  # a block device has no holes
        if start < end:
            yield start, end
        start = end


def temporary_beside(path: str) -> tuple[int, str]:
    """Make a file for its owner alone in the folder of ``path``; return it open, and its name.

    Raises:
        OSError: it cannot be made.
    """
    import tempfile  # slow to import, and hardly ever needed

    return tempfile.mkstemp(prefix=".xen-disk-", dir=os.path.dirname(os.path.abspath(path)))


def put_in_place(temporary: str, path: str, *, replacing: bool) -> None:
    """Give a file that is complete its name, on stable storage.

    Raises:
        OSError: it cannot be; ``FileExistsError``: there is one, and it is not to be replaced.
        ImageError: it has its name, but that is not on stable storage.
    """
    if replacing:
        os.rename(temporary, path)
    else:
        _name(temporary, path)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what knows no such thing needs none
            raise ImageError(
                f"{path}: is in its place, but a crash of this host may undo that: {error.strerror}"
            ) from error
    finally:
        os.close(folder)


def _name(temporary: str, path: str) -> None:
    """Rename a file, but never over another one."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A file system without hard links: what is left is to look first.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


def _read_header(fd: int, path: str) -> Header:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ImageError(f"{path}: not an overlay, which is a file: give another name")
    return Header.parse(os.pread(fd, BLOCK, 0), path)


def _map_length(size: int) -> int:
    """Return the length of a map, in bytes, of an image of ``size`` bytes."""
    return -(-size // BLOCK**2) * BLOCK


def _damaged(path: str, what: str) -> ImageError:
    return ImageError(f"{path}: a damaged overlay: {what}; begin a new one")
