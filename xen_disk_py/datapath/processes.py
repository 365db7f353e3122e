"""A process for each queue, so that one interpreter's lock does not keep them one at a time.

::

    session, xenstore, control                      a fork for each queue that is offered
    Device ── RemoteQueue ═══ a call, its answer ═══ _Server ── Queue ── Disk ── the image,
                          ◄── failures, its end ────                             opened once more

They are forked before this process starts a thread, once; a guest that connects again is served by
the same ones, and one that uses fewer queues leaves the rest asleep. A fork inherits the locks on
record and image, and the record's memory, where journals and counters are each queue's own.

One that gives no answer in time (SIGSTOP, storage that hangs) is asked nothing more until it has
given it. What it was told it does then, in that order.

They live and die together. A fork ends when its parent does: the kernel kills it, and its socket
is closed. When one of them ends, this process does, at once and without cleaning up: that is what a
successor can take over from, as soon as the last of them has given back the locks.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Callable, NoReturn, Optional, Protocol

from ..blkif import Abi, Ring, abi_named
from ..errors import DeviceError, HypervisorError, XenDiskError
from ..exit_status import ExitStatus
from ..host.process import end_with_parent, is_stopped, start_time
from ..hypervisor import Closing, Hypervisor
from .disk import Disk
from .journal import Journal
from .queue import Options, Queue
from .statistics import Counters
from .workers import MORE

log = logging.getLogger("xen_disk_py")

_MESSAGE = 1 << 16  # bytes; none comes near
_TEXT = 2000  # letters of a failure that is told
_END = 5.0  # seconds until a fork that the kernel keeps is left to it
ANSWER = 5.0
"""Seconds that one may take to answer: it does at once, unless it is stopped or storage hangs."""
_GLANCE = 0.05  # seconds that one which has taken longer is waited for, each time
_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""Signals that are for the session: a terminal and systemd send them to its forks, too."""


Identities = tuple[tuple[int, Optional[int]], ...]
"""Of processes: the id of each, and when it was started."""


class Interrupts(Protocol):
    """What comes from outside meanwhile: see :class:`~xen_disk_py.session.Interrupts`."""

    @property
    def asked(self) -> bool:
        """Whether we are to end."""

    def fileno(self) -> int:
        """Return a descriptor that polls readable when something has come."""

    def drain(self) -> None:
        """Make it quiet again."""


