"""Entries for systemd's journal, in its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

One entry is one datagram of fields; one that is too long for that is a sealed memfd, whose
descriptor is sent instead. Nothing here waits or raises: where nobody listens, or the listener's
queue is full, the entry is lost.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Mapping
from typing import Union

log = logging.getLogger("xen_disk_py")

SOCKET = "/run/systemd/journal/socket"

Value = Union[str, bytes, int]

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def encode(fields: Mapping[str, Value]) -> bytes:
    """Return an entry as the protocol has it.

    Args:
        fields: by names of capital letters, digits and ``_``, none of which begins with ``_``.
            Text becomes UTF-8; the bytes of a file name that are none stay as they are.
    """
    parts = []
    for name, value in fields.items():
        data = value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
        if b"\n" in data:  # else what a guest is called would be a field of its own
            parts += [name.encode(), b"\n", struct.pack("<Q", len(data)), data, b"\n"]
        else:
            parts += [name.encode(), b"=", data, b"\n"]
    return b"".join(parts)


def send(fields: Mapping[str, Value], path: str = SOCKET) -> bool:
    """Send an entry; tell whether somebody has it now.

    Args:
        fields: as :func:`encode` takes them.
        path: of the socket.
    """
    data = encode(fields)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            try:
                channel.sendto(data, _FLAGS, path)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                _send_file(channel, data, path)
    except OSError as error:
        log.debug("no entry in the journal: %s", error)
        return False
    return True


def _send_file(channel: socket.socket, data: bytes, path: str) -> None:
    fd = os.memfd_create("journal entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        channel.sendmsg([], [rights], _FLAGS, path)
    finally:
        os.close(fd)
