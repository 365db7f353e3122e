#!/usr/bin/env bash
# A write-back error is told to one fsync of an open file. The next fsync says OK, although the data
# never arrived: the pages were marked clean.
#
# Seen: Linux 6.18, util-linux 2.38. 16 MiB are written through the page cache to a loop device whose
# backing file lies on a tmpfs of 8 MiB:
#   first fsync:  OSError EIO (Input/output error)
#   second fsync: OK
#   read back after dropping the cache: 8 of 16 MiB
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root (tmpfs, loop device)"; exit 77; }
work=$(mktemp -d)
device=
trap '[ -z "$device" ] || losetup -d "$device"; umount "$work/small" 2>/dev/null || true; rm -r "$work"' EXIT
mkdir "$work/small"
mount -t tmpfs -o size=8M none "$work/small" || exit 77
truncate -s 32M "$work/small/disk"
device=$(losetup --find --show "$work/small/disk") || exit 77

python3 - "$device" <<'PYTHON'
import errno, os, sys

DATA = b"x" * (16 << 20)
fd = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(fd, DATA, 0)
told = []
for _ in range(2):
    try:
        os.fsync(fd)
        told.append("OK")
    except OSError as error:
        told.append(errno.errorcode[error.errno])
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
arrived = os.pread(fd, len(DATA), 0).count(b"x")
print(f"fsync said {told}; {arrived} of {len(DATA)} bytes arrived")
sys.exit(told != ["EIO", "OK"] or arrived == len(DATA))
PYTHON
