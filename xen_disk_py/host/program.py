"""Which programs we start: this one, from wherever it is, and others from the system's directories.

``python -m`` looks into the current directory first, where a stranger may have put an
``argparse.py``. So what we start is isolated (``-I``): it finds the installed package, or is told
the path of another one, or of the single file (``python -m zipapp``) that holds everything.

Other programs are not found by ``$PATH`` either: it may hold the current directory, or one where
somebody else can write, and is another one wherever a successor is started.
"""

from __future__ import annotations

import os
import site
import sys

from ..errors import ProgramMissing

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PLACE = os.path.dirname(_PACKAGE)  # where it is imported from: a directory, or one file

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are that root runs; nobody else writes there."""


def find_program(name: str, remedy: str) -> str:
    """Return the path of a program, to be found in the system's directories.

    Args:
        name: of the program; with a directory in it, it is a path, which is taken as it is.
        remedy: what to do if it is not there.

    Raises:
        ProgramMissing: it is not.
    """
    is_path = "/" in name
    for directory in ("",) if is_path else SYSTEM_PATH.split(":"):
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    places = "" if is_path else f" in {SYSTEM_PATH}"
    raise ProgramMissing(f"there is no program {name}{places}: {remedy}")


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
