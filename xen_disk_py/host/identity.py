"""Which file or block device this is: more than its name, its inode or its device number.

All three are used again: a file system gives the inode of a file that was removed to the next one
at once, and a loop device or logical volume of another day has the same number. So a file is known
by its birth and by its handle, which counts how often the inode was given away (``statx(2)``,
``name_to_handle_at(2)``); a block device by ``diskseq``, which no two have within a boot, and by
what the device itself, or the device mapper, says it is.

An identity is a dictionary of text and numbers, to be kept as JSON.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any, Union

from ..errors import HypervisorError, XenUnavailable
from .clibrary import Library, Signature, not_negative

Identity = dict[str, Union[str, int]]

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX = struct.Struct("=I76xqI164x")  # struct statx: its mask, and the time of birth
_HANDLE = struct.Struct("=Ii")  # struct file_handle: bytes that follow, type
_MAX_HANDLE = 128
_LASTING = ("dm-uuid", "partition", "wwid", "serial", "backing-file")
"""What says which device it is after the host was started anew, too."""

_LIBC = Library(
    None,
    "a C library that is not as old",
    {
        "statx": Signature(
            ctypes.c_int,
            (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p),
            not_negative("tell when a file was made"),
            optional=True,
        ),
        "name_to_handle_at": Signature(
            ctypes.c_int,
            (
                ctypes.c_int,
                ctypes.c_char_p,
                ctypes.c_void_p,
                ctypes.POINTER(ctypes.c_int),
                ctypes.c_int,
            ),
            not_negative("get a file's handle"),
            optional=True,
        ),
    },
)


@cache
def _libc() -> SimpleNamespace:
    try:
        return _LIBC.load()
    except XenUnavailable:  # some other C library
        return SimpleNamespace(statx=None, name_to_handle_at=None)


def identity_of(path: str) -> Identity | None:
    """Return what identifies a file or block device; None if there is no such thing.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return identity_of_descriptor(fd)
    finally:
        os.close(fd)


def identity_of_descriptor(fd: int) -> Identity:
    """Return what identifies the file or block device that is open as ``fd``."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return {"kind": "device", "boot": _boot(), **dict(_of_device(status.st_rdev))}
    found: Identity = {"kind": "file", "device": status.st_dev, "inode": status.st_ino}
    found.update(_of_file(fd))
    return found


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say what tells ``now`` from ``before``; None if they are, as far as one can tell, the same.

    What only one of them knows says nothing: another kernel, or another user, may have looked.
    """
    if before.get("kind") != now.get("kind"):
        return "one is a file, the other a block device"
    names: tuple[str, ...] = (*_LASTING, "partition-number")
    if now.get("kind") == "file":
        names = ("device", "inode", "born", "handle")
    elif before.get("boot") == now.get("boot") and "diskseq" in before.keys() & now.keys():
        names = ("diskseq", "partition-number")
    for name in names:
        if name in before and name in now and before[name] != now[name]:
            return f"{name} was {before[name]} and is {now[name]}"
    return None


def is_known(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether anything but its name says which device it is, before and now."""
    if now.get("kind") == "file":
        return True
    shared = before.keys() & now.keys()
    return bool(shared & set(_LASTING)) or (
        before.get("boot") == now.get("boot") and "diskseq" in shared
    )


def boot_id() -> str:
    """Return what is another text each time that the host is started (random(4)).

    Raises:
        OSError: it cannot be read.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@cache
def _boot() -> str:
    with suppress(OSError):
        return boot_id()
    return ""


def _of_file(fd: int) -> Iterator[tuple[str, str | int]]:
    libc = _libc()
    if libc.statx is not None:
        memory = ctypes.create_string_buffer(_STATX.size)
        with suppress(HypervisorError):  # an old kernel
            libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, memory)
            mask, seconds, nanoseconds = _STATX.unpack(memory.raw)
            if mask & _STATX_BTIME:
                yield "born", f"{seconds}.{nanoseconds:09d}"
    if libc.name_to_handle_at is not None:
        memory = ctypes.create_string_buffer(_HANDLE.size + _MAX_HANDLE)
        _HANDLE.pack_into(memory, 0, _MAX_HANDLE, 0)
        with suppress(HypervisorError):  # a file system that has none
            libc.name_to_handle_at(fd, b"", memory, ctypes.byref(ctypes.c_int()), _AT_EMPTY_PATH)
            length, kind = _HANDLE.unpack_from(memory)
            start = _HANDLE.size
            yield "handle", f"{kind}:{memory.raw[start : start + length].hex()}"


def _of_device(number: int) -> Iterator[tuple[str, str | int]]:
    major, minor = os.major(number), os.minor(number)
    directory = disk = f"/sys/dev/block/{major}:{minor}"
    part = _text(f"{directory}/partition")
    if part is not None:
        yield "partition-number", part
        disk = os.path.dirname(os.path.realpath(directory))
    for name, path in (
        ("diskseq", "diskseq"),
        ("dm-uuid", "dm/uuid"),
        ("wwid", "wwid"),
        ("wwid", "device/wwid"),
        ("serial", "serial"),
        ("serial", "device/serial"),
        ("backing-file", "loop/backing_file"),
    ):
        value = _text(f"{disk}/{path}")
        if value:
            yield name, value
    if part is not None:
        # udev's database: the kernel itself does not show it before Linux 6.16
        for line in (_text(f"/run/udev/data/b{major}:{minor}") or "").splitlines():
            if line.startswith("E:ID_PART_ENTRY_UUID="):
                yield "partition", line.partition("=")[2]


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None
