"""The thread that serves the queues of a disk, in turn.

::

    each queue: answer what was done elsewhere ─ try again what is due ─ do one batch
    nothing for any? busy-poll the rings for a moment, ask for notifications, look once more, sleep

Threads for each queue would be slower than one for all: they share the interpreter's lock (the
GIL), so they do not run at once, and hand it over with every batch. Without that lock each queue
has a thread of its own.

No queue waits for another's requests: what takes waiting is done elsewhere, by workers or by the
backend. A barrier, and a queue that ends, wait for what they have begun; the others have their
turns then (:meth:`QueueThread.wait`). Of several that wait, each answers what it has begun, and the
last to begin continues first.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import partial
from typing import Callable, Protocol

from ..backends.queues import here
from ..ring import BackRing
from ..synchronizing import HAS_GIL
from .drained import DrainedSection
from .idle import Idle, Wakeups


class Served(Protocol):
    """A queue, as its thread sees it: see :class:`~xen_disk_py.datapath.queue.Queue`."""

    number: int
    wakeups: Wakeups
    is_stopping: bool

    @property
    def is_any_elsewhere(self) -> bool:
        """Whether something it has begun is done elsewhere."""

    @property
    def open_ring(self) -> BackRing | None:
        """Its ring, unless so much is under way that no more is taken."""

    @property
    def retry_in(self) -> float | None:
        """Milliseconds until it tries something again; None if there is nothing."""

    def begin(self) -> bool:
        """Do what a predecessor has left."""

    def turn(self, *, is_alone: bool) -> bool:
        """Do what there is to do, but one batch at most; False if there is nothing."""

    def end_finished(self) -> bool:
        """Answer what was done elsewhere; False if that is nothing."""

    def catch_up(self) -> bool:
        """Do that amid a wait, or try again what is due; False if there is nothing."""

    def publish(self) -> bool:
        """Publish what is answered."""

    def idled(self) -> None:
        """Note that time has passed."""

    def recomposed(self) -> None:
        """Note that the disk was changed."""

    def fail(self, error: Exception) -> None:
        """Tell of what one of the above has raised."""

    def end(self) -> None:
        """Finish what was begun, refuse the rest, release everything."""

    def over(self, last_of: threading.Thread | None) -> None:
        """Note that all that is done; the thread that ends with it, if any."""


class QueueThreads:
    """The threads of one disk.

    Args:
        drained: where they wait while the disk is changed.
    """

    def __init__(self, drained: DrainedSection) -> None:
        self._drained = drained
        self._threads: dict[int, QueueThread] = {}

    def of(self, number: int) -> QueueThread:
        """Return the one for a queue, which may be another's as well."""
        key = 0 if HAS_GIL else number
        if key not in self._threads:
            self._threads[key] = QueueThread(self._drained)
        return self._threads[key]


