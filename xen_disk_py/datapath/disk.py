"""One disk: judges a request, has the backend do it, answers with a status.

Whatever a guest asks for that the disk does not have, and whatever goes wrong in a backend,
ends here as a status for the guest and a line in the log. The backend sees only requests
that lie inside it, are aligned to its sectors and are allowed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Callable, Protocol

from ..backends import Backend, asynchronous
from ..backends.filter import Filter, Noting, direct, outermost
from ..backends.finding import user_line
from ..blkif import (
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    FLUSH_FAILED,
    OKAY,
    READ,
    SECTOR,
    WRITE,
    WRITE_BARRIER,
    Discard,
    Features,
    Transfer,
)
from ..errors import BackendError, DeviceError, XenDiskError
from ..named import NamedTuple
from ..ration import Ration
from ..synchronizing import synchronize
from . import statistics as count
from .drained import DrainedSection
from .durability import Durability, Move, passes
from .queue_thread import QueueThreads
from .statistics import Statistics

log = logging.getLogger("xen_disk_py")

_NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", DISCARD: "discard"}

RETRY = -99
"""A status that is not for the guest: the storage failed, and such requests are tried again."""

_LINES = 5  # of the log, at once; then one a second
_DISCARD = 16 << 30  # bytes of a discard that is a part of a larger one
SETTLING = 5.0
"""Seconds that the requests under way may take before a disk becomes smaller, or is recomposed."""


class Moves(NamedTuple):
    """What does reads and writes at first, and what notes them."""

    read: Move
    write: Move
    noting: Noting | None


class Elsewhere(Protocol):
    """The same disk in other processes, which must follow when it changes its size.

    Each that is told something does it, though it may be after the error that it does not answer:
    then in that order.
    """

    def check(self) -> None:
        """See that all answer.

        Raises:
            XenDiskError: one does not.
        """

    def admit(self, sectors: int) -> None:
        """Have requests up to there admitted from now on, and no others.

        Raises:
            XenDiskError: one does not answer.
        """

    def resize(self, size: int) -> None:
        """Have the backend be ``size`` bytes long, as the storage is already.

        Raises:
            XenDiskError: one of them cannot.
        """


class Disk:
    """A backend as the guest may use it.

    Args:
        backend: open and checked; only :meth:`close` closes it.
        statistics: where to count.
        holds: a request that fails for the storage's sake (see
            :class:`~xen_disk_py.backends.StorageError`) is not answered with an error, but
            reported as :data:`RETRY`.
    """

    def __init__(
        self, backend: Backend, statistics: Statistics | None = None, *, holds: bool = False
    ) -> None:
        self.backend = backend
        self._statistics = statistics if statistics is not None else Statistics()
        self.read_only = backend.read_only
        self.sectors = backend.size // SECTOR
        self.alignment = backend.sector_size // SECTOR
        """Sectors of 512 bytes in one of the disk's own."""
        self.can_discard = backend.can_discard and not self.read_only
        self.can_discard_securely = self.can_discard and backend.can_discard_securely
        self._is_concurrent = backend.threads > 1 or backend.asynchronous is not None
        durability = Durability(backend, self._statistics, keeps=holds and not self.read_only)
        self._durability = durability
        self._binding = threading.Lock()
        self.moves: Moves
        """What a queue does reads and writes by itself, at first (see :meth:`serve_read`); to be
        asked for anew each time: it changes."""
        self.drained = DrainedSection()
        self.threads = QueueThreads(self.drained)
        self.elsewhere: Elsewhere | None = None
        """The processes that serve it, where this one does not."""
        self._changing = threading.Lock()
        self.bind()
        self._lock = threading.Lock()
        self._holds = holds
        self._lines = Ration(_LINES, 1.0)
        self._unsaid = 0
        self._said, self._repeat_at = "", 0.0  # the last line; and when to say the same again
        self._retrying, self._failure = 0, ""  # requests; why the last failed
        self.on_error = self.on_retry = _nobody
        """Called with a line for each request that failed, or is queued for retry."""
        self.on_recovery = _nobody
        """Called with a line when all that were queued for retry have ended."""

    @property
    def statistics(self) -> Statistics:
        """Where it counts; a record's, once there is one."""
        return self._statistics

    @statistics.setter
    def statistics(self, statistics: Statistics) -> None:
        self._statistics = self._durability.statistics = statistics
        self._refuse_writes_if_lost()

    def bind(self) -> None:
        """Find what is called for requests; again when a filter has other settings.

        From any thread: a request that has begun ends as it began.
        """
        backend, durability = self.backend, self._durability
        read = durability.reading(direct(backend, "read"))
        write = durability.writing(direct(backend, "write"), may_wait=True)
        self._waiting = waiting = outermost(backend)
        noting = None if waiting is None else waiting.noting()
        first = self._first(backend)
        moves = Moves(*first, None)
        # A write that flushes first may have others be written again, each noted by itself: that
        # must not wait for the batch that it is in.
        may_flush = durability.keeps and not self._is_concurrent
        if waiting is not None and noting is not None and not may_flush:
            moves = Moves(*self._first(waiting.source), noting)
        with self._binding:
            self._read, self._write = read, write
            self._read_first, self._write_first = first
            self.moves = moves
            if durability.is_lost:
                self._refuse_writes()

    def _first(self, backend: Backend) -> tuple[Move, Move]:
        """What does reads and writes of a backend at first."""
        durability, way = self._durability, "_nowait" if self._is_concurrent else ""
        write = direct(backend, f"write{way}")
        return (
            durability.reading(direct(backend, f"read{way}")),
            durability.writing(write, may_wait=not self._is_concurrent),
        )

    def _refuse_writes(self) -> None:
        refuse = self._durability.refuse
        self._write = self._write_first = refuse
        self.moves = self.moves._replace(write=refuse)

    def share(self) -> None:
        """Have it served by processes that are forked from now on; the statistics are the last."""
        self._durability.share()
        self.bind()

    def after_fork(self, number: int) -> None:
        """Serve it in a process of its own, for queue ``number``.

        Raises:
            OSError, XenDiskError: the backend cannot be used here.
        """
        self.backend.after_fork()
        self.statistics.count_in_queue(number)
        self.bind()

    def check_changeable(self) -> None:
        """See that :meth:`recompose` is possible.

        Raises:
            DeviceError: it is not.
        """
        if self.elsewhere is not None:
            raise DeviceError(
                "its queues are in processes of their own, which are not changed in use: connect "
                "it without --queues-in processes"
            )

    def recompose(self, change: Callable[[Backend], Backend]) -> None:
        """Serve from another composition over the same backend, from a moment between two requests.

        Args:
            change: called with what is served now when no request is under way; it returns what is
                served from then on, with as many threads.

        Raises:
            DeviceError: a request or another change takes too long; nothing was changed.
            Exception: what ``change`` raises; the same.
        """
        self.check_changeable()
        if not self._changing.acquire(timeout=SETTLING):
            raise DeviceError("the disk is being resized: try again when that is done")
        try:
            with self.drained.entered(SETTLING):
                self.backend = self._durability.backend = change(self.backend)
                self.bind()
        finally:
            self._changing.release()

    def _refuse_writes_if_lost(self) -> None:
        """Let no write succeed once no flush can.

        Linux's blkfront does not flush any more after a flush that failed, but takes each write
        that is answered for durable.
        """
        with self._binding:
            if self._durability.is_lost:
                self._refuse_writes()

    def features(
        self,
        max_indirect_segments: int,
        max_ring_page_order: int,
        max_queues: int = 1,
        *,
        cdrom: bool = False,
    ) -> Features:
        """Describe the disk to a frontend."""
        backend = self.backend
        return Features(
            sectors=self.sectors,
            sector_size=backend.sector_size,
            physical_sector_size=backend.physical_sector_size,
            read_only=self.read_only,
            cdrom=cdrom,
            discard=self.can_discard,
            secure_discard=self.can_discard_securely,
            discard_granularity=max(backend.discard_granularity, backend.sector_size),
            max_indirect_segments=max_indirect_segments,
            max_ring_page_order=max_ring_page_order,
            max_queues=max_queues,
        )

    def refusal(self, request: Transfer | Discard) -> tuple[str, int] | None:
        """Say why ``request`` must not reach the backend, and its status; None if it may."""
        if isinstance(request, Discard):
            offered = self.can_discard_securely if request.secure else self.can_discard
            if not offered and not self.read_only:
                return "discard that is not offered", EOPNOTSUPP
        elif not request.sectors:
            return None  # a flush alone; Linux gives it sector 2**64 - 1, which means nothing
        if request.sector + request.sectors > self.sectors:
            end = request.sector + request.sectors
            return f"sectors {request.sector} to {end} of {self.sectors}", ERROR
        if self.read_only and request.operation != READ:
            return "write to a read-only disk", ERROR
        step = self.alignment
        if step > 1 and (request.sector % step or not _is_aligned(request, step)):
            return f"sector {request.sector}, or what is there, is not aligned to {step}", ERROR
        return None

    def resize(
        self,
        size: int | None,
        *,
        force: bool = False,
        step: int = SECTOR,
        on_change: Callable[[int], None] = lambda size: None,
    ) -> int:
        """Give the disk another size, while its queue's thread does requests.

        A longer disk admits requests beyond its old end when the backend has made room; a
        shorter one refuses them before the backend gives it up.

        Args:
            size: bytes; None for what the backend's storage has become.
            force: a smaller size is fine.
            step: the size must be a multiple of so many bytes.
            on_change: called with the new size when nothing speaks against it, and nothing has
                changed yet.

        Returns:
            The new size, in bytes.

        Raises:
            DeviceError, ImageError, BackendError: the disk is as it was, but a smaller one that
                not every process could have, or whose backend says another size, stays small;
                the message says why.
        """
        with self._changing:
            return self._resize(size, force=force, step=step, on_change=on_change)

    def _resize(
        self, size: int | None, *, force: bool, step: int, on_change: Callable[[int], None]
    ) -> int:
        before = self.sectors
        wanted = self._resize_backend(None) if size is None else size
        if not isinstance(wanted, int) or wanted <= 0 or wanted % step:
            raise DeviceError(
                f"{wanted} bytes is not a positive multiple of {step}, the sector that the guest "
                "was told: choose a size that is"
            )
        sectors = wanted // SECTOR
        if sectors < before and not force:
            raise DeviceError(
                f"{wanted} bytes is less than the disk has, {before * SECTOR}; what lies beyond "
                "would be lost: make the file system in it smaller, then use --force"
            )
        if self.elsewhere is not None:
            self.elsewhere.check()
        on_change(wanted)
        safe = before  # where requests may go to if this fails
        try:
            self.admit(min(before, sectors))
            if sectors < before:
                self._settle()
            done = self._resize_backend(wanted)
            safe = min(before, sectors)  # the rest may be gone, whatever else is raised
            if done != wanted:
                raise BackendError(f"resize of {self.backend} returned {done!r}, not {wanted}")
            if self.elsewhere is not None:
                self.elsewhere.resize(wanted)
            self.admit(sectors)
        except XenDiskError:
            with suppress(XenDiskError):  # who does not answer has been told
                self.admit(safe)
            raise
        return wanted

    def admit(self, sectors: int) -> None:
        """Admit requests up to there, and no others; what is judged already counts as in flight.

        Args:
            sectors: of 512 bytes.
        """
        if sectors != self.sectors:
            self.sectors = sectors
            synchronize()  # a queue counts a batch as in flight, then looks at sectors
            if self.elsewhere is not None:
                self.elsewhere.admit(sectors)

    def storage_size(self) -> int:
        """Return the bytes that the storage has now; raises as :meth:`resize`."""
        return self._resize_backend(None)

    def _resize_backend(self, size: int | None) -> int:
        backend = self.backend
        try:
            return backend.resize(size)
        except XenDiskError:
            raise
        except NotImplementedError as error:
            raise DeviceError(f"{backend} keeps its size: it has no resize") from error
        except Exception as error:
            reason = user_line(error, backend)
            raise BackendError(f"resize failed in {backend}: {reason}") from error

    def _settle(self) -> None:
        """Wait until the requests that may have been judged by another size are done."""
        is_settled = self.statistics.settled(in_order=not self._is_concurrent)
        deadline = time.monotonic() + SETTLING
        while not is_settled():
            if time.monotonic() >= deadline:
                raise DeviceError(
                    f"a request has not returned within {SETTLING:g} s: the disk stays as it is"
                )
            time.sleep(0.001)

    def refuse(self, reason: str) -> None:
        """Count and log a request that is answered without the backend."""
        self.statistics.add(count.REFUSED)
        self.say(logging.WARNING, f"refused a request of the guest: {reason}")

    # -- requests that lie inside the disk and are allowed ------------------------------

    def serve_read(self, buffers: Sequence[memoryview], offset: int, length: int) -> int | None:
        """Read ``length`` bytes at ``offset`` into ``buffers``.

        Returns:
            A status, or None if it is not done: that would take waiting and the backend lets
            several threads in, or the request is one to hold. Then :meth:`transfer` does it.
        """
        try:
            done = self._read_first(buffers, offset)
        except BaseException as error:  # noqa: BLE001 - whatever an author's code raises, exit() too
            return self.failed_at_first(READ, error)
        return self.finish(READ, buffers, offset, length, done)

    def serve_write(self, buffers: Sequence[memoryview], offset: int, length: int) -> int | None:
        """Write ``length`` bytes from ``buffers`` at ``offset``; returns as :meth:`serve_read`."""
        try:
            done = self._write_first(buffers, offset)
        except BaseException as error:  # noqa: BLE001 - whatever an author's code raises, exit() too
            return self.failed_at_first(WRITE, error)
        return self.finish(WRITE, buffers, offset, length, done)

    def failed_at_first(self, operation: int, error: BaseException) -> int | None:
        """The status of what one of :attr:`moves` raised ``error`` for.

        Returns:
            As :meth:`serve_read`.
        """
        status = self._failed(_NAMES[operation], error)
        return None if status == RETRY else status

    def finish(
        self,
        operation: int,
        buffers: Sequence[memoryview],
        offset: int,
        length: int,
        done: int | None,
    ) -> int | None:
        """Do what one of :attr:`moves` has left, having returned ``done``.

        Returns:
            As :meth:`serve_read`.
        """
        if done is None or done == length:
            return OKAY
        if self._is_concurrent:
            return None
        move = self._read if operation == READ else self._write
        status = self._finish(_NAMES[operation], move, buffers, offset, length, done)
        return None if status == RETRY else status

    def transfer(self, request: Transfer, buffers: Sequence[memoryview]) -> int:
        """Do a read, write, flush or barrier, however long it takes; the result is its status.

        A barrier is stable when it returns, and so is all that was written before it began.
        """
        operation = request.operation
        offset, length = request.sector * SECTOR, request.sectors * SECTOR
        status = OKAY
        if operation == READ:
            return self._move("read", self._read, buffers, offset, length)
        if operation == WRITE_BARRIER:
            status = self._flush()
        if status == OKAY and length:
            status = self._move("write", self._write, buffers, offset, length)
        if status == OKAY and operation != WRITE:
            status = self._flush()
        return status

    def begin(
        self, request: Transfer | Discard, buffers: Sequence[memoryview], token: object
    ) -> bool:
        """Have an asynchronous backend begin a request; False if :meth:`transfer` must do it."""
        many = self.backend.asynchronous
        if many is None or not (request.sectors or request.operation == FLUSH):
            return False
        if request.operation == WRITE_BARRIER:  # a write between two flushes
            return False
        offset, length = request.sector * SECTOR, request.sectors * SECTOR
        if isinstance(request, Discard):
            if request.secure:
                return False
            many.submit(asynchronous.DISCARD, (), offset, length, token)
        elif request.operation == FLUSH:
            if length:
                return False
            many.submit(asynchronous.FLUSH, (), 0, 0, token)
        else:
            operation = asynchronous.READ if request.operation == READ else asynchronous.WRITE
            many.submit(operation, buffers, offset, length, token)
        return True

    def pause(
        self, request: Transfer | Discard, call: Callable[[], int]
    ) -> tuple[float, Callable[[], int]]:
        """Say for how many seconds a request is to wait, and what does it then.

        Args:
            request: is not begun.
            call: does it, and waits itself.
        """
        waiting = self._waiting
        if waiting is None:
            return 0.0, call
        length = request.sectors * SECTOR
        try:
            pause = waiting.pause(_NAMES.get(request.operation, "write"), length)
            if request.operation == FLUSH and length:
                pause += waiting.pause("write", length)
        except Exception as error:  # noqa: BLE001 - whatever an author's code raises
            self.say(logging.ERROR, f"pause of {waiting}: {user_line(error, waiting)}")
            return 0.0, call
        return pause, partial(self._after_pause, waiting, request, call)

    def _after_pause(
        self, waiting: Filter, request: Transfer | Discard, call: Callable[[], int]
    ) -> int:
        try:
            return waiting.after_pause(call)
        except BaseException as error:  # noqa: BLE001 - as above; a thread's end would be no answer
            return self.outcome(request, error)

    def outcome(self, request: Transfer | Discard, error: BaseException | None) -> int:
        """The status of a request that was begun, by how it ended."""
        if error is None:
            return OKAY
        return self._failed(_NAMES.get(request.operation, "request"), error)

    def serve_discard(
        self, request: Discard, on_progress: Callable[[], None] = lambda: None
    ) -> int:
        """Do a discard that :meth:`refusal` let pass.

        Linux 7 discards up to 2 TiB with one request, which takes minutes on some storage.

        Args:
            request: it may be of the whole disk.
            on_progress: called each time that a part is done and more follow.
        """
        if not request.sectors:
            return OKAY
        backend = self.backend
        discard = backend.discard_securely if request.secure else backend.discard
        offset, end = request.sector * SECTOR, (request.sector + request.sectors) * SECTOR
        try:
            # cut at round places, where no granule of the storage is in two parts
            while (cut := (offset // _DISCARD + 1) * _DISCARD) < end:
                self._durability.discarding(discard, offset, cut - offset)
                offset = cut
                on_progress()
            self._durability.discarding(discard, offset, end - offset)
        except BaseException as error:  # noqa: BLE001 - as above
            return self._failed("discard", error)
        return OKAY

    def _flush(self) -> int:
        try:
            self._durability.flush()
        except BaseException as error:  # noqa: BLE001 - as above
            self._refuse_writes_if_lost()
            return self._failed("flush", error)
        return OKAY

    def _move(
        self, what: str, move: Move, buffers: Sequence[memoryview], offset: int, length: int
    ) -> int:
        try:
            moved = move(buffers, offset)
        except BaseException as error:  # noqa: BLE001 - as above
            return self._failed(what, error)
        return self._finish(what, move, buffers, offset, length, moved)

    def _finish(
        self,
        what: str,
        move: Move,
        buffers: Sequence[memoryview],
        offset: int,
        length: int,
        moved: int | None,
    ) -> int:
        """Have the backend move what ``moved`` bytes have left, until that is nothing."""
        done = 0
        try:
            while moved is not None:
                if not 0 < moved <= length - done or moved % self.backend.sector_size:
                    raise EOFError(f"{done + moved} of {length} bytes")  # noqa: TRY301 - as theirs
                done += moved
                if done == length:
                    break
                moved = move(_after(buffers, done), offset + done)
        except BaseException as error:  # noqa: BLE001 - as above
            return self._failed(what, error)
        return OKAY

    def _failed(self, what: str, error: BaseException) -> int:
        reason = user_line(error, self.backend)
        if self._holds and passes(error):
            self.say(logging.ERROR, f"{what} failed in {self.backend}, to be retried: {reason}")
            self._failure = f"{what}: {reason}"
            return RETRY
        self.statistics.add(count.ERRORS)
        self.say(logging.ERROR, f"{what} failed in {self.backend}: {reason}")
        self.on_error(f"{what}: {reason}")
        return FLUSH_FAILED if what == "flush" else ERROR

    def queued_for_retry(self) -> None:
        """Note that a request is, since it has just failed for the first time."""
        with self._lock:
            self._retrying += 1
        self.on_retry(self._failure)

    def retried(self, *, succeeded: bool) -> None:
        """Note that one has ended that was queued for retry."""
        with self._lock:
            self._retrying -= 1
            if self._retrying:
                return
        works = "the storage works again"
        text = works if succeeded else "no request is queued for retry any longer"
        log.info(text)
        self.on_recovery(text)

    def count_memory(self) -> None:
        """Note how much memory the guest's writes hold."""
        try:
            self.statistics.set_memory(self.backend.memory)
        except Exception as error:  # noqa: BLE001 - it may be an author's own property
            self.say(logging.ERROR, f"memory of {self.backend}: {user_line(error, self.backend)}")

    def say(self, level: int, text: str) -> None:
        """Log what a guest decides how often it happens: all of this disk has one ration."""
        with self._lock:
            now = time.monotonic()
            is_repeated = text == self._said and now < self._repeat_at
            if is_repeated or not self._lines.take():
                self._unsaid += 1
                return
            more = f" (and {self._unsaid} lines more before)" if self._unsaid else ""
            self._unsaid, self._said, self._repeat_at = 0, text, now + 1
        log.log(level, "%s%s", text, more)

    def close(self) -> None:
        """Close the backend; what goes wrong there is logged."""
        try:
            self.backend.close()
        except Exception as error:  # noqa: BLE001 - an author's code must not stop our clean-up
            log.error("close failed in %s: %s", self.backend, user_line(error, self.backend))


def _nobody(text: str) -> None:
    """Tell nobody."""


def _is_aligned(request: Transfer | Discard, step: int) -> bool:
    if isinstance(request, Discard):
        return not request.sectors % step
    return not any(
        first % step or (last + 1) % step for first, last in zip(request.firsts, request.lasts)
    )


def _after(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """Return the buffers without their first ``done`` bytes."""
    if not done:
        return buffers
    for number, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[number + 1 :]]
        done -= len(buffer)
    return []
