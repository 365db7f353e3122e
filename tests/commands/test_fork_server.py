"""``fork-server``: ready to fork, whatever of what it does beforehand fails."""

from __future__ import annotations

import argparse
import io
import os

import pytest

from xen_disk_py.commands import fork_server
from xen_disk_py.commands.environment import Environment
from xen_disk_py.errors import ImageError
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.spec import DiskSpec


@pytest.fixture
def begun(monkeypatch):
    """Return what it names processes by, once it would serve."""
    found = []

    def serve(name, steps):
        for step in steps:
            step()
        found.append(name)

    monkeypatch.setattr("xen_disk_py.host.forkserver.serve", serve)
    return found


def run():
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO())
    assert ExitStatus.OK == fork_server.run(argparse.Namespace(), env)
    return env.stderr.getvalue()


def test_nothing_that_it_has_opened_stays_open(begun):
    run()  # imports, too
    before = sorted(os.listdir("/proc/self/fd"))
    assert "" == run()
    assert before == sorted(os.listdir("/proc/self/fd"))
    assert "xen-disk adopt 5 51728" == begun[0](["adopt", "5", "51728"])


@pytest.mark.parametrize("error", [ImageError("no memory"), OSError("no descriptor")])
def test_a_disk_that_cannot_be_opened_beforehand_is_none_of_a_guest(begun, error, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(DiskSpec, "open_disk", fail)
    run()
    assert 1 == len(begun)
