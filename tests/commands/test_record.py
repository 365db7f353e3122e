"""``record``: from when to when one says, while a guest uses the disk; other processes continue."""

from __future__ import annotations

import json

import pytest
from test_json_page import check

from commands.test_filter import connect, end, read_status  # noqa: F401 - connect is a fixture
from xen_disk_py.blkif import OKAY
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.trace.format import GAP, READ, RESIZED, RESUMED, STOPPED
from xen_disk_py.trace.reader import TraceReader


@pytest.fixture
def record(host):
    def record(*argv, status=ExitStatus.OK):
        env = host.environment()
        assert status == main(["record", "guest", "xvdb", *map(str, argv)], env)
        return env.stdout.getvalue(), " ".join(env.stderr.getvalue().split())

    return record


def operations(path):
    with TraceReader(str(path)) as reader:
        return [each.operation for each in reader.records()], reader.ending


def test_a_running_disk_is_recorded_and_a_successor_continues(
    host,
    connect,  # noqa: F811
    record,
    tmp_path,
):
    trace = tmp_path / "t.xdt"
    process, frontend = connect("record:on=no")
    assert "not recorded\n" == record("status")[0]
    assert OKAY == read_status(frontend)
    assert str(trace) in record("start", trace)[0]
    assert OKAY == read_status(frontend)
    check("record", record("status", "--json")[0])
    host.until(lambda: json.loads(record("status", "--json")[0])["requests"] == 1)
    assert ExitStatus.OK == main(["upgrade", "guest", "xvdb"], host.environment())
    assert OKAY == read_status(frontend)
    assert "not recorded\n" == record("stop")[0]
    found, ending = operations(trace)
    assert [READ, RESUMED, GAP, RESIZED, READ, STOPPED] == found
    assert ending.is_complete
    assert "never overwritten" in record("start", trace, status=ExitStatus.ERROR)[1]
    end(host, process, frontend)


def test_what_cannot_be_is_said(host, connect, record):  # noqa: F811
    process, frontend = connect("delay:read=1us")
    assert "--filter record:on=no" in record("status", status=ExitStatus.ERROR)[1]
    record("start", status=ExitStatus.USAGE)
    record("stop", "x", status=ExitStatus.USAGE)
    end(host, process, frontend)
