"""The real hypervisor: grants through libxengnttab, events through libxenevtchn.

Every C function that is called stands in :data:`LIBRARIES`, with its types and with the
check that turns a failure into an exception. The libraries are loaded when a :class:`Xen`
is made, not when this module is imported. Layouts and behaviour are those of Xen's
``tools/include/xengnttab.h`` and ``xenevtchn.h``.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    Union,
    addressof,
    c_char,
    c_int,
    c_int16,
    c_uint,
    c_uint16,
    c_uint32,
    c_void_p,
    cast,
    sizeof,
)
from functools import cache
from struct import Struct
from typing import Any, Callable

from xen_disk_py.errors import HypervisorError, XenUnavailable
from xen_disk_py.host.atomic import ATOMIC, load_fence
from xen_disk_py.host.clibrary import Finding, Library, Signature, not_negative, not_null
from xen_disk_py.host.mapping import GrantedPages, MappedPages, close_all
from xen_disk_py.hypervisor import Closing, Piece
from xen_disk_py.named import NamedTuple

# --------------------------------------------------------------------------- data layouts

COPY_SOURCE_IS_GRANT = 1
"""``GNTCOPY_source_gref``: the source is a granted page, not our memory."""

COPY_DESTINATION_IS_GRANT = 2
"""``GNTCOPY_dest_gref``."""


class _Foreign(Structure):
    _fields_ = (("ref", c_uint32), ("offset", c_uint16), ("domid", c_uint16))


class CopyEnd(Union):
    """One end of a copy: an address of ours (``virt``) or a place in a granted page."""

    _fields_ = (("virt", c_void_p), ("foreign", _Foreign))


class CopySegment(Structure):
    """``xengnttab_grant_copy_segment_t``: one copy, at most to the end of the granted page."""

    _fields_ = (
        ("source", CopyEnd),
        ("dest", CopyEnd),
        ("len", c_uint16),
        ("flags", c_uint16),
        ("status", c_int16),
    )


# The same structure, packed whole rather than field by field.
_COPY_FROM = Struct("<IHHQHHh2x").pack
_COPY_TO = Struct("<QIHHHHh2x").pack


@contextmanager
def _address(memory: memoryview) -> Iterator[int]:
    """Where writable memory is, held in place meanwhile."""
    held = c_char.from_buffer(memory)
    yield addressof(held)


_COPY_STATUS = {
    # xen/include/public/grant_table.h, GNTST_*
    -1: (errno.EIO, "general error"),
    -2: (errno.ESRCH, "no such domain"),
    -3: (errno.EINVAL, "bad grant reference"),
    -4: (errno.EINVAL, "bad handle"),
    -5: (errno.EFAULT, "bad virtual address"),
    -6: (errno.EFAULT, "bad device address"),
    -7: (errno.ENOSPC, "no space in the I/O memory map"),
    -8: (errno.EACCES, "permission denied"),
    -9: (errno.EINVAL, "bad page"),
    -10: (errno.EINVAL, "crosses the end of a page"),
    -11: (errno.ERANGE, "address too big"),
    -12: (errno.EAGAIN, "the page is not there just now"),
    -13: (errno.ENOSPC, "no space"),
}


class _Logger(Structure):
    """``struct xentoollog_logger``: the three functions that the libraries log through."""

    _fields_ = (("vmessage", c_void_p), ("progress", c_void_p), ("destroy", c_void_p))


@cache
def _logger_address() -> int | None:
    """Return a logger that drops everything.

    The libraries' own writes to stderr, once for each wrong reference that a guest sends. What
    goes wrong becomes an exception here, so theirs is silenced.
    """
    try:
        # errno must survive the callback: the library looks at it afterwards.
        drop = CFUNCTYPE(None, use_errno=True)(lambda: None)
    except MemoryError:  # a security policy forbids callbacks: then let them write
        return None
    _kept_alive.append(drop)
    code = cast(drop, c_void_p).value
    logger = _Logger(code, code, code)
    _kept_alive.append(logger)
    return addressof(logger)


_kept_alive: list[Any] = []
"""What C code points to."""

# ---------------------------------------------------------------------------- signatures

_handle = c_void_p
_domid = c_uint32
_ref = c_uint32
_refs = POINTER(c_uint32)
_port = c_uint32
_count = c_uint32
_logger = c_void_p
_flags = c_uint

GNTTAB = Library(
    "libxengnttab.so.1",
    "libxengnttab1 (Debian, Ubuntu) or xen-libs (Fedora)",
    {
        "xengnttab_open": Signature(_handle, (_logger, _flags), not_null("open the grant table")),
        "xengnttab_close": Signature(c_int, (_handle,), not_negative("close the grant table")),
        "xengnttab_map_grant_ref": Signature(
            c_void_p, (_handle, _domid, _ref, c_int), not_null("map a granted page")
        ),
        "xengnttab_map_domain_grant_refs": Signature(
            c_void_p, (_handle, _count, _domid, _refs, c_int), not_null("map granted pages")
        ),
        "xengnttab_unmap": Signature(
            c_int, (_handle, c_void_p, _count), not_negative("unmap granted pages")
        ),
        "xengnttab_grant_copy": Signature(  # since Xen 4.8
            c_int,
            (_handle, _count, POINTER(CopySegment)),
            not_negative("copy from or to granted pages"),
            optional=True,
        ),
        "xengntshr_open": Signature(
            _handle, (_logger, _flags), not_null("open the grant allocator")
        ),
        "xengntshr_close": Signature(c_int, (_handle,), not_negative("close the grant allocator")),
        "xengntshr_share_pages": Signature(
            c_void_p, (_handle, _domid, c_int, _refs, c_int), not_null("share pages")
        ),
        "xengntshr_unshare": Signature(
            c_int, (_handle, c_void_p, _count), not_negative("unshare pages")
        ),
    },
)

EVTCHN = Library(
    "libxenevtchn.so.1",
    "libxenevtchn1 (Debian, Ubuntu) or xen-libs (Fedora)",
    {
        "xenevtchn_open": Signature(_handle, (_logger, _flags), not_null("open event channels")),
        "xenevtchn_close": Signature(c_int, (_handle,), not_negative("close event channels")),
        "xenevtchn_fd": Signature(c_int, (_handle,), not_negative("poll an event channel")),
        "xenevtchn_restrict": Signature(  # since Xen 4.10
            c_int,
            (_handle, c_uint16),
            not_negative("restrict event channels to one domain"),
            optional=True,
        ),
        "xenevtchn_bind_interdomain": Signature(
            c_int,
            (_handle, _domid, _port),
            not_negative("bind to the event channel of a domain"),
        ),
        "xenevtchn_bind_unbound_port": Signature(
            c_int, (_handle, _domid), not_negative("open an event channel for a domain")
        ),
        "xenevtchn_unbind": Signature(
            c_int, (_handle, _port), not_negative("unbind an event channel")
        ),
        "xenevtchn_notify": Signature(c_int, (_handle, _port), not_negative("send an event")),
        "xenevtchn_pending": Signature(c_int, (_handle,), not_negative("receive an event")),
        "xenevtchn_unmask": Signature(
            c_int, (_handle, _port), not_negative("unmask an event channel")
        ),
    },
)

LIBRARIES = (GNTTAB, EVTCHN, ATOMIC)
"""Every C function that serving a disk calls."""


def survey() -> list[Finding]:
    """Tell of each library and function whether it is here; loads them, never raises."""
    return [finding for library in LIBRARIES for finding in library.survey()]


# ------------------------------------------------------------------------------- devices


class Device(NamedTuple):
    """A device node that a library opens."""

    path: str
    module: str

    def problem(self) -> str | None:
        """Say why it cannot be used and what to do, or None."""
        if not os.path.exists(self.path):
            return f"{self.path} does not exist: modprobe {self.module}"
        if not os.access(self.path, os.R_OK | os.W_OK):
            return f"no permission to use {self.path}: run as root"
        return None


GNTDEV = Device("/dev/xen/gntdev", "xen-gntdev")
EVTCHN_DEVICE = Device("/dev/xen/evtchn", "xen-evtchn")
GNTALLOC = Device("/dev/xen/gntalloc", "xen-gntalloc")
"""Only to play a guest; serving a disk does not need it."""


def runs_under_xen() -> bool:
    """Tell whether this kernel was started by Xen, as dom0 or as a guest."""
    try:
        with open("/sys/hypervisor/type", encoding="ascii") as file:
            return file.read().strip() == "xen"
    except OSError:
        return os.path.exists("/proc/xen")


def _open(function: Callable[[Any, int], int], device: Device) -> int:
    """Call one of the open functions; failing, say what would help."""
    problem = device.problem()
    if problem is not None:
        raise XenUnavailable(problem)
    try:
        return function(_logger_address(), 0)
    except HypervisorError as error:
        remedy = ""
        if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            remedy = f": modprobe {device.module}"
        elif error.errno in {errno.EACCES, errno.EPERM}:
            remedy = ": run as root"
        reason = os.strerror(error.errno)
        raise XenUnavailable(f"cannot open {device.path} ({reason}){remedy}") from error


# ----------------------------------------------------------------------------------- Xen

_READ_ONLY = mmap.PROT_READ
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class Xen(Closing):
    """The hypervisor under us: a :class:`~xen_disk_py.hypervisor.Hypervisor`.

    It is a :class:`~xen_disk_py.hypervisor.GuestHypervisor` as well: domain 0 may be its own
    guest. Not to be used after a fork.

    Raises:
        XenUnavailable: no Xen here, or a library, a device or the permission is missing.
    """

    fence: Callable[[], None]
    """Full memory barrier."""

    def __init__(self) -> None:
        self._gnttab_handle: int | None = None
        self._gntshr_handle: int | None = None
        self._open_handles: dict[Closing, None] = {}  # in the order of opening
        self._reserved: dict[int, list[int]] = {}  # by domain: handles of the event device
        if not runs_under_xen():
            raise XenUnavailable(
                "this machine does not run under Xen: boot the Xen hypervisor, or try "
                "'xen-disk demo', which needs none"
            )
        self._gnttab = GNTTAB.load()
        self._evtchn = EVTCHN.load()
        self.fence = load_fence().barrier
        problem = EVTCHN_DEVICE.problem()  # now rather than when the first guest connects
        if problem is not None:
            raise XenUnavailable(problem)
        self._gnttab_handle = _open(self._gnttab.xengnttab_open, GNTDEV)

    def map_grants(self, domid: int, refs: Sequence[int], *, writable: bool) -> MappedPages:
        """Map granted pages of ``domid``, contiguous and in the order of ``refs``.

        Raises:
            HypervisorError: one of the references is not granted (so); nothing is mapped.
        """
        handle = self._grant_table()
        count = len(refs)
        protection = _READ_WRITE if writable else _READ_ONLY
        if count == 1:
            address = self._gnttab.xengnttab_map_grant_ref(handle, domid, refs[0], protection)
        else:
            address = self._gnttab.xengnttab_map_domain_grant_refs(
                handle, count, domid, (c_uint32 * count)(*refs), protection
            )
        pages = MappedPages(address, count, writable=writable, unmap=self._unmap)
        self._open_handles[pages] = None
        return pages

    @property
    def can_copy(self) -> bool:
        """Whether pages can be copied from and to without mapping them."""
        return self._gnttab.xengnttab_grant_copy is not None

    def copy_from_grants(self, domid: int, pieces: Sequence[Piece], memory: memoryview) -> None:
        """Copy pieces of granted pages of ``domid``, one after the other, into ``memory``.

        Raises:
            HypervisorError: a piece was not copied; others may have been.
        """
        with _address(memory) as start:
            at, table = start, bytearray()
            for ref, offset, length in pieces:
                table += _COPY_FROM(ref, offset, domid, at, length, COPY_SOURCE_IS_GRANT, 0)
                at += length
            self._copy(table)

    def copy_to_grants(self, domid: int, pieces: Sequence[Piece], memory: memoryview) -> None:
        """Fill pieces of granted pages of ``domid`` from ``memory``.

        Raises:
            HypervisorError: a piece was not copied; others may have been.
        """
        with _address(memory) as start:
            at, table = start, bytearray()
            for ref, offset, length in pieces:
                table += _COPY_TO(at, ref, offset, domid, length, COPY_DESTINATION_IS_GRANT, 0)
                at += length
            self._copy(table)

    def _copy(self, table: bytearray) -> None:
        handle = self._grant_table()
        if self._gnttab.xengnttab_grant_copy is None:
            raise HypervisorError(errno.ENOSYS, "cannot copy (no xengnttab_grant_copy)")
        segments = (CopySegment * (len(table) // sizeof(CopySegment))).from_buffer(table)
        self._gnttab.xengnttab_grant_copy(handle, len(segments), segments)
        # The call succeeds when it was understood: each segment has a result of its own.
        for number, segment in enumerate(segments):
            if segment.status:
                code, reason = _COPY_STATUS.get(segment.status, (errno.EIO, "unknown error"))
                raise HypervisorError(code, f"cannot copy segment {number} ({reason})")

    def share_pages(self, domid: int, count: int, *, writable: bool) -> GrantedPages:
        """Grant ``count`` fresh zeroed pages to ``domid``."""
        if self._gntshr_handle is None:
            self._grant_table()  # closed: the same error as everywhere
            self._gntshr_handle = _open(self._gnttab.xengntshr_open, GNTALLOC)
        refs = (c_uint32 * count)()
        address = self._gnttab.xengntshr_share_pages(
            self._gntshr_handle, domid, count, refs, int(writable)
        )
        pages = GrantedPages(address, list(refs), unmap=self._unshare)
        self._open_handles[pages] = None
        return pages

    def reserve(self, domid: int, channels: int) -> None:
        """Open now what so many event channels of ``domid`` at a time will need.

        Binding and closing them opens and closes nothing any more: a process that has become
        another user can do it as often as the guest likes.
        """
        self._grant_table()
        handles = self._reserved.setdefault(domid, [])
        while len(handles) < channels:
            handles.append(self._open_event_device(domid))

    def bind_interdomain(self, domid: int, remote_port: int) -> XenEventChannel:
        """Connect to the port that ``domid`` opened for us.

        An event is pending at once: Xen makes up for those sent before we were there.

        Raises:
            HypervisorError: no such port, or not open for us.
        """
        evtchn = self._evtchn
        return self._channel(
            domid, lambda handle: evtchn.xenevtchn_bind_interdomain(handle, domid, remote_port)
        )

    def bind_unbound(self, domid: int) -> XenEventChannel:
        """Open a port that ``domid`` may bind to."""
        evtchn = self._evtchn
        return self._channel(
            domid, lambda handle: evtchn.xenevtchn_bind_unbound_port(handle, domid)
        )

    def close(self) -> None:
        """Close every channel, mapping and grant, then the devices.

        Raises:
            BackendError: somebody holds a view of mapped pages. Everything else is closed;
                closing again later closes the rest.
        """
        close_all(reversed(list(self._open_handles)))
        while self._reserved:
            for reserved in self._reserved.popitem()[1]:
                self._evtchn.xenevtchn_close(reserved)
        handle, self._gntshr_handle = self._gntshr_handle, None
        if handle is not None:
            self._gnttab.xengntshr_close(handle)
        handle, self._gnttab_handle = self._gnttab_handle, None
        if handle is not None:
            self._gnttab.xengnttab_close(handle)

    def _grant_table(self) -> int:
        if self._gnttab_handle is None:  # in C, NULL would be a crash
            raise HypervisorError(errno.EBADF, "the hypervisor is closed")
        return self._gnttab_handle

    def _forget(self, handle: Closing) -> None:
        self._open_handles.pop(handle, None)

    def _unmap(self, pages: MappedPages) -> None:
        self._gnttab.xengnttab_unmap(self._grant_table(), pages.address, pages.count)
        self._forget(pages)

    def _unshare(self, pages: GrantedPages) -> None:
        self._gnttab.xengntshr_unshare(self._gntshr_handle, pages.address, pages.count)
        self._forget(pages)

    def _channel(self, domid: int, bind: Callable[[int], int]) -> XenEventChannel:
        self._grant_table()
        reserved = self._reserved.get(domid)
        handle = reserved.pop() if reserved else self._open_event_device(domid)

        def release() -> None:
            if domid in self._reserved:
                self._reserved[domid].append(handle)
            else:
                self._evtchn.xenevtchn_close(handle)

        try:
            channel = XenEventChannel(self._evtchn, handle, bind, release, self._forget)
        except BaseException:
            release()
            raise
        self._open_handles[channel] = None
        return channel

    def _open_event_device(self, domid: int) -> int:
        """Open a handle that reaches no other domain."""
        handle = _open(self._evtchn.xenevtchn_open, EVTCHN_DEVICE)
        # Linux refuses domain 0 (EINVAL), and an old kernel the whole request.
        if domid == 0 or self._evtchn.xenevtchn_restrict is None:
            return handle
        try:
            self._evtchn.xenevtchn_restrict(handle, domid)
        except HypervisorError as error:
            if error.errno not in {errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP}:
                self._evtchn.xenevtchn_close(handle)
                raise
        return handle


class XenEventChannel(Closing):
    """One port on a device handle of its own, so that its descriptor polls for it alone."""

    def __init__(
        self,
        evtchn: Any,
        handle: int,
        bind: Callable[[int], int],
        release: Callable[[], None],
        forget: Callable[[XenEventChannel], None],
    ) -> None:
        self._evtchn = evtchn
        self._release = release
        self._forget = forget
        self._fd: int = evtchn.xenevtchn_fd(handle)
        # A read may block even on a descriptor set not to (xenevtchn.h): look first.
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self.port = bind(handle)
        self._handle: int | None = handle

    def fileno(self) -> int:
        """Return a descriptor that polls readable when an event is pending."""
        self._opened()
        return self._fd

    def notify(self) -> None:
        """Send an event to the other end."""
        self._evtchn.xenevtchn_notify(self._opened(), self.port)

    def acknowledge(self) -> bool:
        """Consume a pending event and allow the next. False: there was none. Never blocks."""
        handle = self._opened()
        if not self._poll.poll(0):
            return False
        self._evtchn.xenevtchn_unmask(handle, self._evtchn.xenevtchn_pending(handle))
        return True

    def close(self) -> None:
        """Unbind the port."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        self._forget(self)
        try:
            self._evtchn.xenevtchn_unbind(handle, self.port)
        finally:
            self._release()

    def _opened(self) -> int:
        if self._handle is None:
            raise HypervisorError(errno.EBADF, "the event channel is closed")
        return self._handle
