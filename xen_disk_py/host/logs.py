"""Lines of the log: whose disk each is about, how bad it is, and nothing that a terminal obeys."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..text import printable
from .output import Output

_PRIORITIES = (  # syslog(3), sd-daemon(3)
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)
_PATIENCE = 1.0  # seconds
_JOURNAL = "JOURNAL_STREAM"

_subjects: list[str] = []  # the innermost last; a process serves one disk


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Have all lines of this process begin with ``subject``: ``myvm/xvdb``."""
    _subjects.append(subject)
    try:
        yield
    finally:
        _subjects.remove(subject)


def is_journal(output: Output) -> bool:
    """Tell whether systemd's journal reads the output (``$JOURNAL_STREAM``, systemd.exec(5))."""
    try:
        status = os.fstat(output.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get(_JOURNAL) == f"{status.st_dev}:{status.st_ino}"


def priority(level: int) -> int:
    """Return syslog's priority for a level of ``logging``."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


class LineHandler(logging.Handler):
    """Writes each line of the log to an output.

    Args:
        output: where.
        program: what each line begins with.
    """

    def __init__(self, output: Output, program: str) -> None:
        super().__init__()
        self._output = output
        self._program = program
        self._has_priorities = is_journal(output)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; whatever is wrong with it, nothing is raised."""
        try:
            self._output.write(self.format(record))
        except Exception:  # noqa: BLE001 - as any handler of logging's
            self.handleError(record)

    def flush(self) -> None:
        """Let a reader take what has been written, for a moment at most; before the end."""
        self._output.drain(_PATIENCE)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines: its message is one, a traceback has more."""
        prefix = f"<{priority(record.levelno)}>" if self._has_priorities else ""
        subject = f" {printable(_subjects[-1])}:" if _subjects else ""
        lines = [f"{self._program}:{subject} {printable(record.getMessage())}"]
        if record.exc_info:
            traceback = logging.Formatter().formatException(record.exc_info)
            lines += map(printable, traceback.splitlines())
        return "".join(f"{prefix}{line}\n" for line in lines)
