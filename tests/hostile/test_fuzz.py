"""The fuzzer's corpus, and a few hundred inputs made of it; fuzz_slots.py runs for longer."""

from __future__ import annotations

import itertools
import random

import pytest

from hostile import fuzz_slots
from hostile.attacker import LONG


@pytest.fixture(scope="module")
def target():
    made = fuzz_slots.Target()
    yield made
    made.close()
    assert made.hypervisor.mapped_pages == 0


@pytest.mark.parametrize("path", sorted(fuzz_slots.CORPUS.iterdir()), ids=lambda path: path.name)
def test_corpus(target, path):
    target(path.read_bytes())


def test_mutations(target):
    inputs = fuzz_slots.mutations(random.Random(2))
    for data in itertools.islice(inputs, 1_000_000 if LONG else 1_500):
        target(data)
