import contextlib
import os
import random
import struct
import subprocess
import sys
import threading

import killing
import pytest

from xen_disk_py.backends.vhd import VhdBackend, blocks, layout, opening
from xen_disk_py.backends.vhd.create import create, create_child
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
    expected,
    needs,
    patch,
    qemu_content,
    read,
    run,
    write,
)

MIB = 1 << 20
NAMES = [each["file"] for each in MANIFEST if each["virtual_size"] < 64 * MIB]


def random_writes(disk, model, dice, steps, *, most=300):
    sectors = len(model) // 512
    for _ in range(steps):
        first = dice.randrange(sectors)
        count = min(dice.choice((1, 1, 2, 7, 8, most)), sectors - first)
        content = dice.choice((bytes(512), dice.randbytes(512))) * count
        write(disk, first * 512, content)
        model[first * 512 : (first + count) * 512] = content


# -- what is written is read, by us and by others -----------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_writes_to_what_others_have_made(unpacked, name):
    path = unpacked(name)
    parents = [entry(name)["parent"]] if entry(name)["parent"] else []
    before = {each: content_of(unpacked(each)) for each in parents}
    dice = random.Random(name)
    options = {"parents": os.path.dirname(os.path.dirname(path))}
    with contextlib.closing(VhdBackend(path, **options)) as disk:
        model = bytearray(read(disk))
        random_writes(disk, model, dice, 40)
        assert model == read(disk)
        disk.flush()
    with contextlib.closing(VhdBackend(path, read_only=True, **options)) as disk:
        assert model == read(disk)
    assert before == {each: content_of(unpacked(each)) for each in parents}


@needs("qemu-img")
@pytest.mark.parametrize("name", ["dyn-scattered-qemu.vhd", "dyn-notail-qemu.vhd"])
def test_what_was_written_to_a_vhd_of_qemus_is_read_by_qemu(unpacked, tmp_path, name):
    path = unpacked(name)
    with contextlib.closing(VhdBackend(path)) as disk:
        model = bytearray(read(disk))
        random_writes(disk, model, random.Random(1), 40)
    assert model == qemu_content(path, tmp_path)


@needs("qemu-img")
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [512, 1 * MIB + 512, 37 * MIB + 512])
def test_what_was_written_to_a_new_vhd_is_read_by_qemu(tmp_path, size, fixed):
    path = str(tmp_path / "a.vhd")
    create(path, size, fixed=fixed)
    with contextlib.closing(VhdBackend(path)) as disk:
        model = bytearray(read(disk))
        assert bytes(size) == model
        random_writes(disk, model, random.Random(2), 30)
        assert model == read(disk)
    assert model == qemu_content(path, tmp_path)


@needs("qemu-io")
def test_what_qemu_writes_into_ours_is_read(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 16 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 4096, b"a" * 4096)
    run("qemu-io", "-f", "vpc", "-c", "write -P 98 8k 4k", "-c", "write -P 99 5M 4k", path)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert b"a" * 4096 + b"b" * 4096 == read(disk, 4096, 8192)
        assert b"c" * 4096 == read(disk, 5 * MIB, 4096)
        write(disk, 9 * MIB, b"d" * 512)
    run("qemu-io", "-f", "vpc", "-c", "read -P 100 9M 512", "-c", "read -P 99 5M 4k", path)


@pytest.mark.parametrize("block_size", [4096, 32 << 10, 512 << 10, 2 << 20, 16 << 20])
def test_blocks_of_any_size(tmp_path, block_size):
    path = build(tmp_path / "a.vhd", 3 * MIB + 512, block_size=block_size)
    with contextlib.closing(VhdBackend(path)) as disk:
        model = bytearray(disk.size)
        random_writes(disk, model, random.Random(3), 60)
        assert model == read(disk)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert model == read(disk)


def test_the_ends_of_a_disk_of_2000_gib(unpacked):
    path = unpacked(LARGE)
    with contextlib.closing(VhdBackend(path)) as disk:
        for extent in entry(LARGE)["extents"]:
            start = max(0, extent["offset"] - 4096)
            length = min(8192, disk.size - start)
            assert expected(LARGE, start, length) == read(disk, start, length)
        write(disk, disk.size - 512, b"z" * 512)
        write(disk, disk.size - 4 * MIB, b"y" * 512)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert b"z" * 512 == read(disk, disk.size - 512, 512)
        assert b"y" * 512 == read(disk, disk.size - 4 * MIB, 512)


