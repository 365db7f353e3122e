"""Store: its contract, which any xenstored must bear out, and what it does when that fails.

In a dom0, or where ``$XENSTORED_PATH`` names the socket of a real xenstored, the contract
also runs against that (``pytest -m xen``).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tty

import pytest

from xen_disk_py.errors import StoreError, StoreLost, XenUnavailable
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus import xenstore
from xen_disk_py.xenbus.xenstore import Store, quote, unquote

ROOT = "/local/domain/0/xen-disk-py-test"
SERVERS = ["simulated"]
if os.path.exists("/proc/xen/capabilities") or "XENSTORED_PATH" in os.environ:
    SERVERS.append(pytest.param("real", marks=pytest.mark.xen))


@pytest.fixture
def server():
    with SimulatedXenstored() as running:
        yield running


@pytest.fixture(params=SERVERS)
def connect(request):
    """Give a function that opens one more connection to the same xenstored."""
    with contextlib.ExitStack() as stack:
        path = None
        if request.param == "simulated":
            path = stack.enter_context(SimulatedXenstored()).socket_path()
        yield lambda: stack.enter_context(Store.open(path))


@pytest.fixture
def store(connect):
    result = connect()
    result.remove(ROOT)
    result.write(ROOT, "")
    yield result
    if not result.is_lost:
        result.remove(ROOT)


@pytest.fixture
def exchanged(monkeypatch):
    """Give a list in which each request and each answer is noted."""

    def note(name):
        def call(*arguments):
            noted.append(name)
            return method(*arguments)

        method = getattr(xenstore._Router, name)
        monkeypatch.setattr(xenstore._Router, name, call)

    noted = []
    note("_post")
    note("_answer")
    return noted


@pytest.fixture
def other(store, connect):
    return connect()


@pytest.fixture
def simulated(server):
    """Give a store of the simulated server."""
    with Store.open(server.socket_path()) as result:
        yield result


@pytest.fixture
def hasty(server):
    """Give one that waits for a moment only."""
    with Store.open(server.socket_path(), timeout=0.3) as result:
        yield result


@pytest.fixture
def locked_out(monkeypatch):
    """A context in which no new connection can be made."""

    @contextlib.contextmanager
    def locked():
        def refuse(path, timeout):
            raise XenUnavailable(f"may not open {path}")

        with monkeypatch.context() as patch:
            patch.setattr(xenstore, "_connect", refuse)
            yield

    return locked


def events(store, seconds=30.0):
    """Wait for events as a main loop does: not on the descriptor if there are some."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        fired = store.pending()
        if fired:
            return fired
        poll = select.poll()
        poll.register(store.fileno(), select.POLLIN)
        poll.poll((deadline - time.monotonic()) * 1000)
    return []


def settle(store):
    """Forget the events so far; xenstored sends events and answers in order."""
    store.read(ROOT)
    store.pending()


def refused(number):
    return pytest.raises(StoreError, match=os.strerror(number))


