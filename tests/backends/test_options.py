"""What a constructor gets of ``--option name=value``."""

from __future__ import annotations

import inspect
import typing
from typing import Literal, Optional, Union

import pytest

from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.options import convert
from xen_disk_py.errors import UsageError

INTS = [int, "int", "'int'", Optional[int], "Optional[int]", "typing.Optional[int]", "int | None"]
INTS += [Union[int, None], "Union[None, int]", "None|int", "t.Union[int, None]"]
BOOLS = [bool, "bool", Optional[bool], "bool | None"]
FLOATS = [float, "float", Optional[float], "float | None"]
COLOURS = [Literal["red", "light blue"], "Literal['red', 'light blue']"]
COLOURS += ["typing.Literal['red', 'light blue']", 'Literal["red", "light blue"] | None']
COLOURS += [Optional[Literal["red", "light blue"]]]
TEXTS = [
    inspect.Parameter.empty,
    str,
    "str",
    Optional[str],
    "Path",
    object,
    typing.Any,
    "list[int]",
]


@pytest.mark.parametrize("annotation", INTS)
def test_a_number_or_a_size(annotation):
    assert 7 == convert("7", annotation)
    assert 64 << 20 == convert("64M", annotation)
    for text in ("many", "", "-1", "1.5", "yes"):
        with pytest.raises(UsageError, match="is not a number: give a whole number, 0 or more"):
            convert(text, annotation)


@pytest.mark.parametrize("annotation", FLOATS)
def test_a_fraction(annotation):
    for text, value in (("0.5", 0.5), ("-2", -2.0), ("1e-3", 0.001)):
        assert value == convert(text, annotation)
        assert isinstance(convert(text, annotation), float)
    for text in ("fast", "", "nan", "inf", "1,5"):
        with pytest.raises(UsageError, match="is no number"):
            convert(text, annotation)


@pytest.mark.parametrize("annotation", BOOLS)
def test_yes_and_no(annotation):
    assert [True] * 5 == [convert(text, annotation) for text in ("yes", "true", "on", "1", "Yes")]
    assert [False] * 5 == [convert(text, annotation) for text in ("no", "false", "off", "0", "NO")]
    for text in ("", "2", "maybe", "None"):
        with pytest.raises(UsageError, match="is neither yes nor no"):
            convert(text, annotation)


@pytest.mark.parametrize("annotation", COLOURS)
def test_one_of_some_values(annotation):
    for text in ("red", "light blue"):
        assert text == convert(text, annotation)
    for text in ("", "blue", "Red", "'red'"):
        with pytest.raises(UsageError, match="is none of red, light blue"):
            convert(text, annotation)


def test_values_that_are_no_text():
    for annotation in (Literal[1, 2, "auto"], "Literal[1, 2, 'auto']"):
        assert [1, "auto"] == [convert(text, annotation) for text in ("1", "auto")]
        with pytest.raises(UsageError, match="'3' is none of 1, 2, auto"):
            convert("3", annotation)


@pytest.mark.parametrize("annotation", TEXTS)
@pytest.mark.parametrize("text", ["7", "true", "0.5", "None", "", "64M", "{}"])
def test_anything_else_is_text(annotation, text):
    assert text == convert(text, annotation)


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_the_disk_of_a_file_gets_what_it_asks_for(tmp_path, future):
    path = tmp_path / "mine.py"
    path.write_text(
        future + "from typing import Literal\n"
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    size = 4096\n"
        "    def __init__(self, delay: float, broken: bool = False, *, hue: Literal['a', 'b'],\n"
        "                 count: int = 3, name='x', **rest):\n"
        "        self.got = (delay, broken, hue, count, name, rest)\n"
        "    def read(self, buffers, offset): pass\n"
        "    def write(self, buffers, offset): pass\n",
        encoding="ascii",
    )
    given = {"delay": "0.5", "broken": "yes", "hue": "b", "count": "2K", "name": "7", "more": "8"}
    disk = open_backend(str(path), given)
    assert (0.5, True, "b", 2048, "7", {"more": "8"}) == disk.got
    with pytest.raises(UsageError, match=r"--option hue=…: 'c' is none of a, b"):
        open_backend(str(path), {**given, "hue": "c"})


def test_a_disk_is_named_with_its_file_and_its_path(tmp_path, make_image):
    path = tmp_path / "mine.py"
    path.write_text(
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    size = 4096\n"
        "    def read(self, buffers, offset): pass\n"
        "    def write(self, buffers, offset): pass\n",
        encoding="ascii",
    )
    disk = open_backend(str(path), {})
    assert "mine.py:Disk" == str(disk)
    disk.path = "bad\x1b[31m\nname"
    assert "mine.py:Disk (bad?[31m?name)" == str(disk)
    image = make_image()
    raw = open_backend("raw", {"path": image})
    assert f"RawBackend ({image})" == str(raw)
    raw.close()
