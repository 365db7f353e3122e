#!/usr/bin/env bash
# ext4's superblock is 1024 bytes, with its checksum at the end: on a disk of 512-byte sectors a power
# cut may leave the first sector of the new one and the second of the old one. Linux does not mount that
# ("Found ext4 filesystem with invalid superblock checksum"), though nothing else is wrong. e2fsck -fy
# repairs it by a copy of the superblock; a file system of one group has none, and stays as it is.
# With sectors of 4096 bytes, and blocks of that size, the superblock is in one sector.
#
# Seen: e2fsprogs 1.47.0 (and Linux 6.18 for the mount, which is not tried here):
#   16 MiB: e2fsck -fy: status 1; 4 MiB: e2fsck -fy: status 8
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
for program in mkfs.ext4 tune2fs e2fsck; do
    command -v $program >/dev/null || { echo "needs $program (e2fsprogs)"; exit 77; }
done
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
check() { # the size; the status of e2fsck
    rm -f "$work"/*
    truncate -s "$1" "$work/old"
    mkfs.ext4 -q -b 1024 -O metadata_csum "$work/old"
    cp "$work/old" "$work/new"
    tune2fs -L name "$work/new" >/dev/null
    cp "$work/old" "$work/torn"
    dd if="$work/new" of="$work/torn" bs=512 skip=2 seek=2 count=1 conv=notrunc status=none
    for image in old new; do e2fsck -fn "$work/$image" >/dev/null 2>&1; done
    local status=0 said
    said=$(e2fsck -fy "$work/torn" 2>&1) || status=$?
    echo "$1: e2fsck -fy: status $status"
    grep -m 1 "Superblock checksum does not match superblock" <<<"$said"
    [ "$status" = "$2" ]
}
check 16M 1
check 4M 8
