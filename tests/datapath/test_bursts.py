"""Bursts: what happens many times is told once."""

from __future__ import annotations

import threading

from xen_disk_py.datapath.bursts import Bursts


def test_all_of_a_burst_is_one_report():
    told = []
    bursts = Bursts(lambda *what: told.append(what), calm=1000, longest=1000)
    for number in range(5):
        bursts.add(f"request {number}")
    assert [] == told
    bursts.flush()
    bursts.flush()
    assert [(5, "request 0")] == told
    bursts.add("another")
    bursts.flush()
    assert [(5, "request 0"), (1, "another")] == told


def test_it_is_told_when_it_is_over(host):
    told = []
    bursts = Bursts(lambda *what: told.append(what), calm=0.001, longest=1000)
    for _ in range(2):
        bursts.add("x")
    host.until(lambda: sum(count for count, _ in told) == 2)


def test_where_no_thread_is_to_be_had_the_next_one_tries_again(host, monkeypatch):
    told = []
    bursts = Bursts(lambda *what: told.append(what), calm=0, longest=0)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        bursts.add("first")
    bursts.add("second")
    host.until(lambda: told == [(2, "first")])


def test_one_that_does_not_end_is_told_all_the_same(host):
    told = []
    bursts = Bursts(lambda *what: told.append(what), calm=1000, longest=0.001)
    bursts.add("x")
    host.until(lambda: told == [(1, "x")])


def test_none_is_lost_between_threads():
    told = []
    bursts = Bursts(lambda count, _: told.append(count), calm=0, longest=0)

    def add():
        for _ in range(500):
            bursts.add("x")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bursts.flush()
    assert 2000 == sum(told)
