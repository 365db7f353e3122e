"""A VHD that becomes larger while it is used."""

from __future__ import annotations

import contextlib
import os
import random

import pytest

from xen_disk_py.backends.vhd import VhdBackend, layout
from xen_disk_py.backends.vhd.check import check
from xen_disk_py.backends.vhd.commit import commit
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import DeviceError, ImageError, UsageError

from .conftest import UUID, build, content_of, needs, patch, qemu_content, read, resummed, write
from .test_replay import Recorder, apply

MIB = 1 << 20
SIZE = 3 * MIB + 512  # the last block is there in part
LARGER = 9 * MIB + 1024


def dynamic(directory):
    path = str(directory / "a.vhd")
    create(path, SIZE, most=16 * MIB)
    return path


def fixed(directory):
    path = str(directory / "a.vhd")
    create(path, SIZE, fixed=True)
    return path


def child(directory):
    create(str(directory / "base.vhd"), SIZE)
    with contextlib.closing(VhdBackend(str(directory / "base.vhd"))) as disk:
        write(disk, 0, b"p" * SIZE)
    path = str(directory / "a.vhd")
    create_child(path, str(directory / "base.vhd"), most=16 * MIB)
    return path


def of_the_size_of_its_table(directory):
    """There are no entries left, and room for them behind the table."""
    return build(
        directory / "a.vhd",
        SIZE,
        blocks=[(1, set(range(2049)), b"b" * (2 * MIB))],
        gap=1024,
        uuid=UUID,
    )


def of_a_table_of_whole_sectors(directory):
    """Its footer is right behind the table."""
    path = str(directory / "a.vhd")
    create(path, SIZE)
    raw = content_of(path)[512:1536]
    entries = (128).to_bytes(4, "big") + (32 << 10).to_bytes(4, "big")
    patch(path, 512, resummed(raw[:28] + entries + raw[36:], 36))
    return path


MAKERS = [dynamic, fixed, child, of_the_size_of_its_table, of_a_table_of_whole_sectors]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("is_written", [False, True])
def test_what_is_new_is_zeros_and_what_was_there_stays(tmp_path, make, is_written):
    path = make(tmp_path)
    dice = random.Random(1)
    disk = VhdBackend(path)
    if is_written:
        for offset in (0, SIZE - 512, SIZE - 4096, 2 * MIB - 512):
            write(disk, offset, dice.randbytes(512))
        write(disk, 2 * MIB, dice.randbytes(SIZE - 2 * MIB))  # all of the last block
    expected = bytearray(read(disk))
    assert LARGER == disk.resize(LARGER) == disk.size
    expected += bytes(LARGER - SIZE)
    assert bytes(expected) == read(disk)
    for offset in (0, SIZE - 512, SIZE, SIZE + 512, 4 * MIB, LARGER - 512):
        content = dice.randbytes(512)
        write(disk, offset, content)
        expected[offset : offset + 512] = content
    assert bytes(expected) == read(disk)
    disk.flush()
    disk.close()
    with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
        assert bytes(expected) == read(disk)
    assert [] == [each.text for each in check(path) if each.is_error]


@needs("qemu-img")
@pytest.mark.parametrize("make", [dynamic, fixed, of_a_table_of_whole_sectors])
def test_others_read_the_same(tmp_path, make):
    path = make(tmp_path)
    with contextlib.closing(VhdBackend(path)) as disk:
        disk.resize(LARGER)
        write(disk, LARGER - 512, b"w" * 512)
        content = read(disk)
    assert content == qemu_content(path, tmp_path)


@pytest.mark.parametrize("make", MAKERS)
def test_a_kill_at_any_moment_leaves_the_old_size_or_the_new(tmp_path, monkeypatch, make):
    path = make(tmp_path)
    with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
        old = read(disk)
    start = content_of(path)
    recorder = Recorder(monkeypatch)
    recorder.watch(path)
    with contextlib.closing(VhdBackend(path)) as disk:
        disk.resize(LARGER)
    monkeypatch.undo()
    steps = [each for each in recorder.events if each[0] != "sync"]
    sizes = set()
    for count in range(len(steps) + 1):
        with open(path, "wb") as file:
            file.write(apply(start, steps[:count]))
        with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
            sizes.add(disk.size)
            assert old == read(disk, 0, SIZE), count
    assert {SIZE, LARGER} == sizes


