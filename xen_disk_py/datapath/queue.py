"""One queue: a ring, its event channel, and what is done in one turn.

That is the whole data path::

    take all requests ─ for each: decode, check, borrow its pages, do it, give them back
    publish the responses, some at a time ─ notify if the frontend asked for it

Turns follow one another in a :class:`~xen_disk_py.datapath.queue_thread.QueueThread`, which sleeps
when there is nothing more to take.

Two ways lead through it. :meth:`Queue._begin` does any request, whatever it asks for and
however wrong it is. Reads and writes whose segment descriptors were seen before, nearly all
of them, need no decoding and no looking up of pages: :meth:`Queue._serve` does those itself,
or has an asynchronous backend begin them, and leaves all others to the first way. What would
make the thread wait is done by :class:`~xen_disk_py.datapath.workers.Workers`, and answered when it
is done.

Everything of the guest's that is decided upon is a private copy: the slots, and the pages of
an indirect request. Guest pages are handed to the backend for data only.

Killed at any instant, a queue leaves a :class:`~xen_disk_py.datapath.journal.Journal` by which
another takes over. A request that the storage cannot do may be held and tried again: its guest
waits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from functools import partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Callable

from ..backends.asynchronous import Asynchronous
from ..backends.finding import user_line
from ..backends.queues import here
from ..blkif import (
    ERROR,
    INDIRECT,
    MAX_SEGMENTS,
    OKAY,
    READ,
    SECTOR,
    SEGMENTS_PER_PAGE,
    WRITE,
    WRITE_BARRIER,
    Abi,
    Discard,
    Indirect,
    Malformed,
    Ring,
    Transfer,
    encode_response,
    failure,
    resolve,
)
from ..errors import GuestMisbehaved, HypervisorError, XenDiskError
from ..hypervisor import PAGE_SIZE, EventChannel, Hypervisor, Mapping
from ..named import NamedTuple
from ..ring import BackRing
from . import statistics as count
from .disk import RETRY, Disk, Moves
from .durability import Move
from .grants import PERSISTENT_LIMIT, Grants, GuestBuffers, GuestPages, key_of
from .idle import Wakeups
from .joining import LARGE, Run
from .journal import Journal
from .latency import histogram_of
from .retry import RetryQueue
from .stall import StallDetector
from .statistics import Counters
from .stopwatch import WRITES, Start, Stopwatch, coarse
from .workers import MORE, Workers

if TYPE_CHECKING:
    from ..trace.batch import BatchNotes

log = logging.getLogger("xen_disk_py")

MAX_IN_FLIGHT = 64 << 20
"""Bytes of one disk that may be on their way at once where requests are done in threads."""

_PUBLISH = 256 << 10  # bytes moved until responses are published, amid a batch
_LATE = 0.005  # seconds that a response waits for others, and then for the request under way
_SLOW = 0.0005  # seconds, the mean of a batch: each response of the next is published at once
_LOOK = 16  # requests until the clock is looked at, of a disk that is quick
_FEW = 4  # responses: fewer wait while there is more to do, since each notification costs much


class Options(NamedTuple):
    """How the queues of a device work."""

    max_indirect_segments: int = 256
    """What was offered; 0 if indirect requests were not."""
    grants: Grants = Grants.AUTO
    """How to get at the guest's pages."""
    persistent_limit: int = PERSISTENT_LIMIT
    """Pages that all queues together keep mapped."""
    latency: bool = True
    """Whether requests are timed."""


class _Begun:
    """A request under way."""

    __slots__ = ("acquired", "request", "since", "slot", "start", "was_retried")

    def __init__(
        self,
        slot: bytes,
        request: Transfer | Discard,
        acquired: GuestBuffers,
        start: Start | None,
    ) -> None:
        self.slot = slot
        self.request = request
        self.acquired = acquired
        self.start = start  # when it was taken off the ring
        self.since = inf  # when somebody began to do it
        self.was_retried = False


