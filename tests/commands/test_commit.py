"""``commit``: the changes are in the image, or everything is as it was."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import stat
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import storage
from killing import at_every_effect
from overlays import with_header

from xen_disk_py.backends import newfile
from xen_disk_py.backends.image import Image
from xen_disk_py.backends.newfile import NewFile
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.overlay.file import OverlayFile
from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.errors import ImageError
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host import identity

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
    directory = image.parent
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}

    def refused(*argv, status=ExitStatus.ERROR):
        names = sorted(os.listdir(directory))
        got, out, err = commit(*argv)
        assert (status, "") == (got, out)
        assert names == sorted(os.listdir(directory))
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
    data = bytearray(with_header(bytes(data), 36, b"0" * 36))  # another boot
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


@pytest.mark.parametrize("at", ["_copy", "_take_after", "put"])
def test_ctrl_c(refused, monkeypatch, at):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(NewFile if at == "put" else maintenance, at, interrupt)
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


# Killed


class Files:
    """An image and an overlay, small, made anew for each time that something is killed."""

    def __init__(self, directory):
        self.image, self.overlay = str(directory / "small.img"), str(directory / "small.overlay")
        self.directory = directory

    def make(self):
        for name in os.listdir(self.directory):
            os.unlink(self.directory / name)
        Path(self.image).write_bytes(b"i" * 65536)
        disk = OverlayBackend(self.image, overlay=self.overlay)
        disk.write([memoryview(b"x" * 1024)], 512)
        disk.close()
        self.before = b"i" * 65536
        self.merged = b"i" * 512 + b"x" * 1024 + b"i" * 64000

    def commit(self, *, keep=False):
        return maintenance.commit(self.overlay, keep=keep, progress=lambda done, total: None)

    def seen_by_a_guest(self):
        disk = OverlayBackend(self.image, overlay=self.overlay)
        content = bytearray(65536)
        disk.read([memoryview(content)], 0)
        disk.close()
        return bytes(content)


@pytest.fixture
def small(tmp_path):
    """Files in memory, where nothing waits for storage."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        files = Files(Path(directory))
        files.make()
        yield files


@pytest.mark.parametrize("tmpfile", [True, False])
def test_killed_anywhere_the_next_commit_finishes_it(small, monkeypatch, tmpfile):
    if not tmpfile:
        monkeypatch.setattr(newfile.os, "O_TMPFILE", os.O_DIRECTORY)  # no such thing

    def act(count):
        count()
        small.commit()

    replaced = []
    for _ in at_every_effect(act, effects=10):
        content = Path(small.image).read_bytes()
        replaced.append(content == small.merged)
        assert content in (small.before, small.merged)
        if os.path.exists(small.overlay):
            assert (small.image, 4096) == small.commit()
        else:
            assert replaced[-1]
        assert small.merged == Path(small.image).read_bytes()
        assert ["small.img"] == os.listdir(small.directory)
        small.make()
    assert replaced == sorted(replaced)
    assert {False, True} == set(replaced)


@pytest.mark.parametrize("then", ["commit", "connect"])
def test_killed_once_the_image_is_replaced_the_overlay_is_emptied_later(small, monkeypatch, then):
    real = maintenance._finish

    def act(count):
        def finish(*arguments):
            count()
            real(*arguments)

        monkeypatch.setattr(maintenance, "_finish", finish)
        small.commit(keep=True)

    for _ in at_every_effect(act, effects=4):
        assert small.merged == Path(small.image).read_bytes()
        if then == "commit":
            small.commit(keep=True)
        assert small.merged == small.seen_by_a_guest()
        with OverlayFile.open(small.overlay, writable=False) as file:
            assert (0, None) == (file.used, file.header.commit)
        assert ["small.img", "small.overlay"] == sorted(os.listdir(small.directory))
        small.make()


def test_what_was_written_into_the_image_after_a_killed_commit_stays(small):
    child = os.fork()
    if not child:
        maintenance._finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        small.commit()
    os.waitpid(child, 0)
    with pytest.raises(ImageError, match="its changes were committed to"):
        maintenance.export(small.overlay, "/new", force=False, progress=lambda *_: None)
    with open(small.image, "r+b") as file:
        file.write(b"later")
    assert (small.image, 4096) == small.commit()
    assert b"later" + small.merged[5:] == Path(small.image).read_bytes()
    assert not os.path.exists(small.overlay)


def test_another_file_with_the_inode_of_a_killed_commit_has_no_changes(small, monkeypatch):
    """Where the file system knows of a file no more than that."""
    monkeypatch.setattr(identity, "_of_file", lambda fd: [])
    child = os.fork()
    if not child:
        NewFile.put = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        small.commit()
    os.waitpid(child, 0)
    with OverlayFile.open(small.overlay, writable=True) as file:
        inode = os.stat(small.image).st_ino
        noted = file.header.commit._replace(image={**file.header.commit.image, "inode": inode})
        file.note(noted)
    assert (small.image, 4096) == small.commit()
    assert small.merged == Path(small.image).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("tmpfile", [True, False])
