"""Mapped pages: unmapped once, and not while somebody has a view of them."""

import ctypes
import gc
import threading

import pytest

from xen_disk_py.errors import BackendError, HypervisorError
from xen_disk_py.host.mapping import MappedPages, close_all
from xen_disk_py.hypervisor import PAGE_SIZE


@pytest.fixture
def make():
    """Make pages of memory that outlives them."""
    memory = ctypes.create_string_buffer(PAGE_SIZE)

    def make(unmap):
        return MappedPages(ctypes.addressof(memory), 1, writable=True, unmap=unmap)

    return make


def test_two_threads_that_close_them_unmap_them_once(make):
    """The second one comes while the first one is in the system call."""
    calls = []

    def unmap(pages):
        calls.append(pages)
        if len(calls) == 1:
            other = threading.Thread(target=pages.close)
            other.start()
            other.join()

    pages = make(unmap)
    pages.close()
    pages.close()
    assert [pages] == calls


def test_what_could_not_be_unmapped_can_be_again(make):
    failures = [HypervisorError(16, "busy")]

    def unmap(pages):
        if failures:
            raise failures.pop()

    pages = make(unmap)
    with pytest.raises(HypervisorError):
        pages.close()
    pages.close()
    assert [] == failures


def test_a_view_that_is_kept_keeps_them_mapped(make):
    calls = []
    pages = make(calls.append)
    view = pages.view[:10]
    with pytest.raises(BackendError, match="a buffer was kept"):
        close_all([pages])
    assert [] == calls
    view.release()
    pages.close()
    assert [pages] == calls


def test_a_collection_under_way_keeps_no_pages_mapped(make):
    """Without a GIL: who made them is asleep, and only a collection sums the references up."""
    collecting, is_over, closed = threading.Event(), threading.Event(), threading.Event()
    calls, made = [], []

    def pause(phase, _):
        if phase == "stop" and threading.current_thread() is collector:
            collecting.set()
            is_over.wait(30)

    def maker():
        made.append(make(calls.append))
        is_made.set()
        closed.wait(30)

    is_made = threading.Event()
    owner = threading.Thread(target=maker)
    collector = threading.Thread(target=gc.collect)
    gc.callbacks.append(pause)
    try:
        owner.start()
        assert is_made.wait(30)
        collector.start()
        assert collecting.wait(30)
        threading.Timer(0.1, is_over.set).start()
        made[0].close()
        assert made == calls
    finally:
        is_over.set()
        closed.set()
        gc.callbacks.remove(pause)
        owner.join()
        collector.join()
