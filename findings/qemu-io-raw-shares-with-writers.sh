#!/usr/bin/env bash
# QEMU's tools that read a raw image let others write to it at the same time; a guest of QEMU that
# reads the same image does not. (Locks are on bytes of the image: 100 + n, permission n is used;
# 200 + n, nobody else may use it; permission 1 is to write.)
#
# Seen: QEMU 7.2.22:
#   qemu-io -r:          byte 201 is free
#   guest, readonly=on:  byte 201 is locked
set -euo pipefail
for program in qemu-io qemu-system-x86_64 python3; do
    command -v "$program" >/dev/null || { echo "needs $program"; exit 77; }
done
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
truncate -s 1M "$work/disk"
python3 - "$work/disk" <<'PYTHON'
import fcntl, os, struct, subprocess, sys

path = sys.argv[1]
LOCK = struct.Struct("hhqqi4x")  # struct flock


def denies_writers():
    fd = os.open(path, os.O_RDONLY)
    request = LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 201, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    os.close(fd)
    return LOCK.unpack(answer)[0] != fcntl.F_UNLCK


def while_open(command, question, word):
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(f"{question}\n")
    process.stdin.flush()
    for line in process.stdout:
        if word in line:
            break
    found = denies_writers()
    process.stdin.write("quit\n")
    process.communicate()
    return found


tool = while_open(["qemu-io", "-f", "raw", "-r", path], "length", "MiB")
drive = f"file={path},format=raw,if=none,id=d,readonly=on"
guest = while_open(
    ["qemu-system-x86_64", "-M", "pc,accel=tcg", "-m", "16", "-nodefaults", "-S", "-display", "none"]
    + ["-drive", drive, "-device", "virtio-blk-pci,drive=d", "-monitor", "stdio"],
    "info status",
    "VM status",
)
print(f"byte 201 locked: by qemu-io -r {tool}, by a guest that reads {guest}")
sys.exit((tool, guest) != (False, True))
PYTHON
