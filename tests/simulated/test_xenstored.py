"""The simulated xenstored, on its wire: what a client of any kind gets to see."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading

import pytest

from xen_disk_py.simulated.xenstored import SimulatedXenstored

DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, START, END = range(1, 8)
INTRODUCE, GET_DOMAIN_PATH, WRITE, MKDIR, RM, SET_PERMS = 8, 10, 11, 12, 13, 14
WATCH_EVENT, ERROR, IS_INTRODUCED, RESET_WATCHES = 15, 16, 17, 21
HEADER = struct.Struct("=IIII")
OK = b"OK\0"


class Client:
    """Packets, and nothing clever."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(path)
        self.events = []

    def close(self):
        self.sock.close()

    def send(self, operation, payload, transaction=0, request=7):
        header = HEADER.pack(operation, request, transaction, len(payload))
        self.sock.sendall(header + payload)

    def receive(self):
        operation, request, transaction, size = HEADER.unpack(self.exactly(HEADER.size))
        return operation, request, transaction, self.exactly(size)

    def exactly(self, size):
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def ask(self, operation, payload, transaction=0):
        self.send(operation, payload, transaction)
        while True:
            kind, request, number, answer = self.receive()
            if kind == WATCH_EVENT:
                assert (0, 0) == (request, number)
                self.events.append(answer)
                continue
            assert (7, transaction) == (request, number)
            if kind == ERROR:
                return answer[:-1].decode()
            assert operation == kind
            return answer

    def fired(self):
        self.ask(GET_DOMAIN_PATH, b"0\0")
        result, self.events = self.events, []
        return result

    def begin(self):
        return int(self.ask(START, b"\0")[:-1])


@pytest.fixture
def server():
    with SimulatedXenstored() as running:
        yield running


@pytest.fixture
def connect(server):
    clients = []

    def client(domid=0):
        clients.append(Client(server.socket_path(domid)))
        return clients[-1]

    yield client
    for each in clients:
        each.close()


@pytest.fixture
def dom0(connect):
    return connect()


@pytest.fixture
def guest(server, connect):
    server.add_domain(5, "guest", "uuid-5")
    return connect(5)


class TestNodes:
    def test_a_value_may_be_any_bytes(self, dom0):
        assert OK == dom0.ask(WRITE, b"/a/b\0\0\xff\n\0")
        assert b"\0\xff\n\0" == dom0.ask(READ, b"/a/b\0")

    def test_children_are_listed(self, dom0):
        dom0.ask(WRITE, b"/a/x\0")
        dom0.ask(MKDIR, b"/a/y\0")

        assert b"x\0y\0" == dom0.ask(DIRECTORY, b"/a\0")
        assert b"" == dom0.ask(DIRECTORY, b"/a/x\0")

    def test_removal_needs_a_parent_only(self, dom0):
        dom0.ask(MKDIR, b"/a/b/c\0")

        assert OK == dom0.ask(RM, b"/a/b\0")
        assert OK == dom0.ask(RM, b"/a/b\0")
        assert "ENOENT" == dom0.ask(RM, b"/a/b/c\0")
        assert "EINVAL" == dom0.ask(RM, b"/\0")

    def test_the_absent_is_reported(self, dom0):
        assert "ENOENT" == dom0.ask(READ, b"/none\0")
        assert "ENOENT" == dom0.ask(DIRECTORY, b"/none\0")

    def test_a_long_listing_is_refused(self, dom0):
        for number in range(50):
            dom0.ask(MKDIR, b"/a/%0100d\0" % number)

        assert "E2BIG" == dom0.ask(DIRECTORY, b"/a\0")


