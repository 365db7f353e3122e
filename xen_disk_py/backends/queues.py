"""Which of the guest's queues a thread does requests of."""

from __future__ import annotations

import threading


class _Here(threading.local):
    number = -1


here = _Here()
"""``here.number``: the queue of the thread that asks, counted from 0; -1: not a queue's thread."""
