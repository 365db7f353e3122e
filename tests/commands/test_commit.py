"""``commit``: the changes are in the image, or everything is as it was."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from killing import everywhere

from xen_disk_py.backends.image import Image
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus

SIZE = (4 << 20) + 512
ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def image(tmp_path):
    """A sparse image with data at both ends."""
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.write(b"first" * 1000)
        file.seek(SIZE - 1000)
        file.write(b"l" * 1000)
    return path


@pytest.fixture
def overlay(tmp_path):
    return tmp_path / "changes"


@pytest.fixture
def merged(image, overlay):
    """Make the overlay; give what image and overlay are together."""
    content = bytearray(image.read_bytes())
    disk = OverlayBackend(str(image), overlay=str(overlay))
    for offset, length in ((512, 1024), (1 << 20, 65536), (SIZE - 512, 512)):
        data = bytes([offset % 251 + 1]) * length
        disk.write([memoryview(data)], offset)
        content[offset : offset + length] = data
    disk.close()
    return bytes(content)


@pytest.fixture
def commit(overlay):
    def commit(*argv, stderr=None):
        env = Environment(stdout=io.StringIO(), stderr=stderr or io.StringIO(), stdin=None)
        status = main(["commit", str(overlay), *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return commit


@pytest.fixture
def refused(commit, image, overlay, merged):
    """Commit, which must fail and leave all files as they were; give the line that is said."""
    folder = image.parent
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def refused(*argv, status=ExitStatus.ERROR):
        names = sorted(os.listdir(folder))
        got, out, err = commit(*argv)
        assert (status, "") == (got, out)
        assert names == sorted(os.listdir(folder))
        assert before == {path: path.read_bytes() for path in before}
        return err

    return refused


def test_the_changes_are_in_the_image(commit, image, overlay, merged):
    assert (ExitStatus.OK, f"{image} 68.5 KiB\n", "") == commit()
    assert merged == image.read_bytes()
    assert ["disk.img"] == os.listdir(image.parent)


def test_json(commit, image, merged):
    status, out, err = commit("--json")
    assert (ExitStatus.OK, "") == (status, err)
    assert {"image": str(image), "held": 70144, "kept": False} == json.loads(out)


@pytest.mark.parametrize("copy_file_range", [True, False])
def test_holes_stay_holes(commit, image, merged, monkeypatch, copy_file_range):
    if not copy_file_range:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert ExitStatus.OK is commit()[0]
    assert merged == image.read_bytes()
    assert os.stat(image).st_blocks * 512 <= 256 << 10


@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, 0])
def test_a_file_system_that_cannot_copy_by_itself(commit, image, merged, monkeypatch, refusal):
    def copy_file_range(*_):
        if refusal:
            raise OSError(refusal, "not here")
        return 0

    monkeypatch.setattr(os, "copy_file_range", copy_file_range, raising=False)
    assert ExitStatus.OK is commit()[0]
    assert merged == image.read_bytes()


def test_owner_mode_and_attributes_stay(commit, image, merged):
    os.chmod(image, 0o640)
    if not os.geteuid():
        os.chown(image, 12, 34)
    try:
        os.setxattr(image, "user.colour", b"blue")
    except OSError:
        pass
    names = os.listxattr(image)
    before = os.stat(image)
    assert ExitStatus.OK is commit()[0]
    after = os.stat(image)
    assert before.st_ino != after.st_ino
    assert 0o640 == stat.S_IMODE(after.st_mode)
    assert (before.st_uid, before.st_gid) == (after.st_uid, after.st_gid)
    assert names == os.listxattr(image)


def test_an_empty_overlay_is_kept(commit, image, overlay, merged):
    assert ExitStatus.OK is commit("--keep")[0]
    assert merged == image.read_bytes()
    disk = OverlayBackend(str(image), overlay=str(overlay))
    assert 0 == disk._file.used
    got = bytearray(SIZE)
    disk.read([memoryview(got)], 0)
    assert merged == got
    disk.write([memoryview(b"again" * 1024)[:4096]], 0)
    disk.close()
    assert ExitStatus.OK is commit()[0]
    assert (b"again" * 1024)[:4096] + merged[4096:] == image.read_bytes()


def test_links_stay_links(commit, image, overlay, tmp_path):
    os.mkdir(tmp_path / "links")
    link = tmp_path / "links" / "image"
    os.symlink(image, link)
    OverlayBackend(str(link), overlay=str(overlay)).close()
    os.symlink(overlay, tmp_path / "links" / "overlay")
    assert ExitStatus.OK is commit()[0]
    assert link.is_symlink()
    assert not image.is_symlink()
    assert not overlay.exists()


def test_only_what_was_flushed_before_a_crash_of_the_host(commit, image, overlay, merged):
    before = image.read_bytes()
    data = bytearray(overlay.read_bytes())
    assert data.count(b"-", 36, 72) == 4
    data[36:72] = b"0" * 36  # another boot
    data[4096] = 0  # the live map
    data[4096 + 1] = 1
    overlay.write_bytes(data)
    assert ExitStatus.OK is commit()[0]
    assert merged == image.read_bytes() != before


def test_other_overlays_of_the_image_are_refused_afterwards(commit, image, merged, tmp_path):
    other = str(tmp_path / "other")
    OverlayBackend(str(image), overlay=other).close()
    assert ExitStatus.OK is commit()[0]
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    assert ExitStatus.ERROR is main(["commit", other], env)
    assert "changed or replaced" in env.stderr.getvalue()


def test_while_the_overlay_is_used(refused, image, overlay):
    disk = OverlayBackend(str(image), overlay=str(overlay))
    assert f"{overlay}: in use by process {os.getpid()}" in refused()
    disk.close()


def test_while_another_disk_reads_the_image(refused, image):
    with Image.open(str(image), writable=False):
        assert f"{image}: in use by process {os.getpid()}" in refused()


def test_an_image_with_several_names(refused, image, tmp_path):
    os.link(image, tmp_path / "second.img")
    assert "has 2 names (hard links)" in refused()


def test_an_image_that_has_changed(refused, image):
    os.utime(image)
    assert "changed or replaced since" in refused()


def test_an_image_that_has_gone(commit, image, merged):
    os.rename(image, f"{image}.elsewhere")
    status, _, err = commit()
    assert ExitStatus.ERROR is status
    assert f"its image, {image}, is not there: put it back first" in err


def test_what_is_no_overlay(commit, overlay):
    overlay.write_bytes(b"something else" * 1000)
    assert "not an overlay" in commit()[2]
    assert b"something else" * 1000 == overlay.read_bytes()


def test_no_space(refused, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(maintenance, "_copy", fail)
    said = refused()
    assert "No space left on device (up to 4 MiB are needed there); nothing was changed" in said


@pytest.mark.parametrize("at", ["_copy", "_take_after", "put_in_place"])
def test_ctrl_c(refused, monkeypatch, at):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(maintenance, at, interrupt)
    assert "" == refused(status=ExitStatus.INTERRUPTED)


def test_storage_that_fails_at_the_end(refused, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(maintenance.os, "fsync", fail)
    assert "cannot be made: Input/output error; nothing was changed" in refused()


def test_an_owner_that_cannot_be_kept(refused, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(maintenance.os, "fchown", fail)
    assert "its owner cannot be kept: do this as root" in refused()


@pytest.mark.parametrize("which", ["disk.img", "changes"])
def test_files_that_are_cut_short_meanwhile(image, commit, merged, monkeypatch, which):
    real = maintenance._copy
    path = image.parent / which

    def copy(*arguments):
        real(*arguments)
        os.truncate(path, 2 << 20)

    monkeypatch.setattr(maintenance, "_copy", copy)
    inode = os.stat(image).st_ino
    status, _, err = commit()
    assert ExitStatus.ERROR is status
    assert ("changed or replaced" if which == "disk.img" else "perhaps cut short") in err
    assert ["changes", "disk.img"] == sorted(os.listdir(image.parent))
    assert inode == os.stat(image).st_ino


def test_a_copy_that_finds_an_end_fails(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    with open(tmp_path / "short", "w+b") as source, open(tmp_path / "new", "wb") as target:
        source.write(b"x" * 1000)
        source.flush()
        with pytest.raises(OSError, match="ends at 1000: somebody made it shorter"):
            maintenance._copy(source.fileno(), 0, target.fileno(), 0, 2000)


def test_a_block_device(tmp_path):
    if os.geteuid():
        pytest.skip("a loop device needs root")
    (tmp_path / "loop.img").write_bytes(bytes(1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(tmp_path / "loop.img")],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no loop device here")
    device = made.stdout.strip()
    try:
        OverlayBackend(device, overlay=str(tmp_path / "changes")).close()
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        assert ExitStatus.ERROR is main(["commit", str(tmp_path / "changes")], env)
        assert "a block device cannot be replaced" in env.stderr.getvalue()
        assert "export" in env.stderr.getvalue()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_killed_at_any_line_it_has_changed_the_image_or_not(image, overlay, merged):
    """What is left of it is a file that nobody looks at."""
    before = image.read_bytes()
    outcomes = []

    def act(count):
        count()
        maintenance.commit(str(overlay), keep=False, progress=lambda done, total: None)

    for _ in everywhere(act, (maintenance,), lines=60):
        content = image.read_bytes()
        assert content in (before, merged)
        outcomes.append(content == merged)
        if content == merged:
            break
        assert overlay.exists()
    assert len(outcomes) > 15
    assert outcomes[-1]


def test_how_far_it_is_is_shown_on_a_terminal(commit, merged):
    shown = commit(stderr=Terminal())[2]
    assert "\r\x1b[Kcopying the image: 0%" in shown
    assert shown.endswith("%\r\x1b[K")


def test_quiet(commit, merged):
    assert "" == commit("--quiet", stderr=Terminal())[2]


@pytest.mark.parametrize("keep", [False, True])
def test_a_vhd(tmp_path, keep):
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    assert ExitStatus.OK is main(["create", str(base), "--size", "1M"], env)
    assert ExitStatus.OK is main(["create", str(child), "--parent", str(base)], env)
    disk = VhdBackend(str(child))
    disk.write([memoryview(b"c" * 4096)], 512)
    disk.close()
    said = env.stdout.tell()
    words = ["commit", str(child), "--json", "--option", f"parents={tmp_path}"]
    assert ExitStatus.OK is main([*words, *(["--keep"] if keep else [])], env)
    expected = {"image": str(base), "held": 4096, "kept": keep}
    assert expected == json.loads(env.stdout.getvalue()[said:])
    assert keep == child.exists()
    disk = VhdBackend(str(base), read_only=True)
    buffer = bytearray(4096)
    disk.read([memoryview(buffer)], 512)
    disk.close()
    assert b"c" * 4096 == buffer


def test_options_are_for_vhds(commit, merged):
    status, _, err = commit("--option", "parents=/")
    assert status is ExitStatus.USAGE
    assert "--option is for a VHD" in err
