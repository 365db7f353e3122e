"""What a processor with a weak memory order, such as ARM's, may do to the ring.

Both ends run for real on a memory in which a load may find any value that the processor has not
been told to be outdated, and each such choice is tried. That is the promising semantics of C's
relaxed accesses and full fences, of which all that ARM does is a part [1], without its promises: a
load is never delayed beyond a later store. Where that would do harm (a slot must have been read
before it is given back), a fence in between is asked for instead.

The other end may run whenever one comes to a fence. More places are not needed: to find a value
that is outdated is to have read it earlier.

[1] Podkopaev, Lahav, Vafeiadis: Bridging the Gap between Programming Languages and Hardware Weak
Memory Models, POPL 2019.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from itertools import zip_longest

import pytest

from xen_disk_py import ring
from xen_disk_py.ring import HEADER, BackRing, FrontRing

SLOT = 8  # bytes of a slot: so much differs between a request and its response
PRODUCERS = (0, 2)  # the indices that say how far slots may be read
SITES = {
    number: line
    for number, line in enumerate(inspect.getsource(ring).splitlines(), start=1)
    if re.search(r"self\._fence\(\)", line)
}
"""The fences, by the number of their line."""


class Harm(Exception):
    """What must not be."""


class Nothing(Exception):
    """One who looks sees nothing yet: a run that shows nothing."""


class Choices:
    """All ways through something that chooses, one after the other."""

    def __init__(self):
        self._taken = []  # (choice, of how many)
        self._at = 0

    def choose(self, count):
        if count == 1:
            return 0
        if self._at == len(self._taken):
            self._taken.append((0, count))
        choice, expected = self._taken[self._at]
        assert count == expected
        self._at += 1
        return choice

    def proceed(self):
        """Go to the next way; False if there is none."""
        self._at = 0
        while self._taken:
            choice, count = self._taken.pop()
            if choice + 1 < count:
                self._taken.append((choice + 1, count))
                return True
        return False


def join(view, other):
    for place, time in other.items():
        if time > view.get(place, 0):
            view[place] = time


class Memory:
    """Every value that each place has had, and what whoever reads it learns besides."""

    def __init__(self, choices, slots):
        self.choices = choices
        self.values = {
            ("index", number): [(value, {})] for number, value in enumerate((0, 1, 0, 1))
        }
        for number in range(slots):
            self.values["slot", number] = [(bytes(SLOT), {})]
        self.fenced = {}  # what every fence knows that comes later


class Processor:
    """One end's: what it must not take for current any longer."""

    def __init__(self, memory):
        self.memory = memory
        self.view = {}
        self.learned = {}  # by loads, for the next fence
        self.published = {}  # with the last fence: what stores carry
        self.reads_slots = False  # since the last fence

    def load(self, place):
        values = self.memory.values[place]
        first = self.view.get(place, 0)
        # the newest first
        time = len(values) - 1 - self.memory.choices.choose(len(values) - first)
        value, carried = values[time]
        self.view[place] = time
        join(self.learned, carried)
        self.reads_slots |= place[0] == "slot"
        return value

    def store(self, place, value):
        if self.reads_slots and place[0] == "index" and place[1] in PRODUCERS:
            raise Harm("a slot may be read after it was given back")
        values = self.memory.values[place]
        if place[0] == "slot":  # a response is shorter
            value += values[-1][0][len(value) :]
        self.view[place] = len(values)
        values.append((value, {**self.published, place: len(values)}))

    def fence(self):
        join(self.view, self.learned)
        join(self.view, self.memory.fenced)
        join(self.memory.fenced, self.view)
        self.published = dict(self.view)
        self.reads_slots = False


