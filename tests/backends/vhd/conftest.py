"""VHDs that real tools have made, and how to read, make and take apart any."""

import hashlib
import json
import lzma
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from xen_disk_py.backends.vhd import layout
from xen_disk_py.backends.vhd.layout import Footer, Header, blocks_of

FIXTURES = Path(__file__).parent / "fixtures"
MANIFEST = json.loads((FIXTURES / "manifest.json").read_text(encoding="utf-8"))
LARGE = "dyn-2000g-qemu.vhd"
UUID = bytes(range(16))
OTHER_UUID = bytes(range(16, 32))


@pytest.fixture
def unpacked(tmp_path):
    """Unpacks a fixture, with its parents, as its manifest has them; returns its path."""

    def unpack(name):
        path = tmp_path / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.decompress((FIXTURES / f"{name}.xz").read_bytes()))
            parent = entry(name)["parent"]
            if parent is not None:
                unpack(parent)
        return str(path)

    return unpack


def entry(name):
    """What the manifest says of a fixture."""
    return next(each for each in MANIFEST if each["file"] == name)


def expected(name, offset, length):
    """What a guest must read of a fixture."""
    content = bytearray(length)
    for extent in entry(name)["extents"]:
        start = max(extent["offset"], offset)
        stop = min(extent["offset"] + extent["length"], offset + length)
        if start < stop:
            content[start - offset : stop - offset] = bytes([extent["byte"]]) * (stop - start)
    return bytes(content)


def read(disk, offset=0, length=None):
    """Read in pieces until all is there."""
    length = disk.size - offset if length is None else length
    buffer = bytearray(length)
    done = 0
    while done < length:
        moved = disk.read([memoryview(buffer)[done : done + (1 << 20)]], offset + done)
        assert moved
        done += moved
    return bytes(buffer)


def digest(disk):
    return hashlib.sha256(read(disk)).hexdigest()


def write(disk, offset, content):
    done = 0
    while done < len(content):
        moved = disk.write([memoryview(content)[done:]], offset + done)
        assert moved
        done += moved


def build(
    path,
    size,
    *,
    block_size=layout.BLOCK,
    kind=layout.DYNAMIC,
    blocks=(),
    uuid=UUID,
    gap=0,
    entries=None,
    **parent,
):
    """Make a VHD by hand.

    Args:
        blocks: (block, bitmap as a set of sectors, content) in the order in which they lie.
        gap: bytes between what is no block and the first one.
        entries: how many the BAT has; by default what the disk needs.
        parent: as for ``Header.new``.
    """
    footer = Footer.new(kind, size, uuid, 1)
    count = blocks_of(size, block_size)
    header = Header.new(entries or count, **parent)
    header = with_block_size(header, block_size)
    table = [layout.FREE] * (entries or count)
    at = max([header.end_of_table, *(each.offset + 512 for each in header.locators)]) + gap
    pieces = []
    for block, sectors, content in blocks:
        table[block] = at // 512
        bits = bytearray(header.bitmap_size)
        for sector in sectors:
            bits[sector // 8] |= 0x80 >> sector % 8
        pieces.append((at, bytes(bits)))
        pieces.append((at + len(bits), content))
        at += len(bits) + block_size
    with open(path, "wb") as file:
        for offset, content in (
            (0, footer.raw),
            (512, header.raw),
            (header.table, b"".join(each.to_bytes(4, "big") for each in table)),
            *pieces,
            (at, footer.raw),
        ):
            file.seek(offset)
            file.write(content)
    return str(path)


def with_block_size(header, block_size):
    raw = header.raw[:32] + block_size.to_bytes(4, "big") + header.raw[36:]
    return replace(header, block_size=block_size, raw=resummed(raw, 36))


def resummed(raw, at):
    """Give a structure the checksum that it should have."""
    raw = raw[:at] + bytes(4) + raw[at + 4 :]
    return raw[:at] + layout.checksum(raw).to_bytes(4, "big") + raw[at + 4 :]


def patch(path, offset, content):
    with open(path, "r+b") as file:
        if offset < 0:
            file.seek(offset, os.SEEK_END)
        else:
            file.seek(offset)
        file.write(content)


def content_of(path):
    """All that a file has."""
    return Path(path).read_bytes()


def needs(tool):
    """A mark: skip where a program is not installed."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def run(*command):
    """Run another program, which must succeed; return what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_content(path, tmp_path):
    """Read all of a disk with QEMU."""
    raw = tmp_path / "by-qemu.raw"
    run("qemu-img", "convert", "-f", "vpc", "-O", "raw", str(path), str(raw))
    content = raw.read_bytes()
    raw.unlink()
    return content
