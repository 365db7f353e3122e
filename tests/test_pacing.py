"""How long a queue looks on before it sleeps, on a clock of the test's own."""

from __future__ import annotations

import pytest

from xen_disk_py.pacing import Pace

US = 1e-6


@pytest.mark.parametrize(
    ("work", "window"), [(5 * US, 40 * US), (200 * US, 200 * US), (0.001, 0.0006), (1.0, 0.002)]
)
def test_it_looks_on_longer_after_more_work_but_in_no_proportion_to_much(work, window):
    pace = Pace()
    pace.worked(work)
    assert pytest.approx(window, abs=1e-9) == pace.window
    pace.slept(0.99 * window)
    assert pace.is_quick
    pace.slept(1.01 * window)
    assert not pace.is_quick


def test_where_others_want_the_processor_it_does_not_look_on():
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
