"""A process of a disk that is killed amid a resize: its successor has all that was acknowledged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from long_run import LONG

PROGRAM = Path(__file__).with_name("resizing.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pages", [[32, 16], [16, 32]], ids=["shorter", "longer"])
@pytest.mark.parametrize(("victim", "lines", "step"), [("main", 200, 60), (0, 25, 9), (1, 25, 9)])
def test_at_every_line(victim, lines, step, pages):
    """The process that resizes, or a queue's; one in so many lines, by chance others each time."""
    step = 1 if LONG else step
    done = subprocess.run(
        [sys.executable, PROGRAM, json.dumps({"victim": victim, "pages": pages, "step": step})],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "" == done.stderr
    figures = json.loads(done.stdout)
    assert figures["lines"] > lines
    assert figures["cuts"] >= figures["lines"] // step - 1
