"""Who writes where another does waits; who writes elsewhere does not."""

from __future__ import annotations

import threading

from xen_disk_py.trace.claims import GRAIN, Claims

PLACE = 1 << GRAIN


def test_what_is_claimed_is_so_until_it_is_given_back():
    claims = Claims()
    with claims.held(PLACE + 512, PLACE):
        assert not claims.are_free(PLACE, 1)
        assert not claims.are_free(3 * PLACE - 1, 1)
        assert claims.are_free(0, PLACE)
        assert claims.are_free(3 * PLACE, PLACE)
        with claims.held(0, PLACE):
            assert not claims.are_free(0, 1)
    assert claims.are_free(0, 4 * PLACE)


def test_who_overlaps_comes_after():
    claims, order, has_begun = Claims(), [], threading.Event()

    def write():
        has_begun.set()
        with claims.held(0, 3 * PLACE):
            order.append("second")

    thread = threading.Thread(target=write)
    with claims.held(2 * PLACE, 1):
        thread.start()
        assert has_begun.wait(30)
        order.append("first")
    thread.join(30)
    assert ["first", "second"] == order
    assert {} == claims.owners
    assert 0 == claims.waiting


def test_many_who_write_at_the_same_places_come_one_after_another():
    claims, content = Claims(), [0] * 6

    def write(number):
        for turn in range(100):
            first, last = sorted(((number + turn) % 6, turn * 5 % 6))
            with claims.held(first * PLACE, (last - first + 1) * PLACE):
                mine = object()
                content[first : last + 1] = [mine] * (last - first + 1)
                assert {mine} == set(content[first : last + 1])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert {} == claims.owners