class TestValues:
    def test_reads_what_was_written(self, store):
        store.write(f"{ROOT}/a/b", "value with space, 100% ~")

        assert "value with space, 100% ~" == store.read(f"{ROOT}/a/b")

    def test_others_read_what_was_written(self, store, other):
        store.write(f"{ROOT}/a", "1")

        assert "1" == other.read(f"{ROOT}/a")

    def test_an_absent_node_reads_as_none(self, store):
        assert store.read(f"{ROOT}/absent") is None
        assert store.read(f"{ROOT}/absent/more") is None

    def test_missing_parents_are_created_empty(self, store):
        store.write(f"{ROOT}/a/b/c", "1")

        assert "" == store.read(f"{ROOT}/a/b")

    def test_an_empty_value_replaces_another(self, store):
        store.write(f"{ROOT}/a", "1")
        store.write(f"{ROOT}/a", "")

        assert "" == store.read(f"{ROOT}/a")

    def test_an_empty_value_creates_a_node(self, store):
        store.write(f"{ROOT}/a", "")

        assert store.exists(f"{ROOT}/a")

    def test_what_is_created_has_its_values(self, store):
        store.create(f"{ROOT}/a/b", ["n0"], {"c": "1", "d": ""})

        expected = {f"{ROOT}/a": "", f"{ROOT}/a/b": "", f"{ROOT}/a/b/c": "1", f"{ROOT}/a/b/d": ""}
        assert {ROOT: "", **expected} == store.tree(ROOT)

    def test_creating_what_exists_keeps_what_else_is_there(self, store):
        store.write(f"{ROOT}/a", "1")
        store.write(f"{ROOT}/a/b", "2")
        store.create(f"{ROOT}/a", ["n5"], {"c": "3"})

        expected = {f"{ROOT}/a": "1", f"{ROOT}/a/b": "2", f"{ROOT}/a/c": "3"}
        assert expected == store.tree(f"{ROOT}/a")
        assert ["n5"] == store.get_permissions(f"{ROOT}/a")
        assert ["n0"] == store.get_permissions(f"{ROOT}/a/b")[:1]
        assert ["n5"] == store.get_permissions(f"{ROOT}/a/c")

    def test_remove_takes_all_below(self, store):
        store.write(f"{ROOT}/a/b/c", "1")
        store.remove(f"{ROOT}/a")

        assert not store.exists(f"{ROOT}/a")
        assert not store.exists(f"{ROOT}/a/b/c")
        assert [] == store.list(ROOT)

    def test_removing_the_absent_is_fine(self, store):
        store.remove(f"{ROOT}/absent")
        store.remove(f"{ROOT}/absent/below/that")

    def test_lists_names(self, store):
        store.write(f"{ROOT}/a/x", "")
        store.write(f"{ROOT}/b", "")

        assert ["a", "b"] == sorted(store.list(ROOT))

    def test_lists_nothing_for_a_leaf_and_the_absent(self, store):
        store.write(f"{ROOT}/a", "1")

        assert [] == store.list(f"{ROOT}/a")
        assert [] == store.list(f"{ROOT}/absent")

    def test_many_nodes_at_once_are_read_and_listed_like_each_of_them(self, store):
        for number in range(100):
            store.write(f"{ROOT}/{number}/x", str(number))
        paths = [f"{ROOT}/{number}" for number in range(90, 110)]
        paths += [f"{ROOT}/{number}/x" for number in range(110)]

        assert [store.read(path) for path in paths] == list(store.read_all(paths))
        assert [store.list(path) for path in paths] == list(store.list_all(paths))
        assert [] == list(store.read_all([]))

    def test_not_all_of_many_are_sent_before_the_first_answer(self, store, exchanged):
        store.read_all([ROOT] * 70)

        assert 32 * ["_post"] + 32 * ["_answer"] == exchanged[:64]
        assert 6 * ["_post"] + 6 * ["_answer"] == exchanged[128:]

    def test_one_of_many_that_is_no_path_is_refused(self, store):
        for call in (store.read_all, store.list_all):
            with refused(errno.EINVAL):
                call([ROOT, "/a b"])
        assert "" == store.read(ROOT)

    def test_tree_has_every_value(self, store):
        store.write(f"{ROOT}/a/x", "1")
        store.write(f"{ROOT}/b", "2")

        expected = {ROOT: "", f"{ROOT}/a": "", f"{ROOT}/a/x": "1", f"{ROOT}/b": "2"}
        assert expected == store.tree(ROOT)
        assert {} == store.tree(f"{ROOT}/absent")
        assert "0" == store.tree("/").get("/local/domain/0/domid", "0")

    @pytest.mark.parametrize("value", ["ü", "a\nb", "line\n", "\t", "\x80"])
    def test_a_value_beyond_ascii_is_refused_and_quote_helps(self, store, value):
        with refused(errno.EINVAL):
            store.write(f"{ROOT}/a", value)
        store.write(f"{ROOT}/a", quote(value))

        assert value == unquote(store.read(f"{ROOT}/a"))

    @pytest.mark.parametrize(
        "path",
        ["", "/a/", "//a", "/a//b", "/a.b", "/a b", "/a\n", "/ü", "/" + "x" * 3072, "x" * 2049],
    )
    def test_what_is_no_path_is_refused(self, store, path):
        for call in (store.read, store.remove, store.list, store.watch):
            with refused(errno.EINVAL):
                call(path)

    def test_too_long_a_value_is_refused(self, store):
        with refused(errno.E2BIG):
            store.write(f"{ROOT}/a", "x" * 4096)
        assert not store.exists(f"{ROOT}/a")

    def test_too_many_names_are_refused(self, store):
        for number in range(50):
            store.write(f"{ROOT}/{number:0>100}", "")
        with refused(errno.E2BIG):
            store.list(ROOT)
        assert not store.is_lost

    def test_a_relative_path_is_under_the_own_domain(self, store):
        store.write(f"{ROOT}/a", "1")

        assert "1" == store.read(f"{ROOT.rpartition('/')[2]}/a")


