"""What a service tells systemd, which listens where ``$NOTIFY_SOCKET`` says (sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("xen_disk_py")

NOTIFY_SOCKET = "NOTIFY_SOCKET"
"""The variable that says where; not for the programs that a service starts."""


def notify(*assignments: str) -> None:
    """Send ``READY=1``, ``STATUS=…`` and the like; nothing where nobody listens."""
    path = os.environ.get(NOTIFY_SOCKET)
    if not path:
        return
    if path.startswith("@"):  # an abstract socket
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto("\n".join(assignments).encode(), path)
    except OSError as error:
        log.debug("cannot notify systemd: %s", error)
