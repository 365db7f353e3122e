"""A fuzzer of VHDs: ``python -m tests.fuzz.vhd``, with ``atheris`` and ``pyxs`` installed.

It damages footers, headers, tables, batmaps and locators of good images (see :mod:`.images`),
guided by which lines of the program each input reaches. What reaches new ones is kept in
``build/fuzz/vhd``. What finds a fault is left as ``crash-…`` in the current directory: with that as
its argument it is tried alone. ``--merge`` adds to ``tests/fuzz/corpus/vhd`` what that lacks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import atheris

with atheris.instrument_imports(include=["xen_disk_py.backends.vhd"]):
    from . import images

CORPUS = Path(__file__).parent / "corpus" / "vhd"
FOUND = Path("build/fuzz/vhd")
LONGEST = 48  # bytes of an input: nine changes


def main() -> int:
    """Run until the time is over, or a fault is found; return libFuzzer's status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.vhd", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--merge", action="store_true", help="add to the corpus, then end")
    parser.add_argument("crash", nargs="?", help="one input, to be tried alone")
    given = parser.parse_args()
    FOUND.mkdir(parents=True, exist_ok=True)
    CORPUS.mkdir(parents=True, exist_ok=True)
    arguments = [f"-max_len={LONGEST}", "-rss_limit_mb=1024", "-timeout=20"]
    if given.crash is not None:
        arguments += [given.crash]
    else:
        arguments += [f"-max_total_time={given.seconds}", str(FOUND), str(CORPUS)]
    with tempfile.TemporaryDirectory() as directory:
        if given.merge:
            merge(Path(directory))
            return 0
        child = os.fork()  # libFuzzer ends its process without any cleaning up
        if not child:
            fuzz(Path(directory), arguments)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fuzz(directory: Path, arguments: list[str]) -> None:
    """Have libFuzzer try inputs; it does not return."""
    good = images.seeds(directory)

    def one_input(data: bytes) -> None:
        images.survives(directory / "disk.vhd", images.damaged(good, data))

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def merge(directory: Path) -> None:
    """Copy to the corpus what reaches lines of the program that nothing in it reaches."""
    good = images.seeds(directory)
    known: set[tuple[str, int]] = set()
    inputs = [*sorted(CORPUS.iterdir()), *sorted(FOUND.iterdir(), key=lambda p: p.stat().st_size)]
    for path in inputs:
        lines: set[tuple[str, int]] = set()

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            if "backends/vhd" in frame.f_code.co_filename:
                lines.add((frame.f_code.co_filename, frame.f_lineno))  # noqa: B023 - called in here
                return trace
            return None

        sys.settrace(trace)
        try:
            images.survives(directory / "disk.vhd", images.damaged(good, path.read_bytes()))
        finally:
            sys.settrace(None)
        if path.parent != CORPUS and not lines <= known:
            (CORPUS / path.name[:12]).write_bytes(path.read_bytes())
        known |= lines


if __name__ == "__main__":
    sys.exit(main())
