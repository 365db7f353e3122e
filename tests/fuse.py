"""A file system in this process (FUSE) whose one file does not open: its storage does not answer.

What the kernel asks is read from ``/dev/fuse``, as of linux/fuse.h: nothing is needed but root. Who
opens the file waits in the kernel as on a hard NFS mount, where no handler of a signal is run. What
ends the process ends that, as long as the file system has not read what it is asked for
(``request_wait_answer`` in fs/fuse/dev.c); after that, nothing does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading

LOOKUP, FORGET, GETATTR, OPEN, READ, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 14, 15, 26, 36, 42
SIZE = 1 << 20
LONG = 1000  # seconds that the kernel may believe an answer
ROOT, FILE = 1, 2
MNT_DETACH = 2


class HangingFile:
    """Mounted on a directory until it is closed; ``path`` is there, and hangs when it is opened.

    Args:
        directory: to be made.
        reads: read what is asked for, and do not answer; else nothing is read.
    """

    def __init__(self, directory, *, reads=False):
        directory.mkdir()
        self.path, self._directory = directory / "disk.raw", str(directory)
        self.opened, self._may_open = threading.Event(), threading.Event()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if self._libc.mount(b"hanging", os.fsencode(directory), b"fuse", 0, options):
            number = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(number, os.strerror(number))
        self._reads, self._is_known = reads, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        os.stat(self.path)  # the kernel knows it from now on: what it asks for next is to open it
        self._is_known = True

    def answer(self):
        """Have the storage answer."""
        self._may_open.set()

    def close(self):
        """Unmount it."""
        self.answer()
        self._libc.umount2(os.fsencode(self._directory), MNT_DETACH)
        self._thread.join(30)
        os.close(self._fd)

    def _run(self):
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        while True:
            poller.poll()
            if self._is_known and not self._reads:
                self.opened.set()
                self._may_open.wait()
            try:
                asked = os.read(self._fd, SIZE)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):  # it was given up
                    continue
                return
            _, operation, unique, node = struct.unpack_from("=IIQQ", asked)
            body = asked[40:]
            if operation == INIT:
                reply = struct.pack("=IIIIHHII36x", 7, 23, 0, 0, 12, 9, 1 << 17, 1)
            elif operation == LOOKUP:
                if body.rstrip(b"\0") != b"disk.raw":
                    self._reply(unique, error=errno.ENOENT)
                    continue
                reply = struct.pack("=QQQQII", FILE, 0, LONG, LONG, 0, 0) + self._attributes(FILE)
            elif operation == GETATTR:
                reply = struct.pack("=QII", LONG, 0, 0) + self._attributes(node)
            elif operation == OPEN:
                self.opened.set()
                self._may_open.wait()
                reply = struct.pack("=QII", 0, 0, 0)
            elif operation == READ:
                reply = bytes(struct.unpack_from("=QQI", body)[2])
            elif operation in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            else:
                self._reply(unique, error=errno.ENOSYS)
                continue
            self._reply(unique, reply)

    def _reply(self, unique, body=b"", error=0):
        try:
            os.write(self._fd, struct.pack("=IiQ", 16 + len(body), -error, unique) + body)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):  # it was given up
                raise

    def _attributes(self, node):
        mode, size = (0o40755, 0) if node == ROOT else (0o100600, SIZE)
        numbers = node, size, size >> 9, 0, 0, 0
        return struct.pack("=6Q3I7I", *numbers, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
