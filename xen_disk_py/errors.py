"""Every exception that this package raises on purpose.

::

    XenDiskError                 a message the user can act on
    ├── UsageError               the command line asks for something impossible
    ├── XenUnavailable           no Xen, no privilege, a library or module is missing
    ├── StoreError               xenstore refused a request (carries errno)
    │   └── StoreLost            the connection to xenstore is gone or silent
    ├── HypervisorError          a grant or event-channel operation failed (carries errno)
    ├── ImageError               an image cannot be used: missing, locked, odd size
    ├── BackendError             a backend cannot be loaded or broke its contract
    │   └── ProgramMissing       a program that it needs is not installed
    ├── GuestNotFound            no such domain, or several
    ├── DeviceError              attaching, connecting, resizing or detaching failed
    │   └── DeviceTaken          the guest has a device of that number already
    ├── InstallError             a file for xl or systemd cannot be put in its place
    ├── PrivilegeError           privileges cannot be given up
    └── GuestMisbehaved          the frontend broke the protocol
    Forked                       no error: this is a new process
"""

from __future__ import annotations

import os
from collections.abc import Sequence


class XenDiskError(Exception):
    """The base of all; ``str(error)`` is one line for the user, what to do included."""


class UsageError(XenDiskError):
    """The command line asks for something that cannot be done.

    Args:
        message: what, and what to do.
        program: whose ``--help`` tells more, with its command; None for the command that is done.
    """

    def __init__(self, message: str, program: str | None = None) -> None:
        super().__init__(message)
        self.program = program


class XenUnavailable(XenDiskError):
    """Something of Xen that we need is not here; the message names the remedy."""


class _ErrnoError(XenDiskError):
    """An error with the ``errno`` that the system gave."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(f"{message}: {os.strerror(errno)}")
        self.errno = errno


class StoreError(_ErrnoError):
    """Xenstore answered a request with an error."""


class StoreLost(StoreError):
    """The connection to xenstore broke, or no answer came in time."""


class HypervisorError(_ErrnoError):
    """A grant or event-channel operation failed."""


class ImageError(XenDiskError):
    """An image file or block device cannot be used."""


class BackendError(XenDiskError):
    """A backend cannot be loaded, or broke its contract."""


class ProgramMissing(BackendError):
    """A program is in none of the system's directories."""


class GuestNotFound(XenDiskError):
    """No domain, or more than one, answers to that name."""


class DeviceError(XenDiskError):
    """The disk could not be attached, connected, resized or detached."""


class DeviceTaken(DeviceError):
    """The guest has a device of that number already."""


class InstallError(XenDiskError):
    """A file cannot be put in its place or taken away; all files are as they were."""


class PrivilegeError(XenDiskError):
    """The process cannot give up its privileges, or has some left."""


class GuestMisbehaved(XenDiskError):
    """The frontend broke the block protocol; its ring is not served any longer."""


class Forked(BaseException):
    """This is a new process, which is to run the program with other arguments.

    It unwinds the stack of the server, whose files are closed on the way.
    """

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = words
