#!/usr/bin/env bash
# A qemu-nbd that has as many clients as --shared allows says nothing to the next one: the connection
# is made, by the kernel, and no greeting comes until another client leaves. To the client that is a
# server that hangs. With --shared=2 and more it announces NBD_FLAG_CAN_MULTI_CONN all the same, so
# that one client that takes up that offer can be all the clients that there may be.
#
# Seen: qemu-nbd 7.2.22, --shared=2, the flags of its export being "multi-conn":
#   client 1: greeting
#   client 2: greeting
#   client 3: connected, silent
#   client 3 when client 1 has left: greeting
set -euo pipefail
for tool in qemu-nbd python3; do
    command -v "$tool" >/dev/null || { echo "needs $tool (Debian: qemu-utils)"; exit 77; }
done
work=$(mktemp -d)
trap '[ -z "${server-}" ] || kill "$server"; rm -rf "$work"' EXIT
truncate -s 1M "$work/image"
qemu-nbd --version | head -1
qemu-nbd -f raw --shared=2 --persistent -k "$work/socket" "$work/image" &
server=$!
python3 - "$work/socket" <<'PYTHON'
import os, socket, struct, sys, time

deadline = time.monotonic() + 30
while not os.path.exists(sys.argv[1]):
    assert time.monotonic() < deadline, "qemu-nbd does not start"
    time.sleep(0.05)


def connect():
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(sys.argv[1])
    return client


def receive(client, length):
    data = b""
    while len(data) < length:
        part = client.recv(length - len(data))
        assert part, "the server hangs up"
        data += part
    return data


clients, heard = [connect(), connect()], []
for client in clients:
    heard.append(receive(client, 18).startswith(b"NBDMAGICIHAVEOPT"))
# Fixed newstyle without zeroes, then NBD_OPT_EXPORT_NAME of the export with the empty name.
clients[1].sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 0))
_, flags = struct.unpack(">QH", receive(clients[1], 10))
third = connect()
third.settimeout(5)
try:
    heard.append(bool(third.recv(1)))
except socket.timeout:
    heard.append(False)
third.settimeout(30)
clients[0].close()
heard.append(bool(third.recv(1)))
print("the export's flags:", "multi-conn" if flags & 1 << 8 else "not multi-conn")
for who, is_greeted in zip(("1", "2", "3", "3 when client 1 has left"), heard):
    print(f"client {who}: {'greeting' if is_greeted else 'connected, silent'}")
sys.exit(not (flags & 1 << 8 and heard == [True, True, False, True]))
PYTHON
