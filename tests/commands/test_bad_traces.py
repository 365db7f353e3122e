"""Traces that cannot be used, and what does not belong to them: each command says so, once, and
makes nothing.
"""

from __future__ import annotations

import io
import json
import os

import pytest
from recorded import SIZE, flush, header, make, stopped, write

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.trace.writer import TraceWriter

RECORDS = [write(0, 1, 0, b"a" * 1024), flush(2, 3), write(4, 5, 4096, b"b" * 512), stopped(9)]

COMMANDS = {
    "trace": ["trace", "t.xdt"],
    "plot": ["plot", "t.xdt", "-o", "new.svg"],
    "replay": ["replay", "t.xdt", "--path", "base.raw", "--speed", "asap"],
    "rewind": ["rewind", "t.xdt", "--base", "base.raw", "--at", "end", "-o", "new.raw"],
    "overlay": ["rewind", "t.xdt", "--base", "base.raw", "--at", "end", "--overlay", "new"],
    "crashtest": ["crashtest", "t.xdt", "--base", "base.raw", "--check", "true {}"],
    "info": ["info", "at:t.xdt@end"],
    "export": ["export", "at:t.xdt@end", "new.raw", "--option", "base=base.raw"],
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command on a trace that was changed; return the status and what it said."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o700)
    base = tmp_path / "base.raw"
    base.write_bytes(b"\1" * SIZE)
    make(tmp_path / "t.xdt", header(base), RECORDS)

    def run(name, change=lambda data: data):
        trace = tmp_path / "t.xdt"
        trace.write_bytes(change(trace.read_bytes()))
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        status = main(COMMANDS[name], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return run


@pytest.fixture
def refused(run, tmp_path):
    def refused(name, change=lambda data: data):
        status, out, err = run(name, change)
        assert (ExitStatus.ERROR, "") == (status, out)
        assert ["base.raw", "t.xdt"] == sorted(os.listdir(tmp_path))
        assert 1 == err.count("\n")
        return err

    return refused


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "not a trace: give a file that --filter record"),
        (lambda data: b"QFI\xfb" + data[4:], "not a trace: give a file that --filter record"),
        (lambda data: data[:100], "a trace that was cut in its header: nothing of it is left"),
        (lambda data: data[:16] + b"\3" + data[17:], "a trace of version 3, this program knows 2"),
        (
            lambda data: data[:60] + b"\xff" + data[61:],
            "a damaged trace: the checksum of its header is wrong",
        ),
    ],
    ids=["empty", "other", "cut", "future", "damaged"],
)
def test_what_is_no_trace(refused, name, change, words):
    assert words in refused(name, change)


