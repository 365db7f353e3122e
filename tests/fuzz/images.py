"""From any bytes to a damaged VHD, and what the program must not do with it."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xen_disk_py.backends.vhd import VhdBackend, blocks, chain, layout, opening
from xen_disk_py.backends.vhd import check as checking
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import XenDiskError

MIB = 1 << 20
SECTOR = 512
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 255, 256, 511, 512, 513, 1024, 1536, 2048, 4096, 65535, 1 << 16),
    *((1 << 20) - 1, 1 << 20, 1 << 21, 1 << 28, 1 << 29, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE),
    *(0xFFFFFFFF, 1 << 32, 1 << 41, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1),
)
MOST_READ = 32 << 20
"""Bytes that may be read at once: more than the largest table."""
MOST_CALLS = 4000
"""System calls that one image may take."""
TAIL = 0xFF00
"""Places from here on are those of the footer at the end."""


def seeds(directory: Path) -> list[bytes]:
    """Make the good images that are damaged: dynamic, with a batmap, fixed, and a child.

    ``directory`` gets the parent of the child, ``base.vhd``.
    """
    paths = [directory / name for name in ("base.vhd", "fixed.vhd", "child.vhd")]
    create(str(paths[0]), 5 * MIB)
    with_small_blocks(paths[0])
    with contextlib.closing(VhdBackend(str(paths[0]))) as disk:
        disk.write([memoryview(b"b" * 4096)], 2 * MIB)
    create(str(paths[1]), 64 << 10, fixed=True)
    create_child(str(paths[2]), str(paths[0]))
    with_small_blocks(paths[2])
    with contextlib.closing(VhdBackend(str(paths[2]))) as disk:
        disk.write([memoryview(b"c" * 1024)], 512)
    made = [path.read_bytes() for path in paths]
    for path in paths[1:]:
        path.unlink()
    return [*made, with_batmap(made[0])]


def with_small_blocks(path: Path) -> None:
    """Give a VHD of 5 MiB blocks of 64 KiB: the padding of its table has room for their entries."""
    image = bytearray(path.read_bytes())
    image[512 + 28 : 512 + 36] = struct.pack(">II", 80, 64 << 10)
    _sum(image, 512, 1024, 36)
    path.write_bytes(image)


def with_batmap(image: bytes) -> bytes:
    """Return a dynamic VHD with an empty batmap behind its table."""
    changed = bytearray(image)
    batmap = layout.Batmap(2560, SECTOR, layout.BATMAP_VERSION, layout.checksum(bytes(SECTOR)))
    start = struct.unpack_from(">I", changed, 1536 + 4)[0] * SECTOR
    if start < 3072:  # its first block lies there: no room
        return image
    changed[2048 : 2048 + len(batmap.pack())] = batmap.pack()
    return bytes(changed)


def damaged(good: list[bytes], data: bytes) -> bytes:
    """Damage an image as ``data`` says; any bytes are fine.

    Its first byte chooses the image, the second what is done at the end (1: the footers get right
    checksums, 2: the header does, 4 and 8: it is cut short), then each five are one change: where
    (two bytes), what (one), and two of content.
    """
    if len(data) < 2:
        return data
    image = bytearray(good[data[0] % len(good)])
    flags = data[1]
    for at in range(2, len(data) - 4, 5):
        place, what, value = struct.unpack_from(">HBH", data, at)
        place = len(image) - SECTOR + place % SECTOR if place >= TAIL else place % 8192
        width = (1, 2, 4, 8)[what & 3]
        number = NUMBERS[value % len(NUMBERS)] if what & 4 else value
        if what & 8:  # the footer's copy gets the same
            place %= SECTOR
            _put(image, len(image) - SECTOR + place, number, width)
        _put(image, place, number, width)
    if flags & 1:
        _sum(image, 0, SECTOR, 64)
        _sum(image, len(image) - SECTOR, SECTOR, 64)
    if flags & 2:
        _sum(image, 512, 1024, 36)
    if flags & 4:
        del image[-(1 + flags % 7 * 100) :]
    if flags & 8:
        del image[8192:-SECTOR]
    return bytes(image)


def _put(image: bytearray, place: int, number: int, width: int) -> None:
    end = min(len(image), place + width)
    if end > place >= 0:
        image[place:end] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "big")[: end - place]


def _sum(image: bytearray, start: int, length: int, at: int) -> None:
    if 0 <= start <= len(image) - length:
        image[start + at : start + at + 4] = bytes(4)
        total = layout.checksum(image[start : start + length])
        image[start + at : start + at + 4] = total.to_bytes(4, "big")


class Watched:
    """The system calls that read and write, which must stay in what is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _check(self, fd: int, offset: int, length: int) -> None:
        self.calls += 1
        assert self.calls < MOST_CALLS, "it takes too long"
        assert length <= MOST_READ, f"{length} bytes are read at once"
        end = os.fstat(fd).st_size
        assert 0 <= offset <= end, f"byte {offset} is read, the file has {end}"

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Read, inside of the file; its end may cut that short."""
        self._check(fd, offset, length)
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        """Read, inside of the file."""
        self._check(fd, offset, sum(map(len, buffers)))
        return os.preadv(fd, buffers, offset, flags)


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Put the watched calls into the modules that read VHDs."""
    modules = (blocks, chain, opening, checking)
    calls = Watched()
    try:
        for module in modules:
            module.os = calls  # type: ignore[attr-defined]  # what stands in for the module
        yield calls
    finally:
        for module in modules:
            module.os = os  # type: ignore[attr-defined]  # as it was