class QueueProcesses(Closing):
    """The processes of one disk's queues; made before this process starts a thread.

    Args:
        disk: what they serve; its statistics and journals are in shared memory.
        options: how their queues work.
        journals: one for each queue.
        prepare: called in each, with the number of its queue: opens the hypervisor there, and gives
            up privileges.
        crash: called in one of them when its queue stops for an error of its own, and does not
            return; None: what the device gives is called here.
        interrupts: end the wait for one that does not come to open the disk; None: signals raise.
        on_forked: called with :attr:`identities` before that wait.

    Raises:
        XenDiskError: one of them cannot be had, or we are told to end.
    """

    def __init__(
        self,
        disk: Disk,
        options: Options,
        journals: Sequence[Journal],
        prepare: Callable[[int], Hypervisor],
        *,
        crash: Callable[[Exception], object] | None = None,
        interrupts: Interrupts | None = None,
        on_forked: Callable[[Identities], object] = lambda identities: None,
    ) -> None:
        if threading.active_count() != 1:
            raise RuntimeError("a thread has been started: what it holds, a fork holds forever")
        self._disk = disk
        self._on_failure: Callable[[Exception], None] = lambda error: None
        self._is_over = False
        self._forks: list[_Fork] = []
        self._watcher = threading.Thread(target=self._watch, name="queues", daemon=True)
        disk.share()
        gc.collect()
        gc.freeze()  # a collection would write to each object's header, and so copy its page
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
        try:
            for number, journal in enumerate(journals):
                fork = _Fork()
                if not fork.pid:
                    _Server(fork, parent, number, disk, options, journal, prepare, crash).be(
                        self._forks, before
                    )
                self._forks.append(fork)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            on_forked(self.identities)
            for fork in self._forks:
                self._await_ready(fork, interrupts)
            self._watcher.start()
        except BaseException as error:
            self.close()
            if isinstance(error, (OSError, RuntimeError)):
                raise DeviceError(
                    f"the queues cannot have processes of their own ({error}): {MORE}"
                ) from error
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for fork in self._forks:
            fork.is_watched = True
        disk.elsewhere = self

    @property
    def identities(self) -> Identities:
        """The process ids, and when each was started."""
        return tuple((fork.pid, start_time(fork.pid)) for fork in self._forks)

    def _await_ready(self, fork: _Fork, interrupts: Interrupts | None) -> None:
        """Wait until one has opened the disk, however long its storage takes."""
        number, is_said = fork.ask("ready"), False
        poller = select.poll()
        poller.register(fork.commands, select.POLLIN)
        if interrupts is not None:
            poller.register(interrupts.fileno(), select.POLLIN)
        while True:
            left = ANSWER - fork.silent_for
            if left <= 0:
                text = f"process {fork.pid}, of a queue, has not opened {self._disk.backend}"
                if interrupts is not None and interrupts.asked:  # before that, it ends as ever
                    raise DeviceError(f"{text}: given up")
                if not is_said:
                    is_said = True
                    log.warning("%s within %g s; /proc/%d/stack shows why", text, ANSWER, fork.pid)
            woken = poller.poll(left * 1000 if left > 0 else None)
            if any(each == fork.commands.fileno() for each, _ in woken):
                break
            if interrupts is not None and woken:
                interrupts.drain()
        fork.wait_for(number, None)

    def open_queue(
        self,
        hypervisor: Hypervisor,
        domid: int,
        ring: Ring,
        abi: Abi,
        disk: Disk,
        *,
        options: Options,
        persistent: bool,
        sharers: int,
        number: int,
        journal: Journal | None,
        statistics: Counters,
        on_failure: Callable[[Exception], None],
    ) -> RemoteQueue:
        """Return queue ``number``; its process, which has the rest, opens it."""
        self._on_failure = on_failure
        arguments = {
            "domid": domid,
            "refs": ring.refs,
            "port": ring.event_channel,
            "abi": abi.name,
            "persistent": persistent,
            "sharers": sharers,
        }
        return RemoteQueue(self._forks[number], disk, arguments)

    def check(self) -> None:
        """See that all of them answer.

        Raises:
            DeviceError: one does not.
        """
        for fork in self._forks:
            fork.settle()
        self._tell_all("check")

    def admit(self, sectors: int) -> None:
        """Have all of them admit requests up to there, and no others.

        Raises:
            DeviceError: one gives no answer; it does so later, before what it is told after this.
        """
        self._tell_all("admit", sectors=sectors)

    def resize(self, size: int) -> None:
        """Have all of them use the storage as it is now, ``size`` bytes long.

        Raises:
            XenDiskError: one cannot, or gives no answer.
        """
        self._tell_all("resize", size=size)

    def _tell_all(self, do: str, **arguments: Any) -> None:
        """Have all do something at once; each is told, whatever comes of it in the others."""
        errors = []
        for fork, number in [(fork, fork.ask(do, **arguments)) for fork in self._forks]:
            try:
                fork.wait_for(number)
            except XenDiskError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _watch(self) -> None:
        """Be told of failures, and of their end."""
        poller = select.poll()
        forks = {fork.told.fileno(): fork for fork in self._forks}
        for descriptor in forks:
            poller.register(descriptor, select.POLLIN)
        while forks:
            for descriptor, _ in poller.poll():
                fork = forks[descriptor]
                try:
                    if message := fork.told.recv(_MESSAGE):
                        self._dispatch(json.loads(message))
                        continue
                except Exception:
                    log.exception("process %d, of a queue, says what makes no sense", fork.pid)
                if not self._is_over:
                    self._follow(fork)
                poller.unregister(descriptor)
                del forks[descriptor]

    def _dispatch(self, told: dict[str, str]) -> None:
        if "error" in told:
            self._disk.on_error(told["error"])
        else:
            self._on_failure(DeviceError(told["failure"]))

    def _follow(self, fork: _Fork) -> NoReturn:
        """End as that process did: its queue's requests wait for whoever takes the disk over."""
        log.error("process %d, of a queue, has ended: the disk is left to another", fork.pid)
        for each in self._forks:
            each.kill()  # and no more: another thread may ask one, and clean up after an error
        logging.shutdown()
        os._exit(ExitStatus.CRASHED)

    def kill(self) -> None:
        """End them at any instant, as a crash would; the journals say what is to be done again."""
        self._is_over = True
        for fork in self._forks:
            fork.kill()
            fork.commands.close()

    def end(self) -> None:
        """End them, and wait for that however long the kernel keeps one of them."""
        self.kill()
        for fork in self._forks:
            fork.reap(None)

    def close(self) -> None:
        """End them when their queues have stopped, or are to be given up."""
        self.kill()
        deadline = time.monotonic() + _END
        for fork in self._forks:
            if not fork.reap(deadline):
                log.error("process %d, of a queue, ends when its storage returns", fork.pid)
        if self._watcher.ident is not None:
            self._watcher.join(_END)
        if not self._watcher.is_alive():
            for fork in self._forks:
                fork.told.close()


