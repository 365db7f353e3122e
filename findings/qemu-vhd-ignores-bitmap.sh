#!/usr/bin/env bash
# QEMU does not look at the sector bitmaps of a dynamic VHD: a sector whose bit is clear reads as
# whatever the file has there. By the format it reads as zeros, as blktap (XenServer), VirtualBox and
# libvhdi have it, so a disk that one of these has written may read differently in QEMU.
#
# Seen: QEMU 7.2 (Debian 12) and 11.1. The script has QEMU write 4 KiB of 0x61 into a new VHD, clears
# the bits of sectors 2 and 3 in the block's bitmap, and reads:
#   qemu-io 'read -P 0x61 0 4k': rc 0, though by the bitmap 1 KiB of that is zeros
set -euo pipefail
command -v qemu-io >/dev/null || { echo "needs qemu-io (Debian: qemu-utils)"; exit 77; }
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cd "$work"

qemu-img create -q -f vpc -o force_size=on disk.vhd 4M
qemu-io -f vpc -c 'write -q -P 0x61 0 4k' disk.vhd
python3 <<'PYTHON'
import struct

with open("disk.vhd", "r+b") as file:
    file.seek(1536)  # the table of blocks
    (sector,) = struct.unpack(">I", file.read(4))
    file.seek(sector * 512)
    (bits,) = file.read(1)
    print(f"bits of the first 8 sectors: {bits:08b}, now {bits & 0b11001111:08b}")
    file.seek(sector * 512)
    file.write(bytes([bits & 0b11001111]))
PYTHON
qemu-io -f vpc -c 'read -P 0x61 0 4k' disk.vhd
