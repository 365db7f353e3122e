"""The words of Xen, Linux's block layer, QEMU and nbdkit, and no dialect of our own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What is not written here, and what to write instead. Each begins a word; case does not count.
WORDS = {
    r"adrift\b": "orphaned",
    r"answered status -1": "I/O error (BLKIF_RSP_ERROR)",
    r"by now\b": "current, installed; now",
    r"folders?\b": "directory",
    r"for ever\b": "indefinitely",
    r"(go|goes|going|went|gone) on\b": "take over, resume, continue",
    r"halves\b": "double buffer; frontend and backend",
    r"(let|lets|letting) (it |them |him |the disk )?go\b": "release; unpause",
    r"look(s|ed|ing)? on\b": "busy-poll",
    r"mend(s|ed|ing)?\b": "fix",
    r"one behind the other\b": "contiguous",
    r"polite(ly|ness)?\b": "gracefully",
    r"rehears(e|es|ed|al|ing)\b": "dry run",
    r"requests? (is|are) held\b": "queued for retry",
    r"requests per look\b": "requests per batch",
    r"runs? of bytes\b": "extent",
    r"scratch\b": "temporary",
    r"(stand-?ins?|stood in)\b": "orphan responder",
    r"storms?\b": "event flood",
    r"trouble\b": "problem; retry",
    r"wish(es|ed)?\b": "resize request; config",
}

# Names of options and of facts in a record, which stay what they are.
KEPT = re.compile(
    r"--rehearse|args\.rehearse|--scratch|(args|arguments)\.scratch|[\"']folder[\"']|let_go\b"
)

PLACES = (
    "*.md",
    "*.toml",
    "*.ini",
    ".ci/*",
    *(
        f"{directory}/**/*"
        for directory in ("xen_disk_py", "tests", "benchmarks", "examples", "docs", "findings")
    ),
)
ENDS = {"", ".md", ".py", ".sh", ".service", ".fish", ".toml", ".ini"}


def lines():
    """Give each line of the tree that people read, with the place where it is."""
    for path in sorted({path for place in PLACES for path in ROOT.glob(place)}):
        name = path.relative_to(ROOT)
        if path.suffix in ENDS and path.is_file() and not IGNORED.intersection(name.parts):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield f"{name}:{number}: {line.strip()}", KEPT.sub("", line).replace("_", " ")


IGNORED = {"__pycache__", "corpus", Path(__file__).name}
LINES = list(lines())


@pytest.mark.parametrize("word", WORDS)
def test_no_word_of_our_own(word):
    """Write what the value says; a ``git grep`` finds none of them left."""
    pattern = re.compile(rf"(?<![a-z]){word}", re.IGNORECASE)
    assert [] == [place for place, line in LINES if pattern.search(line)], WORDS[word]


def test_the_tree_is_read():
    assert 20_000 < len(LINES)
