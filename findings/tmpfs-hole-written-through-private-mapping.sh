#!/usr/bin/env bash
# Writing through a *private* mapping of a tmpfs file, where the file has a hole, allocates the hole in
# the file as well as the private copy: twice the memory. ext4 allocates nothing.
#
# Seen: Linux 6.18, Python 3.11: 8 MiB of holes, a byte written to each page of an ACCESS_COPY mapping:
#   tmpfs: 16384 blocks of 512 bytes in the file afterwards, 0 before; its content is still zeros
set -euo pipefail
[ -d /dev/shm ] || { echo "needs /dev/shm"; exit 77; }
work=$(mktemp -d -p /dev/shm)
trap 'rm -r "$work"' EXIT
[ "$(stat -f -c %T "$work")" = tmpfs ] || { echo "/dev/shm is no tmpfs"; exit 77; }
python3 - "$work/holes" <<'PYTHON'
import mmap, os, sys

SIZE = 8 << 20
with open(sys.argv[1], "wb+") as file:
    file.truncate(SIZE)
    before = os.fstat(file.fileno()).st_blocks
    memory = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY)
    for at in range(0, SIZE, mmap.PAGESIZE):
        memory[at] = 1
    after = os.fstat(file.fileno()).st_blocks
    unchanged = not any(os.pread(file.fileno(), SIZE, 0))
    memory.close()
print(f"blocks in the file: {before} before, {after} after; content unchanged: {unchanged}")
sys.exit((before, after >= SIZE // 512, unchanged) != (0, True, True))
PYTHON
