"""How Ctrl-C, SIGTERM and SIGHUP end a command: what is not finished is undone, what hangs ends.

A handler of Python runs when the main thread comes back from the system. A call that waits for a
storage which does not answer (a hard NFS mount, FUSE, a Ceph cluster) does not come back for one.
So another thread looks whether a signal has been taken, and ends the process where it has not.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from types import SimpleNamespace
from typing import NoReturn

from ..exit_status import ExitStatus
from .environment import Environment

log = logging.getLogger("xen_disk_py")

ANSWER = 5.0
"""Seconds in which a storage opens; after that a line says that it has not."""
_GRACE = 1.0  # seconds in which the main thread takes a signal, unless the system keeps it
_ENDS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_signals = SimpleNamespace(taken=0)


def _interrupt(_signum: int, _frame: object) -> NoReturn:
    _signals.taken += 1
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise ``KeyboardInterrupt``, as Ctrl-C does; not if ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python's rule for signal()
        yield
        return
    signals = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    ]
    before = {number: signal.signal(number, _interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_though_it_hangs(env: Environment, what: str | None = None) -> Iterator[None]:
    """Have Ctrl-C end this process inside, whatever the system keeps it in.

    There is a thread more inside, and none after it. Where none is to be had, nothing ends it.

    Args:
        env: where to say so.
        what: is opened inside: after a while it is said that it is not, and what is blocked ends
            us, too. None: there may be something to undo, so only the second Ctrl-C ends us.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(env, what)
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    wakeup = signal.set_wakeup_fd(watch.write, warn_on_full_buffer=False)
    try:
        watch.start()
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        watch.close()


class _Watch:
    """The thread that looks whether signals are taken.

    Attributes:
        write: a descriptor to which Python writes the numbers of those that come.
    """

    def __init__(self, env: Environment, what: str | None) -> None:
        self._env = env
        self._what = what
        self._is_final = what is not None
        self._taken = _signals.taken
        self._read, self.write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        try:
            self._thread.start()
        except RuntimeError as error:
            log.debug("Ctrl-C ends nothing that hangs: %s", error)

    def close(self) -> None:
        """Look no more."""
        os.close(self.write)  # the thread sees that
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._read)

    def _run(self) -> None:
        asked_at, look_at = inf, time.monotonic() + (_GRACE if self._what is None else ANSWER)
        is_said = self._what is None
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # the main thread's
        poller = select.poll()
        poller.register(self._read, select.POLLIN)
        while True:
            due = min(look_at, asked_at + _GRACE)
            if poller.poll(max(0.0, due - time.monotonic()) * 1000 + 1):
                numbers = os.read(self._read, 64)
                if not numbers:
                    return
                if _ENDS.intersection(numbers):
                    asked_at = min(asked_at, time.monotonic())
            if self._taken != _signals.taken:
                self._taken, asked_at = _signals.taken, inf
            now = time.monotonic()
            if now >= asked_at + _GRACE:
                asked_at = inf
                self._end()
            if now >= look_at:
                look_at = now + _GRACE
                # No handler runs, which would have told us, while the kernel keeps the main thread;
                # nor does one for what is blocked there, since a program has become this one.
                if signal.sigpending():  # of what is blocked here
                    asked_at = min(asked_at, now)
                if not is_said:
                    is_said = True
                    log.warning(
                        "%s is not open after %g s; /proc/%d/stack shows what it waits for, Ctrl-C "
                        "gives up",
                        self._what,
                        ANSWER,
                        os.getpid(),
                    )

    def _end(self) -> None:
        """End the process; or say that the next Ctrl-C does."""
        pid, is_final, self._is_final = os.getpid(), self._is_final, True
        if is_final:
            text = f"given up; if process {pid} stays, the kernel keeps it for its storage's sake"
        else:
            text = f"the system does not return, /proc/{pid}/stack shows why: Ctrl-C again gives up"
        self._env.tell(f"{self._what}: {text}" if self._what is not None else text, logging.ERROR)
        if is_final:
            self._env.drain()
            os._exit(ExitStatus.INTERRUPTED)
