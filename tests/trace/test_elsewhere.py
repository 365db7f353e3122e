"""A trace that was recorded on real Xen 4.17: the guest's disk is made of it, byte for byte, here.

``tests/xen/test_record.py`` recorded it: a guest made an ext4 on an empty disk of 4 MiB, and wrote,
copied and removed files; dom0 hashed the image after each step.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
from pathlib import Path

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment

HERE = Path(__file__).parent / "recorded"
MOMENTS = json.loads((HERE / "guest.json").read_text("ascii"))


@pytest.fixture
def run(tmp_path):
    """Run a command on the trace; return what it printed."""
    trace = tmp_path / "guest.xdt"
    trace.write_bytes(lzma.decompress((HERE / "guest.xdt.xz").read_bytes()))
    with open(tmp_path / "base.raw", "wb") as base:
        base.truncate(4 << 20)

    def run(command, *words, status=0):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        assert status == main([command, str(trace), *map(str, words)], env), env.stderr.getvalue()
        return env.stdout.getvalue()

    return run


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment["after"])
def test_it_is_rewound(run, tmp_path, moment):
    new = tmp_path / "new.raw"
    run("rewind", "--base", tmp_path / "base.raw", "--at", moment["after"], "-o", new)
    assert moment["sha256"] == digest(new)


def test_it_is_replayed(run, tmp_path):
    image = tmp_path / "base.raw"
    words = ("--backend", "raw", "--overwrite", "--compare", "--speed", "asap", "--json")
    verdict = json.loads(run("replay", "--path", image, *words))
    assert verdict["passed"]
    assert verdict["compared"] > 0
    assert MOMENTS[-1]["sha256"] == digest(image)


@pytest.mark.skipif(shutil.which("e2fsck") is None, reason="no e2fsck here (e2fsprogs)")
def test_a_power_cut_may_tear_the_superblock(run, tmp_path):
    """A real fault: ext4's superblock is in two sectors, its checksum in the second.

    So small a file system has no copy of it.
    """
    check = "e2fsck -fy {} > /dev/null 2>&1; e2fsck -fn {} 2>&1"
    words = ("--base", tmp_path / "base.raw", "--from", MOMENTS[0]["after"], "--limit", "100")
    found = json.loads(run("crashtest", *words, "--check", check, "--json", status=1))
    failure = found["failure"]
    assert (True, 8) == (failure["steady"], failure["status"])
    assert "Superblock checksum does not match superblock" in failure["output"]
    (write,) = failure["writes"]
    assert (1024, 1024) == (write["offset"], write["length"])
    assert write["sectors"] in ("0-0", "1-1")
    run("crashtest", *words[:2], "--check", check, "--state", failure["least"], status=1)
    sound = failure["least"].partition("/")[0]  # the same write, all of it
    run("crashtest", *words[:2], "--check", check, "--state", sound)
