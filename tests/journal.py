"""What the end of systemd's journal understands of an entry, by the protocol's own description."""

from __future__ import annotations

import array
import select
import socket
import struct


class Listener:
    """Has the journal's socket; entries are dictionaries of bytes by name."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._socket.settimeout(30)

    def next(self) -> dict[str, bytes]:
        """Wait for an entry."""
        size = array.array("i", [0]).itemsize
        data, control, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(size))
        if control:
            ((_, kind, fds),) = control
            assert kind == socket.SCM_RIGHTS
            assert data == b""
            (fd,) = array.array("i", fds)
            with open(fd, "rb") as file:
                file.seek(0)
                data = file.read()
        return decode(data)

    @property
    def is_empty(self) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        self._socket.close()


def decode(data: bytes) -> dict[str, bytes]:
    """Return the fields of an entry; each must be there once."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, end, rest = (
                rest[8 : 8 + length],
                rest[8 + length : 9 + length],
                rest[9 + length :],
            )
            assert (length, b"\n") == (len(value), end)
        assert name.decode() not in found
        found[name.decode()] = value
        data = rest
    return found