class RemoteQueue:
    """A queue in a process of its own, to be used as one that is here.

    Args:
        fork: the process.
        disk: what it serves.
        arguments: what the process does not know yet.
    """

    def __init__(self, fork: _Fork, disk: Disk, arguments: dict[str, Any]) -> None:
        self._fork = fork
        self._disk = disk
        self._arguments = arguments

    @property
    def stalled_for(self) -> float:
        """For how many seconds a request has been under way and nothing moved; 0 if none is.

        As long as its process gives no answer, nothing moves.
        """
        try:
            return float(self._fork.call("stalled_for"))
        except _Unanswered:
            return self._fork.silent_for

    def start(self) -> bool:
        """Begin to serve; False if the system gives no thread, or its process no answer.

        Raises:
            XenDiskError: as :class:`Queue` does.
        """
        try:
            return bool(self._fork.call("start", sectors=self._disk.sectors, **self._arguments))
        except _Unanswered as error:
            self._disk.say(logging.ERROR, f"a ring is not served yet: {error}")
            return False

    def ask_to_stop(self) -> None:
        """Have it come to its end."""
        with suppress(_Unanswered):
            self._fork.call("ask_to_stop")

    def stop(self, timeout: float | None = None) -> bool:
        """Wait for its end, so long at most; tell whether that has come."""
        try:
            return bool(self._fork.call("stop", timeout, timeout=timeout))
        except _Unanswered:
            return False

    def pause_retries(self, paused: bool) -> None:
        """Do nothing: it queues nothing for retry."""


class _Unanswered(DeviceError):
    """A process gives no answer, for now."""


