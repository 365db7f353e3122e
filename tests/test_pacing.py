"""The pace of a queue, on a clock of the test's own: a guest and a backend as models."""

from __future__ import annotations

import pytest

from xen_disk_py import pacing
from xen_disk_py.pacing import Pace

US = 1e-6


class Guest:
    """One that keeps ``depth`` requests in flight and takes ``put`` seconds to put each.

    It is interrupted by each publication, which costs it ``interrupt`` seconds.
    """

    def __init__(self, depth, put=5 * US, interrupt=20 * US):
        self.depth = depth
        self.put = put
        self.interrupt = interrupt


def run(guest, requests=2000, work=3 * US, pace=None):
    """Have requests done by a backend that never sleeps; (publications, seconds, longest wait)."""
    pace = pace if pace is not None else Pace()
    now, outstanding, waiting, on_ring = 0.0, 0, [], 0
    done = publications = 0
    longest = 0.0
    next_put = 0.0
    while done < requests:
        while outstanding < guest.depth and next_put <= now:
            on_ring += 1
            outstanding += 1
            next_put = max(next_put, now - guest.put) + guest.put
        if on_ring:
            began = now
            now += on_ring * work
            waiting += [now] * on_ring
            done += on_ring
            publish = pace.end(began, now, on_ring, len(waiting))
            on_ring = 0
        elif waiting and now >= pace.publish_at:
            pace.stall(len(waiting))
            publish = True
        else:
            publish = False
            now += US
        if publish:
            publications += 1
            longest = max(longest, now - waiting[0])
            outstanding -= len(waiting)
            next_put = max(next_put, now) + guest.interrupt
            waiting = []
    return publications, now, longest


def test_a_guest_with_one_request_at_a_time_waits_for_nothing():
    pace = Pace()
    publications, seconds, _ = run(Guest(1), requests=1000, pace=pace)
    assert 1000 == publications
    _, least, _ = run(Guest(1), requests=1000, pace=Impatient())
    assert seconds < 1.1 * least
    assert pace.end(1.0, 1.0 + 3 * US, 1, 1)


@pytest.mark.parametrize("depth", [4, 8, 32, 128])
def test_a_guest_with_many_is_interrupted_for_half_of_them_at_a_time(depth):
    publications, seconds, _ = run(Guest(depth))
    assert publications < 2.5 * 2000 / depth + 30  # and some while it was learnt
    at_once, slower, _ = run(Guest(depth), pace=Impatient())
    assert at_once > publications
    assert seconds < slower


class Impatient(Pace):
    """What happens without any of this."""

    def end(self, began, now, requests, waiting):
        super().end(began, now, requests, waiting)
        return True


@pytest.mark.parametrize(("before", "after"), [(32, 1), (32, 2), (1, 32), (4, 5), (128, 3)])
def test_a_guest_that_changes_is_followed(before, after):
    pace = Pace()
    run(Guest(before), pace=pace)
    publications, _, longest = run(Guest(after), requests=3000, pace=pace)
    learning = pacing._GROW_AGAIN + 50
    assert publications <= (3000 if after < 3 else 2.5 * 3000 / after + learning)
    assert longest <= pacing._PATIENCE_MOST + 64 * 3 * US


def test_no_response_waits_for_long_whatever_the_guest_does():
    """A slow guest's requests are far apart: then nobody waits for the next."""
    _, _, longest = run(Guest(32, put=0.01), requests=100)
    assert longest <= pacing._PATIENCE_MOST + US * 10


@pytest.mark.parametrize(
    ("work", "window"),
    [(5 * US, 40 * US), (200 * US, 200 * US), (0.001, 0.0006), (1.0, 0.002)],
)
def test_it_looks_on_longer_after_more_work_but_in_no_proportion_to_much(work, window):
    pace = Pace()
    pace.end(0.0, work, 1, 1)
    pace.wake(0.0)
    pace.end(10.0, 10.0 + work, 1, 1)
    assert pytest.approx(window, abs=1e-9) == (pace.look_until - 10.0 - work)


def test_after_a_long_sleep_it_does_not_look_on():
    pace = Pace()
    pace.end(0.0, 0.001, 1, 1)
    pace.wake(0.5)
    pace.end(1.0, 1.001, 1, 1)
    assert 0 == pace.look_until


def test_where_others_want_the_processor_it_does_not_look_on():
    pace = Pace()
    pace.end(0.0, 0.001, 1, 1)
    pace.wake(0.0)
    pace.crowded()
    pace.end(1.0, 1.001, 1, 1)
    assert 0 == pace.look_until
