"""A whole run of the lab may be interrupted and continued: what has passed is noted as it does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from xen.lab.machine import LabError
from xen.lab.progress import Follower, Progress, commit_of, report, summary_of

pytestmark = pytest.mark.shared  # git and pytest are started

TESTS = Path(__file__).parent

MODULE = """
import pytest

@pytest.fixture
def torn():
    yield
    raise OSError("at its end")

def test_good(): pass
def test_bad(): assert False
def test_torn(torn): pass
@pytest.mark.skip(reason="no Xen")
def test_skipped(): pass
def test_done(): assert False, "not again"
@pytest.mark.long
def test_long(): assert False, "not asked for"
"""


def noted(*outcomes, collected=None):
    lines = [] if collected is None else [json.dumps({"collected": collected})]
    lines += [
        json.dumps({"test": name, "outcome": outcome, "seconds": 30}) for name, outcome in outcomes
    ]
    return "".join(f"{line}\n" for line in lines)


def test_pytest_notes_each_test_and_leaves_out_what_is_done(tmp_path):
    (tmp_path / "test_module.py").write_text(MODULE)
    (tmp_path / "done").write_text("test_module.py::test_done\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "xen.conftest", "-p", "no:cacheprovider"),
            *("--note", "notes", "--done", "done", "-m", "not long", "-q"),
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TESTS), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 failed" not in done.stdout  # an error at its end is none of the test's own
    assert "1 failed, 2 passed, 1 skipped, 2 deselected, 1 error" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    names = ["good", "bad", "torn", "skipped", "done"]
    assert {"collected": [f"test_module.py::test_{name}" for name in names]} == lines[0]
    assert ["passed", "failed", "failed", "skipped"] == [each["outcome"] for each in lines[1:]]
    assert [False, True, True, False] == ["why" in each for each in lines[1:]]
    assert "\nE   assert False" in lines[2]["why"]
    assert "OSError: at its end" in lines[3]["why"]


def test_what_was_noted_is_kept_as_it_comes(tmp_path):
    """And a line that is not whole yet is left for the next time."""
    notes = tmp_path / "notes"
    path = tmp_path / "kept/bookworm-0123.jsonl"
    follower = Follower(Progress(path), notes)
    follower.look()
    assert not path.exists()
    text = noted(("a", "passed"), ("b", "failed"), collected=["a", "b", "c"])
    for end in range(len(text) + 1):
        notes.write_text(text[:end])
        follower.look()
        assert text[: text[:end].rfind("\n") + 1] == (path.read_text() if path.exists() else "")
    assert ["a"] == Progress(path).done


def test_a_writer_that_was_killed_within_a_line(tmp_path):
    path = tmp_path / "bookworm-0123.jsonl"
    path.write_text(noted(("a", "passed")) + '{"test": "b", "outc')
    progress = Progress(path)
    progress.keep(noted(("c", "skipped")))
    assert ["a", "c"] == Progress(path).done


def test_the_last_outcome_counts(tmp_path):
    path = tmp_path / "trixie-0123.jsonl"
    path.write_text(
        noted(("t.py::a", "failed"), ("t.py::b", "passed"), collected=["t.py::a", "t.py::b"])
        + noted(("t.py::a", "passed"), collected=["t.py::a"])  # the second try
        + noted(
            *(("t.py::d", "skipped"), ("t.py::b", "failed")),
            collected=["t.py::c", "t.py::d", "t.py::b", "u.py::e"],
        )
    )
    found = summary_of(Progress(path))
    assert (["t.py::a"], ["t.py::d"], ["t.py::b"]) == (found.passed, found.skipped, found.failed)
    assert (["t.py::c", "u.py::e"], ["t.py::a"]) == (found.not_run, found.passed_later)
    assert [
        "trixie-0123: 5 tests: 1 passed, 1 skipped, 1 failed, 2 not run; "
        "1 passed at a later try; 2 minutes",
        "  failed: t.py::b",
        "  passed at a later try: t.py::a",
        "  not run: 1 of t.py",
        "  not run: 1 of u.py",
    ] == list(report(tmp_path))


def test_why_a_test_has_failed(tmp_path):
    """Of the last time, and of one that has passed since nothing."""
    path = tmp_path / "trixie-0123.jsonl"

    def tried(name, outcome, **why):
        return json.dumps({"test": name, "outcome": outcome, "seconds": 0, **why}) + "\n"

    slow = ">  assert 12 < 10\nE  assert 12 < 10\nE   +  where\n\nt.py:1: AssertionError"
    path.write_text(
        noted(collected=["a", "b"])
        + tried("a", "failed", why="E  died")
        + tried("a", "failed", why=slow)
        + tried("b", "failed", why=slow)
        + tried("b", "passed")
    )
    _, failed, why, later = report(tmp_path)
    assert ("  failed: a", "    assert 12 < 10") == (failed, why)
    assert "  passed at a later try: b" == later


def test_nothing_to_sum_up(tmp_path):
    with pytest.raises(LabError, match="has nothing of a run"):
        list(report(tmp_path))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_a_commit_can_be_continued(tmp_path):
    with pytest.raises(LabError, match="needs a checkout by git"):
        commit_of(tmp_path)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    assert 12 == len(commit_of(tmp_path))
    (tmp_path / "file").write_text("two")
    with pytest.raises(LabError, match="differs from its own: commit"):
        commit_of(tmp_path)
