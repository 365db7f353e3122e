import contextlib
import os
import random
import shutil

import pytest

from xen_disk_py.backends.vhd import VhdBackend, chain, layout
from xen_disk_py.backends.vhd.chain import DEEPEST
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.backends.vhd.layout import Locator
from xen_disk_py.errors import ImageError

from .conftest import (
    OTHER_UUID,
    UUID,
    build,
    content_of,
    digest,
    entry,
    needs,
    patch,
    read,
    resummed,
    run,
    write,
)

KIB = 1 << 10
MIB = 1 << 20


def base_of(directory, *, name="base.vhd", size=64 * KIB, uuid=UUID, block_size=4096):
    """A VHD full of p."""
    count = layout.blocks_of(size, block_size)
    return build(
        directory / name,
        size,
        block_size=block_size,
        uuid=uuid,
        blocks=[
            (number, set(range(block_size // 512)), b"p" * block_size) for number in range(count)
        ],
    )


def raw_of(directory):
    (directory / "base.raw").write_bytes(b"p" * (64 * KIB))
    return str(directory / "base.raw")


def child_of(directory, *, locators=(), name="", size=64 * KIB, uuid=UUID, **options):
    """A child of whatever has ``uuid``, with a sector of c.

    Args:
        locators: (code, bytes).
        name: in the header.
    """
    places = [
        Locator(code, 512, len(data), 2048 + 512 * number)
        for number, (code, data) in enumerate(locators)
    ]
    path = build(
        directory / options.pop("file", "child.vhd"),
        size,
        block_size=4096,
        kind=layout.DIFFERENCING,
        uuid=options.pop("own_uuid", OTHER_UUID),
        blocks=[(0, {1}, bytes(512) + b"c" * 512)],
        gap=512 * len(locators),
        parent_uuid=uuid,
        parent_name=name,
        locators=tuple(places),
    )
    with open(path, "r+b") as file:
        for place, (_, data) in zip(places, locators):
            file.seek(place.offset)
            file.write(data)
    return path


EXPECTED = b"p" * 512 + b"c" * 512 + b"p" * (63 * KIB)


def check(path, expected=EXPECTED, **options):
    with contextlib.closing(VhdBackend(path, **options)) as disk:
        assert expected == read(disk)


def refusal(path, **options):
    before = content_of(path)
    with pytest.raises(ImageError) as caught:
        VhdBackend(path, **options)
    assert before == content_of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def wide(text):
    return text.encode("utf-16-le")


# -- where a parent is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "locators",
    [
        [(b"W2ru", wide(".\\base.vhd"))],
        [(b"W2ru", wide("base.vhd"))],
        [(b"W2ru", wide("./base.vhd\0"))],
        [(b"W2ku", wide(".\\base.vhd"))],
        [(b"W2ku", wide("C:\\images\\base.vhd"))],
        [(b"W2ku", wide("\\\\server\\share\\base.vhd"))],
        [(b"W2ku", wide("/nowhere/at/all/base.vhd"))],
        [(b"MacX", b"file://./base.vhd")],
        [(b"MacX", b"file:///nowhere/base.vhd")],
        [(b"Wi2r", b".\\base.vhd")],
        [(b"Wi2k", b"C:\\base.vhd")],
        [(b"Mac ", b"\0\1\2"), (b"W2ru", wide("base.vhd"))],
        [(b"W2ku", wide("other.vhd")), (b"W2ru", wide("base.vhd"))],
        [(b"W2ru", wide("other.vhd")), (b"MacX", b"file://base.vhd")],
    ],
)
def test_every_kind_of_locator(tmp_path, locators):
    base_of(tmp_path)
    check(child_of(tmp_path, locators=locators))


@pytest.mark.parametrize("name", ["base.vhd", ".\\base.vhd", "./base.vhd", "C:\\x\\base.vhd"])
def test_the_name_in_the_header_is_enough(tmp_path, name):
    base_of(tmp_path)
    check(child_of(tmp_path, name=name))


def test_an_absolute_path(tmp_path):
    (tmp_path / "images").mkdir()
    base = base_of(tmp_path / "images")
    path = child_of(tmp_path, locators=[(b"W2ku", wide(base))])
    check(path)


def test_a_name_that_is_not_ascii(tmp_path):
    base_of(tmp_path, name="größe 基.vhd")
    check(child_of(tmp_path, name="größe 基.vhd"))
    check(child_of(tmp_path, locators=[(b"W2ru", wide(".\\größe 基.vhd"))]))


def test_a_path_is_relative_to_where_the_child_really_is(tmp_path):
    (tmp_path / "real").mkdir()
    base_of(tmp_path / "real")
    path = child_of(tmp_path / "real", locators=[(b"W2ru", wide("base.vhd"))])
    os.symlink(path, tmp_path / "link.vhd")
    check(str(tmp_path / "link.vhd"), parents=str(tmp_path / "real"))


def test_the_parent_is_known_by_its_uuid(tmp_path):
    base_of(tmp_path, uuid=bytes(range(32, 48)))
    path = child_of(tmp_path, name="base.vhd")
    text = refusal(path)
    assert UUID.hex() in text
    assert bytes(range(32, 48)).hex() in text
    (tmp_path / "right").mkdir()
    base_of(tmp_path / "right")
    check(child_of(tmp_path, locators=[(b"W2ku", wide("right\\base.vhd"))], name="base.vhd"))


def test_a_parent_that_is_not_there(tmp_path):
    path = child_of(tmp_path, locators=[(b"W2ru", wide("..\\base.vhd"))], name="base.vhd")
    text = refusal(path)
    assert "its parent is not there" in text
    assert "--option parents=DIR" in text


def test_a_child_that_names_no_parent(tmp_path):
    assert "it does not say where" in refusal(child_of(tmp_path))


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, 1 << 41])
def test_a_locator_that_lies_outside_of_the_file_names_nothing(tmp_path, offset):
    base_of(tmp_path)
    path = child_of(tmp_path, locators=[(b"MacX", b"file://./other.vhd")], name="base.vhd")
    header = bytearray(content_of(path)[512:1536])
    header[576 + 16 : 576 + 24] = offset.to_bytes(8, "big")
    patch(path, 512, resummed(bytes(header), 36))
    with contextlib.closing(VhdBackend(path)) as disk:
        assert b"p" * 512 == read(disk, 0, 512)
    patch(path, 512 + 64, bytes(512))  # nor has the header a name
    patch(path, 512, resummed(content_of(path)[512:1536], 36))
    with pytest.raises(ImageError, match="its parent is not there"):
        VhdBackend(path)