class TestPermissions:
    def test_are_what_was_set(self, store):
        store.create(f"{ROOT}/a", ["n0", "r5", "b7"], {})

        assert ["n0", "r5", "b7"] == store.get_permissions(f"{ROOT}/a")

    def test_pass_to_new_nodes_below(self, store):
        store.create(f"{ROOT}/a", ["n5", "r0"], {})
        store.write(f"{ROOT}/a/b/c", "1")

        assert ["n5", "r0"] == store.get_permissions(f"{ROOT}/a/b/c")

    def test_of_an_absent_node_are_an_error(self, store):
        with refused(errno.ENOENT):
            store.get_permissions(f"{ROOT}/absent")

    @pytest.mark.parametrize("permissions", [[], ["x0"], ["n"], ["n0", "r"], ["n-1"], ["n0\n"]])
    def test_that_make_no_sense_are_refused(self, store, permissions):
        with refused(errno.EINVAL):
            store.create(ROOT, permissions, {})


class TestTransactions:
    def test_returns_what_the_change_returned(self, store):
        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            return inside.read(f"{ROOT}/a")

        assert "1" == store.transact(change)
        assert "1" == store.read(f"{ROOT}/a")

    def test_others_see_nothing_before_the_end(self, store, other):
        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            return other.read(f"{ROOT}/a")

        assert store.transact(change) is None

    def test_is_repeated_when_another_interferes(self, store, other):
        store.write(f"{ROOT}/count", "0")
        runs = []

        def change(inside):
            count = int(inside.read(f"{ROOT}/count"))
            runs.append(count)
            if len(runs) < 4:
                other.write(f"{ROOT}/count", str(count + 10))
            inside.write(f"{ROOT}/count", str(count + 1))

        store.transact(change)

        assert [0, 10, 20, 30] == runs
        assert "31" == store.read(f"{ROOT}/count")

    def test_gives_up_when_another_always_interferes(self, store, other):
        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            other.write(f"{ROOT}/a", "2")

        with refused(errno.EAGAIN):
            store.transact(change)
        assert "2" == store.read(f"{ROOT}/a")

    def test_is_repeated_when_a_step_is_refused_for_now(self, store):
        runs = []

        def change(inside):
            inside.write(f"{ROOT}/a{len(runs)}", "1")
            runs.append(1)
            if len(runs) == 1:
                raise StoreError(errno.EAGAIN, "as oxenstored may")

        store.transact(change)

        assert ["a1"] == store.list(ROOT)

    def test_an_exception_undoes_everything(self, store):
        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            store.transact(change)
        assert not store.exists(f"{ROOT}/a")
        store.write(f"{ROOT}/a", "2")
        assert "2" == store.read(f"{ROOT}/a")

    def test_an_error_of_xenstore_undoes_everything(self, store):
        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            inside.get_permissions(f"{ROOT}/absent")

        with refused(errno.ENOENT):
            store.transact(change)
        assert not store.exists(f"{ROOT}/a")

    def test_does_not_nest(self, store):
        with refused(errno.EALREADY):
            store.transact(lambda inside: inside.transact(lambda _: None))
        assert "fine" == store.transact(lambda _: "fine")