def survives(path: Path, image: bytes) -> str:
    """Have the program look at an image, read and write it; return what it was told.

    Raises:
        Exception: anything but the project's own errors, or an I/O error of a request.
    """
    path.write_bytes(image)
    with watched():
        checking.check(str(path))
        said = [_use(path, writable=False)]
        assert "\n" not in said[0], said
        assert path.read_bytes() == image, "it was changed, though it was only read"
        said.append(_use(path, writable=True))
        if said[1] == "served":
            _grow(path)
        if said[1].startswith("refused"):
            assert path.read_bytes() == image, "it was changed, though it was refused"
    return " ".join(said)


def _grow(path: Path) -> None:
    """Make the disk larger, or have that refused: what was in it is there all the same."""
    disk = VhdBackend(str(path))
    offsets = [0, disk.size // 2 // SECTOR * SECTOR, disk.size - SECTOR]
    before = [_sector(disk, offset) for offset in offsets]
    larger = disk.size + 3 * MIB
    try:
        disk.resize(larger)
        assert [_sector(disk, offset) for offset in offsets] == before
        with contextlib.suppress(OSError):
            disk.write([memoryview(b"n" * SECTOR)], larger - SECTOR)
    except XenDiskError:
        larger = disk.size
    finally:
        disk.close()
    with contextlib.closing(VhdBackend(str(path), read_only=True)) as disk:
        assert disk.size == larger
        assert [_sector(disk, offset) for offset in offsets] == before


def _sector(disk: VhdBackend, offset: int) -> bytes | None:
    buffer = bytearray(SECTOR)
    try:
        done = disk.read([memoryview(buffer)], offset)
    except OSError:
        return None
    return bytes(buffer) if done == SECTOR else None


def _use(path: Path, *, writable: bool) -> str:
    try:
        disk = VhdBackend(str(path), read_only=not writable)
    except XenDiskError as error:
        return f"refused: {error}"
    content = memoryview(b"w" * 4096)
    buffer = memoryview(bytearray(4096))
    try:
        for offset in {0, disk.size // 2 // SECTOR * SECTOR, max(0, disk.size - 4096)}:
            length = min(4096, disk.size - offset)
            # What the storage says of a request is the guest's.
            with contextlib.suppress(OSError):
                disk.read_nowait([buffer[:length]], offset)
                disk.read([buffer[:length]], offset)
                if writable:
                    disk.write([content[:length]], offset)
    finally:
        with contextlib.suppress(OSError):
            disk.close()
    return "served"
