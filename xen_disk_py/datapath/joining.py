"""Contiguous large requests, joined to one call of the backend."""

from __future__ import annotations

from typing import Optional

from ..blkif import READ, SECTOR
from .grants import Plan

LARGE = 32 << 10
"""Bytes of requests that are worth joining."""

MOST = 1 << 20
"""Bytes that one call moves at most."""


Joined = tuple[int, int, bytes, Optional[bytes]]
"""A request of a run: its identity, what is counted of it (:attr:`~.grants.Plan.kind`), its slot,
and the descriptors of its segments if it is indirect. A plain tuple, for speed."""


class Run:
    """Large reads or large writes of contiguous sectors, to be done in one call.

    A guest's kernel cuts what a program asks for into such requests. The call costs more than
    all else that is done for them, where every system call is dear (a paravirtualised dom0).
    """

    __slots__ = ("buffers", "end", "operation", "requests", "start")

    def __init__(self) -> None:
        self.operation = READ
        self.start = self.end = 0  # bytes from the disk's beginning
        self.buffers: list[memoryview] = []
        self.requests: list[Joined] = []

    def add(self, operation: int, offset: int, plan: Plan, request: Joined) -> None:
        """Add a request, which is the first one or :meth:`continues` these."""
        if not self.requests:
            self.operation = operation
            self.start = self.end = offset
        self.end += plan.sectors * SECTOR
        self.buffers += plan.buffers
        self.requests.append(request)

    def clear(self) -> None:
        """Forget all, so that no page is in use for it."""
        self.buffers.clear()
        self.requests.clear()

    def continues(self, operation: int, offset: int, length: int) -> bool:
        """Tell whether the request is one to be done in the same call."""
        return (
            offset == self.end
            and operation == self.operation
            and offset + length - self.start <= MOST
        )
