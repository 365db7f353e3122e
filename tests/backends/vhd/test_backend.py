import contextlib
import os

import pytest

from xen_disk_py.backends import conformance
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.vhd import VhdBackend, layout
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import DeviceError, ImageError, UsageError

from .conftest import OTHER_UUID, UUID, build, content_of, entry, read, write

MIB = 1 << 20
ODD = 3 * MIB + 512


class TestDynamic(BackendConformance):
    def open_disk(self, tmp_path):
        path = str(tmp_path / "a.vhd")
        if not os.path.exists(path):
            create(path, ODD)
        return VhdBackend(path)


class TestFixed(BackendConformance):
    def open_disk(self, tmp_path):
        path = str(tmp_path / "a.vhd")
        if not os.path.exists(path):
            create(path, ODD, fixed=True)
        return VhdBackend(path)


class TestLarge(BackendConformance):
    def open_disk(self, tmp_path):
        path = str(tmp_path / "a.vhd")
        if not os.path.exists(path):
            create(path, layout.MOST)
        return VhdBackend(path)


class TestSmallBlocks(BackendConformance):
    def open_disk(self, tmp_path):
        path = tmp_path / "a.vhd"
        return VhdBackend(str(path) if path.exists() else build(path, ODD, block_size=4096))


class TestChain(BackendConformance):
    def open_disk(self, tmp_path):
        path = str(tmp_path / "leaf.vhd")
        if not os.path.exists(path):
            create(str(tmp_path / "base.vhd"), ODD)
            with contextlib.closing(VhdBackend(str(tmp_path / "base.vhd"))) as disk:
                write(disk, 0, b"p" * (2 * MIB))
            create_child(str(tmp_path / "middle.vhd"), str(tmp_path / "base.vhd"))
            with contextlib.closing(VhdBackend(str(tmp_path / "middle.vhd"))) as disk:
                write(disk, MIB, b"m" * 4096)
            create_child(path, str(tmp_path / "middle.vhd"))
        return VhdBackend(path)


class TestReadOnly(BackendConformance):
    def open_disk(self, tmp_path):
        path = str(tmp_path / "a.vhd")
        create(path, ODD)
        return VhdBackend(path, read_only=True)


@pytest.fixture
def child(tmp_path):
    create(str(tmp_path / "base.vhd"), 4 * MIB)
    with contextlib.closing(VhdBackend(str(tmp_path / "base.vhd"))) as disk:
        write(disk, 0, b"p" * (4 * MIB))
    create_child(str(tmp_path / "a.vhd"), str(tmp_path / "base.vhd"))
    return str(tmp_path / "a.vhd")


def test_a_discard_gives_space_back_and_leaves_the_parents(child):
    with contextlib.closing(VhdBackend(child)) as disk:
        write(disk, 0, b"c" * MIB)
        disk.flush()
        assert disk.can_discard
        before = os.stat(child).st_blocks
        disk.discard(512, 2 * MIB)
        assert os.stat(child).st_blocks < before
        content = read(disk)
    expected = b"c" * 512 + bytes(MIB - 512) + b"p" * (3 * MIB)
    assert expected == content
    with contextlib.closing(VhdBackend(child)) as disk:
        assert expected == read(disk)


def test_a_discard_spares_the_footer_of_a_fixed_one(unpacked):
    path = unpacked("fixed-tap.vhd")
    with contextlib.closing(VhdBackend(path)) as disk:
        disk.discard(0, disk.size)
        assert bytes(disk.size) == read(disk)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert entry("fixed-tap.vhd")["virtual_size"] == disk.size


def test_what_is_only_read_is_not_changed_and_not_flushed(child, monkeypatch):
    before = os.stat(child).st_mtime_ns
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    with contextlib.closing(VhdBackend(child, read_only=True)) as disk:
        assert not disk.can_discard
        read(disk)
        disk.flush()
    assert [] == calls
    assert before == os.stat(child).st_mtime_ns


def test_what_takes_no_waiting_is_done_at_once(child):
    with contextlib.closing(VhdBackend(child)) as disk:
        buffer = memoryview(bytearray(4096))
        assert 0 == disk.write_nowait([buffer], 0)  # bits change
        write(disk, 0, b"c" * 4096)
        assert 4096 == disk.write_nowait([memoryview(b"d" * 4096)], 0)
        assert 4096 == disk.read_nowait([buffer], 0)
        assert b"d" * 4096 == buffer
        assert 4096 == disk.read_nowait([buffer], 8192)  # the parent's
        assert b"p" * 4096 == buffer


def test_a_bitmap_that_is_not_in_memory_takes_waiting(tmp_path, monkeypatch):
    path = build(tmp_path / "a.vhd", MIB, block_size=4096, blocks=[(0, {0}, b"a" * 512)], uuid=UUID)
    with contextlib.closing(VhdBackend(path)) as disk:
        buffer = memoryview(bytearray(1024))
        preadv = os.preadv

        def not_in_memory(fd, buffers, offset, flags=None):
            if flags is not None:
                raise BlockingIOError
            return preadv(fd, buffers, offset)

        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", not_in_memory)
            assert 0 == disk.read_nowait([buffer], 0)
        assert 1024 == disk.read([buffer], 0)
        assert 1024 == disk.read_nowait([buffer], 0)
        assert b"a" * 512 + bytes(512) == buffer


