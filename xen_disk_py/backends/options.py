"""What ``--option name=value`` gives a constructor: text, or what its annotation asks for.

Nothing is guessed from the text, nor from a default: a parameter that is not annotated gets text.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import UsageError
from ..units import parse_size

_OPTIONAL = r"Optional\[(.*)\]|Union\[(.*), ?None\]|Union\[None, ?(.*)\]"
_LITERAL = r"Literal\[(.*)\]"
_BOOLEANS = {
    **dict.fromkeys(("yes", "true", "on", "1"), True),
    **dict.fromkeys(("no", "false", "off", "0"), False),
}


def convert(text: str, annotation: object) -> Any:
    """Turn ``text`` into what a parameter of this annotation takes.

    ``int`` is a number or a size (``64M``), ``float`` a number, ``bool`` is yes or no (or true,
    false, on, off, 1, 0), ``Literal`` one of its values; each may be optional. Anything else gets
    the text.

    Args:
        text: as on the command line.
        annotation: of a parameter, which may be text.

    Raises:
        UsageError: it is none of these.
    """
    wanted = _without_none(_text(annotation))
    if wanted == "int":
        return _whole_number(text)
    if wanted == "float":
        return _number(text)
    if wanted == "bool":
        try:
            return _BOOLEANS[text.lower()]
        except KeyError:
            raise UsageError(f"{text!r} is neither yes nor no") from None
    literal = re.fullmatch(_LITERAL, wanted, re.DOTALL)
    if literal is not None:
        return _one_of(text, literal[1])
    return text


def _whole_number(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError:  # it may count anything: bytes are not what it lacks
        raise UsageError(
            f"{text!r} is not a number: give a whole number, 0 or more; K, M, G and T multiply it"
        ) from None


def _text(annotation: object) -> str:
    """Write an annotation as its author would."""
    if isinstance(annotation, type):
        return annotation.__name__
    text = annotation if isinstance(annotation, str) else str(annotation)
    text = text.strip()
    if text[:1] in ("'", '"') and text[:1] == text[-1:]:  # an annotation that is text in text
        text = text[1:-1]
    return re.sub(r"(?<![\w'\"])(?:\w+\.)+(?=[A-Z])", "", text)


def _without_none(text: str) -> str:
    match = re.fullmatch(_OPTIONAL, text, re.DOTALL)
    if match is not None:
        return str(next(filter(None, match.groups()))).strip()
    for none in (" | None", "|None"):
        if text.endswith(none):
            return text[: -len(none)].strip()
    for none in ("None | ", "None|"):
        if text.startswith(none):
            return text[len(none) :].strip()
    return text


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{text!r} is no number")
    return number


def _one_of(text: str, source: str) -> object:
    import ast

    try:
        values = ast.literal_eval(f"({source},)")
    except (ValueError, SyntaxError):
        return text  # of something that is no literal
    for value in values:
        if text == str(value):
            return value
    raise UsageError(f"{text!r} is none of {', '.join(map(str, values))}")
