"""What threads need of a Python without the GIL: ordering, and views of memory of their own."""

from __future__ import annotations

import gc
import sys
import time
import weakref

HAS_GIL = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
"""Whether threads of this interpreter run one at a time."""

if HAS_GIL:

    def apart(view: memoryview) -> memoryview:
        """Return a writable view for a thread to take parts of, whatever others do with its own.

        Python without a GIL, up to 3.15 at least, counts the parts of a view with no lock: two
        threads that take some at once make it one that was released, or is never released. What
        they take parts of must not have been made from the same view.
        """
        return view

else:
    from ctypes import c_char

    def apart(view: memoryview) -> memoryview:
        """Return a writable view for a thread to take parts of, whatever others do with its own."""
        return memoryview((c_char * len(view)).from_buffer(view)).cast("B")


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
