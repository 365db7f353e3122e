import contextlib
import os
import random

import pytest

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


def test_a_disk_that_is_being_written_is_refused(tmp_path):
    path, new = str(tmp_path / "a.vhd"), str(tmp_path / "new.raw")
    create(path, MIB)
    with contextlib.closing(VhdBackend(path)):
        with pytest.raises(ImageError, match="being written by process"):
            export(path, new, force=False, progress=nothing)
        with pytest.raises(ImageError, match="being written by process"):
            allocated(path)
    assert not os.path.exists(new)