class Pages:
    """The memoryview of the pages that one end has."""

    def __init__(self, processor, slots):
        self.processor = processor
        self.slots = slots

    def __len__(self):
        return HEADER + self.slots * SLOT

    def __getitem__(self, part):
        if part == slice(None, 16):
            return Indices(self.processor)
        numbers = range((part.start - HEADER) // SLOT, (part.stop - HEADER) // SLOT)
        return b"".join(self.processor.load(("slot", number)) for number in numbers)

    def __setitem__(self, part, data):
        self.processor.store(("slot", (part.start - HEADER) // SLOT), data)


class Indices:
    def __init__(self, processor):
        self.processor = processor

    def cast(self, kind):
        assert kind == "I"
        return self

    def __getitem__(self, number):
        return self.processor.load(("index", number))

    def __setitem__(self, number, value):
        self.processor.store(("index", number), value)


class Run:
    """Two ends, and what each is going to do.

    Args:
        choices: how it goes.
        without: the line of a fence that does nothing.
        fenced: gets the lines of the fences that were there.
        slots: of the ring.
    """

    def __init__(self, choices, without, fenced, slots=1):
        self.choices, self.without, self.fenced = choices, without, fenced
        self.memory = Memory(choices, slots)
        self.plans = {"front": [], "back": []}
        self.busy = set()
        self.processors = {name: Processor(self.memory) for name in self.plans}
        pages = {name: Pages(processor, slots) for name, processor in self.processors.items()}
        self.front = FrontRing(pages["front"], SLOT, lambda: self.fence("front"))
        self.back = BackRing(pages["back"], SLOT, lambda: self.fence("back"))
        self.settle()

    def settle(self, *steps):
        """Do what both ends know of afterwards, and what is not tried."""
        choices, self.choices = self.choices, Choices()
        self.memory.choices = self.choices
        for step in steps:
            step()
        self.choices = self.memory.choices = choices
        for processor in self.processors.values():
            processor.view = {place: len(v) - 1 for place, v in self.memory.values.items()}

    def fence(self, side):
        line = sys._getframe(2).f_lineno  # of the ring, which called a lambda, which called this
        self.fenced.add(line)
        other = "front" if side == "back" else "back"
        while other not in self.busy and self.plans[other] and self.choices.choose(2):
            self.step(other)
        if line != self.without:
            self.processors[side].fence()

    def step(self, side):
        self.busy.add(side)
        self.plans[side].pop(0)()
        self.busy.discard(side)

    def go(self, front, back):
        self.plans = {"front": list(front), "back": list(back)}
        while any(self.plans.values()):
            ready = [side for side, plan in self.plans.items() if plan]
            self.step(ready[self.choices.choose(len(ready))])


def request(number):
    return b"ask %3d." % number


def response(number):
    return b"ok%2d" % number


def ask(run, number):
    if not run.front.free:
        raise Nothing
    run.front.put(request(number))
    return run.front.push()


def serve(run, number):
    taken = run.back.take()
    if not taken:
        raise Nothing
    if taken != request(number):
        raise Harm(f"the backend takes {taken} for {request(number)}")
    run.back.respond(response(number))
    return run.back.push()


def reap(run, number):
    taken = run.front.take()
    if not taken:
        raise Nothing
    if not taken[0].startswith(response(number)):
        raise Harm(f"the frontend takes {taken} for {response(number)}")


def slots_are_read_when_they_are_complete(run):
    """Requests and responses are what was put, though all of them lie in one slot."""
    run.go(
        front=[
            lambda: ask(run, 1),
            lambda: reap(run, 1),
            lambda: ask(run, 2),
            lambda: reap(run, 2),
        ],
        back=[lambda: serve(run, 1), lambda: serve(run, 2)],
    )


def backend_is_woken(run):
    """It does not sleep over a request that came without a notification."""
    said = {}
    run.settle(lambda: ask(run, 1), lambda: serve(run, 1), lambda: reap(run, 1))
    run.go(
        front=[lambda: said.update(notified=ask(run, 2))],
        back=[lambda: said.update(awake=run.back.arm())],
    )
    if not any(said.values()):
        raise Harm("the backend sleeps, and nobody wakes it")


def frontend_is_woken(run):
    """It does not sleep over a response that came without a notification."""
    said = {}
    run.settle(
        lambda: ask(run, 1), lambda: serve(run, 1), lambda: reap(run, 1), lambda: ask(run, 2)
    )
    run.go(
        front=[lambda: said.update(awake=run.front.arm())],
        back=[lambda: said.update(notified=serve(run, 2))],
    )
    if not any(said.values()):
        raise Harm("the frontend sleeps, and nobody wakes it")


SCENES = [slots_are_read_when_they_are_complete, backend_is_woken, frontend_is_woken]


def harm(scene, without=None):
    """Try all ways of a scene; return the first harm, how many ways came to an end, and fences."""
    choices, fenced, ends = Choices(), set(), 0
    while True:
        try:
            scene(Run(choices, without, fenced))
            ends += 1
        except Nothing:
            pass
        except Harm as found:
            return str(found), ends, fenced
        if not choices.proceed():
            return None, ends, fenced


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_with_its_fences_the_ring_is_right_in_every_order(scene):
    found, ends, _ = harm(scene)
    assert found is None
    assert ends > 1


def test_every_fence_is_tried():
    assert set(SITES) == set().union(*(harm(scene)[2] for scene in SCENES))
    assert len(SITES) == 8


@pytest.mark.parametrize("line", SITES, ids=lambda line: f"{line}")
def test_without_one_of_them_something_is_wrong(line):
    """So none of them is there for nothing, and the memory here is as weak as it should be."""
    assert any(harm(scene, without=line)[0] for scene in SCENES)


DMB = "DMB ISH"  # what the fence is on ARM
LITMUS = {
    # x is a slot, y the index that covers it
    "take finds what push was told of": (
        ("MOV W0,#1", "STR W0,[X1]", DMB, "MOV W2,#1", "STR W2,[X3]"),
        ("LDR W2,[X3]", DMB, "LDR W0,[X1]"),
        "1:X2=1 /\\ 1:X0=0",
    ),
    "a slot that push gives back was read": (
        ("LDR W0,[X1]", DMB, "MOV W2,#1", "STR W2,[X3]"),
        ("LDR W2,[X3]", DMB, "MOV W0,#2", "STR W0,[X1]"),
        "0:X0=2 /\\ 1:X2=1",
    ),
    # x is the index of one end, y what the other waits for
    "push sees that the other waits, or arm what is there": (
        ("MOV W0,#1", "STR W0,[X1]", DMB, "LDR W2,[X3]"),
        ("MOV W2,#1", "STR W2,[X3]", DMB, "LDR W0,[X1]"),
        "0:X2=0 /\\ 1:X0=0",
    ),
}
"""What the two processors do, and how it must not end."""


@pytest.mark.skipif(
    shutil.which("herd7") is None, reason="no herd7 (Debian has it in herdtools7, from forky on)"
)
@pytest.mark.parametrize("without", [None, 0, 1])
@pytest.mark.parametrize("name", LITMUS)
def test_arms_own_model_says_the_same(tmp_path, name, without):
    *programs, end = LITMUS[name]
    if without is not None:
        programs[without] = [line for line in programs[without] if line != DMB]
    rows = "".join(f"{a} | {b} ;\n" for a, b in zip_longest(*programs, fillvalue=""))
    test = tmp_path / "ring.litmus"
    test.write_text(
        f"AArch64 ring\n{{0:X1=x; 0:X3=y; 1:X1=x; 1:X3=y;}}\nP0 | P1 ;\n{rows}exists ({end})\n"
    )
    done = subprocess.run(["herd7", str(test)], capture_output=True, text=True, check=True)
    assert ("Observation ring Never" in done.stdout) is (without is None), done.stdout
