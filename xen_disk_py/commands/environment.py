"""What the program gets from the machine it runs on, in one place.

Commands take everything outside themselves from here, so that a test (or the demo) hands
them a simulated Xen and reads what they print.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Callable, TextIO

from ..hypervisor import Hypervisor
from ..recovery import record
from ..xenbus.xenstore import Store


def _xen() -> Hypervisor:
    from ..libxen import Xen

    return Xen()


def _xen_version() -> tuple[int, int] | None:
    from ..xenbus.toolstack import xen_version

    return xen_version()


@dataclass
class Environment:
    """The machine: by default, the real one."""

    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    open_store: Callable[[], Store] = Store.open
    open_hypervisor: Callable[[], Hypervisor] = _xen
    xen_version: Callable[[], tuple[int, int] | None] = _xen_version
    record_directory: str = record.DIRECTORY
    stdin: TextIO | None = field(default_factory=lambda: sys.stdin)

    @property
    def in_terminal(self) -> bool:
        """Whether somebody sits in front of us: stdin or stderr is a terminal."""
        return any(stream is not None and stream.isatty() for stream in (self.stdin, self.stderr))

    def say(self, text: str) -> None:
        """Print a line of data on stdout."""
        print(text, file=self.stdout, flush=True)

    def tell(self, text: str) -> None:
        """Print a line for a person on stderr."""
        print(text, file=self.stderr, flush=True)
