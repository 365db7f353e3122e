"""Many requests at once, of whoever submits them, and from whichever thread."""

from __future__ import annotations

import errno
import select
import threading

import pytest

from xen_disk_py.backends import StorageError
from xen_disk_py.backends.asynchronous import FLUSH, READ, Asynchronous
from xen_disk_py.synchronizing import HAS_GIL

PATIENCE = 30.0


class Library(Asynchronous):
    """Ends what it has begun when a test says so."""

    def __init__(self):
        super().__init__()
        self.begun = []
        self.over = []
        self.has_begun = threading.Event()

    def _begin(self, request):
        self.begun.append(request)
        self.has_begun.set()

    def _progress(self):
        self._told()
        over, self.over = self.over, []
        for request, error in over:
            self._end(request, error)

    def end(self, number, error=None):
        with self._lock:
            self.over.append((self.begun[number], error))
            self._tell()


@pytest.fixture
def library():
    with Library() as made:
        yield made


class Caller(threading.Thread):
    """Flushes, as a call of the backend's contract does."""

    def __init__(self, library):
        super().__init__(daemon=True)
        self.library = library
        self.error = None
        self.start()
        assert library.has_begun.wait(PATIENCE)

    def run(self):
        try:
            self.library.call(FLUSH)
        except OSError as error:
            self.error = error

    def has_ended(self):
        self.join(PATIENCE)
        return not self.is_alive()


@pytest.mark.parametrize("error", [None, StorageError(errno.EIO, "it failed")])
def test_the_result_of_a_call_is_its_own_whoever_collects(library, error):
    caller = Caller(library)
    with library._lock:  # the caller cannot look in between
        library.end(0, error)
        assert [] == library.collect()
    assert caller.has_ended()
    assert error is caller.error
    assert 0 == library.unfinished


def test_whoever_collects_is_told_while_another_thread_waits_for_a_call(library):
    caller = Caller(library)
    library.submit(READ, [memoryview(bytearray(512))], 0, 512, "read")
    # As if the caller's thread had taken the event, and ended the request with it.
    with library._lock:
        library.end(1)
        library._progress()
    assert select.select([library], [], [], PATIENCE)[0]
    assert [("read", None)] == library.collect()
    library.end(0)
    assert caller.has_ended()
    assert 0 == library.unfinished


def test_a_call_that_is_over_at_once_needs_no_event(library):
    library._begin = lambda request: library._end(request, None)
    library.call(FLUSH)
    assert 0 == library.unfinished


@pytest.mark.skipif(HAS_GIL, reason="any thread may take parts of any view")
def test_whoever_reads_for_another_takes_no_parts_of_its_views(library):
    view = memoryview(bytearray(1024))
    library.submit(READ, [view[:512]], 0, 512, "read")
    (begun,) = library.begun
    assert view.obj is not begun.memory.obj
    begun.memory[:4] = b"data"
    assert b"data" == view[:4]
