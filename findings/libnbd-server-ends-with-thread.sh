#!/usr/bin/env bash
# A server that libnbd starts with nbd_connect_systemd_socket_activation ends when the thread ends
# that called it, not when the process does: libnbd has the kernel send it SIGTERM when its parent
# dies (PR_SET_PDEATHSIG), and to the kernel the parent is a thread. So who connects from a
# short-lived thread has a server that is gone in a moment.
#
# Seen: libnbd 1.14.2, nbdkit 1.32.5:
#   the thread lives: the server answers
#   the thread has ended: the server does not answer
set -euo pipefail
for tool in nbdkit python3; do
    command -v "$tool" >/dev/null || { echo "needs $tool"; exit 77; }
done
python3 - <<'PYTHON'
import ctypes, sys, threading, time

try:
    nbd = ctypes.CDLL("libnbd.so.0")
except OSError:
    print("needs libnbd (Debian: libnbd0)")
    sys.exit(77)
handle = ctypes.c_void_p
nbd.nbd_create.restype = handle
nbd.nbd_connect_systemd_socket_activation.argtypes = (handle, ctypes.POINTER(ctypes.c_char_p))
nbd.nbd_pread.argtypes = (handle, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32)
nbd.nbd_close.argtypes = (handle,)
command = (ctypes.c_char_p * 5)(b"nbdkit", b"-f", b"memory", b"1M", None)
page = ctypes.create_string_buffer(512)
connected, may_end, result = threading.Event(), threading.Event(), []
connection = nbd.nbd_create()


def connect():
    result.append(nbd.nbd_connect_systemd_socket_activation(connection, command))
    connected.set()
    may_end.wait()


thread = threading.Thread(target=connect)
thread.start()
connected.wait()
answers = result == [0] and nbd.nbd_pread(connection, page, 512, 0, 0) == 0
may_end.set()
thread.join()
answers_then = True
for _ in range(100):  # the thread has ended for Python somewhat earlier than for the kernel
    answers_then = nbd.nbd_pread(connection, page, 512, 0, 0) == 0
    if not answers_then:
        break
    time.sleep(0.05)
nbd.nbd_close(connection)
for when, is_so in (("the thread lives", answers), ("the thread has ended", answers_then)):
    print(f"{when}: the server {'answers' if is_so else 'does not answer'}")
sys.exit((answers, answers_then) != (True, False))
PYTHON
