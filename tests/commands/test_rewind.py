"""``rewind``, and disks ``at:TRACE@MOMENT``."""

from __future__ import annotations

import io
import json
import os
import stat
from contextlib import closing

import pytest
from recorded import SIZE, discard, flush, header, make, read, resized, stopped, write

from xen_disk_py.backends import holes
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.trace.format import GAP, Record

RECORDS = [
    write(0, 1, 0, b"a" * 1024),
    flush(2, 3),
    read(4, 5),
    discard(5, 6, 512, 1024),
    flush(7, 8, status=5),
    write(9, 2_000_000_000, 8192, b"b" * 512),
    flush(2_000_000_001, 2_000_000_002),
    write(2_000_000_003, 2_000_000_004, 8192, b"c" * 512, status=5),
]


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.raw"
    path.write_bytes(bytes(range(1, 256)) * 257 + bytes(SIZE - 255 * 257))
    path.chmod(0o600)
    before = path.read_bytes(), path.stat().st_mtime_ns
    yield path
    assert before == (path.read_bytes(), path.stat().st_mtime_ns)


@pytest.fixture
def trace(tmp_path, base):
    tmp_path.chmod(0o700)
    return make(tmp_path / "t.xdt", header(base), [*RECORDS, stopped(2_000_000_005)])


@pytest.fixture
def new(tmp_path):
    yield tmp_path / "new"
    assert [] == [name for name in os.listdir(tmp_path) if name.startswith(".")]


def run(*argv):
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    status = main([*map(str, argv)], env)
    return status, env.stdout.getvalue(), env.stderr.getvalue()


def put(content, *changes):
    content = bytearray(content)
    for offset, data in changes:
        content[offset : offset + len(data)] = data
    return bytes(content)


A, ZERO, B = (0, b"a" * 1024), (512, bytes(1024)), (8192, b"b" * 512)
MOMENTS = [
    ("flush:0", []),
    ("request:0", [A]),
    ("flush:1", [A]),
    ("request:3", [A, ZERO]),
    ("0.5s", [A, ZERO]),
    ("1us", [A, ZERO]),
    ("flush:2", [A, ZERO, B]),
    ("2001-09-09T01:46:42Z", [A, ZERO, B]),
    ("end", [A, ZERO, B]),
    ("2.000000005s", [A, ZERO, B]),
]


@pytest.mark.parametrize(("moment", "changes"), MOMENTS)
def test_the_disk_is_as_it_was(trace, base, new, moment, changes):
    expected = put(base.read_bytes(), *changes)
    assert ExitStatus.OK == run("rewind", trace, "--at", moment, "-o", new)[0]
    assert expected == new.read_bytes()
    assert 0o600 == stat.S_IMODE(new.stat().st_mode)
    with closing(open_backend(None, {"path": f"at:{trace}@{moment}"})) as disk:
        assert disk.read_only
        page = memoryview(bytearray(SIZE))
        assert SIZE == disk.read([page[:700], page[700:]], 0)
        assert expected == bytes(page)
    assert ExitStatus.OK == run("export", f"at:{trace}@{moment}", f"{new}.2")[0]
    assert expected == (new.parent / "new.2").read_bytes()


@pytest.mark.parametrize("says", [0, -1])
def test_zeros_are_there_where_no_hole_is_made(trace, base, new, monkeypatch, says):
    """As by ext4 of Linux 6.1, beyond 4 TiB."""
    monkeypatch.setattr(holes, "_fallocate", lambda *_: says)
    assert ExitStatus.OK == run("rewind", trace, "--at", "end", "-o", new)[0]
    assert put(base.read_bytes(), A, ZERO, B) == new.read_bytes()


def test_it_is_an_overlay_with_what_differs(trace, base, new):
    assert ExitStatus.OK == run("rewind", trace, "--at", "end", "--overlay", new)[0]
    with closing(OverlayBackend(str(base), overlay=str(new))) as disk:
        page = memoryview(bytearray(SIZE))
        disk.read([page], 0)
    assert put(base.read_bytes(), A, ZERO, B) == bytes(page)


