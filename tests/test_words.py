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
    r"(lend(s|ing)?|lent|loans?)\b": "acquire and release buffers; map",
    r"(let|lets|letting) (it |them |him |the disk )?go\b": "release; unpause",
    r"look(s|ed|ing)? on\b": "busy-poll",
    r"mend(s|ed|ing)?\b": "fix",
    r"tells? the truth\b": "can be trusted",
    r"one behind the other\b": "contiguous",
    r"process(es)?( that was killed)? (has |have )?left\b": "orphan; unanswered requests",
    r"polite(ly|ness)?\b": "gracefully",
    r"quiet ?points?\b": "drained section",
    r"rehears(e|es|ed|al|ing)\b": "dry run",
    r"requests? (is|are) held\b": "queued for retry",
    r"requests per look\b": "requests per batch",
    r"runs? of bytes\b": "extent",
    r"scratch\b": "temporary",
    r"(stand-?ins?|stood in)\b": "orphan responder",
    r"storms?\b": "event flood",
    r"trouble\b": "problem; retry",
    r"whoever (reads|writes) in order\b": "sequential reads, writes",
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


IGNORED = {"__pycache__", "corpus", Path(__file__).name}


def anywhere(word):
    """Find a word also where a line ends in it, in a comment, say."""
    return re.compile(word.replace(" ", r"[\s#]+"), re.IGNORECASE)


ANY = anywhere(rf"(?<![a-z])({'|'.join(WORDS)})")


def found():
    """Every such word in what people read of this tree, and where it is."""
    texts = 0
    hits = []
    for path in sorted({path for place in PLACES for path in ROOT.glob(place)}):
        name = path.relative_to(ROOT)
        if path.suffix in ENDS and path.is_file() and not IGNORED.intersection(name.parts):
            text = KEPT.sub("", path.read_text(encoding="utf-8")).replace("_", " ")
            texts += 1
            for match in ANY.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                hits.append((match.group(), f"{name}:{line}: {match.group()}"))
    assert texts > 200
    return hits


def test_no_word_of_our_own():
    """Write what ``WORDS`` has for it."""
    assert [] == [
        (place, instead)
        for text, place in found()
        for word, instead in WORDS.items()
        if anywhere(word).fullmatch(text)
    ]


@pytest.mark.parametrize(
    "text", ["Goes on with", "a_folder", "it has let the disk go", "storms.", "for\n    # ever"]
)
def test_a_word_is_found(text):
    assert ANY.search(text.replace("_", " "))


@pytest.mark.parametrize("text", ["holder", "--scratch", '"folder"', "recommend", "amended"])
def test_other_words_are_not(text):
    assert not ANY.search(KEPT.sub("", text))
