#!/usr/bin/env bash
# QEMU opens a differencing VHD (disk type 4) without its parent and without a word. The child's own
# blocks read right, everything else reads as zeros; qemu-img convert copies that and exits with 0.
#
# Seen: QEMU 7.2 (Debian 12) and 11.1. The script writes a child of 4 MiB by the published format
# (footer, dynamic header with the parent's UUID and name, one block of 2 MiB with all sectors
# present), whose parent "parent.vhd" need not exist:
#   qemu-img info:    rc 0, "file format: vpc", no backing file named
#   qemu-img convert: rc 0; the first 2 MiB are the child's, the other 2 MiB are zeros
set -euo pipefail
command -v qemu-img >/dev/null || { echo "needs qemu-img (Debian: qemu-utils)"; exit 77; }
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cd "$work"

python3 <<'PYTHON'
import struct

BLOCK, SIZE = 2 << 20, 4 << 20


def checked(data, at):
    """Put in the checksum: the complement of the sum of all bytes, its own field being 0."""
    total = ~sum(data) & 0xFFFFFFFF
    return data[:at] + struct.pack(">I", total) + data[at + 4 :]


footer = checked(
    struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB427x",
        b"conectix", 2, 0x10000, 512, 0, b"win ", 0x60001, b"Wi2k", SIZE, SIZE,
        120, 4, 17, 4, 0, b"child's own uuid", 0,
    ),
    64,
)
name = "parent.vhd".encode("utf-16-be").ljust(512, b"\0")
path = ".\\parent.vhd".encode("utf-16-le")
table, locator, block = 1536, 2048, 2560
locators = struct.pack(">4sIIIQ", b"W2ru", 512, len(path), 0, locator) + bytes(7 * 24)
header = checked(
    struct.pack(
        ">8sQQIIII16sII512s192s256x",
        b"cxsparse", 2**64 - 1, table, 0x10000, SIZE // BLOCK, BLOCK, 0, b"the parent's id.", 0, 0,
        name, locators,
    ),
    36,
)
entries = struct.pack(">II", block // 512, 0xFFFFFFFF).ljust(512, b"\xff")
with open("child.vhd", "wb") as file:
    file.write(footer + header + entries + path.ljust(512, b"\0"))
    file.write(b"\xff" * 512 + b"c" * BLOCK + footer)
PYTHON

info=$(qemu-img info -f vpc child.vhd) && rc=$? || rc=$?
echo "$info"
qemu-img convert -f vpc -O raw child.vhd all.raw && copied=$? || copied=$?
python3 - <<'PYTHON' && read=as-described || read=otherwise
data = open("all.raw", "rb").read()
own, rest = data[: 2 << 20], data[2 << 20 :]
print(f"own: {own.count(b'c')} of {len(own)} bytes; of the parent: {len(rest)} bytes, zero: {not any(rest)}")
raise SystemExit(own != b"c" * len(own) or not rest or any(rest))
PYTHON
[ "$rc $copied $read" = "0 0 as-described" ] && [[ $info != *backing* ]]