def test_json_tells_which_moment_it_is(trace, base, new):
    status, out, _ = run("rewind", trace, "--at", "end", "-o", new, "--json")
    assert ExitStatus.OK == status
    assert {
        "path": str(new),
        "size": SIZE,
        "format": "raw",
        "base": str(base),
        "requests": 8,
        "flushes": 2,
        "seconds": 2.000000005,
        "written": 1536 + 512,
        "failed_writes": 1,
        "notes": [f"{trace}: 1 writes had failed by then: what they left on the disk is not known"],
    } == json.loads(out)


def test_info_tells_what_it_is(trace):
    status, out, _ = run("info", f"at:{trace}@end", "--json")
    assert ExitStatus.OK == status
    assert SIZE == json.loads(out)["size"]


def test_a_failed_write_is_told(trace, new):
    assert "1 writes had failed" in run("rewind", trace, "--at", "end", "-o", new)[2]


def test_a_disk_that_was_resized_has_its_new_size(tmp_path, base, new):
    records = [write(0, 1, SIZE - 512, b"a" * 512), resized(2, 4096), resized(3, 8192)]
    trace = make(tmp_path / "r.xdt", header(base), [*records, stopped(4)])
    tmp_path.chmod(0o700)
    assert ExitStatus.OK == run("rewind", trace, "--at", "end", "-o", new)[0]
    assert 8192 == new.stat().st_size
    status, _, err = run("rewind", trace, "--at", "end", "--overlay", f"{new}.2")
    assert (ExitStatus.ERROR, True) == (status, "had been resized" in err)


def refused(tmp_path, *argv):
    """What it says when it makes nothing."""
    before = sorted(os.listdir(tmp_path))
    status, out, err = run("rewind", *argv)
    assert (status, out) in ((ExitStatus.ERROR, ""), (ExitStatus.USAGE, ""))
    assert before == sorted(os.listdir(tmp_path))
    return err


RANGES = (
    "it has request:0 to request:7, flush:0 to flush:2, 0s to 2.000000s, "
    "2001-09-09T01:46:40Z to 2001-09-09T01:46:42Z\n"
)


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        ("flush:3", f"ends before that moment: {RANGES}"),
        ("request:8", f"ends before that moment: {RANGES}"),
        ("9s", f"ends before that moment: {RANGES}"),
        ("2001-09-09T01:46:42.000010Z", f"ends before that moment: {RANGES}"),
        ("1999-01-01T00:00:00", f"was begun after that moment: {RANGES}"),
        ("yesterday", "is no moment of a trace: give flush:N"),
    ],
)
def test_a_moment_that_is_not_there(tmp_path, trace, new, moment, words):
    assert words in refused(tmp_path, trace, "--at", moment, "-o", new)


def test_a_trace_that_is_cut_is_good_up_to_there(tmp_path, base, new):
    whole = make(tmp_path / "w.xdt", header(base), RECORDS[:2])
    with open(whole, "ab") as file:
        file.write(b"cut")
    tmp_path.chmod(0o700)
    assert "ends before that moment" in refused(tmp_path, whole, "--at", "9s", "-o", new)
    status, _, err = run("rewind", whole, "--at", "end", "-o", new)
    assert (ExitStatus.OK, True) == (status, "what was recorded later is not read" in err)
    assert put(base.read_bytes(), A) == new.read_bytes()


def test_requests_that_were_not_recorded(tmp_path, base, new):
    gap = Record(0, GAP, 2, 0, 0, 3)
    trace = make(tmp_path / "g.xdt", header(base), [*RECORDS[:2], gap, stopped(9)])
    tmp_path.chmod(0o700)
    assert "--at request:1" in refused(tmp_path, trace, "--at", "end", "-o", new)
    assert ExitStatus.OK == run("rewind", trace, "--at", "request:1", "-o", new)[0]


