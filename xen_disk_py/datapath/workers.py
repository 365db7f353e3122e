"""Threads for what would make a queue's own thread wait: storage that is slow, a flush.

The queue's thread submits calls and collects their results, in the order in which they come
to an end; everything else about a request is its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import Any, Callable, Generic, TypeVar

from ..hypervisor import Closing

Token = TypeVar("Token")

MORE = "raise ulimit -u, or pids.max of the cgroup (TasksMax= of the unit)"
"""What helps where the system gives no thread."""


class Workers(Closing, Generic[Token]):
    """At most ``limit`` threads, started when there is something to do.

    Where the system gives no thread (``pids.max``, ``ulimit -u``), those that there are do all;
    if there are none, whoever submits a call does it.

    Args:
        limit: how many threads.
        complain: called once, with a line for the log, when the system gives no thread.

    Attributes:
        unfinished: calls that were submitted and not collected yet.
    """

    def __init__(self, limit: int, complain: Callable[[str], None] = lambda _: None) -> None:
        self.unfinished = 0
        self._complain = complain
        self._has_complained = False
        self._limit = limit
        self._calls: SimpleQueue[tuple[Callable[[], int], Token] | None] = SimpleQueue()
        self._results: deque[tuple[Token, int]] = deque()
        self._lock = threading.Lock()  # a result and the byte that tells of it come and go at once
        self._threads: list[threading.Thread] = []
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return a descriptor that polls readable when there is something to collect."""
        return self._read

    def submit(self, call: Callable[[], int], token: Token) -> None:
        """Have ``call`` done in a thread; :meth:`collect` gives its result with ``token``.

        It must not raise.
        """
        self.unfinished += 1
        self._calls.put((call, token))
        if len(self._threads) < min(self._limit, self.unfinished):
            self._start_one()
        if not self._threads:
            self._calls.put(None)
            self._work()

    def _start_one(self) -> None:
        thread = threading.Thread(target=self._work, name="worker", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._has_complained:
                self._has_complained = True
                there_are = len(self._threads) or "the queue's own, one request at a time,"
                self._complain(f"no thread to be had ({error}): {there_are} will do; {MORE}")
        else:
            self._threads.append(thread)

    def collect(self) -> list[tuple[Token, int]]:
        """Return what has come to an end; does not wait."""
        with self._lock:
            try:
                os.read(self._read, 4096)
            except BlockingIOError:
                pass
            results = [self._results.popleft() for _ in range(len(self._results))]
        self.unfinished -= len(results)
        return results

    def close(self) -> None:
        """End the threads that have nothing to do; whoever hangs ends with the process."""
        for _ in self._threads:
            self._calls.put(None)
        if not self.unfinished:
            for thread in self._threads:
                thread.join()
            if self._read >= 0:
                os.close(self._read)
                os.close(self._write)
                self._read = -1
        self._threads = []

    def _work(self) -> None:
        while True:
            job: Any = self._calls.get()
            if job is None:
                return
            call, token = job
            status = call()
            with self._lock:
                self._results.append((token, status))
                # not to be kept while waiting: the buffers that the call was made with
                del job, call, token
                try:
                    os.write(self._write, b"x")
                except BlockingIOError:
                    pass  # it is readable enough
