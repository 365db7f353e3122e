"""What the constructor of a backend takes by name."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping
from types import FunctionType

from ..named import NamedTuple
from . import Backend

_VARKEYWORDS = 8  # inspect.CO_VARKEYWORDS


class Parameter(NamedTuple):
    """One of them.

    Attributes:
        annotation: as its author wrote it, or what that means; "" for none.
        is_needed: it has no default.
    """

    annotation: object
    is_needed: bool


def parameters_of(cls: type[Backend]) -> tuple[Mapping[str, Parameter], bool]:
    """Return what a constructor takes by name, and whether it takes any name.

    As :mod:`inspect` has it, which takes 5 ms and 1 MiB to import, and so is only asked where an
    author does what none of our own backends does.
    """
    init: object = cls.__init__
    if (
        isinstance(init, FunctionType)
        and not vars(init)  # which say of what it is a wrapper
        and type(cls) in (type, ABCMeta)
        and cls.__new__ is object.__new__
        and not hasattr(cls, "__signature__")
    ):
        return _of_function(init)
    return _inspected(cls)


def _of_function(init: FunctionType) -> tuple[Mapping[str, Parameter], bool]:
    code = init.__code__
    count = code.co_argcount
    placed = code.co_varnames[:count]
    named = code.co_varnames[count : count + code.co_kwonlyargcount]
    defaults = init.__defaults__ or ()
    optional = {*placed[count - len(defaults) :], *(init.__kwdefaults__ or ())}
    takes = {
        name: Parameter(init.__annotations__.get(name, ""), name not in optional)
        for name in (*placed[max(1, code.co_posonlyargcount) :], *named)  # behind ``self``
    }
    return takes, bool(code.co_flags & _VARKEYWORDS)


def _inspected(cls: type[Backend]) -> tuple[Mapping[str, Parameter], bool]:
    import inspect

    found = inspect.signature(cls).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {
        each.name: Parameter(
            "" if each.annotation is each.empty else each.annotation, each.default is each.empty
        )
        for each in found
        if each.kind in by_name
    }
    return takes, any(each.kind is each.VAR_KEYWORD for each in found)
