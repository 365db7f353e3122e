"""librbd and librados, as far as a disk needs them.

Every C function that is called stands in :data:`RADOS` and :data:`RBD`. Requests are asynchronous:
each has a completion of librbd's, and a pipe that is told to the image becomes readable when some
are over (``rbd_set_image_notification``), so that no callback enters Python from a thread of
librbd's. Errors are negative numbers of errno.
"""

from __future__ import annotations

import errno
import os
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_ssize_t, c_uint64, c_void_p
from functools import cache
from types import SimpleNamespace
from typing import Any

from ...host.clibrary import Library, Signature
from .. import StorageError

_pointer = POINTER(c_void_p)


def _status(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """Below zero: an error's number."""
    if result < 0:
        raise failure(result, function.__name__)
    return result


ON_UPDATE = CFUNCTYPE(None, c_void_p)
"""``rbd_update_callback_t``: called in a thread of librbd's when an image's header has changed."""

RADOS = Library(
    "librados.so.2",
    "librados2 (Debian, Ubuntu, Fedora)",
    {
        "rados_create": Signature(c_int, (_pointer, c_char_p), _status),
        "rados_conf_read_file": Signature(c_int, (c_void_p, c_char_p), _status),
        "rados_conf_set": Signature(c_int, (c_void_p, c_char_p, c_char_p), _status),
        "rados_connect": Signature(c_int, (c_void_p,), _status),
        "rados_shutdown": Signature(None, (c_void_p,)),
        "rados_ioctx_create": Signature(c_int, (c_void_p, c_char_p, _pointer), _status),
        "rados_ioctx_set_namespace": Signature(None, (c_void_p, c_char_p)),
        "rados_ioctx_destroy": Signature(None, (c_void_p,)),
    },
    required=False,
)

RBD = Library(
    "librbd.so.1",
    "librbd1 (Debian, Ubuntu, Fedora)",
    {
        "rbd_open": Signature(c_int, (c_void_p, c_char_p, _pointer, c_char_p), _status),
        "rbd_open_read_only": Signature(c_int, (c_void_p, c_char_p, _pointer, c_char_p), _status),
        "rbd_close": Signature(c_int, (c_void_p,), _status),
        "rbd_get_size": Signature(c_int, (c_void_p, POINTER(c_uint64)), _status),
        "rbd_get_features": Signature(c_int, (c_void_p, POINTER(c_uint64)), _status),
        "rbd_resize": Signature(c_int, (c_void_p, c_uint64), _status),
        "rbd_lock_acquire": Signature(c_int, (c_void_p, c_int), _status),
        "rbd_lock_release": Signature(c_int, (c_void_p,), _status),
        "rbd_is_exclusive_lock_owner": Signature(c_int, (c_void_p, POINTER(c_int)), _status),
        "rbd_set_image_notification": Signature(c_int, (c_void_p, c_int, c_int), _status),
        "rbd_update_watch": Signature(
            c_int, (c_void_p, POINTER(c_uint64), ON_UPDATE, c_void_p), _status
        ),
        "rbd_update_unwatch": Signature(c_int, (c_void_p, c_uint64), _status),
        "rbd_aio_create_completion": Signature(c_int, (c_void_p, c_void_p, _pointer), _status),
        "rbd_aio_release": Signature(None, (c_void_p,)),
        "rbd_aio_get_return_value": Signature(c_ssize_t, (c_void_p,)),
        "rbd_aio_read": Signature(
            c_int, (c_void_p, c_uint64, c_size_t, c_void_p, c_void_p), _status
        ),
        "rbd_aio_write": Signature(
            c_int, (c_void_p, c_uint64, c_size_t, c_void_p, c_void_p), _status
        ),
        "rbd_aio_discard": Signature(c_int, (c_void_p, c_uint64, c_uint64, c_void_p), _status),
        "rbd_aio_flush": Signature(c_int, (c_void_p, c_void_p), _status),
        "rbd_poll_io_events": Signature(c_int, (c_void_p, _pointer, c_int), _status),
    },
    required=False,
)

EVENT_TYPE_PIPE = 1
LOCK_EXCLUSIVE = 0
FEATURE_EXCLUSIVE_LOCK = 1 << 2

_PASSING = {errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EBUSY, errno.ENOSPC, errno.EDQUOT}


def failure(result: int, what: str) -> OSError:
    """The exception for a negative result; one that passes is a :class:`StorageError`."""
    number = -result
    if number == errno.ESHUTDOWN:  # a ConnectionError to Python, which would seem to pass
        return OSError(
            errno.EPERM,
            f"{what}: another client broke our lock, and the cluster no "
            "longer takes requests of ours",
        )
    kind = StorageError if number in _PASSING else OSError
    return kind(number, f"{what}: {os.strerror(number)}")


@cache
def calls() -> SimpleNamespace:
    """Load both libraries, as one table.

    Raises:
        XenUnavailable: one is missing; the message names the package.
    """
    return SimpleNamespace(**{**vars(RADOS.load()), **vars(RBD.load())})
