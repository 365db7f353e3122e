"""Waiting for what somebody else changes in xenstore."""

from __future__ import annotations

import select
import time
from typing import Callable

from .xenstore import Store


def until(store: Store, path: str, done: Callable[[], bool], timeout: float) -> bool:
    """Wait ``timeout`` seconds at most until ``done()``, looking whenever ``path`` changes."""
    deadline = time.monotonic() + timeout
    store.watch(path)
    poller = select.poll()
    poller.register(store.fileno(), select.POLLIN)
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if not store.has_pending:
            poller.poll(left * 1000)
        store.pending()
    return True
