#!/usr/bin/env bash
# os.preadv and os.pwritev with the offset -1 are no error: they use the file's position, and move
# it, as preadv2(2) and pwritev2(2) say. os.pread and os.pwrite fail with EINVAL, as one expects. So
# an offset that was computed wrongly reads or writes somewhere else.
#
# Seen: Python 3.11 on Linux 6.18 (and 3.13 to 3.15). Of a file "0123456789" at position 4:
#   os.preadv(fd, [4 bytes], -1): 4 bytes, "4567"; the position is 8 afterwards
#   os.pread(fd, 4, -1): OSError EINVAL
set -euo pipefail
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

python3 - "$work/file" <<'PYTHON'
import errno, os, sys

fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(fd, b"0123456789")
os.lseek(fd, 4, os.SEEK_SET)
buffer = bytearray(4)
count = os.preadv(fd, [buffer], -1)
position = os.lseek(fd, 0, os.SEEK_CUR)
try:
    os.pread(fd, 4, -1)
    said = "OK"
except OSError as error:
    said = errno.errorcode[error.errno]
print(f"preadv: {count} bytes, {bytes(buffer)}, then at {position}; pread: {said}")
sys.exit((count, bytes(buffer), position, said) != (4, b"4567", 8, "EINVAL"))
PYTHON
