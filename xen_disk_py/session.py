"""One disk from attaching to cleaning up: makes the nodes, drives the device, removes them.

Everything that can end a disk's life comes together here: signals, the guest, the toolstack,
xenstore, a failure of our own. Whatever it was, the queue is stopped and unmapped first, the
nodes go next.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from types import FrameType
from typing import Callable

from .errors import DeviceError, StoreError, StoreLost, XenDiskError
from .host.systemd import Watchdog
from .ration import Ration
from .xenbus import toolstack
from .xenbus.device import Device
from .xenbus.states import State
from .xenbus.vdev import VirtualDevice
from .xenbus.xenstore import Store

log = logging.getLogger("xen_disk_py")

TICK = 0.5
"""Seconds between two updates of a progress display."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
_TOOLSTACK_PATIENCE = 5.0
_NEWS = 16, 100.0  # changes in xenstore that are looked at: at once, then so many a second
_RETRY = 1.0  # seconds between two tries to reach a xenstore that is away


class Outcome(Enum):
    """How a disk's life ended."""

    UNPLUGGED = "unplugged"
    DETACHED = "detached by the toolstack or with the guest"
    GUEST_GONE = "the guest has gone"
    FORCED = "unplugged by force"


class Forced(BaseException):
    """The user asked a second time."""


class Interrupts:
    """What comes to a session from outside: the user's signals, a failure of the queue.

    SIGINT, SIGTERM and SIGHUP: the first asks, the second forces. With ``hangup_resizes``,
    SIGHUP sets ``resize`` instead: the disk is to have its storage's current size.
    SIGUSR2 sets ``upgrade``: another program is to take the disk over.

    The first makes ``fileno`` readable and sets ``asked``; the second raises
    :class:`Forced` in the main thread wherever it is, unless ``calm`` is set; a session
    clears it while it serves.
    """

    def __init__(self, *, hangup_resizes: bool = False) -> None:
        self._hangup_resizes = hangup_resizes
        self.resize = False
        self.upgrade = False
        self.asked = False
        self.calm = True
        self.failure: Exception | None = None
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there is something to look at."""
        return self._read

    def fail(self, error: Exception) -> None:
        """Say that serving has stopped for an error of our own; from any thread."""
        self.failure = error
        self.wake()

    def wake(self) -> None:
        """Make ``fileno`` readable; from any thread."""
        try:
            os.write(self._write, b"x")
        except BlockingIOError:
            pass  # it is readable enough
        except OSError:
            if self._write >= 0:
                raise
            # else it is over, and nobody looks any longer: a request that hung came back

    def drain(self) -> None:
        """Make ``fileno`` quiet again."""
        try:
            while os.read(self._read, 4096):
                pass
        except BlockingIOError:
            pass

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGUSR2:
            self.upgrade = True
        elif signum == signal.SIGHUP and self._hangup_resizes:
            self.resize = True
        elif self.asked and not self.calm:
            self.calm = True
            raise Forced
        else:
            self.asked = True
        self.wake()

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Handle the signals; in the main thread only."""
        before = {signum: signal.signal(signum, self._handle) for signum in _SIGNALS}
        # Written by the C handler: a signal just before poll() would not end it otherwise.
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Blocked by the program that has become this one, if so: none is lost in between.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            descriptors = self._read, self._write
            self._read = self._write = -1
            for descriptor in descriptors:
                os.close(descriptor)


class Observer:
    """What whoever runs a session does at each turn of the disk's life; by default, nothing.

    All methods are called in the session's thread, in the order in which they stand here; but
    for :meth:`attach` and :meth:`release_nodes`, none may fail for a reason outside this process.
    """

    wants_ticks = False
    """Whether :meth:`tick` is to be called."""

    def attach(self) -> None:
        """Make the nodes, all or none."""

    def attached(self) -> None:
        """The nodes are there and nothing is served yet."""

    def serving(self) -> None:
        """Everything that the guest asks for is served; of a disk taken over, that is at once."""

    def connected(self) -> None:
        """The guest has the disk. Called once."""

    def tick(self) -> None:
        """Another :data:`TICK` seconds have passed, about, and the guest has the disk."""

    def upgrade_requested(self) -> None:
        """Another program is to take over; does not return if one does."""

    def unplugging(self) -> None:
        """The guest has been asked to release the disk."""

    def crashing(self, error: Exception) -> None:
        """Serving ends by an error of our own, and nothing is cleaned up yet.

        Does not return if the disk is left to a successor.
        """

    def release_nodes(self) -> bool:
        """Do at the end what is to be done in xenstore; False to have the nodes removed."""
        return False


