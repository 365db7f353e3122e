import random

import pytest

from xen_disk_py.errors import UsageError
from xen_disk_py.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1k", 1024),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MB", 64 << 20),
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        (" 1G ", 1 << 30),
        ("2T", 2 << 40),
        ("1.5G", 3 << 29),
        (".5k", 512),
        ("0.001953125k", 2),
        (f"{'0' * 9999}1.{'0' * 9999}k", 1024),
    ],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert size == parse_size(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "G", "-1", "-1G", "1X", "1GG", "1G1", "1e3", "0x10", "1,5G", "nan", "١", "1iB"],
)
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(UsageError, match="is not a size: give bytes") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["1.5", "0.3k", "1.0001K", f"1.{'0' * 40}1E", f".{'5' * 9999}k"])
def test_a_fraction_of_a_byte_is_refused(text):
    with pytest.raises(UsageError, match="not a whole number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 30, "1 GiB"),
        ((1 << 30) - 1, "1 GiB"),
        ((1 << 30) + 1, "1 GiB"),
        (1000 << 20, "1000 MiB"),
        (5 << 40, "5 TiB"),
        (3 << 70, "3072 EiB"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_it_fills(size, text):
    assert text == format_size(size)


def test_what_is_written_reads_back_almost_the_same():
    dice = random.Random(1)
    for _ in range(2000):
        size = dice.getrandbits(dice.randint(1, 62))
        text = format_size(size)
        try:
            again = parse_size(text)
        except UsageError:
            assert "." in text
            continue
        assert abs(again - size) <= size * 0.05


@pytest.mark.parametrize("text", ["8E", "100E", "9223372036854775807", "9" * 9999])
def test_no_disk_is_as_large_as_that(text):
    with pytest.raises(UsageError, match="more than any disk can have: at most 8 EiB"):
        parse_size(text)
    assert 7 << 60 == parse_size("7E")