class TestWatches:
    def test_fires_once_at_first(self, store):
        store.watch(f"{ROOT}/a")

        assert [f"{ROOT}/a"] == events(store)
        settle(store)
        assert [] == store.pending()

    def test_fires_for_the_node_and_all_below(self, store, other):
        store.watch(f"{ROOT}/a")
        settle(store)

        other.write(f"{ROOT}/a/b/c", "1")
        assert [f"{ROOT}/a"] == events(store)
        other.write(f"{ROOT}/a", "1")
        assert [f"{ROOT}/a"] == events(store)

    def test_does_not_fire_for_neighbours(self, store, other):
        store.watch(f"{ROOT}/a")
        settle(store)

        other.write(f"{ROOT}/ab", "1")
        other.write(f"{ROOT}/b/a", "1")
        store.read(ROOT)
        assert [] == store.pending()

    def test_fires_when_a_node_above_is_removed(self, store, other):
        store.write(f"{ROOT}/a/b/c", "1")
        store.watch(f"{ROOT}/a/b/c")
        settle(store)

        other.remove(f"{ROOT}/a")
        assert [f"{ROOT}/a/b/c"] == events(store)

    def test_fires_when_permissions_change(self, store, other):
        store.watch(ROOT)
        settle(store)

        other.create(ROOT, ["n0", "r1"], {})
        assert [ROOT] == events(store)

    def test_events_of_a_path_become_one(self, store, other):
        store.watch(f"{ROOT}/a")
        store.watch(f"{ROOT}/b")
        settle(store)

        for path in ("b", "a/x", "b", "a/y", "a"):
            other.write(f"{ROOT}/{path}", "1")
        store.read(ROOT)
        assert [f"{ROOT}/b", f"{ROOT}/a"] == store.pending()
        assert [] == store.pending()

    def test_a_transaction_fires_at_its_end_only(self, store, other):
        store.watch(f"{ROOT}/a")
        settle(store)
        seen = []

        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            store.read(ROOT)
            seen.extend(store.pending())

        other.transact(change)
        assert [] == seen
        assert [f"{ROOT}/a"] == events(store)

    def test_a_transaction_undone_fires_nothing(self, store, other):
        store.watch(f"{ROOT}/a")
        settle(store)

        def change(inside):
            inside.write(f"{ROOT}/a", "1")
            raise LookupError

        with pytest.raises(LookupError):
            other.transact(change)
        store.read(ROOT)
        assert [] == store.pending()

    def test_events_that_pass_while_an_answer_is_awaited_are_kept(self, store, other):
        store.watch(f"{ROOT}/a")
        settle(store)

        other.write(f"{ROOT}/a", "1")
        store.read(ROOT)
        assert store.has_pending
        assert [f"{ROOT}/a"] == store.pending()
        assert not store.has_pending

    def test_own_changes_fire_too(self, store):
        store.watch(f"{ROOT}/a")
        settle(store)

        store.write(f"{ROOT}/a", "1")
        assert [f"{ROOT}/a"] == events(store)

    def test_an_event_before_unwatch_is_dropped(self, store, other):
        store.watch(f"{ROOT}/a")
        other.write(f"{ROOT}/a", "1")
        store.unwatch(f"{ROOT}/a")

        assert not store.has_pending
        store.read(ROOT)
        assert [] == store.pending()

    def test_an_unwatched_path_fires_no_more(self, store, other):
        store.watch(f"{ROOT}/a")
        store.unwatch(f"{ROOT}/a")
        other.write(f"{ROOT}/a", "1")
        store.read(ROOT)

        assert [] == store.pending()

    def test_watching_twice_is_watching_once(self, store):
        store.watch(f"{ROOT}/a")
        settle(store)
        store.watch(f"{ROOT}/a")
        store.read(ROOT)

        assert [] == store.pending()
        store.unwatch(f"{ROOT}/a")
        store.unwatch(f"{ROOT}/a")

    def test_a_relative_path_fires_as_it_was_given(self, store, other):
        path = f"{ROOT.rpartition('/')[2]}/a"
        store.watch(path)
        settle(store)

        other.write(f"{ROOT}/a", "1")
        assert [path] == events(store)

    def test_300_watches_leave_nothing(self, store, other):
        for number in range(300):
            store.watch(f"{ROOT}/{number % 7}")
            if number % 3:
                other.write(f"{ROOT}/{number % 7}", "1")
            if number % 2:
                store.pending()
            store.unwatch(f"{ROOT}/{number % 7}")
        for number in range(7):
            other.write(f"{ROOT}/{number}", "2")
        store.read(ROOT)

        assert not store.has_pending
        assert [] == store.pending()

    def test_a_refused_watch_is_not_kept(self, store):
        with refused(errno.EINVAL):
            store.watch("@nonsense/")
        assert not store.has_pending


