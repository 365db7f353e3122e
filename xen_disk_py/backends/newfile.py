"""A file that gets its name when it is complete: whatever kills its maker, nothing of it is left.

Where the file system can, it has no name before (``O_TMPFILE``). Where it cannot, and for the
instant in which it takes another file's place, it has a hidden one; it is locked as long as its
maker lives, and what is not is removed by whoever makes the next file in that directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress

from ..errors import ImageError
from ..hypervisor import Closing

_PREFIX = ".xen-disk-"
_HIDDEN = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)  # open(2)


def why(error: OSError, path: str) -> str:
    """Say why a file cannot be made, and what to do where its directory is the matter."""
    directory = os.path.dirname(path) or "."
    if error.errno == errno.ENOENT and not os.path.isdir(directory):
        return f"there is no directory {directory}: make it first (mkdir -p {directory})"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission in {directory}: run as its owner or root"
    return error.strerror or str(error)


class NewFile(Closing):
    """A new, empty file for its owner alone, locked (``flock``) until it is closed.

    Args:
        path: the name that it is to have; it is made in that directory.

    Attributes:
        fd: open for reading and writing.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._directory = os.path.dirname(os.path.abspath(path))
        sweep(self._directory)
        self._name: str | None = None
        try:
            self.fd = os.open(self._directory, os.O_RDWR | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self.fd, self._name = _make_hidden(self._directory)
        else:
            fcntl.flock(self.fd, fcntl.LOCK_EX)

    def put(self, path: str, *, replacing: bool) -> None:
        """Give the file its name, on stable storage; its content must be there already.

        Raises:
            OSError: it cannot be; ``FileExistsError``: there is one, and it is not to be replaced.
            ImageError: it has its name, but that is not on stable storage.
        """
        if replacing:
            if self._name is None:
                self._name = self._link_hidden()
            os.rename(self._name, path)
        elif self._name is None:
            self._link(path)
        else:
            _rename_to_free_name(self._name, path)
        self._name = None
        sync_directory(path)

    def another(self) -> NewFile:
        """Make one more in the same directory.

        Raises:
            OSError: it cannot be made.
        """
        return NewFile(os.path.join(self._directory, ""))

    def detach(self) -> int:
        """Return the descriptor, which is the caller's to close from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close it; without a name of its own it is gone."""
        if self._name is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._name)
            self._name = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _link_hidden(self) -> str:
        while True:
            name = hidden_name(self._directory)
            try:
                self._link(name)
            except FileExistsError:
                continue
            return name

    def _link(self, path: str) -> None:
        # Only with a directory's descriptor does Python follow the link (linkat, see open(2)).
        descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(str(self.fd), path, src_dir_fd=descriptors, follow_symlinks=True)
        finally:
            os.close(descriptors)


def sweep(directory: str) -> None:
    """Remove the hidden files of ours whose makers have died.

    Raises:
        OSError: the directory cannot be read.
    """
    for name in os.listdir(directory):
        if _HIDDEN.fullmatch(name):
            with suppress(OSError):  # somebody else was quicker, or its maker lives
                _remove_unlocked(os.path.join(directory, name))


def _remove_unlocked(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(status, os.lstat(path)):
                os.unlink(path)
    finally:
        os.close(fd)


def _make_hidden(directory: str) -> tuple[int, str]:
    """Make and lock a file with a hidden name."""
    while True:
        name = hidden_name(directory)
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.lstat(name)):
                return fd, name
        os.close(fd)  # it was removed before it was locked


def hidden_name(directory: str) -> str:
    """Return a new name in a directory; :func:`sweep` removes what has one and no lock."""
    return os.path.join(directory, _PREFIX + os.urandom(4).hex())


def _rename_to_free_name(name: str, path: str) -> None:
    """Rename a file, but never over another one."""
    try:
        os.link(name, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A file system without hard links: what is left is to look first.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(name, path)
    else:
        os.unlink(name)


def sync_directory(path: str) -> None:
    """Have the name ``path`` on stable storage.

    Raises:
        ImageError: it is there, but that is not certain.
    """
    directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what knows no such thing needs none
            raise ImageError(
                f"{path}: is in its place, but a crash of this host may undo that: {error.strerror}"
            ) from error
    finally:
        os.close(directory)
