#!/usr/bin/env bash
# qemu-nbd ignores a SIGTERM that comes right after `qemu-nbd --fork` has returned, which says that
# it serves: its handler sets a state, and the daemon sets that to "running" once more just before
# its main loop. The signal is lost, not late: the server lives until a second one. So wait for its
# greeting (as any client does) before it is told to end, or look whether it did.
#
# The moment is short, and met on a busy machine; here strace makes it two seconds long, by holding
# up the system call (dup2) after which the command returns: the daemon has its own stderr again.
#
# Seen: qemu-nbd 7.2.22, strace 6.1 (qemu-nbd.c at QEMU's commit 003b2b25 has the same order):
#   SIGTERM when the command has returned: it lives
#   SIGTERM after its greeting: it ends
set -euo pipefail
for tool in qemu-nbd qemu-img strace python3; do
    command -v "$tool" >/dev/null || { echo "needs $tool"; exit 77; }
done
strace -o /dev/null true 2>/dev/null || { echo "needs ptrace"; exit 77; }
work=$(mktemp -d)
trap 'kill -KILL $(cat "$work/pid" 2>/dev/null) $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
qemu-img create -q -f qcow2 "$work/disk" 1M

# The daemon's fifth dup2 is the one.
strace -f -o "$work/trace" -e trace=dup2,exit_group -e inject=dup2:delay_exit=2000000:when=5 \
    qemu-nbd --fork --persistent --pid-file "$work/pid" -f qcow2 --socket "$work/socket" "$work/disk" &
# Of its processes, the one between the command and the daemon ends first, the command second.
until [ "$(grep -cs 'exit_group(0)' "$work/trace")" = 2 ]; do sleep 0.05; done
pid=$(cat "$work/pid")

greeted() {
    python3 -c '
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(60)
    client.connect(sys.argv[1])
    sys.exit(client.recv(8) != b"NBDMAGIC")
' "$work/socket"
}

kill "$pid"
greeted && early=lives || early=ends
echo "SIGTERM when the command has returned: it $early"
kill "$pid" 2>/dev/null || true
late=lives
for _ in $(seq 300); do
    kill -0 "$pid" 2>/dev/null || { late=ends; break; }
    sleep 0.1
done
echo "SIGTERM after its greeting: it $late"
[ "$early $late" = "lives ends" ]
