"""Sizes and times as people write them: ``64M``, ``1.5 GiB``, ``10ms``."""

from __future__ import annotations

import re

from .errors import UsageError

LARGEST = (1 << 63) - (1 << 20)
"""Bytes that anything can be long: what off_t holds (lseek(2)), in whole MiB."""

_LETTERS = "KMGTPE"
_SIZE = r"(\d+(?:\.\d+)?|\.\d+) ?(?:([KMGTPE])(?:I?B)?|B)?"


def parse_size(text: str) -> int:
    """Read a size in bytes.

    ``K``, ``M``, ``G``, ``T`` (or ``KB``, ``KiB`` and so on, in any case) multiply by powers
    of 1024. A fraction is fine where the result is whole: ``1.5G``.

    Raises:
        UsageError: it is not a size.
    """
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is not a size: give bytes, or a number with K, M, G or T")
    number, letter = match.groups()
    exponent = _LETTERS.index(letter.upper()) + 1 if letter else 0
    whole, _, fraction = number.partition(".")
    whole, fraction = whole.lstrip("0"), fraction.rstrip("0")
    if len(fraction) > 10 * exponent:  # halved so often, it would still be no whole number
        raise UsageError(f"{text!r} is not a whole number of bytes")
    if len(whole) <= len(str(LARGEST)):
        parts: int = 10 ** len(fraction)
        size, rest = divmod(int(f"0{whole}{fraction}") << 10 * exponent, parts)
        if rest:
            raise UsageError(f"{text!r} is not a whole number of bytes")
        if size <= LARGEST:
            return size
    raise UsageError(f"{text!r} is more than any disk can have: at most {format_size(LARGEST)}")


_DURATION = r"(\d+(?:\.\d+)?|\.\d+) ?(us|ms|s)?"
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0}


def parse_duration(text: str) -> float:
    """Read a time in seconds: ``10ms``, ``200us``, ``1.5s`` or ``1.5``.

    Raises:
        UsageError: it is not a time.
    """
    match = re.fullmatch(_DURATION, text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is not a time: give a number with us, ms or s")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(size: int) -> str:
    """Write a size for people: the largest unit it fills, at most one decimal, ``1.5 GiB``."""
    if size < 1024:
        return f"{size} B"
    exponent = min((size.bit_length() - 1) // 10, len(_LETTERS))
    tenths = (size * 10 + (1 << 10 * exponent) // 2) >> 10 * exponent
    if tenths >= 10240 and exponent < len(_LETTERS):  # 1023.97 KiB reads better as 1 MiB
        tenths, exponent = 10, exponent + 1
    whole, tenth = divmod(tenths, 10)
    return (
        f"{whole}.{tenth} {_LETTERS[exponent - 1]}iB"
        if tenth
        else f"{whole} {_LETTERS[exponent - 1]}iB"
    )
