"""An export of a disk in use: the process that serves it keeps what the guest overwrites meanwhile.

See :mod:`~xen_disk_py.backends.before_images`. The exporter sends one end of a pair of sockets over
the control socket, and gets the before-images from its own end.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..backends import Backend
from ..backends.before_images import BeforeImages, receive
from ..backends.filter import Filter
from ..datapath.disk import Disk
from ..errors import DeviceError, UsageError, XenDiskError
from ..xenbus.states import Address
from . import control

if TYPE_CHECKING:
    from ..backends.exporting import Keep, Kept

_PEER = (errno.EPIPE, errno.EPROTO, errno.ECONNRESET)
_FINISH = 8.0  # seconds: less than a command waits


class Exports:
    """The end of the process that serves: ``export.begin`` and ``export.end``."""

    def __init__(self, disk: Disk) -> None:
        self._backend: Any = _innermost(disk.backend)
        self._images: BeforeImages | None = None
        self._reason = ""  # why those before have failed
        self._lock = threading.Lock()  # for these two

    def begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send before-images from now on, to the socket that came with this."""
        descriptors: Sequence[int] = request.get("descriptors", ())
        fd = getattr(self._backend, "exported_fd", None)
        if fd is None:
            raise DeviceError("this kind of disk cannot keep what its guest overwrites")
        if list(_file(fd)) != request.get("file"):
            raise DeviceError("the disk has another file open")
        if self._backend.size != request.get("size"):
            raise DeviceError("the disk has just become larger")
        if len(descriptors) != 1:
            raise DeviceError("a descriptor is needed")
        if self._images is not None and self._images.is_active:
            raise UsageError("the disk is being exported already: wait until that has ended")
        try:
            exporter = _socket_of(descriptors[0])
        except OSError as error:
            raise DeviceError(
                f"the descriptor is no socket to send to: {error.strerror}"
            ) from error
        try:
            with self._lock:
                size, read = self._backend.size, self._backend.read
                images = BeforeImages(size, read, exporter, on_end=self._ended)
                self._images = images
                self._backend.keep_before_images(images)
        except (RuntimeError, MemoryError) as error:  # no thread
            exporter.close()
            raise DeviceError(f"what the guest overwrites cannot be kept: {error}") from error
        return {}

    def end(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send what is left of them, and keep no more."""
        images = self._images
        if images is None:
            raise DeviceError(self._reason or "what the guest overwrites is not kept any more")
        images.finish(_FINISH)
        return {}

    def _ended(self, images: BeforeImages) -> None:
        with self._lock:
            if self._images is images:
                self._images, self._reason = None, images.failure
                self._backend.keep_before_images(None)


def keeper(directory: str) -> Keep:
    """Return what asks the process that serves a disk, of those with a record in ``directory``."""

    def keep(fd: int, size: int, images: int) -> AbstractContextManager[Kept]:
        return _keep(directory, fd, size, images)

    return keep


class _Kept:
    """Receives them in a thread; see :class:`~..backends.exporting.Kept`."""

    def __init__(
        self, directory: str, address: Address, disk: socket.socket, size: int, images: int
    ) -> None:
        self._directory = directory
        self._address = address
        self._disk = disk
        self._size = size
        self._file = images
        self._here: bytearray | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._receive, name="before-images", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._error is not None:
            self.finish()

    def finish(self) -> bytearray:
        try:
            _ask(self._directory, self._address, "export.end")
        except DeviceError as error:
            if self._error is not None and self._error.errno in _PEER:
                raise  # it knows why it has ended that
            raise self._failure(error) from error
        self._thread.join()
        if self._here is None:
            raise self._failure(None)
        return self._here

    def _failure(self, other: DeviceError | None) -> DeviceError:
        error = other if self._error is None else self._error.strerror
        return DeviceError(f"what the guest overwrites cannot be kept: {error}")

    def close(self) -> None:
        with suppress(OSError):  # the other end is gone
            self._disk.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _receive(self) -> None:
        try:
            self._here = receive(self._disk, self._size, self._file)
        except OSError as error:
            self._error = error
            with suppress(OSError):
                self._disk.shutdown(socket.SHUT_RDWR)


@contextmanager
def _keep(directory: str, fd: int, size: int, images: int) -> Iterator[Kept]:
    try:
        address = _find(directory, _file(fd))
    except XenDiskError as error:
        raise DeviceError(str(error)) from error
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            _ask(
                directory,
                address,
                "export.begin",
                file=list(_file(fd)),
                size=size,
                descriptors=[theirs],
            )
        kept = _Kept(directory, address, ours, size, images)
        try:
            yield kept
        finally:
            kept.close()


def _ask(directory: str, address: Address, verb: str, **more: Any) -> None:
    try:
        control.ask(directory, address, verb, **more)
    except (DeviceError, UsageError):
        raise
    except (XenDiskError, OSError) as error:
        raise DeviceError(str(error)) from error


def _find(directory: str, file: tuple[int, int]) -> Address:
    """Find the disk that writes a file."""
    from . import survey  # not in the process that serves

    for seen in survey.look(directory):
        for storage in seen.facts.storage if seen.alive else ():
            if storage["writable"] and file in {tuple(each) for each in storage["files"]}:
                return Address(0, seen.facts.domid, seen.facts.number, "")
    raise DeviceError("no disk of ours that lives is writing it")


def _socket_of(descriptor: int) -> socket.socket:
    """Return a socket of its own for a descriptor of one, which stays open.

    Raises:
        OSError: it is of something else.
    """
    fd = os.dup(descriptor)
    try:
        return socket.socket(fileno=fd)
    except BaseException:
        os.close(fd)
        raise


def _file(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _innermost(disk: Backend) -> Backend:
    while isinstance(disk, Filter):
        disk = disk.source
    return disk
