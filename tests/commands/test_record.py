"""``record``: from when to when one says, while a guest uses the disk; other processes continue."""

from __future__ import annotations

import json
import shutil

import pytest
from test_json_page import check

from commands.test_filter import (  # noqa: F401 - connect is a fixture
    ADDRESS,
    connect,
    end,
    read_status,
)
from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.blkif import OKAY
from xen_disk_py.cli import main
from xen_disk_py.errors import XenUnavailable
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.record import find
from xen_disk_py.trace.format import FLUSH, GAP, READ, RESIZED, RESUMED, STOPPED, WRITE
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
    assert f"no longer recorded in {trace}: 1 requests, 0 lost\n" == record("stop")[0]
    assert "not recorded\n" == record("status")[0]
    found, ending = operations(trace)
    assert [READ, RESUMED, GAP, RESIZED, READ, STOPPED] == found
    assert ending.is_complete
    assert "never overwritten" in record("start", trace, status=ExitStatus.ERROR)[1]
    end(host, process, frontend)


def header(path):
    with TraceReader(str(path)) as reader:
        return reader.header


def test_any_disk_can_be_recorded_and_what_was_put_there_is_taken_away(
    host,
    connect,  # noqa: F811
    record,
    image,
    tmp_path,
):
    trace = tmp_path / "t.xdt"
    process, frontend = connect()
    assert "not recorded\n" == record("status")[0]
    record("start", trace, "--data")
    frontend.write(4096, b"x" * 4096)
    frontend.flush()
    assert f"recorded in {trace} with data" in record("status")[0]
    assert f"already, in {trace}" in record("start", tmp_path / "u", status=ExitStatus.USAGE)[1]
    assert f"no longer recorded in {trace}: 2 requests, 0 lost\n" == record("stop")[0]
    assert "not recorded\n" == record("stop")[0]
    frontend.write(8192, b"y" * 4096)
    assert () == find(host.records, ADDRESS).facts.spec.filters
    found = header(trace)
    assert ("guest", "xvdb", str(image)) == (found.guest, found.vdev, found.path)
    assert 32 == len(found.samples)
    with TraceReader(str(trace)) as reader:
        records = list(reader.records())
    assert [WRITE, FLUSH, STOPPED] == [each.operation for each in records]
    assert [0, 0] == [each.queue for each in records[:2]]
    end(host, process, frontend)


def test_one_that_was_begun_in_use_is_continued_when_the_process_was_killed(
    host,
    connect,  # noqa: F811
    record,
    processes,
    tmp_path,
):
    trace = tmp_path / "t.xdt"
    process, frontend = connect("delay:read=1us")
    record("start", trace)
    assert OKAY == read_status(frontend)
    host.until(lambda: json.loads(record("status", "--json")[0])["requests"] == 1)
    process.kill()
    process = processes.start("connect", "--adopt", "guest", "xvdb")
    process.until(" rw")
    assert OKAY == read_status(frontend)
    assert "recorded in" in record("status")[0]
    env = host.environment()
    assert ExitStatus.OK == main(["filter", "guest", "xvdb", "list", "--json"], env)
    assert ["delay", "record"] == [each["name"] for each in json.loads(env.stdout.getvalue())]
    record("stop")
    assert ("delay:read=1us",) == find(host.records, ADDRESS).facts.spec.filters
    assert [READ, RESUMED, GAP, RESIZED, READ, STOPPED] == operations(trace)[0]
    end(host, process, frontend)


def test_a_recorder_among_other_filters_stays_where_it_is(host, connect, record, tmp_path):  # noqa: F811
    process, frontend = connect("record:on=no", "delay:read=1us")
    record("start", tmp_path / "t.xdt")
    assert OKAY == read_status(frontend)
    record("stop")
    assert "not recorded\n" == record("status")[0]
    assert [READ, STOPPED] == operations(tmp_path / "t.xdt")[0]
    end(host, process, frontend)


def test_what_cannot_be_is_said_and_changes_nothing(host, connect, record, tmp_path):  # noqa: F811
    process, frontend = connect()
    record("start", status=ExitStatus.USAGE)
    record("stop", "x", status=ExitStatus.USAGE)
    (tmp_path / "there").touch()
    for name, said, status in (
        ("there", "never overwritten", ExitStatus.ERROR),
        ("no/t.xdt", "there is no directory", ExitStatus.ERROR),
        ("a,b", "no comma", ExitStatus.USAGE),
    ):
        assert said in record("start", tmp_path / name, status=status)[1]
        assert "not recorded\n" == record("status")[0]
    ring = record("start", tmp_path / "t.xdt", "--ring", "1M", status=ExitStatus.USAGE)[1]
    assert "at least 64 MiB" in ring
    assert () == find(host.records, ADDRESS).facts.spec.filters
    assert OKAY == read_status(frontend)
    end(host, process, frontend)


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="needs nbdkit")
def test_a_disk_on_a_server_that_does_many_requests_at_once(host, processes, record, tmp_path):
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))
    argv = ["--path", "[ nbdkit --exit-with-parent memory 1M ]", "--vdev=xvdb"]
    process = processes.start("connect", "guest", *argv)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    frontend.write(0, b"a" * 8192)
    for name in ("1", "2"):
        record("start", tmp_path / name, "--data")
        frontend.write(4096, name.encode() * 4096)
        assert name.encode() * 4096 == frontend.read(4096, 4096)
        frontend.flush()
        assert ": 3 requests, 0 lost" in record("stop")[0]
        with TraceReader(str(tmp_path / name)) as reader:
            found = list(reader.records(data=True))
        assert [WRITE, READ, FLUSH, STOPPED] == [each.operation for each in found]
        assert name.encode() * 4096 == found[0].data
        assert 0 == found[0].queue
    assert b"a" * 4096 + b"2" * 4096 == frontend.read(0, 8192)
    end(host, process, frontend)
