"""``replay``: the requests of a trace against another disk."""

from __future__ import annotations

import json

import pytest
from test_json_page import check

from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.trace.format import READ, STOPPED, WRITE, Header, Record
from xen_disk_py.trace.writer import TraceWriter, event

SIZE = 1 << 20


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.xdt"
    header = Header(SIZE, 512, 0, 0, b"s" * 16, data=True)
    with TraceWriter.create(str(path), header) as writer:
        writer.append(
            [
                Record(0, WRITE, 0, 1000, 4096, 4096, data=b"w" * 4096),
                Record(1, READ, 2000, 1000, 0, 8192),
                event(STOPPED, 5000),
            ]
        )
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"i" * SIZE)
    return path


@pytest.fixture
def run(host):
    def run(*argv, status=ExitStatus.OK):
        env = host.environment()
        assert status == main(["replay", *map(str, argv)], env)
        return env.stdout.getvalue(), " ".join(env.stderr.getvalue().split())

    return run


def test_writes_are_kept_out_of_an_image_by_default(run, trace, image):
    out, _ = run(trace, "--path", image, "--compare", "--speed=asap")
    assert out.endswith("passed\n")
    assert b"i" * SIZE == image.read_bytes()


def test_no_image_is_changed_unasked(run, trace, image):
    _, err = run(trace, "--path", image, "--backend=raw", status=ExitStatus.USAGE)
    assert "--overwrite" in err
    assert b"i" * SIZE == image.read_bytes()
    run(trace, "--path", image, "--backend=raw", "--overwrite")
    assert b"i" * 4096 + b"w" * 4096 == image.read_bytes()[:8192]


def test_its_json_is_documented(run, trace, image):
    out, _ = run(trace, "--path", image, "--json", "--compare")
    check("replay", out)
    assert (True, 2, 4096) == tuple(
        json.loads(out)[key] for key in ("passed", "requests", "compared")
    )


def test_a_disk_that_does_worse_fails(run, trace, image):
    failing = ("--filter=error:operations=read", "--path", image)
    out, _ = run(trace, *failing, status=ExitStatus.ERROR)
    assert "1 requests failed that had succeeded\nFAILED" in out
    flipped = ("--filter=corrupt:rate=1", "--compare", "--path", image)
    out, _ = run(trace, *flipped, status=ExitStatus.ERROR)
    assert "first in request 1" in out


def test_a_smaller_disk_is_refused(run, trace, tmp_path):
    small = tmp_path / "small.raw"
    small.write_bytes(bytes(SIZE // 2))
    assert "give one of that size" in run(trace, "--path", small, status=ExitStatus.USAGE)[1]


def test_an_image_that_is_not_there_is_to_be_made_of_the_right_size(run, trace, tmp_path):
    _, err = run(trace, "--path", tmp_path / "no.raw", status=ExitStatus.ERROR)
    assert f"truncate -s {SIZE} {tmp_path}/no.raw" in err


def test_comparing_needs_data(run, image, tmp_path):
    path = tmp_path / "bare.xdt"
    TraceWriter.create(str(path), Header(SIZE, 512, 0, 0, b"s" * 16)).close()
    assert "data=yes" in run(path, "--path", image, "--compare", status=ExitStatus.USAGE)[1]


def test_a_speed_is_a_number_or_asap(run, trace):
    assert "asap" in run(trace, "--speed=0", status=ExitStatus.USAGE)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give --backend raw"),
        (("--backend=cow",), "with --backend cow no write reaches the image"),
        (("--backend=raw", "--read-only"), "with --read-only no write reaches the image"),
    ],
)
def test_what_is_to_be_overwritten_is_written(run, trace, image, options, words):
    argv = ("--path", image, "--overwrite", *options)
    assert words in run(trace, *argv, status=ExitStatus.USAGE)[1]
    assert b"i" * SIZE == image.read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--backend=raw",), "--backend cow"),
        (("--backend=mmap",), "--backend cow"),
        (("--overlay={here}/changes",), "--overlay with a new name"),
        (("--format=vhd",), "--overlay NEW.vhd"),
        (("--format=qcow2",), "replay to a copy of it"),
    ],
)
def test_how_writes_are_kept_out_of_a_disk(run, trace, image, tmp_path, options, says):
    (tmp_path / "changes").touch()
    argv = [option.format(here=tmp_path) for option in options]
    _, err = run(trace, "--path", image, *argv, status=ExitStatus.USAGE)
    assert f"to keep them out: {says} (try: xen-disk replay --help)" in err
    assert b"i" * SIZE == image.read_bytes()
