"""Threads that do calls, and give back their results as they come."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import select
import threading
import time

import pytest

from xen_disk_py.datapath import workers as workers_module
from xen_disk_py.datapath.workers import Workers

F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # in Python's fcntl from 3.10 on

PATIENCE = 30.0  # seconds for what must happen to happen
LONG = 2 * PATIENCE  # seconds for what is not to happen before something else


@pytest.fixture
def make():
    """Workers, of which nothing is left at the end."""
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    made = []

    def make(limit=4):
        made.append(Workers(limit))
        return made[-1]

    yield make
    for workers in made:
        drain(workers)
        workers.close()
    deadline = time.monotonic() + PATIENCE
    while set(threading.enumerate()) - threads:  # one that hung is not waited for
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert set(os.listdir("/proc/self/fd")) <= descriptors  # those of others may go meanwhile


def wait_for(workers, seconds=PATIENCE):
    return bool(select.select([workers], [], [], seconds)[0])


def drain(workers):
    """Collect everything that was submitted."""
    results = []
    while workers.unfinished:
        assert wait_for(workers)
        results += workers.collect()
    return results


def test_each_result_comes_once_with_its_token(make):
    dice = random.Random(1)
    workers = make(5)
    submitted, results = 0, []
    for _ in range(300):
        for _ in range(dice.randint(0, 12)):
            number = submitted
            workers.submit(lambda number=number: -number, number)
            submitted += 1
        results += workers.collect()
        assert submitted - len(results) == workers.unfinished
    results += drain(workers)
    assert [(number, -number) for number in range(submitted)] == sorted(results)
    assert [] == workers.collect()


def test_results_come_in_the_order_in_which_calls_end(make):
    workers = make(3)
    gates = [threading.Event() for _ in range(3)]
    for number, gate in enumerate(gates):
        workers.submit(lambda number=number, gate=gate: gate.wait(LONG) and number, number)
    for number in (2, 0, 1):
        assert [] == workers.collect()
        gates[number].set()
        assert wait_for(workers)
        assert [(number, number)] == workers.collect()


def test_no_more_threads_than_allowed_and_none_without_need(make):
    workers = make(3)
    assert [] == workers._threads
    for number in range(5):
        workers.submit(lambda: 0, number)
        drain(workers)
    assert 1 == len(workers._threads)  # one after the other: one can do them all
    gate, running = threading.Event(), threading.Semaphore(0)
    for number in range(10):
        workers.submit(lambda: running.release() or (gate.wait(LONG) and 0), number)
    for _ in range(3):
        assert running.acquire(timeout=PATIENCE)
    assert not running.acquire(timeout=0.01)
    assert 3 == len(workers._threads)
    gate.set()
    assert 10 == len(drain(workers))


def test_a_result_can_be_waited_for_and_is_never_missed(make):
    workers = make(2)
    for number in range(500):
        workers.submit(lambda: 7, number)
        while True:
            assert wait_for(workers)
            found = workers.collect()
            if found:
                break  # else it was told of a result that had been collected already
        assert [(number, 7)] == found
    assert not wait_for(workers, 0.01) or workers.collect() == []


def test_more_results_than_a_pipe_holds(make):
    """Nobody waits for room in it: it is readable, and that is all it says."""
    workers = make(4)
    fcntl.fcntl(workers.fileno(), F_SETPIPE_SZ, 4096)
    count = 5_000
    for number in range(count):
        workers.submit(lambda: 0, number)
    deadline = time.monotonic() + PATIENCE
    while len(workers._results) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert count == len(workers.collect())
    drain(workers)


def test_what_a_call_was_made_with_is_released(make):
    """A buffer of the guest's, say, whose page is to be unmapped before the answer."""
    workers = make(1)
    page = bytearray(10)
    view = memoryview(page)
    workers.submit(lambda view=view[2:]: len(view), 1)
    assert [(1, 8)] == drain(workers)
    view.release()
    deadline = time.monotonic() + PATIENCE
    while True:  # the thread may have a few steps to go
        try:
            page.append(0)  # impossible while a view of it exists
            break
        except BufferError:
            assert time.monotonic() < deadline
            gc.collect()


def test_closing_ends_the_threads(make):
    workers = make(4)
    for number in range(8):
        workers.submit(lambda: 0, number)
    drain(workers)
    threads = list(workers._threads)
    assert threads
    workers.close()
    assert not any(thread.is_alive() for thread in threads)
    workers.close()  # once more does no harm


def test_closing_does_not_wait_for_what_hangs(make):
    """Its thread ends when it can; a result may still be collected."""
    workers = make(2)
    gate = threading.Event()
    workers.submit(lambda: gate.wait(LONG) and 5, "hanging")
    workers.close()
    gate.set()
    assert [("hanging", 5)] == drain(workers)


def test_nothing_is_readable_once_all_is_collected(monkeypatch):
    """However long a worker takes between its result and the word of it: who sleeps, sleeps."""
    write, writing = os.write, threading.Event()

    def slowly(descriptor, data):
        writing.set()
        time.sleep(0.02)
        return write(descriptor, data)

    with Workers(1) as workers:
        monkeypatch.setattr(os, "write", slowly)
        workers.submit(lambda: 7, "token")
        assert writing.wait(PATIENCE)
        assert [("token", 7)] == workers.collect()
        time.sleep(0.05)
        poll = select.poll()
        poll.register(workers.fileno(), select.POLLIN)
        assert [] == poll.poll(0)


# calls that are to be done later


def test_many_wait_side_by_side_and_hold_no_thread(make, monkeypatch):
    """A thousand wait an hour; a clock that is put forward ends that."""
    clock = [1000.0]
    monkeypatch.setattr(workers_module, "monotonic", lambda: clock[0])
    before = set(threading.enumerate())
    workers = make(4)
    for number in range(1000):
        workers.submit(lambda number=number: number, number, 3600.0)
    assert 1 == len(set(threading.enumerate()) - before)
    assert 1000 == workers.unfinished
    assert [] == workers.collect()
    clock[0] += 3600
    with workers._timer._changed:
        workers._timer._changed.notify()
    assert [(number, number) for number in range(1000)] == sorted(drain(workers))
    assert len(set(threading.enumerate()) - before) <= 5


def test_what_is_due_first_is_done_first(make, monkeypatch):
    """By a clock that stands while they are submitted, as the machine need not be so quick."""
    done, late = [], threading.Event()
    monkeypatch.setattr(workers_module, "monotonic", lambda: 1.0 if late.is_set() else 0.0)
    workers = make(1)
    for after in (0.02, 0.005, 0.01, 0.015):
        workers.submit(lambda after=after: done.append(after) or 0, after, after)
    late.set()
    drain(workers)
    assert [0.005, 0.01, 0.015, 0.02] == done


def test_what_waits_is_not_done_after_the_end(make):
    workers = make(2)
    workers.submit(pytest.fail, "late", 3600.0)
    workers.close()
    workers.unfinished = 0
    workers.close()


def test_without_a_thread_for_the_clock_a_call_waits_by_itself(make, monkeypatch):
    workers = make(2)
    waited = []
    monkeypatch.setattr(workers_module, "sleep", waited.append)
    monkeypatch.setattr(workers_module._Timer, "add", lambda *_: False)
    workers.submit(lambda: 7, "token", 5.0)
    assert [("token", 7)] == drain(workers)
    assert [5.0] == waited