def test_many_buffers(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 4 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        parts = [memoryview(bytes([number % 251]) * 512) for number in range(3000)]
        assert 3000 * 512 == disk.write(parts, MIB)
        content = b"".join(parts)
        assert content == read(disk, MIB, 3000 * 512)
        pieces = [memoryview(bytearray(512)) for _ in range(3000)]
        done = disk.read(pieces, MIB)
        assert done >= 512 * 1000
        assert content[:done] == b"".join(pieces)[:done]


# -- the bits of sectors ---------------------------------------------------------------------


def test_a_clear_bit_is_zeros_whatever_lies_below(unpacked):
    name = "dyn-partial-tap.vhd"
    assert "stale" in entry(name)["note"]
    with contextlib.closing(VhdBackend(unpacked(name), read_only=True)) as disk:
        assert entry(name)["sha256"] == digest(disk)


def bitmap(path, block):
    vhd = opening.open_vhd(path, writable=False)
    try:
        at = vhd.blocks.bat[block] * 512
        return os.pread(vhd.fd, vhd.blocks.header.bitmap_size, at)
    finally:
        os.close(vhd.fd)


def test_only_the_bits_of_what_is_written_are_set(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 4 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 6 * 512, b"a" * 1024)
        assert b"\x03" == bitmap_in_use(disk, 0)[:1]
        write(disk, 18 * 512, b"b" * 1536)
    assert b"\x03\x00\x38" + bytes(509) == bitmap(path, 0)


def bitmap_in_use(disk, block):
    top = disk._top
    return os.pread(top.fd, 512, top._bat[block] * 512)


def test_a_block_whose_bits_are_all_set_is_read_in_one_piece(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 2 * MIB + 512)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 2 * MIB, b"a" * 512)  # all that the last block has
        assert [(2 * MIB, 2 * MIB + 512)] == [
            (start, stop) for start, stop, _ in disk._top.extents(2 * MIB, 2 * MIB + 512)
        ]
        assert 512 == disk.write_nowait([memoryview(b"b" * 512)], 2 * MIB)
        assert b"b" * 512 == read(disk, 2 * MIB, 512)


def test_zeros_where_nothing_is_take_no_room(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 8 * MIB)
    length = os.path.getsize(path)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 0, bytes(4 * MIB))
    assert length == os.path.getsize(path)


def test_zeros_hide_the_parent(tmp_path):
    base = str(tmp_path / "base.vhd")
    create(base, 4 * MIB)
    with contextlib.closing(VhdBackend(base)) as disk:
        write(disk, 0, b"a" * 8192)
    path = str(tmp_path / "a.vhd")
    create_child(path, base)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 4096, bytes(512))
        assert b"a" * 4096 + bytes(512) + b"a" * 3584 == read(disk, 0, 8192)


def test_bitmaps_in_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_CACHE", 4 * 4096)
    path = str(tmp_path / "a.vhd")
    create(path, 40 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        model = bytearray(disk.size)
        random_writes(disk, model, random.Random(4), 200, most=8)
        assert model == read(disk)
        assert len(disk._top._bitmaps) <= 4


# -- the file --------------------------------------------------------------------------------


def test_data_is_aligned_for_what_lies_below(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, 20 * MIB)
    with contextlib.closing(VhdBackend(path)) as disk:
        for block in (5, 0, 3):
            write(disk, block * 2 * MIB, b"a" * 512)
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    here = [each * 512 + 512 for each in vhd.blocks.bat if each != layout.FREE]
    assert [0, 0, 0] == [each % 4096 for each in here]
    assert vhd.blocks.used == vhd.tail == vhd.length - 512  # no room is left unused


def test_a_first_block_lies_behind_all_that_names_the_parent(unpacked, tmp_path):
    base = str(tmp_path / "base.vhd")
    create(base, 4 * MIB)
    path = str(tmp_path / "a.vhd")
    create_child(path, base)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 0, b"a" * 512)
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    assert vhd.blocks.bat[0] * 512 >= vhd.blocks.end > vhd.blocks.header.locators[-1].offset


def test_a_missing_footer_is_put_back_before_anything_is_written(unpacked):
    path = unpacked("dyn-notail-qemu.vhd")
    footer = content_of(path)[:512]
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, MIB, bytes(512))  # changes nothing: so it reads already
        vhd = opening.examine(os.open(path, os.O_RDONLY), path)
        os.close(vhd.fd)
        assert vhd.length - 512 == vhd.tail
        assert footer == content_of(path)[-512:]


@pytest.mark.parametrize("padding", [512, 3584, 100])
def test_a_footer_that_is_not_last_is_put_there(unpacked, padding):
    path = unpacked("dyn-xo-512k.vhd")
    patch(path, os.path.getsize(path), bytes(padding))
    before = entry("dyn-xo-512k.vhd")["sha256"]
    with contextlib.closing(VhdBackend(path)) as disk:
        assert before == digest(disk)
        write(disk, 5 * MIB, b"a" * 512)
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    assert vhd.length - 512 == vhd.tail