def test_what_is_no_file_is_no_parent(tmp_path):
    os.mkfifo(tmp_path / "base.vhd")
    assert "its parent is not there" in refusal(child_of(tmp_path, name="base.vhd"))


# -- confined ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["..", "absolute", "link"])
def test_a_parent_lies_in_the_directories_that_were_named(tmp_path, how):
    (tmp_path / "secret").mkdir()
    (tmp_path / "mine").mkdir()
    base = base_of(tmp_path / "secret")
    name = {"..": "../secret/base.vhd", "absolute": base, "link": "base.vhd"}[how]
    if how == "link":
        os.symlink(base, tmp_path / "mine" / "base.vhd")
    path = child_of(tmp_path / "mine", locators=[(b"W2ku", wide(name))])
    text = refusal(path)
    assert f"outside of {tmp_path}/mine" in text
    assert text.endswith(f"--option parents={tmp_path}/secret")
    check(path, parents=f"{tmp_path}/none:{tmp_path}/secret")
    check(path, parents=str(tmp_path))
    assert "outside" in refusal(path, parents=f"{tmp_path}/sec")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
@pytest.mark.parametrize("make", [base_of, raw_of])
def test_a_stranger_names_no_file_that_he_cannot_read(tmp_path, make):
    """In a directory that is everybody's, such as /tmp, others have theirs."""
    (tmp_path / "secret").mkdir(mode=0o700)
    base = make(tmp_path / "secret")
    uuid = layout.NO_UUID if make is not base_of else UUID
    relative = f"./secret/{os.path.basename(base)}".encode("utf-16-le")
    path = child_of(tmp_path, locators=[(b"W2ru", relative)], uuid=uuid)
    check(path)
    for status in ((99, 99, 0o600), (0, 0, 0o666), (0, 99, 0o660)):
        os.chown(path, *status[:2])
        os.chmod(path, status[2])
        text = refusal(path)
        assert "may not be able to read" in text
        assert text.endswith(f"--option parents={tmp_path}/secret")
        check(path, parents=f"{tmp_path}/secret")
    os.chown(path, 99, 99)
    os.chmod(path, 0o600)
    os.chown(base, 99, 99)
    check(path)


