"""What the program gets from the machine it runs on, in one place.

Commands take everything outside themselves from here, so that a test (or the demo) hands
them a simulated Xen and reads what they print.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Callable, TextIO

from ..errors import BackendError, XenDiskError
from ..host import journald
from ..host.logs import is_journal, priority
from ..host.output import Output
from ..recovery import record
from ..text import printable

if TYPE_CHECKING:
    from ..hypervisor import Hypervisor
    from ..xenbus.xenstore import Store

log = logging.getLogger("xen_disk_py")

_PATIENCE = 1.0  # seconds that a reader gets at the end
_PYTHONS: Any = object()  # the stream that Python has


def _store() -> Store:
    from ..xenbus.xenstore import Store

    return Store.open()


def _xen() -> Hypervisor:
    from ..libxen import Xen

    return Xen()


def _xen_version() -> tuple[int, int] | None:
    from ..xenbus.toolstack import xen_version

    return xen_version()


def _or_null(stream: TextIO | None) -> TextIO:
    """Return a stream to write to where Python has none: it was started with that one closed."""
    return stream if stream is not None else open(os.devnull, "w", encoding="utf-8")


class Environment:
    """The machine: by default, the real one."""

    def __init__(
        self,
        *,
        stdout: TextIO = _PYTHONS,
        stderr: TextIO = _PYTHONS,
        stdin: TextIO | None = _PYTHONS,
        open_store: Callable[[], Store] = _store,
        open_hypervisor: Callable[[], Hypervisor] = _xen,
        xen_version: Callable[[], tuple[int, int] | None] = _xen_version,
        record_directory: str = record.DIRECTORY,
        journal: str = journald.SOCKET,
    ) -> None:
        self.stdout = _or_null(sys.stdout) if stdout is _PYTHONS else stdout
        self.stderr = _or_null(sys.stderr) if stderr is _PYTHONS else stderr
        self.stdin = sys.stdin if stdin is _PYTHONS else stdin
        self.open_store = open_store
        self.open_hypervisor = open_hypervisor
        self.xen_version = xen_version
        self.record_directory = record_directory
        self.journal = journal

    @cached_property
    def out(self) -> Output:
        """Stdout, for one who serves a disk: writing never fails and never waits."""
        return Output(self.stdout)

    @cached_property
    def err(self) -> Output:
        """Stderr, likewise."""
        return Output(self.stderr)

    @contextmanager
    def hypervisor(self) -> Iterator[Hypervisor]:
        """Open the hypervisor; a page that a backend keeps does not change how a command ends."""
        hypervisor = self.open_hypervisor()
        try:
            yield hypervisor
        finally:
            try:
                hypervisor.close()
            except BackendError as error:
                log.warning("%s", error)

    @property
    def in_terminal(self) -> bool:
        """Whether somebody sits in front of us: stdin or stderr is a terminal."""
        return Output(self.stdin).isatty() or self.err.isatty()

    def say(self, text: str) -> None:
        """Print lines of data on stdout; not while a disk is served, since it may wait or fail.

        Raises:
            BrokenPipeError: nobody reads it any longer.
            XenDiskError: it cannot be written.
        """
        self.put("\n".join(map(printable, text.split("\n"))) + "\n")

    def put(self, text: str) -> None:
        """Print text that is not for a terminal on stdout, as it is; errors as of :meth:`say`."""
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        try:
            self.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise XenDiskError(f"cannot write to stdout: {error.strerror}") from error

    def announce(self, text: str) -> None:
        """Print a line of data on stdout while a disk is served."""
        self.out.write(f"{printable(text)}\n")
        if self.out.failure is not None:
            self.tell(f"cannot write to stdout: {os.strerror(self.out.failure)}", logging.WARNING)

    def tell(self, text: str, level: int = logging.INFO) -> None:
        """Print a line for a person on stderr."""
        prefix = f"<{priority(level)}>" if is_journal(self.err) else ""
        self.err.write(f"{prefix}{printable(text)}\n")

    def tell_all(self, notes: Iterable[str]) -> None:
        """Print what is to be known of a disk or a trace, on stderr."""
        for note in notes:
            self.tell(note)

    def draw(self, text: str) -> None:
        """Put a line in the place of the one that was drawn last on a terminal; empty: erase it."""
        if not self.err.is_behind:
            self.err.write(f"\r\x1b[K{printable(text)}")

    def drain(self) -> None:
        """Let readers take what has been written, for a moment at most; before the end."""
        self.out.drain(_PATIENCE)
        self.err.drain(_PATIENCE)