def test_the_storage_is_that_of_all_files(child):
    with contextlib.closing(VhdBackend(child)) as disk:
        found = [(os.path.basename(each.path), each.writable) for each in disk.host_storage]
    assert [("a.vhd", True), ("base.vhd", False)] == found


def test_it_is_never_made_smaller(child):
    with contextlib.closing(VhdBackend(child)) as disk:
        assert 4 * MIB == disk.resize(None) == disk.resize(4 * MIB)
        with pytest.raises(DeviceError, match="never made smaller"):
            disk.resize(2 * MIB)


def test_it_is_opened_by_its_name(child):
    with contextlib.closing(open_backend("vhd", {"path": child, "parents": "/tmp"})) as disk:
        assert isinstance(disk, VhdBackend)
        assert disk.survives
        assert 4 * MIB == disk.size
    with pytest.raises(UsageError, match="the vhd backend takes no --sector-size"):
        open_backend("vhd", {"path": child, "sector_size": 4096})


def test_a_missing_parent_leaves_a_damaged_child_as_it_is(tmp_path):
    path = build(
        tmp_path / "a.vhd",
        MIB,
        kind=layout.DIFFERENCING,
        uuid=OTHER_UUID,
        parent_uuid=UUID,
        parent_name="base.vhd",
    )
    os.truncate(path, os.path.getsize(path) - 512)
    before = os.stat(path).st_size
    with pytest.raises(Exception, match="its parent is not there"):
        VhdBackend(path)
    assert before == os.stat(path).st_size


# -- changes to an image kept in a VHD ---------------------------------------------------------


@pytest.mark.parametrize("parent_format", ["raw", "vhd"])
def test_an_overlay_is_made_and_used_again(tmp_path, make_image, parent_format):
    image = str(tmp_path / "gold.vhd")
    if parent_format == "raw":
        image = make_image(MIB)
    else:
        create(image, MIB)
    before = content_of(image)
    (tmp_path / "elsewhere").mkdir()
    overlay = str(tmp_path / "elsewhere" / "changes.vhd")
    for step in range(2):
        options = {"overlay": overlay, "parent_format": parent_format}
        with contextlib.closing(VhdBackend(image, **options)) as disk:
            assert MIB == disk.size
            assert bytes([step]) * 512 == read(disk, 0, 512) or not step
            write(disk, 0, bytes([step + 1]) * 512)
            assert before[4096:8192] == read(disk, 4096, 4096) or parent_format == "vhd"
    assert before == content_of(image)
    with contextlib.closing(VhdBackend(overlay, parents=str(tmp_path))) as disk:
        assert b"\2" * 512 == read(disk, 0, 512)


def test_an_overlay_of_another_image_is_refused(tmp_path, make_image):
    image, other = make_image(MIB, name="a.img"), make_image(MIB, name="b.img")
    overlay = str(tmp_path / "changes.vhd")
    VhdBackend(image, overlay=overlay).close()
    with pytest.raises(ImageError, match=r"a child of .*a\.img, not of .*b\.img"):
        VhdBackend(other, overlay=overlay)
    os.unlink(overlay)
    create(overlay, MIB)
    with pytest.raises(ImageError, match="no child of any image"):
        VhdBackend(image, overlay=overlay)
    with pytest.raises(UsageError, match="raw or vhd"):
        VhdBackend(image, overlay=overlay, parent_format="qcow2")


def test_a_raw_image_that_was_written_since_is_worth_a_warning(tmp_path, make_image, caplog):
    image = make_image(MIB)
    overlay = str(tmp_path / "changes.vhd")
    VhdBackend(image, overlay=overlay).close()
    VhdBackend(image, overlay=overlay).close()
    assert [] == caplog.messages
    os.utime(image, (1_600_000_000, 1_600_000_000))
    VhdBackend(overlay).close()
    assert "was written or copied since" in caplog.messages[0]


def test_the_suite_takes_a_format(tmp_path, capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(conformance, "_Opener", lambda name, *_: chosen.append(name) or Opened())
    monkeypatch.setattr(pytest, "main", lambda *_: 0)
    assert 0 == conformance.main(["--format", "vhd", "--path", "x"])
    assert 0 == conformance.main(["vhd", "--path", "x"])
    assert ["vhd", "vhd"] == chosen
    for words in ([], ["--format", "vhd", "raw"]):
        assert 2 == conformance.main([*words, "--path", "x"])
        assert "name a backend, or the --format of the image" in capsys.readouterr().err


class Opened:
    def open(self):
        return self

    def close(self):
        pass
