"""VHDs damaged at random: refused in a line or served, and nothing is read outside of the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz.images import damaged, seeds, survives
from long_run import repeat

CORPUS = Path(__file__).parents[2] / "fuzz/corpus/vhd"


def test_what_the_fuzzer_has_kept(tmp_path):
    good = seeds(tmp_path)
    for path in CORPUS.iterdir():
        survives(tmp_path / "disk.vhd", damaged(good, path.read_bytes()))


@pytest.mark.parametrize("seed", repeat(4, 400))
def test_whatever_is_damaged_is_refused_or_served(seed, tmp_path):
    """With a right checksum, mostly: else nothing but that would be tried."""
    good = seeds(tmp_path)
    dice = random.Random(seed)
    for _ in range(25):
        changes = dice.randbytes(5 * dice.choice((1, 1, 1, 2, 3)))
        # near the structures rather than anywhere
        near = b"".join(
            bytes([dice.choice((0, 0, 2, 2, 4, 4, 6, 8, 0xFF)), *changes[at + 1 : at + 5]])
            for at in range(0, len(changes), 5)
        )
        flags = 3 if dice.random() < 0.8 else dice.randrange(16)
        data = bytes([dice.randrange(4), flags]) + near
        try:
            survives(tmp_path / "disk.vhd", damaged(good, data))
        except BaseException as error:
            raise AssertionError(f"{data.hex()}: {error!r}") from error
