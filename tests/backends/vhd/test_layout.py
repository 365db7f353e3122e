import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.backends.vhd import layout
from xen_disk_py.backends.vhd.layout import Batmap, Footer, Header, Locator
from xen_disk_py.errors import ImageError, UsageError

from .conftest import UUID, resummed

TIB = 1 << 40
sizes = st.integers(1, layout.MOST // 512).map(lambda sectors: sectors * 512)


@given(sizes, st.sampled_from([layout.FIXED, layout.DYNAMIC, layout.DIFFERENCING]))
def test_a_footer_is_read_as_it_was_made(size, kind):
    made = Footer.new(kind, size, UUID, 7)
    assert made == Footer.parse(made.raw)
    assert (kind, size, UUID) == (made.kind, made.size, made.uuid)
    assert 7 == made.fields["timestamp"]


def test_a_footer_of_511_bytes_is_read():
    made = Footer.new(layout.FIXED, 512, UUID, 7)
    assert made == Footer.parse(made.raw[:511])


@given(st.integers(0, 511), st.integers(1, 255))
def test_no_changed_byte_of_a_footer_goes_unnoticed(at, flip):
    raw = bytearray(Footer.new(layout.DYNAMIC, 1 << 30, UUID, 7).raw)
    raw[at] ^= flip
    assert Footer.parse(bytes(raw)) is None


@given(st.binary(max_size=600))
def test_bytes_that_are_no_footer_are_none(data):
    assert Footer.parse(data) is None


def test_another_uuid_leaves_the_rest_as_it_is():
    made = Footer.new(layout.DYNAMIC, 1 << 30, UUID, 7)
    other = made.with_uuid(bytes(16))
    assert other == Footer.parse(other.raw)
    assert bytes(16) == other.uuid
    assert made == other.with_uuid(UUID)


def test_a_header_is_read_as_it_was_made():
    locators = (Locator(b"MacX", 512, 20, 2048), Locator(b"W2ru", 1024, 40, 2560))
    made = Header.new(5, parent_uuid=UUID, parent_name="ünder/base.vhd", locators=locators)
    read = Header.parse(made.raw, "a.vhd")
    assert made == read
    assert (512, 2048) == (read.bitmap_size, read.end_of_table)


def test_a_locators_space_below_512_is_in_sectors():
    made = Header.new(1, locators=(Locator(b"W2ku", 1, 20, 2048), Locator(b"W2ru", 512, 9, 2560)))
    assert [512, 512] == [each.space for each in Header.parse(made.raw, "a.vhd").locators]


@pytest.mark.parametrize(
    ("block", "bitmap"),
    [(4096, 512), (512 << 10, 512), (2 << 20, 512), (4 << 20, 1024), (16 << 20, 4096)],
)
def test_a_bitmap_is_whole_sectors(block, bitmap):
    raw = Header.new(1).raw
    raw = resummed(raw[:32] + block.to_bytes(4, "big") + raw[36:], 36)
    assert bitmap == Header.parse(raw, "a.vhd").bitmap_size


@pytest.mark.parametrize("block", [0, 1, 511, 512, 2048, 3 << 20, 1 << 29, 1 << 31])
def test_blocks_that_cannot_be_handled_are_refused(block):
    raw = Header.new(1).raw
    raw = resummed(raw[:32] + block.to_bytes(4, "big") + raw[36:], 36)
    with pytest.raises(ImageError, match=r"^a\.vhd: blocks of .* bytes: .*convert it"):
        Header.parse(raw, "a.vhd")


@given(st.integers(0, 1023), st.integers(1, 255))
def test_no_changed_byte_of_a_header_goes_unnoticed(at, flip):
    raw = bytearray(Header.new(3, parent_name="base.vhd").raw)
    raw[at] ^= flip
    with pytest.raises(ImageError, match=r"^a\.vhd: a damaged VHD"):
        Header.parse(bytes(raw), "a.vhd")


def test_a_batmap_is_read_as_it_was_made():
    made = Batmap(4096, 1024, layout.BATMAP_VERSION, 9)
    assert made == Batmap.parse(made.pack().ljust(512, b"\0"))
    assert Batmap.parse(bytes(512)) is None
    assert Batmap.parse(b"tdbatmap") is None


@pytest.mark.parametrize(
    ("size", "shape"),
    [  # what blktap and VirtualBox have written for these
        (4 << 20, (120, 4, 17)),
        (8 << 20, (240, 4, 17)),
        (16 << 20, (481, 4, 17)),
        (20 << 20, (602, 4, 17)),
        (127 << 30, (65278, 16, 255)),
        (2000 << 30, (65535, 16, 255)),
    ],
)
def test_the_geometry_is_what_others_compute(size, shape):
    assert shape == layout.geometry(size)


@given(sizes)
def test_the_geometry_is_never_larger_than_the_disk(size):
    cylinders, heads, sectors = layout.geometry(size)
    assert cylinders * heads * sectors * 512 <= size
    assert (cylinders, heads, sectors) <= (65535, 16, 255)


@pytest.mark.parametrize("size", [0, -512, 511, 513, layout.MOST + 512])
def test_sizes_that_no_vhd_has_are_refused(size):
    with pytest.raises(UsageError, match="a VHD"):
        layout.check_size(size)


@pytest.mark.parametrize("code", [b"MacX", b"W2ru", b"W2ku"])
@given(st.text("abcÄ€𝄞 ./", min_size=1).filter(lambda text: "\0" not in text))
def test_a_name_in_a_locator_is_read_as_it_was_put(code, name):
    assert name == layout.decode_name(code, layout.encode_name(code, name))


@pytest.mark.parametrize(
    ("code", "data", "name"),
    [
        (b"W2ru", ".\\..\\A\\p.vhd".encode("utf-16-le"), "./../A/p.vhd"),
        (b"W2ku", "C:\\a\\p.vhd\0".encode("utf-16-le"), "C:/a/p.vhd"),
        (b"MacX", b"file://./a b.vhd", "./a b.vhd"),
        (b"MacX", b"a.vhd", "a.vhd"),
        (b"Wi2r", b"..\\p\xe4.vhd", "../pä.vhd"),
        (b"Mac ", b"\1\2\3", None),
        (b"W2ru", b"a\0b", None),
        (b"W2ru", "a\0b".encode("utf-16-le"), None),
        (b"W2ru", b"", None),
    ],
)
def test_names_of_all_kinds(code, data, name):
    assert name == layout.decode_name(code, data)


@given(st.sampled_from(layout.CODES), st.binary(max_size=80))
def test_any_bytes_in_a_locator_are_a_name_or_none(code, data):
    name = layout.decode_name(code, data)
    assert name is None or "\0" not in name
