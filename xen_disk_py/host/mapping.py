"""Mapped pages as a memoryview that cannot outlive the mapping."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Callable

from xen_disk_py.errors import BackendError, XenDiskError
from xen_disk_py.hypervisor import PAGE_SIZE, Closing
from xen_disk_py.synchronizing import synchronize


class MappedPages(Closing):
    """``count`` pages at ``address``, given back through ``unmap(self)`` by :meth:`close`.

    Slices of a memoryview share one exporter with it, here a ctypes array that nobody else
    refers to. So the array lives exactly as long as some view of these pages does, and a weak
    reference tells whether unmapping is safe.
    """

    def __init__(
        self,
        address: int,
        count: int,
        *,
        writable: bool,
        unmap: Callable[[Any], None],
    ) -> None:
        self.address = address
        self.count = count
        pages = (ctypes.c_char * (count * PAGE_SIZE)).from_address(address)
        view = memoryview(pages).cast("B")
        self._view = view if writable else view.toreadonly()
        self._viewed = weakref.ref(pages)
        self._unmap: list[Callable[[Any], None]] = [unmap]
        """Empty when they are unmapped, or about to be: list.pop is atomic."""

    @property
    def view(self) -> memoryview:
        """All pages as one view. Released once :meth:`close` has been called."""
        return self._view

    def close(self) -> None:
        """Unmap the pages, once: several threads may ask at the same time.

        A backend that hangs may return while its disk is being ended by force: then its queue's
        thread unmaps what whoever closes the hypervisor does.

        Raises:
            BackendError: somebody still has a view of them. They stay mapped; closing again
                later, when the view is gone, unmaps them.
        """
        if not self._unmap:
            return
        try:
            self._view.release()
            kept = self._is_viewed()
        except BufferError:  # something other than a memoryview was made of the view
            kept = True
        if kept:
            raise BackendError(
                f"a buffer was kept after its request: {self.count} pages stay mapped"
            )
        try:
            unmap = self._unmap.pop()
        except IndexError:  # another thread was quicker
            return
        try:
            unmap(self)
        except BaseException:
            self._unmap.append(unmap)  # they are mapped still
            raise

    def _is_viewed(self) -> bool:
        if self._viewed() is None:
            return False
        synchronize()
        return self._viewed() is not None


class GrantedPages(MappedPages):
    """Pages of ours with the grant reference of each."""

    def __init__(
        self,
        address: int,
        refs: Sequence[int],
        *,
        unmap: Callable[[Any], None],
    ) -> None:
        super().__init__(address, len(refs), writable=True, unmap=unmap)
        self.refs: Sequence[int] = tuple(refs)


def close_all(handles: Iterable[Closing]) -> None:
    """Close every handle, whatever the others do, then raise the first error there was."""
    first: XenDiskError | None = None
    for handle in list(handles):
        try:
            handle.close()
        except XenDiskError as error:
            first = first or error
    if first is not None:
        raise first
