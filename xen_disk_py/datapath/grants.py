"""The guest's pages as buffers, in one of three ways.

*Kept*: a frontend that promised ``feature-persistent`` uses the same grants again and again.
Each page is mapped once and stays mapped, the least recently used leave when there are too
many. A request whose segment descriptors have been seen before finds its buffers by them, in
one look-up (:attr:`GuestPages.plans`).

*Copied*: the hypervisor copies between the pages and memory of ours; nothing is mapped.

*Mapped*: for one request, and unmapped before it is answered.

Kept pages need the promise; without it, or for pages beyond the limit, copying is preferred
where the host can. All of it happens in the queue's own thread.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Sequence

from ..blkif import READ, SECTOR, Transfer
from ..errors import BackendError, HypervisorError
from ..hypervisor import PAGE_SIZE, Hypervisor, Mapping, Piece
from ..named import NamedTuple
from ..synchronizing import HAS_GIL, apart
from .stopwatch import kind

log = logging.getLogger("xen_disk_py")

PERSISTENT_LIMIT = 32 * (256 + 1)
"""Pages kept mapped: a one-page ring full of requests of 256 segments and their indirect pages."""

_PLANNED_SEGMENTS = 4 * PERSISTENT_LIMIT
_STUCK = 2  # mappings that are tried again with each other one: so they become fewer
_TURN = 1.0  # seconds that a page is left to show that it is used


class Grants(enum.Enum):
    """How the guest's pages are got at, where there is a choice."""

    AUTO = "auto"
    """Kept if the frontend promises, else copied if the host can, else mapped."""
    COPY = "copy"
    """Copied, whatever the frontend promises."""
    MAP = "map"
    """Mapped for each request, whatever the frontend promises."""


class Plan(NamedTuple):
    """What a run of segment descriptors stands for: good as long as its pages are kept."""

    sectors: int
    length: int
    """In bytes."""
    buffers: tuple[memoryview, ...]  # no backend can change what the next request finds
    kind: int
    """What is counted of it: see :func:`~xen_disk_py.datapath.stopwatch.kind`."""


def key_of(descriptors: bytes) -> int | bytes:
    """Return what the plan of a request is found by: its descriptors, a single one as a number.

    Such a number is what :attr:`~xen_disk_py.blkif.Abi.heads` gives for each request.
    """
    return descriptors if len(descriptors) != 8 else int.from_bytes(descriptors, "little")


