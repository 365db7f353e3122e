"""How far a whole run of the tests has come, so that it may be interrupted and continued.

dom0's pytest notes each test as it ends (``tests/xen/conftest.py``), a JSON object a line, and what
it has collected before. Here these lines are kept, in a file for each suite and commit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .machine import LabError

NOTES = "tests.jsonl"
"""The file in dom0's results that the tests are noted in."""
DONE = {"passed", "skipped"}


def commit_of(checkout: Path) -> str:
    """Return the commit that a checkout is at.

    Raises:
        LabError: it is not at one, or differs from it: what has passed says nothing of another.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=checkout, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise LabError(f"--continue needs a checkout by git: {done.stderr.strip()}")
        return done.stdout.strip()

    if git("status", "--porcelain", "--untracked-files=no"):
        raise LabError("--continue needs a commit, and the checkout differs from its own: commit")
    return git("rev-parse", "--short=12", "HEAD")


class Progress:
    """What is known of one suite at one commit.

    Attributes:
        collected: the tests there are, as the last run found them.
        outcomes: of each test that has ended, how it did each time.
        reasons: the end of the traceback of each that has failed, the last time.
        seconds: how long all of that took.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.collected: list[str] = []
        self.outcomes: dict[str, list[str]] = {}
        self.reasons: dict[str, str] = {}
        self.seconds = 0.0
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                self._note(line)

    def _note(self, line: str) -> bool:
        """Take a line, if it is one: the writer may have been stopped within the last."""
        try:
            noted = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            noted = None
        if not isinstance(noted, dict):
            return False
        if "collected" in noted:
            # A run of a part of the tests adds to the others.
            known = set(self.collected)
            self.collected += [name for name in noted["collected"] if name not in known]
        else:
            self.outcomes.setdefault(noted["test"], []).append(noted["outcome"])
            self.seconds += noted["seconds"]
            if "why" in noted:
                self.reasons[noted["test"]] = noted["why"]
        return True

    @property
    def done(self) -> list[str]:
        """The tests that need not run again."""
        return [name for name, outcomes in self.outcomes.items() if outcomes[-1] in DONE]

    def keep(self, line: str) -> None:
        """Keep a line that dom0 has noted."""
        if self._note(line):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")  # whoever wrote before was stopped within a line
                file.write(line.encode())


class Follower:
    """Keeps what dom0 notes in one run, as it comes: this process may be killed at any time."""

    def __init__(self, progress: Progress, notes: Path) -> None:
        self._progress = progress
        self._notes = notes
        self._taken = 0

    def look(self) -> None:
        """Keep the lines that are new, those that are whole."""
        if not self._notes.exists():
            return
        with self._notes.open("rb") as file:
            file.seek(self._taken)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._taken += len(whole)
        for line in whole.decode().splitlines(keepends=True):
            self._progress.keep(line)


class Summary(NamedTuple):
    """What a suite's file says, each a list of tests."""

    passed: list[str]
    skipped: list[str]
    failed: list[str]
    not_run: list[str]
    passed_later: list[str]
    seconds: float


def summary_of(progress: Progress) -> Summary:
    """Sum up; the last outcome of a test counts, and that of a test that is gone does not."""
    last = {name: outcomes[-1] for name, outcomes in progress.outcomes.items()}
    tests = progress.collected

    def those(outcome: str | None) -> list[str]:
        return [name for name in tests if last.get(name) == outcome]

    later = [name for name in those("passed") if "failed" in progress.outcomes[name]]
    return Summary(
        those("passed"), those("skipped"), those("failed"), those(None), later, progress.seconds
    )


def report(directory: Path) -> Iterator[str]:
    """Say what has passed, failed, and not run, for each suite and commit in a directory.

    Raises:
        LabError: there is none.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise LabError(f"{directory} has nothing of a run with --continue")
    for path in files:
        progress = Progress(path)
        found = summary_of(progress)
        count = sum(map(len, found[:4]))
        counts = f"{len(found.passed)} passed, {len(found.skipped)} skipped, "
        counts += f"{len(found.failed)} failed, {len(found.not_run)} not run"
        later, minutes = len(found.passed_later), found.seconds / 60
        yield (
            f"{path.stem}: {count} tests: {counts}; {later} passed at a later try; "
            f"{minutes:.0f} minutes"
        )
        for name in found.failed:
            yield f"  failed: {name}"
            said = re.search(r"^E +(.+)$", progress.reasons.get(name, ""), re.MULTILINE)
            if said is not None:
                yield f"    {said[1]}"
        for name in found.passed_later:
            yield f"  passed at a later try: {name}"
        for module, number in Counter(name.partition("::")[0] for name in found.not_run).items():
            yield f"  not run: {number} of {module}"
