"""``rebase``: an overlay lies over another image, of the same content unless forced."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
from killing import at_every_effect

from xen_disk_py.backends.overlay import file as file_module
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus

SIZE = (3 << 20) + 512


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"i" * SIZE)
    return path


@pytest.fixture
def overlay(tmp_path, image):
    """An overlay with a change at 1 MiB."""
    path = tmp_path / "changes"
    disk = OverlayBackend(str(image), overlay=str(path))
    disk.write([memoryview(b"x" * 1024)], 1 << 20)
    disk.close()
    return path


@pytest.fixture
def merged():
    return b"i" * (1 << 20) + b"x" * 1024 + b"i" * (SIZE - (1 << 20) - 1024)


@pytest.fixture
def rebase(overlay):
    def rebase(*argv):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        status = main(["rebase", str(overlay), *map(str, argv)], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return rebase


@pytest.fixture
def copy(tmp_path, image):
    path = tmp_path / "copy.img"
    shutil.copy(image, path)
    return path


def seen(image, overlay):
    disk = OverlayBackend(str(image), overlay=str(overlay))
    content = bytearray(SIZE)
    disk.read([memoryview(content)], 0)
    disk.close()
    return bytes(content)


@pytest.fixture
def refused(rebase, overlay, image):
    """Rebase, which must fail and change nothing; give what is said."""

    def refused(*argv):
        before = overlay.read_bytes()
        status, out, err = rebase(*argv)
        assert (ExitStatus.ERROR, "") == (status, out)
        assert before == overlay.read_bytes()
        (line,) = err.splitlines()
        return line

    return refused


def test_upon_a_copy(rebase, overlay, copy, merged):
    assert (ExitStatus.OK, f"{overlay} {copy}\n", "") == rebase(copy)
    assert merged == seen(copy, overlay)


def test_json(rebase, overlay, copy):
    said = json.loads(rebase(copy, "--json")[1])
    assert {"overlay": str(overlay), "image": str(copy)} == said


def test_what_the_overlay_has_itself_may_differ(rebase, overlay, copy, merged):
    with open(copy, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"other" * 100)
    assert ExitStatus.OK is rebase(copy)[0]
    assert merged == seen(copy, overlay)


def test_upon_another_content(refused, copy):
    with open(copy, "r+b") as file:
        file.seek(SIZE - 1)
        file.write(b"!")
    assert f"its content differs from {copy.parent}/disk.img at byte {SIZE - 1}" in refused(copy)


def test_an_image_that_was_touched_takes_force(rebase, refused, overlay, image, merged):
    os.utime(image)
    said = refused(image)
    assert "it was written since (its time of modification is another)" in said
    assert f"if you know that its content is what it was: xen-disk rebase {overlay} {image}" in said
    assert ExitStatus.OK is rebase(image, "--force")[0]
    assert merged == seen(image, overlay)


def test_an_image_that_was_restored_takes_force(rebase, refused, overlay, image, copy, merged):
    os.rename(copy, image)
    assert "it is another one" in refused(image)
    assert ExitStatus.OK is rebase(image, "--force")[0]
    assert merged == seen(image, overlay)


def test_an_image_that_has_moved_needs_none(rebase, overlay, image, merged):
    moved = image.parent / "moved.img"
    os.rename(image, moved)
    assert ExitStatus.OK is rebase(moved)[0]
    assert merged == seen(moved, overlay)


def test_another_size_is_refused_by_force_too(refused, copy):
    os.truncate(copy, 1 << 20)
    assert "an overlay fits images of one size only" in refused(copy, "--force")


def test_what_a_stranger_has_written_is_not_followed(refused, rebase, overlay, copy):
    os.chmod(overlay, 0o606)
    assert "if it is yours, give --force" in refused(copy)
    assert ExitStatus.OK is rebase(copy, "--force")[0]


def test_while_a_disk_uses_it(refused, overlay, image, copy):
    disk = OverlayBackend(str(image), overlay=str(overlay))
    assert "in use by process" in refused(copy)
    disk.close()


def test_killed_anywhere_it_lies_over_the_one_or_the_other(overlay, image, copy, merged):
    original = overlay.read_bytes()

    def act(count):
        count()
        maintenance.rebase(str(overlay), str(copy), force=True, progress=lambda *_: None)

    done = []
    for _ in at_every_effect(act, effects=2):
        with file_module.OverlayFile.open(str(overlay), writable=False) as file:
            path = file.header.path
        assert path in (str(image), str(copy))
        assert merged == seen(path, overlay)
        done.append(path == str(copy))
        overlay.write_bytes(original)
    assert done == sorted(done)
    assert {False, True} == set(done)
