"""A filter that answers every flush and does none: what a broken disk does."""

from __future__ import annotations

from xen_disk_py.backends.filter import Filter


class NoFlush(Filter):
    """Storage that lies."""

    def flush(self) -> None:
        """Say that it is done."""
