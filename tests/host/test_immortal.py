"""Objects whose references nobody counts; each try is in a process of its own, which it changes."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import xen_disk_py

pytestmark = pytest.mark.each_python  # from 3.12 on, there is more to see
HAS_IMMORTALS = (
    sys.implementation.name == "cpython"
    and sys.version_info >= (3, 12)
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
)

USE = """
import gc, json, sys
sys.path.insert(0, {package!r})
from xen_disk_py.host.immortal import immortalize
import collections, logging, argparse, re, xen_disk_py.cli

class Kept:
    pass

kept, text, number = [Kept() for _ in range(100)], "a word " * 3, 10**30
kept[0].text = text

def function(argument=("a constant", 1.5)):
    return argument

made = immortalize()
gc.collect()
gc.freeze()
"""

COUNTS = """
def is_uncounted(one):
    before = sys.getrefcount(one)
    more = [one] * 1000
    return abs(sys.getrefcount(one) - before) < 10  # 3.14 corrects it by one now and then

old = [kept, kept[5], Kept, text, number, function, function.__code__, function.__code__.co_consts]
old += [function.__defaults__, logging.getLogger, argparse.ArgumentParser, vars(logging)]
print(made, *[is_uncounted(one) for one in old], is_uncounted(Kept()))
"""

LIFE = """
import os, weakref
pid = os.fork()
if not pid:
    for turn in range(50):  # what is made afterwards is freed, what was there can be used
        kept.append(Kept())
        kept.pop().text = text + str(turn)
        kept[turn % 100] = {"again": [function(), re.compile("x" * turn).match("x" * 100)]}
        parser = argparse.ArgumentParser()
        parser.add_argument("--number", type=int)
        assert parser.parse_args(["--number", str(turn)]).number == turn
        logging.getLogger(f"logger {turn}").debug("unheard")
        gc.collect()
    new = Kept()
    new.itself = new
    gone = weakref.ref(new)
    del new
    gc.collect()
    assert gone() is None
    del kept, Kept, function
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def output(program):
    package = str(Path(xen_disk_py.__file__).parents[1])
    command = [sys.executable, "-c", USE.format(package=package) + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout.split()


def test_references_to_what_there_was_are_not_counted():
    made, *uncounted, later = output(COUNTS)
    assert str(HAS_IMMORTALS) == made
    assert "False" == later
    if HAS_IMMORTALS:
        assert {"True"} == set(uncounted)


def test_a_fork_lives_and_ends_with_them_as_without():
    assert ["7"] == output(LIFE)


@pytest.mark.skipif(not HAS_IMMORTALS, reason="this Python counts references to every object")
def test_a_fork_leaves_the_pages_of_what_it_uses_alone():
    """Before, nearly all pages of these objects would be the fork's own."""
    program = """
import os
many = [[number] for number in range(300_000, 320_000)]
def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))
def use():  # as code is: what a module's own names are bound to loses one on 3.14 each time
    for each in many:
        each[0]
if MAKES:
    immortalize()
gc.freeze()  # a collection would write to them, too
pid = os.fork()
if not pid:
    before = private()
    use()
    print(private() - before)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
"""
    (counted,), (uncounted,) = (
        output(program.replace("MAKES", str(makes))) for makes in (False, True)
    )
    assert int(uncounted) < int(counted) / 2
