"""Mapped pages: unmapped once, and not while somebody has a view of them."""

import ctypes
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
