import contextlib
import os
import resource
import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xen_disk_py.backends.vhd import VhdBackend, layout, opening
from xen_disk_py.errors import ImageError

from .conftest import (
    LARGE,
    MANIFEST,
    OTHER_UUID,
    UUID,
    build,
    content_of,
    digest,
    entry,
    patch,
    read,
    resummed,
    write,
)

KIB = 1 << 10


@pytest.mark.parametrize("name", [each["file"] for each in MANIFEST if each["file"] != LARGE])
def test_what_others_have_made_reads_as_they_say(unpacked, name):
    path = unpacked(name)
    parents = os.path.dirname(os.path.dirname(path))
    with contextlib.closing(VhdBackend(path, read_only=True, parents=parents)) as disk:
        assert entry(name)["virtual_size"] == disk.size
        assert entry(name)["sha256"] == digest(disk)


# -- what a file may be instead ------------------------------------------------------------


def refusal(path, **options):
    """Open what must be refused; return the line, and see that nothing was changed."""
    before = content_of(path) if os.path.isfile(path) else None
    for read_only in (True, False):
        with pytest.raises(ImageError) as caught:
            VhdBackend(str(path), read_only=read_only, **options)
        assert before is None or before == content_of(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text


def test_a_raw_image_is_refused(make_image):
    assert "not a VHD" in refusal(make_image())


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024])
def test_a_short_file_is_refused(make_image, size):
    assert "not a VHD" in refusal(make_image(size))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor" in refusal(tmp_path / "pipe")
    assert "a directory" in refusal(tmp_path)
    assert "xen-disk create" in refusal(tmp_path / "none.vhd")


@pytest.mark.parametrize("cut", [512, 4096, 3 << 20])
def test_a_file_that_was_cut_short_is_refused(unpacked, cut):
    path = unpacked("dyn-batmap-tap.vhd")
    os.truncate(path, os.path.getsize(path) - 512 - cut)
    assert "perhaps cut short" in refusal(path)


def test_a_fixed_file_that_was_cut_short_is_refused(unpacked):
    path = unpacked("fixed-tap.vhd")
    content = content_of(path)
    with open(path, "wb") as file:
        file.write(content[:4096] + content[-512:])
    assert "says 4194304 bytes of disk, but the file has 4608" in refusal(path)


def changed(path, where, old, new):
    """Change a field of the header or of both footers, and give it the right checksum."""
    content = bytearray(content_of(path))
    if where == "header":
        content[512 + old : 512 + old + len(new)] = new
        content[512:1536] = resummed(bytes(content[512:1536]), 36)
    else:
        for at in (0, len(content) - 512):
            content[at + old : at + old + len(new)] = new
            content[at : at + 512] = resummed(bytes(content[at : at + 512]), 64)
    with open(path, "wb") as file:
        file.write(content)
    return path


