import contextlib
import os
import random

import pytest

from xen_disk_py.backends import exporting
from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.backends.vhd.export import allocated, export
from xen_disk_py.errors import ImageError, UsageError

from .conftest import MANIFEST, content_of, entry, expected, read, write

MIB = 1 << 20
SMALL = [each["file"] for each in MANIFEST if each["virtual_size"] < 64 * MIB]


def nothing(done, total):
    """A progress that nobody wants to know of."""


@pytest.mark.parametrize("name", SMALL)
def test_what_others_have_made(unpacked, tmp_path, name):
    path, new = unpacked(name), str(tmp_path / "new.raw")
    parents = [os.path.dirname(os.path.dirname(path))]
    size = export(path, new, force=False, directories=parents, progress=nothing)
    assert entry(name)["virtual_size"] == size
    assert expected(name, 0, size) == content_of(new)
    assert os.stat(new).st_blocks * 512 < size or name == "fixed-tap.vhd"


def test_a_chain_over_a_raw_image_with_holes(tmp_path):
    image, path = tmp_path / "gold.img", str(tmp_path / "a.vhd")
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
        file.seek(8 * MIB)
        file.write(b"g" * MIB)
    create_child(path, str(image), is_raw=True)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 8 * MIB + 512, b"c" * 512)
        write(disk, 20 * MIB, b"d" * 512)
        model = read(disk)
        assert [(8 * MIB, 9 * MIB), (20 * MIB, 20 * MIB + 512)] == list(
            disk._top.allocated(0, disk.size)
        )
    assert (32 * MIB, [(8 * MIB + 512, 512), (20 * MIB, 512)]) == allocated(path)
    new = str(tmp_path / "new.raw")
    told = []
    export(path, new, force=False, progress=lambda *each: told.append(each))
    assert model == content_of(new)
    assert (32 * MIB, 32 * MIB) == told[-1]


def test_extents_of_several_blocks_are_one(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 8 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, MIB, random.Random(1).randbytes(4 * MIB))
    assert (8 * MIB, [(MIB, 4 * MIB)]) == allocated(path)


def test_a_fixed_one_has_all_of_it(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, MIB, fixed=True)
    assert (MIB, [(0, MIB)]) == allocated(path)


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, MIB)
    create_child(path, base)
    new = tmp_path / "new.raw"
    new.write_bytes(b"old")
    with pytest.raises(UsageError, match="there is such a file"):
        export(path, str(new), force=False, progress=nothing)
    export(path, str(new), force=True, progress=nothing)
    assert bytes(MIB) == content_of(new)
    before = content_of(base)
    for own in (base, path):
        with pytest.raises(UsageError, match="give another name"):
            export(path, own, force=True, progress=nothing)
    assert before == content_of(base)


def test_a_parent_that_is_being_written_is_refused(tmp_path):
    path, new = str(tmp_path / "a.vhd"), str(tmp_path / "new.raw")
    create(str(tmp_path / "base.vhd"), MIB)
    create_child(path, str(tmp_path / "base.vhd"))
    with contextlib.closing(VhdBackend(str(tmp_path / "base.vhd"))):
        with pytest.raises(ImageError, match="being written by process"):
            export(path, new, force=False, progress=nothing)
        with pytest.raises(ImageError, match="being written by process"):
            allocated(str(tmp_path / "base.vhd"))
    assert {"a.vhd", "base.vhd"} == set(os.listdir(tmp_path))


# of one that a disk is writing


@pytest.fixture
def used(tmp_path):
    """A child that a disk is writing, and what is read of it."""
    create(str(tmp_path / "base.vhd"), 8 * MIB)
    with contextlib.closing(VhdBackend(str(tmp_path / "base.vhd"))) as disk:
        write(disk, 0, random.Random(1).randbytes(MIB))
    create_child(str(tmp_path / "a.vhd"), str(tmp_path / "base.vhd"))
    with contextlib.closing(VhdBackend(str(tmp_path / "a.vhd"))) as disk:
        write(disk, MIB // 2, b"c" * MIB)
        yield disk


def test_a_disk_may_be_writing_it(used, tmp_path):
    new = str(tmp_path / "new.raw")
    checked = []
    size = export(
        used.path, new, force=False, progress=nothing, check=lambda *each: checked.append(each)
    )
    assert (8 * MIB, read(used)) == (size, content_of(new))
    assert {(str(tmp_path / name), False) for name in ("a.vhd", "base.vhd")} == set(checked)
    write(used, 0, b"x" * 512)  # and it is not locked out


def test_what_is_written_meanwhile_is_there_or_not_but_never_in_part(used, tmp_path, monkeypatch):
    """Where the file system cannot clone, it is copied again."""
    monkeypatch.setattr(exporting, "_clone", lambda fd, path: None)
    new, told = str(tmp_path / "new.raw"), []

    def progress(done, total):
        told.append(done)
        if len(told) == 2:
            write(used, 0, b"1" * 512)
            write(used, 7 * MIB, b"1" * 512)

    export(used.path, new, force=False, progress=progress)
    assert read(used) == content_of(new)
    assert told.count(8 * MIB) == 2


def test_a_guest_that_never_stops_is_told_of(used, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_clone", lambda fd, path: None)
    before = read(used)
    with pytest.raises(ImageError, match="its guest writes while it is copied"):
        export(
            used.path,
            str(tmp_path / "new.raw"),
            force=False,
            progress=lambda done, total: write(used, 0, before[:512]),
        )
    assert {"a.vhd", "base.vhd"} == set(os.listdir(tmp_path))
