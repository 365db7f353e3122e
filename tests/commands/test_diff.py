"""``diff``: what an overlay holds, for people and scripts."""

from __future__ import annotations

import io
import json
import os

import pytest

from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"i" * ((1 << 20) + 512))
    return str(path)


@pytest.fixture
def overlay(image, tmp_path):
    """An overlay with three extents."""
    path = str(tmp_path / "changes")
    disk = OverlayBackend(image, overlay=path)
    for offset, length in ((512, 512), (8192, 65536), (1 << 20, 512)):
        disk.write([memoryview(bytes(length))], offset)
    disk.close()
    return path


@pytest.fixture
def diff():
    def diff(*argv):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        status = main(["diff", *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return diff


def test_a_line_for_each_extent(diff, image, overlay):
    status, out, err = diff(overlay)
    assert (ExitStatus.OK, "0 4096\n8192 65536\n1048576 512\n") == (status, out)
    assert f"{image}: 68.5 KiB of 1 MiB changed\n" == err


def test_json(diff, image, overlay):
    status, out, err = diff(overlay, "--json")
    assert (ExitStatus.OK, "") == (status, err)
    assert {
        "overlay": overlay,
        "image": image,
        "size": (1 << 20) + 512,
        "held": 4096 + 65536 + 512,
        "in_use": False,
        "ranges": [
            {"offset": 0, "length": 4096},
            {"offset": 8192, "length": 65536},
            {"offset": 1 << 20, "length": 512},
        ],
    } == json.loads(out)


def test_an_empty_one(diff, image, tmp_path):
    path = str(tmp_path / "empty")
    OverlayBackend(image, overlay=path).close()
    assert (ExitStatus.OK, "") == diff(path)[:2]


def test_while_a_disk_uses_it_it_says_so(diff, image, overlay):
    disk = OverlayBackend(image, overlay=overlay)
    disk.write([memoryview(bytes(4096))], 4096)
    status, out, err = diff(overlay)
    assert (ExitStatus.OK, "0 73728\n1048576 512\n") == (status, out)
    assert f"{overlay}: a disk is using it: this may be out of date" in err
    assert json.loads(diff(overlay, "--json")[1])["in_use"]
    disk.close()


def test_it_needs_no_image_and_changes_nothing(diff, image, overlay):
    os.unlink(image)
    before = os.stat(overlay).st_mtime_ns
    os.chmod(overlay, 0o400)
    assert ExitStatus.OK is diff(overlay)[0]
    assert before == os.stat(overlay).st_mtime_ns


def test_what_is_no_overlay(diff, image, tmp_path):
    status, out, err = diff(image)
    assert (ExitStatus.ERROR, "") == (status, out)
    assert f"xen-disk: error: {image}: not an overlay" in err
    status, _, err = diff(str(tmp_path / "nothing"))
    assert ExitStatus.ERROR is status
    assert "No such file" in err
