"""What each Python runs, where several run the tests."""

from __future__ import annotations

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
    *(case("test_many", marked=True) for _ in range(10)),
    *(case(f"test_{number}", directory="backends") for number in range(20)),
    *(case("test_cheap") for _ in range(3)),
]


@pytest.fixture
def of(monkeypatch):
    """Return which tests a Python of that minor version runs."""
    monkeypatch.setenv("XEN_DISK_SHARE", "1")
    monkeypatch.setattr(long_run, "LONG", False)

    def of(minor):
        monkeypatch.setattr(sys, "version_info", SimpleNamespace(minor=minor))
        return long_run.of_this_python(TESTS)

    return of


def test_each_shared_case_runs_on_3_11_and_on_one_of_the_others(of):
    assert {True} == set(of(11))
    shares = [of(minor) for minor in (9, 10, 12, 13)]
    times = [sum(chosen) for chosen in zip(*shares)]
    assert [1] * 30 + [4] * 3 == times
    for share in shares:
        assert 2 <= sum(share[:10]) <= 3


def test_a_run_on_one_python_is_whole(of, monkeypatch):
    monkeypatch.delenv("XEN_DISK_SHARE")
    assert {True} == set(of(13))
    monkeypatch.setenv("XEN_DISK_SHARE", "1")
    monkeypatch.setattr(long_run, "LONG", True)
    assert {True} == set(of(13))


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
