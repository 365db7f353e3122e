"""A hypervisor made of shared memory: grants and event channels without Xen.

One :class:`SimulatedMachine` is a host with one guest. It owns a memory file that both
sides map, and a pair of eventfds for each event channel::

    memory file: header │ grant table │ ports │ frames in use │ the guest's memory, page by page

Each side works through its own object, the backend through :class:`SimulatedHypervisor`, the
frontend through :class:`SimulatedGuest`. They may live in one process or in two: the second
one is started with the machine's descriptors and attaches to it::

    machine = SimulatedMachine(domid=1)
    subprocess.Popen([..., machine.address], pass_fds=machine.descriptors)

    machine = SimulatedMachine.attach(sys.argv[1])      # in the other process

The memory is really shared and pages are really mapped and unmapped, so that speed can be
measured and a use after unmapping crashes as it would under Xen.

Each word of the tables has one writer: grants and frames are the guest's, mapped counts the
backend's (one process of each), so that no lock need cross the processes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import threading
from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any, Callable

from xen_disk_py.errors import HypervisorError
from xen_disk_py.host.atomic import load_fence
from xen_disk_py.host.clibrary import Library, Signature, mapped, not_negative
from xen_disk_py.host.mapping import GrantedPages, MappedPages, close_all
from xen_disk_py.hypervisor import PAGE_SIZE, Closing, Piece

FIRST_REFERENCE = 8
"""Xen keeps the references below for the console, xenstore and what may come."""

CHANNELS = 8
"""Event channels that can be open at once: their eventfds exist from the start."""

_GRANTED = 1 << 16
_READ_ONLY = 1 << 17
# A grant entry is 0 or _GRANTED | _READ_ONLY if so | the domain it is granted to.

_OPEN = 1 << 16
# A port entry is 0 or _OPEN | the domain it is open for.

_FIRST_GUEST_PORT = 16
_FIRST_BACKEND_PORT = 64
# Far apart: whoever uses the other side's number must fail.

_HEADER = struct.Struct("<8s5I")
_MAGIC = b"xdpsim01"
_EVENT = (1).to_bytes(8, sys.byteorder)

_READ = mmap.PROT_READ
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_PROT_NONE = 0
_MAP_FIXED = 0x10
# The mmap module lacks these two; the numbers are those of x86, ARM, POWER and RISC-V.

_LIBC = Library(
    None,
    "glibc",
    {
        "mmap": Signature(
            ctypes.c_void_p,
            (
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_long,
            ),
            mapped("map memory"),
        ),
        "munmap": Signature(
            ctypes.c_int, (ctypes.c_void_p, ctypes.c_size_t), not_negative("unmap memory")
        ),
        # os.eventfd came with Python 3.10.
        "eventfd": Signature(
            ctypes.c_int, (ctypes.c_uint, ctypes.c_int), not_negative("make an eventfd")
        ),
    },
)


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE)


class SimulatedMachine(Closing):
    """A host with one guest, shared by both sides. Close it after both.

    Args:
        domid: the guest.
        backend_domid: the domain that serves it.
        pages: the guest's memory; pages that nobody touched cost nothing.
    """

    def __init__(self, domid: int = 1, backend_domid: int = 0, pages: int = 16384) -> None:
        references = FIRST_REFERENCE + pages
        memory = os.memfd_create("xen_disk_py-guest")
        descriptors = [memory]
        try:
            header = _HEADER.pack(_MAGIC, pages, references, CHANNELS, domid, backend_domid)
            os.write(memory, header)
            libc = _LIBC.load()
            flags = os.O_NONBLOCK | os.O_CLOEXEC  # EFD_NONBLOCK, EFD_CLOEXEC
            for _ in range(2 * CHANNELS):
                descriptors.append(libc.eventfd(0, flags))
            self._set_up(descriptors, libc)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    @classmethod
    def attach(cls, address: str) -> SimulatedMachine:
        """Join the machine that another process made, by its :attr:`address`."""
        descriptors = [int(word) for word in address.split(",")]
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        machine = cls.__new__(cls)
        machine._set_up(descriptors, _LIBC.load())
        return machine

    def _set_up(self, descriptors: list[int], libc: SimpleNamespace) -> None:
        memory = descriptors[0]
        magic, pages, references, channels, domid, backend_domid = _HEADER.unpack(
            os.pread(memory, _HEADER.size, 0)
        )
        if magic != _MAGIC or len(descriptors) != 1 + 2 * channels:
            raise HypervisorError(errno.EINVAL, "these descriptors are no simulated machine")
        self.domid: int = domid
        self.backend_domid: int = backend_domid
        self.libc = libc
        self.fence: Callable[[], None] = load_fence().barrier
        self.descriptors = tuple(descriptors)
        """To be handed to the other process (``pass_fds``)."""
        self.backend_events = descriptors[1 : 1 + channels]
        self.guest_events = descriptors[1 + channels :]
        """The eventfd that each side of a channel waits for."""

        words = [references, references, references, channels, channels]
        start = PAGE_SIZE + 4 * sum(words)
        self.frames_start = start
        self.frames_stop = start + pages
        self.memory_offset = _pages(self.frames_stop) * PAGE_SIZE
        os.ftruncate(memory, self.memory_offset + pages * PAGE_SIZE)
        self.tables = mmap.mmap(memory, self.memory_offset)
        at = PAGE_SIZE
        columns = []
        with memoryview(self.tables) as whole:
            for count in words:
                columns.append(whole[at : at + 4 * count].cast("I"))
                at += 4 * count
        self._columns = columns
        self.grants, self.frames, self.mapped, self.guest_ports, self.backend_ports = columns
        self._is_open = True

    @property
    def address(self) -> str:
        """What the other process gives to :meth:`attach`; without spaces."""
        return ",".join(map(str, self.descriptors))

    def map_frames(self, frames: Sequence[int], *, writable: bool) -> int:
        """Map pages of the guest contiguously, in this order; the address."""
        mmap_, memory = self.libc.mmap, self.descriptors[0]
        protection = _READ_WRITE if writable else _READ
        runs = _runs(frames)
        if len(runs) == 1:
            ((frame, count),) = runs
            offset = self.memory_offset + frame * PAGE_SIZE
            address: int = mmap_(
                None, count * PAGE_SIZE, protection, mmap.MAP_SHARED, memory, offset
            )
            return address
        size = len(frames) * PAGE_SIZE
        # Reserve the whole range first, then lay the pages over it.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = mmap_(None, size, _PROT_NONE, private, -1, 0)
        try:
            at = address
            for frame, count in runs:
                length = count * PAGE_SIZE
                offset = self.memory_offset + frame * PAGE_SIZE
                mmap_(at, length, protection, mmap.MAP_SHARED | _MAP_FIXED, memory, offset)
                at += length
        except HypervisorError:
            self.libc.munmap(address, size)
            raise
        return address

    def bury_backend(self) -> None:
        """Do what a kernel does when the backend's process has died: unmap and unbind all."""
        for column in (self.mapped, self.backend_ports):
            column[:] = memoryview(bytes(4 * len(column))).cast("I")

    def close(self) -> None:
        """Give the memory and the descriptors back."""
        if not self._is_open:
            return
        self._is_open = False
        for column in self._columns:
            column.release()
        self.tables.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Join neighbours: (first frame, how many) for each run, so that each is one mmap."""
    runs = []
    first = expected = frames[0]
    for frame in frames:
        if frame != expected:
            runs.append((first, expected - first))
            first = expected = frame
        expected += 1
    runs.append((first, expected - first))
    return runs


class Counters:
    """What the backend's side did."""

    maps = unmaps = copies = notifications = 0
    mapped_pages = 0
    """Now, not ever."""


