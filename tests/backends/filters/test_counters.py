"""What filters count of requests that several threads do at once."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from backends.blocks import buffers
from backends.filters.test_filters import Memory
from xen_disk_py.backends.loader import wrap

THREADS, EACH = 4, 5


class Interrupted(int):
    """A number to which another thread adds, too, before the sum is stored."""

    def __add__(self, other):
        total = int(self) + int(other)
        time.sleep(0.001)
        return Interrupted(total)


class FailsFirst(Memory):
    """Each thread's first try of a write fails."""

    def __init__(self):
        super().__init__(threads=THREADS)
        self._tried = threading.local()

    def write(self, buffers, offset):
        self._tried.now = not getattr(self._tried, "now", False)
        if self._tried.now:
            raise OSError(errno.EIO, "not now")


@pytest.mark.parametrize(
    ("text", "counter", "attribute"),
    [
        ("cache:block=4096", "misses", "_misses"),
        ("corrupt:rate=1", "flipped", "_flipped"),
        ("delay:read=1us", "delayed", "_waits"),
        ("error:rate=0", "matched", "_count"),
        ("log:file={}", "lines", "_lines"),
        ("protect:mode=watch", "touched", "_touched"),
        ("rate:requests=1000,burst=1us", "delayed", "_waits"),
        ("retry:pause=0", "retries", "_retries"),
        ("retry:pause=0", "saved", "_helped"),
    ],
)
def test_each_request_is_counted(tmp_path, text, counter, attribute):
    source = FailsFirst() if text.startswith("retry") else Memory(threads=THREADS)
    disk = wrap(source, [text.format(tmp_path / "log")])
    setattr(disk, attribute, Interrupted(0))
    start = threading.Barrier(THREADS)

    def work(number):
        start.wait()
        for request in range(EACH):
            at = 32768 * (number + THREADS * request)
            if counter in ("touched", "retries", "saved"):
                disk.write(buffers(bytes(512)), 0)
            else:
                disk.read(buffers(bytes(512)), at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert THREADS * EACH == disk.counters()[counter]
