#!/bin/sh
# Records database.xdt: SQLite with a rollback journal and synchronous=FULL, on ext4, on a loop device
# over a disk of ours that nbdkit serves and nbdfuse mounts. Needs root, nbdkit with its Python
# plugin, nbdfuse, e2fsprogs. Usage: record-database.sh PYTHON-WITH-XEN-DISK NEW.xdt
set -eu
python=$1 trace=$(realpath "$2")
place=$(mktemp -d)
cd "$place"
plugin=$("$python" -m xen_disk_py nbdkit-plugin)
truncate -s 32M disk.raw
touch disk
mkdir mnt
nbdfuse disk --command nbdkit -s --exit-with-parent python "$plugin" \
    path="$place/disk.raw" backend=raw filter=record:file="$trace" &
server=$!
trap 'umount mnt 2>/dev/null; losetup -d $loop 2>/dev/null; umount disk; wait $server; rm -r "$place"' EXIT
until [ -s disk ]; do sleep 0.1; done
loop=$(losetup --find --show --direct-io=on disk)
mkfs.ext4 -q -b 4096 -J size=4 "$loop"
mount "$loop" mnt
"$python" - <<'END'
import random
import sqlite3

dice = random.Random(1)
database = sqlite3.connect("mnt/db", isolation_level=None)
database.execute("pragma journal_mode=delete")
database.execute("pragma synchronous=full")
database.execute("create table t(k integer primary key, v blob)")
database.execute("create index i on t(v)")
for number in range(40):
    database.execute("begin")
    for _ in range(8):
        row = dice.randrange(2000), bytes(dice.choices(range(256), k=dice.randrange(50, 900)))
        database.execute("insert or replace into t values(?, ?)", row)
    database.execute("commit")
database.close()
END
