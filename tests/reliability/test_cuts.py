"""A backend killed at any instant: its successor answers each request once, and rightly."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from long_run import LONG

from xen_disk_py.synchronizing import HAS_GIL

PROGRAM = Path(__file__).with_name("cuts.py")
PLAIN = {
    "abi": "x86_64",
    "order": 0,
    "start": 0,
    "threads": 1,
    "grants": "auto",
    "persistent": True,
    "requests": 8,
    "step": 1,
}


def cut(**setting):
    """Run a setting; its figures."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps({**PLAIN, **setting})],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "" == done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("threads", [1, 4])
def test_at_every_line(threads):
    """One request of each kind, in order and out of order, until the end is reached."""
    step = 1 if LONG else 90  # all of them, or one in ninety, by chance others each time
    figures = cut(threads=threads, step=step, seed=random.randrange(1 << 30))
    assert figures["lines"] > 800
    assert figures["cuts"] >= figures["lines"] // step - 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "setting",
    [
        {"abi": "x86_32", "start": 2**32 - 20, "threads": 4},
        {"order": 4, "start": 2**32 - 500, "threads": 4},
        {"grants": "copy", "persistent": False, "start": 2**32 - 3},
        {"grants": "map", "threads": 4, "start": 2**31 - 30},
    ],
)
def test_rings_that_go_round(setting):
    """More requests than the ring has slots, while the frontend takes answers and puts more."""
    figures = cut(**setting, requests=60, step=11 if LONG else 1500, seed=random.randrange(1 << 30))
    assert figures["lines"] > 4000
    assert figures["cuts"] > 1


@pytest.mark.skipif(not HAS_GIL, reason="each queue has a thread of its own")
@pytest.mark.timeout(600)
def test_two_queues_in_one_thread():
    """Wherever one is, the other is somewhere, too; both are taken over."""
    step = 7 if LONG else 300
    figures = cut(queues=2, threads=4, step=step, seed=random.randrange(1 << 30))
    assert figures["lines"] > 1500
    assert figures["cuts"] >= figures["lines"] // step - 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
def test_two_queues_in_processes(victim):
    """One is killed at a line, with a flush of either under way or not; the other ends with it."""
    step = 5 if LONG else 150
    dice = random.randrange(1 << 30)
    figures = cut(queues=2, victim=victim, threads=4, step=step, seed=dice)
    assert figures["lines"] > 500
    assert figures["cuts"] >= figures["lines"] // step - 1
