"""What a process of ours that serves a disk is among others, as whoever starts it says."""

from __future__ import annotations

import json

from ..errors import UsageError
from ..named import NamedTuple
from .plain import from_plain

OPTION = "--role"
"""The option of ``connect`` that says so; not for people."""


class Role(NamedTuple):
    """What a process is among others.

    Attributes:
        leaves: after an error of its own it leaves the disk to another process.
        succeeds: it follows one that has said which disk this is.
        tries: it only sees whether it could take the disk over that is described on stdin.
        temporary: the file, to be made, that keeps a disk's changes until its end.
    """

    leaves: bool = False
    succeeds: bool = False
    tries: bool = False
    temporary: str | None = None

    @classmethod
    def parse(cls, text: str) -> Role:
        """Read what :meth:`words` wrote.

        Raises:
            UsageError: it makes no sense, or not to this version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{OPTION} {text}: {error}") from error
        if not isinstance(data, dict):
            raise UsageError(f"{OPTION} {text}: this is no JSON object")
        role, wrong = from_plain(cls, data)
        if wrong:
            raise UsageError(f"{OPTION}: this version knows no {', '.join(wrong)}")
        return role

    def words(self) -> list[str]:
        """Return the arguments of ``connect`` that say so."""
        told = {name: value for name, value in self._asdict().items() if value not in (None, False)}
        return [OPTION, json.dumps(told, separators=(",", ":"))] if told else []
