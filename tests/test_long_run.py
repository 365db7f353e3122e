"""What each Python runs, where several run the tests."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import long_run
import pytest


def case(name, *marks, directory="datapath"):
    return SimpleNamespace(
        nodeid=f"tests/{directory}/test_x.py::{name}[a]",
        originalname=name,
        get_closest_marker=lambda wanted: object() if wanted in marks else None,
    )


TESTS = [
    *(case("test_many", "shared") for _ in range(20)),
    *(case(f"test_{number}", directory="backends") for number in range(20)),
    *(case("test_cheap") for _ in range(3)),
    *(case("test_extra", "each_python", directory="backends") for _ in range(2)),
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
def test_each_shared_case_runs_on_one_of_the_pythons_and_each_other_on_all(of, pythons):
    shares = [of(minor, *pythons) for minor in pythons]
    times = [sum(chosen) for chosen in zip(*shares)]
    assert [1] * 40 + [len(pythons)] * 5 == times


@pytest.mark.parametrize("pythons", [(9, 10), (9, 11, 13), (9, 10, 11, 12, 13), range(9, 16)])
def test_each_python_runs_as_many_cases_of_a_function(of, pythons):
    fewest = 20 // len(pythons)
    for minor in pythons:
        assert sum(of(minor, *pythons)[:20]) in (fewest, fewest + 1)


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
