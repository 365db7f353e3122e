import os
import struct

import pytest

from xen_disk_py.backends.vhd import VhdBackend, layout, opening
from xen_disk_py.backends.vhd.check import check
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import ImageError

from .conftest import (
    LARGE,
    MANIFEST,
    OTHER_UUID,
    UUID,
    build,
    content_of,
    patch,
    resummed,
)

# What vhd-util and this program complain of in what others have made; the rest has no faults.
WARNED = {
    "dyn-scattered-qemu.vhd": {"geometry 65535/16/255 is larger"},
    "dyn-xo-512k.vhd": {"made in the future", "geometry 302/4/17", "blocks of 524288"},
    "dyn-notail-qemu.vhd": {"geometry 65535/16/255 is larger"},
}


@pytest.mark.parametrize("name", [each["file"] for each in MANIFEST if each["file"] != LARGE])
def test_what_others_have_made(unpacked, name):
    path = unpacked(name)
    before = content_of(path)
    found = check(path, directories=[os.path.dirname(os.path.dirname(path))])
    wanted = WARNED.get(name, set())
    warnings = [each.text for each in found if not each.is_error]
    assert wanted == {each for each in wanted if any(each in text for text in warnings)}
    assert all(any(each in text for each in wanted) for text in warnings)
    errors = [each.text for each in found if each.is_error]
    assert (["the footer at the end is missing"] if "notail" in name else []) == errors
    assert before == content_of(path)


def texts(path, **options):
    return [each.text for each in check(str(path), **options)]


def one(path, **options):
    (finding,) = check(str(path), **options)
    return finding


def dynamic(tmp_path, **options):
    return build(tmp_path / "a.vhd", 32 << 20, **options)


def both(path, at, value):
    """Change both footers."""
    length = os.path.getsize(path)
    for start in (0, length - 512):
        raw = bytearray(content_of(path)[start : start + 512])
        raw[at : at + len(value)] = value
        patch(path, start, resummed(bytes(raw), 64))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (8, bytes(4), "the bit of the features"),
        (8, b"\0\0\0\x82", "features 0x82"),
        (12, b"\0\1\0\1", "format version 0x10001"),
        (24, b"\xff" * 4, "made in the future"),
        (56, b"\xff" * 4, "geometry 65535/255/255 is larger"),
        (68, bytes(16), "no UUID"),
        (84, b"\2", "'saved' is 2"),
        (85, b"\3", "'hidden' is 3"),
        (100, b"\1", "reserved bytes"),
    ],
)
def test_fields_of_the_footer(tmp_path, at, value, text):
    path = dynamic(tmp_path)
    both(path, at, value)
    found = one(path)
    assert text in found.text
    assert not found.is_error


def test_footers_that_are_missing_or_differ(tmp_path):
    path = dynamic(tmp_path)
    whole = content_of(path)
    patch(path, 0, bytes(512))
    assert one(path).is_error
    assert "the copy of the footer at the start is missing" in one(path).text
    patch(path, 0, whole[:512])
    patch(path, -512, bytes(512))
    assert "the footer at the end is missing" == one(path).text
    patch(path, -512, b"conectix" + bytes(504))
    assert "the footer at the end has a wrong checksum" == one(path).text
    other = layout.Footer.parse(whole[:512]).with_uuid(OTHER_UUID)
    patch(path, -512, other.raw)
    assert "the two footers do not match: uuid" == one(path).text


def test_a_footer_of_511_bytes_is_a_warning(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 1 << 20, fixed=True)
    os.truncate(path, os.path.getsize(path) - 1)
    assert "511 bytes" in one(path).text


def test_what_cannot_be_used_is_one_error(tmp_path, make_image):
    assert [
        "the footer at the end is missing",
        "the copy of the footer at the start is missing",
    ] == [text.partition(" or damaged")[0] for text in texts(make_image())[:2]]
    path = dynamic(tmp_path, blocks=[(0, {0}, b"a" * 512)])
    patch(path, 1536, struct.pack(">I", 1))
    found = one(path)
    assert found.is_error
    assert found.text.startswith("a damaged VHD, or none: block 0 would lie over its header")


def test_a_block_over_the_locators_is_an_error(tmp_path):
    """What QEMU does to an empty child of blktap's, whose first block it puts behind the BAT."""
    build(tmp_path / "base.vhd", 32 << 20)
    place = (layout.Locator(b"W2ru", 512, 16, 2048),)
    path = build(
        tmp_path / "a.vhd",
        32 << 20,
        kind=layout.DIFFERENCING,
        uuid=OTHER_UUID,
        blocks=[(0, {0}, b"a" * 512)],
        parent_uuid=UUID,
        parent_name="base.vhd",
        locators=place,
    )
    patch(path, 1536, struct.pack(">I", 4))
    found = [each.text for each in check(path) if each.is_error]
    assert "block 0 (sector 4) lies over what names the parent" in found[0]


