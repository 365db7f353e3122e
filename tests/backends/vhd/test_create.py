import contextlib
import os
import stat

import pytest

from xen_disk_py.backends.vhd import VhdBackend, layout, opening
from xen_disk_py.backends.vhd.chain import locators
from xen_disk_py.backends.vhd.check import check
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import ImageError, UsageError

from .conftest import content_of, needs, read, run

MIB = 1 << 20
GIB = 1 << 30


def opened(path):
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    return vhd


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [512, MIB + 512, 127 * GIB, 2040 * GIB])
def test_a_new_vhd_is_empty_and_has_no_faults(tmp_path, size, fixed):
    path = str(tmp_path / "a.vhd")
    create(path, size, fixed=fixed)
    assert [] == check(path)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert size == disk.size
        assert bytes(512) == read(disk, size - 512, 512)
    assert 0o600 == stat.S_IMODE(os.stat(path).st_mode)
    assert os.stat(path).st_blocks < 20000  # of 512 bytes


@needs("qemu-img")
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [MIB + 512, 100 * MIB, GIB, 127 * GIB, 2040 * GIB])
def test_qemu_sees_the_size(tmp_path, size, fixed):
    path = str(tmp_path / "a.vhd")
    create(path, size, fixed=fixed)
    assert f"({size} bytes)" in run("qemu-img", "info", "-f", "vpc", path)


@needs("vhdiinfo")
def test_libvhdi_sees_what_it_is(tmp_path):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, 100 * MIB)
    create_child(path, base)
    said = run("vhdiinfo", base)
    assert "Dynamic" in said
    assert "104857600 bytes" in said
    said = run("vhdiinfo", path)
    assert "Differential" in said
    assert "base.vhd" in said


@needs("qemu-img")
def test_an_image_of_qemus_compares_equal(tmp_path, make_image):
    image = make_image(3 * MIB)
    path = str(tmp_path / "a.vhd")
    create(path, 3 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        disk.write([memoryview(content_of(image))], 0)
    said = run("qemu-img", "compare", "-f", "raw", "-F", "vpc", image, path)
    assert "identical" in said


def test_two_have_different_uuids(tmp_path):
    for name in ("a.vhd", "b.vhd"):
        create(str(tmp_path / name), MIB)
    uuids = {opened(str(tmp_path / name)).footer.uuid for name in ("a.vhd", "b.vhd")}
    assert 2 == len(uuids - {bytes(16)})


@pytest.mark.parametrize(
    ("child", "parent", "name"),
    [
        ("a.vhd", "base.vhd", "./base.vhd"),
        ("a.vhd", "under/base.vhd", "./under/base.vhd"),
        ("under/a.vhd", "base.vhd", "./../base.vhd"),
        ("a.vhd", "ä 基.vhd", "./ä 基.vhd"),
    ],
)
def test_a_child_names_its_parent_relative_to_itself(tmp_path, child, parent, name):
    (tmp_path / "under").mkdir()
    create(str(tmp_path / parent), MIB)
    path = str(tmp_path / child)
    assert MIB == create_child(path, str(tmp_path / parent))
    vhd = opening.open_vhd(path, writable=False)
    try:
        assert [(b"W2ru", name), (b"MacX", name), (b"W2ku", name)] == locators(vhd)
        assert os.path.basename(parent) == vhd.blocks.header.parent_name
        assert opened(str(tmp_path / parent)).footer.uuid == vhd.blocks.header.parent_uuid
    finally:
        os.close(vhd.fd)
    assert [] == check(path, directories=[str(tmp_path)])


def test_a_child_of_a_link_names_the_file(tmp_path):
    (tmp_path / "under").mkdir()
    create(str(tmp_path / "under" / "base.vhd"), MIB)
    os.symlink(tmp_path / "under" / "base.vhd", tmp_path / "link.vhd")
    create_child(str(tmp_path / "a.vhd"), str(tmp_path / "link.vhd"))
    os.unlink(tmp_path / "link.vhd")
    VhdBackend(str(tmp_path / "a.vhd")).close()


def test_a_block_device_is_no_file_to_make(loop_device):
    with pytest.raises(UsageError, match="a block device: create makes a file"):
        create(loop_device, MIB)


def test_what_is_there_is_not_replaced(tmp_path, make_image):
    image = make_image()
    before = content_of(image)
    with pytest.raises(UsageError, match="there is such a file"):
        create(image, MIB)
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(UsageError, match="there is such a file"):
        create(str(tmp_path / "link"), MIB)
    assert before == content_of(image)
    assert ["disk.img", "link"] == sorted(os.listdir(tmp_path))


def test_what_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageError, match=r"a\.vhd: cannot be made: No space left"):
        create(str(tmp_path / "a.vhd"), MIB)
    assert [] == os.listdir(tmp_path)


def test_parents_that_cannot_be(tmp_path, make_image):
    path = str(tmp_path / "a.vhd")
    with pytest.raises(ImageError, match=r"not a VHD.*of a parent: --parent-format raw"):
        create_child(path, make_image(MIB))
    base = str(tmp_path / "base.vhd")
    create(base, MIB)
    with pytest.raises(ImageError, match="say so with --format vhd"):
        create_child(path, base, is_raw=True)
    with pytest.raises(ImageError, match="is not a multiple of 512"):
        create_child(path, make_image(1000, name="odd.raw"), is_raw=True)
    with pytest.raises(UsageError, match="at most"):
        create_child(path, make_image(2041 * GIB, name="large.raw", sparse=True), is_raw=True)
    with contextlib.closing(VhdBackend(base)), pytest.raises(ImageError, match="being written"):
        create_child(path, base)
    raw = layout.Footer.parse(content_of(base)[:512]).with_uuid(bytes(16)).raw
    with open(base, "r+b") as file:
        file.write(raw)
        file.seek(-512, os.SEEK_END)
        file.write(raw)
    with pytest.raises(ImageError, match="has no UUID"):
        create_child(path, base)
    assert not os.path.exists(path)