class TestDomains:
    def test_are_introduced_or_not(self, store):
        assert store.is_introduced(0)
        assert not store.is_introduced(32000)


class TestResources:
    def test_no_thread_is_created(self, connect):
        before = threading.active_count()
        store = connect()
        store.watch(ROOT)
        store.pending()

        assert before == threading.active_count()

    def test_no_descriptor_leaks(self, connect):
        with connect() as store:
            store.read("/")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            with connect() as store:
                store.watch(ROOT)
        deadline = time.monotonic() + 30  # the simulated server's ends close a bit later
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)

        assert before >= len(os.listdir("/proc/self/fd"))

    def test_closing_twice_is_fine(self, connect):
        store = connect()
        store.close()
        store.close()

        assert store.is_lost
        with pytest.raises(StoreLost):
            store.read("/")

    def test_reconnecting_makes_watches_fire_again(self, store, other):
        store.watch(f"{ROOT}/a")
        store.watch(f"{ROOT}/b")
        settle(store)
        store.reconnect()

        fired = set()
        while len(fired) < 2:
            fired.update(events(store))
        assert {f"{ROOT}/a", f"{ROOT}/b"} == fired
        other.write(f"{ROOT}/b", "1")
        assert [f"{ROOT}/b"] == events(store)


class TestLoss:
    def test_no_answer_in_time_is_a_loss(self, server, hasty):
        server.pause()
        start = time.monotonic()
        with pytest.raises(StoreLost, match=r"does not answer within 0\.3 s") as caught:
            hasty.read("/")

        assert errno.ETIMEDOUT == caught.value.errno
        assert time.monotonic() - start > 0.25
        assert hasty.is_lost

    def test_every_call_after_a_loss_says_so(self, server, simulated):
        server.restart(keep=True)
        with pytest.raises(StoreLost):
            simulated.read("/")
        calls = (
            lambda: simulated.read("/"),
            lambda: simulated.write("/a", "1"),
            lambda: simulated.transact(lambda _: None),
            lambda: simulated.watch("/a"),
            simulated.pending,
            simulated.fileno,
        )
        for call in calls:
            with pytest.raises(StoreLost):
                call()
        assert not simulated.has_pending

    def test_an_idle_store_learns_of_a_loss_from_its_descriptor(self, server, simulated):
        server.restart(keep=True)
        with pytest.raises(StoreLost):
            events(simulated)

        assert simulated.is_lost

    def test_reconnects_to_a_restarted_server(self, server, simulated):
        simulated.write("/a", "1")
        simulated.watch("/a")
        simulated.pending()
        server.restart(keep=False)
        with pytest.raises(StoreLost):
            simulated.read("/a")
        simulated.reconnect()

        assert not simulated.is_lost
        assert ["/a"] == events(simulated)
        assert simulated.read("/a") is None

    def test_reconnecting_can_fail_and_be_tried_again(self, server, simulated):
        simulated.watch("/a")
        server.pause()
        patience, simulated._timeout = simulated._timeout, 0.1
        with pytest.raises(StoreLost):
            simulated.reconnect()
        assert simulated.is_lost
        server.resume()
        simulated._timeout = patience
        simulated.reconnect()

        assert ["/a"] == events(simulated)

    def test_who_may_not_connect_uses_each_reserve_once(self, server, simulated, locked_out):
        simulated.watch("/a")
        simulated.reserve(2)
        simulated.reserve(2)
        with locked_out():
            for _ in range(2):
                simulated._router.close()
                simulated.reconnect()
                simulated.write("/a", "1")
                assert ["/a"] == events(simulated)
            with pytest.raises(XenUnavailable, match="may not"):
                simulated.reconnect()
        assert simulated.is_lost
        simulated.reconnect()
        assert "1" == simulated.read("/a")

    def test_a_reserve_ends_with_its_server(self, server, simulated, locked_out):
        simulated.reserve(1)
        simulated.read("/")  # then the server has accepted it
        server.restart(keep=True)
        with locked_out():
            simulated.reconnect()
            with pytest.raises(StoreLost):
                simulated.read("/a")
            with pytest.raises(XenUnavailable, match="may not"):
                simulated.reconnect()

    def test_reconnecting_to_nothing_says_what_to_do(self, server, simulated):
        server.close()
        with pytest.raises(XenUnavailable, match="is xenstored running"):
            simulated.reconnect()
        assert simulated.is_lost

    def test_a_loss_in_a_transaction_comes_out(self, server, simulated):
        def change(inside):
            server.restart(keep=True)
            inside.write("/a", "1")

        with pytest.raises(StoreLost):
            simulated.transact(change)
        simulated.reconnect()
        assert simulated.read("/a") is None
        simulated.write("/a", "2")
        assert "2" == simulated.transact(lambda inside: inside.read("/a"))

    def test_a_watch_that_was_lost_is_not_kept(self, server, hasty):
        server.pause()
        with pytest.raises(StoreLost):
            hasty.watch("/a")
        server.resume()
        hasty._timeout = 30.0
        hasty.reconnect()
        hasty.read("/")

        assert [] == hasty.pending()

    def test_an_unwatch_that_was_lost_counts(self, server, simulated):
        simulated.watch("/a")
        server.restart(keep=True)
        with pytest.raises(StoreLost):
            simulated.unwatch("/a")
        simulated.reconnect()
        simulated.read("/")

        assert [] == simulated.pending()

    def test_an_interrupt_while_waiting_is_a_loss(self, server, simulated, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt("by the test")

        def wait_and_be_interrupted(*arguments):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return wait(*arguments)

        wait = xenstore._Transport._wait
        monkeypatch.setattr(xenstore._Transport, "_wait", wait_and_be_interrupted)
        server.pause()
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt, match="by the test"):
                simulated.read("/")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert simulated.is_lost

    def test_what_a_guest_may_not_is_refused(self, server):
        with Store.open(server.socket_path(5)) as guest:
            with refused(errno.EACCES):
                guest.write("/local/domain/0/a", "1")
            with refused(errno.EACCES):
                guest.read("/local/domain/0/name")
            with refused(errno.EACCES):
                guest.exists("/local/domain/0/name")
        assert not guest.has_pending


