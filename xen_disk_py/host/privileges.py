"""Giving up root: another user, no capability, and no way back.

A process that serves a disk needs privilege to open things (an image, ``/dev/xen/*``, xenstore's
socket, its record in ``/run``), not to use them. So it opens what it will ever need, and then
becomes somebody who may open nothing:

1. :func:`forbid_gains`, before any thread is started: it holds for threads born later.
2. Open everything; :meth:`~.xenstore.Store.reserve` and :meth:`~.hypervisor.Hypervisor.reserve`
   open what is needed later only.
3. :func:`become`, which looks afterwards whether anything remains.

What stays is what is open. The event channels' handles reach one guest only; the grant device's
reaches what any guest grants us, and xenstore takes its connections for domain 0's.

Sources: setresuid(2), capabilities(7), prctl(2); the numbers are those of ``linux/prctl.h`` and
``linux/capability.h``.
"""

from __future__ import annotations

import ctypes
import os
import struct

from ..errors import PrivilegeError, UsageError
from ..named import NamedTuple

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_TASKS = "/proc/self/task"

_libc = ctypes.CDLL(None, use_errno=True)


class User(NamedTuple):
    """Whom to become: the two numbers, and the name for messages."""

    name: str
    uid: int
    gid: int


def find_user(text: str) -> User:
    """Read ``NAME[:GROUP]``; both may be numbers. The group is the user's own by default.

    Raises:
        UsageError: there is no such user or group, or it is root's.
        PrivilegeError: we are not root ourselves.
    """
    import grp  # few disks have a user
    import pwd

    name, colon, group = text.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise UsageError(f"--user {text}: there is no user {name!r} on this host") from None
    gid = entry.pw_gid
    if colon:
        try:
            gid = (grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)).gr_gid
        except (KeyError, OverflowError):
            raise UsageError(f"--user {text}: there is no group {group!r} on this host") from None
    if not entry.pw_uid or not gid:
        raise UsageError(
            f"--user {text}: that is root, which gives nothing up: name another user, and a group "
            "other than root's"
        )
    if os.geteuid():
        raise PrivilegeError(
            f"--user {text}: only root can become somebody else: run as root, or leave out --user"
        )
    return User(entry.pw_name, entry.pw_uid, gid)


def forbid_gains() -> None:
    """Have no program that this thread, or one born of it, starts gain anything (setuid files).

    Raises:
        PrivilegeError: the system refuses.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def become(user: User) -> None:
    """Become ``user`` for good, in every thread, without any capability.

    Files that are made from now on are nobody else's to read; nor can another process of that
    user look into this one, which holds descriptors of what root may open.

    Raises:
        PrivilegeError: the system refuses, or something remains. The process is to end then: it
            may be half somebody else.
    """
    os.umask(0o077)
    try:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become {user.name}: {error.strerror}") from error
    _drop_capabilities()
    hide()
    remaining = _remaining(user)
    if remaining is not None:
        raise PrivilegeError(f"not everything was given up on becoming {user.name}: {remaining}")


def hide() -> None:
    """Have no other process of this user look into this one, but into the programs it starts.

    Raises:
        PrivilegeError: the system refuses.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    if _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero):
        reason = os.strerror(ctypes.get_errno())
        raise PrivilegeError(f"cannot give up privileges (prctl {option}): {reason}")


def _drop_capabilities() -> None:
    # Leaving uid 0 has cleared those that count, unless a securebit keeps them.
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)):
        reason = os.strerror(ctypes.get_errno())
        raise PrivilegeError(f"cannot give up the capabilities: {reason}")


def _remaining(user: User) -> str | None:
    """Say what the kernel shows of our threads that should be otherwise; None if nothing."""
    wanted = {
        "Uid": [str(user.uid)] * 4,  # real, effective, saved, file system
        "Gid": [str(user.gid)] * 4,
        "Groups": [],
        "CapInh": ["0" * 16],
        "CapPrm": ["0" * 16],
        "CapEff": ["0" * 16],
        "CapAmb": ["0" * 16],
        "NoNewPrivs": ["1"],
    }
    try:
        for task in os.listdir(_TASKS):
            shown = _status(task)
            for name, value in wanted.items():
                if shown is not None and shown.get(name) != value:
                    found = " ".join(shown.get(name, ["not shown"]))
                    return f"{name} of thread {task} is {found}, not {' '.join(value) or 'empty'}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def _status(task: str) -> dict[str, list[str]] | None:
    """Return the words of each line about a thread, by the line's name; None if it has ended."""
    try:
        with open(f"{_TASKS}/{task}/status", encoding="utf-8", errors="replace") as file:
            pairs = (line.partition(":") for line in file)
            return {name: value.split() for name, _, value in pairs}
    except (FileNotFoundError, ProcessLookupError):
        return None
