"""An open RBD image, and the requests under way on it."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from ctypes import addressof, byref, c_char, c_int, c_uint64, c_void_p
from typing import Any

from ...errors import BackendError
from ..asynchronous import DISCARD, FLUSH, READ, Asynchronous, Request
from .librbd import (
    EVENT_TYPE_PIPE,
    FEATURE_EXCLUSIVE_LOCK,
    LOCK_EXCLUSIVE,
    ON_UPDATE,
    calls,
    failure,
)

_LOCKED = {errno.EROFS, errno.EBUSY}
_PAUSE = 0.2  # seconds until the lock is asked for again
_AT_ONCE = 64  # completions to ask for in one call

Settings = dict[str, str]
"""Ceph's options by name, as in ceph.conf."""


class RbdImage(Asynchronous):
    """One image of a cluster.

    Args:
        pool: the pool's name; with ``/NAMESPACE`` behind it for a namespace.
        name: the image's name.
        snapshot: a snapshot of it, or None for the image itself.
        user: who we are to the cluster (``client.USER``).
        conf: ceph.conf's path; None for where Ceph looks.
        settings: options that count more than the file's.
        writable: take the exclusive lock, and keep it: nobody else writes meanwhile.
        lock_at_once: take it now, not by :meth:`claim`, before which nothing may be written.
        wait: seconds that another client may keep the lock until we give up.

    Attributes:
        changes: a descriptor that polls readable when somebody has changed the image's header;
            None if that is not told.

    Raises:
        BackendError: the cluster or the image cannot be had, or another has the lock.
        XenUnavailable: librbd is not installed.
    """

    def __init__(
        self,
        pool: str,
        name: str,
        snapshot: str | None,
        *,
        user: str,
        conf: str | None,
        settings: Settings,
        writable: bool,
        lock_at_once: bool = True,
        wait: float = 0,
    ) -> None:
        self._calls = calls()
        self._spec = f"{pool}/{name}"
        self._claiming = threading.Lock()  # whoever closes the image waits for a claim
        self._completions = (c_void_p * _AT_ONCE)()
        self._requests: dict[int, tuple[Request, Any]] = {}  # by completion: and what it moves
        super().__init__()
        self.changes: int | None = None
        self._undo = contextlib.ExitStack()
        self._undo.callback(super().close)
        try:
            self._open(pool, name, snapshot, user, conf, settings, writable)
            if lock_at_once:
                self._lock_image(wait)
            if writable:  # librbd has no watch of what is opened read-only
                self._watch()
        except OSError as error:
            self._undo.close()
            raise BackendError(_reason(error, self._spec, writable)) from error
        except BaseException:
            self._undo.close()
            raise

    def _open(
        self,
        pool: str,
        name: str,
        snapshot: str | None,
        user: str,
        conf: str | None,
        settings: Settings,
        writable: bool,
    ) -> None:
        call, undo = self._calls, self._undo
        cluster, io, image = c_void_p(), c_void_p(), c_void_p()
        call.rados_create(byref(cluster), user.encode())
        undo.callback(call.rados_shutdown, cluster)
        call.rados_conf_read_file(cluster, None if conf is None else os.fsencode(conf))
        for key, value in settings.items():
            call.rados_conf_set(cluster, key.encode(), value.encode())
        call.rados_connect(cluster)
        pool, _, namespace = pool.partition("/")
        call.rados_ioctx_create(cluster, pool.encode(), byref(io))
        undo.callback(call.rados_ioctx_destroy, io)
        if namespace:
            call.rados_ioctx_set_namespace(io, namespace.encode())
        do_open = call.rbd_open if writable else call.rbd_open_read_only
        do_open(io, name.encode(), byref(image), None if snapshot is None else snapshot.encode())
        undo.callback(call.rbd_close, image)
        self._image = image
        call.rbd_set_image_notification(image, self._wake_write, EVENT_TYPE_PIPE)
        features = c_uint64()
        call.rbd_get_features(image, byref(features))
        self._wants_lock = writable and bool(features.value & FEATURE_EXCLUSIVE_LOCK)

    def _lock_image(self, wait: float = 0) -> None:
        """Take the lock, if it is wanted.

        Asked for by name it stays ours until we give it back; one that is only taken with the
        first write goes to whoever else writes.
        """
        if not self._wants_lock:
            return
        deadline = time.monotonic() + wait
        while True:
            try:
                self._calls.rbd_lock_acquire(self._image, LOCK_EXCLUSIVE)
            except OSError as error:
                if error.errno not in _LOCKED or time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE)
            else:
                self._wants_lock = False
                self._undo.callback(self._unlock)
                return

    def claim(self) -> None:
        """Take the lock now, if it was not taken at once.

        Raises:
            BackendError: another has it, or the cluster does not answer.
        """
        with self._claiming:
            try:
                self._lock_image()
            except OSError as error:
                raise BackendError(_reason(error, self._spec, writable=True, waits=True)) from error

    def _watch(self) -> None:
        """Be told when the image's header changes: its size, say, or its snapshots."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._undo.callback(os.close, read)
        self._undo.callback(os.close, write)

        def note(_argument: object) -> None:
            with contextlib.suppress(BlockingIOError):  # as good as told
                os.write(write, b"x")

        self._note = ON_UPDATE(note)  # lives as long as librbd may call it
        handle = c_uint64()
        self._calls.rbd_update_watch(self._image, byref(handle), self._note, None)
        self._undo.callback(self._unwatch, handle)
        self.changes = read

    def _unwatch(self, handle: c_uint64) -> None:
        with contextlib.suppress(OSError):  # the cluster is away
            self._calls.rbd_update_unwatch(self._image, handle)

    def acknowledge_changes(self) -> None:
        """Make :attr:`changes` quiet again."""
        if self.changes is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(self.changes, 4096)

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):  # it was broken, and is another's
            self._calls.rbd_lock_release(self._image)

    @property
    def size(self) -> int:
        """How many bytes the image has now."""
        size = c_uint64()
        self._calls.rbd_get_size(self._image, byref(size))
        return size.value

    @property
    def is_locked(self) -> bool:
        """Whether we have the exclusive lock; False as well if the image has no such feature."""
        owner = c_int()
        self._calls.rbd_is_exclusive_lock_owner(self._image, byref(owner))
        return bool(owner.value)

    def resize(self, size: int) -> None:
        """Make the image ``size`` bytes long.

        Raises:
            OSError: it stays as it is.
        """
        self._calls.rbd_resize(self._image, size)

    def close(self) -> None:
        """Wait for what is under way, give the lock back and leave the cluster."""
        with self._claiming:
            self._wants_lock = False
            self._undo.close()

    # -- with the lock of Asynchronous ---------------------------------------------------

    def _begin(self, request: Request) -> None:
        call, image, operation = self._calls, self._image, request.operation
        completion = c_void_p()
        held: Any = None
        try:
            call.rbd_aio_create_completion(None, None, byref(completion))
            if operation == FLUSH:
                call.rbd_aio_flush(image, completion)
            elif operation == DISCARD:
                call.rbd_aio_discard(image, request.offset, request.length, completion)
            elif operation == READ:
                held = c_char.from_buffer(request.memory)
                call.rbd_aio_read(
                    image, request.offset, request.length, addressof(held), completion
                )
            else:
                held = request.memory
                call.rbd_aio_write(image, request.offset, request.length, held, completion)
        except OSError as error:
            if completion:
                call.rbd_aio_release(completion)
            self._end(request, error)
            return
        self._requests[completion.value or 0] = request, held

    def _progress(self) -> None:
        call, completions = self._calls, self._completions
        self._told()
        while self._requests:
            number = call.rbd_poll_io_events(self._image, completions, _AT_ONCE)
            for address in filter(None, completions[:number]):
                request, _ = self._requests.pop(address)
                result = call.rbd_aio_get_return_value(address)
                call.rbd_aio_release(address)
                self._end(request, _error(request, result))
            if number < _AT_ONCE:
                break


def _error(request: Request, result: int) -> OSError | None:
    if result < 0:
        return failure(result, "rbd")
    if request.operation == READ and result < request.length:
        return OSError(errno.EIO, f"{result} of {request.length} bytes: the image became shorter")
    return None


def _reason(error: OSError, spec: str, writable: bool, *, waits: bool = False) -> str:
    what = str(error.strerror)
    if error.errno == errno.ENOENT and "conf" in what:
        hint = "no ceph.conf: --option conf=PATH names it"
    elif error.errno == errno.ENOENT:
        hint = "no such pool, image or snapshot (rbd ls " + spec.rpartition("/")[0] + ")"
    elif error.errno == errno.ETIMEDOUT:
        hint = "no monitor answers: is the cluster up, and 'mon host' in ceph.conf right?"
    elif writable and error.errno in _LOCKED:
        hint = f"another client has the exclusive lock (rbd lock ls {spec})"
        if not waits:
            hint += "; --option wait=SECONDS waits for it"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        hint = "no permission: --option id=NAME, and its keyring where ceph.conf says"
    else:
        return what
    return f"{what}: {hint}"