class TestPermissions:
    def test_a_guest_reads_and_writes_its_own(self, guest):
        assert OK == guest.ask(WRITE, b"data/x/y\0001")
        assert b"1" == guest.ask(READ, b"/local/domain/5/data/x/y\0")
        assert b"n5\0" == guest.ask(GET_PERMS, b"data/x/y\0")

    def test_a_guest_only_reads_what_the_toolstack_wrote(self, guest):
        assert b"guest" == guest.ask(READ, b"name\0")
        assert "EACCES" == guest.ask(WRITE, b"name\0other")
        assert "EACCES" == guest.ask(MKDIR, b"device/vbd\0")
        assert "EACCES" == guest.ask(RM, b"name\0")
        assert "EACCES" == guest.ask(SET_PERMS, b"name\0b5\0")

    def test_a_guest_sees_nothing_of_others(self, guest):
        for path in (b"/local/domain/0\0", b"/local/domain/0/none\0", b"/none\0"):
            assert "EACCES" == guest.ask(READ, path)
            assert "EACCES" == guest.ask(DIRECTORY, path)
            assert "EACCES" == guest.ask(GET_PERMS, path)

    @pytest.mark.parametrize(
        ("permissions", "read", "write"),
        [
            (b"n0\0", "EACCES", "EACCES"),
            (b"r0\0", b"1", "EACCES"),
            (b"w0\0", "EACCES", OK),
            (b"b0\0", b"1", OK),
            (b"n0\0r5\0", b"1", "EACCES"),
            (b"n0\0w5\0", "EACCES", OK),
            (b"n0\0b5\0", b"1", OK),
            (b"b0\0n5\0", "EACCES", "EACCES"),
            (b"n0\0b6\0", "EACCES", "EACCES"),
            (b"n5\0", b"1", OK),
        ],
    )
    def test_letters_say_who_may_what(self, dom0, guest, permissions, read, write):
        dom0.ask(WRITE, b"/a\0001")
        assert OK == dom0.ask(SET_PERMS, b"/a\0" + permissions)

        assert read == guest.ask(READ, b"/a\0")
        assert write == guest.ask(WRITE, b"/a\0002")

    def test_new_nodes_take_those_above(self, dom0, guest):
        dom0.ask(MKDIR, b"/a\0")
        dom0.ask(SET_PERMS, b"/a\0n3\0b5\0")
        dom0.ask(WRITE, b"/a/b/c\0001")
        guest.ask(WRITE, b"/a/x/y\0001")

        assert b"n3\0b5\0" == dom0.ask(GET_PERMS, b"/a/b/c\0")
        assert b"n5\0b5\0" == dom0.ask(GET_PERMS, b"/a/x/y\0")

    def test_only_dom0_gives_a_node_away(self, dom0, guest):
        guest.ask(WRITE, b"data/x\0001")

        assert "EPERM" == guest.ask(SET_PERMS, b"data/x\0n6\0")
        assert OK == guest.ask(SET_PERMS, b"data/x\0b5\0r6\0")
        assert OK == dom0.ask(SET_PERMS, b"/local/domain/5/data/x\0n6\0")
        assert "EACCES" == guest.ask(READ, b"data/x\0")

    def test_writing_is_not_owning(self, dom0, guest):
        dom0.ask(MKDIR, b"/a\0")
        dom0.ask(SET_PERMS, b"/a\0n0\0b5\0")

        assert "EACCES" == guest.ask(SET_PERMS, b"/a\0n0\0")

    def test_a_device_made_as_libxl_does_is_between_two_domains(self, dom0, guest, connect):
        dom0.ask(MKDIR, b"/local/domain/5/device/vbd/1\0")
        dom0.ask(SET_PERMS, b"/local/domain/5/device/vbd/1\0n5\0r0\0")
        dom0.ask(WRITE, b"/local/domain/5/device/vbd/1/state\0001")

        assert OK == guest.ask(WRITE, b"device/vbd/1/state\0003")
        assert "EACCES" == connect(6).ask(READ, b"/local/domain/5/device/vbd/1/state\0")