def test_the_name_is_looked_for_in_the_directories_that_were_named(tmp_path):
    (tmp_path / "moved").mkdir()
    base_of(tmp_path / "moved")
    path = child_of(tmp_path, locators=[(b"W2ku", wide("D:\\old\\base.vhd"))])
    assert "is not there" in refusal(path)
    check(path, parents=str(tmp_path / "moved"))


def test_a_name_with_anything_in_it_stays_in_one_line(tmp_path):
    path = child_of(tmp_path, locators=[(b"W2ru", wide("a\nb\x1b[31m.vhd"))])
    text = refusal(path)
    assert "a\\nb\\x1b[31m.vhd" in text


# -- loops and depth -----------------------------------------------------------------------


def test_a_chain_that_comes_back_is_refused(tmp_path):
    child_of(tmp_path, name="b.vhd", uuid=OTHER_UUID, own_uuid=UUID, file="a.vhd")
    child_of(tmp_path, name="a.vhd", uuid=UUID, own_uuid=OTHER_UUID, file="b.vhd")
    assert "itself a child of it" in refusal(str(tmp_path / "a.vhd"))
    child_of(tmp_path, name="c.vhd", uuid=UUID, own_uuid=UUID, file="c.vhd")
    assert "itself a child of it" in refusal(str(tmp_path / "c.vhd"))


def test_a_chain_is_no_deeper_than_it_may_be(tmp_path):
    path = str(tmp_path / "0.vhd")
    create(path, MIB)
    for number in range(1, DEEPEST):
        child = str(tmp_path / f"{number}.vhd")
        create_child(child, path)
        path = child
    check(path, bytes(MIB))
    child = child_of(tmp_path, name=os.path.basename(path), uuid=content_of(path)[68:84])
    assert f"more than {DEEPEST} files deep" in refusal(child)


def test_a_chain_takes_no_more_memory_than_it_may(tmp_path, monkeypatch):
    base_of(tmp_path)
    path = child_of(tmp_path, name="base.vhd")
    monkeypatch.setattr(chain, "MOST_BLOCKS_OF_ALL", 31)
    assert "its chain has more than 31 blocks" in refusal(path)
    monkeypatch.setattr(chain, "MOST_BLOCKS_OF_ALL", 32)
    check(path)


# -- what a parent may be ----------------------------------------------------------------------


def test_a_fixed_parent(tmp_path):
    base = str(tmp_path / "base.vhd")
    create(base, 4 * MIB, fixed=True)
    with contextlib.closing(VhdBackend(base)) as disk:
        write(disk, 0, b"p" * 4096)
    path = str(tmp_path / "a.vhd")
    create_child(path, base)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 512, b"c" * 512)
    check(path, b"p" * 512 + b"c" * 512 + b"p" * 3072 + bytes(4 * MIB - 4096))


def test_a_raw_parent(tmp_path, make_image):
    image = make_image(MIB)
    path = str(tmp_path / "a.vhd")
    assert MIB == create_child(path, image, is_raw=True)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 512, b"c" * 512)
    before = content_of(image)
    check(path, before[:512] + b"c" * 512 + before[1024:])
    os.unlink(image)
    assert "its parent is not there" in refusal(path)


def test_a_raw_parent_that_is_a_vhd_is_refused(tmp_path):
    base_of(tmp_path)
    path = child_of(tmp_path, name="base.vhd", uuid=bytes(16))
    assert "says that its parent" in refusal(path)


def test_a_device_as_raw_parent(tmp_path, loop_device):
    path = str(tmp_path / "a.vhd")
    create_child(path, loop_device, is_raw=True)
    with contextlib.closing(VhdBackend(path, parents="/dev")) as disk:
        write(disk, 512, b"c" * 512)
        assert 4 * MIB == disk.size
    with open(loop_device, "rb") as device:
        before = device.read()
    check(path, before[:512] + b"c" * 512 + before[1024:], parents="/dev")


