"""What ``resize`` asks of the process that serves a disk, and the answer, as xenstore values.

Whoever wants another size makes a node in ``resize`` under the backend's directory, named by
its process id, and waits until the answer stands there in place of what it asked; it removes
the node then. The guest cannot write there, nor read it.
"""

from __future__ import annotations

import re

from ..errors import DeviceError
from ..named import NamedTuple
from .xenstore import quote, unquote

DIRECTORY = "resize"
"""The name under the backend's directory."""

_REQUEST = r"(current|[1-9][0-9]{0,18}) ([01])"
_ANSWER = r"(?:ok ([1-9][0-9]{0,18})|error (.*))"
_LONGEST = 3000  # characters of a quoted error; with its path it fits into one request


class ResizeRequest(NamedTuple):
    """What is asked for: ``size`` in bytes, or None for what the storage has become.

    ``force`` allows a smaller size.
    """

    size: int | None
    force: bool

    def __str__(self) -> str:
        return f"{self.size or 'current'} {int(self.force)}"

    @classmethod
    def parse(cls, text: str | None) -> ResizeRequest | None:
        """Read a node's value; None if it is no request (an answer, say)."""
        match = re.fullmatch(_REQUEST, text or "", re.ASCII)
        if match is None:
            return None
        return cls(None if match[1] == "current" else int(match[1]), match[2] == "1")


def granted(size: int) -> str:
    """Write the answer that the disk has now ``size`` bytes."""
    return f"ok {size}"


def refused(why: object) -> str:
    """Write the answer that the disk is as it was, and why."""
    return f"error {quote(str(why))[:_LONGEST]}"


def parse_answer(text: str) -> int:
    """Read the disk's size, in bytes, out of an answer.

    Raises:
        DeviceError: the disk is as it was; the message says why.
    """
    match = re.fullmatch(_ANSWER, text, re.ASCII)
    if match is None:
        raise DeviceError(f"the answer {text[:64]!r} makes no sense")
    if match[1] is None:
        raise DeviceError(unquote(match[2]))
    return int(match[1])