class Session:
    """Serves one device until its end.

    Args:
        store: xenstore, connected.
        device: what serves it.
        vdev: its number and name.
        interrupts: how the user says stop, and the queue that it has failed.
        patience: seconds that the guest may take to connect; None for any time.
        is_known: the guest had the disk before, under a process that died: whether it is
            connected just now makes no difference.
    """

    def __init__(
        self,
        store: Store,
        device: Device,
        vdev: VirtualDevice,
        interrupts: Interrupts,
        *,
        patience: float | None,
        is_known: bool = False,
    ) -> None:
        self._store = store
        self._device = device
        self._vdev = vdev
        self._interrupts = interrupts
        self._patience = patience
        self._unplugging = False
        self._is_away_said = False
        self._is_known = is_known
        self._watchdog = Watchdog()
        self._is_stuck_said = False
        self._is_storage_changed = False
        self._news = Ration(*_NEWS)  # a guest decides how often there are any

    def run(self, observer: Observer) -> Outcome:
        """Attach, serve, and leave nothing behind.

        Raises:
            DeviceError: the guest did not connect in time, or serving failed.
        """
        interrupts = self._interrupts
        interrupts.calm = True  # the nodes are made as a whole
        observer.attach()
        forced = False
        try:
            try:
                observer.attached()
                interrupts.calm = False
                self._device.watch()
                self._serve(observer)
            finally:
                interrupts.calm = True  # and removed as a whole
        except Forced:  # may come as late as in the line above
            forced = True
        except Exception as error:
            if isinstance(error, StoreError) or not isinstance(error, XenDiskError):
                observer.crashing(error)
            raise
        finally:
            self._clean_up(observer, forced)
        if forced:
            return Outcome.FORCED
        if self._device.guest_gone:
            return Outcome.GUEST_GONE
        return Outcome.UNPLUGGED if self._unplugging else Outcome.DETACHED

    def _serve(self, observer: Observer) -> None:
        device, interrupts = self._device, self._interrupts
        is_serving = announced = False
        deadline = None if self._patience is None else time.monotonic() + self._patience
        self._attempt(device.update)
        while not device.finished:
            if not (is_serving or self._store.is_lost):
                is_serving = True
                observer.serving()
            if is_serving and not announced and (device.connected or self._is_known):
                announced = True
                observer.connected()
            waiting = not (announced or self._unplugging)
            if waiting and deadline is not None and time.monotonic() >= deadline:
                raise DeviceError(self._why_not_connected())
            self._sleep(deadline if waiting else None, ticking=announced and observer.wants_ticks)
            if interrupts.failure is not None:
                raise DeviceError(f"serving failed: {interrupts.failure!r}") from interrupts.failure
            if interrupts.asked and not self._unplugging:
                self._unplugging = True
                self._attempt(device.unplug)
                observer.unplugging()
            if interrupts.upgrade:
                interrupts.upgrade = False
                if not self._unplugging:
                    observer.upgrade_requested()
            if interrupts.resize:
                interrupts.resize = False
                self._attempt(partial(self._resize, self._device.resize, None))
            if self._is_storage_changed:
                self._is_storage_changed = False
                self._attempt(partial(self._resize, self._device.follow_storage))
            if self._store.is_lost:
                self._attempt(self._reconnect)
            else:
                self._attempt(self._look)
            if announced and observer.wants_ticks:
                observer.tick()

    def _sleep(self, deadline: float | None, *, ticking: bool) -> None:
        """Wait for xenstore, a signal, a failure, the deadline or the next tick."""
        interrupts = self._interrupts
        interrupts.drain()
        poller = select.poll()
        poller.register(interrupts.fileno(), select.POLLIN)
        waits: list[float] = []
        # What was told before the drain is seen here, what is told after it wakes the poll.
        if (
            interrupts.failure is not None
            or interrupts.resize
            or interrupts.upgrade
            or (interrupts.asked and not self._unplugging)
        ):
            waits.append(0.0)
        if self._store.is_lost:
            waits.append(_RETRY)
        elif self._news.pause:
            waits.append(self._news.pause)
        elif self._has_news:
            waits.append(0.0)
        else:
            poller.register(self._store.fileno(), select.POLLIN)
        notice = self._device.resize_notice
        if notice is not None:
            poller.register(notice, select.POLLIN)
        if deadline is not None:
            waits.append(max(0.0, deadline - time.monotonic()))
        if ticking:
            waits.append(TICK)
        watchdog = self._watchdog.interval
        if watchdog is not None:
            if self._device.stalled_for < watchdog:
                self._watchdog.ping()
            elif not self._is_stuck_said:
                self._is_stuck_said = True
                log.error("a request has not returned for %g s; the watchdog ends us", watchdog)
            waits.append(self._watchdog.pause() or watchdog / 2)
        ready = poller.poll(min(waits) * 1000 if waits else None)
        self._is_storage_changed = any(descriptor == notice for descriptor, _ in ready)

    def _attempt(self, step: Callable[[], None]) -> None:
        """Do a step that needs xenstore; if it is lost the step is done after it is back."""
        try:
            step()
        except StoreLost as error:
            log.debug("%s", error)

    @property
    def _has_news(self) -> bool:
        return self._store.has_pending or self._device.is_unsettled

    def _look(self) -> None:
        if self._news.pause:
            return  # they wait for their turn, all other duties do not
        if self._store.pending() or self._device.is_unsettled:
            self._news.take()
            self._device.update()

    def _resize(self, step: Callable[..., object], *arguments: object) -> None:
        try:
            step(*arguments)
        except StoreLost:
            raise
        except XenDiskError as error:
            log.error("not resized: %s", error)

    def _reconnect(self) -> None:
        try:
            self._store.reconnect()
        except XenDiskError as error:
            level = logging.DEBUG if self._is_away_said else logging.WARNING
            self._is_away_said = True
            log.log(level, "xenstore is away: %s; served, but cannot be detached", error)
            return
        self._is_away_said = False
        log.info("connected to xenstore again")
        self._device.store_reconnected()
        if self._unplugging:
            self._device.unplug()

    def _why_not_connected(self) -> str:
        state = self._device.frontend_state
        if state is State.INITIALISING:
            why = (
                "the guest has no block driver loaded (in a Linux guest: modprobe xen-blkfront), "
                "is paused or still booting (see --timeout)"
            )
        elif state in (State.CLOSING, State.CLOSED):
            why = "the guest's driver refused the disk; its kernel log says why"
        else:
            why = "the guest's driver began and did not finish; its kernel log may say why"
        return f"the guest did not connect within {self._patience:g} s: its state is {state}; {why}"

    def _clean_up(self, observer: Observer, forced: bool) -> None:
        """Stop serving and remove the nodes, from whatever state."""
        device = self._device
        try:
            if forced or self._store.is_lost:
                self._store.reconnect()  # the signal may have cut a conversation short
            if not (forced or device.finished or self._unplugging):
                self._unplugging = True
                device.ask_to_close()  # the guest is told before it is cut off
        except XenDiskError as error:
            log.debug("%s", error)
        if not device.finished and not device.force():
            log.error("the backend does not return; its pages stay mapped until we end")
        try:
            if not observer.release_nodes():
                self._remove_nodes()
        except XenDiskError as error:
            log.error(
                "%s; to remove what remains in xenstore: xen-disk disconnect %d %s",
                error,
                device.address.frontend_domid,
                self._vdev,
            )

    def _remove_nodes(self) -> None:
        self._let_toolstack_finish()
        toolstack.detach(self._store, self._device.address)

    def _let_toolstack_finish(self) -> None:
        """If a toolstack detaches the disk, let it see Closed and remove the nodes itself."""
        path = self._device.address.backend
        if self._unplugging or self._store.read(f"{path}/online") != "0":
            return
        deadline = time.monotonic() + _TOOLSTACK_PATIENCE
        while time.monotonic() < deadline and self._store.exists(path):
            poller = select.poll()
            poller.register(self._store.fileno(), select.POLLIN)
            if not self._store.has_pending:
                poller.poll(200)
            self._store.pending()