class TestTransactions:
    def test_are_seen_by_others_after_the_end(self, dom0, connect):
        number = dom0.begin()
        dom0.ask(WRITE, b"/a\0001", number)

        assert b"1" == dom0.ask(READ, b"/a\0", number)
        assert "ENOENT" == dom0.ask(READ, b"/a\0")
        assert "ENOENT" == connect().ask(READ, b"/a\0")
        assert OK == dom0.ask(END, b"T\0", number)
        assert b"1" == connect().ask(READ, b"/a\0")

    def test_can_be_undone(self, dom0):
        dom0.ask(WRITE, b"/a\0001")
        number = dom0.begin()
        dom0.ask(RM, b"/a\0", number)
        dom0.ask(WRITE, b"/b\0001", number)

        assert OK == dom0.ask(END, b"F\0", number)
        assert b"1" == dom0.ask(READ, b"/a\0")
        assert "ENOENT" == dom0.ask(READ, b"/b\0")

    @pytest.mark.parametrize(
        ("mine", "theirs"),
        [
            ((READ, b"/a\0"), (WRITE, b"/a\0002")),
            ((READ, b"/a\0"), (WRITE, b"/a\0001")),
            ((READ, b"/a\0"), (RM, b"/a\0")),
            ((READ, b"/a\0"), (SET_PERMS, b"/a\0r0\0")),
            ((READ, b"/new\0"), (WRITE, b"/new\0001")),
            ((DIRECTORY, b"/a\0"), (MKDIR, b"/a/new\0")),
            ((MKDIR, b"/a/mine\0"), (MKDIR, b"/a/theirs\0")),
            ((WRITE, b"/a\0002"), (WRITE, b"/a\0003")),
            ((RM, b"/a\0"), (MKDIR, b"/a/b\0")),
        ],
    )
    def test_collide_with_changes_of_what_they_touched(self, dom0, connect, mine, theirs):
        dom0.ask(WRITE, b"/a\0001")
        number = dom0.begin()
        dom0.ask(*mine, number)
        connect().ask(*theirs)

        assert "EAGAIN" == dom0.ask(END, b"T\0", number)
        assert "ENOENT" == dom0.ask(END, b"T\0", number)

    @pytest.mark.parametrize(
        ("mine", "theirs"),
        [
            ((READ, b"/a\0"), (WRITE, b"/b\0002")),
            ((READ, b"/a\0"), (READ, b"/a\0")),
            ((WRITE, b"/a\0002"), (WRITE, b"/b\0002")),
            ((WRITE, b"/a/x\0002"), (WRITE, b"/b/x\0002")),
        ],
    )
    def test_do_not_collide_with_others(self, dom0, connect, mine, theirs):
        dom0.ask(WRITE, b"/a\0001")
        dom0.ask(WRITE, b"/b\0001")
        number = dom0.begin()
        dom0.ask(*mine, number)
        connect().ask(*theirs)

        assert OK == dom0.ask(END, b"T\0", number)

    def test_do_not_collide_with_changes_before_the_first_touch(self, dom0, connect):
        dom0.ask(WRITE, b"/a\0001")
        number = dom0.begin()
        connect().ask(WRITE, b"/a\0002")

        assert b"2" == dom0.ask(READ, b"/a\0", number)
        assert OK == dom0.ask(END, b"T\0", number)

    def test_two_at_once_do_not_mix(self, dom0):
        first, second = dom0.begin(), dom0.begin()
        dom0.ask(WRITE, b"/a/x\0001", first)
        dom0.ask(WRITE, b"/b/x\0001", second)

        assert OK == dom0.ask(END, b"T\0", first)
        assert "EAGAIN" == dom0.ask(END, b"T\0", second)
        assert b"1" == dom0.ask(READ, b"/a/x\0")
        assert "ENOENT" == dom0.ask(READ, b"/b/x\0")

    def test_of_others_or_nobody_do_not_exist(self, dom0, connect):
        number = dom0.begin()

        assert "ENOENT" == connect().ask(READ, b"/\0", number)
        assert "ENOENT" == dom0.ask(READ, b"/\0", number + 1)
        assert "ENOENT" == dom0.ask(END, b"T\0")

    def test_do_not_nest(self, dom0):
        assert "EBUSY" == dom0.ask(START, b"\0", dom0.begin())

    def test_end_with_t_or_f(self, dom0):
        number = dom0.begin()

        assert "EINVAL" == dom0.ask(END, b"X\0", number)
        assert OK == dom0.ask(END, b"F\0", number)

    def test_end_at_a_reset(self, dom0):
        number = dom0.begin()

        assert OK == dom0.ask(RESET_WATCHES, b"\0")
        assert "ENOENT" == dom0.ask(END, b"T\0", number)


