"""The first page of an overlay: whose changes these are, and since when they are in the cache.

It is there twice, in 2048 bytes each, with a checksum: power that fails may tear what is being
written at any sector. So the second one is written, and on stable storage, before the first is
touched; who finds the first torn reads the second.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib

from ...errors import ImageError
from ...host.identity import Identity, boot_id, difference, identity_of_descriptor, is_known
from ...named import NamedTuple
from ...text import printable
from ..image import Image
from ..signatures import OVERLAY
from .epoch import Epoch

BLOCK = 4096
COPY = 2048
"""Where in the page the second header is, in bytes."""
VERSION = 3

# version, block, size, sector size, boot id, st_dev, st_ino, st_mtime_ns, length of the path
_FIELDS = struct.Struct("<16sIIQI36sQQqH")
_CHECKSUM = struct.Struct("<I")  # CRC-32 of the 2044 bytes before it
# Then the path; from version 2 on also a zero and a JSON object: "mount" and "superblock", see
# Epoch; "broken": the live map does not count; "image", see host/identity.py; "commit", see Commit.
# Versions 1 and 2 have the whole page, and no checksum.


class Commit(NamedTuple):
    """That the changes are in another file, which is about to take the image's name.

    Attributes:
        image: what identifies that file.
        modified: when it was written last, in nanoseconds since 1970.
        keep: the overlay is to be emptied then, not removed.
    """

    image: Identity
    modified: int
    keep: bool

    @classmethod
    def of(cls, fd: int, *, keep: bool) -> Commit:
        """Describe the file that is about to take the image's name."""
        return cls(identity_of_descriptor(fd), _modified(fd), keep)


