"""Files that other programs look for at fixed places: put there, or taken away, all or none."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Sequence
from importlib import resources

from ..errors import InstallError
from ..named import NamedTuple
from .program import unit_command


class File(NamedTuple):
    """A file, whole."""

    path: str
    content: bytes
    mode: int


_FILES = (
    ("etc/xen/scripts/block-xen-disk", 0o755),
    ("etc/systemd/system/xen-disk-serve.service", 0o644),
    ("etc/systemd/system/xen-disk@.service", 0o644),
    # Where each shell looks for what is not in a package of the distribution.
    ("usr/local/share/bash-completion/completions/xen-disk", 0o644),
    ("usr/local/share/zsh/site-functions/_xen-disk", 0o644),
    ("etc/fish/completions/xen-disk.fish", 0o644),
)
_MANUAL = "usr/local/share/man/man8/xen-disk.8"


def ours(prefix: str, manual: str) -> list[File]:
    """List what belongs outside this package, where other programs look for it.

    Args:
        prefix: the root directory of the system that they are for.
        manual: the man page.
    """
    data = resources.files("xen_disk_py").joinpath("data")
    root, program = os.path.abspath(prefix), os.fsencode(unit_command())
    files = [
        File(
            os.path.join(root, path),
            data.joinpath(os.path.basename(path)).read_bytes().replace(b"@PROGRAM@", program),
            mode,
        )
        for path, mode in _FILES
    ]
    return [*files, File(os.path.join(root, _MANUAL), manual.encode(), 0o644)]


def install(files: Sequence[File], *, force: bool) -> list[str]:
    """Put files in their places.

    Args:
        files: which.
        force: replace what has the same name and differs.

    Returns:
        What was done, a line for each.

    Raises:
        InstallError: nothing was.
    """
    present = _present(files, force)
    _change([(file.path, file) for file in files if present[file.path] != file])
    return [f"{_done(present[file.path], file)} {file.path}" for file in files]


def remove(files: Sequence[File], *, force: bool) -> list[str]:
    """Take files away again.

    Args:
        files: which.
        force: take away what has the same name and differs, too.

    Returns:
        What was done, a line for each.

    Raises:
        InstallError: nothing was.
    """
    present = _present(files, force)
    _change([(path, None) for path, file in present.items() if file is not None])
    return [
        f"not there: {path}" if file is None else f"removed {path}"
        for path, file in present.items()
    ]


def _done(before: File | None, after: File) -> str:
    if before is None:
        return "installed"
    return "unchanged:" if before == after else "replaced"


def _present(files: Sequence[File], force: bool) -> dict[str, File | None]:
    """Read what is there, and see that it is ours."""
    present = {file.path: _read(file.path) for file in files}
    for file in files:
        found = present[file.path]
        if found is not None and found != file and not force:
            raise InstallError(
                f"{file.path} is there and differs from what this version installs; "
                "nothing was changed (--force changes it all the same)"
            )
    return present


def _read(path: str) -> File | None:
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise InstallError(f"{path} is no regular file: move it away first")
        with open(path, "rb") as file:
            return File(path, file.read(), stat.S_IMODE(mode))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(f"{path}: {error.strerror}") from error


def _change(steps: Sequence[tuple[str, File | None]]) -> None:
    """Make each path what it shall be, None for nothing; whatever goes wrong undoes it all."""
    with contextlib.ExitStack() as undo:
        for path, file in steps:
            before = _read(path)
            try:
                _put(path, file)
            except OSError as error:
                raise InstallError(f"{path}: {error.strerror}; nothing was changed") from error
            undo.callback(_put, path, before)
        undo.pop_all()


def _make(directory: str) -> None:
    """Make a directory that everybody may read, whatever our umask is, and what is above it."""
    if not os.path.isdir(directory):
        _make(os.path.dirname(directory))
        os.mkdir(directory)
        os.chmod(directory, 0o755)


def _put(path: str, file: File | None) -> None:
    """Replace a file as a whole: nobody sees half of it."""
    if file is None:
        os.unlink(path)
        return
    directory, name = os.path.split(path)
    _make(directory)
    fd, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=directory)
    try:
        with open(fd, "wb") as stream:
            stream.write(file.content)
            os.fchmod(fd, file.mode)
            stream.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