@pytest.mark.parametrize("size", [512, 20 * KIB, 60 * KIB, 100 * KIB])
def test_sizes_may_differ(tmp_path, size):
    base_of(tmp_path)
    path = child_of(tmp_path, name="base.vhd", size=size)
    expected = (EXPECTED + bytes(size))[:size] if size >= 1024 else b"p" * 512
    check(path, expected)
    with contextlib.closing(VhdBackend(path)) as disk:
        last = size // 512 * 512 - 512
        write(disk, last, b"z" * 512)
        model = bytearray(expected)
        model[last:] = b"z" * 512
        assert model == read(disk)


def test_block_sizes_may_differ(tmp_path):
    base_of(tmp_path, size=4 * MIB, block_size=512 * KIB)
    path = str(tmp_path / "a.vhd")
    create_child(path, str(tmp_path / "base.vhd"))
    with contextlib.closing(VhdBackend(path)) as disk:
        model = bytearray(b"p" * (4 * MIB))
        for sector in (0, 1, 1023, 1024, 4095, 4096, 8191):
            write(disk, sector * 512, b"c" * 512)
            model[sector * 512 : sector * 512 + 512] = b"c" * 512
        assert model == read(disk)
    check(path, model)


def test_parents_are_locked_against_writers(tmp_path):
    base_of(tmp_path)
    path = child_of(tmp_path, name="base.vhd")
    other = child_of(tmp_path, name="base.vhd", file="other.vhd")
    with contextlib.closing(VhdBackend(path)), contextlib.closing(VhdBackend(other)):
        with pytest.raises(ImageError, match="in use by process"):
            VhdBackend(str(tmp_path / "base.vhd"))
        VhdBackend(str(tmp_path / "base.vhd"), read_only=True).close()


def test_nothing_stays_open_when_a_chain_is_refused(tmp_path):
    base_of(tmp_path, uuid=bytes(range(32, 48)))
    path = child_of(tmp_path, name="base.vhd")
    before = os.listdir("/proc/self/fd")
    refusal(path)
    assert before == os.listdir("/proc/self/fd")


# -- chains of three, against other programs ---------------------------------------------------


def chain_of_three(directory, dice):
    """Make one by writing, and return its leaf with what a guest reads."""
    base = str(directory / "base.vhd")
    create(base, 8 * MIB)
    model = bytearray(8 * MIB)
    path = base
    for name in ("base.vhd", "middle.vhd", "leaf.vhd"):
        if name != "base.vhd":
            child = str(directory / name)
            create_child(child, path)
            path = child
        with contextlib.closing(VhdBackend(path)) as disk:
            for _ in range(25):
                first = dice.choice((dice.randrange(16000), dice.randrange(40), 4090))
                count = dice.choice((1, 3, 8, 20, 300))
                content = dice.choice((bytes(512), dice.randbytes(512))) * count
                write(disk, first * 512, content)
                model[first * 512 : (first + count) * 512] = content
            assert model == read(disk)
    return path, model


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_three(tmp_path, seed):
    path, model = chain_of_three(tmp_path, random.Random(seed))
    check(path, model)
    check(path, model, read_only=True)


@needs("7z")
def test_a_chain_of_three_is_read_by_7_zip(tmp_path):
    path, model = chain_of_three(tmp_path, random.Random(7))
    run("7z", "x", "-y", f"-o{tmp_path}/out", path)
    (image,) = os.listdir(tmp_path / "out")
    assert model == content_of(tmp_path / "out" / image)


def test_the_fixtures_chain_moved_as_a_whole(unpacked, tmp_path):
    unpacked("chain3/sub/leaf.vhd")
    shutil.move(tmp_path / "chain3", tmp_path / "elsewhere")
    path = str(tmp_path / "elsewhere" / "sub" / "leaf.vhd")
    parents = str(tmp_path / "elsewhere")
    with contextlib.closing(VhdBackend(path, parents=parents)) as disk:
        assert entry("chain3/sub/leaf.vhd")["sha256"] == digest(disk)