class Header(NamedTuple):
    """Whose changes a file holds.

    Attributes:
        size: of the image, in bytes.
        sector_size: of the disk, in bytes.
        epoch: in which the live map was last written.
        numbers: of the image: ``st_dev`` and ``st_ino``; a block device's own, and zero.
        modified: when the image was written last, in nanoseconds since 1970; 0 for a device.
        path: of the image, absolute.
        image: what else identifies the image; None: version 1, which noted no more.
        live: whether the live map counts as long as the epoch lasts.
        commit: one that has begun; None: none.
    """

    size: int
    sector_size: int
    epoch: Epoch
    numbers: tuple[int, int]
    modified: int
    path: str
    image: Identity | None = None
    live: bool = True
    commit: Commit | None = None

    @classmethod
    def of(cls, image: Image, epoch: Epoch) -> Header:
        """Describe an image, for an overlay in a file that is in ``epoch``."""
        return cls(
            image.size,
            image.sector_size,
            epoch,
            _numbers(image.fd),
            _modified(image.fd),
            image.path,
            identity_of_descriptor(image.fd),
        )

    @classmethod
    def parse(cls, page: bytes, name: str) -> Header:
        """Read the first page of the file ``name``, which anybody may have written.

        Raises:
            ImageError: it is no header, or not one that can be understood.
        """
        if len(page) < BLOCK or not page.startswith(OVERLAY):
            raise ImageError(f"{name}: not an overlay: give a file that --overlay has made")
        error = None
        for part in (page[:COPY], page[COPY:], page):  # the last: of version 1 or 2
            if part.startswith(OVERLAY):
                try:
                    return cls._parse(part, name)
                except ImageError as why:
                    error = error or why
        assert error is not None
        raise error

    @classmethod
    def _parse(cls, page: bytes, name: str) -> Header:
        _, version, block, size, sector_size, boot, *known = _FIELDS.unpack_from(page)
        device, inode, modified, length = known
        if version not in (1, 2, VERSION):
            raise ImageError(
                f"{name}: an overlay of version {version}, this program knows {VERSION}: use the "
                "xen-disk that made it"
            )
        if version == VERSION:
            end = COPY - _CHECKSUM.size
            if _CHECKSUM.unpack_from(page, end) != (zlib.crc32(page[:end]),):
                raise damaged(name, "its header makes no sense")
            page = page[:end]
        path, rest = page[_FIELDS.size :][:length], page[_FIELDS.size + length :]
        more = _parse_json(rest) if version > 1 else ({} if not any(rest) else None)
        sane = (
            block == BLOCK
            and sector_size in (512, 1024, 2048, 4096)
            and size > 0
            and not size % sector_size
            and boot.isascii()
            and length <= BLOCK - _FIELDS.size
            and path.startswith(b"/")
            and b"\0" not in path
        )
        if not sane or more is None:
            raise damaged(name, "its header makes no sense")
        header = cls(
            size,
            sector_size,
            Epoch(boot.decode()),
            (device, inode),
            modified,
            os.fsdecode(path),
        )
        return header._with(more, name) if version > 1 else header._of_version_1()

    def _with(self, more: dict[str, object], name: str) -> Header:
        """Complete it from what the JSON says."""
        try:
            mount, superblock, broken = more["mount"], more["superblock"], more["broken"]
            image = _parse_identity(more["image"])
            commit = _parse_commit(more.get("commit"))
        except (KeyError, TypeError, ValueError):
            raise damaged(name, "its header makes no sense") from None
        if not (
            (mount is None or isinstance(mount, int))
            and (superblock is None or isinstance(superblock, str))
            and isinstance(broken, bool)
        ):
            raise damaged(name, "its header makes no sense")
        epoch = Epoch(self.epoch.boot, mount, superblock)
        return self._replace(epoch=epoch, image=image, live=not broken, commit=commit)

    def _of_version_1(self) -> Header:
        """Go by the boot id alone, as whoever wrote it did."""
        return self._replace(epoch=_OldEpoch(self.epoch.boot))

    def pack(self) -> bytes:
        """Return one of the two headers.

        Raises:
            ImageError: the path is too long for it.
        """
        path = os.fsencode(self.path)
        more: dict[str, object] = {
            "mount": self.epoch.mount,
            "superblock": self.epoch.superblock,
            "broken": not self.live,
            "image": self.image,
        }
        if self.commit is not None:
            more["commit"] = self.commit._asdict()
        fields = (VERSION, BLOCK, self.size, self.sector_size, self.epoch.boot.encode())
        page = _FIELDS.pack(OVERLAY, *fields, *self.numbers, self.modified, len(path)) + path
        page += b"\0" + json.dumps(more).encode()
        end = COPY - _CHECKSUM.size
        if len(page) > end - (_ROOM if self.commit is None else 0):
            raise ImageError(
                f"{self.shown_path}: too long a path for an overlay: use a shorter one"
            )
        page = page.ljust(end, b"\0")
        return page + _CHECKSUM.pack(zlib.crc32(page))

    @property
    def shown_path(self) -> str:
        """The image's path for people; whoever wrote the file chose it."""
        return printable(self.path)

    def differences(self, image: Image) -> list[str]:
        """Say what of an image is not as it was when the overlay was made for it."""
        found = []
        if image.size != self.size:
            found.append(f"its size is {image.size} bytes, not {self.size}")
        other = self._other_image(image)
        if other is not None:
            found.append(other)
        if not image.is_block_device and _modified(image.fd) != self.modified:
            found.append("it was written since (its time of modification is another)")
        return found

    def _other_image(self, image: Image) -> str | None:
        """Say why an image is another one, whatever its content; None: it is not."""
        now = identity_of_descriptor(image.fd)
        is_same_boot = boot_id() == self.epoch.boot
        if self.image is None:  # version 1
            numbers = _numbers(image.fd)
            same = numbers[1:] == self.numbers[1:]
            if same and (numbers[0] == self.numbers[0] or not is_same_boot):
                return None
            return "it is another one"
        before = dict(self.image)
        if not is_same_boot:  # file systems have other numbers then
            before.pop("device", None)
        what = difference(before, now)
        if what is not None:
            return printable(f"it is another one ({what})")
        if not is_known(before, now) and not (
            is_same_boot and _numbers(image.fd) == self.numbers and image.path == self.path
        ):
            return "it has no serial number, UUID or the like that tells whether it is the same"
        return None

    def was_committed(self, image: Image) -> bool:
        """Whether a commit was noted, and this image is the one that it has made.

        What was written into that image since does not matter: it has the changes. But where the
        file system tells of a file no more than its inode, which may be used again, it does.
        """
        if self.commit is None:
            return False
        before = dict(self.commit.image)
        if boot_id() != self.epoch.boot:
            before.pop("device", None)
        now = identity_of_descriptor(image.fd)
        known = bool({"born", "handle"} & before.keys() & now.keys())
        return difference(before, now) is None and (
            known or _modified(image.fd) == self.commit.modified
        )

    def check(self, image: Image, name: str) -> None:
        """See that the overlay ``name`` was made for this image as it is now.

        Raises:
            ImageError: it was not; the message says what to do.
        """
        if self.was_committed(image):
            raise ImageError(
                f"{name}: its changes were committed to {self.shown_path}, and are there; to "
                f"finish that: xen-disk commit {name}"
            )
        found = self.differences(image)
        if not found:
            return
        if image.path != self.path and self._other_image(image) is not None:
            raise ImageError(
                f"{name}: made for another image, {self.shown_path}: use it with that one, or "
                f"begin a new overlay; if {image.path} is a copy of it: xen-disk rebase {name} "
                f"{image.path}"
            )
        raise ImageError(
            f"{image.path}: changed or replaced since the overlay {name} was made: "
            f"{', and '.join(found)}. Put the image back as it was; or, if its content is what it "
            f"was: xen-disk rebase {name} {image.path} --force; or begin a new overlay"
        )


class _OldEpoch(Epoch):
    """What version 1 noted: the boot id alone."""

    def lasts(self, now: Epoch) -> bool:
        return self.boot == now.boot


def _numbers(fd: int) -> tuple[int, int]:
    """Return ``st_dev`` and ``st_ino`` of an image; of a block device, its own number, and zero."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, 0
    return status.st_dev, status.st_ino


def _modified(fd: int) -> int:
    """Return when a file was written, in nanoseconds; 0 for a device, which does not tell."""
    status = os.fstat(fd)
    return 0 if stat.S_ISBLK(status.st_mode) else status.st_mtime_ns


def damaged(path: str, what: str) -> ImageError:
    """Return the error of an overlay that cannot be what one was."""
    return ImageError(f"{path}: a damaged overlay: {what}; begin a new one")


_ROOM = 500  # bytes left for a commit to be noted in, whatever else there is


def _parse_json(rest: bytes) -> dict[str, object] | None:
    text, _, padding = rest[1:].partition(b"\0")
    if rest[:1] != b"\0" or any(padding):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _parse_commit(found: object) -> Commit | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise TypeError
    return Commit(_parse_identity(found["image"]), int(found["modified"]), bool(found["keep"]))


def _parse_identity(found: object) -> Identity:
    if not isinstance(found, dict) or not all(
        isinstance(value, (str, int)) for value in found.values()
    ):
        raise TypeError
    return found
