"""Images that are damaged, or have lost what they need: what each command says of them, once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import struct
import subprocess

import pytest

from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus

MIB = 1 << 20
SIZE = 5 * MIB


def base(directory):
    """A dynamic VHD whose first two blocks are in the file."""
    path = str(directory / "base.vhd")
    create(path, SIZE)
    with contextlib.closing(VhdBackend(path)) as disk:
        disk.write([memoryview(b"b" * 4096)], 0)
        disk.write([memoryview(b"b" * 4096)], 2 * MIB)
    return path


def child(directory):
    path = str(directory / "child.vhd")
    create_child(path, base(directory))
    with contextlib.closing(VhdBackend(path)) as disk:
        disk.write([memoryview(b"c" * 4096)], 4096)
    return path


def patch(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def resum(path, start, length, at):
    """Give a structure the checksum that it should have."""
    with open(path, "r+b") as file:
        file.seek(start)
        content = bytearray(file.read(length))
        content[at : at + 4] = bytes(4)
        content[at : at + 4] = struct.pack(">I", ~sum(content) & 0xFFFFFFFF)
        file.seek(start)
        file.write(content)


# Each makes an image, and returns what is given to the commands: its path, and its format.


def not_a_vhd(directory):
    path = directory / "disk.vhd"
    path.write_bytes(b"\x11" * MIB)
    return path, "vhd"


def an_empty_vhd(directory):
    path = directory / "disk.vhd"
    path.write_bytes(b"")
    return path, "vhd"


def a_vhd_cut_short(directory):
    path = base(directory)
    os.truncate(path, os.path.getsize(path) - 3 * MIB)
    return path, "vhd"


def a_vhd_without_its_structures(directory):
    path = base(directory)
    os.truncate(path, 700)
    return path, "vhd"


def a_fixed_vhd_that_is_too_short(directory):
    path = str(directory / "fixed.vhd")
    create(path, SIZE, fixed=True)
    with open(path, "rb") as file:
        file.seek(-512, os.SEEK_END)
        footer = file.read()
    os.truncate(path, MIB)
    patch(path, MIB, footer)
    return path, "vhd"


def a_block_outside(directory):
    path = base(directory)
    patch(path, 1536, struct.pack(">I", 1 << 30))
    return path, "vhd"


def a_block_over_the_header(directory):
    path = base(directory)
    patch(path, 1536, struct.pack(">I", 1))
    return path, "vhd"


def two_blocks_at_one_place(directory):
    path = base(directory)
    with open(path, "rb") as file:
        file.seek(1536)
        first = file.read(4)
    patch(path, 1540, first)
    return path, "vhd"


def a_table_for_a_smaller_disk(directory):
    path = base(directory)
    patch(path, 512 + 28, struct.pack(">I", 1))
    resum(path, 512, 1024, 36)
    return path, "vhd"


def a_size_that_is_no_whole_sector(directory):
    path = base(directory)
    for start in (0, os.path.getsize(path) - 512):
        patch(path, start + 48, struct.pack(">Q", SIZE + 1))
        resum(path, start, 512, 64)
    return path, "vhd"


def a_header_with_a_wrong_checksum(directory):
    path = base(directory)
    patch(path, 600, b"x")
    return path, "vhd"


def a_parent_that_is_missing(directory):
    path = child(directory)
    os.rename(directory / "base.vhd", directory / "elsewhere")
    return path, "vhd"


def a_parent_that_is_another(directory):
    path = child(directory)
    os.unlink(directory / "base.vhd")
    create(str(directory / "base.vhd"), SIZE)
    return path, "vhd"


def a_parent_that_is_damaged(directory):
    path = child(directory)
    os.truncate(directory / "base.vhd", 3 * MIB)
    return path, "vhd"


def a_parent_that_is_its_own_child(directory):
    path = child(directory)
    shutil.copy(path, directory / "base.vhd")
    os.unlink(path)
    os.link(directory / "base.vhd", path)
    return path, "vhd"


def a_raw_parent_that_is_gone(directory):
    path, raw = str(directory / "child.vhd"), directory / "raw"
    raw.write_bytes(bytes(MIB))
    create_child(path, str(raw), is_raw=True)
    raw.unlink()
    return path, "vhd"


def overlay(directory):
    image, path = directory / "disk.raw", str(directory / "changes")
    image.write_bytes(bytes(SIZE))
    with contextlib.closing(OverlayBackend(str(image), overlay=path)) as disk:
        disk.write([memoryview(b"x" * 4096)], 0)
    return image, path


def an_overlay_without_its_image(directory):
    image, path = overlay(directory)
    image.unlink()
    return path, "overlay"


def an_overlay_whose_image_was_written(directory):
    image, path = overlay(directory)
    os.utime(image, (1, 1))
    return path, "overlay"


def an_overlay_whose_image_is_shorter(directory):
    image, path = overlay(directory)
    os.truncate(image, MIB)
    return path, "overlay"


def an_overlay_cut_short(directory):
    _, path = overlay(directory)
    os.truncate(path, 4096)
    return path, "overlay"


def a_file_as_overlay(directory):
    path = directory / "changes"
    path.write_bytes(b"\x11" * 8192)
    return path, "overlay"


def an_odd_raw_image(directory):
    path = directory / "disk.raw"
    path.write_bytes(bytes(MIB + 100))
    return path, "raw"


def an_empty_raw_image(directory):
    path = directory / "disk.raw"
    path.write_bytes(b"")
    return path, "raw"


def a_directory_as_raw_image(directory):
    path = directory / "disk.raw"
    path.mkdir()
    return path, "raw"


def qcow2(directory, *options):
    if shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-nbd and qemu-img")
    path = str(directory / "disk.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "5M"], check=True)
    return path


def not_a_qcow2(directory):
    path = directory / "disk.qcow2"
    path.write_bytes(b"\x11" * MIB)
    return path, "qcow2"


def a_qcow2_without_its_backing_file(directory):
    (directory / "backing").write_bytes(bytes(5 * MIB))
    path = qcow2(directory, "-b", str(directory / "backing"), "-F", "raw")
    os.unlink(directory / "backing")
    return path, "qcow2"


def a_qcow2_cut_short(directory):
    path = qcow2(directory)
    os.truncate(path, 60)
    return path, "qcow2"


def a_vhd_as_vhdx(directory):
    return base(directory), "vhdx"


ALL = (
    *(not_a_vhd, an_empty_vhd, a_vhd_cut_short, a_vhd_without_its_structures),
    *(a_fixed_vhd_that_is_too_short, a_block_outside, a_block_over_the_header),
    *(two_blocks_at_one_place, a_table_for_a_smaller_disk, a_size_that_is_no_whole_sector),
    *(a_header_with_a_wrong_checksum, a_parent_that_is_missing, a_parent_that_is_another),
    *(a_parent_that_is_damaged, a_parent_that_is_its_own_child, a_raw_parent_that_is_gone),
    *(an_overlay_without_its_image, an_overlay_whose_image_was_written),
    *(an_overlay_whose_image_is_shorter, an_overlay_cut_short, a_file_as_overlay),
    *(an_odd_raw_image, an_empty_raw_image, a_directory_as_raw_image),
    *(not_a_qcow2, a_qcow2_without_its_backing_file, a_qcow2_cut_short, a_vhd_as_vhdx),
)


def state(directory):
    """All files, with the hash of each and when it was written."""
    found = {}
    for path in directory.iterdir():
        content = b"" if path.is_dir() else path.read_bytes()
        found[path.name] = (hashlib.sha256(content).hexdigest(), path.stat().st_mtime_ns)
    return found


def is_one_line(text):
    return text.startswith("xen-disk: error: ") and text.count("\n") == 1 and ": " in text[17:]


@pytest.mark.parametrize("make", ALL, ids=[make.__name__ for make in ALL])
def test_each_command_says_one_line_and_changes_nothing(host, make, tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    path, kind = make(directory)
    before, nodes = state(directory), host.tree()

    words = {
        "overlay": ["--overlay", path],
        "raw": ["--path", path, "--backend", "raw"],
    }.get(kind, ["--path", path, "--format", kind])
    env = host.environment()
    status = main(["connect", "guest", *map(str, words)], env)
    said = env.stderr.getvalue()
    assert is_one_line(said), said
    assert status in (ExitStatus.ERROR, ExitStatus.USAGE), said
    assert nodes == host.tree()

    new = tmp_path / "new"
    options = ["--format", kind] if kind != "overlay" else []
    for command in (["export", path, new, *options], ["info", path, "--format", kind]):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        status = main([*map(str, command)], env)
        said = env.stderr.getvalue()
        if command[0] == "info" and status is ExitStatus.OK:
            assert said == ""  # it tells what there is, and what is wrong below
        else:
            assert is_one_line(said), said
            assert status in (ExitStatus.ERROR, ExitStatus.USAGE)  # USAGE: there is no qemu-nbd
    assert not new.exists()
    if kind == "vhd":
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        assert main(["check", str(path)], env) is ExitStatus.ERROR
        assert "error: " in env.stdout.getvalue() or is_one_line(env.stderr.getvalue())

    assert before == state(directory)
    assert {"images"} == set(os.listdir(tmp_path)) - {"records"}
