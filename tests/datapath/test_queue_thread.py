"""Several queues of a disk have one thread: none waits for another, none is forgotten."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from datapath.test_queue import queue_of
from xen_disk_py.blkif import FLUSH, OKAY, READ, WRITE_BARRIER, Transfer
from xen_disk_py.datapath import idle, queue_thread
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.queue import Queue
from xen_disk_py.errors import DeviceError
from xen_disk_py.synchronizing import HAS_GIL

PATIENCE = 30.0
only_with_the_lock = pytest.mark.skipif(not HAS_GIL, reason="each queue has a thread of its own")


def request(id_, operation, sector, ref):
    return Transfer(id_, operation, sector, 8, (ref,), (0,), (7,))


@pytest.fixture
def several(host):
    """Return a function that has so many queues of one disk served."""

    def make(disk, count=2):
        return [host.line(disk, number=number) for number in range(count)]

    return make


def slow(host, entered, allowed):
    """A disk whose requests take waiting: until ``allowed``, those of the first 64 KiB."""

    class Slow(type(host.memory())):
        def read(self, buffers, offset):
            if offset < 65536:
                entered.set()
                assert allowed.wait(PATIENCE)
            super().read(buffers, offset)

    return Disk(Slow(threads=4))


@only_with_the_lock
def test_there_is_one_thread_as_long_as_there_is_a_queue(host, several, queue_threads):
    disk = Disk(host.memory(threads=4))
    lines = several(disk, 3)
    page = host.share().refs[0]
    for line in lines:
        assert OKAY == line.ask(request(1, READ, 0, page)).status
    assert 1 == len(queue_threads())
    for left in (1, 1, 0):
        assert lines.pop().queue.stop(PATIENCE)
        assert left == len(queue_threads())
    (line,) = several(disk, 1)
    assert OKAY == line.ask(request(2, READ, 0, page)).status


def test_a_thread_for_each_queue_where_threads_run_at_once(
    host, several, monkeypatch, queue_threads
):
    monkeypatch.setattr(queue_thread, "HAS_GIL", False)
    lines = several(Disk(host.memory(threads=4)), 3)
    page = host.share().refs[0]
    assert [OKAY] * 3 == [line.ask(request(1, READ, 0, page)).status for line in lines]
    assert 3 == len(queue_threads())


def test_a_queue_that_always_has_requests_lets_the_others_have_turns(host, several):
    """A guest puts the next requests while one is done: that ring is never seen empty."""
    served = []

    class Busy(type(host.memory())):
        def read_nowait(self, buffers, offset):
            self.read(buffers, offset)
            served.append(offset)
            if offset and not other.is_set():  # one more for each that is done
                flooding.put(request(0, READ, 8, page))
                flooding.kick()
                flooding.ring.take()
                if len(served) == 100:
                    quiet.put(request(7, READ, 0, page))
                    quiet.kick()
                assert len(served) < 100 + 2 * flooding.ring.slots
            elif not offset:
                other.set()
            return sum(map(len, buffers))

    other = threading.Event()
    page = host.share().refs[0]
    flooding, quiet = several(Disk(Busy(threads=4)))
    flooding.put(request(0, READ, 8, page))
    flooding.kick()
    assert 7 == quiet.responses(1)[0].id
    assert other.is_set()


@only_with_the_lock
def test_a_queue_that_always_has_requests_is_drained_though_asked_amid_a_barrier(host, several):
    entered, allowed, drained = threading.Event(), threading.Event(), threading.Event()
    served = []

    class Busy(type(slow(host, entered, allowed).backend)):
        def read_nowait(self, buffers, offset):
            if not offset:
                return 0  # done in a thread, and the barrier waits for it
            served.append(offset)
            self.read(buffers, offset)
            if not drained.is_set():  # one more for each that is done
                flooding.put(request(0, READ, 256, page))
                flooding.kick()
                flooding.ring.take()
            return sum(map(len, buffers))

    disk = Disk(Busy(threads=4))
    page = host.share().refs[0]
    (flooding,) = several(disk, 1)

    def change():
        with disk.drained.entered(PATIENCE):
            drained.set()

    changer = threading.Thread(target=change)
    flooding.put(request(1, READ, 0, page), request(2, WRITE_BARRIER, 256, page))
    flooding.put(request(3, READ, 256, page))
    flooding.kick()
    assert entered.wait(PATIENCE)
    changer.start()
    thread = flooding.queue._thread
    host.until(lambda: disk.drained.is_wanted and thread._waiting and not thread._asked)
    before = len(served)
    allowed.set()
    host.until(lambda: drained.is_set() or len(served) > before + 1000)
    was_drained = drained.is_set()
    drained.set()
    changer.join(PATIENCE)
    assert was_drained


@pytest.mark.parametrize("operation", [FLUSH, WRITE_BARRIER])
def test_while_a_queue_waits_for_what_it_has_begun_the_others_are_served(host, several, operation):
    entered, allowed = threading.Event(), threading.Event()
    one, two, three = several(slow(host, entered, allowed), 3)
    page = host.share().refs[0]
    for line in (one, two):  # each waits within the other's turn
        line.put(request(1, READ, 0, page), request(2, operation, 256, page))
        line.kick()
        assert entered.wait(PATIENCE)
        entered.clear()
        assert [OKAY] * 5 == [three.ask(request(n, READ, 256, page)).status for n in range(5)]
    allowed.set()
    for line in (one, two):
        assert {1: OKAY, 2: OKAY} == {each.id: each.status for each in line.responses(2)}


def test_a_queue_ends_while_another_waits(host, several):
    entered, allowed = threading.Event(), threading.Event()
    one, two, three = several(slow(host, entered, allowed), 3)
    page = host.share().refs[0]
    one.put(request(1, READ, 0, page), request(2, WRITE_BARRIER, 256, page))
    one.kick()
    assert entered.wait(PATIENCE)
    assert OKAY == two.ask(request(3, READ, 256, page)).status
    assert two.queue.stop(PATIENCE)
    assert not one.queue.stop(0.01)
    assert OKAY == three.ask(request(4, READ, 256, page)).status
    allowed.set()
    assert one.queue.stop(PATIENCE)
    assert OKAY == three.ask(request(4, READ, 256, page)).status


def test_a_queue_that_is_alone_ends_though_it_was_asked_to_amid_a_barrier(host, several):
    entered, allowed = threading.Event(), threading.Event()
    (one,) = several(slow(host, entered, allowed), 1)
    page = host.share().refs[0]
    one.put(request(1, READ, 0, page), request(2, WRITE_BARRIER, 256, page))
    one.kick()
    assert entered.wait(PATIENCE)
    assert not one.queue.stop(0.2)  # it was woken, and cannot end yet
    allowed.set()
    assert one.queue._ended.wait(PATIENCE)  # without being asked again
    assert one.queue.stop(PATIENCE)


def test_a_queue_that_fails_takes_no_other_with_it(host, several, monkeypatch):
    one, two = several(Disk(host.memory(threads=4)))
    page = host.share().refs[0]

    def broken():
        raise RuntimeError("no idea")

    monkeypatch.setattr(one.queue._channel, "notify", broken)
    one.put(request(1, READ, 0, page))
    one.kick()
    host.until(lambda: one.failures)
    assert OKAY == two.ask(request(2, READ, 0, page)).status
    assert [] == two.failures


def test_a_ring_out_of_order_takes_no_other_with_it(host, several):
    one, two = several(Disk(host.memory(threads=4)))
    page = host.share().refs[0]
    with one.pages.view[:16].cast("I") as indices:
        indices[0] = 1000
    one.channel.notify()
    host.until(one.queue._ended.is_set)
    assert OKAY == two.ask(request(2, READ, 0, page)).status


@only_with_the_lock
def test_an_event_flood_puts_off_no_other_queue(host, several, monkeypatch):
    monkeypatch.setattr(idle, "_CALM", 1_000_000)
    one, two = several(Disk(host.memory(threads=4)))
    page = host.share().refs[0]
    for line in (one, two):
        assert OKAY == line.ask(request(1, READ, 0, page)).status
    for _ in range(3 * idle._FLOOD):
        one.channel.notify()
        assert OKAY == two.ask(request(2, READ, 0, page)).status
    one.queue.wakeups.spurious = idle._FLOOD
    one.channel.notify()  # now it waits, with this port masked
    for _ in range(3):
        assert OKAY == two.ask(request(2, READ, 0, page)).status
    one.put(request(3, READ, 0, page))
    one.kick()
    assert OKAY == two.ask(request(4, READ, 0, page)).status
    assert OKAY == one.responses(1)[0].status  # found in the same round


def test_all_queues_are_drained_and_what_is_under_way_is_awaited(host, several):
    entered, allowed = threading.Event(), threading.Event()
    disk = slow(host, entered, allowed)
    lines = several(disk, 3)
    page = host.share().refs[0]
    for line in lines:
        assert OKAY == line.ask(request(1, READ, 256, page)).status
    lines[1].put(request(1, READ, 0, page))
    lines[1].kick()
    assert entered.wait(PATIENCE)
    with pytest.raises(DeviceError, match="has not returned"), disk.drained.entered(0.01):
        pytest.fail("drained amid a request")
    # Nobody wants that any longer: the others are served, though it has not returned.
    assert OKAY == lines[0].ask(request(2, READ, 256, page)).status
    allowed.set()
    assert OKAY == lines[1].responses(1)[0].status
    with disk.drained.entered(PATIENCE):
        for line in lines:
            line.put(request(3, READ, 256, page))
            line.kick()
        assert [0, 0, 0] == [len(line.ring.take()) for line in lines]
    assert [OKAY] * 3 == [line.responses(1)[0].status for line in lines]


def test_where_no_pipe_is_to_be_had_it_is_tried_again(host, several, monkeypatch, caplog):
    def full(flags):
        raise OSError(errno.EMFILE, "too many")

    (line,) = several(Disk(host.memory(threads=4)), 1)
    page = host.share().refs[0]
    assert line.queue.stop(PATIENCE)
    queue = line.queue = queue_of(host, line.pages.refs, line.channel.port, line.disk)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", full)
        assert not queue.start()
    assert "too many" in caplog.text
    assert queue.start()
    line.put(request(1, READ, 0, page))
    line.kick()
    assert OKAY == line.responses(1)[0].status


@only_with_the_lock
def test_an_error_of_the_thread_itself_ends_all_queues(host, several, monkeypatch):
    one, two = several(Disk(host.memory(threads=4)))
    page = host.share().refs[0]
    assert [OKAY] * 2 == [line.ask(request(1, READ, 0, page)).status for line in (one, two)]

    def broken(*args, **options):
        raise OSError(12, "no memory")

    for line in (one, two):
        monkeypatch.setattr(line.queue._idle, "sleep", broken)
    two.channel.notify()
    host.until(lambda: one.failures and two.failures)
    assert [True, True] == [line.queue.stop(PATIENCE) for line in (one, two)]


def test_a_queue_resumes_what_a_predecessor_left_before_its_first_turn(host, several, monkeypatch):
    """Also where another waits for a barrier that it resumes with: the others have turns then."""
    done, begin, turn = [], Queue.begin, Queue.turn

    def beginning(queue):
        if not queue.number:
            while "turn" not in done:
                queue._thread.wait(queue)
            return True
        done.append("begin")
        return begin(queue)

    def turning(queue, **options):
        if queue.number:
            done.append("turn")
        return turn(queue, **options)

    monkeypatch.setattr(Queue, "begin", beginning)
    monkeypatch.setattr(Queue, "turn", turning)
    disk = Disk(host.memory(threads=4))
    page = host.share().refs[0]
    with disk.drained.entered(PATIENCE):  # both have started when the thread begins
        one, two = several(disk)
        two.put(request(1, READ, 0, page))
        two.kick()
    assert OKAY == two.responses(1)[0].status
    assert OKAY == one.ask(request(1, READ, 0, page)).status
    assert ["begin", "turn"] == done[:2]


@only_with_the_lock
def test_a_queue_that_starts_amid_the_only_one_s_turn_has_turns(host, several):
    """The first was alone when its turn began, waits amid it, and never runs out of requests."""
    entered, allowed, other = threading.Event(), threading.Event(), threading.Event()
    served = []

    class Busy(type(host.memory())):
        def read(self, buffers, offset):
            if not offset:
                entered.set()
                assert allowed.wait(PATIENCE)
            super().read(buffers, offset)

        def read_nowait(self, buffers, offset):
            if not offset:
                return 0  # would wait
            self.read(buffers, offset)
            served.append(offset)
            if offset == 4096 and not other.is_set():
                one.put(request(0, READ, 8, page))
                one.kick()
                one.ring.take()
                if len(served) == 100:
                    two.put(request(7, READ, 16, page))
                    two.kick()
                assert len(served) < 100 + 2 * one.ring.slots
            elif offset == 8192:
                other.set()
            return sum(map(len, buffers))

    page = host.share().refs[0]
    disk = Disk(Busy(threads=4))
    (one,) = several(disk, 1)
    one.put(
        request(1, READ, 0, page), request(2, WRITE_BARRIER, 8, page), request(3, READ, 8, page)
    )
    one.kick()
    assert entered.wait(PATIENCE)
    two = host.line(disk, number=1)
    host.until(lambda: len(one.queue._thread._queues) == 2)
    allowed.set()
    assert 7 == two.responses(1)[0].id
    assert other.is_set()


def test_a_barrier_that_takes_long_makes_no_other_queue_wait(host, several):
    entered, allowed = threading.Event(), threading.Event()

    class Slow(type(host.memory())):
        def flush(self):
            entered.set()
            assert allowed.wait(PATIENCE)

    one, two = several(Disk(Slow(threads=4)))
    page = host.share().refs[0]
    one.put(request(1, WRITE_BARRIER, 0, page), request(2, READ, 0, page))
    one.kick()
    assert entered.wait(PATIENCE)
    assert [OKAY] * 3 == [two.ask(request(n, READ, 256, page)).status for n in range(3)]
    assert [] == one.ring.take()
    allowed.set()
    assert [(1, OKAY), (2, OKAY)] == [(each.id, each.status) for each in one.responses(2)]


def test_a_queue_that_cannot_end_takes_no_other_with_it(host, several, monkeypatch):
    one, two = several(Disk(host.memory(threads=4)))
    page = host.share().refs[0]
    end = one.queue.end

    def broken():
        end()
        raise RuntimeError("no idea")

    monkeypatch.setattr(one.queue, "end", broken)
    assert one.queue.stop(PATIENCE)
    assert OKAY == two.ask(request(2, READ, 0, page)).status
    assert [1, 0] == [len(line.failures) for line in (one, two)]


@only_with_the_lock
def test_a_queue_that_starts_as_the_thread_fails_ends_as_well(
    host, several, monkeypatch, queue_threads
):
    disk = Disk(host.memory(threads=4))
    (one,) = several(disk, 1)
    page = host.share().refs[0]
    assert OKAY == one.ask(request(1, READ, 0, page)).status
    late = []

    def broken(*args, **options):
        late.append(host.line(disk, number=1))
        raise OSError(12, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(one.queue._idle, "sleep", broken)
        one.channel.notify()
        host.until(lambda: one.failures and late and late[0].failures)
    assert [True, True] == [line.queue.stop(PATIENCE) for line in (one, *late)]
    assert [] == queue_threads()
    line = host.line(disk, number=2)
    assert OKAY == line.ask(request(1, READ, 0, page)).status


@only_with_the_lock
def test_a_queue_that_waits_within_another_s_wait_lets_it_answer(host, several):
    """The inner one waits as long as the storage fails; what the outer has begun is no stall."""
    entered, allowed, failed = threading.Event(), threading.Event(), threading.Event()
    backend = slow(host, entered, allowed).backend
    backend.is_broken = True

    def flush():
        if backend.is_broken:
            failed.set()
            raise OSError(errno.EIO, "broken")

    backend.flush = flush
    one, two = several(Disk(backend, holds=True))
    page = host.share().refs[0]
    one.put(request(1, READ, 0, page), request(2, WRITE_BARRIER, 256, page))
    one.kick()
    assert entered.wait(PATIENCE)
    two.put(request(3, WRITE_BARRIER, 256, page))
    two.kick()
    assert failed.wait(PATIENCE)
    host.until(lambda: two.queue._thread._waiting == [one.queue, two.queue])
    allowed.set()
    assert [(1, OKAY)] == [(each.id, each.status) for each in one.responses(1)]
    assert 0 == one.queue.stalled_for
    backend.is_broken = False
    assert [(3, OKAY)] == [(each.id, each.status) for each in two.responses(1)]
    assert [(2, OKAY)] == [(each.id, each.status) for each in one.responses(1)]


@only_with_the_lock
def test_an_error_of_a_queue_within_another_s_wait_is_its_own(host, several, monkeypatch):
    entered, allowed = threading.Event(), threading.Event()
    one, two, three = several(slow(host, entered, allowed), 3)
    page = host.share().refs[0]
    for line in (one, two):
        line.put(request(1, READ, 0, page), request(2, WRITE_BARRIER, 256, page))
        line.kick()
        assert entered.wait(PATIENCE)
        entered.clear()
    thread = one.queue._thread
    host.until(lambda: thread._waiting == [one.queue, two.queue])

    def broken():
        monkeypatch.undo()
        raise RuntimeError("no idea")

    monkeypatch.setattr(one.queue, "catch_up", broken)
    assert OKAY == three.ask(request(1, READ, 256, page)).status
    allowed.set()
    assert {1: OKAY, 2: OKAY} == {each.id: each.status for each in two.responses(2)}
    host.until(lambda: one.failures)
    assert [1, 0, 0] == [len(line.failures) for line in (one, two, three)]
    assert OKAY == two.ask(request(4, READ, 256, page)).status


@only_with_the_lock
def test_the_thread_ends_with_an_only_queue_that_cannot_begin(host, monkeypatch, queue_threads):
    def broken(queue):
        raise RuntimeError("no idea")

    monkeypatch.setattr(Queue, "begin", broken)
    line = host.line(Disk(host.memory(threads=4)))
    host.until(lambda: line.failures and not queue_threads())


def test_who_asks_a_queue_to_stop_may_be_cut_short_by_a_signal(host, several, monkeypatch):
    """And asks again: that wakes the thread, though it has been asked already."""
    (line,) = several(Disk(host.memory(threads=4)), 1)
    page = host.share().refs[0]
    assert OKAY == line.ask(request(1, READ, 0, page)).status

    def cut_short():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(line.queue._thread, "wake", cut_short)
        with pytest.raises(KeyboardInterrupt):
            line.queue.ask_to_stop()
    assert line.queue.stop(PATIENCE)