class GuestBuffers:
    """The buffers of one request."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self.buffers = buffers

    def for_thread(self) -> Sequence[memoryview]:
        """Return them for another thread, while this one takes other parts of the same pages."""
        return self.buffers

    def release(self, *, deliver: bool) -> None:
        """Unmap, or copy to the guest what was read for it; before the request is answered.

        Args:
            deliver: the data of a read is good, and goes to the guest.

        Raises:
            HypervisorError: it could not be delivered.
        """


class _Group:
    """Pages that were mapped together, and are unmapped together."""

    def __init__(self, refs: Sequence[int], mapping: Mapping) -> None:
        self.refs = refs
        self.mapping = mapping
        self.used = 0


class GuestPages:
    """The pages of one domain that one queue deals with.

    Args:
        hypervisor: what maps and copies.
        domid: whose pages; taken from our own configuration, never from the frontend's keys.
        persistent: the frontend keeps its promise to use the same grants again and again.
        limit: how many pages to keep mapped.
        grants: how to get at pages.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        domid: int,
        *,
        persistent: bool,
        limit: int = PERSISTENT_LIMIT,
        grants: Grants = Grants.AUTO,
    ) -> None:
        self.plans: dict[int | bytes, Plan] = {}
        """Requests seen before, by their segment descriptors (see :func:`key_of`)."""
        self.kept: dict[int, memoryview] = {}
        """Pages that stay mapped, by reference; writable, 4096 bytes each."""
        self._hypervisor = hypervisor
        self._domid = domid
        self._limit = limit if persistent and grants is Grants.AUTO else 0
        self._copies = grants is not Grants.MAP and hypervisor.can_copy
        self._places: dict[int, tuple[_Group, int]] = {}  # of kept pages: bytes into the group
        self._mapped = 0  # pages, in groups
        self._turn = 0
        self._turned = 0.0
        self._planned = 0  # segments in plans
        self._stuck: list[Mapping] = []
        self._spare: list[memoryview] = []
        self._complained = False

    # -- for one request ---------------------------------------------------------------

    def acquire(self, request: Transfer, descriptors: bytes) -> GuestBuffers:
        """Return the buffers of a request, in order, cut to its segments.

        For a write they hold the guest's data.

        Args:
            request: with one segment or more.
            descriptors: our copy of what it was read from; the next request of the same
                finds its plan by them.

        Raises:
            HypervisorError: a reference is not granted to us (so).
        """
        if self._keep(request.grefs):
            places = [self._places[ref] for ref in request.grefs]
            buffers = _cut([(group.mapping.view, at) for group, at in places], request)
            return _KeptBuffers(self._remember(descriptors, request, tuple(buffers)))
        if self._copies:
            return self._copied(request)
        # a read of the disk is a write to the guest's pages
        mapping = self._hypervisor.map_grants(
            self._domid, request.grefs, writable=request.operation == READ
        )
        view = mapping.view
        return _MappedBuffers(self, mapping, _cut([(view, at) for at in _starts(view)], request))

    def read(self, refs: Sequence[int], length: int) -> bytes:
        """Copy ``length`` bytes out of pages, each byte read once (XSA-155).

        Raises:
            HypervisorError: a reference is not granted to us.
        """
        if self._keep(refs):
            return b"".join([self.kept[ref] for ref in refs])[:length]
        if self._copies:
            copy = memoryview(bytearray(length))
            pieces = [
                Piece(ref, 0, min(PAGE_SIZE, length - at))
                for ref, at in zip(refs, range(0, length, PAGE_SIZE))
            ]
            self._hypervisor.copy_from_grants(self._domid, pieces, copy)
            return bytes(copy)
        mapping = self._hypervisor.map_grants(self._domid, refs, writable=False)
        copied = bytes(mapping.view[:length])
        self.unmap(mapping)
        return copied

    def _copied(self, request: Transfer) -> GuestBuffers:
        pieces = [
            Piece(ref, first * SECTOR, (last + 1 - first) * SECTOR)
            for ref, first, last in zip(request.grefs, request.firsts, request.lasts)
        ]
        length = request.sectors * SECTOR
        memory = self._spare.pop() if self._spare else memoryview(b"")
        if len(memory) < length:
            memory = memoryview(bytearray(length))
        acquired = _CopiedBuffers(self, memory, length, pieces if request.operation == READ else ())
        if request.operation != READ:
            try:
                self._hypervisor.copy_from_grants(self._domid, pieces, acquired.buffers[0])
            except HypervisorError:
                acquired.release(deliver=False)
                raise
        return acquired

    def deliver(self, pieces: Sequence[Piece], memory: memoryview) -> None:
        """Copy to the guest what was read for it."""
        self._hypervisor.copy_to_grants(self._domid, pieces, memory)

    def use_again(self, memory: memoryview) -> None:
        """Take back memory that data was copied through; it never gets to another guest."""
        self._spare.append(memory)

    def unmap(self, mapping: Mapping, level: int = logging.WARNING) -> None:
        """Unmap, or log once why not, and try again with the next ones.

        A backend keeps a buffer, or the hypervisor refuses.
        """
        for _ in range(min(_STUCK, len(self._stuck))):
            self._unmap(self._stuck.pop(0), logging.DEBUG)
        self._unmap(mapping, level)

    def _unmap(self, mapping: Mapping, level: int) -> None:
        try:
            mapping.close()
        except (BackendError, HypervisorError) as error:
            self._stuck.append(mapping)
            # once, since the guest decides how often this happens
            log.log(logging.DEBUG if self._complained else level, "%s", error)
            self._complained = self._complained or level > logging.DEBUG

    # -- kept pages --------------------------------------------------------------------

    def _keep(self, refs: Sequence[int]) -> bool:
        """Have pages kept; False if they are too many, or nothing is kept at all."""
        if not self._limit:
            return False
        places = self._places
        missing = [ref for ref in dict.fromkeys(refs) if ref not in places]
        if missing:
            if self._mapped + len(missing) > self._limit:
                self._evict()
                missing = [ref for ref in dict.fromkeys(refs) if ref not in places]
                if self._mapped + len(missing) > self._limit:
                    return False
            mapping = self._hypervisor.map_grants(self._domid, missing, writable=True)
            group = _Group(missing, mapping)
            self._mapped += len(missing)
            for ref, at in zip(missing, _starts(mapping.view)):
                places[ref] = group, at
                self.kept[ref] = mapping.view[at : at + PAGE_SIZE]
        turn = self._turn
        for ref in refs:
            places[ref][0].used = turn
        return True

    def _evict(self) -> None:
        """Unmap what was not used since the last turn, if that was a while ago.

        Plans do not tell when they are used. So they are dropped: who still uses one makes
        it again, and with it touches the pages.
        """
        now = time.monotonic()
        if now < self._turned + _TURN:
            return  # nobody has had the time to show what he needs
        self._turned = now
        self.plans.clear()
        self._planned = 0
        self._retry(logging.DEBUG)
        for group in {group for group, _ in self._places.values()}:
            if group.used < self._turn:
                self._mapped -= len(group.refs)
                for ref in group.refs:
                    del self._places[ref], self.kept[ref]
                # a request may be at work in there: then it is unmapped later
                self.unmap(group.mapping, logging.DEBUG)
        self._turn += 1

    def _remember(
        self, descriptors: bytes, request: Transfer, buffers: tuple[memoryview, ...]
    ) -> tuple[memoryview, ...]:
        segments = len(request.grefs)
        self._planned += segments
        if self._planned > _PLANNED_SEGMENTS:
            self.plans.clear()
            self._planned = segments
        sectors, length = request.sectors, request.sectors * SECTOR
        self.plans[key_of(descriptors)] = Plan(sectors, length, buffers, kind(segments, length))
        return buffers

    # -- the end -----------------------------------------------------------------------

    def _retry(self, level: int = logging.WARNING) -> None:
        stuck, self._stuck = self._stuck, []
        for mapping in stuck:
            self._unmap(mapping, level)

    def close(self) -> None:
        """Unmap everything."""
        self.plans.clear()
        self.kept.clear()
        self._spare.clear()
        groups = {group for group, _ in self._places.values()}
        self._places.clear()
        self._mapped = 0
        self._retry()
        for group in groups:
            self.unmap(group.mapping)