def test_every_signal_to_end_leaves_all_as_it_was(refused, monkeypatch, number, tmpfile):
    if not tmpfile:
        monkeypatch.setattr(newfile.os, "O_TMPFILE", os.O_DIRECTORY)
    monkeypatch.setattr(maintenance, "_copy", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert "" == refused(status=ExitStatus.INTERRUPTED)
    assert before == signal.getsignal(number)


def test_a_hangup_that_is_ignored_stays_so(commit, image, merged, monkeypatch):
    real = maintenance._copy

    def copy(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        real(*arguments)

    monkeypatch.setattr(maintenance, "_copy", copy)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ExitStatus.OK is commit()[0]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert merged == image.read_bytes()


def test_an_empty_overlay_takes_no_space(tmp_path):
    """The file system of the overlay is full; that of the image is not."""
    with contextlib.ExitStack() as stack:
        directory = storage.small_file_system(tmp_path, stack, "2m")
        files = Files(tmp_path)
        files.overlay = str(directory / "overlay")
        Path(files.image).write_bytes(b"i" * 65536)
        disk = OverlayBackend(files.image, overlay=files.overlay)
        disk.write([memoryview(b"x" * 1024)], 512)
        disk.close()
        with contextlib.suppress(OSError), open(directory / "full", "wb", buffering=0) as full:
            while full.write(bytes(4096)):
                pass
        files.commit(keep=True)
        assert b"i" * 512 + b"x" * 1024 + b"i" * 64000 == files.seen_by_a_guest()


def test_an_overlay_that_cannot_be_removed_is_told_of(commit, image, overlay, merged, monkeypatch):
    def unlink(path):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(maintenance.os, "unlink", unlink)
        status, _, err = commit()
    assert ExitStatus.ERROR is status
    assert f"the changes are in it, but {overlay} is not finished with: Read-only" in err
    assert merged == image.read_bytes()
    assert ExitStatus.OK is commit()[0]
    assert not overlay.exists()


def test_hidden_files_of_the_living_and_of_others_stay(commit, image, merged, tmp_path):
    living = newfile._make_hidden(str(tmp_path))
    dead = tmp_path / ".xen-disk-0badcafe"
    others = tmp_path / ".xen-disk-notes"
    dead.write_bytes(b"half an image")
    others.write_text("mine")
    assert ExitStatus.OK is commit()[0]
    assert not dead.exists()
    assert others.exists()
    assert os.path.exists(living[1])
    os.close(living[0])


# Whom it trusts


@pytest.fixture
def precious(tmp_path, image, overlay, merged):
    """Have the overlay be a stranger's way to something else."""

    def make(how):
        if how == "owner":
            if os.geteuid():
                pytest.skip("to give a file away needs root")
            os.chown(overlay, 12345, -1)
        elif how == "mode":
            os.chmod(overlay, 0o606)
        elif how == "group":
            if os.geteuid():
                pytest.skip("to give a file away needs root")
            os.chown(overlay, -1, 12345)
            os.chmod(overlay, 0o660)
        elif how == "directory":
            os.chmod(tmp_path, 0o777)
        elif how == "link":
            os.mkdir(tmp_path / "theirs")
            os.rename(overlay, tmp_path / "theirs" / "real")
            os.symlink(tmp_path / "theirs" / "real", overlay)
            os.chmod(tmp_path / "theirs", 0o707)

    return make


@pytest.mark.parametrize("how", ["owner", "mode", "group", "directory", "link"])
def test_a_path_out_of_a_strangers_overlay_is_not_followed(
    commit, image, overlay, merged, precious, how, tmp_path
):
    before = image.read_bytes()
    precious(how)
    for words in (["commit"], ["export"], ["demo", "--overlay"]):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        new = [str(tmp_path / "new")] if words == ["export"] else []
        assert 0 < main([*words, str(overlay), *new], env)
        assert "say which image with --path IMAGE" in env.stderr.getvalue()
    assert before == image.read_bytes()
    assert ExitStatus.OK is commit("--path", str(image))[0]
    assert merged == image.read_bytes()


def test_a_sticky_directory_is_as_good(commit, tmp_path, merged):
    os.chmod(tmp_path, 0o1777)
    assert ExitStatus.OK is commit()[0]


def test_an_image_that_runs_as_root_does_not_so_with_other_content(commit, image, merged):
    os.chmod(image, 0o6755)
    if not os.geteuid():
        raw = struct.pack("<5I", 0x02000001, 1 << 12, 0, 0, 0)  # CAP_NET_ADMIN, linux/capability.h
        with contextlib.suppress(OSError):
            os.setxattr(image, "security.capability", raw)
    assert ExitStatus.OK is commit()[0]
    assert 0o755 == stat.S_IMODE(os.stat(image).st_mode)
    assert "security.capability" not in os.listxattr(image)


@pytest.mark.parametrize("words", [["commit"], ["diff"], ["export", "new"], ["demo", "--overlay"]])
def test_what_an_overlay_names_cannot_steer_a_terminal(image, overlay, merged, words, tmp_path):
    page = bytearray(overlay.read_bytes()[:4096])
    evil = b"/x\x1b[2J\n\xc2\x9bxen-disk: all is well"
    struct.pack_into("<H", page, 96, len(evil))
    rest = page[98:2044].partition(b"\0")[2].rstrip(b"\0")
    page = with_header(page, 96, page[96:98] + (evil + b"\0" + rest).ljust(1946, b"\0"))
    with open(overlay, "r+b") as file:
        file.write(page)
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    if words[0] == "demo":
        words = ["demo", "--overlay", str(overlay)]
    else:
        words = [words[0], str(overlay), *(str(tmp_path / word) for word in words[1:])]
    main(words, env)
    said = env.stderr.getvalue()
    assert not {"\x1b", "\x9b"} & set(said)
    assert all(line.startswith(("xen-disk:", "/x\\x1b[2J")) for line in said.splitlines())


# What is shown


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