@pytest.mark.parametrize("name", ["rewind", "overlay", "crashtest", "export"])
@pytest.mark.parametrize("size", [SIZE, SIZE // 2])
def test_what_the_disk_was_not(refused, tmp_path, name, size):
    (tmp_path / "base.raw").write_bytes(b"\2" * size)
    assert "give the image as it was when t.xdt was begun" in refused(name)


def test_a_replay_of_what_is_left_has_not_passed(run):
    status, out, err = run("replay", lambda data: data[:-1])
    assert (ExitStatus.ERROR, True) == (status, out.endswith("passed, as far as it is\n"))
    assert "what was recorded later is not read" in err


@pytest.mark.parametrize("name", ["rewind", "overlay", "crashtest", "export"])
def test_an_image_that_is_not_there(run, tmp_path, name):
    """Nobody is told to make an empty one."""
    (tmp_path / "base.raw").unlink()
    status, out, err = run(name)
    assert (ExitStatus.ERROR, "", ["t.xdt"]) == (status, out, os.listdir(tmp_path))
    assert "no such file: name the image as it was when t.xdt was begun (--base" in err


@pytest.mark.parametrize("name", ["trace", "plot"])
def test_what_is_left_is_shown_and_that_it_is_not_all(run, tmp_path, name, monkeypatch):
    monkeypatch.setitem(COMMANDS, "plot", ["plot", "t.xdt"])
    with TraceWriter.create("two.xdt", header(tmp_path / "base.raw")) as writer:
        writer.append(RECORDS[:2])
        writer.append(RECORDS[2:])
    os.rename("two.xdt", "t.xdt")
    status, out, err = run(name, lambda data: data[:-1])
    assert (ExitStatus.ERROR, True) == (status, bool(out))
    assert "what was recorded later is not read" in err


CUT_SHORT = {
    "killed": ((), b"", "it has no end: the disk is still recorded, or its process was killed"),
    "cut": ((), b"x", "cut at byte 5812 of 5813: what was recorded later is not read"),
    "disk full": (
        (stopped(9)._replace(data=b"No space left on device"),),
        b"",
        "the recording ended by itself: No space left on device",
    ),
}


@pytest.mark.parametrize("name", [*COMMANDS, "summary", "demo", "filtered"])
@pytest.mark.parametrize("how", CUT_SHORT)
def test_what_was_cut_short_is_said_alike_once(run, tmp_path, name, how, monkeypatch):
    at = [("--path", "at:t.xdt@end"), ("--read-only", "--seconds", "0.1", "--bytes", "4K")]
    monkeypatch.setitem(COMMANDS, "plot", ["plot", "t.xdt"])
    monkeypatch.setitem(COMMANDS, "summary", ["trace", "t.xdt", "--summary"])
    monkeypatch.setitem(COMMANDS, "demo", ["demo", *at[0], *at[1]])
    monkeypatch.setitem(COMMANDS, "filtered", ["info", "at:t.xdt@end", "--filter", "delay:read=0"])
    records, behind, words = CUT_SHORT[how]
    os.unlink("t.xdt")
    make(tmp_path / "t.xdt", header(tmp_path / "base.raw"), [*RECORDS[:-1], *records])
    if name not in ("trace", "plot", "demo"):
        COMMANDS[name] = [*COMMANDS[name], "--json"]
    _, out, err = run(name, lambda data: data + behind)
    assert 1 == err.count(f"t.xdt: {words}\n")
    assert 1 == err.count("t.xdt: ")
    if "--json" in COMMANDS[name]:
        assert [f"t.xdt: {words}"] == json.loads(out)["notes"]


@pytest.mark.parametrize("name", ["rewind", "info", "export"])
def test_of_a_moment_before_its_end_nothing_is_missing(run, tmp_path, name, monkeypatch):
    os.unlink("t.xdt")
    make(tmp_path / "t.xdt", header(tmp_path / "base.raw"), RECORDS[:-1])
    earlier = [word.replace("end", "flush:1") for word in COMMANDS[name]]
    monkeypatch.setitem(COMMANDS, name, [*earlier, "--json"])
    _, out, err = run(name, lambda data: data + b"x")
    assert ("", []) == (err, json.loads(out)["notes"])


@pytest.mark.parametrize("name", ["rewind", "overlay", "crashtest", "export"])
def test_what_is_left_is_used_and_that_it_is_not_all_is_said(run, name):
    status, _, err = run(name, lambda data: data[:-1])
    assert ExitStatus.OK == status
    assert "what was recorded later is not read" in err


@pytest.mark.parametrize("name", ["rewind", "overlay", "export"])
def test_a_moment_that_is_cut_off(refused, monkeypatch, name):
    later = [word.replace("end", "flush:1") for word in COMMANDS[name]]
    monkeypatch.setitem(COMMANDS, name, later)
    assert "ends before that moment" in refused(name, lambda data: data[:4200])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("plot", marks=pytest.mark.each_python),
        *("rewind", "overlay", "crashtest", "export"),
    ],
)
def test_no_space(refused, monkeypatch, name):
    if name == "plot":
        pytest.importorskip("matplotlib", reason="needs matplotlib")

    def full(*_arguments):
        raise OSError(28, os.strerror(28))

    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: full() if fd > 2 else real(fd, data))
    monkeypatch.setattr(os, "pwritev", full)
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    assert "No space left" in refused(name)
