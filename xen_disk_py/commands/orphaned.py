"""What the commands that work on images themselves leave alone: the storage of orphans."""

from __future__ import annotations

from ..backends.exporting import Check
from ..recovery import orphans
from .environment import Environment


def not_of_orphans(env: Environment) -> Check:
    """Return what sees that a file, which is open and locked, is no part of an orphan's disk."""

    def check(path: str, writes: bool) -> None:
        orphans.check_files(env.record_directory, path, writable=writes, open_store=env.open_store)

    return check
