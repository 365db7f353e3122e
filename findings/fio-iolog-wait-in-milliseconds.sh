#!/usr/bin/env bash
# fio's iolog, version 2: its manual says that `wait` takes microseconds. fio 3.33 waits about as many
# milliseconds. The time stamps of version 3 are in microseconds, of which the manual says no unit.
#
# Seen: fio 3.33 (Debian 12), three reads with two waits of 1000 between them:
#   version 2, "wait 1000":            job_runtime about 900 ms (the manual's: 2 ms)
#   version 3, stamps 0, 1000, 2000:   job_runtime below 100 ms
set -euo pipefail
command -v fio > /dev/null || { echo "needs fio (apt install fio)"; exit 77; }
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cd "$work"
fio --version
truncate -s 1M file
f=$work/file
printf '%s\n' "fio version 2 iolog" "$f add" "$f open" "$f read 0 4096" "$f wait 1000 0" \
    "$f read 8192 4096" "$f wait 1000 0" "$f read 65536 4096" "$f close" > v2
printf '%s\n' "fio version 3 iolog" "0 $f add" "0 $f open" "0 $f read 0 4096" \
    "1000 $f read 8192 4096" "2000 $f read 65536 4096" "2000 $f close" > v3
runtime() {
    timeout 60 fio --name=r --read_iolog="$1" --ioengine=psync --output-format=json 2> /dev/null |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["jobs"][0]["job_runtime"])'
}
second=$(runtime v2) third=$(runtime v3)
echo "version 2: $second ms; version 3: $third ms"
[ "$second" -gt 500 ] && [ "$third" -lt 400 ]