def test_a_trace_without_data(tmp_path, base, new):
    trace = make(tmp_path / "n.xdt", header(base, data=False), [read(0, 1)])
    assert "data=yes" in refused(tmp_path, trace, "--at", "end", "-o", new, "--base", base)


def test_what_a_trace_cannot_do_is_told_before_its_base_is_looked_for(tmp_path, new):
    trace = make(tmp_path / "n.xdt", header(data=False), [read(0, 1)])
    argv = ("--at", "end", "-o", new, "--base", tmp_path / "nothing")
    assert "data=yes" in refused(tmp_path, trace, *argv)
    status, _, err = run("rewind", tmp_path / "no.xdt", *argv[:1], "then", *argv[2:])
    assert ExitStatus.USAGE == status
    assert "'then' is no moment" in err


def test_a_base_that_nobody_can_check_is_told(tmp_path, new):
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    trace = make(tmp_path / "n.xdt", header(), [*RECORDS, stopped(3_000_000_000)])
    status, _, err = run("rewind", trace, "--at", "flush:1", "-o", new, "--base", other)
    assert ExitStatus.OK == status
    assert "the base is the right image is not checked" in err


def test_a_wrong_base(tmp_path, trace, base, new):
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    what = refused(tmp_path, trace, "--at", "end", "-o", new, "--base", other)
    assert "is not what the disk was when recording began: byte 0" in what
    other.write_bytes(bytes(512))
    what = refused(tmp_path, trace, "--at", "end", "-o", new, "--base", other)
    assert f"has 512 bytes, the disk of the trace {SIZE}" in what


def test_the_trace_of_somebody_else_names_no_image(tmp_path, trace, new):
    os.chmod(trace, 0o666)
    assert "can be written by everybody" in refused(tmp_path, trace, "--at", "end", "-o", new)


def test_a_file_that_is_there_is_not_replaced(tmp_path, trace, new):
    new.write_bytes(b"mine")
    assert "there is such a file" in refused(tmp_path, trace, "--at", "end", "-o", new)
    assert "there is such a file" in refused(tmp_path, trace, "--at", "end", "--overlay", new)
    assert b"mine" == new.read_bytes()
    status, _, err = run("rewind", trace, "--at", "end", "-o", trace)
    assert ExitStatus.USAGE == status
    assert "give another name" in err
    assert "--force" not in err  # there is none


def test_no_space(tmp_path, trace, new, monkeypatch):
    def full(*_arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwritev", full)
    assert "No space left" in refused(tmp_path, trace, "--at", "end", "-o", new)
    assert "No space left" in refused(tmp_path, trace, "--at", "end", "--overlay", new)


def test_another_version(tmp_path, trace, new):
    with open(trace, "r+b") as file:
        file.seek(16)
        file.write(b"\x09")
    assert "a trace of version 9" in refused(tmp_path, trace, "--at", "end", "-o", new)


def test_more_extents_than_memory(tmp_path, trace, new, monkeypatch):
    monkeypatch.setattr("xen_disk_py.backends.at.memory.room", lambda: 600)
    what = refused(tmp_path, trace, "--at", "end", "-o", new)
    assert "more than 1 extents were written by then" in what


def test_either_an_image_or_an_overlay(tmp_path, trace):
    assert "say what to make" in refused(tmp_path, trace, "--at", "end")


def test_a_ring_that_is_still_written(tmp_path, base, new):
    trace = make(tmp_path / "ring.xdt", header(base, ring=64 << 20), RECORDS[:2])
    tmp_path.chmod(0o700)
    assert "stop the recording first" in refused(tmp_path, trace, "--at", "flush:1", "-o", new)
    done = make(tmp_path / "done.xdt", header(base, ring=64 << 20), [*RECORDS[:2], stopped(9)])
    assert ExitStatus.OK == run("rewind", done, "--at", "flush:1", "-o", new)[0]
