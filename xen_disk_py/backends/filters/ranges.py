"""Ranges of bytes as options of filters write them: ``0-1M+2G-3G``, the ends excluded."""

from __future__ import annotations

from ...errors import UsageError
from ...units import parse_size

Range = tuple[int, int]

_FORM = "write it as START-END, such as 1M-2M"


def parse_ranges(name: str, text: str) -> list[Range]:
    """Read the option ``range`` of the filter ``name``.

    Raises:
        UsageError: it is none.
    """
    found = []
    for part in text.split("+"):
        start, dash, end = part.partition("-")
        if not dash:
            raise UsageError(f"--filter {name}: range={text}: {_FORM}")
        try:
            bounds = parse_size(start), parse_size(end)
        except UsageError as error:
            raise UsageError(f"--filter {name}: range={text}: {error}") from None
        if bounds[0] >= bounds[1]:
            raise UsageError(f"--filter {name}: range={text}: {_FORM}")
        found.append(bounds)
    return found


def touches(ranges: list[Range], offset: int, length: int) -> bool:
    """Tell whether ``length`` bytes at ``offset`` lie in one of them at least in part."""
    return any(offset < end and start < offset + length for start, end in ranges)
