"""A process that is forked for each new one: what is imported is in memory once, for all of them.

A fork shares its parent's memory until one of them writes to a page, and it starts in milliseconds.
But what a thread holds, and what a library has opened, does not survive one. So the parent is a
process of its own, which imports, and does nothing else: no thread, no handle, no file.

It talks with whoever started it over a socket that keeps messages apart, a JSON object each:
``{"step": 1}`` and so on from it while it imports, ``{}`` when that is done; ``{"words": […]}``
there, ``{"pid": 5}`` or ``{"error": "…"}`` back; and ``{"pid": 5, "status": 0}`` when that process
has ended. It ends when the socket is closed; its children stay.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Callable

from ..errors import Forked
from .immortal import immortalize
from .process import CommandLine

_MESSAGE = 1 << 16  # bytes
_SILENT = "the process that forks does not answer"
_PATIENCE = 30.0  # seconds for a fork, which takes milliseconds; for imports, as long as it lives


def serve(name: Callable[[Sequence[str]], str], steps: Iterable[Callable[[], object]] = ()) -> None:
    """Fork as stdin, a socket, asks for it, until that is closed.

    Args:
        name: what ``ps`` shows of a process with these arguments.
        steps: what is done first, once for all; whoever waits for that hears of each.

    Raises:
        Forked: in each new process, in a session of its own and with nothing to read on stdin.
    """
    with ExitStack() as stack:
        asked = stack.enter_context(socket.socket(fileno=os.dup(0)))
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.close(null)
        for number, step in enumerate(steps, start=1):
            step()
            with suppress(OSError):  # whoever started us has gone, as we shall see
                asked.send(json.dumps({"step": number}).encode())
        wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, wake)
        stack.callback(os.close, woken)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(woken))
        before = signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        stack.callback(signal.signal, signal.SIGCHLD, before)
        line = CommandLine()
        gc.collect()
        immortalize()  # to use an object would write to it, and so copy its page,
        gc.freeze()  # and so would a collection
        poller = select.poll()
        poller.register(asked, select.POLLIN)
        poller.register(wake, select.POLLIN)
        with suppress(OSError):
            asked.send(b"{}")
        while True:
            poller.poll()
            with suppress(BlockingIOError):
                os.read(wake, 4096)
            try:
                for ended in _reap():
                    asked.send(json.dumps(ended).encode())
                message = asked.recv(_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not message:
                return
            words = json.loads(message)["words"]
            answer: dict[str, Any]
            try:
                pid = os.fork()
            except OSError as error:
                answer = {"error": str(error)}
            else:
                if pid == 0:
                    os.setsid()
                    line.show(name(words))
                    raise Forked(words)
                answer = {"pid": pid}
            with suppress(OSError):  # who asked has gone, as we shall see
                asked.send(json.dumps(answer).encode())


def _reap() -> Sequence[dict[str, int]]:
    ended = []
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended.append({"pid": pid, "status": os.waitstatus_to_exitcode(status)})
    return ended


class Process:
    """A process that a :class:`ForkServer` has started.

    Attributes:
        pid: its id.
        returncode: as :class:`subprocess.Popen` has it; None while it runs.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return how it ended; None if it has not. 0 if that cannot be known any longer."""
        self._server.collect()
        return self.returncode


class ForkServer:
    """Starts processes by means of another process, and learns how they end.

    That one imports first, which takes a minute on a very slow machine: see :meth:`is_ready`.

    Args:
        command: the command line of a process that calls :func:`serve`.
        environment: its environment, and that of all processes that it starts.
        pass_fds: descriptors that it inherits.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        pass_fds: Collection[int] = (),
    ) -> None:
        import subprocess  # not in what is forked

        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._running: dict[int, Process] = {}
        self._has_started = False
        try:
            with theirs:
                self._server = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    env=environment,
                    pass_fds=pass_fds,
                    start_new_session=True,
                )
        except BaseException:
            self._socket.close()
            raise

    def is_ready(self) -> bool:
        """Tell, without waiting, whether it forks already.

        Until then, ``fileno`` becomes readable after each step of its start.

        Raises:
            ConnectionResetError: it has ended.
        """
        with suppress(BlockingIOError):
            while not self._has_started:
                told = self._receive(socket.MSG_DONTWAIT)
                if told is None:
                    self.close()
                    raise ConnectionResetError(_SILENT)
                self._has_started = "step" not in told
        return self._has_started

    def wait(self) -> None:
        """Wait until it forks.

        Raises:
            ConnectionResetError: it has ended.
        """
        while not self.is_ready():
            select.select([self], [], [])

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a process has ended."""
        return self._socket.fileno()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._server.pid

    @property
    def is_lost(self) -> bool:
        """Whether the server has ended; its processes run on, but we learn no more of them."""
        return self._socket.fileno() < 0

    def start(self, words: Sequence[str]) -> Process:
        """Start the program with other arguments, as soon as the server is ready.

        Raises:
            OSError: that is not possible; or the server has gone.
        """
        if not self.is_lost:
            self.wait()
        with suppress(OSError):  # then there is no answer
            self._socket.send(json.dumps({"words": list(words)}).encode())
        answer = self._answer()
        if "error" in answer:
            raise OSError(answer["error"])
        process = Process(self, answer["pid"])
        self._running[process.pid] = process
        return process

    def _answer(self) -> dict[str, Any]:
        """Wait for what is no end of a process.

        Raises:
            ConnectionResetError: nothing came; the server is closed.
        """
        answer: dict[str, Any] | None
        try:
            self._socket.settimeout(_PATIENCE)
            answer = self._receive()
            while answer is not None and "status" in answer:
                answer = self._receive()
            self._socket.settimeout(None)
        except OSError:
            answer = None
        if answer is None:
            self.close()
            raise ConnectionResetError(_SILENT)
        return answer

    def collect(self) -> None:
        """Learn which processes have ended, without waiting."""
        with suppress(BlockingIOError):
            while not self.is_lost:
                if self._receive(socket.MSG_DONTWAIT) is None:
                    self.close()

    def _receive(self, flags: int = 0) -> dict[str, Any] | None:
        """Return a message, whose process is marked if it tells of an end; None at the end."""
        try:
            message = self._socket.recv(_MESSAGE, flags)
        except ConnectionResetError:
            return None
        if not message:
            return None
        told: dict[str, Any] = json.loads(message)
        if "status" in told:
            process = self._running.pop(told["pid"], None)
            if process is not None:
                process.returncode = told["status"]
        return told

    def close(self) -> None:
        """Have the server end; the processes stay."""
        if self.is_lost:
            return
        self._socket.close()
        self._server.kill()  # it may hang; no process of a disk is one of its group
        self._server.wait()
        for process in self._running.values():
            process.returncode = 0
        self._running.clear()
