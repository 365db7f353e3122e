"""Text of others, a guest's or a file's, on its way to a terminal or a log."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return ``text`` on one line and with nothing in it that a terminal would obey.

    Control characters, line ends among them, and what turns the direction of writing become
    ``\n``, ``\x1b``, ``\u202e``. A byte of a file name that is not UTF-8, which Python carries as
    a lone surrogate, becomes ``\x80`` to ``\xff``.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
