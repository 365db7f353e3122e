"""Requests that the storage could not do, and when to try them again (pure)."""

from __future__ import annotations

from math import inf
from time import perf_counter
from typing import Generic, TypeVar

Request = TypeVar("Request")

_PAUSES = 0.1, 5.0  # seconds before a retry: at first, and at most


class RetryQueue(Generic[Request]):
    """What is queued for retry, in the order in which it failed.

    Attributes:
        requests: they; nobody else keeps them in order.
        is_paused: none is tried; whoever changes that wakes the queue.
        pause: seconds until the next retry, longer each time until one has ended.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.pause = _PAUSES[0]
        self.is_paused = False
        self._due_at = inf

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def is_due(self) -> bool:
        """Whether there are some, and it is time."""
        return bool(self.requests) and not self.is_paused and perf_counter() >= self._due_at

    @property
    def milliseconds(self) -> float | None:
        """How long to sleep at most, for ``poll``; None for any time."""
        if not self.requests or self.is_paused:
            return None
        return max(0.0, self._due_at - perf_counter()) * 1000 + 1

    def add(self, request: Request) -> None:
        """Queue a request that has just failed."""
        if not self.requests:
            self._due_at = perf_counter() + self.pause
        self.requests.append(request)

    def take(self) -> list[Request]:
        """Take all, to try them; those that are not tried after all, put back."""
        taken, self.requests = self.requests, []
        self.pause = min(2 * self.pause, _PAUSES[1])
        return taken

    def put_back(self, requests: list[Request]) -> None:
        """Queue requests behind one that has failed once more."""
        self.requests += requests

    def ended(self) -> None:
        """Note that the storage has done one, well or with another error."""
        self.pause = _PAUSES[0]