READ, WRITE, MKDIR, SET_PERMS, WATCH_EVENT, ERROR = 2, 11, 12, 14, 15, 16


def packet(operation, request, payload, size=None):
    size = len(payload) if size is None else size
    return struct.pack("=IIII", operation, request, 0, size) + payload


class TestHostileServer:
    """A peer that does what no xenstored should: the answers are there before we ask."""

    @pytest.fixture
    def timeout(self):
        return 0.1

    @pytest.fixture
    def peer(self, tmp_path, timeout):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            listener.listen()
            listener.settimeout(30)
            self.store = Store.open(str(tmp_path / "socket"), timeout)
            with self.store, listener.accept()[0] as peer:
                yield peer

    @pytest.mark.parametrize(
        ("data", "number"),
        [
            (packet(READ, 99, b"1"), errno.EPROTO),
            (packet(1, 1, b"1"), errno.EPROTO),
            (packet(77, 1, b"1"), errno.EPROTO),
            (packet(READ, 1, b"", size=4097), errno.EPROTO),
            (packet(READ, 1, b"", size=0xFFFFFFFF), errno.EPROTO),
            (packet(WATCH_EVENT, 0, b"/a"), errno.EPROTO),
            (packet(READ, 1, b"", size=4), errno.ETIMEDOUT),
            (packet(READ, 1, b"1")[:7], errno.ETIMEDOUT),
            (b"", errno.ETIMEDOUT),
        ],
    )
    def test_a_bad_answer_is_a_loss(self, peer, data, number):
        peer.sendall(data)
        with pytest.raises(StoreLost) as caught:
            self.store.read("/a")

        assert number == caught.value.errno
        assert self.store.is_lost

    def test_an_end_within_a_packet_is_a_loss(self, peer):
        peer.sendall(packet(READ, 1, b"", size=4) + b"ab")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(StoreLost) as caught:
            self.store.read("/a")

        assert errno.ECONNRESET == caught.value.errno

    def test_an_answer_that_is_not_ok_is_a_loss(self, peer):
        peer.sendall(packet(WRITE, 1, b"NO\0"))
        with pytest.raises(StoreLost):
            self.store.write("/a", "")
        assert self.store.is_lost

    def test_an_answer_nobody_asked_for_is_a_loss(self, peer):
        peer.sendall(packet(READ, 1, b"1"))
        with pytest.raises(StoreLost):
            self.store.pending()
        assert self.store.is_lost

    def test_an_unknown_error_is_an_error(self, peer):
        peer.sendall(packet(ERROR, 1, b"ESTRANGE\0"))
        with refused(errno.EIO):
            self.store.read("/a")
        assert not self.store.is_lost

    @pytest.mark.parametrize("timeout", [30.0])
    def test_what_is_created_is_sent_at_once(self, peer):
        answers = packet(MKDIR, 1, b"OK\0") + packet(WATCH_EVENT, 0, b"/a\0none\0")
        peer.sendall(answers + packet(SET_PERMS, 2, b"OK\0") + packet(WRITE, 3, b"OK\0"))
        self.store.create("/a", ["n0", "r5"], {"b": "1"})

        expected = packet(MKDIR, 1, b"/a\0") + packet(SET_PERMS, 2, b"/a\0n0\0r5\0")
        assert expected + packet(WRITE, 3, b"/a/b\x001") == peer.recv(1000)

    @pytest.mark.parametrize("timeout", [30.0])
    def test_what_is_refused_of_many_is_an_error_and_the_rest_is_done(self, peer):
        peer.sendall(packet(MKDIR, 1, b"OK\0") + packet(ERROR, 2, b"EACCES\0"))
        peer.sendall(packet(ERROR, 3, b"EINVAL\0") + packet(READ, 4, b"1"))
        with refused(errno.EACCES):
            self.store.create("/a", ["n0"], {"b": "1"})
        assert "1" == self.store.read("/a/b")

    def test_one_answer_too_few_is_a_loss(self, peer):
        peer.sendall(packet(MKDIR, 1, b"OK\0") + packet(SET_PERMS, 2, b"OK\0"))
        with pytest.raises(StoreLost):
            self.store.create("/a", ["n0"], {"b": "1"})
        assert self.store.is_lost

    @pytest.mark.parametrize("timeout", [30.0])
    def test_one_of_many_answers_that_is_not_ok_is_a_loss(self, peer):
        peer.sendall(packet(MKDIR, 1, b"OK\0") + packet(SET_PERMS, 2, b"NO\0"))
        with pytest.raises(StoreLost):
            self.store.create("/a", ["n0"], {})
        assert self.store.is_lost

    @pytest.mark.parametrize("timeout", [30.0])
    def test_drops_within_the_deadline_are_read(self, peer, monkeypatch):
        data = packet(WATCH_EVENT, 0, b"/a\0none\0") + packet(READ, 1, b"value")
        drops = [data[at : at + 9] for at in range(0, len(data), 9)]
        wait = xenstore._Transport._wait

        def wait_for_a_drop(*arguments):
            peer.sendall(drops.pop(0))
            return wait(*arguments)

        monkeypatch.setattr(xenstore._Transport, "_wait", wait_for_a_drop)
        assert "value" == self.store.read("/a")
        assert [] == drops

    def test_bytes_that_are_no_text_come_out_readable(self, peer):
        peer.sendall(packet(READ, 1, b"a\xffb"))

        assert "a\\xffb" == self.store.read("/a")

    def test_an_event_of_an_unknown_token_is_dropped(self, peer):
        peer.sendall(packet(WATCH_EVENT, 0, b"/a\0none\0"))

        assert [] == self.store.pending()
        assert not self.store.has_pending

    def test_a_peer_that_reads_nothing_is_a_loss(self, peer):
        with pytest.raises(StoreLost) as caught:  # noqa: PT012 - which write blocks is open
            for number in range(1, 100000):
                peer.sendall(packet(11, number, b"OK\0"))
                self.store.write("/a", "x" * 4000)

        assert errno.ETIMEDOUT == caught.value.errno
        assert self.store.is_lost


