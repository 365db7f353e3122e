#!/usr/bin/env bash
# Punching a hole behind the end of a file, where there is nothing to free, changes the file's time of
# modification. So a program that asks in this way whether a file takes holes has "written" to it.
#
# Seen: Linux 6.18, util-linux 2.38, on ext4 and on tmpfs:
#   before 946684800, after 1795892233; size 8192, before and after
set -euo pipefail
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
file=$work/image
head -c 8192 /dev/zero >"$file"
touch -d '2000-01-01 00:00:00 UTC' "$file"
before=$(stat -c %Y "$file")
fallocate --punch-hole --offset 1048576 --length 4096 "$file" || exit 77
after=$(stat -c %Y "$file")
size=$(stat -c %s "$file")
echo "$(uname -r), $(stat -f -c %T "$work"): before $before, after $after; size $size, before and after"
[ "$size" = 8192 ]
[ "$after" -gt "$before" ]
