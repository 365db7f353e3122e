"""VHDs on block devices, as blktap has them on LVs: the footer is at the end of the device."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil

import pytest

from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.vhd import VhdBackend, layout
from xen_disk_py.backends.vhd.check import check
from xen_disk_py.backends.vhd.commit import commit
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.backends.vhd.export import export
from xen_disk_py.backends.vhd.layout import Footer
from xen_disk_py.errors import ImageError

from .conftest import content_of, patch, read, write
from .test_replay import crashes_anywhere, ends_anywhere, record

MIB = 1 << 20
SIZE = 9 * MIB


@pytest.fixture
def device(make_image, attach_loop):
    """Return a function that puts a VHD on a device of so many MiB, which is full of garbage."""

    def make(path, mib=16):
        image = make_image(mib * MIB, name=f"{os.path.basename(path)}.lv")
        with open(image, "r+b") as file:
            file.write(b"\xa5" * (mib * MIB))
            file.seek(0)
            file.write(content_of(path))
        return attach_loop(image)

    return make


@pytest.fixture
def dynamic(tmp_path, device):
    path = str(tmp_path / "a.vhd")
    create(path, SIZE)
    return device(path)


class TestConformance(BackendConformance):
    @pytest.fixture(autouse=True)
    def _device(self, tmp_path, device):
        path = str(tmp_path / "a.vhd")
        create(path, 3 * MIB + 512)
        self.device = device(path, mib=5)

    def open_disk(self, tmp_path):
        return VhdBackend(self.device)


def last_sector(path):
    with open(path, "rb") as file:
        file.seek(-512, os.SEEK_END)
        return file.read()


def test_the_footer_is_at_the_end_and_the_garbage_is_not_read(dynamic):
    assert Footer.parse(last_sector(dynamic)) is None
    with contextlib.closing(VhdBackend(dynamic)) as disk:
        assert (SIZE, False) == (disk.size, disk.can_discard)
        assert bytes(SIZE) == read(disk)
        write(disk, 3 * MIB, b"w" * 512)
    footer = Footer.parse(last_sector(dynamic))
    assert footer is not None
    with contextlib.closing(VhdBackend(dynamic, read_only=True)) as disk:
        expected = bytearray(SIZE)
        expected[3 * MIB : 3 * MIB + 512] = b"w" * 512
        assert bytes(expected) == read(disk)
    assert [] == [each.text for each in check(dynamic) if each.is_error]


def test_no_data_below_clear_bits_is_garbage(dynamic):
    """Some programs look at no bits."""
    with contextlib.closing(VhdBackend(dynamic)) as disk:
        write(disk, 0, b"w" * 512)
    with open(dynamic, "rb") as file:
        file.seek(1536)
        start = int.from_bytes(file.read(4), "big") * 512
        file.seek(start)
        block = file.read(512 + 2 * MIB)
    assert b"\x80" + bytes(511) + b"w" * 512 + bytes(2 * MIB - 512) == block


@pytest.mark.parametrize("kind", [layout.DYNAMIC, layout.DIFFERENCING])
def test_a_process_or_a_host_that_ends_anywhere(tmp_path, monkeypatch, device, kind):
    recorded = record(tmp_path, monkeypatch, kind, 1, lambda path: device(path, mib=1))
    assert any(event[0] == "write" for event in recorded[1])
    ends_anywhere(tmp_path, *recorded)
    crashes_anywhere(tmp_path, 1, *recorded)


def test_a_device_that_is_full(tmp_path, device):
    path = str(tmp_path / "a.vhd")
    create(path, SIZE)
    place = device(path, mib=5)
    with contextlib.closing(VhdBackend(place)) as disk:
        write(disk, 0, b"a" * (4 * MIB))
        with pytest.raises(OSError, match="no room for another block: make it larger") as error:
            write(disk, 4 * MIB, b"b" * 512)
        assert errno.ENOSPC == error.value.errno
        write(disk, 0, b"c" * (4 * MIB))
    with contextlib.closing(VhdBackend(place)) as disk:
        assert b"c" * (4 * MIB) + bytes(SIZE - 4 * MIB) == read(disk)


def test_a_device_that_has_become_larger(tmp_path, make_image, attach_loop):
    path = str(tmp_path / "a.vhd")
    create(path, SIZE)
    image = make_image(5 * MIB, name="small")
    patch(image, 0, content_of(path))
    with contextlib.closing(VhdBackend(attach_loop(image))) as disk:
        write(disk, 0, b"a" * (4 * MIB))
    larger = make_image(12 * MIB, name="large")
    shutil.copyfile(image, larger)
    os.truncate(larger, 12 * MIB)
    with contextlib.closing(VhdBackend(attach_loop(larger))) as disk:
        write(disk, 4 * MIB, b"b" * (4 * MIB))
        assert b"a" * (4 * MIB) + b"b" * (4 * MIB) + bytes(MIB) == read(disk)


def test_a_chain_of_devices_and_files(tmp_path, device):
    base, child = str(tmp_path / "base.vhd"), str(tmp_path / "child.vhd")
    create(base, SIZE)
    content = random.Random(1).randbytes(4096)
    with contextlib.closing(VhdBackend(base)) as disk:
        write(disk, MIB, content)
    create_child(child, base)
    place = device(child)
    with pytest.raises(ImageError, match="its parent is not there"):
        VhdBackend(place)
    with contextlib.closing(VhdBackend(place, parents=str(tmp_path))) as disk:
        write(disk, 0, b"w" * 512)
        assert b"w" * 512 == read(disk, 0, 512)
        assert content == read(disk, MIB, 4096)
    new = str(tmp_path / "new.raw")
    export(place, new, force=False, directories=[str(tmp_path)], progress=lambda *done: None)
    assert content == content_of(new)[MIB : MIB + 4096]
    with pytest.raises(ImageError, match="could not be removed then: commit it with"):
        commit(place, keep=False, directories=[str(tmp_path)], progress=lambda *done: None)
    assert os.path.exists(place)


def test_a_fixed_one(tmp_path, device):
    path = str(tmp_path / "a.vhd")
    create(path, 4 * MIB - 512, fixed=True)
    place = device(path, mib=4)
    footer = last_sector(place)
    with contextlib.closing(VhdBackend(place)) as disk:
        write(disk, 0, b"w" * disk.size)
        assert not disk.can_discard
    assert b"w" * (4 * MIB - 512) + footer == content_of(place)


def test_a_device_that_is_in_use_is_refused(dynamic):
    with contextlib.closing(VhdBackend(dynamic)), pytest.raises(ImageError, match="in use by"):
        VhdBackend(dynamic)