class _Known:
    """A read or write of kept pages that an asynchronous backend does: no more than it takes.

    If that fails it becomes a :class:`_Begun`.
    """

    __slots__ = ("descriptors", "id", "kind", "length", "operation", "since", "slot", "start")

    def __init__(
        self,
        slot: bytes,
        descriptors: bytes | None,
        id_: int,
        operation: int,
        kind: int,
        length: int,
        since: float,
        start: Start | None,
    ) -> None:
        self.slot = slot
        self.descriptors = descriptors
        self.id = id_
        self.operation = operation
        self.kind = kind
        self.length = length
        self.since = since
        self.start = start


def _timed(begun: _Begun, call: Callable[[], int]) -> int:
    """Do a call in a thread, and note when that began."""
    begun.since = perf_counter()
    return call()


class Queue:
    """Serves one ring of a frontend, from :meth:`start` to :meth:`stop`.

    Args:
        hypervisor: maps the ring and the data pages, binds the event channel.
        domid: the guest, from our own configuration.
        ring: what the frontend published, checked.
        abi: the layout it uses.
        disk: what does the requests.
        options: how.
        persistent: the frontend promised to use the same grants again and again.
        sharers: the queues of the disk, this one included: they share the limits.
        number: of the queue, from 0 on.
        journal: what outlives this process. If a process that was killed has noted something
            about this very ring there, this resumes from it. By default a private one.
        statistics: where this queue, and no other, counts.
        on_failure: called from the queue's thread when it stops for an error of its own.

    Raises:
        HypervisorError: the ring cannot be mapped or the channel not be bound.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        domid: int,
        ring: Ring,
        abi: Abi,
        disk: Disk,
        *,
        options: Options,
        persistent: bool,
        sharers: int = 1,
        number: int = 0,
        journal: Journal | None = None,
        statistics: Counters,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._abi = abi
        self._disk = disk
        self._max_indirect_segments = options.max_indirect_segments
        self._statistics = statistics
        self._stopwatch = Stopwatch(statistics, is_on=options.latency, clock=perf_counter)
        self._on_failure = on_failure
        self.number = number
        self._pages = GuestPages(
            hypervisor,
            domid,
            persistent=persistent,
            limit=options.persistent_limit // sharers,
            grants=options.grants,
        )
        self._many = disk.backend.asynchronous
        self._is_concurrent = disk.backend.threads > 1
        largest = max(options.max_indirect_segments, MAX_SEGMENTS) * PAGE_SIZE
        self._most = max(1, MAX_IN_FLIGHT // sharers // largest)
        with contextlib.ExitStack() as undo:
            self._mapping: Mapping = undo.enter_context(
                hypervisor.map_grants(domid, ring.refs, writable=True)
            )
            self._ring = BackRing(self._mapping.view, abi.slot_size, hypervisor.fence)
            undo.callback(self._ring.close)
            self._journal = journal if journal is not None else Journal()
            inherited = self._recall(ring)
            if inherited is None:
                self._journal.begin(ring, abi.slot_size)
            self._resumes = inherited is not None
            self._inherited = deque(inherited or ())  # to do again, and not begun yet
            self._channel: EventChannel = undo.enter_context(
                hypervisor.bind_interdomain(domid, ring.event_channel)
            )
            workers = max(1, disk.backend.threads // sharers)
            complain = partial(disk.say, logging.WARNING)
            self._workers: Workers[_Begun] = undo.enter_context(
                Workers(workers, complain, self._begin_thread)
            )
            undo.pop_all()
        self._with_backend = 0  # requests that an asynchronous backend has begun
        self._joined = Run()
        self._moves: Moves | None = None
        self._notes: BatchNotes | None = None  # of these
        self._reading = disk.moves.read
        self._writing = disk.moves.write
        self._unanswered: dict[
            int, _Begun | _Known
        ] = {}  # in the order in which they were begun, by id()
        self._retries: RetryQueue[_Begun] = RetryQueue()  # of these, what the storage failed at
        self._stall = StallDetector(is_asynchronous=self._many is not None)
        ends = [each.fileno() for each in (self._workers, self._many) if each is not None]
        self.wakeups = Wakeups(self._channel, ends, statistics)
        self._has_room = True
        self._looked_at = coarse()  # when last published for being late, by the coarse clock
        self._look = 1  # requests until the clock is looked at
        self._is_slow = False  # the disk was, in the last batch that was timed
        self.is_stopping = False
        # What was queued for retry: then all that is behind a barrier is given up, too.
        self._has_given_up = False
        self._thread = disk.threads.of(number)
        self._idle = self._thread.idle
        self._has_started = self._is_closed = self._has_failed = False
        self._ended = threading.Event()
        self._last_of: threading.Thread | None = None

    def _recall(self, ring: Ring) -> Sequence[bytes] | None:
        """Put the ring to where the journal says; the requests to do again, or None."""
        noted = self._journal.recall(ring, self._abi.slot_size)
        if noted and self._ring.resume(noted.start, noted.responses, len(noted.requests)):
            return noted.requests
        return None

    def start(self) -> bool:
        """Begin to serve, unless it has begun; requests that wait on the ring already are found.

        Returns:
            False if the system gives no thread: nothing is served yet. To be called again.
        """
        if self._has_started:
            return True
        try:
            self._thread.serve(self)
        except (RuntimeError, OSError) as error:
            self._disk.say(
                logging.ERROR,
                f"a ring is not served yet, since there is no thread to be had ({error}): {MORE}",
            )
            return False
        self._has_started = True
        return True

    @property
    def stalled_for(self) -> float:
        """For how many seconds a request has been under way and nothing moved; 0 if none is.

        To be asked now and then, from one other thread.
        """
        return self._stall.stalled_for(list(self._unanswered.values()), len(self._ring.unpublished))

    def ask_to_stop(self) -> None:
        """Have it come to its end; :meth:`stop` waits for that."""
        if not self._is_closed:
            self.is_stopping = True
            self._thread.wake()  # whoever has asked before may have been cut short by a signal

    def pause_retries(self, paused: bool) -> None:
        """Try none of what is queued for retry, or try it again; for one other thread to call."""
        if not self._is_closed and self._retries.is_paused is not paused:
            self._retries.is_paused = paused
            if not paused:
                self._thread.wake()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish the requests taken so far, refuse those that wait, unmap and unbind everything.

        Returns:
            False if the backend did not return within ``timeout`` seconds; then everything
            stays as it is and ``stop`` may be called again.
        """
        if self._is_closed:
            return True
        if not self._has_started:
            self._release()
        else:
            self.ask_to_stop()
            # Not join() alone: cut short by an exception, it takes a thread that runs for one that
            # has ended (Python before 3.13).
            if not self._ended.wait(timeout):
                return False
            if self._last_of is not None:
                self._last_of.join()
        self._is_closed = True
        return True

    # -- what its thread calls ---------------------------------------------------------

    def begin(self) -> bool:
        """Do what a predecessor has left."""
        self.recomposed()
        if self._resumes:
            self._resume()
            self._resumes = False
        return True

    def turn(self, *, is_alone: bool) -> bool:
        """Do what there is to do, but one batch at most; False if there is nothing.

        Args:
            is_alone: no other queue's turn comes between this one and the next.
        """
        ring = self._ring
        finished = self.is_any_elsewhere and self.end_finished()
        if self._retries.is_due:
            self._retry()
        room = self._most - len(self._unanswered)
        self._has_room = room > 0
        slots = ring.take(room) if room > 0 else b""
        if slots:
            if is_alone:
                self._serve(slots)
            else:
                self._stopwatch.look()  # others have had their turns
                self._serve(slots)
                self.publish()  # and have them now
        elif ring.unpublished:
            self.publish()  # no more can be taken, whatever the ring has shown
        else:
            return finished
        return True

    @property
    def open_ring(self) -> BackRing | None:
        """The ring, unless so much is under way that no more is taken."""
        return self._ring if self._has_room else None

    @property
    def retry_in(self) -> float | None:
        """Milliseconds until something is tried again; None if there is nothing."""
        return self._retries.milliseconds

    @property
    def is_any_elsewhere(self) -> bool:
        """Whether something that was begun is done elsewhere."""
        return bool(self._workers.unfinished or self._with_backend)

    def idled(self) -> None:
        """Note that time has passed."""
        self._stopwatch.look()

    def recomposed(self) -> None:
        """Note that the disk may have been changed."""
        self._stopwatch.look()
        self._many = self._disk.backend.asynchronous

    def fail(self, error: Exception) -> None:
        """Tell of what has ended this queue."""
        if isinstance(error, GuestMisbehaved):
            # The guest hurts nobody but itself: its ring is dead, the disk stays detachable.
            self._disk.say(logging.ERROR, f"the guest's ring is not served any longer: {error}")
            return
        log.debug("a queue is served no longer", exc_info=error)
        traceback.clear_frames(error.__traceback__)  # no buffer is kept in there
        if not self._has_failed:
            self._has_failed = True
            self._on_failure(error)

    def end(self) -> None:
        """Finish what was begun, refuse the rest, release everything."""
        self.is_stopping = True  # nothing is held any longer
        try:
            self._finish()
            self._attempt(self._refuse_the_rest)
        except Exception as error:  # noqa: BLE001 - it must not stop our clean-up
            self.fail(error)
        while self._unanswered:  # what could not be answered; of that, no page stays in use
            _, begun = self._unanswered.popitem()
            if isinstance(begun, _Begun):
                begun.acquired.release(deliver=False)
                if begun.was_retried:
                    self._disk.retried(succeeded=False)
            del begun
        self._journal.clear()  # a queue that never ran leaves it to the next
        self._attempt(self._release)

    def over(self, last_of: threading.Thread | None) -> None:
        """Note that all that is done.

        Args:
            last_of: the thread that ends with it, if any does.
        """
        self._last_of = last_of
        self._ended.set()

    def _begin_thread(self) -> None:
        here.number = self.number

    def _attempt(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except XenDiskError as error:
            self._disk.say(logging.ERROR, str(error))
            return False
        return True

    def _finish(self) -> None:
        """Wait for what is under way; answer with errors what the backend will never finish."""
        before = None
        if self._notes is not None:
            self._notes.put()
        try:
            # After an error one response could not be told: the others' turn.
            while not self._attempt(self._drain) and before != len(self._unanswered):
                before = len(self._unanswered)
        except Exception as error:  # noqa: BLE001 - an author's code must not stop our clean-up
            self._disk.say(logging.ERROR, user_line(error, self._disk.backend))
        if self._unanswered and self._many is not None:
            # Nothing may touch a request's buffers when its pages are the guest's again.
            with contextlib.suppress(Exception):
                self._many.close()
        self._with_backend = 0
        self._retries.take()
        with contextlib.suppress(ValueError):  # unmapped under us
            for begun in list(self._unanswered.values()):
                if isinstance(begun, _Begun):
                    status = failure(begun.request.operation)
                    self._attempt(partial(self._end, begun, status))
                else:
                    del self._unanswered[id(begun)]
                    self._ring.respond(encode_response(begun.id, begun.operation, ERROR))

    def _release(self) -> None:
        """Unmap and unbind everything: in the queue's thread, where no signal cuts it short."""
        self._workers.close()
        self._joined.clear()
        self._pages.close()
        self._ring.close()
        self._channel.close()
        self._mapping.close()

    def _resume(self) -> None:
        """Do what another has not answered; reads, writes and flushes can be repeated."""
        inherited, words = self._inherited, self._statistics.words
        words[count.IN_FLIGHT] = len(inherited)
        self._stopwatch.take()
        while inherited:
            if inherited[0][0] == WRITE_BARRIER:
                self._drain()  # as long as the journal has it among those that are not begun
            self._begin(inherited.popleft(), None, waits=False)
            self._publish_if_late()
        self.publish()
        words[count.IN_FLIGHT] = len(self._unanswered)
        self._channel.notify()  # it may have been killed before it did

    def _serve(self, slots: bytes) -> None:  # noqa: PLR0915 - one loop, every call in it counts
        """Do the requests in ``slots`` in their order, and publish all answers but perhaps a few.

        This is where the time goes. A read or write of known pages costs a look-up of its
        descriptors, the backend's call and the packing of its answer.
        """
        stall, stopwatch = self._stall, self._stopwatch
        stall.is_amid = True
        stall.moves += 1
        many = self._many
        if many is not None or self._is_concurrent:  # it may be long since one was answered
            stopwatch.look()
        stopwatch.take()
        counts = stopwatch.counts
        abi, disk, ring, statistics = self._abi, self._disk, self._ring, self._statistics
        plans, kept = self._pages.plans, self._pages.kept
        size, segments_at, respond = abi.slot_size, abi.segments_at, ring.respond
        in_one_page = min(self._max_indirect_segments, SEGMENTS_PER_PAGE)
        unanswered = self._unanswered
        if many is not None:
            now, start = perf_counter(), stopwatch.start
        large = 0 if many is not None else LARGE
        run = self._joined
        joined = run.requests
        requests = len(slots) // size
        words = statistics.words
        # With those that are answered: they count as requests only when they are published, which
        # may be amid this batch.
        words[count.IN_FLIGHT] = requests + len(unanswered) + len(ring.unpublished)
        # Looked at after that: whoever makes the disk smaller waits for what is in flight.
        capacity, misaligned, read_only = disk.sectors, disk.alignment - 1, disk.read_only
        reads = writes = bytes_read = bytes_written = bytes_joined = 0
        moves: Moves | None = None
        publish_at = _PUBLISH  # bytes
        look_at = self._look * size
        at = -size
        for operation, segments, wide, id_, sector, first in abi.heads(slots):
            at += size
            if at >= look_at:  # before each request, if the disk is slow
                moved = bytes_read + bytes_written + bytes_joined
                if moved >= publish_at:
                    publish_at = moved + _PUBLISH
                    self.publish()
                elif ring.unpublished:
                    self._look = 1 if self._publish_if_late() else min(2 * self._look, _LOOK)
                look_at = at + self._look * size
            descriptors = plan = None
            if operation <= WRITE:
                if segments == 1:
                    plan = plans.get(first)
                elif segments <= MAX_SEGMENTS:
                    segments_from = at + segments_at
                    plan = plans.get(slots[segments_from : segments_from + 8 * segments])
            elif operation == INDIRECT and 0 < wide <= in_one_page and first >> 32 in kept:
                descriptors = bytes(kept[first >> 32][: 8 * wide])
                plan = plans.get(key_of(descriptors))
                operation = segments  # noqa: PLW2901 - the second byte of an indirect request
            if plan is not None:
                sectors, length, buffers, kind = plan
                if (
                    sector + sectors <= capacity
                    and not sector & misaligned
                    and (operation == READ or (operation == WRITE and not read_only))
                ):
                    if length >= large:
                        if many is not None:
                            slot = slots[at : at + size]
                            known = _Known(
                                slot, descriptors, id_, operation, kind, length, now, start
                            )
                            try:
                                many.submit(operation, buffers, sector * SECTOR, length, known)
                            except Exception:  # the other way does it once more
                                log.debug("a request was not begun", exc_info=True)
                            else:
                                unanswered[id(known)] = known
                                self._with_backend += 1
                                continue
                        else:
                            offset = sector * SECTOR
                            if joined and not run.continues(operation, offset, length):
                                bytes_joined += self._do_run()
                                look_at = 0
                            request = (id_, kind, slots[at : at + size], descriptors)
                            run.add(operation, offset, plan, request)
                            continue
                    if joined:
                        bytes_joined += self._do_run()
                        look_at = 0
                    if disk.moves is not moves:
                        moves = disk.moves
                        read, write = self._follow(moves)
                    try:
                        done = (write if operation else read)(buffers, sector * SECTOR)
                    except BaseException as error:  # noqa: BLE001 - as in Disk.serve_read
                        status = disk.failed_at_first(operation, error)
                    else:
                        status = OKAY
                        if done != length and done is not None:
                            if self._notes is not None:
                                self._notes.amend(operation, length)
                            status = disk.finish(operation, buffers, sector * SECTOR, length, done)
                    if status is not None:
                        if operation == READ:
                            reads += 1
                            bytes_read += length
                            counts[kind] += 1
                        else:
                            writes += 1
                            bytes_written += length
                            counts[kind + WRITES] += 1
                        respond(encode_response(id_, operation, status))
                        continue
            if joined:
                bytes_joined += self._do_run()
            self._begin(slots[at : at + size], descriptors, waits=plan is not None)
            self._publish_if_late()  # it may have taken its time
            if self._has_given_up:
                for behind in range(at + size, len(slots), size):
                    self._begin(slots[behind : behind + size], None, waits=True)
                break
        if joined:
            self._do_run()
        if self._notes is not None:
            self._notes.put()
        if len(ring.unpublished) >= _FEW or not ring.has_requests:
            self.publish()
        else:
            self._publish_if_late()
        statistics.count_batch(requests)
        words[count.READS] += reads
        words[count.BYTES_READ] += bytes_read
        if writes:
            words[count.WRITES] += writes
            words[count.BYTES_WRITTEN] += bytes_written
            disk.count_memory()
        words[count.IN_FLIGHT] = len(unanswered)
        self._is_slow = stopwatch.now - stopwatch.taken > requests * _SLOW + stopwatch.error
        if self._is_slow:
            self._look = 1
        stall.is_amid = False
        self.wakeups.spurious = 0
        self._idle.worked()

    def _follow(self, moves: Moves) -> tuple[Move, Move]:
        """Return what reads and what writes, and notes that if anything does."""
        if moves is not self._moves:
            if self._notes is not None:
                self._notes.put()
            self._moves, self._notes = moves, None
            self._reading, self._writing = moves.read, moves.write
            if moves.noting is not None:
                self._notes = notes = moves.noting(self.number, self._is_concurrent)
                self._reading = notes.reading(moves.read)
                self._writing = notes.writing(moves.write)
        return self._reading, self._writing

    def _do_run(self) -> int:
        """Do the requests that were joined; how many bytes were moved at once."""
        run, disk, words = self._joined, self._disk, self._statistics.words
        if self._notes is not None:
            self._notes.put()
        requests, length = run.requests, run.end - run.start
        is_read = run.operation == READ
        status = (disk.serve_read if is_read else disk.serve_write)(run.buffers, run.start, length)
        if status == OKAY or (status is not None and len(requests) == 1):
            shift, counts = 0 if is_read else WRITES, self._stopwatch.counts
            for id_, kind, _, _ in requests:
                counts[kind + shift] += 1
                self._ring.respond(encode_response(id_, run.operation, status))
            words[count.READS if is_read else count.WRITES] += len(requests)
            words[count.BYTES_READ if is_read else count.BYTES_WRITTEN] += length
            if not is_read:
                disk.count_memory()
        else:
            length = 0
            if status is not None:
                disk.statistics.add(count.ERRORS, -1)  # those of its requests count
            run.buffers.clear()
            for _, _, slot, descriptors in requests:
                self._begin(slot, descriptors, waits=status is None)
                self._publish_if_late()
        run.clear()
        return length

    def publish(self) -> bool:
        """Publish what is answered; tell if that is anything."""
        ring = self._ring
        responses = ring.unpublished
        if responses:
            if self._notes is not None:
                self._notes.put()
            self._statistics.words[count.REQUESTS] += len(responses)
            begun = self._unanswered
            waiting: Sequence[bytes] = ()
            if begun or self._inherited:
                waiting = [*(each.slot for each in begun.values()), *self._inherited]
            self._journal.note(ring.published, responses, waiting)
            self._stall.moves += 1
            if ring.push():
                self._channel.notify()
            self._stopwatch.published()
            return True
        return False

    def _publish_if_late(self) -> bool:
        """Publish if that was not done for the time's sake lately, or always; tell if so.

        A disk may be slow: always, if it was in the last batch. One that is quick publishes once
        too often in so many milliseconds, and looks at the clock no oftener than that.
        """
        if not self._is_slow:
            now = coarse()
            if now - self._looked_at < _LATE:
                return False
            self._looked_at = now
        self.publish()
        return True

    # -- one request -------------------------------------------------------------------

    def _begin(self, slot: bytes, descriptors: bytes | None, *, waits: bool) -> None:
        """Do any request, or have it done.

        Args:
            slot: a private copy.
            descriptors: those of an indirect request, if they were copied already.
            waits: that a read or write is not done at once is known.
        """
        if self._notes is not None:
            self._notes.put()
        begun = self._judge(slot, descriptors)
        if begun is None:
            return
        disk, request, buffers = self._disk, begun.request, begun.acquired.buffers
        is_barrier = request.operation == WRITE_BARRIER
        if is_barrier:
            self._drain()  # what came before is done before
        self._unanswered[id(begun)] = begun
        begun.since = perf_counter()
        status = None
        if self._has_given_up:
            status = RETRY
        elif isinstance(request, Transfer) and request.operation <= WRITE and not waits:
            do = disk.serve_read if request.operation == READ else disk.serve_write
            status = do(buffers, request.sector * SECTOR, request.sectors * SECTOR)
        if status is None:
            status = self._do(begun)
        if status is not None:
            self._end(begun, status)
        if is_barrier:
            self._drain()  # what comes after waits for it, though it be held

    def _do(self, begun: _Begun) -> int | None:
        """Do a request, however long it takes; None if a worker does."""
        disk, request = self._disk, begun.request
        if isinstance(request, Discard):
            call = partial(disk.serve_discard, request, partial(self._note_progress, begun))
        else:
            buffers = begun.acquired.for_thread() if self._is_concurrent else begun.acquired.buffers
            call = partial(disk.transfer, request, buffers)
        begun.since = perf_counter()
        try:
            if disk.begin(request, begun.acquired.buffers, begun):
                self._with_backend += 1
                return None
        except Exception as error:  # noqa: BLE001 - whatever an author's code raises
            return disk.outcome(request, error)
        if not self._is_concurrent:
            return call()
        begun.since = inf  # until there is a thread for it
        pause, later = disk.pause(request, call)
        self._workers.submit(partial(_timed, begun, later), begun, pause)
        return None

    def _note_progress(self, begun: _Begun) -> None:
        """Let the watchdog know that a request, though it takes long, has not stalled."""
        begun.since = perf_counter()
        if not self._is_concurrent:
            self._stall.moves += 1

    def _judge(self, slot: bytes, descriptors: bytes | None) -> _Begun | None:
        """Decode a request and borrow its pages; None if it was refused, and that answered."""
        disk, pages = self._disk, self._pages
        request = self._abi.decode(slot, self._max_indirect_segments)
        try:
            if isinstance(request, Indirect):
                if descriptors is None:  # copied once, and the copy is read (XSA-155)
                    descriptors = pages.read(request.grefs, 8 * request.segments)
                request = resolve(request, descriptors)
            if isinstance(request, Malformed):
                reason, status = request.reason, request.status
            else:
                refusal = disk.refusal(request)
                if refusal is None:
                    acquired = GuestBuffers([])
                    if isinstance(request, Transfer) and request.grefs:
                        if descriptors is None:
                            start = self._abi.segments_at
                            descriptors = slot[start : start + 8 * len(request.grefs)]
                        acquired = pages.acquire(request, descriptors)
                    return _Begun(slot, request, acquired, self._stopwatch.start)
                reason, status = refusal
        except (HypervisorError, MemoryError) as error:
            reason, status = str(error) or "no memory", ERROR
        disk.refuse(reason)
        self._ring.respond(encode_response(request.id, request.operation, status))
        return None

    def _end(self, begun: _Begun, status: int) -> None:
        """Give a request's pages back, count it, and put its answer; or queue it for retry."""
        if status == RETRY:
            if not self.is_stopping:
                self._retry_later(begun)
                return
            self._disk.statistics.add(count.ERRORS)
            status = failure(begun.request.operation)
        request, unanswered = begun.request, self._unanswered
        if begun.was_retried:
            begun.was_retried = False  # should this be cut short, and done again
            self._retries.ended()
            self._disk.retried(succeeded=status == OKAY)
        try:
            begun.acquired.release(deliver=status == OKAY)
        except HypervisorError as error:
            self._disk.refuse(str(error))
            status = ERROR
        self._statistics.count_request(request)
        self._stopwatch.end(histogram_of(request), begun.start)
        if request.operation != READ:
            self._disk.count_memory()
        response = encode_response(request.id, request.operation, status)
        del unanswered[id(begun)]
        self._ring.respond(response)

    def end_finished(self) -> bool:
        """Answer what the workers have done; False if that is nothing."""
        before = len(self._unanswered)
        finished = self._workers.collect() if self._is_concurrent else []
        if self._many is not None:
            finished += self._collect(self._many)
        for begun, status in finished:
            self._end(begun, status)
        done = before - len(self._unanswered)
        self.publish()
        self._statistics.words[count.IN_FLIGHT] -= done  # a batch may be under way
        return bool(finished or done)

    def _collect(self, many: Asynchronous) -> list[tuple[_Begun, int]]:
        """Answer what an asynchronous backend has done well and :meth:`_serve` had it begin.

        Returns:
            The rest, with their statuses.
        """
        over = many.collect()
        self._with_backend -= len(over)
        unanswered, words, ring = self._unanswered, self._statistics.words, self._ring
        rest = []
        for begun, error in over:
            if type(begun) is _Known:
                operation = begun.operation
                if error is None:
                    response = encode_response(begun.id, operation, OKAY)
                    del unanswered[id(begun)]
                    is_read = operation == READ
                    words[count.READS if is_read else count.WRITES] += 1
                    words[count.BYTES_READ if is_read else count.BYTES_WRITTEN] += begun.length
                    kind = begun.kind if is_read else begun.kind + WRITES
                    self._stopwatch.end_known(kind, begun.start)
                    ring.respond(response)
                    continue
                del unanswered[id(begun)]
                start = begun.start
                begun = self._judge(begun.slot, begun.descriptors)  # noqa: PLW2901 - the same
                if begun is None:
                    continue  # the disk became shorter meanwhile
                begun.start = start
                unanswered[id(begun)] = begun
            rest.append((begun, self._disk.outcome(begun.request, error)))
        return rest

    def catch_up(self) -> bool:
        """Answer what was done elsewhere, or try again what is due; False if there is nothing.

        To be called while it waits, in its own turn or another queue's.
        """
        retries = self._retries
        if retries and (self.is_stopping or retries.is_due):
            self._retry()
            return True
        return self.end_finished()

    # -- requests that the storage could not do ----------------------------------------

    def _retry_later(self, begun: _Begun) -> None:
        """Keep a request, to try it again; the guest waits, and knows of nothing."""
        begun.since = inf
        if not begun.was_retried:
            self._disk.queued_for_retry()
        begun.was_retried = True
        self._retries.add(begun)
        self._statistics.words[count.HELD] = len(self._retries)

    def _retry(self) -> None:
        """Try again what failed; if we are to stop, that is answered with errors."""
        retries = self._retries
        taken = retries.take()
        self._has_given_up |= self.is_stopping
        before = len(self._unanswered)
        while taken:
            begun = taken.pop(0)
            status = RETRY if self.is_stopping else self._do(begun)
            if status is not None:
                self._end(begun, status)
                self._publish_if_late()
            if retries or retries.is_paused:  # no better than before: spare the storage the others
                retries.put_back(taken)
                break
        words = self._statistics.words
        words[count.HELD] = len(retries)
        words[count.IN_FLIGHT] -= before - len(self._unanswered)
        self.publish()

    # -- waiting -----------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait until the workers have done what they were given, and nothing is held."""
        stall, retries = self._stall, self._retries
        is_amid, stall.is_amid = stall.is_amid, False  # what is under way counts by itself
        while self.is_any_elsewhere or retries:
            if not self.catch_up():
                self._thread.wait(self)
                self._stopwatch.look()
        stall.is_amid = is_amid

    def _refuse_the_rest(self) -> None:
        """Answer what waits on the ring with errors: a guest cut off must not wait indefinitely.

        A frontend that has closed left nothing; Linux does not finish removing a disk as long
        as one request of it is unanswered.
        """
        ring, abi = self._ring, self._abi
        try:
            self.publish()  # what was done, whatever the ring has shown since
            if not (self._resumes or self._unanswered):
                ring.give_back()  # what an error has left of a batch
            slots = b"".join(self._inherited) + ring.take()
            self._inherited.clear()
            for at in range(0, len(slots), abi.slot_size):
                request = abi.decode(slots[at : at + abi.slot_size], self._max_indirect_segments)
                status = failure(request.operation)
                ring.respond(encode_response(request.id, request.operation, status))
            self.publish()
        except (GuestMisbehaved, HypervisorError) as error:
            log.debug("%s", error)
        except ValueError:
            pass  # unmapped under us: the backend returned after it had been given up
