#!/usr/bin/env bash
# qemu-img create -f vpc makes a larger disk than was asked for: it rounds the size up to what a
# geometry of cylinders, heads and sectors can express, unless force_size=on is given.
#
# Seen: QEMU 7.2 (Debian 12) and 11.1, virtual size of the new image:
#   1G:                   1073995776 (254 KiB more)
#   1G with force_size=on: 1073741824
set -euo pipefail
command -v qemu-img >/dev/null || { echo "needs qemu-img (Debian: qemu-utils)"; exit 77; }
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

size() {
    qemu-img info --output=json -f vpc "$1" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["virtual-size"])'
}
qemu-img create -q -f vpc "$work/plain.vhd" 1G
qemu-img create -q -f vpc -o force_size=on "$work/forced.vhd" 1G
plain=$(size "$work/plain.vhd") forced=$(size "$work/forced.vhd")
echo "asked for 1073741824 bytes: got $plain, with force_size=on $forced"
[ "$plain $forced" = "1073995776 1073741824" ]