class TestWatches:
    def test_fire_after_their_answer_at_first(self, dom0):
        dom0.send(WATCH, b"/a\0token\0")

        assert (WATCH, 7, 0, OK) == dom0.receive()
        assert (WATCH_EVENT, 0, 0, b"/a\0token\0") == dom0.receive()

    def test_fire_for_what_is_below(self, dom0, connect):
        dom0.ask(WATCH, b"/a\0t\0")
        dom0.fired()
        other = connect()
        for operation, payload in (
            (WRITE, b"/a/b/c\0001"),
            (WRITE, b"/ab\0001"),
            (MKDIR, b"/a/d\0"),
            (MKDIR, b"/a/d\0"),
            (SET_PERMS, b"/a\0n0\0"),
            (RM, b"/a/b\0"),
            (RM, b"/a/none\0"),
            (READ, b"/a\0"),
        ):
            other.ask(operation, payload)

        assert [b"/a/b/c\0t\0", b"/a/d\0t\0", b"/a\0t\0", b"/a/b\0t\0"] == dom0.fired()

    def test_fire_for_everything_at_the_root(self, dom0, server):
        dom0.ask(WATCH, b"/\0t\0")
        dom0.fired()
        dom0.ask(MKDIR, b"/a/b\0")
        server.add_domain(0, "again", "other")

        fired = dom0.fired()
        assert b"/a/b\0t\0" == fired[0]
        assert not any(event.startswith(b"@") for event in fired)

    def test_fire_with_their_own_path_when_a_parent_goes(self, dom0, connect):
        dom0.ask(WRITE, b"/a/b/c\0001")
        for path in (b"/a", b"/a/b", b"/a/b/c", b"/a/b/none"):
            dom0.ask(WATCH, path + b"\0t\0")
        dom0.fired()
        connect().ask(RM, b"/a\0")

        assert [b"/a\0t\0", b"/a/b\0t\0", b"/a/b/c\0t\0"] == sorted(dom0.fired())

    def test_fire_at_the_end_of_a_transaction(self, dom0, connect):
        dom0.ask(WATCH, b"/a\0t\0")
        dom0.fired()
        other = connect()
        number = other.begin()
        other.ask(WRITE, b"/a/b\0001", number)

        assert [] == dom0.fired()
        other.ask(END, b"T\0", number)
        assert [b"/a/b\0t\0"] == dom0.fired()

    def test_do_not_fire_for_a_transaction_undone_or_refused(self, dom0, connect):
        dom0.ask(WATCH, b"/a\0t\0")
        dom0.fired()
        other = connect()
        for end in (b"F\0", b"T\0"):
            number = other.begin()
            other.ask(WRITE, b"/a/b\0001", number)
            if end == b"T\0":
                other.ask(MKDIR, b"/z\0")
            other.ask(END, end, number)

        assert [] == dom0.fired()

    def test_with_a_relative_path_fire_with_one(self, guest, dom0):
        guest.ask(WATCH, b"data\0t\0")
        dom0.ask(WRITE, b"/local/domain/5/data/x\0001")

        assert [b"data\0t\0", b"data/x\0t\0"] == guest.fired()

    def test_do_not_tell_a_guest_of_what_it_may_not_read(self, guest, dom0):
        guest.ask(WATCH, b"/a\0t\0")
        guest.fired()
        dom0.ask(WRITE, b"/a/b\0001")
        dom0.ask(SET_PERMS, b"/a/b\0n0\0w5\0")

        assert [] == guest.fired()
        dom0.ask(SET_PERMS, b"/a/b\0n0\0r5\0")
        assert [b"/a/b\0t\0"] == guest.fired()
        dom0.ask(RM, b"/a/b\0")
        assert [b"/a/b\0t\0"] == guest.fired()

    def test_tell_a_guest_of_what_is_right_under_what_it_may_read(self, guest, dom0):
        dom0.ask(WRITE, b"/local/domain/5/secret/deep\0001")
        for path in (b"/local/domain/5/secret", b"/local/domain/5/secret/deep"):
            dom0.ask(SET_PERMS, path + b"\0n0\0")
        guest.ask(WATCH, b"/local/domain/5\0t\0")
        guest.fired()
        dom0.ask(WRITE, b"/local/domain/5/secret\0002")
        dom0.ask(WRITE, b"/local/domain/5/secret/deep\0002")

        assert [b"/local/domain/5/secret\0t\0"] == guest.fired()

    def test_are_told_apart_by_path_and_token(self, dom0):
        assert OK == dom0.ask(WATCH, b"/a\0t\0")
        assert OK == dom0.ask(WATCH, b"/a\0u\0")
        assert "EEXIST" == dom0.ask(WATCH, b"/a\0t\0")
        assert "ENOENT" == dom0.ask(UNWATCH, b"/b\0t\0")
        assert OK == dom0.ask(UNWATCH, b"/a\0t\0")
        dom0.fired()
        dom0.ask(MKDIR, b"/a\0")
        assert [b"/a\0u\0"] == dom0.fired()

    def test_end_at_a_reset(self, dom0):
        dom0.ask(WATCH, b"/a\0t\0")
        dom0.ask(RESET_WATCHES, b"\0")
        dom0.fired()
        dom0.ask(MKDIR, b"/a\0")

        assert [] == dom0.fired()

    def test_special_ones_fire_for_domains(self, server, dom0):
        dom0.ask(WATCH, b"@introduceDomain\0i\0")
        dom0.ask(WATCH, b"@releaseDomain\0r\0")
        dom0.fired()
        server.add_domain(9, "nine", "uuid-9")
        server.remove_domain(9)

        assert [b"@introduceDomain\0i\0", b"@releaseDomain\0r\0"] == dom0.fired()
        assert "EINVAL" == dom0.ask(WATCH, b"@nonsense\0t\0")


