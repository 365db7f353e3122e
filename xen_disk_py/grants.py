"""The guest's pages as buffers.

A frontend that promised ``feature-persistent`` uses the same grants again and again: each
page is mapped once and kept until the ring is closed, up to a limit. All other pages are
mapped for one request and unmapped before it is answered.

A page's mapping is kept for good only if it is writable, which persistent grants must be.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .errors import BackendError, HypervisorError
from .hypervisor import PAGE_SIZE, Hypervisor, Mapping

log = logging.getLogger("xen_disk_py")

PERSISTENT_LIMIT = 32 * (256 + 1)
"""Pages kept mapped: a one-page ring full of requests of 256 segments and their indirect pages."""


class GuestPages:
    """Maps pages of one domain.

    Args:
        hypervisor: what maps them.
        domid: whose pages; taken from our own configuration, never from the frontend's keys.
        persistent_limit: how many pages to keep mapped; 0 if the frontend made no promise.
    """

    def __init__(self, hypervisor: Hypervisor, domid: int, persistent_limit: int) -> None:
        self._hypervisor = hypervisor
        self._domid = domid
        self._limit = persistent_limit
        self._kept: dict[int, memoryview] = {}
        self._mappings: list[Mapping] = []
        self._borrowed: list[Mapping] = []
        self._complained = False

    def pages(self, refs: Sequence[int], *, writable: bool) -> list[memoryview]:
        """Return the page behind each reference, 4096 bytes each, in order.

        They are good until :meth:`give_back`.

        Raises:
            HypervisorError: a reference is not granted to us.
        """
        if self._limit:
            kept = self._kept
            try:
                return [kept[ref] for ref in refs]
            except KeyError:
                missing = [ref for ref in dict.fromkeys(refs) if ref not in kept]
                if len(kept) + len(missing) <= self._limit:
                    mapping = self._hypervisor.map_grants(self._domid, missing, writable=True)
                    self._mappings.append(mapping)
                    kept.update(zip(missing, _cut(mapping)))
                    return [kept[ref] for ref in refs]
        mapping = self._hypervisor.map_grants(self._domid, refs, writable=writable)
        self._borrowed.append(mapping)
        return _cut(mapping)

    def give_back(self) -> None:
        """Unmap what was mapped for this request only; before it is answered."""
        while self._borrowed:
            mapping = self._borrowed.pop()
            if not self._unmap(mapping):
                self._mappings.append(mapping)  # tried again at the end

    @property
    def kept(self) -> int:
        """How many pages are mapped for good."""
        return len(self._kept)

    def close(self) -> None:
        """Unmap everything."""
        self._kept.clear()
        self.give_back()
        mappings, self._mappings = self._mappings, []
        for mapping in mappings:
            self._unmap(mapping)

    def _unmap(self, mapping: Mapping) -> bool:
        """Unmap, or log once why not: a backend keeps a buffer, or the hypervisor refuses."""
        try:
            mapping.close()
        except (BackendError, HypervisorError) as error:
            # once, since the guest decides how often this happens
            log.log(logging.DEBUG if self._complained else logging.WARNING, "%s", error)
            self._complained = True
            return False
        return True


def _cut(mapping: Mapping) -> list[memoryview]:
    view = mapping.view
    return [view[at : at + PAGE_SIZE] for at in range(0, len(view), PAGE_SIZE)]
