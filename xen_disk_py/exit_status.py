"""How a command ends, as the shell sees it."""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class ExitStatus(IntEnum):
    """The exit status of every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    CRASHED = 70
    """Serving failed; a successor can take the disk over (EX_SOFTWARE, sysexits.h)."""
    INTERRUPTED = 130
    """Ended by force: a second Ctrl-C."""
