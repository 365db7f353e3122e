#!/usr/bin/env bash
# QEMU puts the first block of a dynamic VHD right behind its table of blocks, whatever stands there:
# in what blktap (XenServer, XCP-ng) has made, the batmap's header, and in an empty child the names of
# its parent. These are overwritten then, and a later blktap refuses the file.
#
# Seen: QEMU 7.2 (Debian 12). The script writes an empty VHD of 4 MiB as blktap lays it out:
# footer, header at 512, table at 1536, batmap header at 2048, batmap at 2560, footer.
#   qemu-io write of 4 KiB: rc 0; at 2048 is the block's bitmap, and the word "tdbatmap" is gone
set -euo pipefail
command -v qemu-io >/dev/null || { echo "needs qemu-io (Debian: qemu-utils)"; exit 77; }
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
        b"conectix", 2, 0x10000, 512, 0, b"tap\0", 0x10003, bytes(4), SIZE, SIZE,
        120, 4, 17, 3, 0, b"a uuid of a disk", 0,
    ),
    64,
)
header = checked(
    struct.pack(
        ">8sQQIIII984x", b"cxsparse", 2**64 - 1, 1536, 0x10000, SIZE // BLOCK, BLOCK, 0
    ),
    36,
)
batmap = struct.pack(">8sQIII", b"tdbatmap", 2560, 1, 0x10002, 0xFFFFFFFF).ljust(512, b"\0")
with open("disk.vhd", "wb") as file:
    file.write(footer + header + b"\xff" * 512 + batmap + bytes(512) + footer)
PYTHON

before=$(dd if=disk.vhd bs=1 skip=2048 count=8 status=none)
qemu-io -f vpc -c 'write -q -P 0x61 0 4k' disk.vhd
after=$(dd if=disk.vhd bs=1 skip=2048 count=8 status=none | od -An -tx1)
echo "at 2048: before $before, after$after"
[ "$before" = tdbatmap ] && [ "$after" = " ff ff ff ff ff ff ff ff" ]
