#!/usr/bin/env bash
# Reading a hole of a tmpfs file through a shared mapping allocates its pages; pread does not.
#
# Seen: Linux 6.18. A sparse file of 4 MiB, st_blocks after reading all of it:
#   pread: 0
#   mmap (MAP_SHARED, PROT_READ): 8192, that is 4 MiB; SEEK_DATA calls it data
set -euo pipefail
[ "$(stat -f -c %T /dev/shm)" = tmpfs ] || { echo "/dev/shm is no tmpfs"; exit 77; }
work=$(mktemp -d -p /dev/shm)
trap 'rm -r "$work"' EXIT

python3 - "$work/sparse" <<'PYTHON'
import mmap, os, sys

SIZE = 4 << 20
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(fd, SIZE)
os.pread(fd, SIZE, 0)
by_pread = os.fstat(fd).st_blocks
with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as view:
    for at in range(0, SIZE, mmap.PAGESIZE):
        view[at]
by_mapping = os.fstat(fd).st_blocks
print(f"blocks of 512 bytes after pread: {by_pread}, after reading the mapping: {by_mapping}")
sys.exit((by_pread, by_mapping) != (0, SIZE // 512))
PYTHON