class SimulatedHypervisor(Closing):
    """The backend's side: a :class:`~xen_disk_py.hypervisor.Hypervisor`.

    Attributes:
        counters: what was done so far.
        before_map: called with (domid, refs, writable) before anything is mapped; what it
            raises is what the caller sees. For tests.
        before_copy: the same for copying; ``writable`` if to granted pages.
    """

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine
        self._lock = threading.Lock()
        self._open_handles: set[Closing] = set()
        self._references: dict[MappedPages, Sequence[int]] = {}
        self.fence = machine.fence
        self.counters = Counters()
        self.before_map: Callable[[int, Sequence[int], bool], object] | None = None
        self.before_copy: Callable[[int, Sequence[int], bool], object] | None = None

    @property
    def mapped_pages(self) -> int:
        """How many pages are mapped now."""
        return self.counters.mapped_pages

    def map_grants(self, domid: int, refs: Sequence[int], *, writable: bool) -> MappedPages:
        """Map granted pages of ``domid``, contiguous and in the order of ``refs``.

        Raises:
            HypervisorError: one of the references is not granted (so); nothing is mapped.
        """
        if self.before_map is not None:
            self.before_map(domid, refs, writable)
        machine = self._machine
        refs = tuple(refs)
        self._check_references(domid, refs)
        self._pin(refs, 1)
        try:
            machine.fence()  # counted before we look: see SimulatedGuest._revoke
            frames = self._granted_frames(refs, writable)
            address = machine.map_frames(frames, writable=writable)
        except BaseException:
            self._pin(refs, -1)
            raise
        pages = MappedPages(address, len(refs), writable=writable, unmap=self._unmap)
        self._references[pages] = refs
        self.counters.maps += 1
        return pages

    can_copy = True

    def copy_from_grants(self, domid: int, pieces: Sequence[Piece], memory: memoryview) -> None:
        """Copy pieces of granted pages, one after the other, into ``memory``.

        Raises:
            HypervisorError: a piece was not copied.
        """
        self._copy(os.preadv, domid, pieces, memory, writable=False)

    def copy_to_grants(self, domid: int, pieces: Sequence[Piece], memory: memoryview) -> None:
        """Fill pieces of granted pages from ``memory``.

        Raises:
            HypervisorError: a piece was not copied.
        """
        self._copy(os.pwritev, domid, pieces, memory, writable=True)

    def _copy(
        self,
        transfer: Callable[[int, Sequence[memoryview], int], int],
        domid: int,
        pieces: Sequence[Piece],
        memory: memoryview,
        *,
        writable: bool,
    ) -> None:
        refs = [ref for ref, _, _ in pieces]
        if self.before_copy is not None:
            self.before_copy(domid, refs, writable)
        machine = self._machine
        self._check_references(domid, refs)
        self.counters.copies += 1
        at = 0
        for frame, (_, offset, length) in zip(self._granted_frames(refs, writable), pieces):
            where = machine.memory_offset + frame * PAGE_SIZE + offset
            transfer(machine.descriptors[0], [memory[at : at + length]], where)
            at += length

    def _check_references(self, domid: int, refs: Sequence[int]) -> None:
        machine = self._machine
        if (
            domid != machine.domid
            or not refs
            or min(refs) < FIRST_REFERENCE
            or max(refs) >= len(machine.grants)
        ):
            raise _not_granted(domid, refs)

    def reserve(self, domid: int, channels: int) -> None:
        """Do nothing: the machine's descriptors are open, and no others are needed."""

    def bind_interdomain(self, domid: int, remote_port: int) -> SimulatedEventChannel:
        """Connect to the port that ``domid`` opened for us. As on Xen, an event is pending.

        Raises:
            HypervisorError: no such port, or not open for us.
        """
        machine = self._machine
        index = remote_port - _FIRST_GUEST_PORT
        with self._lock:
            if (
                domid != machine.domid
                or not 0 <= index < len(machine.guest_ports)
                or machine.guest_ports[index] != _OPEN | machine.backend_domid
                or machine.backend_ports[index]
            ):
                raise HypervisorError(
                    errno.EINVAL, f"cannot bind to port {remote_port} of domain {domid}"
                )
            machine.backend_ports[index] = _OPEN | domid
        os.write(machine.backend_events[index], _EVENT)

        def forget(channel: SimulatedEventChannel) -> None:
            self._open_handles.discard(channel)
            machine.backend_ports[index] = 0

        channel = SimulatedEventChannel(
            _FIRST_BACKEND_PORT + index,
            machine.backend_events[index],
            machine.guest_events[index],
            forget,
            self.counters,
        )
        self._open_handles.add(channel)
        return channel

    def close(self) -> None:
        """Close what is still open."""
        close_all([*self._open_handles, *self._references])

    def _granted_frames(self, refs: Sequence[int], writable: bool) -> list[int]:
        machine = self._machine
        granted = _GRANTED | machine.backend_domid
        accepted = (granted,) if writable else (granted, granted | _READ_ONLY)
        grants, frames = machine.grants, machine.frames
        for ref in refs:
            if grants[ref] not in accepted:
                raise _not_granted(machine.domid, refs)
        return [frames[ref] for ref in refs]

    def _pin(self, refs: Sequence[int], change: int) -> None:
        counts = self._machine.mapped
        with self._lock:
            for ref in refs:
                counts[ref] += change
            self.counters.mapped_pages += change * len(refs)

    def _unmap(self, pages: MappedPages) -> None:
        self._machine.libc.munmap(pages.address, pages.count * PAGE_SIZE)
        self._pin(self._references.pop(pages), -1)
        self.counters.unmaps += 1


