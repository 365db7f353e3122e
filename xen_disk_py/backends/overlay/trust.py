"""Whether the path that an overlay names may be followed.

An overlay says which image it belongs to. Whoever wrote it chose that path, and root follows it to
wherever root may read and write. So it is followed only if nobody but root and ourselves can have
written it, or put it where it is.
"""

from __future__ import annotations

import os
import stat

from ...errors import ImageError

_LINKS = 40  # followed at most, as in the kernel


def require_trusted(
    fd: int, path: str, otherwise: str = "say which image with --path IMAGE"
) -> None:
    """See that an open overlay, opened as ``path``, is root's or ours alone.

    Args:
        fd: the file.
        path: the name that it was opened by.
        otherwise: what to do if it is not.

    Raises:
        ImageError: it is not; the message says why and what to do.
    """
    reason = distrust(os.fstat(fd), "it") or _reason_above(path)
    if reason is not None:
        raise ImageError(
            f"{path}: whoever wrote it chose which image it names, and {reason}: if it "
            f"is yours, {otherwise}"
        )


def distrust(status: os.stat_result, what: str) -> str | None:
    """Say who else can change a file or directory; None: nobody."""
    if status.st_uid not in (0, os.geteuid()):
        return f"{what} belongs to another user ({status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return f"{what} can be written by everybody"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid()):
        return f"{what} can be written by a group ({status.st_gid})"
    return None


def _reason_above(path: str) -> str | None:
    """Say who else can put another file there: through a directory or a link on the way."""
    left = os.path.abspath(path).split("/")[1:]
    at, links = "/", 0
    while left:
        status = os.lstat(at)
        sticky = status.st_mode & stat.S_ISVTX and status.st_uid in (0, os.geteuid())
        if not sticky:
            reason = distrust(status, f"its directory {at}")
            if reason is not None:
                return reason
        name = left.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            at = os.path.dirname(at)
            continue
        below = os.path.join(at, name)
        status = os.lstat(below)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if status.st_uid not in (0, os.geteuid()):
                return f"the link {below} belongs to another user ({status.st_uid})"
            if links > _LINKS:
                return f"there are too many links on the way to it ({below})"
            target = os.readlink(below).split("/")
            at = "/" if target[0] == "" else at
            left = target + left
        elif left:
            at = below
    return None