class TestDomains:
    def test_have_their_nodes(self, server, dom0):
        server.add_domain(9, "nine", "uuid-9")

        assert b"nine" == dom0.ask(READ, b"/local/domain/9/name\0")
        assert b"9" == dom0.ask(READ, b"/local/domain/9/domid\0")
        assert b"/vm/uuid-9" == dom0.ask(READ, b"/local/domain/9/vm\0")
        assert b"uuid-9" == dom0.ask(READ, b"/vm/uuid-9/uuid\0")
        assert b"T\0" == dom0.ask(IS_INTRODUCED, b"9\0")

    def test_take_everything_along(self, server, dom0, guest):
        server.remove_domain(5)

        assert "ENOENT" == dom0.ask(READ, b"/local/domain/5\0")
        assert "ENOENT" == dom0.ask(READ, b"/vm/uuid-5\0")
        assert b"F\0" == dom0.ask(IS_INTRODUCED, b"5\0")
        with pytest.raises((EOFError, ConnectionError)):
            guest.ask(READ, b"name\0")

    def test_may_be_added_over_nodes_that_exist(self, server, dom0):
        dom0.ask(WRITE, b"/local/domain/9/name\0old")
        server.add_domain(9, "nine", "uuid-9")

        assert b"nine" == dom0.ask(READ, b"/local/domain/9/name\0")
        names = dom0.ask(DIRECTORY, b"/local/domain/9\0").split(b"\0")
        assert len(set(names)) == len(names)

    def test_have_a_path_in_any_case(self, dom0):
        assert b"/local/domain/77\0" == dom0.ask(GET_DOMAIN_PATH, b"77\0")

    def test_that_are_not_there_cannot_be_removed(self, server):
        with pytest.raises(KeyError):
            server.remove_domain(9)


