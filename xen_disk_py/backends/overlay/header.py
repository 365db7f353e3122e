"""The first page of an overlay: whose changes these are, and since when they are in the cache."""

from __future__ import annotations

import json
import os
import stat
import struct
from dataclasses import dataclass, replace

from ...errors import ImageError
from ...text import printable
from ..image import Image
from ..signatures import OVERLAY
from .epoch import Epoch, boot_id

BLOCK = 4096
VERSION = 2

# version, block, size, sector size, boot id, st_dev, st_ino, st_mtime_ns, length of the path
_FIELDS = struct.Struct("<16sIIQI36sQQqH")
# Then the path; in version 2 also a zero and a JSON object: "mount" and "superblock", see Epoch;
# "broken": the live map does not count; "commit", see Commit.

Identity = tuple[int, int, int]
"""``st_dev``, ``st_ino``, ``st_mtime_ns``; a block device has its own number, then zeros."""


@dataclass(frozen=True)
class Commit:
    """That the changes are in another file, which is about to take the image's name.

    Attributes:
        identity: of that file.
        keep: the overlay is to be emptied then, not removed.
    """

    identity: Identity
    keep: bool


@dataclass(frozen=True)
class Header:
    """Whose changes a file holds.

    Attributes:
        size: of the image, in bytes.
        sector_size: of the disk, in bytes.
        epoch: in which the live map was last written.
        identity: of the image.
        path: of the image, absolute.
        live: whether the live map counts as long as the epoch lasts.
        commit: one that has begun; None: none.
    """

    size: int
    sector_size: int
    epoch: Epoch
    identity: Identity
    path: str
    live: bool = True
    commit: Commit | None = None

    @classmethod
    def of(cls, image: Image, epoch: Epoch) -> Header:
        """Describe an image, for an overlay in a file that is in ``epoch``."""
        return cls(image.size, image.sector_size, epoch, identity_of(image.fd), image.path)

    @classmethod
    def parse(cls, page: bytes, name: str) -> Header:
        """Read the first page of the file ``name``, which anybody may have written.

        Raises:
            ImageError: it is no header, or not one that can be understood.
        """
        if len(page) < BLOCK or not page.startswith(OVERLAY):
            raise ImageError(f"{name}: not an overlay: give a file that --overlay has made")
        _, version, block, size, sector_size, boot, *identity, length = _FIELDS.unpack_from(page)
        if version not in (1, VERSION):
            raise ImageError(
                f"{name}: an overlay of version {version}, this program knows {VERSION}: use the "
                "xen-disk that made it"
            )
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
            (identity[0], identity[1], identity[2]),
            os.fsdecode(path),
        )
        return header._with(more, name) if version > 1 else header._of_version_1()

    def _with(self, more: dict[str, object], name: str) -> Header:
        """Complete it from what the JSON says."""
        try:
            mount, superblock, broken = more["mount"], more["superblock"], more["broken"]
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
        return replace(self, epoch=epoch, live=not broken, commit=commit)

    def _of_version_1(self) -> Header:
        """Go by the boot id alone, as whoever wrote it did."""
        return replace(self, epoch=_OldEpoch(self.epoch.boot))

    def pack(self) -> bytes:
        """Return the page.

        Raises:
            ImageError: the path is too long for it.
        """
        path = os.fsencode(self.path)
        more: dict[str, object] = {
            "mount": self.epoch.mount,
            "superblock": self.epoch.superblock,
            "broken": not self.live,
        }
        if self.commit is not None:
            more["commit"] = {"identity": self.commit.identity, "keep": self.commit.keep}
        fields = (VERSION, BLOCK, self.size, self.sector_size, self.epoch.boot.encode())
        page = _FIELDS.pack(OVERLAY, *fields, *self.identity, len(path)) + path
        page += b"\0" + json.dumps(more).encode()
        if len(page) > BLOCK - (_ROOM if self.commit is None else 0):
            raise ImageError(
                f"{self.shown_path}: too long a path for an overlay: use a shorter one"
            )
        return page.ljust(BLOCK, b"\0")

    @property
    def shown_path(self) -> str:
        """The image's path for people; whoever wrote the file chose it."""
        return printable(self.path)

    def differences(self, image: Image) -> list[str]:
        """Say what of an image is not as it was when the overlay was made for it."""
        now = identity_of(image.fd)
        found = []
        if image.size != self.size:
            found.append(f"its size is {image.size} bytes, not {self.size}")
        # Device numbers are the kernel's own of one boot: they count in that boot only.
        same_device = now[0] == self.identity[0] or boot_id() != self.epoch.boot
        if now[1] != self.identity[1] or not same_device:
            found.append("it is another file of that name" if now[1] else "it is another device")
        if now[2] != self.identity[2]:
            found.append("it was changed since (its time of modification is another)")
        return found

    def was_committed(self, image: Image) -> bool:
        """Whether a commit was noted, and this image is the one that it has made.

        What was written into that image since does not matter: it has the changes.
        """
        if self.commit is None:
            return False
        now, then = identity_of(image.fd), self.commit.identity
        return now[1] == then[1] and (now[0] == then[0] or boot_id() != self.epoch.boot)

    def check(self, image: Image, name: str) -> None:
        """See that the overlay ``name`` was made for this image as it is now.

        Raises:
            ImageError: it was not; the message says what to do.
        """
        found = self.differences(image)
        if not found:
            return
        same_device = identity_of(image.fd)[0] == self.identity[0]
        if image.path == self.path or (
            same_device and identity_of(image.fd)[1] == self.identity[1]
        ):
            raise ImageError(
                f"{image.path}: changed or replaced since the overlay {name} was made: "
                f"{' and '.join(found)}. Put the image back as it was; or, if its content is what "
                f"it was: xen-disk rebase {name} {image.path} --force; or begin a new overlay"
            )
        raise ImageError(
            f"{name}: made for another image, {self.shown_path}: use it with that one, or begin a "
            "new overlay"
        )


class _OldEpoch(Epoch):
    """What version 1 noted: the boot id alone."""

    def lasts(self, now: Epoch) -> bool:
        return self.boot == now.boot


def identity_of(fd: int) -> Identity:
    """Tell an open image from others, and from itself at another time.

    That a block device was written cannot be seen.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, 0, 0
    return status.st_dev, status.st_ino, status.st_mtime_ns


def damaged(path: str, what: str) -> ImageError:
    """Return the error of an overlay that cannot be what one was."""
    return ImageError(f"{path}: a damaged overlay: {what}; begin a new one")


_ROOM = 200  # bytes left for a commit to be noted in, whatever else there is


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
    device, inode, modified = found["identity"]
    identity = (int(device), int(inode), int(modified))
    if not all(0 <= number < 1 << 63 for number in identity):
        raise ValueError
    return Commit(identity, bool(found["keep"]))