def test_a_footer_of_511_bytes_becomes_a_whole_one(unpacked):
    path = unpacked("dyn-vbox.vhd")
    os.truncate(path, os.path.getsize(path) - 1)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 9 * MIB, b"a" * 512)
        assert b"a" * 512 == read(disk, 9 * MIB, 512)
    assert 0 == os.path.getsize(path) % 512
    with contextlib.closing(VhdBackend(path)) as disk:
        assert b"a" * 512 == read(disk, 9 * MIB, 512)


def test_what_lies_behind_the_last_block_is_kept_unless_it_is_zeros(tmp_path):
    path = build(tmp_path / "a.vhd", 4 * MIB, block_size=4096)
    end = os.path.getsize(path) - 512
    footer = content_of(path)[-512:]
    patch(path, end, b"somebody's".ljust(4096) + footer)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 0, b"a" * 512)
        write(disk, MIB, b"b" * 512)
    assert b"somebody's" == content_of(path)[end : end + 10]


def test_a_fixed_file_keeps_its_length_and_its_footer(unpacked):
    path = unpacked("fixed-tap.vhd")
    footer = content_of(path)[-512:]
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, disk.size - 512, b"a" * 512)
        disk.flush()
    assert entry("fixed-tap.vhd")["virtual_size"] + 512 == os.path.getsize(path)
    assert footer == content_of(path)[-512:]


def test_a_batmap_says_of_no_added_block_that_it_is_full(unpacked):
    path = unpacked("dyn-batmap-tap.vhd")
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    batmap = vhd.blocks.batmap
    free = vhd.blocks.bat.index(layout.FREE)
    content = bytearray(content_of(path)[batmap.offset :][: batmap.length])
    right = bytes(content)
    content[free // 8] |= 0x80 >> free % 8
    patch(path, batmap.offset, content)
    patch(path, vhd.blocks.header.end_of_table + 24, struct.pack(">I", layout.checksum(content)))
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, free * 2 * MIB, b"a" * 512)
    vhd = opening.open_vhd(path, writable=False)
    os.close(vhd.fd)
    assert right == content_of(path)[batmap.offset :][: batmap.length]
    assert layout.checksum(right) == vhd.blocks.batmap.checksum


# -- several at once, and failures -----------------------------------------------------------


@pytest.mark.parametrize("bitmaps", [4096, 4])
def test_threads_that_write_side_by_side(tmp_path, monkeypatch, bitmaps):
    monkeypatch.setattr(blocks, "_CACHE", bitmaps * 4096)
    base = str(tmp_path / "base.vhd")
    create(base, 32 * MIB)
    path = str(tmp_path / "a.vhd")
    create_child(path, base)
    with contextlib.closing(VhdBackend(path)) as disk:
        model = bytearray(disk.size)
        failures = []

        def work(number):
            dice = random.Random(number)
            try:
                for _ in range(40):
                    sector = dice.randrange(disk.size // 512 // 8) * 8 + number
                    content = dice.randbytes(512)
                    write(disk, sector * 512, content)
                    model[sector * 512 : sector * 512 + 512] = content
                    assert content == read(disk, sector * 512, 512)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [] == failures
        assert model == read(disk)
    with contextlib.closing(VhdBackend(path)) as disk:
        assert model == read(disk)


def test_a_failed_flush_is_never_followed_by_one_that_succeeds(tmp_path, monkeypatch):
    path = str(tmp_path / "a.vhd")
    create(path, 8 * MIB)
    disk = VhdBackend(path)
    write(disk, 0, b"a" * 512)
    disk.flush()

    def fail(fd):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="a flush has failed"):
            disk.flush()
    with pytest.raises(OSError, match="nothing is flushed any more"):
        disk.flush()
    assert b"a" * 512 == read(disk, 0, 512)
    write(disk, 0, b"b" * 512)  # where nothing must be flushed before
    with pytest.raises(OSError, match="a flush has failed"):
        disk.flush()
    with pytest.raises(OSError, match="a flush has failed"):
        disk.close()  # no room is given back then
    disk.close()


