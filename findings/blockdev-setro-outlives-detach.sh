#!/usr/bin/env bash
# A loop device that `blockdev --setro` has made read-only stays so when it is detached, and when
# another file is attached to it without --read-only.
#
# Seen: Linux 6.18, util-linux 2.38:
#   BLKROGET 1 after attaching another file for writing
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root (loop device)"; exit 77; }
work=$(mktemp -d)
device=
trap '[ -z "$device" ] || { blockdev --setrw "$device"; losetup -d "$device" 2>/dev/null || true; }; rm -r "$work"' EXIT
truncate -s 1M "$work/one" "$work/other"
device=$(losetup --find --show "$work/one") || exit 77
blockdev --setro "$device"
losetup -d "$device"
for _ in $(seq 100); do losetup "$device" >/dev/null 2>&1 || break; sleep 0.05; done
losetup "$device" "$work/other" || exit 77
read_only=$(blockdev --getro "$device")
echo "BLKROGET $read_only after attaching another file for writing"
[ "$read_only" = 1 ]
