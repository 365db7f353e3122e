"""Ordering that the GIL gives as a side effect, for a Python without it (a free-threaded build)."""

from __future__ import annotations

import gc
import sys
import time
import weakref

HAS_GIL = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
"""Whether threads of this interpreter run one at a time."""


def synchronize() -> None:
    """Have all threads agree on what was stored before, and on what nobody refers to any longer.

    With a GIL they always do. Without it, the thread that made an object counts its references
    apart from all others, and may be asleep: what nobody refers to can still be there. And a
    processor may do a load before an earlier store of the same thread. A collection stops all
    threads, which orders both, and sums the references up; it takes milliseconds.

    Not to be called by what a collection calls.
    """
    if HAS_GIL:
        return
    seen = _Cycle()
    is_there = weakref.ref(seen)
    del seen
    gc.collect()
    while is_there() is not None:
        # Another thread's was under way, and may have stopped us too early: then ours does nothing.
        time.sleep(0.001)
        gc.collect()


class _Cycle:
    """What a collection frees, and nothing else: it has begun after this was made."""

    def __init__(self) -> None:
        self.itself = self
