"""Images in the Ceph cluster of the lab's ``--ceph``, and what its OSD says that it was asked."""

from __future__ import annotations

import os
import re
import subprocess
from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

from xen_disk_py.backends.rbd import RbdBackend
from xen_disk_py.backends.rbd.librbd import RADOS

from .guest import RESULTS

SHARE = Path("/mnt")
CONF = SHARE / "ceph.conf"
LOG = SHARE / "ceph/osd.0.log"


def create(name: str, data: bytes) -> None:
    """Make an image of the pool ``rbd`` with that in it."""
    call, cluster, io = RADOS.load(), c_void_p(), c_void_p()
    call.rados_create(byref(cluster), b"admin")
    call.rados_conf_read_file(cluster, os.fsencode(CONF))
    call.rados_connect(cluster)
    call.rados_ioctx_create(cluster, b"rbd", byref(io))
    rbd_create = CDLL("librbd.so.1").rbd_create
    rbd_create.argtypes = (c_void_p, c_char_p, c_uint64, POINTER(c_int))
    result = rbd_create(io, name.encode(), len(data), byref(c_int(0)))
    call.rados_ioctx_destroy(io)
    call.rados_shutdown(cluster)
    assert result == 0, os.strerror(-result)
    disk = RbdBackend(f"rbd:rbd/{name}", conf=str(CONF))
    disk.write([memoryview(data)], 0)
    disk.close()


def content(name: str) -> bytes:
    """Read a whole image, whoever has its lock."""
    disk = RbdBackend(f"rbd:rbd/{name}", conf=str(CONF), read_only=True)
    data = bytearray(disk.size)
    disk.read([memoryview(data)], 0)
    disk.close()
    return bytes(data)


class Event(NamedTuple):
    """Something that the OSD was asked, or has answered.

    Attributes:
        host: the last number of the client's address.
        what: ``write``, ``lock`` or ``unlock``.
        is_answer: it is the answer.
    """

    host: int
    what: str
    is_answer: bool


_CLIENT = re.compile(r"<== client\.(\d+) \S*?192\.0\.2\.(\d):")
_REQUEST = re.compile(
    r"(do_op|sending reply on) osd_op\((client\.(\d+)\S*) \S+ \S+?:::(?:"
    r"rbd_data\S* \[(?:[^]]*,)?(write)(?:full)? |"
    r"rbd_header\S* \[call lock\.(lock|unlock)\b)"
)


def events() -> list[Event]:
    """Return what concerns a guest's writes and the lock, in order; also in ``osd.log``."""
    words = "<== client|(do_op|sending reply on) osd_op"
    with open(RESULTS / "osd.log", "wb") as lines:
        subprocess.run(["grep", "-E", words, str(LOG)], stdout=lines, check=True)
    hosts: dict[str, int] = {}
    begun = set()  # the OSD begins one anew that has waited for another to the same bytes
    found = []
    for line in (RESULTS / "osd.log").read_text(errors="replace").splitlines():
        if match := _CLIENT.search(line):
            hosts[match[1]] = int(match[2])
        elif match := _REQUEST.search(line):
            said, request, client, *what = match.groups()
            is_answer = said != "do_op"
            if is_answer or request not in begun:
                begun.add(request)
                found.append(Event(hosts[client], what[0] or what[1], is_answer))
    return found
