"""Threads for what would make a queue's own thread wait: storage that is slow, a flush.

The queue's thread submits calls and collects their results, in the order in which they come
to an end; everything else about a request is its own.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections import deque
from functools import partial
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, Callable, Generic, TypeVar

from ..hypervisor import Closing

Token = TypeVar("Token")

_LONGEST = 3600.0  # seconds of one wait: the system takes no time that is too long

MORE = "raise ulimit -u, or pids.max of the cgroup (TasksMax= of the unit)"
"""What helps where the system gives no thread."""


class Workers(Closing, Generic[Token]):
    """At most ``limit`` threads, started when there is something to do.

    Where the system gives no thread (``pids.max``, ``ulimit -u``), those that there are do all;
    if there are none, whoever submits a call does it.

    Args:
        limit: how many threads.
        complain: called once, with a line for the log, when the system gives no thread.
        begin: called in each thread before all else.

    Attributes:
        unfinished: calls that were submitted and not collected yet.
    """

    def __init__(
        self,
        limit: int,
        complain: Callable[[str], None] = lambda _: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.unfinished = 0
        self._begin = begin
        self._complain = complain
        self._has_complained = False
        self._limit = limit
        self._handed_over = 0  # calls that are to be done now and are not over
        self._timer: _Timer[Token] | None = None
        self._calls: SimpleQueue[tuple[Callable[[], int], Token] | None] = SimpleQueue()
        self._results: deque[tuple[Token, int]] = deque()
        self._lock = threading.Lock()  # a result and the byte that tells of it come and go at once
        self._threads: list[threading.Thread] = []
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return a descriptor that polls readable when there is something to collect."""
        return self._read

    def submit(self, call: Callable[[], int], token: Token, after: float = 0.0) -> None:
        """Have ``call`` done in a thread; :meth:`collect` gives its result with ``token``.

        Args:
            call: must not raise.
            token: anything.
            after: not before so many seconds have passed; that needs no thread for each.
        """
        self.unfinished += 1
        if after > 0:
            if self._timer is None:
                self._timer = _Timer(self._hand_over)
            if self._timer.add(after, call, token):
                return
            call = partial(_done_later, call, after)
        self._hand_over(call, token)

    def _hand_over(self, call: Callable[[], int], token: Token) -> None:
        self._calls.put((call, token))
        with self._lock:
            self._handed_over += 1
            if len(self._threads) < min(self._limit, self._handed_over):
                self._start_one()
            is_alone = not self._threads
        if is_alone:
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
        if self._timer is not None:
            self._timer.close()
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
        self._begin()
        while True:
            job: Any = self._calls.get()
            if job is None:
                return
            call, token = job
            status = call()
            with self._lock:
                self._results.append((token, status))
                self._handed_over -= 1
                # not to be kept while waiting: the buffers that the call was made with
                del job, call, token
                try:
                    os.write(self._write, b"x")
                except BlockingIOError:
                    pass  # it is readable enough


class _Timer(Generic[Token]):
    """Hands calls over when their time has come: one thread, however many wait.

    Args:
        hand_over: called with each call and its token, in that thread.
    """

    def __init__(self, hand_over: Callable[[Callable[[], int], Token], None]) -> None:
        self._hand_over = hand_over
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Callable[[], int], Token]] = []
        self._number = 0  # calls of one time keep their order
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def add(self, after: float, call: Callable[[], int], token: Token) -> bool:
        """Have it handed over so many seconds from now; False if there is no thread to be had."""
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="timer", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return False
                self._thread = thread
            self._number += 1
            item = monotonic() + after, self._number, call, token
            heapq.heappush(self._waiting, item)
            if self._waiting[0] is item:
                self._changed.notify()
        return True

    def close(self) -> None:
        """Hand nothing over any more."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_due():
                    if self._is_closed:
                        return
                    left = self._waiting[0][0] - monotonic() if self._waiting else _LONGEST
                    self._changed.wait(min(left, _LONGEST))
                _, _, call, token = heapq.heappop(self._waiting)
            self._hand_over(call, token)
            del call, token  # not to be kept while waiting

    def _is_due(self) -> bool:
        return bool(self._waiting) and self._waiting[0][0] <= monotonic()


def _done_later(call: Callable[[], int], after: float) -> int:
    sleep(after)
    return call()