@pytest.mark.parametrize(
    ("where", "at", "value", "text"),
    [
        ("footer", 60, struct.pack(">I", 9), "says type 9"),
        ("footer", 48, struct.pack(">Q", 0), "says 0 bytes"),
        ("footer", 48, struct.pack(">Q", 1000), "says 1000 bytes"),
        ("footer", 48, struct.pack(">Q", 1 << 40), "its BAT has 16 entries"),
        ("footer", 48, struct.pack(">Q", 1 << 63), "its BAT has 16 entries"),
        ("footer", 16, struct.pack(">Q", 1 << 60), "its header would be at byte"),
        ("footer", 16, struct.pack(">Q", 0), "its header would be at byte 0"),
        ("footer", 16, struct.pack(">Q", 1024), "no header where its footer says"),
        ("header", 0, b"cxsparsf", "no header where its footer says"),
        ("header", 16, struct.pack(">Q", 1 << 62), "its BAT ends beyond"),
        ("header", 16, struct.pack(">Q", 1000), "its BAT would start at byte 1000"),
        ("header", 16, struct.pack(">Q", 512), "its BAT lies over its header"),
        ("header", 24, struct.pack(">I", 0x00020000), "version 2"),
        ("header", 28, struct.pack(">I", 15), "its BAT has 15 entries"),
        ("header", 28, struct.pack(">I", 0xFFFFFFFF), "its BAT ends beyond"),
        ("header", 32, struct.pack(">I", 4097), "blocks of 4097 bytes"),
        ("header", 32, struct.pack(">I", 0), "blocks of 0 bytes"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(tmp_path, where, at, value, text):
    path = build(tmp_path / "a.vhd", 64 * KIB, block_size=4096)
    assert text in refusal(changed(path, where, at, value))


def test_more_blocks_than_memory_should_take_are_refused(tmp_path):
    path = build(tmp_path / "a.vhd", 64 * KIB, block_size=4096)
    changed(path, "header", 28, struct.pack(">I", 5 << 20))
    changed(path, "footer", 48, struct.pack(">Q", 20 << 30))
    footer = content_of(path)[-512:]
    os.truncate(path, 32 << 20)
    patch(path, 32 << 20, footer)
    assert "more than the 4194304 that are handled" in refusal(path)


@pytest.mark.parametrize(
    ("entry_of_block_1", "text"),
    [
        (0, "block 1 would lie over its header"),
        (3, "block 1 would lie over its header"),
        (4, None),  # over another one: see below
        (12, "lies over another one"),
        (1 << 20, "block 1 ends at byte"),
        (0xFFFFFFFE, "block 1 ends at byte"),
    ],
)
def test_a_bat_that_points_to_the_wrong_places_is_refused(tmp_path, entry_of_block_1, text):
    path = build(tmp_path / "a.vhd", 64 * KIB, block_size=4096, blocks=[(0, {0}, b"a" * 4096)])
    patch(path, 1536 + 4, struct.pack(">I", entry_of_block_1))
    assert (text or "lies over another one") in refusal(path)


# -- footers -------------------------------------------------------------------------------


def test_the_footer_at_the_end_counts_where_both_are_good(tmp_path):
    path = build(tmp_path / "a.vhd", 64 * KIB, block_size=4096)
    footer = layout.Footer.new(layout.DYNAMIC, 60 * KIB, UUID, 1)
    patch(path, -512, footer.raw)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert 60 * KIB == disk.size


@pytest.mark.parametrize("damage", [bytes(512), b"\xff" * 512, b"conectix" + bytes(504)])
def test_the_copy_counts_where_the_footer_is_damaged(unpacked, damage):
    path = unpacked("dyn-vbox.vhd")
    patch(path, -512, damage)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert entry("dyn-vbox.vhd")["sha256"] == digest(disk)


def test_the_footer_alone_is_enough(unpacked):
    path = unpacked("dyn-vbox.vhd")
    patch(path, 0, bytes(512))
    with contextlib.closing(VhdBackend(path)) as disk:
        assert entry("dyn-vbox.vhd")["sha256"] == digest(disk)


def test_a_footer_of_511_bytes_is_read(unpacked):
    for name in ("dyn-vbox.vhd", "fixed-tap.vhd"):
        path = unpacked(name)
        os.truncate(path, os.path.getsize(path) - 1)
        with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
            assert entry(name)["sha256"] == digest(disk)


def test_a_guest_cannot_write_a_footer_that_counts(tmp_path):
    """Where a file lost its own, what the guest has written into the last block is the end."""
    path = build(
        tmp_path / "a.vhd",
        64 * KIB,
        block_size=4096,
        blocks=[(0, set(range(8)), b"a" * 3584)],
    )
    os.truncate(path, os.path.getsize(path) - 512)
    larger = layout.Footer.new(layout.DYNAMIC, 60 * KIB, OTHER_UUID, 1)
    patch(path, -512, larger.raw)
    with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
        assert 64 * KIB == disk.size
        assert larger.raw == read(disk, 3584, 512)
    other = layout.Footer.new(layout.DIFFERENCING, 64 * KIB, OTHER_UUID, 1)
    patch(path, -512, other.raw)
    assert "contradict" in refusal(path)


def test_fields_that_no_program_agrees_on_are_not_judged(tmp_path):
    path = build(tmp_path / "a.vhd", 64 * KIB, block_size=4096)
    for at, value in (
        (8, bytes(4)),  # features
        (24, b"\xff" * 4),  # time stamp
        (28, b"\0\1\2\3" * 3),  # creator, its version, its OS
        (40, bytes(8)),  # original size
        (56, b"\xff" * 4),  # geometry
        (68, bytes(16)),  # UUID
        (84, b"\1\1\7"),  # saved, hidden, reserved
    ):
        changed(path, "footer", at, value)
        with contextlib.closing(VhdBackend(path)) as disk:
            assert bytes(64 * KIB) == read(disk)


def test_the_padding_of_the_bat_is_not_looked_at(tmp_path):
    path = build(tmp_path / "a.vhd", 64 * KIB, block_size=4096, entries=40)
    patch(path, 1536 + 4 * 16, bytes(4 * 24))
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 60 * KIB, b"a" * 4096)
        assert b"a" * 4096 == read(disk, 60 * KIB, 4096)


# -- anything at all -------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 2560), st.integers(-520, -1)),
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from(
                    [bytes(4), b"\xff" * 4, bytes(8), b"\x7f" + b"\xff" * 7, b"\0\0\0\5"]
                ),
            ),
        ),
        max_size=6,
    ),
    kind=st.sampled_from([layout.DYNAMIC, layout.DIFFERENCING]),
    is_summed=st.booleans(),
    length=st.integers(0, 40 * KIB),
)
@example(changes=[(48, b"\0\0\0\1\0\0\0\0")], kind=layout.DYNAMIC, is_summed=True, length=40 * KIB)
def test_any_header_is_read_or_refused(tmp_path, changes, kind, is_summed, length):
    """No crash, no read outside of the file, bounded memory, and no change of a refused file."""
    if not (tmp_path / "base.vhd").exists():
        build(tmp_path / "base.vhd", 32 * KIB, block_size=4096, uuid=OTHER_UUID)
    path = build(
        tmp_path / "a.vhd",
        32 * KIB,
        block_size=4096,
        kind=kind,
        blocks=[(1, {0, 3}, b"a" * 4096), (0, {1}, b"b" * 4096)],
        parent_uuid=OTHER_UUID if kind == layout.DIFFERENCING else bytes(16),
        parent_name="base.vhd",
        locators=(layout.Locator(b"W2ru", 512, 16, 2048), layout.Locator(b"MacX", 1, 9, 2560)),
    )
    content = bytearray(content_of(path))
    for where, new in changes:
        at = where % len(content)
        content[at : at + len(new)] = new
    if is_summed:
        content[:512] = resummed(bytes(content[:512]), 64)
        content[512:1536] = resummed(bytes(content[512:1536]), 36)
        content[-512:] = resummed(bytes(content[-512:]), 64)
    if length < 30 * KIB:
        del content[length:]
    with open(path, "wb") as file:
        file.write(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        disk = VhdBackend(path, read_only=True)
    except ImageError:
        refusal(path)
        return
    with contextlib.closing(disk):
        assert 0 < disk.size
        for offset in {0, disk.size - 512, disk.size // 2 // 512 * 512}:
            read(disk, offset, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * KIB


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=5000))
def test_any_file_is_read_or_refused(tmp_path, content):
    path = tmp_path / "a.vhd"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="not a VHD"):
        opening.open_vhd(str(path), writable=True)
    assert content == path.read_bytes()
