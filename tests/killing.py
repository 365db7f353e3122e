"""A piece of work that is killed before each of its effects on files."""

from __future__ import annotations

import fcntl
import os
import signal

from xen_disk_py.backends import holes

# What changes files, of all that the backends call; of os.open, what may make or empty one.
EFFECTS = {
    os: (
        *("copy_file_range", "fchmod", "fchown", "ftruncate", "link", "posix_fallocate", "pwrite"),
        *("pwritev", "rename", "setxattr", "unlink", "write"),
    ),
    fcntl: ("ioctl",),
    holes: ("_fallocate",),
}
# What leaves no trace once the process is killed. A sync is one of them: what was synced only a
# power cut tells (test_powercut.py).
TRACELESS = {
    *("access", "close", "dup", "fdatasync", "fsync", "fsdecode", "fsencode", "fspath", "fstat"),
    *("getegid", "geteuid", "getpid", "getxattr", "listdir", "listxattr", "lseek", "lstat"),
    *("major", "memfd_create", "minor", "posix_fadvise", "pread", "preadv", "read", "readlink"),
    *("stat", "strerror", "urandom"),
    *("fcntl", "flock"),
}


def at_every_effect(act, *, effects):
    """Run ``act`` in children, each killed before another of its effects; yield each time.

    Between two of them nothing changes that outlives the process: these are all its instants.
    Not seen are stores to a shared mapping and what a file object writes: what is killed here has
    neither.

    Args:
        act: given a function that it calls where counting is to begin.
        effects: there must be at least so many.

    The last one is not killed.
    """
    for target in range(1, 10_000):
        child = os.fork()
        if not child:
            try:
                act(lambda target=target: _kill_before(target))
            except BaseException:  # pytest must not continue in the child
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0
        yield
        if not killed:
            break
    assert target > effects


def _kill_before(target):
    """Kill this process before its ``target``-th effect."""
    seen = 0

    def count():
        nonlocal seen
        seen += 1
        if seen == target:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real):
        def call(*arguments, **options):
            count()
            return real(*arguments, **options)

        return call

    real_open = os.open

    def open_(path, flags, *arguments, **options):
        if flags & (os.O_CREAT | os.O_TRUNC):
            count()
        return real_open(path, flags, *arguments, **options)

    for module, names in EFFECTS.items():
        for name in names:
            if hasattr(module, name):  # not with every C library
                setattr(module, name, counted(getattr(module, name)))
    os.open = open_
