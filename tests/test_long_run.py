"""What each Python runs, where several run the tests."""

from __future__ import annotations

import itertools
import operator
import sys
from types import SimpleNamespace

import long_run
import pytest


def case(name, *, marked=False, directory="datapath"):
    marker = object() if marked else None
    return SimpleNamespace(
        nodeid=f"tests/{directory}/test_x.py::{name}[a]",
        originalname=name,
        get_closest_marker=lambda wanted: marker if wanted == "shared" else None,
    )


TESTS = [
    *(case("test_many", marked=True) for _ in range(20)),
    *(case(f"test_{number}", directory="backends") for number in range(20)),
    *(case("test_cheap") for _ in range(3)),
]


@pytest.fixture
def of(monkeypatch):
    """Return which tests a Python of that minor version runs, where some share them out."""
    monkeypatch.setattr(long_run, "LONG", False)

    def of(minor, *pythons):
        monkeypatch.setenv("XEN_DISK_SHARE", " ".join(f"3.{each}" for each in pythons))
        monkeypatch.setattr(sys, "version_info", (3, minor, 1))
        return long_run.of_this_python(TESTS)

    return of


@pytest.mark.parametrize("pythons", [(9, 10), (9, 11, 13), (9, 10, 11, 12, 13), range(9, 16)])
def test_each_shared_case_runs_on_two_of_the_pythons_and_each_other_on_all(of, pythons):
    shares = [of(minor, *pythons) for minor in pythons]
    times = [sum(chosen) for chosen in zip(*shares)]
    assert [2] * 40 + [len(pythons)] * 3 == times
    most = -(-2 * 20 // len(pythons))
    for share in shares:
        assert most - 2 <= sum(share[:20]) <= most + 2


def test_any_two_pythons_have_cases_in_common(of):
    pythons = (9, 10, 11, 12, 13)
    shares = {minor: of(minor, *pythons) for minor in pythons}
    for one, other in itertools.combinations(pythons, 2):
        assert any(map(operator.and_, shares[one][:20], shares[other][:20]))


def test_a_run_on_one_python_is_whole(of, monkeypatch):
    assert {True} == set(of(13))
    assert {True} == set(of(13, 13))
    assert {True} == set(of(13, 9, 10, 11))
    monkeypatch.setattr(long_run, "LONG", True)
    assert {True} == set(of(13, 9, 10, 13))


def test_the_processor_time_of_each_python_is_noted(tmp_path, monkeypatch):
    times = tmp_path / "times"
    monkeypatch.setenv("XEN_DISK_TIMES", str(times))
    for version in [(3, 9, 18), (3, 13, 0)]:
        monkeypatch.setattr(sys, "version_info", version)
        text = f"processor time on Python 3.{version[1]}: 50 s"
        assert text == long_run.note_time(49.7)
    assert ["Python 3.9: 50 s", "Python 3.13: 50 s"] == times.read_text().splitlines()
    monkeypatch.delenv("XEN_DISK_TIMES")
    long_run.note_time(1)
    assert 2 == len(times.read_text().splitlines())


def test_why_a_test_failed_takes_ten_lines():
    crash = SimpleNamespace(path="/t/test_a.py", lineno=7, message="first\n" + "more\n" * 90)
    steps = [f">       call({number})" for number in range(9)]
    text = "\n".join([*steps, *(f"local{number} = 0" for number in range(90))])
    report = SimpleNamespace(longrepr=SimpleNamespace(reprcrash=crash), longreprtext=text)
    expected = ["/t/test_a.py:7:", *steps[-3:], "first", *["more"] * 5]
    assert expected == long_run.why(report).splitlines()
    report = SimpleNamespace(longrepr=text, longreprtext=text)
    assert text.splitlines()[-10:] == long_run.why(report).splitlines()