class _KeptBuffers(GuestBuffers):
    def for_thread(self) -> Sequence[memoryview]:
        return self.buffers if HAS_GIL else [apart(buffer) for buffer in self.buffers]


class _MappedBuffers(GuestBuffers):
    def __init__(self, pages: GuestPages, mapping: Mapping, buffers: list[memoryview]) -> None:
        super().__init__(buffers)
        self._views = buffers
        self._pages = pages
        self._mapping = mapping

    def release(self, *, deliver: bool) -> None:
        self._views.clear()  # whoever still has the list has no page
        self._pages.unmap(self._mapping)


class _CopiedBuffers(GuestBuffers):
    def __init__(
        self, pages: GuestPages, memory: memoryview, length: int, pieces: Sequence[Piece]
    ) -> None:
        super().__init__([memory[:length]])
        self._pages = pages
        self._memory = memory
        self._pieces = pieces

    def release(self, *, deliver: bool) -> None:
        (buffer,) = self.buffers
        self._pages.use_again(self._memory)
        if deliver and self._pieces:
            self._pages.deliver(self._pieces, buffer)


def _starts(view: memoryview) -> range:
    return range(0, len(view), PAGE_SIZE)


def _cut(places: Sequence[tuple[memoryview, int]], request: Transfer) -> list[memoryview]:
    """Cut pages down to a request's segments, joining what is contiguous.

    Args:
        places: for each segment the memory that its page lies in, and where.
        request: says which sectors of the pages.
    """
    buffers = []
    memory, start, stop = places[0][0], -1, -1
    for (where, at), first, last in zip(places, request.firsts, request.lasts):
        if where is not memory or at + first * SECTOR != stop:
            if stop >= 0:
                buffers.append(memory[start:stop])
            memory, start = where, at + first * SECTOR
        stop = at + (last + 1) * SECTOR
    buffers.append(memory[start:stop])
    return buffers
