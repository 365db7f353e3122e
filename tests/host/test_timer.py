"""A timer that polls readable."""

from __future__ import annotations

import select

from xen_disk_py.host.timer import Timer

PATIENCE = 30.0


def is_readable(timer, seconds=0.0):
    return [] != select.select([timer], [], [], seconds)[0]


def test_it_polls_readable_when_its_time_is_over_until_that_is_acknowledged():
    with Timer() as timer:
        assert not is_readable(timer)
        assert not timer.acknowledge()
        timer.start(0.001)
        assert is_readable(timer, PATIENCE)
        assert is_readable(timer)
        assert timer.acknowledge()
        assert not is_readable(timer)
        assert not timer.acknowledge()


def test_whole_seconds_and_none_at_all_are_times_too():
    with Timer() as timer:
        timer.start(0)
        assert is_readable(timer, PATIENCE)
        timer.start(3600)
        assert not is_readable(timer)
        timer.start(0.0)
        assert is_readable(timer, PATIENCE)


def test_it_is_closed_once():
    timer = Timer()
    timer.close()
    timer.close()
