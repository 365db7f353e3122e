#!/usr/bin/env bash
# Beyond a certain place of a file, ext4 says that it has punched a hole, and has done nothing: the data
# is still read, and takes its space. With blocks of 4 KiB that place is at 4 TiB, with blocks of 1 KiB
# at 16 GiB. So what has zeros there by punching a hole keeps the old data: it had better look, with
# SEEK_DATA. The limit is one of files without extents, and counts for all since Linux 5.18 ("ext4:
# limit length to bitmap_maxbytes - blocksize in punch_hole"); by their logs, Linux 6.16 and 6.12.41 have
# it no longer ("ext4: fix incorrect punch max_end").
#
# Seen: Linux 6.1.0-56-amd64 (Debian 12):
#   a hole at 15 GiB: fallocate said OK, "" is read
#   a hole at 17 GiB: fallocate said OK, "data" is read
# Linux 6.18: "" is read at both.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root (mount)"; exit 77; }
work=$(mktemp -d)
trap 'umount "$work/fs" 2>/dev/null || true; rm -r "$work"' EXIT
truncate -s 512M "$work/image"
mkfs.ext4 -q -b 1024 "$work/image" || exit 77
mkdir "$work/fs"
mount -o loop "$work/image" "$work/fs" || exit 77
file=$work/fs/file
for gib in 15 17; do
    printf 'data' | dd of="$file" bs=1M seek=$((gib * 1024)) conv=notrunc status=none
    truncate -s 20G "$file"
    fallocate --punch-hole --offset $((gib << 30)) --length 1048576 "$file"
    left=$(dd if="$file" bs=4 count=1 iflag=skip_bytes skip=$((gib << 30)) status=none | tr -d '\0')
    echo "$(uname -r): a hole at $gib GiB: fallocate said OK, \"$left\" is read"
done
[ "$left" = data ]
