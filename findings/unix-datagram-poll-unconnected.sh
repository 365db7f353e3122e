#!/usr/bin/env bash
# poll() calls a Unix datagram socket that is not connected writable while the queue of the listener
# that it is to send to is full: sendto() then fails with EAGAIN at once, and who waits with poll()
# spins. That is what a program has who speaks to $NOTIFY_SOCKET by sendto(). Connected to the same
# listener, poll() waits.
#
# Seen: Linux 6.18:
#   not connected: EAGAIN, poll says writable
#   connected: EAGAIN, poll does not
set -euo pipefail
python3 - <<'PYTHON'
import os, select, socket, tempfile

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "listener")
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(path)
        seen = []
        for connects in (False, True):
            with socket.socket(socket.AF_UNIX, kind) as sender:
                if connects:
                    sender.connect(path)
                try:
                    while True:
                        sender.send(b"x") if connects else sender.sendto(b"x", path)
                except BlockingIOError:
                    pass
                poller = select.poll()
                poller.register(sender, select.POLLOUT)
                seen.append(bool(poller.poll(200)))
print("not connected: EAGAIN, poll", "says writable" if seen[0] else "does not")
print("connected: EAGAIN, poll", "says writable" if seen[1] else "does not")
raise SystemExit(seen != [True, False])
PYTHON
