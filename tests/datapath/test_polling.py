"""How long a queue busy-polls before it sleeps, on a clock of the test's own."""

from __future__ import annotations

import pytest

from xen_disk_py.datapath.polling import Pace

US = 1e-6


@pytest.mark.parametrize(
    ("work", "window"),
    [(5 * US, 82.5 * US), (10 * US, 85 * US), (20 * US, 10 * US), (0.001, 0.0005), (1.0, 0.002)],
)
def test_it_polls_long_after_little_work_and_for_half_of_it_after_much(work, window):
    pace = Pace()
    pace.worked(5 * US)
    pace.worked(work)
    assert pytest.approx(window, abs=1e-9) == pace.window
    pace.slept(0.99 * window)
    assert pace.is_quick
    pace.slept(1.01 * window)
    assert not pace.is_quick


def test_what_is_little_depends_on_the_machine():
    slow = Pace()
    slow.worked(100 * US)
    assert pytest.approx(1650 * US) == slow.window
    slow.worked(5 * US)
    slow.worked(100 * US)
    assert pytest.approx(50 * US) == slow.window


def test_where_others_want_the_processor_it_does_not_poll():
    pace = Pace()
    pace.worked(0.001)
    pace.slept(0.0)
    pace.crowded()
    assert not pace.is_quick


def test_sleeps_are_timed_when_it_matters():
    pace = Pace()
    pace.worked(0.001)
    timed = [pace.is_to_be_timed() for _ in range(80)]
    assert 10 == timed.count(True)
    pace.slept(0.0)
    assert all(pace.is_to_be_timed() for _ in range(80))