def _not_granted(domid: int, refs: Sequence[int]) -> HypervisorError:
    return HypervisorError(  # what Linux answers to whatever Xen had against it
        errno.EINVAL, f"cannot map {len(refs)} granted pages of domain {domid}"
    )


class SimulatedGuest(Closing):
    """The frontend's side: a :class:`~xen_disk_py.hypervisor.GuestHypervisor`."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine
        self._lock = threading.Lock()
        self._open_handles: set[Closing] = set()
        self.fence = machine.fence

    def share_pages(self, domid: int, count: int, *, writable: bool) -> GrantedPages:
        """Grant ``count`` fresh zeroed pages to ``domid``.

        Closing them while the other side has them mapped is an error (EBUSY), and they stay
        granted.
        """
        machine = self._machine
        tables, grants = machine.tables, machine.grants
        with self._lock:
            start = tables.find(bytes(count), machine.frames_start, machine.frames_stop)
            unused = (ref for ref in range(FIRST_REFERENCE, len(grants)) if not grants[ref])
            refs = list(islice(unused, count))
            if count < 1 or start < 0 or len(refs) < count:
                raise HypervisorError(errno.ENOSPC, f"cannot share {count} pages")
            first = start - machine.frames_start
            address = machine.map_frames(range(first, first + count), writable=True)
            ctypes.memset(address, 0, count * PAGE_SIZE)
            tables[start : start + count] = b"\1" * count
            for frame, ref in enumerate(refs, first):
                machine.frames[ref] = frame
            machine.fence()  # an entry is complete before it is valid
            entry = _GRANTED | domid | (0 if writable else _READ_ONLY)
            for ref in refs:
                grants[ref] = entry
        pages = GrantedPages(address, refs, unmap=self._unshare)
        self._open_handles.add(pages)
        return pages

    def in_use(self, refs: Sequence[int]) -> int:
        """Count those of our references that the other side has mapped."""
        counts = self._machine.mapped
        return sum(1 for ref in refs if counts[ref])

    def bind_unbound(self, domid: int) -> SimulatedEventChannel:
        """Open a port that ``domid`` may bind to."""
        machine = self._machine
        ours, theirs = machine.guest_ports, machine.backend_ports
        with self._lock:
            for index in range(len(ours)):
                if not ours[index] and not theirs[index]:
                    break
            else:
                raise HypervisorError(errno.ENOSPC, "cannot open another event channel")
            for events in (machine.guest_events[index], machine.backend_events[index]):
                _take(events)  # left by the channel that was here before
            ours[index] = _OPEN | domid

        def forget(channel: SimulatedEventChannel) -> None:
            self._open_handles.discard(channel)
            ours[index] = 0

        channel = SimulatedEventChannel(
            _FIRST_GUEST_PORT + index,
            machine.guest_events[index],
            machine.backend_events[index],
            forget,
        )
        self._open_handles.add(channel)
        return channel

    def close(self) -> None:
        """Close what is still open."""
        close_all(self._open_handles)

    def _unshare(self, pages: GrantedPages) -> None:
        machine = self._machine
        with self._lock:
            self._revoke(pages.refs)
            machine.libc.munmap(pages.address, pages.count * PAGE_SIZE)
            start = machine.frames_start + machine.frames[pages.refs[0]]
            machine.tables[start : start + pages.count] = bytes(pages.count)
        self._open_handles.discard(pages)

    def _revoke(self, refs: Sequence[int]) -> None:
        # The backend counts a page and then looks whether it is granted; we withdraw the grant
        # and then look whether it is counted. With a fence between the two steps on each side,
        # at least one of us sees the other.
        machine = self._machine
        grants = machine.grants
        before = [grants[ref] for ref in refs]
        for ref in refs:
            grants[ref] = 0
        machine.fence()
        busy = self.in_use(refs)
        if busy:
            for ref, entry in zip(refs, before):
                grants[ref] = entry
            raise HypervisorError(
                errno.EBUSY, f"{busy} of {len(refs)} granted pages are still in use"
            )


class SimulatedEventChannel(Closing):
    """One end of an event channel: its own eventfd and the other end's."""

    def __init__(
        self,
        port: int,
        own: int,
        other: int,
        forget: Callable[[SimulatedEventChannel], None],
        counters: Any = None,
    ) -> None:
        self.port = port
        self._own = own
        self._other = other
        self._forget: Callable[[SimulatedEventChannel], None] | None = forget
        self._counters = counters if counters is not None else Counters()

    def fileno(self) -> int:
        """Return a descriptor that polls readable when an event is pending."""
        self._check_open()
        return self._own

    def notify(self) -> None:
        """Send an event to the other end."""
        self._check_open()
        self._counters.notifications += 1
        os.write(self._other, _EVENT)

    def acknowledge(self) -> bool:
        """Consume a pending event and allow the next. False: there was none. Never blocks."""
        self._check_open()
        return _take(self._own)

    def close(self) -> None:
        """Unbind the port."""
        forget, self._forget = self._forget, None
        if forget is not None:
            forget(self)

    def _check_open(self) -> None:
        if self._forget is None:
            raise HypervisorError(errno.EBADF, "the event channel is closed")


def _take(events: int) -> bool:
    try:
        os.read(events, 8)
    except BlockingIOError:
        return False
    return True
