"""Which errors of the storage may pass by themselves."""

from __future__ import annotations

import errno

from . import StorageError

_PASSING = frozenset(
    (
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EDQUOT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOBUFS,
        errno.ENOLINK,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        getattr(errno, "EREMOTEIO", errno.EIO),
    )
)


def passes(error: BaseException) -> bool:
    """Tell whether the storage may be able to do later what failed with ``error``."""
    return isinstance(error, (StorageError, ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )
