"""``trace``: a trace, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess

import pytest

from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
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
    trace.write_bytes(content[:16] + b"\2" + content[17:])
    out, err = run("trace", trace, status=ExitStatus.ERROR)
    assert "" == out
    assert "version 2" in err.replace("\n", " ")


def test_a_trace_without_an_end_says_so(run, trace, tmp_path):
    path = tmp_path / "open.xdt"
    with TraceWriter.create(str(path), Header(1 << 20, 512, 0, 0, b"s" * 16)) as writer:
        writer.append(RECORDS[1:2])
    assert "still recorded" in run("trace", path)[1]


def test_what_blkparse_would_print(run, trace):
    lines = run("trace", trace, "--blkparse")[0].splitlines()
    form = re.compile(
        r" *(\d+),(\d+) +(\d+) +(\d+) +(\d+\.\d{9}) +(\d+) +([A-Z]) +([A-Z]+)"
        r"(?: (\d+) \+ (\d+))? \["
    )
    found = [form.match(line) for line in lines]
    assert all(found)
    times = [float(each[5]) for each in found]
    assert sorted(times) == times
    assert [*"DCDCDDCCDC"] == [each[7] for each in found]
    assert ["W", "W", "R", "R", "R", "FN", "FN", "R", "D", "D"] == [each[8] for each in found]


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
    assert "white space" in run("trace", trace, "--fio-path", "/a b", status=ExitStatus.USAGE)[1]
