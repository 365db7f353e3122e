#!/usr/bin/env bash
# fio 3.33 (Debian 12), --read_iolog with several requests at once and syncs among them: the requests
# that are under way when a sync comes are done and counted as requests, but their bytes are not
# counted, so that KiB and the bandwidth are too low. Each sync is a "short" request.
#
# Seen: 64 writes of 4 KiB, a datasync behind each eighth. --iodepth=1: 64 writes, 262144 bytes.
# --iodepth=32: 64 writes, 135168 bytes; strace shows all 262144 submitted.
#
# Needs fio and python3; exits with 1 if all bytes are counted.
set -euo pipefail
command -v fio > /dev/null || { echo "needs fio (apt install fio)"; exit 77; }
place=$(mktemp -d)
trap 'rm -r "$place"' EXIT
cd "$place"
truncate -s 1M disk
{
    echo 'fio version 3 iolog'
    echo "0 $place/disk add"
    echo "0 $place/disk open"
    number=0
    while [ $number -lt 64 ]; do
        echo "0 $place/disk write $((number * 4096)) 4096"
        number=$((number + 1))
        [ $((number % 8)) -ne 0 ] || echo "0 $place/disk datasync 0 0"
    done
    echo "0 $place/disk close"
} >log
fio --version
counted() {
    fio --name=x --read_iolog=log --ioengine=libaio --iodepth="$1" --replay_no_stall=1 \
        --output-format=json --output=out
    python3 -c 'import json
write = json.load(open("out"))["jobs"][0]["write"]
print(write["total_ios"], write["io_bytes"])'
}
one=$(counted 1)
many=$(counted 32)
echo "writes and bytes at depth 1: $one; at depth 32: $many"
[ "$one" = "64 262144" ]
[ "${many% *}" = 64 ]
[ "${many#* }" -lt 262144 ]
