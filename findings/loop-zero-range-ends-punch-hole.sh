#!/usr/bin/env bash
# On a loop device over tmpfs, one FALLOC_FL_ZERO_RANGE makes every later FALLOC_FL_PUNCH_HOLE fail
# with EOPNOTSUPP, until the device is detached: tmpfs has no ZERO_RANGE, so the kernel writes zeros
# instead, and from then on takes the device for one that cannot zero, which PUNCH_HOLE needs.
#
# Seen: Linux 6.18, util-linux 2.38:
#   PUNCH_HOLE on a new device: OK
#   ZERO_RANGE: OK (zeros are read)
#   PUNCH_HOLE: EOPNOTSUPP ("keep size mode is unsupported"); blkdiscard still works
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root (loop device)"; exit 77; }
[ "$(stat -f -c %T /dev/shm)" = tmpfs ] || { echo "/dev/shm is no tmpfs"; exit 77; }
work=$(mktemp -d -p /dev/shm)
device=
trap '[ -z "$device" ] || losetup -d "$device"; rm -r "$work"' EXIT
truncate -s 8M "$work/disk"
device=$(losetup --find --show "$work/disk") || exit 77

try() { fallocate "$@" "$device" 2>&1 && echo OK || true; }
first=$(try --punch-hole --offset 0 --length 4096)
zero=$(try --zero-range --keep-size --offset 4096 --length 4096)
second=$(try --punch-hole --offset 8192 --length 4096)
discard=$(blkdiscard --offset 8192 --length 4096 "$device" 2>&1 && echo OK || true)
printf 'PUNCH_HOLE: %s\nZERO_RANGE: %s\nPUNCH_HOLE: %s\nblkdiscard: %s\n' "$first" "$zero" "$second" "$discard"
[[ $first = OK && $zero = OK && $second = *unsupported* && $discard = OK ]]
