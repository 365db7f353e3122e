"""What a block backend and a block frontend ask of a hypervisor.

Two implementations exist: :class:`xen_disk_py.libxen.Xen` (the real one, through
libxengnttab and libxenevtchn) and
:class:`xen_disk_py.simulated.hypervisor.SimulatedHypervisor` (shared memory and
eventfds). Everything above this line works with either.

Handles are context managers; closing one twice is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from .named import NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

PAGE_SIZE = 4096
"""Bytes in a granted page, on every architecture (``xen/include/public/io/blkif.h``)."""


class Closing:
    """A handle that ``with`` closes."""

    def close(self) -> None:
        """Give the resource back. Closing twice does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Handle(Protocol):
    """What every handle can do; :class:`Closing` provides it."""

    def close(self) -> None:
        """Give the resource back. Closing twice does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Mapping(Handle, Protocol):
    """Pages of another domain, mapped contiguously into ours."""

    @property
    def view(self) -> memoryview:
        """All pages as one view: count * 4096, writable if mapped so."""
        ...

    def close(self) -> None:
        """Unmap all pages.

        No view may be used afterwards. While somebody (a custom backend, say) still holds
        a view, the pages stay mapped and
        :class:`~xen_disk_py.errors.BackendError` is raised: a leak is better than a crash.
        """
        ...


class EventChannel(Handle, Protocol):
    """One end of a bound (or waiting) interdomain event channel."""

    @property
    def port(self) -> int:
        """Our local port number."""
        ...

    def fileno(self) -> int:
        """Return a descriptor that polls readable when an event is pending."""
        ...

    def notify(self) -> None:
        """Send an event to the other end."""
        ...

    def acknowledge(self) -> bool:
        """Consume a pending event and allow the next. False: there was none. Never blocks."""
        ...

    def close(self) -> None:
        """Unbind the port."""
        ...


class SharedPages(Handle, Protocol):
    """Pages of ours, granted to another domain."""

    @property
    def view(self) -> memoryview:
        """All pages as one run of writable bytes: count * 4096, zero at first."""
        ...

    @property
    def refs(self) -> Sequence[int]:
        """The grant reference of each page."""
        ...

    def close(self) -> None:
        """Revoke the grants and free the pages."""
        ...


class Piece(NamedTuple):
    """``length`` bytes at ``offset`` of the page granted as ``ref``; they end within the page."""

    ref: int
    offset: int
    length: int


class Hypervisor(Handle, Protocol):
    """The backend's side."""

    def map_grants(self, domid: int, refs: Sequence[int], *, writable: bool) -> Mapping:
        """Map granted pages of ``domid``, contiguous and in the order of ``refs``.

        Raises:
            HypervisorError: one of the references is not granted (so); nothing is mapped.
        """
        ...

    @property
    def can_copy(self) -> bool:
        """Whether the two functions below are to be had."""
        ...

    def copy_from_grants(self, domid: int, pieces: Sequence[Piece], memory: memoryview) -> None:
        """Copy pieces of granted pages of ``domid``, one after the other, into ``memory``.

        Nothing is mapped. ``memory`` is writable and as long as the pieces together.

        Raises:
            HypervisorError: a piece was not copied; others may have been.
        """
        ...

    def copy_to_grants(self, domid: int, pieces: Sequence[Piece], memory: memoryview) -> None:
        """The other way: fill pieces of granted pages from ``memory``.

        Raises:
            HypervisorError: a piece was not copied; others may have been.
        """
        ...

    def reserve(self, domid: int, channels: int) -> None:
        """Open now what so many event channels of ``domid`` at a time will need.

        They can be bound then, again and again, by a process that has given up its privileges.
        """
        ...

    def bind_interdomain(self, domid: int, remote_port: int) -> EventChannel:
        """Connect to the port that ``domid`` opened for us.

        Raises:
            HypervisorError: no such port, or not open for us.
        """
        ...

    def fence(self) -> None:
        """Full memory barrier (``atomic_thread_fence(seq_cst)``)."""
        ...

    def close(self) -> None:
        """Close what is still open."""
        ...


class GuestHypervisor(Handle, Protocol):
    """The frontend's side: what a guest does to offer pages and a port."""

    def share_pages(self, domid: int, count: int, *, writable: bool) -> SharedPages:
        """Grant ``count`` fresh zeroed pages to ``domid``."""
        ...

    def bind_unbound(self, domid: int) -> EventChannel:
        """Open a port that ``domid`` may bind to."""
        ...

    def fence(self) -> None:
        """Full memory barrier."""
        ...

    def close(self) -> None:
        """Close what is still open."""
        ...
