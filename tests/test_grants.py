"""The guest's pages: mapped, kept where that was promised, and given back."""

from __future__ import annotations

import pytest

from xen_disk_py.errors import HypervisorError
from xen_disk_py.grants import PERSISTENT_LIMIT, GuestPages


@pytest.fixture
def make(host):
    made = []

    def make(limit=0):
        made.append(GuestPages(host.hypervisor, host.DOMID, limit))
        return made[-1]

    yield make
    for pages in made:
        pages.close()


def test_pages_come_in_order(host, make):
    shared = host.share(5)
    for index in range(5):
        shared.view[4096 * index] = index
    refs = [shared.refs[index] for index in (3, 0, 4, 4, 1)]
    for limit in (0, 100):
        pages = make(limit).pages(refs, writable=False)
        assert [3, 0, 4, 4, 1] == [page[0] for page in pages]
        assert {4096} == {len(page) for page in pages}
        del pages


def test_without_a_promise_pages_are_mapped_for_one_request(host, make):
    shared = host.share(3)
    guest_pages = make()
    for _ in range(3):
        pages = guest_pages.pages(shared.refs, writable=True)
        pages[2][:2] = b"hi"
        assert host.guest.in_use(shared.refs) == 3
        del pages
        guest_pages.give_back()
        assert host.guest.in_use(shared.refs) == 0
        assert guest_pages.kept == 0
    assert b"hi" == shared.view[8192:8194]
    assert host.hypervisor.counters.maps == host.hypervisor.counters.unmaps == 3


def test_write_requests_need_no_more_than_reading(host, make):
    shared = host.share(writable=False)
    guest_pages = make()
    (page,) = guest_pages.pages(shared.refs, writable=False)
    assert page.readonly
    del page
    guest_pages.give_back()
    with pytest.raises(HypervisorError):
        guest_pages.pages(shared.refs, writable=True)


def test_two_mappings_for_one_request(host, make):
    """As an indirect request takes them: its descriptors, then its data."""
    shared = host.share(3)
    guest_pages = make()
    guest_pages.pages(shared.refs[:1], writable=False)
    guest_pages.pages(shared.refs[1:], writable=True)
    guest_pages.give_back()
    assert host.hypervisor.mapped_pages == 0


def test_persistent_pages_are_mapped_once_and_writable(host, make):
    shared = host.share(6)
    guest_pages = make(100)
    for _ in range(4):
        pages = guest_pages.pages(shared.refs[:4], writable=False)
        assert not pages[0].readonly
        guest_pages.give_back()
    assert host.hypervisor.counters.maps == 1
    guest_pages.pages(shared.refs, writable=True)  # only what is new is mapped
    guest_pages.give_back()
    assert host.hypervisor.counters.maps == 2
    assert host.hypervisor.mapped_pages == guest_pages.kept == 6


def test_one_page_named_twice_is_mapped_once(host, make):
    shared = host.share()
    guest_pages = make(1)
    assert len(guest_pages.pages(shared.refs * 11, writable=True)) == 11
    assert host.hypervisor.mapped_pages == guest_pages.kept == 1


def test_the_limit(host, make):
    shared = host.share(6)
    guest_pages = make(4)
    guest_pages.pages(shared.refs[:3], writable=True)
    guest_pages.pages(shared.refs[1:6], writable=True)  # two too many: none is kept
    assert guest_pages.kept == 3
    assert host.hypervisor.mapped_pages == 8
    guest_pages.give_back()
    assert host.hypervisor.mapped_pages == 3
    guest_pages.pages(shared.refs[5:], writable=True)
    assert guest_pages.kept == 4
    guest_pages.pages(shared.refs[4:5], writable=True)
    guest_pages.give_back()
    assert host.hypervisor.mapped_pages == 4
    assert PERSISTENT_LIMIT == 8224


@pytest.mark.parametrize("limit", [0, 100])
def test_a_reference_that_is_none(host, make, limit):
    shared = host.share(3)
    guest_pages = make(limit)
    guest_pages.pages(shared.refs[:1], writable=True)
    guest_pages.give_back()
    mapped = host.hypervisor.mapped_pages
    for refs in ([shared.refs[0], 3], [2**32 - 1], [*shared.refs, 5000]):
        with pytest.raises(HypervisorError):
            guest_pages.pages(refs, writable=True)
        guest_pages.give_back()
        assert mapped == host.hypervisor.mapped_pages
    assert len(guest_pages.pages(shared.refs, writable=True)) == 3


def test_a_page_that_somebody_keeps(host, make, caplog):
    shared = host.share(2)
    guest_pages = make()
    kept = [guest_pages.pages(shared.refs[:1], writable=True) for _ in range(3)]
    guest_pages.give_back()
    assert host.hypervisor.mapped_pages == 3
    assert caplog.text.count("stay mapped") == 1
    kept[0][0][:3] = b"sin"  # does no harm
    guest_pages.pages(shared.refs[1:], writable=True)
    guest_pages.give_back()
    assert host.hypervisor.mapped_pages == 3
    kept.clear()
    guest_pages.close()
    assert host.hypervisor.mapped_pages == 0


def test_a_persistent_page_that_somebody_keeps(host, make, caplog):
    shared = host.share(2)
    guest_pages = make(10)
    (page,) = guest_pages.pages(shared.refs[:1], writable=True)
    guest_pages.pages(shared.refs[1:], writable=True)
    guest_pages.close()
    assert "1 pages stay mapped" in caplog.text
    assert host.hypervisor.mapped_pages == 1
    del page
    host.hypervisor.close()


def test_closing_twice(host, make):
    shared = host.share(2)
    guest_pages = make(1)
    guest_pages.pages(shared.refs[:1], writable=True)
    guest_pages.pages(shared.refs[1:], writable=True)
    guest_pages.close()
    guest_pages.close()
    assert host.hypervisor.mapped_pages == 0
