#!/usr/bin/env bash
# A process that has used librados and forks: to the cluster, the first client of the child is the
# same as the next one of the parent. A client listens on no port, so its address is told from others
# by the nonce in it, and that is the same. So who breaks the lock of the child's image, which puts
# its address on the blocklist, shuts out the parent, too.
#
# Seen: Ceph 16.2.15 (Debian 12), a monitor on the loopback device:
#   one client after the other: other addresses
#   a child's and its parent's: the same address
set -euo pipefail
for tool in ceph-mon ceph-authtool monmaptool python3; do
    command -v "$tool" >/dev/null || { echo "needs $tool (Debian: ceph-mon ceph-common)"; exit 77; }
done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 77; }
directory=$(mktemp -d)
mon=
trap '[ -z "$mon" ] || { kill "$mon" 2>/dev/null || true; wait "$mon" 2>/dev/null || true; }; rm -rf "$directory"' EXIT
mkdir "$directory/mon"
cat >"$directory/ceph.conf" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = v2:127.0.0.1:3390
mon initial members = a
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
mon data = $directory/mon
run dir = $directory
admin socket =
pid file =
log file = $directory/log
keyring = $directory/keyring
CONF
cd "$directory"
fsid=$(sed -n 's/^fsid = //p' ceph.conf)
ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' >/dev/null
monmaptool --create --addv a '[v2:127.0.0.1:3390]' --fsid "$fsid" monmap >/dev/null
ceph-mon -c ceph.conf -i a --mkfs --monmap monmap --keyring keyring
ceph-mon -c ceph.conf -i a -f 2>mon.err &
mon=$!
python3 - "$directory/ceph.conf" <<'PYTHON'
import ctypes, os, sys

try:
    rados = ctypes.CDLL("librados.so.2")
except OSError:
    print("needs librados2")
    sys.exit(77)
rados.rados_getaddrs.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p))


def address():
    """Connect, and return the address that the cluster knows this client by."""
    cluster, text = ctypes.c_void_p(), ctypes.c_char_p()
    rados.rados_create(ctypes.byref(cluster), b"admin")
    rados.rados_conf_read_file(cluster, sys.argv[1].encode())
    rados.rados_conf_set(cluster, b"client_mount_timeout", b"60")
    if rados.rados_connect(cluster) < 0 or rados.rados_getaddrs(cluster, ctypes.byref(text)) < 0:
        print("no cluster")
        os._exit(77)
    found = text.value.decode()
    rados.rados_shutdown(cluster)
    return found


first, second = address(), address()
reader, writer = os.pipe()
child = os.fork()
if not child:
    os.write(writer, address().encode())
    os._exit(0)
os.waitpid(child, 0)
childs, parents = os.read(reader, 200).decode(), address()
for who, a, b in (("one client after the other", first, second),
                  ("a child's and its parent's", childs, parents)):
    print(f"{who}: {'the same address' if a == b else 'other addresses'}")
sys.exit((first == second, childs == parents) != (False, True))
PYTHON
