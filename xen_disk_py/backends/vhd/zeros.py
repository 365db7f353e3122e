"""Zeros: what a VHD has where nothing was written."""

from __future__ import annotations

from collections.abc import Sequence

_ZEROS = bytes(64 << 10)


def fill_zeros(buffers: Sequence[memoryview]) -> int:
    """Fill buffers with zeros; return their length."""
    for buffer in buffers:
        for start in range(0, len(buffer), len(_ZEROS)):
            part = buffer[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: len(part)]
    return sum(map(len, buffers))


def is_zero(buffers: Sequence[memoryview]) -> bool:
    """Tell whether buffers have nothing but zeros."""
    for buffer in buffers:
        for start in range(0, len(buffer), len(_ZEROS)):
            part = bytes(buffer[start : start + len(_ZEROS)])  # what memcmp takes at once
            if part != _ZEROS[: len(part)]:
                return False
    return True