class TestOpening:
    def one_line(self, path=None):
        with pytest.raises(XenUnavailable) as caught:
            Store.open(path, timeout=0.1)
        text = str(caught.value)
        assert "\n" not in text
        gc.collect()  # what is left open would be heard of here
        return text

    @pytest.fixture
    def nowhere(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XENSTORED_PATH", str(tmp_path / "socket"))
        monkeypatch.setattr(xenstore, "_DEVICE", str(tmp_path / "device"))
        monkeypatch.setattr(xenstore, "_HYPERVISOR_TYPE", str(tmp_path / "type"))
        monkeypatch.setattr("pyxs.connection._get_xenbus_path", lambda: str(tmp_path / "old"))
        return tmp_path

    def test_of_a_missing_socket_names_it(self, tmp_path):
        path = str(tmp_path / "socket")

        expected = f"({path}: No such file or directory): is xenstored running there?"
        assert self.one_line(path).endswith(expected)

    def test_of_a_socket_that_nobody_serves_names_it(self, tmp_path):
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            assert f"{path}: Connection refused" in self.one_line(path)

    def test_of_a_socket_whose_queue_stays_full_ends(self, tmp_path):
        path = str(tmp_path / "socket")
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(0)
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.connect(path)
            assert "Resource temporarily unavailable" in self.one_line(path)

    def test_of_a_path_too_long_for_a_socket_names_it(self, tmp_path):
        path = tmp_path / ("x" * 120)
        path.touch()

        assert "too long" in self.one_line(str(path))

    def test_without_xen_says_so(self, nowhere):
        text = self.one_line()

        assert text.startswith("this machine does not run on Xen (")
        assert str(nowhere / "socket") in text

    def test_without_xenstored_says_so(self, nowhere):
        (nowhere / "type").write_text("xen\n")

        assert self.one_line().endswith("start xenstored")

    def test_without_privilege_says_so(self, nowhere, monkeypatch):
        def refuse(*_):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(xenstore, "_Transport", refuse)

        assert f"may not open {nowhere / 'socket'}: run this as root" == self.one_line()

    def test_by_default_follows_the_environment(self, server, monkeypatch):
        monkeypatch.setenv("XENSTORED_PATH", server.socket_path())
        with Store.open() as store:
            assert "Domain-0" == store.read("/local/domain/0/name")

    def test_falls_back_to_the_device(self, nowhere, exchanged):
        master, slave = os.openpty()  # a terminal is a device that can be read and written
        try:
            tty.setraw(slave)
            (nowhere / "device").symlink_to(os.ttyname(slave))
            with Store.open() as store:
                os.write(master, packet(WATCH_EVENT, 0, b"/a\0none\0") + packet(READ, 1, b"1"))
                assert "1" == store.read("/a")
                expected, asked = packet(READ, 1, b"/a\0"), b""
                while len(asked) < len(expected):  # a terminal gives what it has by then
                    asked += os.read(master, 100)
                assert expected == asked
                # Linux has one buffer for requests, and has sent from it when the answer is there.
                os.write(master, packet(READ, 2, b"2") + packet(READ, 3, b"3"))
                assert ["2", "3"] == list(store.read_all(["/a", "/b"]))
                assert ["_post", "_answer"] * 3 == exchanged
            with Store.open(timeout=0.1) as hasty, pytest.raises(StoreLost, match="not answer"):
                hasty.read("/a")
        finally:
            os.close(master)
            os.close(slave)

    def test_pyxs_leaving_a_file_open_in_a_dom0_is_not_heard_of(self):
        script = (
            "import builtins, os\n"
            "real = builtins.open\n"
            "def fake(path, *rest, **more):\n"
            "    if path == '/proc/xen/capabilities':\n"
            "        path = os.devnull\n"
            "    return real(path, *rest, **more)\n"
            "builtins.open = fake\n"
            "import xen_disk_py.xenbus.xenstore\n"
        )
        command = [sys.executable, "-W", "error", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

        assert (0, "") == (done.returncode, done.stderr)


class TestQuoting:
    @pytest.mark.parametrize("text", ["", "/a b/100%.img", "ü\n\t\x00\x7f", "\udcff", "%41", "~"])
    def test_comes_back(self, text):
        assert text == unquote(quote(text))
        assert quote(text).isascii()
        assert quote(text).isprintable()

    def test_leaves_ordinary_text_alone(self):
        assert "/srv/My disk (1).img:w,ro" == quote("/srv/My disk (1).img:w,ro")

    def test_encodes_percent_signs(self):
        assert "50%25" == quote("50%")
