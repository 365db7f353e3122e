"""How this program is started by itself and by systemd: this code, from wherever it is.

``python -m`` looks into the current directory first, where a stranger may have put an
``argparse.py``. So what we start is isolated (``-I``): it finds the installed package, or is told
the path of another one, or of the single file (``python -m zipapp``) that holds everything.
"""

from __future__ import annotations

import os
import site
import sys

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PLACE = os.path.dirname(_PACKAGE)  # where it is imported from: a directory, or one file


def own_command(*words: str) -> list[str]:
    """Return the command line that starts this program with the arguments ``words``."""
    return [sys.executable, "-I", *_how(_PLACE, site.getsitepackages()), *words]


def _how(place: str, installed: list[str]) -> list[str]:
    if os.path.isfile(place):
        return [place]
    if place in installed:  # by name: the next version may be in another directory
        return ["-m", "xen_disk_py"]
    return [os.path.join(place, "xen_disk_py", "__main__.py")]


def unit_command() -> str:
    """Return ``own_command`` without arguments as ``ExecStart`` in a unit of systemd takes it."""
    return " ".join(_quoted(word) for word in own_command())


def _quoted(word: str) -> str:
    for special in "\\%$":
        word = word.replace(special, "\\\\" if special == "\\" else special * 2)
    return f'"{word}"' if set(word) & set(" \t'\";") else word
