"""Constructors read as ``inspect`` reads them, whether it is asked or not."""

from __future__ import annotations

import functools
import inspect
import sys

import pytest

from xen_disk_py.backends import Backend
from xen_disk_py.backends.finding import builtin_names, find_class
from xen_disk_py.backends.parameters import parameters_of


class Bare(Backend):
    """Has no constructor of its own."""


class Plain(Backend):
    def __init__(self, path: str, size: int | None = None, *, limit: int = 3, must, **more): ...


class Inherits(Plain):
    pass


class OnlyByPlace(Backend):
    def __init__(self, path, /, size=1, *rest: str): ...


class ByPlaceWithSelf(Backend):
    def __init__(*args, path: str, size: int = 0): ...


def keep(function):
    @functools.wraps(function)
    def kept(*args, **options):
        return function(*args, **options)

    return kept


class Wrapped(Backend):
    @keep
    def __init__(self, path: str, size: int = 0): ...


class Partial(Backend):
    __init__ = functools.partialmethod(Plain.__init__, must=1)


class Made(Backend):
    def __new__(cls, path: str, size: int = 0): ...


class Signed(Backend):
    __signature__ = inspect.signature(lambda path, size=1: None)


class Meta(type(Backend)):
    def __call__(cls, path: str, *, colour: str = "red"): ...


class OfMeta(Backend, metaclass=Meta):
    pass


def inspected(cls):
    found = inspect.signature(cls).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {
        each.name: (
            "" if each.annotation is each.empty else each.annotation,
            each.default is each.empty,
        )
        for each in found
        if each.kind in by_name
    }
    return takes, any(each.kind is each.VAR_KEYWORD for each in found)


@pytest.mark.parametrize(
    "cls",
    [
        *(Bare, Plain, Inherits, OnlyByPlace, ByPlaceWithSelf),
        *(Wrapped, Partial, Made, Signed, OfMeta),
    ],
)
def test_any_class(cls):
    assert inspected(cls) == parameters_of(cls)


@pytest.mark.parametrize("name", builtin_names())
def test_our_own_need_no_inspect(name, monkeypatch):
    cls, _ = find_class(name)
    expected = inspected(cls)
    monkeypatch.setitem(sys.modules, "inspect", None)
    assert expected == parameters_of(cls)
    assert expected[0]
