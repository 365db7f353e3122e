"""How a command ends, as the shell sees it."""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class ExitStatus(IntEnum):
    """The exit status of every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    INTERRUPTED = 130
    """Ended by force: a second Ctrl-C."""
