#!/usr/bin/env bash
# A loop device says that a write is done of which its backing file could take only the beginning. No
# error is told, neither to fsync nor in the kernel's log, and the rest of the data is lost. (A write
# of which the backing file can take nothing is an error.)
#
# Seen: Linux 6.18, util-linux 2.38. The backing file lies on a full tmpfs, and has a page for the
# first 4 KiB of 64 KiB that is written:
#   fsync: OK
#   read back after dropping the cache: 4096 of 65536 bytes
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root (tmpfs, loop device)"; exit 77; }
work=$(mktemp -d)
device=
trap '[ -z "$device" ] || losetup -d "$device"; umount "$work/small" 2>/dev/null || true; rm -r "$work"' EXIT
mkdir "$work/small"
mount -t tmpfs -o size=8M none "$work/small" || exit 77
truncate -s 32M "$work/small/disk"
device=$(losetup --find --show "$work/small/disk") || exit 77

python3 - "$device" "$work/small/filler" <<'PYTHON'
import os, sys

fd = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(fd, b"x" * 4096, 0)
os.fsync(fd)  # this page has its space
filler = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
try:
    while os.write(filler, bytes(4096)):
        pass
except OSError:
    pass  # full
os.pwrite(fd, b"y" * (64 << 10), 0)
try:
    os.fsync(fd)
    told = "OK"
except OSError as error:
    told = error.strerror
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
arrived = os.pread(fd, 64 << 10, 0).count(b"y")
print(f"fsync said {told}; {arrived} of {64 << 10} bytes arrived")
sys.exit(told != "OK" or arrived == 64 << 10)
PYTHON