class TestMalformed:
    @pytest.mark.parametrize(
        ("operation", "payload"),
        [
            (READ, b""),
            (READ, b"\0"),
            (READ, b"/a"),
            (READ, b"/a\0more\0"),
            (READ, b"/a/\0"),
            (READ, b"//a\0"),
            (READ, b"/a.b\0"),
            (READ, b"/\xff\0"),
            (READ, b"/" + b"x" * 3072 + b"\0"),
            (READ, b"x" * 2049 + b"\0"),
            (WRITE, b"/a"),
            (WRITE, b"\xff\0value"),
            (SET_PERMS, b"/a\0"),
            (SET_PERMS, b"/a\0x0\0"),
            (SET_PERMS, b"/a\0n0"),
            (WATCH, b"/a\0"),
            (WATCH, b"/a\0t"),
            (WATCH, b"/a\0t\0u\0v\0"),
            (UNWATCH, b"/a\0"),
            (GET_DOMAIN_PATH, b"x\0"),
            (IS_INTRODUCED, b"\0"),
        ],
    )
    def test_requests_are_refused(self, dom0, operation, payload):
        assert "EINVAL" == dom0.ask(operation, payload)
        assert b"" == dom0.ask(READ, b"/\0")

    @pytest.mark.parametrize("operation", [0, INTRODUCE, WATCH_EVENT, ERROR, 22, 0xFFFFFFFF])
    def test_operations_unknown_here_are_refused(self, dom0, operation):
        assert "ENOSYS" == dom0.ask(operation, b"1\0")

    def test_a_payload_too_long_ends_the_connection(self, dom0, connect):
        dom0.sock.sendall(HEADER.pack(WRITE, 1, 0, 4097))
        with pytest.raises((EOFError, ConnectionError)):
            dom0.receive()

        assert b"" == connect().ask(READ, b"/\0")

    def test_the_longest_payload_is_fine(self, dom0):
        value = b"x" * (4096 - 3)

        assert OK == dom0.ask(WRITE, b"/a\0" + value)
        assert value == dom0.ask(READ, b"/a\0")

    def test_requests_may_come_in_pieces_and_in_bunches(self, dom0):
        data = b"".join(HEADER.pack(READ, number, 0, 2) + b"/\0" for number in range(3))
        for start in range(0, len(data), 7):
            dom0.sock.sendall(data[start : start + 7])

        assert [(READ, number, 0, b"") for number in range(3)] == [dom0.receive() for _ in "123"]

    def test_a_client_that_leaves_in_a_packet_harms_nobody(self, dom0, connect):
        dom0.sock.sendall(b"half")
        dom0.close()

        assert b"" == connect().ask(READ, b"/\0")


class TestServer:
    def test_pausing_delays_answers(self, server, dom0):
        server.pause()
        dom0.send(READ, b"/\0")
        dom0.sock.settimeout(0.1)
        with pytest.raises(socket.timeout):
            dom0.receive()
        dom0.sock.settimeout(30)
        server.resume()

        assert (READ, 7, 0, b"") == dom0.receive()

    @pytest.mark.parametrize(("keep", "expected"), [(True, b"1"), (False, "ENOENT")])
    def test_restarting_drops_connections(self, server, dom0, connect, keep, expected):
        dom0.ask(WRITE, b"/a\0001")
        server.restart(keep=keep)
        with pytest.raises((EOFError, ConnectionError)):
            dom0.ask(READ, b"/a\0")

        assert expected == connect().ask(READ, b"/a\0")
        assert b"Domain-0" == connect().ask(READ, b"/local/domain/0/name\0")

    def test_a_client_that_does_not_read_stops_nobody(self, dom0, connect):
        dom0.ask(WATCH, b"/a\0" + b"t" * 3000 + b"\0")
        other = connect()
        for _ in range(300):
            other.ask(WRITE, b"/a\0001")

        assert 301 == len(dom0.fired())

    def test_serves_other_processes(self, server):
        script = (
            "import sys; from xen_disk_py.xenbus.xenstore import Store\n"
            "with Store.open(sys.argv[1]) as store: print(store.read('domid'))\n"
        )
        command = [sys.executable, "-W", "error", "-c", script, server.socket_path()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

        assert "0\n" == done.stdout

    def test_leaves_nothing_behind(self):
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        with SimulatedXenstored() as server:
            path = server.socket_path(3)
            client = Client(path)
            client.ask(WATCH, b"data\0t\0")
            server.pause()
        client.close()

        assert not os.path.exists(os.path.dirname(path))
        assert threads >= threading.active_count()
        assert descriptors >= len(os.listdir("/proc/self/fd"))

    def test_closing_twice_is_fine_and_using_it_then_is_not(self):
        server = SimulatedXenstored()
        server.close()
        server.close()
        with pytest.raises(ValueError, match="closed"):
            server.pause()
