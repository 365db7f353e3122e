"""Named tuples of ours are what ``typing`` makes."""

from __future__ import annotations

import copy
import pickle
import typing

import pytest

from xen_disk_py import named


class Theirs(typing.NamedTuple):
    """Where something is."""

    x: int
    y: int | None = None
    name: str = "here"

    @property
    def far(self) -> bool:
        """Whether it is far away."""
        return self.x > 9

    @classmethod
    def at(cls, x: int) -> typing.Any:
        """Make one."""
        return cls(x, name="there")


class Ours(named.NamedTuple):
    """Where something is."""

    x: int
    y: int | None = None
    name: str = "here"

    @property
    def far(self) -> bool:
        """Whether it is far away."""
        return self.x > 9

    @classmethod
    def at(cls, x: int) -> typing.Any:
        """Make one."""
        return cls(x, name="there")


def test_is_the_same():
    for name in ("__doc__", "__module__", "__slots__", "_fields", "_field_defaults"):
        assert getattr(Theirs, name) == getattr(Ours, name)
    assert Theirs.__mro__[1:] == Ours.__mro__[1:]
    for make in (lambda of: of(1), lambda of: of(1, 2, "z"), lambda of: of.at(11)):
        theirs, ours = make(Theirs), make(Ours)
        assert theirs == ours
        assert repr(theirs) == repr(ours).replace("Ours", "Theirs")
        assert theirs.far == ours.far
        assert theirs._asdict() == ours._asdict()
        assert theirs._replace(y=7) == ours._replace(y=7)
        assert type(ours._replace(y=7)) is Ours
        for copied in (pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
            assert (Ours, ours) == (type(copied), copied)


def test_annotations_stay_text():
    assert {"x": "int", "y": "int | None", "name": "str"} == Ours.__annotations__


@pytest.mark.parametrize("of", [Theirs, Ours])
def test_what_has_no_default_is_needed(of):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        of()
    with pytest.raises(AttributeError):
        of(1).x = 2
    with pytest.raises(AttributeError):
        of(1).z = 2
