"""``export``: a new image of an overlay and its image, which stay as they are."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import stat
import subprocess

import pytest
import storage

from xen_disk_py.backends import newfile, qemu_img
from xen_disk_py.backends.image import Image
from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.vhd.create import create as create_vhd
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.errors import ImageError, XenUnavailable
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host import program

SIZE = (4 << 20) + 512


@pytest.fixture
def files(tmp_path):
    """The image, the overlay, and what they are together; the two stay as they are."""
    image, overlay = tmp_path / "disk.img", tmp_path / "changes"
    with open(image, "wb") as file:
        file.write(b"first" * 1000)
        file.truncate(SIZE)
    content = bytearray(image.read_bytes())
    disk = OverlayBackend(str(image), overlay=str(overlay))
    disk.write([memoryview(b"x" * 1024)], 512)
    disk.write([memoryview(b"y" * 512)], SIZE - 512)
    disk.close()
    content[512:1536] = b"x" * 1024
    content[-512:] = b"y" * 512
    before = image.read_bytes(), overlay.read_bytes()
    yield image, overlay, bytes(content)
    assert before == (image.read_bytes(), overlay.read_bytes())
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new.img"


@pytest.fixture
def export(files, new):
    def export(*argv, to=new):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        status = main(["export", str(files[1]), str(to), *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return export


def test_a_new_image_sparse_and_private(export, files, new):
    assert (ExitStatus.OK, f"{new} 4 MiB\n", "") == export()
    assert files[2] == new.read_bytes()
    status = os.stat(new)
    assert 0o600 == stat.S_IMODE(status.st_mode)
    assert status.st_blocks * 512 <= 64 << 10


def test_json(export, new):
    assert {"path": str(new), "size": SIZE, "format": "raw", "notes": []} == json.loads(
        export("--json")[1]
    )


def test_others_may_use_the_image(export, files, new):
    with Image.open(str(files[0]), writable=False):
        assert ExitStatus.OK is export()[0]
    assert files[2] == new.read_bytes()


def test_nobody_may_write_the_image(export, files):
    with Image.open(str(files[0]), writable=True):
        status, _, err = export()
    assert ExitStatus.ERROR is status
    assert "being written by process" in err


def test_while_a_disk_uses_the_overlay(export, files, new):
    disk = OverlayBackend(str(files[0]), overlay=str(files[1]))
    disk.read([memoryview(bytearray(512))], 0)
    assert ExitStatus.OK is export()[0]
    disk.close()
    assert files[2] == new.read_bytes()


@pytest.mark.parametrize("writes", [1, 1000])
def test_while_a_guest_writes(export, files, new, monkeypatch, writes):
    disk = OverlayBackend(str(files[0]), overlay=str(files[1]))
    real, left = maintenance._copy, [writes]
    before = files[1].read_bytes()

    def copy(*arguments):
        real(*arguments)
        if left[0]:
            left[0] -= 1
            disk.write([memoryview(b"x" * 1024)], 512)  # what is there already, but now

    monkeypatch.setattr(maintenance, "_copy", copy)
    status, _, err = export()
    disk.close()
    files[1].write_bytes(before)
    if writes == 1:
        assert ExitStatus.OK is status
        assert files[2] == new.read_bytes()
    else:
        assert ExitStatus.ERROR is status
        assert "pause the guest meanwhile (xl pause VM" in err
        assert not new.exists()


def test_a_directory_is_no_name(export, tmp_path):
    status, _, err = export(to=tmp_path)
    assert status is ExitStatus.USAGE
    assert f"{tmp_path}: a directory: name the file to make in it" in err


def test_a_file_is_replaced_by_force_only(export, files, new):
    new.write_bytes(b"precious")
    status, _, err = export()
    assert ExitStatus.USAGE is status
    assert f"{new}: there is such a file: give another name, or --force" in err
    assert b"precious" == new.read_bytes()
    assert ExitStatus.OK is export("--force")[0]
    assert files[2] == new.read_bytes()


def test_force_without_such_a_file(export, files, new):
    assert ExitStatus.OK is export("--force")[0]
    assert files[2] == new.read_bytes()


def test_a_file_that_appears_meanwhile_is_not_replaced(export, new, monkeypatch):
    real = maintenance._merge

    def merge(*arguments):
        real(*arguments)
        new.write_bytes(b"theirs")

    monkeypatch.setattr(maintenance, "_merge", merge)
    status, _, err = export()
    assert ExitStatus.ERROR is status
    assert "File exists; nothing was changed" in err
    assert b"theirs" == new.read_bytes()


def test_a_link_is_followed_by_force(export, files, new, tmp_path):
    os.symlink(new, tmp_path / "link")
    assert ExitStatus.USAGE is export(to=tmp_path / "link")[0]
    new.write_bytes(b"old")
    assert ExitStatus.OK is export("--force", to=tmp_path / "link")[0]
    assert (tmp_path / "link").is_symlink()
    assert files[2] == new.read_bytes()


@pytest.mark.parametrize("which", [0, 1])
def test_the_image_and_the_overlay_are_never_replaced(export, files, which):
    status, _, err = export("--force", to=files[which])
    assert ExitStatus.USAGE is status
    assert "the overlay or its image itself" in err


def test_what_is_no_file_is_never_replaced(export, tmp_path):
    os.mkdir(tmp_path / "directory")
    status, _, err = export("--force", to=tmp_path / "directory")
    assert ExitStatus.USAGE is status
    assert "not a file" in err
    status, _, err = export("--force", to="/dev/null")
    assert ExitStatus.USAGE is status


def test_an_image_in_use_is_not_replaced(export, new):
    new.write_bytes(bytes(512))
    with Image.open(str(new), writable=False):
        status, _, err = export("--force")
    assert ExitStatus.ERROR is status
    assert f"{new}: in use by process" in err
    assert bytes(512) == new.read_bytes()


@pytest.mark.parametrize("output_format", qemu_img.FORMATS)
def test_other_formats(export, files, new, tmp_path, output_format):
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    status, out, _ = export("--output-format", output_format, "--json")
    assert ExitStatus.OK is status
    assert {"path": str(new), "size": SIZE, "format": output_format, "notes": []} == json.loads(out)
    (tmp_path / "expected").write_bytes(files[2])
    words = ["-f", "raw", "-F", output_format, str(tmp_path / "expected"), str(new)]
    subprocess.run(["qemu-img", "compare", *words], check=True, capture_output=True)
    assert 0o600 == stat.S_IMODE(os.stat(new).st_mode)


def test_a_vhd(export, files, new, host, tmp_path):
    status, out, _ = export("--output-format", "vhd", "--json")
    assert ExitStatus.OK is status
    assert {"path": str(new), "size": SIZE, "format": "vhd", "notes": []} == json.loads(out)
    assert ExitStatus.OK is main(["check", str(new)], host.environment())
    back = tmp_path / "back"
    words = ["export", str(new), str(back), "--format", "vhd"]
    assert ExitStatus.OK is main(words, host.environment())
    assert files[2] == back.read_bytes()


def test_a_vhd_has_no_blocks_of_zeros(host, tmp_path):
    """Neither holes nor zeros that are written; the last block may be a part of one."""
    block = 2 << 20
    image, new, back = (tmp_path / name for name in ("image", "new", "back"))
    with image.open("wb") as file:
        for place, content in ((1, b"a" * 512), (3, bytes(block)), (6, b"b" * 1024)):
            file.seek(place * block)
            file.write(content)
    words = ["export", str(image), str(new), "--format", "raw", "--output-format", "vhd"]
    assert ExitStatus.OK is main(words, host.environment())
    assert 2 * block < new.stat().st_size < 3 * block
    assert ExitStatus.OK is main(["check", str(new)], host.environment())
    assert ExitStatus.OK is main(
        ["export", str(new), str(back), "--format", "vhd"], host.environment()
    )
    assert image.read_bytes() == back.read_bytes()
    if shutil.which("qemu-img") is not None:
        command = ["qemu-img", "compare", "-f", "raw", "-F", "vpc", str(image), str(new)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert "Images are identical" in done.stdout


@pytest.mark.parametrize("words", [[], ["--output-format", "qcow2"]])
def test_a_raw_image(files, new, words):
    if words and shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    command = ["export", str(files[0]), str(new), *words]
    assert ExitStatus.ERROR is main(command, env)
    assert "not an overlay" in env.stderr.getvalue()
    assert ExitStatus.OK is main([*command, "--format", "raw"], env)
    form = words[1] if words else "raw"
    names = ["-f", "raw", "-F", form, str(files[0]), str(new)]
    if words:
        subprocess.run(["qemu-img", "compare", *names], check=True, capture_output=True)
    else:
        assert files[0].read_bytes() == new.read_bytes()
        assert os.stat(new).st_blocks <= os.stat(files[0]).st_blocks


def test_a_block_device(tmp_path, new):
    whole = tmp_path / "loop.img"
    whole.write_bytes(b"first" * 13107 + b"s")
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    with contextlib.ExitStack() as stack:
        device = storage.loop(stack, whole)
        assert ExitStatus.OK is main(["export", device, str(new), "--format", "raw"], env)
    assert whole.read_bytes() == new.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("tmpfile", [True, False])
def test_every_signal_to_end_leaves_nothing(export, new, monkeypatch, number, tmpfile):
    if not tmpfile:
        monkeypatch.setattr(newfile.os, "O_TMPFILE", os.O_DIRECTORY)  # no such thing
    monkeypatch.setattr(maintenance, "_copy", lambda *_: os.kill(os.getpid(), number))
    assert ExitStatus.INTERRUPTED is export()[0]
    assert not new.exists()


def test_without_qemu_img(export, new, monkeypatch):
    monkeypatch.setattr(program, "SYSTEM_PATH", "/nowhere:/neither")
    status, _, err = export("--output-format", "qcow2")
    assert ExitStatus.ERROR is status
    assert "no program qemu-img in /nowhere:/neither: " in err
    assert "install qemu-utils" in err
    assert not new.exists()


def test_qemu_img_is_told_the_format_and_nothing_of_the_environment(monkeypatch, tmp_path):
    script = tmp_path / "qemu-img"
    script.write_text('#!/bin/sh\necho "$@" "$(pwd)" $(env | sort) >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setattr(qemu_img, "find", lambda: str(script))
    with open(tmp_path / "raw", "wb") as raw, pytest.raises(ImageError) as caught:
        qemu_img.convert(raw.fileno(), raw.fileno(), "qcow2", lambda *_: None)
    assert "convert -p -f raw -O qcow2 /proc/self/fd/" in str(caught.value)
    assert " / LC_ALL=C" in str(caught.value)
    assert "LD_PRELOAD" not in str(caught.value)


def test_a_converter_that_is_interrupted_leaves_nothing(export, new, monkeypatch):
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(qemu_img, "_follow", interrupt)
    assert ExitStatus.INTERRUPTED is export("--output-format", "qcow2")[0]
    assert not new.exists()


def test_where_files_can_be_cloned_a_guest_may_write_all_the_time(tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:
        directory = storage.cloning_file_system(tmp_path, stack)
        image, overlay, new = (str(directory / name) for name in ("image", "overlay", "new"))
        with open(image, "wb") as file:
            file.write(b"i" * 65536)
        disk = stack.enter_context(contextlib.closing(OverlayBackend(image, overlay=overlay)))
        disk.write([memoryview(b"x" * 1024)], 512)
        real = maintenance._merge

        def merge(*arguments):
            disk.write([memoryview(b"later" * 1024)[:4096]], 8192)
            real(*arguments)

        monkeypatch.setattr(maintenance, "_merge", merge)
        maintenance.export(overlay, new, force=False, progress=lambda *_: None)
        with open(new, "rb") as file:
            assert b"i" * 512 + b"x" * 1024 + b"i" * 64000 == file.read()
        assert ["image", "new", "overlay"] == sorted(os.listdir(directory))


def test_no_space(export, new, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(maintenance, "_copy", fail)
    status, _, err = export()
    assert ExitStatus.ERROR is status
    assert "up to 4 MiB are needed there" in err
    assert not new.exists()


def test_no_such_directory(export, tmp_path):
    status, _, err = export(to=tmp_path / "no" / "new.img")
    assert ExitStatus.ERROR is status
    assert "cannot be made: there is no directory" in err


# any other disk


@pytest.fixture
def export_of(tmp_path):
    def export_of(source, *argv):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        new = tmp_path / "copy.raw"
        new.unlink(missing_ok=True)
        status = main(["export", str(source), str(new), *map(str, argv)], env)
        return status, new.read_bytes() if new.exists() else None, env.stderr.getvalue()

    return export_of


def test_filters_are_over_what_is_exported(export_of, files, tmp_path):
    image, overlay, content = files
    part = ("--filter", "offset:start=512,size=1K")
    assert (ExitStatus.OK, content[512:1536], "") == export_of(overlay, *part)
    expected = image.read_bytes()[512:1536]
    assert (ExitStatus.OK, expected, "") == export_of(image, "--format", "raw", *part)
    path = str(tmp_path / "a.vhd")
    create_vhd(path, SIZE)
    assert (ExitStatus.OK, bytes(1024), "") == export_of(path, *part)
    assert ExitStatus.USAGE is export_of(overlay, "--filter", "nonsense")[0]


def test_a_program_is_exported_sparse(export_of, tmp_path):
    (tmp_path / "mydisk.py").write_text(
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    def __init__(self, *, letter='a'):\n"
        "        self.size = (3 << 20) + 512\n"
        "        self.letter = letter.encode()\n"
        "    def read(self, buffers, offset):\n"
        "        if offset > 3 << 20: raise ValueError('not mine')\n"
        "        done = min(4096, len(buffers[0]))\n"
        "        buffers[0][:done] = (self.letter if offset < 4096 else bytes(1)) * done\n"
        "        return done\n"
        "    def write(self, buffers, offset): raise AssertionError\n",
        encoding="ascii",
    )
    status, content, err = export_of(tmp_path / "mydisk.py", "--option", "letter=x")
    assert (ExitStatus.OK, "") == (status, err)
    assert b"x" * 4096 + bytes((3 << 20) + 512 - 4096) == content
    assert os.stat(tmp_path / "copy.raw").st_blocks * 512 <= 128 << 10
    source = (tmp_path / "mydisk.py").read_text(encoding="ascii")
    (tmp_path / "mydisk.py").write_text(source.replace("> 3 <<", "> 2 <<"), encoding="ascii")
    status, content, err = export_of(tmp_path / "mydisk.py")
    assert (ExitStatus.ERROR, None) == (status, content)
    assert "cannot be read at 2097152" in err
    assert "not mine" in err


def test_qcow2(export_of, tmp_path):
    if shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-nbd and qemu-img")
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(os.urandom(100_000).ljust(3 << 20, b"\0"))
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(words, check=True)
    before = path.read_bytes()
    expected = (ExitStatus.OK, raw.read_bytes(), "")
    assert expected == export_of(path, "--format", "qcow2")
    assert before == path.read_bytes()


PLUGIN = """
SIZE = 2 << 20
content = bytearray(SIZE)
def config(key, value): content[1 << 20:(1 << 20) + len(value)] = value.encode()
def open(readonly): assert readonly
def get_size(h): return SIZE
def pread(h, count, offset):
    return content[offset : offset + count]