def test_a_table_without_room_says_what_to_do_and_nothing_changes(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, SIZE)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 0, b"w" * 512)
    before = content_of(path)
    with contextlib.closing(VhdBackend(path)) as disk:
        said = "its table has room for 1 GiB: disconnect the disk, and make a larger child of it"
        with pytest.raises(DeviceError, match=said):
            disk.resize(4 << 30)
        assert SIZE == disk.size
    assert before == content_of(path)


def test_what_is_open_for_reading_only_is_not_changed(tmp_path):
    path = dynamic(tmp_path)
    with (
        contextlib.closing(VhdBackend(path, read_only=True)) as disk,
        pytest.raises(DeviceError, match="for reading only"),
    ):
        disk.resize(LARGER)


def test_a_vhd_is_no_larger_than_one_can_be(tmp_path):
    path = dynamic(tmp_path)
    with (
        contextlib.closing(VhdBackend(path)) as disk,
        pytest.raises(DeviceError, match="a VHD has 2 TiB at most"),
    ):
        disk.resize(layout.MOST + 512)


# a child that is larger than its parent


def test_a_larger_child_reads_as_zeros_behind_its_parent(tmp_path):
    create(str(tmp_path / "base.vhd"), SIZE, most=16 * MIB)
    with contextlib.closing(VhdBackend(str(tmp_path / "base.vhd"))) as disk:
        write(disk, 0, b"p" * SIZE)
    path = str(tmp_path / "a.vhd")
    assert LARGER == create_child(path, str(tmp_path / "base.vhd"), size=LARGER)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert b"p" * SIZE + bytes(LARGER - SIZE) == read(disk)
        write(disk, LARGER - 512, b"c" * 512)
    expected = b"p" * SIZE + bytes(LARGER - SIZE - 512) + b"c" * 512
    commit(path, keep=False, progress=lambda *done: None)
    assert not os.path.exists(path)
    with contextlib.closing(VhdBackend(str(tmp_path / "base.vhd"))) as disk:
        assert expected == read(disk)


def test_a_commit_makes_a_raw_parent_larger(tmp_path):
    raw, path = tmp_path / "base.raw", str(tmp_path / "a.vhd")
    raw.write_bytes(b"p" * SIZE)
    create_child(path, str(raw), is_raw=True, size=LARGER)
    commit(path, keep=True, progress=lambda *done: None)
    assert b"p" * SIZE + bytes(LARGER - SIZE) == raw.read_bytes()
    with contextlib.closing(VhdBackend(path)) as disk:
        assert LARGER == disk.size


def test_a_commit_makes_a_parent_larger_whose_footer_was_missing(tmp_path):
    """Its table gets to where the footer was."""
    base, path = of_a_table_of_whole_sectors(tmp_path), str(tmp_path / "child.vhd")
    create_child(path, base, size=LARGER)
    with contextlib.closing(VhdBackend(path)) as disk:
        for offset in range(0, LARGER - 512, MIB):
            write(disk, offset, offset.to_bytes(8, "big") * 64)
        expected = read(disk)
    os.truncate(base, os.path.getsize(base) - 512)
    commit(path, keep=False, progress=lambda *done: None)
    with contextlib.closing(VhdBackend(base)) as disk:
        assert expected == read(disk)
    assert [] == [each.text for each in check(base) if each.is_error]


def test_a_commit_into_a_parent_that_has_no_room_is_refused(tmp_path):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, SIZE)
    with contextlib.closing(VhdBackend(base)) as disk:
        write(disk, 0, b"w" * 512)
    create_child(path, base, size=4 << 30)
    before = content_of(base), content_of(path)
    with pytest.raises(ImageError, match="cannot be made larger: its table has room for 1 GiB"):
        commit(path, keep=False, progress=lambda *done: None)
    assert before == (content_of(base), content_of(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"size": MIB}, "never smaller than its parent"), ({"most": MIB}, "has 3146240 already")],
)
def test_a_child_that_cannot_be(tmp_path, options, said):
    create(str(tmp_path / "base.vhd"), SIZE)
    with pytest.raises(UsageError, match=said):
        create_child(str(tmp_path / "a.vhd"), str(tmp_path / "base.vhd"), **options)
    assert ["base.vhd"] == os.listdir(tmp_path)


def test_a_footer_that_was_missing_is_put_back_once(tmp_path, monkeypatch):
    path = dynamic(tmp_path)
    os.truncate(path, os.path.getsize(path) - 512)
    recorder = Recorder(monkeypatch)
    recorder.watch(path)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert not recorder.events
        write(disk, 0, bytes(512))  # reads so already
        assert ["write", "sync"] == [each[0] for each in recorder.events]
        write(disk, 0, bytes(512))
        assert 2 == len(recorder.events)