def test_a_parent_where_there_is_none(tmp_path):
    path = dynamic(tmp_path, parent_name="base.vhd")
    assert "the header names a parent" in one(path).text


# -- batmap --------------------------------------------------------------------------------


@pytest.fixture
def with_batmap(unpacked):
    return unpacked("dyn-batmap-tap.vhd")


def change_batmap(path, change):
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    batmap = vhd.blocks.batmap
    content = bytearray(content_of(path)[batmap.offset :][: batmap.length])
    change(content, vhd.blocks.bat)
    patch(path, batmap.offset, content)
    patch(path, vhd.blocks.header.end_of_table + 24, struct.pack(">I", layout.checksum(content)))


def test_a_batmap_with_a_wrong_checksum(with_batmap):
    vhd = opening.open_vhd(with_batmap, writable=False)
    os.close(vhd.fd)
    patch(with_batmap, vhd.blocks.batmap.offset, b"\x12")
    assert "the batmap has a wrong checksum" == one(with_batmap).text


def test_a_batmap_that_calls_a_free_block_full(with_batmap):
    def change(content, bat):
        block = bat.index(layout.FREE)
        content[block // 8] |= 0x80 >> block % 8

    change_batmap(with_batmap, change)
    assert "full: it is not there" in one(with_batmap).text


def test_a_batmap_that_calls_a_part_full(with_batmap):
    def change(content, bat):
        content[0] |= 0x80 >> 4  # block 4 of the fixture has 100 sectors

    change_batmap(with_batmap, change)
    assert "block 4 is full: its bitmap not" in one(with_batmap).text


def test_a_batmap_of_any_length_takes_no_memory(with_batmap):
    vhd = opening.open_vhd(with_batmap, writable=False)
    os.close(vhd.fd)
    footer = content_of(with_batmap)[-512:]
    batmap = layout.Batmap(vhd.blocks.batmap.offset, 1 << 40, layout.BATMAP_VERSION, 0)
    patch(with_batmap, vhd.blocks.header.end_of_table, batmap.pack())
    os.truncate(with_batmap, 2 << 40)
    patch(with_batmap, 2 << 40, footer)
    assert "too large" in texts(with_batmap)[0]
    VhdBackend(with_batmap).close()


def test_what_blktap_made_without_a_batmap(with_batmap):
    vhd = opening.open_vhd(with_batmap, writable=False)
    os.close(vhd.fd)
    patch(with_batmap, vhd.blocks.header.end_of_table, bytes(8))
    assert "no batmap, which blktap demands" in texts(with_batmap)[0]


# -- parents -------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path):
    create(str(tmp_path / "base.vhd"), 1 << 20)
    create_child(str(tmp_path / "a.vhd"), str(tmp_path / "base.vhd"))
    return str(tmp_path / "a.vhd")


def change_header(path, at, value):
    raw = bytearray(content_of(path)[512:1536])
    raw[at : at + len(value)] = value
    patch(path, 512, resummed(bytes(raw), 36))


def test_a_parent_that_is_missing_or_another(tmp_path, child):
    assert [] == check(child)
    os.rename(tmp_path / "base.vhd", tmp_path / "kept.vhd")
    assert "its parent is not there" in one(child).text
    create(str(tmp_path / "base.vhd"), 1 << 20)
    assert "its parent has the UUID" in one(child).text


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (576, b"Abcd", "of a kind that nobody knows"),
        (576 + 24, b"MacX", "a second one of its kind"),
        (576 + 12, b"\1", "reserved bytes are not zero"),
        (576 + 4, bytes(4), "without a place, room or length"),
        (576 + 16, b"\1", "outside of the file"),
        (576 + 3 * 24 + 8, b"\1", "of no kind, but not empty"),
        (64, "other.vhd".encode("utf-16-be"), "names another file than the header"),
        (62, b"\1", "reserved bytes"),
        (800, b"\1", "reserved bytes"),
        (8, bytes(8), "an offset of more data"),
    ],
)
def test_locators_and_header_of_a_child(child, at, value, text):
    change_header(child, at, value)
    assert any(text in each for each in texts(child))


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        check(str(tmp_path / "none.vhd"))