class QueueThread:
    """Serves queues: it starts with the first, and ends with the last.

    Args:
        drained: where to wait while the disk is changed.

    Attributes:
        idle: its pauses.
        thread: it, while there is one.
    """

    def __init__(self, drained: DrainedSection) -> None:
        self.idle = Idle()
        self.thread: threading.Thread | None = None
        self._drained = drained
        self._lock = threading.Lock()
        self._starting: list[Served] = []
        self._queues: tuple[Served, ...] = ()
        self._waiting: list[Served] = []  # of these: each is amid something, and has no turn
        self._errors: dict[Served, Exception] = {}  # of these
        self._wake_read = self._wake_write = -1
        self._asked = False  # to look at what has changed

    # -- for one other thread to call --------------------------------------------------

    def serve(self, queue: Served) -> None:
        """Begin to serve a queue.

        Raises:
            RuntimeError, OSError: the system gives no thread, or no pipe to wake it.
        """
        with self._lock:
            if self.thread is None:
                self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                self.thread = threading.Thread(target=self._run, name="queue", daemon=True)
                self.idle.watch_descriptor(self._wake_read)
                try:
                    self.thread.start()
                except RuntimeError:
                    self._close()
                    raise
            self._starting.append(queue)
        self.wake()

    def wake(self) -> None:
        """Have it look at what has changed."""
        with self._lock:
            if self._wake_write >= 0:
                with suppress(BlockingIOError):
                    os.write(self._wake_write, b"x")
        self._asked = True  # behind it, as _apply_changes looks: no byte stays that nobody takes

    # -- the thread --------------------------------------------------------------------

    def _run(self) -> None:
        me = threading.current_thread()
        self._drained.enter(me, self.wake)
        try:
            while self.thread is me:
                # Asked amid a barrier, or when a queue had to end first: we can drain now.
                if self._drained.is_wanted:
                    self._asked = True
                self._turn()
        except Exception as error:  # noqa: BLE001 - the queues tell of it
            while self.thread is me:  # with those that start meanwhile
                with self._lock:
                    self._queues += tuple(self._starting)
                    self._starting = []
                self._queues[0].fail(error)
                self._end(self._queues[0])
        finally:
            self._drained.leave(me)

    def _turn(self) -> None:
        """Give each queue its turn; sleep if there is nothing to do for any."""
        is_idle = True
        if self._asked:
            self._apply_changes()
            if self.thread is not threading.current_thread():
                return  # the last queue has ended; there may be another thread already
            # It may be for a queue that waits: that looks, before we sleep.
            is_idle = not self._waiting
        queues = self._queues
        is_alone = len(queues) == 1
        for queue in queues:
            if queue not in self._queues:  # another's turn may end it
                continue
            if queue in self._waiting:
                is_idle = not self._catch_up(queue) and is_idle
                continue
            if queue.is_stopping:
                self._end(queue)
                is_idle = False
                continue
            here.number = queue.number
            try:
                is_more = queue.turn(is_alone=is_alone)
                while is_more and is_alone and self._queues is queues:
                    if self._asked or self._drained.is_wanted:  # that may be seen amid a barrier
                        break
                    is_more = queue.turn(is_alone=True)
                # It may have been asked to end amid a barrier, which has consumed the wake-up.
                is_idle = is_idle and not is_more and not queue.is_stopping
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the queue tells of it
                queue.fail(error)
            self._end(queue)  # with no error at hand, which keeps buffers
            is_idle = False
        if is_idle and not self._asked:
            self._rest()

    def _do(self, queue: Served, step: Callable[[], bool]) -> bool:
        """Do a step of one queue, whose error is its end, and no other's.

        Returns:
            Whether there was something to do.
        """
        here.number = queue.number
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - as above
            queue.fail(error)
        self._end(queue)
        return True

    def _rest(self) -> None:
        """Busy-poll for a moment, then sleep, unless there is more to do."""
        idle, queues, waiting = self.idle, self._queues, self._waiting
        rings, is_any_elsewhere, milliseconds = [], bool(waiting), None
        for queue in queues:
            is_any_elsewhere = is_any_elsewhere or queue.is_any_elsewhere
            ring, retry_in = queue.open_ring, queue.retry_in
            if ring is not None and queue not in waiting:
                rings.append(ring)
            if retry_in is not None and (milliseconds is None or retry_in < milliseconds):
                milliseconds = retry_in
        # What is done elsewhere wakes poll when it ends, and must not wait for a busy-poll.
        if is_any_elsewhere or not idle.busy_poll(rings):
            is_more = False
            for ring in rings:
                is_more = ring.arm() or is_more
            if not is_more and idle.sleep(milliseconds, is_idle=not waiting):
                self._consume_wakeup()  # at once, or it polls readable until the caller is through
        for queue in queues:
            queue.idled()

    def wait(self, queue: Served) -> None:
        """Give all but ``queue`` their turns; return when something may have changed for it."""
        self._waiting.append(queue)
        try:
            self._turn()
        finally:
            self._waiting.remove(queue)
            here.number = queue.number
        error = self._errors.pop(queue, None)
        if error is not None:
            raise error

    def _catch_up(self, queue: Served) -> bool:
        """Have a queue that waits answer what it has; its error is raised where it waits."""
        if queue is self._waiting[-1] or queue in self._errors:
            return False
        here.number = queue.number
        try:
            return queue.catch_up()
        except Exception as error:  # noqa: BLE001 - as above
            self._errors[queue] = error
        return True

    def _end(self, queue: Served) -> None:
        """End a queue; the thread ends with the last."""
        here.number = queue.number
        try:
            queue.end()
        except Exception as error:  # noqa: BLE001 - no other queue's
            queue.fail(error)
        self.idle.forget(queue.wakeups)
        with self._lock:
            self._queues = tuple(each for each in self._queues if each is not queue)
            thread = None
            if not (self._queues or self._starting):
                thread = self.thread
                self._close()
        queue.over(thread)

    def _close(self) -> None:
        self.idle.forget_descriptor(self._wake_read)
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._wake_read = self._wake_write = -1
        self.thread = None

    def _apply_changes(self) -> None:
        """Look at what has changed: there are more queues, or the disk is to be drained."""
        self._asked = False  # before the byte is taken: who asks writes it first
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        with self._lock:
            # One at a time: none has a turn before it has begun, and that may wait.
            starting, self._starting = self._starting[:1], self._starting[1:]
            self._queues += tuple(starting)
            if self._starting:
                self._asked = True  # never computed from itself: others set it meanwhile
        for queue in starting:
            self.idle.watch(queue.wakeups)
            self._do(queue, queue.begin)
        if self._drained.is_wanted and self._queues and not self._waiting:
            self._drain()

    def _consume_wakeup(self) -> None:
        """Take the byte that has woken us; what it is for is looked at later."""
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
            self._asked = True

    def _drain(self) -> None:
        """Finish what is under way, and have the disk be changed."""
        self._waiting = list(self._queues)
        try:
            while (
                any(queue.is_any_elsewhere for queue in self._queues)
                and self._drained.is_wanted
                and not any(queue.is_stopping for queue in self._queues)
            ):
                if not self._all(lambda queue: queue.end_finished()):
                    self._rest()
            self._all(lambda queue: queue.publish())
            if self._queues and not any(queue.is_any_elsewhere for queue in self._queues):
                self._drained.wait(threading.current_thread())
                for queue in self._queues:
                    queue.recomposed()
        finally:
            self._waiting = []

    def _all(self, step: Callable[[Served], bool]) -> bool:
        """Do a step of each queue; tell if one has done something."""
        is_any = False
        for queue in self._queues:
            is_any = self._do(queue, partial(step, queue)) or is_any
        return is_any