class _Fork:
    """A process: here what talks to it; there, where ``pid`` is 0, the other ends of that.

    Attributes:
        commands: calls there, and their answers.
        told: failures that nobody has asked for; its end is the process's.
        is_watched: somebody ends this process when that one has ended.
    """

    def __init__(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        self.is_watched = False
        self._numbers = itertools.count(1)
        self._asked = self._answered = 0  # the last number of each
        self._silent_since = 0.0
        self._is_reaped = False
        try:
            self.pid = os.fork()
        except OSError:
            for end in (*pairs[0], *pairs[1]):
                end.close()
            raise
        ours = 0 if self.pid else 1
        self.commands, self.told = pairs[0][ours], pairs[1][ours]
        for pair in pairs:
            pair[1 - ours].close()

    def kill(self) -> None:
        """Kill it; it may be another user's as long as we are, then the end of its socket does."""
        if not self._is_reaped:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def silent_for(self) -> float:
        """For how many seconds it has owed an answer and given none; 0 if it owes none."""
        return time.monotonic() - self._silent_since if self._answered < self._asked else 0.0

    def call(self, do: str, patience: float | None = 0.0, /, **arguments: Any) -> Any:
        """Have something done there, and return what comes of it.

        Args:
            do: what.
            patience: seconds that this may take there; None: however long.
            arguments: of that.

        Raises:
            _Unanswered: there is no answer in time.
            XenDiskError: what it raised there.
        """
        self.settle()
        return self.wait_for(self.ask(do, **arguments), patience)

    def ask(self, do: str, **arguments: Any) -> int:
        """Have something done there; return the number of the answer."""
        if self._answered >= self._asked:
            self._silent_since = time.monotonic()
        number = next(self._numbers)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.commands.send(json.dumps([number, do, arguments]).encode())
        self._asked = number
        return number

    def settle(self) -> None:
        """Wait for the answers that it owes: a signal may have cut short whoever had asked.

        Raises:
            _Unanswered: they do not come in time.
        """
        try:
            if self._answered < self._asked:
                self.wait_for(self._asked)
        except _Unanswered:
            raise
        except XenDiskError:
            pass

    def wait_for(self, wanted: int, patience: float | None = 0.0) -> Any:
        """Return the answer of that number; those before it are nobody's any longer.

        Raises:
            as :meth:`call`.
        """
        poller = select.poll()
        poller.register(self.commands, select.POLLIN)
        while True:
            left = None
            if patience is not None:
                left = max(ANSWER - self.silent_for, _GLANCE) + patience
            if not poller.poll(None if left is None else left * 1000):
                raise _Unanswered(self._why())
            try:  # it stays there until it is noted: a signal may raise anything anywhere
                message = self.commands.recv(_MESSAGE, socket.MSG_PEEK)
            except ConnectionResetError:
                message = b""
            if not message:
                break
            number, answer, error, code = json.loads(message)
            self._answered, self._silent_since = number, time.monotonic()
            self.commands.recv(_MESSAGE)
            if number == wanted:
                if error is None:
                    return answer
                raise DeviceError(error) if code is None else _with_errno(code, error)
        while self.is_watched:
            time.sleep(1)  # this is the end; nothing may be cleaned up
        raise DeviceError("the process of a queue has ended")

    def _why(self) -> str:
        text = f"process {self.pid}, of a queue, has not answered within {ANSWER:g} s"
        if is_stopped(self.pid):
            return f"{text}, since it is stopped: kill -CONT {self.pid}"
        return f"{text}: /proc/{self.pid}/stack shows what it waits for; try again"

    def reap(self, deadline: float | None) -> bool:
        """Wait for its end; False if the deadline is earlier."""
        while not self._is_reaped:
            wait = 0 if deadline is None else os.WNOHANG
            with suppress(ChildProcessError):
                if os.waitpid(self.pid, wait)[0] != self.pid:
                    if deadline is not None and time.monotonic() >= deadline:
                        return False
                    time.sleep(0.001)
                    continue
            self._is_reaped = True
        return True


def _with_errno(code: int, text: str) -> HypervisorError:
    return HypervisorError(code, text[: -len(f": {os.strerror(code)}")])


class _Server:
    """What a fork does: calls, one after the other, until its parent has gone."""

    def __init__(
        self,
        fork: _Fork,
        parent: int,
        number: int,
        disk: Disk,
        options: Options,
        journal: Journal,
        prepare: Callable[[int], Hypervisor],
        crash: Callable[[Exception], object] | None,
    ) -> None:
        self._fork = fork
        self._parent = parent
        self._number = number
        self._disk = disk
        self._options = options
        self._journal = journal
        self._prepare = prepare
        self._crash = crash
        self._hypervisor: Hypervisor | None = None
        self._queue: Queue | None = None

    def be(self, others: Sequence[_Fork], mask: set[Any]) -> NoReturn:
        """Be the new process, for which signals are as they were before the fork.

        Args:
            others: its elders, whose ends are not for it.
            mask: the signals that were blocked then.
        """
        try:
            signal.set_wakeup_fd(-1)
            for signum in _OURS:
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for fork in others:
                fork.commands.close()
                fork.told.close()
            while True:
                self._answer()
        except BaseException as error:
            log.error("the process of a queue ends", exc_info=error)
        finally:
            logging.shutdown()
            os._exit(ExitStatus.CRASHED)

    def _answer(self) -> None:
        commands = self._fork.commands
        message = commands.recv(_MESSAGE)
        if not message:
            os._exit(0)
        number, do, arguments = json.loads(message)
        answer = error = code = None
        try:
            answer = getattr(self, f"_{do}")(**arguments)
        except HypervisorError as failure:
            error, code = str(failure), failure.errno
        except (XenDiskError, OSError) as failure:
            error = str(failure)
        with suppress(BrokenPipeError):
            commands.send(json.dumps([number, answer, error, code]).encode())

    def _ready(self) -> None:
        self._disk.on_error = self._tell_error
        end_with_parent(self._parent)  # it may take long to open the disk
        self._disk.after_fork(self._number)  # as long as this may open files
        self._hypervisor = self._prepare(self._number)
        end_with_parent(self._parent)  # another user's

    def _check(self) -> None:
        """Answer."""

    def _start(
        self,
        *,
        domid: int,
        refs: Sequence[int],
        port: int,
        abi: str,
        persistent: bool,
        sharers: int,
        sectors: int,
    ) -> bool:
        """Serve a ring; it may be served already, if nobody waited for that answer."""
        assert self._hypervisor is not None
        if self._queue is None:
            self._disk.sectors = sectors
            self._queue = Queue(
                self._hypervisor,
                domid,
                Ring(tuple(refs), port),
                abi_named(abi, ""),
                self._disk,
                options=self._options,
                persistent=persistent,
                sharers=sharers,
                number=self._number,
                journal=self._journal,
                statistics=self._disk.statistics.of_queue(self._number),
                on_failure=self._fail,
            )
        return self._queue.start()

    def _stalled_for(self) -> float:
        return 0.0 if self._queue is None else self._queue.stalled_for

    def _ask_to_stop(self) -> None:
        if self._queue is not None:
            self._queue.ask_to_stop()

    def _stop(self, *, timeout: float | None) -> bool:
        if self._queue is None or self._queue.stop(timeout):
            self._queue = None
        return self._queue is None

    def _admit(self, *, sectors: int) -> None:
        self._disk.admit(sectors)

    def _resize(self, *, size: int) -> None:
        if self._disk.backend.resize(size) != size:
            raise DeviceError(f"{self._disk.backend} has not become {size} bytes long here")

    def _fail(self, error: Exception) -> None:
        """The queue's thread stops: whoever takes the disk over must find it as it is now."""
        if self._crash is not None:
            self._crash(error)
        self._tell({"failure": f"{type(error).__name__}: {error}"[:_TEXT]}, 0)

    def _tell_error(self, text: str) -> None:
        self._tell(
            {"error": text[:_TEXT]}, socket.MSG_DONTWAIT
        )  # a guest causes as many as it likes

    def _tell(self, told: dict[str, str], flags: int) -> None:
        with suppress(OSError):
            self._fork.told.send(json.dumps(told).encode(), flags)
