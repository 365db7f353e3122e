"""What a plugin has by ``import nbdkit``: functions and constants of that name.

Names, values and errors are those of nbdkit-python-plugin(3).
"""

from __future__ import annotations

import logging
import operator
import os
import re
import signal
import threading

THREAD_MODEL_SERIALIZE_CONNECTIONS = 0
THREAD_MODEL_SERIALIZE_ALL_REQUESTS = 1
THREAD_MODEL_SERIALIZE_REQUESTS = 2
THREAD_MODEL_PARALLEL = 3

FLAG_MAY_TRIM = 1
FLAG_FUA = 2
FLAG_REQ_ONE = 4
FLAG_FAST_ZERO = 8

FUA_NONE = 0
FUA_EMULATE = 1
FUA_NATIVE = 2

CACHE_NONE = 0
CACHE_EMULATE = 1
CACHE_NATIVE = 2

EXTENT_HOLE = 1
EXTENT_ZERO = 2

_log = logging.getLogger("xen_disk_py")
_SIZE = re.compile(r"[ \t\n\v\f\r]*\+?(?P<number>[0-9]+)(?P<unit>[bskmgtpe]?)", re.IGNORECASE)
_UNITS = {
    "": 1,
    "b": 1,
    "s": 512,
    **{letter: 1 << 10 * power for power, letter in enumerate("kmgtpe", 1)},
}


class _Call(threading.local):
    """The call of a plugin that this thread is in."""

    error = 0
    """The errno that the plugin has set; 0 for none."""
    export: str | None = None
    """The name of the export; None before it is opened."""


current = _Call()


def set_error(err: int) -> None:
    """Give the errno of the exception that is about to be raised."""
    current.error = operator.index(err)


def debug(msg: str) -> None:
    """Log a line, if ``--debug`` asks for such."""
    _log.debug("%s", _text(msg, "debug"))


def export_name() -> str:
    """Return the name of the export: what stands behind the plugin's path and a colon.

    Raises:
        RuntimeError: it is not opened yet.
    """
    if current.export is None:
        raise RuntimeError("nbdkit.export_name failed")
    return current.export


def parse_size(text: str) -> int:
    """Return the bytes of a size like ``512``, ``64k``, ``10M``, ``3s`` (sectors of 512 bytes).

    Raises:
        ValueError: it is none, or does not fit into 63 bits.
    """
    match = _SIZE.fullmatch(_text(text, "parse_size"))
    if match is not None:
        size = int(match["number"]) * _UNITS[match["unit"].lower()]
        if size < 1 << 63:
            return size
    raise ValueError("Unable to parse string as size")


def shutdown() -> None:
    """Have the disk end, as SIGTERM does: the guest is asked to release it."""
    os.kill(os.getpid(), signal.SIGTERM)


def _text(value: object, function: str) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{function}() argument 1 must be str, not {type(value).__name__}")