"""


def exported(path, new, *argv):
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    return main(["export", str(path), str(new), *argv], env), env.stderr.getvalue()


def test_a_disk_that_a_python_file_defines(tmp_path, new):
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    assert (ExitStatus.OK, "") == exported(path, new, "--quiet", "text=hello")
    assert bytes(1 << 20) + b"hello".ljust(1 << 20, b"\0") == new.read_bytes()
    assert (1 << 20) >= 512 * new.stat().st_blocks


def test_what_looks_like_another_format_is_named_and_not_believed(host, tmp_path):
    env = host.environment()
    assert ExitStatus.OK == main(["create", str(tmp_path / "disk.vhd"), "--size", "1M"], env)
    os.rename(tmp_path / "disk.vhd", tmp_path / "disk")
    for content, said in ((None, "a VHD: if it is, add --format vhd"), (b"QFI\xfb", "qcow2")):
        if content is not None:
            (tmp_path / "disk").write_bytes(content.ljust(8192, b"\0"))
        assert ExitStatus.USAGE == main(["export", str(tmp_path / "disk"), "new"], env)
        assert f"{tmp_path / 'disk'}: looks like {said}" in env.stderr.getvalue()


@pytest.mark.parametrize("words", [[], ["--filter", "offset:start=512"]])
def test_a_raw_image_is_told_how_to_say_so(host, tmp_path, image, words):
    env = host.environment()
    assert ExitStatus.ERROR == main(["export", str(image), str(tmp_path / "new"), *words], env)
    assert "if it is a raw image, add --format raw" in env.stderr.getvalue()
    assert not (tmp_path / "new").exists()


def test_nobody_waits_for_the_other_end_of_a_pipe(host, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    env = host.environment()
    assert ExitStatus.ERROR == main(["export", str(tmp_path / "pipe"), "new"], env)
    assert "not an overlay" in env.stderr.getvalue()
