"""Objects to which nobody counts references, so that the pages they are in stay as they are.

A fork shares its parent's memory until one of them writes to a page, and to use an object is to
write to it: to its count of references. CPython 3.12 and later leaves that count alone where it has
the value that ``None`` has (PEP 683): such an object is immortal. There is no function that makes
one so; the value has to be written. So it is tried with one object first whether that does what it
should, and where it does not, as before 3.12 or without the interpreter's lock, all stays as it is.
So it does with a version that this has not been tried with.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from operator import attrgetter
from types import CodeType, FunctionType

_TRIED = ((3, 12), (3, 13), (3, 14), (3, 15))

_parts_of = attrgetter("co_consts", "co_names", "co_linetable", "co_exceptiontable")
_count = ctypes.c_uint32.from_address  # an object's, or the low half of it, is where it begins


def immortalize() -> bool:
    """Make every object immortal that there is now; tell if that is possible.

    To be called by a process that is done with what it will not keep: none is freed any more.
    """
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in _TRIED:
        return False
    if not _is_counted_so():
        return False
    value = _count(id(None)).value
    objects = gc.get_objects()
    code: list[CodeType] = []
    for each in objects:
        _count(id(each)).value = value
        if isinstance(each, FunctionType):
            code.append(each.__code__)
        for part in gc.get_referents(each):  # strings and the like are in no list of their own
            _count(id(part)).value = value
    while code:  # which does not say what it refers to
        each = code.pop()
        _count(id(each)).value = value
        for part in _parts_of(each):
            _count(id(part)).value = value
        for part in (*each.co_consts, *each.co_names):
            _count(id(part)).value = value
            if isinstance(part, CodeType):
                code.append(part)
    return True


def _is_counted_so() -> bool:
    """Tell whether an object's references are counted there, until they are as many as None's."""
    if _count(id(None)).value < 1 << 30:
        return False  # no object is immortal
    probe = object()
    before = _count(id(probe)).value
    references = [probe] * 5
    if _count(id(probe)).value != before + len(references):
        return False
    _count(id(probe)).value = _count(id(None)).value
    references += [probe] * 7
    return _count(id(probe)).value == _count(id(None)).value
