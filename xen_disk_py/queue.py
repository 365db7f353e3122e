"""One queue: a ring, its event channel, and the thread that serves them.

The loop is the whole data path::

    take all requests ─ for each: decode, check, map, do, unmap ─ put its response
    publish the responses ─ notify if the frontend asked for it
    nothing more to take? ask for a notification, look once more, sleep

Everything of the guest's that is decided upon is a private copy: the slot, and the pages of
an indirect request. Guest pages are handed to the backend for data only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from typing import Callable

from . import statistics as count
from .blkif import (
    ERROR,
    READ,
    SEGMENTS_PER_PAGE,
    Abi,
    Connection,
    Discard,
    Indirect,
    Malformed,
    Request,
    Transfer,
    encode_response,
    resolve,
)
from .disk import Disk
from .errors import GuestMisbehaved, HypervisorError, XenDiskError
from .grants import GuestPages
from .hypervisor import EventChannel, Hypervisor, Mapping
from .ring import BackRing

log = logging.getLogger("xen_disk_py")


class Queue:
    """Serves one ring of a frontend, from :meth:`start` to :meth:`stop`.

    Args:
        hypervisor: maps the ring and the data pages, binds the event channel.
        domid: the guest, from our own configuration.
        connection: what the frontend published, checked.
        abi: the layout it uses.
        disk: what does the requests.
        max_indirect_segments: what was offered; 0 if indirect requests were not.
        persistent_limit: how many pages to keep mapped.
        on_failure: called from the queue's thread when it stops for an error of its own.

    Raises:
        HypervisorError: the ring cannot be mapped or the channel not be bound.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        domid: int,
        connection: Connection,
        abi: Abi,
        disk: Disk,
        *,
        max_indirect_segments: int,
        persistent_limit: int,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._abi = abi
        self._disk = disk
        self._max_indirect_segments = max_indirect_segments
        self._on_failure = on_failure
        self._pages = GuestPages(hypervisor, domid, persistent_limit)
        with contextlib.ExitStack() as undo:
            self._mapping: Mapping = undo.enter_context(
                hypervisor.map_grants(domid, connection.ring_refs, writable=True)
            )
            self._ring = BackRing(self._mapping.view, abi.slot_size, hypervisor.fence)
            undo.callback(self._ring.close)
            self._channel: EventChannel = undo.enter_context(
                hypervisor.bind_interdomain(domid, connection.event_channel)
            )
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.pop_all()
        self._stopping = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="queue", daemon=True)

    def start(self) -> None:
        """Begin to serve; requests that wait on the ring already are found."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish the requests taken so far, refuse those that wait, unmap and unbind everything.

        Returns:
            False if the backend did not return within ``timeout`` seconds; then everything
            stays as it is and ``stop`` may be called again.
        """
        if self._wake_read < 0:
            return True  # stopped already
        if self._thread.ident is None:
            self._release()
        else:
            self._stopping = True
            os.write(self._wake_write, b"x")
            # Not join(): cut short by an exception, it takes a thread that runs for one that
            # has ended (Python before 3.13).
            if not self._ended.wait(timeout):
                return False
            self._thread.join()
        descriptors = self._wake_read, self._wake_write
        self._wake_read = -1
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _run(self) -> None:
        try:
            self._loop()
        except GuestMisbehaved as error:
            # The guest hurts nobody but itself: its ring is dead, the disk stays detachable.
            log.error("the guest's ring is not served any longer: %s", error)
        except Exception as error:
            log.debug("the queue's thread stopped", exc_info=True)
            self._on_failure(error)
        finally:
            try:
                self._refuse_the_rest()
                self._release()
            except XenDiskError as error:
                log.error("%s", error)
            finally:
                self._ended.set()

    def _release(self) -> None:
        """Unmap and unbind everything: in the queue's thread, where no signal cuts it short."""
        self._pages.close()
        self._ring.close()
        self._channel.close()
        self._mapping.close()

    def _loop(self) -> None:
        ring, channel, words = self._ring, self._channel, self._disk.statistics.words
        sleeper = select.poll()
        sleeper.register(channel.fileno(), select.POLLIN)
        sleeper.register(self._wake_read, select.POLLIN)
        while True:
            while not self._stopping:
                slots = ring.take()
                if slots:
                    self._serve(slots)
                elif not ring.arm():
                    break
            if self._stopping:
                return
            sleeper.poll()
            words[count.WAKEUPS] += 1
            channel.acknowledge()

    def _serve(self, slots: list[bytes]) -> None:
        """Do the requests in ``slots`` in their order, then publish all the answers."""
        ring, decode, perform = self._ring, self._abi.decode, self._perform
        limit = self._max_indirect_segments
        statistics = self._disk.statistics
        statistics.count_batch(len(slots))
        words = statistics.words
        words[count.IN_FLIGHT] = len(slots)
        for slot in slots:
            request = decode(slot, limit)
            ring.respond(encode_response(request.id, request.operation, perform(request)))
        words[count.REQUESTS] += len(slots)
        words[count.IN_FLIGHT] = 0
        if ring.push():
            self._channel.notify()

    def _refuse_the_rest(self) -> None:
        """Answer what waits on the ring with errors: a guest cut off must not wait for ever.

        A frontend that has closed left nothing; Linux does not finish removing a disk as long
        as one request of it is unanswered.
        """
        ring = self._ring
        try:
            for slot in ring.take():
                request = self._abi.decode(slot, self._max_indirect_segments)
                ring.respond(encode_response(request.id, request.operation, ERROR))
            if ring.push():
                self._channel.notify()
        except (GuestMisbehaved, HypervisorError) as error:
            log.debug("%s", error)
        except ValueError:
            pass  # unmapped under us: the backend returned after it had been given up

    def _perform(self, request: Request) -> int:
        """Do one request and unmap what only it needed; the result is its status."""
        disk, pages = self._disk, self._pages
        try:
            if isinstance(request, Discard):
                return disk.discard(request)
            what = self._resolve(request) if isinstance(request, Indirect) else request
            if isinstance(what, Malformed):
                return disk.refuse(what.reason, what.status)
            reason = disk.refusal(what)
            if reason is not None:
                return disk.refuse(reason)
            disk.statistics.count_segments(len(what.grefs))
            if not what.grefs:
                return disk.transfer(what, ())
            # a read of the disk is a write to the guest's pages
            return disk.transfer(what, pages.pages(what.grefs, writable=what.operation == READ))
        except HypervisorError as error:
            return disk.refuse(str(error), ERROR)
        finally:
            pages.give_back()

    def _resolve(self, request: Indirect) -> Transfer | Malformed:
        """Copy the pages of an indirect request, once (XSA-155), and read the copy."""
        whole, rest = divmod(request.segments, SEGMENTS_PER_PAGE)
        sizes = [SEGMENTS_PER_PAGE * 8] * whole + [rest * 8] * bool(rest)
        views = self._pages.pages(request.grefs, writable=False)
        copy = b"".join(bytes(view[:size]) for view, size in zip(views, sizes))
        del views
        return resolve(request, copy)
