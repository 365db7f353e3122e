"""The VHD as a disk."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence

from ...errors import DeviceError, ImageError, UsageError, XenDiskError
from .. import Backend, sharing
from ..before_images import BeforeImages
from ..holes import punch_hole
from ..image import Image
from ..loader import parse_options
from ..sharing import Storage
from ..trim import can_punch
from .chain import open_chain, open_parent, roots_of
from .create import create_child
from .growing import grow
from .layout import check_size
from .opening import open_vhd
from .stable import Stable


class VhdBackend(Backend):
    """A VHD: fixed, dynamic, or differencing with its parents, which are never changed.

    A discard gives the space of what is in the file back to the file system: zeros are read there.
    What a differencing VHD has not, its parent's, stays as it is. The file becomes no shorter.

    Args:
        path: the VHD; locked for us alone, or shared with other readers if ``read_only``. Its
            parents are shared, too: no program that locks may write to them. With an ``overlay``,
            its parent.
        read_only: open it for reading only.
        parents: directories where parents may lie besides that of the VHD, separated by colons.
        overlay: a differencing VHD, made if there is none, which keeps what is written; ``path``
            is not changed then, and may be a raw image.
        parent_format: of ``path`` with an ``overlay``: ``raw`` or ``vhd``.
    """

    threads = 16
    survives = True

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        parents: str = "",
        overlay: str | None = None,
        parent_format: str = "raw",
    ) -> None:
        directories = _directories(parents)
        if overlay is not None:
            if parent_format not in ("raw", "vhd"):
                raise UsageError(f"--option parent_format={parent_format}: it is raw or vhd")
            directories.append(os.path.dirname(os.path.realpath(path)))
            _make_or_check(overlay, path, parent_format == "raw", directories)
            path = overlay
        top = open_chain(path, writable=not read_only, directories=directories)
        self._top = top
        self.path = os.path.abspath(path)
        self.size = top.size
        self.read_only = read_only
        self._can_discard = False
        self._stable = Stable(top.fd) if isinstance(top, Image) else top.stable
        # A tenth of what a request of 4 KiB costs is one more call of Python.
        self.read_nowait = top.read_nowait  # type: ignore[method-assign]  # for this object only
        self.write_nowait = (  # type: ignore[method-assign]  # as above
            top.write if isinstance(top, Image) else top.write_nowait
        )
        if not read_only or sharing.is_looking():
            try:
                self._prepare()
            except BaseException:
                top.close()
                raise

    def _prepare(self) -> None:
        try:
            if not isinstance(self._top, Image):
                self._top.check_room()
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be written: {error.strerror}") from error
        is_device = stat.S_ISBLK(os.fstat(self._top.fd).st_mode)
        self._can_discard = not is_device and can_punch(self._top.fd)

    @property
    def exported_fd(self) -> int | None:
        """The file that an export of this disk, while it is in use, reads; None: it cannot be."""
        return None if isinstance(self._top, Image) else self._top.fd

    def keep_before_images(self, images: BeforeImages | None) -> None:
        """Save there, from now on, what the disk has before that changes; None: no longer."""
        assert not isinstance(self._top, Image)
        self._top.before = images

    def _fail_export(self, reason: str) -> None:
        before = None if isinstance(self._top, Image) else self._top.before
        if before is not None:
            before.fail(reason)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read from the file and its parents."""
        return self._top.read(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write into the file, which may take waiting for stable storage; see :mod:`.blocks`."""
        return self._top.write(buffers, offset)

    def flush(self) -> None:
        """``fdatasync``; one that has failed stays failed."""
        if not self.read_only:
            self._stable.sync()

    def discard(self, offset: int, length: int) -> None:
        """Give space back; see the class."""
        if not self._can_discard:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if isinstance(self._top, Image):
            punch_hole(self._top.fd, offset, length)
        else:
            self._top.discard(offset, length)

    @property
    def can_discard(self) -> bool:
        """Whether the file system can, asked when the VHD was opened; never on a device."""
        return self._can_discard

    def resize(self, size: int | None) -> int:
        """Become larger, as far as the table of a dynamic or differencing VHD has room."""
        if size is None or size == self.size:
            return self.size
        remedy = (
            "disconnect the disk, and make a larger child of it: xen-disk create NEW "
            f"--parent {self.path} --size {size} (or use vhd-util resize)"
        )
        if size < self.size:
            raise DeviceError(f"{self.path}: a VHD of {self.size} bytes is never made smaller")
        if self.read_only:
            raise DeviceError(f"{self.path}: opened for reading only")
        try:
            check_size(size)
            self._fail_export("the disk was resized")
            grow(self._top, size)
        except XenDiskError as error:
            raise DeviceError(f"{self.path}: {error}: {remedy}") from error
        self.size = size
        return size

    @property
    def host_storage(self) -> Sequence[Storage]:
        """The VHD, and its parents, which are only read."""
        return [self._top.storage] if isinstance(self._top, Image) else self._top.storages

    def close(self) -> None:
        """Close and unlock all files."""
        self._fail_export("the disk is closed")
        self._top.close()


def _make_or_check(overlay: str, path: str, is_raw: bool, directories: Sequence[str]) -> None:
    """Make a child of an image, or see that it is one."""
    if not os.path.lexists(overlay):
        create_child(overlay, path, is_raw=is_raw, directories=directories)
        return
    vhd = open_vhd(overlay, writable=False)
    try:
        parent = (
            open_parent([vhd], roots_of(vhd.path, directories)) if vhd.is_differencing else None
        )
        if parent is None:
            raise ImageError(f"{overlay}: no child of any image: leave out --path to serve it")
        try:
            if not os.path.samestat(os.stat(path), os.fstat(parent.fd)):
                raise ImageError(
                    f"{overlay}: a child of {parent.path}, not of {path}: use it with that one, or "
                    "begin a new one"
                )
        finally:
            if isinstance(parent, Image):
                parent.close()
            else:
                os.close(parent.fd)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    finally:
        os.close(vhd.fd)


def directories_from(pairs: Iterable[str]) -> list[str]:
    """Read the ``--option`` of a command that looks at a VHD: where parents may lie.

    Raises:
        UsageError: there is no such option.
    """
    options = parse_options(pairs)
    parents = options.pop("parents", "")
    for name in options:
        raise UsageError(f"--option {name}=…: there is only parents=DIR[:DIR]")
    return _directories(parents)


def _directories(text: str) -> list[str]:
    return [each for each in text.split(":") if each]