@pytest.mark.parametrize("failing", range(1, 12))
@pytest.mark.parametrize("is_child", [False, True])
def test_a_write_that_fails_leaves_a_good_vhd(tmp_path, monkeypatch, is_child, failing):
    base = str(tmp_path / "base.vhd")
    path = str(tmp_path / "a.vhd")
    create(base, 8 * MIB)
    if is_child:
        create_child(path, base)
    else:
        path = base
    disk = VhdBackend(path)
    real, calls = os.pwritev, 0

    def full(fd, buffers, offset):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    model, may_be = bytearray(disk.size), {}
    for number, sector in enumerate((0, 3, 4097, 4098, 9000)):
        content = bytes([number + 1]) * 512
        try:
            write(disk, sector * 512, content)
            model[sector * 512 : sector * 512 + 512] = content
        except OSError:
            may_be[sector] = content
    with contextlib.suppress(OSError):
        disk.close()
    monkeypatch.undo()
    with contextlib.closing(VhdBackend(path)) as disk:
        found = bytearray(read(disk))
        for sector, content in may_be.items():
            assert bytes(found[sector * 512 : sector * 512 + 512]) in (bytes(512), content)
            found[sector * 512 : sector * 512 + 512] = bytes(512)
        assert model == found
        write(disk, 5 * MIB, b"z" * 512)


def test_a_kill_anywhere_loses_nothing_that_was_answered(tmp_path):
    size = 12 << 10
    base = build(tmp_path / "base.vhd", size, block_size=4096, uuid=UUID)
    with contextlib.closing(VhdBackend(base)) as disk:
        write(disk, 0, b"p" * size)
    blank = build(
        tmp_path / "blank.vhd",
        size,
        block_size=4096,
        kind=layout.DIFFERENCING,
        uuid=OTHER_UUID,
        parent_uuid=UUID,
        parent_name="base.vhd",
    )
    path, log = str(tmp_path / "a.vhd"), str(tmp_path / "log")
    writes = [(1, b"a"), (2, b"b"), (20, b"c"), (1, b"d")]
    empty = content_of(blank)

    def act(begin):
        with open(path, "wb") as file:
            file.write(empty)
        answered = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        begin()
        disk = VhdBackend(path)
        for sector, letter in writes:
            write(disk, sector * 512, letter * 512)
            os.write(answered, letter)
        disk.close()

    for _ in killing.at_every_effect(act, effects=15):
        done = content_of(log) if os.path.exists(log) else b""
        with contextlib.closing(VhdBackend(path)) as disk:
            model = bytearray(b"p" * size)
            for sector, letter in writes[: len(done)]:
                model[sector * 512 : sector * 512 + 512] = letter * 512
            found = bytearray(read(disk))
            if len(done) < len(writes):  # it may have been done, and not answered
                sector, letter = writes[len(done)]
                at = slice(sector * 512, sector * 512 + 512)
                assert bytes(found[at]) in (bytes(model[at]), letter * 512)
                found[at] = model[at]
            assert model == found
            write(disk, 12 * 512, b"x" * 512)
            assert b"x" * 512 == read(disk, 12 * 512, 512)


UNDER_LOAD = """
import os, random, struct, sys, threading
from xen_disk_py.backends.vhd import VhdBackend

disk = VhdBackend(sys.argv[1])

def work(number):
    dice = random.Random(number)
    for version in range(1, 1 << 30):
        sector = dice.randrange(disk.size // 512 // 8) * 8 + number
        disk.write([memoryview(struct.pack(">QQ", number, version) * 32)], sector * 512)
        os.write(1, struct.pack(">QQQ", number, sector, version))

for number in range(8):
    threading.Thread(target=work, args=(number,), daemon=True).start()
threading.Event().wait()
"""


@pytest.mark.parametrize("is_child", [False, True])
def test_a_kill_under_load(tmp_path, is_child):
    path = str(tmp_path / "a.vhd")
    create(path, 64 * MIB)
    if is_child:
        path = str(tmp_path / "child.vhd")
        create_child(path, str(tmp_path / "a.vhd"))
    process = subprocess.Popen([sys.executable, "-c", UNDER_LOAD, path], stdout=subprocess.PIPE)
    with process:
        noted = process.stdout.read(24 * 400)
        process.kill()
        noted += process.stdout.read()
    answered = {}
    for at in range(0, len(noted) // 24 * 24, 24):
        number, sector, version = struct.unpack_from(">QQQ", noted, at)
        answered[sector] = number, version
    with contextlib.closing(VhdBackend(path)) as disk:
        content = read(disk)
    for sector in range(disk.size // 512):
        found = content[sector * 512 : sector * 512 + 512]
        number, version = answered.get(sector, (sector % 8, 0))
        assert found[:16] * 32 == found
        if sector in answered or any(found):
            written = struct.unpack(">QQ", found[:16])
            assert number == written[0]
            assert version <= written[1]
    assert len(answered) > 300


def test_a_vhd_that_is_in_use_is_refused(tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, MIB)
    with contextlib.closing(VhdBackend(path)), pytest.raises(ImageError, match="in use by process"):
        VhdBackend(path)
    with contextlib.closing(VhdBackend(path, read_only=True)):
        VhdBackend(path, read_only=True).close()
