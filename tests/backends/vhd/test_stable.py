import os
import threading

import pytest

from xen_disk_py.backends.vhd.stable import Stable

PATIENCE = 30


class Storage:
    """An fdatasync that ends when it is told to."""

    def __init__(self, monkeypatch):
        self.begun = []
        self.changed = threading.Condition()
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def fdatasync(self, fd):
        done = threading.Event()
        done.failure = None
        with self.changed:
            self.begun.append(done)
            self.changed.notify_all()
        assert done.wait(PATIENCE)
        if done.failure:
            raise done.failure

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, PATIENCE)

    def end(self, number, failure=None):
        self.begun[number].failure = failure
        self.begun[number].set()


class Caller(threading.Thread):
    def __init__(self, stable):
        super().__init__()
        self.stable = stable
        self.result = None
        self.start()

    def run(self):
        try:
            self.stable.sync()
            self.result = "done"
        except OSError as error:
            self.result = str(error)

    def outcome(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.result


def test_who_asks_while_one_is_under_way_shares_the_next(monkeypatch):
    storage = Storage(monkeypatch)
    stable = Stable(3)
    first = Caller(stable)
    storage.wait_for(1)
    others = [Caller(stable) for _ in range(5)]
    while len(stable._turn._waiters) < 5:  # all of them wait for their turn
        pass
    storage.end(0)
    assert "done" == first.outcome()
    storage.wait_for(2)
    assert [None] * 5 == [other.result for other in others]  # theirs has only begun
    storage.end(1)
    assert ["done"] * 5 == [other.outcome() for other in others]
    assert 2 == len(storage.begun)


def test_a_failure_is_everybodys_from_then_on(monkeypatch):
    storage = Storage(monkeypatch)
    stable = Stable(3)
    first = Caller(stable)
    storage.wait_for(1)
    other = Caller(stable)
    storage.end(0, OSError(5, "Input/output error"))
    assert "a flush has failed (Input/output error)" in first.outcome()
    assert "nothing is flushed any more" in other.outcome()
    with pytest.raises(OSError, match="a flush has failed"):
        stable.sync()
    assert 1 == len(storage.begun)


def test_one_call_is_one_fdatasync(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    stable = Stable(7)
    stable.sync()
    stable.sync()
    assert [7, 7] == calls
