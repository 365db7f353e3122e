"""``trace``: a trace, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import struct
import subprocess

import pytest

from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.trace.export import blkparse
from xen_disk_py.trace.format import DISCARD, FLUSH, READ, STOPPED, WRITE, Header, Record
from xen_disk_py.trace.writer import TraceWriter, event

MS = 1_000_000
RECORDS = [
    Record(0, WRITE, 1 * MS, MS, 0, 4096, data=b"x" * 4096),
    Record(1, READ, 3 * MS, MS, 8192, 512, status=5),
    Record(2, FLUSH, 5 * MS, 40 * MS, 0, 0),
    Record(3, READ, 4 * MS, 50 * MS, 4096, 65536),  # began before the flush, ended after it
    Record(4, DISCARD, 60 * MS, MS, 0, 4096),
]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.xdt"
    header = Header(1 << 20, 512, 0, 0, b"s" * 16, data=True)
    with TraceWriter.create(str(path), header) as writer:
        writer.append(RECORDS[:2])
        writer.append([*RECORDS[2:], event(STOPPED, 70 * MS)])
    return path


@pytest.fixture
def run(host):
    def run(*argv, status=ExitStatus.OK):
        env = host.environment()
        assert status == main([*map(str, argv)], env)
        return env.stdout.getvalue(), env.stderr.getvalue()

    return run


def test_json_lines_and_csv_say_the_same(run, trace):
    lines = [json.loads(line) for line in run("trace", trace, "--json")[0].splitlines()]
    rows = list(csv.DictReader(io.StringIO(run("trace", trace, "--csv")[0])))
    names = ["write", "read", "flush", "read", "discard", "stopped"]
    assert names == [each["operation"] for each in lines]
    for line, row in zip(lines, rows):
        assert {key: str(value) for key, value in line.items()} == {
            key: value for key, value in row.items() if value
        }


def test_lines_for_people(run, trace):
    out, err = run("trace", trace)
    assert "error 5" in out.splitlines()[2]
    assert "" == err


def test_a_summary(run, trace):
    out, _ = run("trace", trace, "--summary")
    assert re.search(r"^read +2 +64.5 KiB +1 ", out, re.MULTILINE)
    facts = json.loads(run("trace", trace, "--summary", "--json")[0])
    assert 2 == facts["operations"]["read"]["requests"]


def test_a_trace_that_is_cut_is_shown_up_to_there(run, trace):
    content = trace.read_bytes()
    trace.write_bytes(content[:-1])
    out, err = run("trace", trace, "--json", status=ExitStatus.ERROR)
    assert 2 == len(out.splitlines())
    assert "cut at byte" in err
    trace.write_bytes(content[:16] + b"\3" + content[17:])
    out, err = run("trace", trace, status=ExitStatus.ERROR)
    assert "" == out
    assert "version 3" in err.replace("\n", " ")


def test_a_trace_without_an_end_says_so(run, trace, tmp_path):
    path = tmp_path / "open.xdt"
    with TraceWriter.create(str(path), Header(1 << 20, 512, 0, 0, b"s" * 16)) as writer:
        writer.append(RECORDS[1:2])
    assert "still recorded" in run("trace", path)[1]


def test_a_trace_that_ended_by_itself_says_why(run, tmp_path):
    path = tmp_path / "full.xdt"
    with TraceWriter.create(str(path), Header(1 << 20, 512, 0, 0, b"s" * 16)) as writer:
        writer.append([*RECORDS[1:2], event(STOPPED, 70 * MS, text="No space left on device")])
    for more in ((), ("--summary",), ("--json",)):
        err = " ".join(run("trace", path, *more)[1].split())
        assert "the recording ended by itself: No space left on device" in err


def test_what_blkparse_would_print(run, trace):
    lines = run("trace", trace, "--blkparse")[0].splitlines()
    form = re.compile(
        r" *(\d+),(\d+) +(\d+) +(\d+) +(\d+\.\d{9}) +(\d+) +([A-Z]) +([A-Z]+)"
        r"(?: (\d+) \+ (\d+)| 0)? \["
    )
    found = [form.match(line) for line in lines]
    assert all(found)
    times = [float(each[5]) for each in found]
    assert sorted(times) == times
    assert [*"DCDCDDCCDC"] == [each[7] for each in found]
    assert ["W", "W", "R", "R", "R", "FN", "FN", "R", "D", "D"] == [each[8] for each in found]


# linux/blktrace_api.h: what blktrace has in its files
_EVENT = struct.Struct("=IIQQIIIIIHH")
_ISSUED, _COMPLETED, _PROCESS, _CLOCK = 0x0040_0007, 0x0080_0008, 0x0400_0000, 0x0400_0001
_CATEGORY = {READ: 1 << 16, WRITE: 2 << 16, FLUSH: 4 << 16, DISCARD: (1 << 29) | (2 << 16)}


def _event(time, action, *, record=None, note=b""):
    sector, length, queue, status = 0, 0, 0, 0
    if record is not None:
        sector, length, queue = record.offset // 512, record.length, record.queue
        status = record.status if action == _COMPLETED else 0
        action |= _CATEGORY[record.operation]
    device, magic = (202 << 20), 0x6561_7407
    head = (magic, 0, time, sector, length, action, 0, device, queue, status, len(note))
    return _EVENT.pack(*head) + note


@pytest.mark.skipif(shutil.which("blkparse") is None, reason="no blkparse here")
def test_blkparse_itself_prints_the_same(tmp_path):
    """Of the same requests, as blktrace has them, but for its numbers of the lines."""
    records = [
        Record(0, READ, 0, 500, 0, 4096, 0, 0),
        Record(1, WRITE, 2000, 700, 8192, 65536, 0, 1),
        Record(2, FLUSH, 3000, 100, 0, 0, 0, 0),
        Record(3, DISCARD, 1_234_567_890, 10**9, 1 << 20, 1 << 20, 5, 0),
    ]
    for queue in (0, 1):
        with (tmp_path / f"x.blktrace.{queue}").open("wb") as file:
            file.write(_event(0, _PROCESS, note=b"guest\0"))
            file.write(_event(0, _CLOCK, note=bytes(8)))
            for each in records:
                if each.queue == queue:
                    file.write(_event(each.start, _ISSUED, record=each))
                    file.write(_event(each.end, _COMPLETED, record=each))
    done = subprocess.run(
        ["blkparse", "-q", "-i", "x"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    number = re.compile(r"^( *\S+ +\S+) +\d+ ")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Input file ")]
    theirs = [number.sub(r"\1 # ", line) for line in lines]
    assert theirs == [number.sub(r"\1 # ", line) for line in blkparse(records)]


@pytest.mark.skipif(shutil.which("fio") is None, reason="no fio here")
def test_fio_replays_it(run, trace, tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    log = tmp_path / "log"
    log.write_text(run("trace", trace, "--fio", "--fio-path", image)[0])
    said = subprocess.run(
        ["fio", "--name=r", f"--read_iolog={log}", "--ioengine=psync", "--output-format=json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    if "bad iolog" in said.stdout + said.stderr or "unable to parse" in said.stderr:
        pytest.skip("this fio is older than 3.31")
    job = json.loads(said.stdout[said.stdout.index("{") :])["jobs"][0]
    # psync discards on block devices only
    assert (2, 1) == tuple(job[each]["total_ios"] for each in ("read", "write"))


def test_fio_takes_no_white_space(run, trace):
    assert (
        "white space"
        in run("trace", trace, "--fio", "--fio-path", "/a b", status=ExitStatus.USAGE)[1]
    )


@pytest.mark.parametrize(
    "forms", [("--csv", "--json"), ("--json", "--fio"), ("--blkparse", "--json")]
)
def test_one_form_at_a_time(run, trace, forms):
    out, err = run("trace", trace, *forms, status=ExitStatus.USAGE)
    assert "" == out
    assert "one of them" in " ".join(err.split())


def test_a_path_for_fio_goes_with_fio(run, trace):
    assert (
        "--fio-path is for --fio"
        in run("trace", trace, "--fio-path=/a", status=ExitStatus.USAGE)[1]
    )
