"""Fixtures of the tests in dom0; on any other machine every test of this directory is skipped."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Callable

import pytest

from . import pace, peer
from .disk import Disk, left_over, lost, xenstore_snapshot
from .guest import Dom0, Guest, SharedGuest, Shell

HERE = Path(__file__).resolve().parent
IN_LAB = "XEN_LAB" in os.environ
LONG = ("test_protocol.py", "test_life.py")
"""Modules whose cases in PVH guests are left to a long run."""
WHY = 4000
"""So many characters of the end of a test's traceback are noted."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a person say how many states of each recorded load are tried."""
    parser.addoption("--states", type=int, default=12, help="crashtest's, for each; 0: record only")
    parser.addoption("--note", metavar="FILE", help="note each test in it as it ends, as JSON")
    parser.addoption("--done", metavar="FILE", help="leave out the tests that it names, one a line")


class Notes:
    """Notes what was collected, and how each test ended, for a run that may be interrupted."""

    def __init__(self, path: str, done: set[str]) -> None:
        self._path = path
        self._done = done
        self._outcome = "passed"
        self._seconds = 0.0
        self._why: dict[str, str] = {}

    def _write(self, **noted: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(noted) + "\n")

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Note which tests there are, and leave out those that are done."""
        self._write(collected=[item.nodeid for item in items])
        done = [item for item in items if item.nodeid in self._done]
        items[:] = [item for item in items if item.nodeid not in self._done]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test when its fixtures are gone; the worst of its three parts counts."""
        if report.when == "setup":
            self._outcome, self._seconds, self._why = "passed", 0.0, {}
        self._seconds += report.duration
        if not report.passed and self._outcome != "failed":
            self._outcome = report.outcome
            if report.failed:  # pytest tells it at the end of the run, which may not be reached
                self._why = {"why": report.longreprtext[-WHY:]}
        if report.when == "teardown":
            seconds = round(self._seconds, 1)
            self._write(test=report.nodeid, outcome=self._outcome, seconds=seconds, **self._why)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks, for a run whose configuration does not know them."""
    if note := config.getoption("--note", None):  # pytest 8 may read this file too late
        done = config.getoption("--done")
        names = Path(done).read_text().splitlines() if done else []
        config.pluginmanager.register(Notes(note, set(names)))
    config.addinivalue_line("markers", "xen: needs a real Xen dom0, which the lab boots")
    config.addinivalue_line("markers", "smoke: shows a feature once; what .ci/run runs")
    config.addinivalue_line("markers", "long: not in the ordinary run; with -m long")
    config.addinivalue_line("markers", "pair: needs two dom0s, the lab's --pair")
    config.addinivalue_line("markers", "timeout: seconds that a test may take (pytest-timeout)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory, and skip it outside the lab."""
    for item in items:
        if HERE in Path(str(item.path)).parents:
            item.add_marker(pytest.mark.xen)
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if item.path.name in LONG and parameters.get("kind") == "pvh":
                item.add_marker(pytest.mark.long)
            if not IN_LAB:
                item.add_marker(pytest.mark.skip(reason="needs Xen: run tox -e xen"))
                continue
            marker = item.get_closest_marker("timeout")
            seconds = marker.args[0] if marker else float(item.config.getini("timeout"))
            item.add_marker(pytest.mark.timeout(pace.patient(seconds)), append=False)
            if item.get_closest_marker("pair") and not peer.ADDRESS:
                item.add_marker(pytest.mark.skip(reason="needs a second dom0: the lab's --pair"))


def pytest_report_header() -> str | None:
    """Say by how much every limit is longer than on an ordinary machine."""
    if not IN_LAB:
        return None
    took = f"the program took {pace.SECONDS:.1f} s to start"
    return f"{took}: limits are {pace.FACTOR:.1f} times as long"


@pytest.fixture(scope="session")
def dom0() -> Dom0:
    """Domain 0 as its own guest, the cheapest there is."""
    subprocess.run(["modprobe", "xen-blkfront"], check=True)
    return Dom0()


@pytest.fixture(scope="session")
def shared_pv() -> Iterator[SharedGuest]:
    with closing(SharedGuest("pv", fio=True)) as shared:
        yield shared


@pytest.fixture(scope="module")  # another for each, so that the memory is free in between
def shared_pvh() -> Iterator[SharedGuest]:
    with closing(SharedGuest("pvh")) as shared:
        yield shared


@pytest.fixture
def pv_guest(shared_pv: SharedGuest) -> Guest:
    """One PV guest for the whole session, with fio."""
    return shared_pv.get()


@pytest.fixture
def pvh_guest(shared_pvh: SharedGuest) -> Guest:
    """One PVH guest for all tests of a file."""
    return shared_pvh.get()


@pytest.fixture(autouse=True)
def guests_first(request: pytest.FixtureRequest) -> None:
    """Have them, or another, before anything of the test notes what xenstore has."""
    for name in ("pv_guest", "pvh_guest"):
        if name in request.fixturenames:
            request.getfixturevalue(name)


@pytest.fixture
def new_guest() -> Iterator[Callable[..., Guest]]:
    """Return a function that makes guests, which are gone after the test."""
    guests: list[Guest] = []

    def make(kind: str = "pv", **options: Any) -> Guest:
        guests.append(Guest(kind, **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.destroy()


@pytest.fixture
def connect() -> Iterator[Callable[..., Disk]]:
    """Return a function that starts ``connect``; whatever it started has ended after the test.

    Where other tests follow in the guest, the disk has left it: Linux could take the next one of
    that name for the one that it is about to remove.
    """
    disks: list[Disk] = []

    def start(guest: Shell, *arguments: Any, **options: Any) -> Disk:
        disks.append(Disk(guest, *arguments, **options))
        return disks[-1]

    yield start
    for disk in reversed(disks):
        disk.close()
        if disk.guest.is_shared and disk.info and disk.process.returncode == 0:
            disk.guest.wait_gone(disk.device)


@pytest.fixture
def xenstore_unchanged() -> Iterator[None]:
    """Fail the test when xenstore's nodes differ at its end from those at its start."""
    before = xenstore_snapshot()
    yield
    assert left_over(before) == {}
    assert lost(before, xenstore_snapshot()) == {}
