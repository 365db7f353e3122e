import errno
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from xen_disk_py.errors import BackendError, HypervisorError
from xen_disk_py.hypervisor import PAGE_SIZE, Piece
from xen_disk_py.simulated.hypervisor import (
    CHANNELS,
    FIRST_REFERENCE,
    SimulatedGuest,
    SimulatedHypervisor,
    SimulatedMachine,
)

GUEST = 3
BACKEND = 1


@pytest.fixture
def machine():
    with SimulatedMachine(domid=GUEST, backend_domid=BACKEND, pages=512) as machine:
        yield machine


@pytest.fixture
def backend(machine):
    with SimulatedHypervisor(machine) as backend:
        yield backend


@pytest.fixture
def guest(machine):
    with SimulatedGuest(machine) as guest:
        yield guest


def refused(map_or_bind, *arguments, **options):
    with pytest.raises(HypervisorError) as caught:
        map_or_bind(*arguments, **options)
    return caught.value.errno


def is_readable(channel, seconds=30.0):
    return bool(select.select([channel], [], [], seconds)[0])


class TestReferences:
    def test_the_first_ones_are_reserved(self, backend, guest):
        shared = guest.share_pages(BACKEND, 1, writable=True)
        assert [FIRST_REFERENCE] == list(shared.refs)
        for ref in (0, 1, FIRST_REFERENCE - 1):
            assert errno.EINVAL == refused(backend.map_grants, GUEST, [ref], writable=False)

    @pytest.mark.parametrize("ref", [-1, 400, 519, 520, 2**31, 2**32 - 1])
    def test_one_that_is_not_granted_is_refused(self, backend, ref):
        assert errno.EINVAL == refused(backend.map_grants, GUEST, [ref], writable=False)

    def test_one_granted_to_another_domain_is_refused(self, backend, guest):
        with guest.share_pages(BACKEND + 1, 1, writable=True) as shared:
            assert errno.EINVAL == refused(backend.map_grants, GUEST, shared.refs, writable=False)

    def test_one_granted_for_reading_cannot_be_written(self, backend, guest):
        with guest.share_pages(BACKEND, 1, writable=False) as shared:
            assert errno.EINVAL == refused(backend.map_grants, GUEST, shared.refs, writable=True)
            backend.map_grants(GUEST, shared.refs, writable=False).close()

    def test_a_withdrawn_one_is_refused(self, backend, guest):
        shared = guest.share_pages(BACKEND, 1, writable=True)
        refs = shared.refs
        shared.close()
        assert errno.EINVAL == refused(backend.map_grants, GUEST, refs, writable=False)

    def test_they_are_used_again(self, guest):
        for _ in range(3):
            with guest.share_pages(BACKEND, 2, writable=True) as shared:
                assert [FIRST_REFERENCE, FIRST_REFERENCE + 1] == list(shared.refs)

    def test_a_refused_batch_leaves_nothing_mapped(self, backend, guest):
        with guest.share_pages(BACKEND, 2, writable=True) as shared:
            refused(backend.map_grants, GUEST, [*shared.refs, 400], writable=True)
            assert (0, 0, 0) == (
                backend.mapped_pages,
                backend.counters.maps,
                guest.in_use(shared.refs),
            )


class TestCopying:
    def test_it_maps_nothing_and_is_counted(self, backend, guest):
        with guest.share_pages(BACKEND, 2, writable=True) as shared:
            pieces = [Piece(ref, 0, 8) for ref in shared.refs]
            backend.copy_to_grants(GUEST, pieces, memoryview(bytearray(b"abcdefghijklmnop")))
            backend.copy_from_grants(GUEST, pieces, memoryview(bytearray(16)))
            assert (b"abcdefgh", b"ijklmnop") == (shared.view[:8], shared.view[4096:4104])
            assert (2, 0, 0) == (
                backend.counters.copies,
                backend.counters.maps,
                guest.in_use(shared.refs),
            )

    @pytest.mark.parametrize("copy", ["copy_from_grants", "copy_to_grants"])
    def test_what_the_hook_raises_is_what_the_caller_sees(self, backend, guest, copy):
        seen = []

        def refuse(domid, refs, writable):
            seen.append((domid, tuple(refs), writable))
            raise HypervisorError(errno.EAGAIN, "not now")

        backend.before_copy = refuse
        with guest.share_pages(BACKEND, 2, writable=True) as shared:
            pieces = [Piece(ref, 0, 8) for ref in shared.refs]
            memory = memoryview(bytearray(b"x" * 16))
            assert errno.EAGAIN == refused(getattr(backend, copy), GUEST, pieces, memory)
            assert [(GUEST, tuple(shared.refs), copy == "copy_to_grants")] == seen
            assert (bytes(8192), b"x" * 16, 0) == (shared.view, memory, backend.counters.copies)

    def test_one_wrong_reference_copies_nothing(self, backend, guest):
        with guest.share_pages(BACKEND, 1, writable=True) as shared:
            pieces = [Piece(shared.refs[0], 0, 8), Piece(400, 0, 8)]
            memory = memoryview(bytearray(b"x" * 16))
            assert errno.EINVAL == refused(backend.copy_to_grants, GUEST, pieces, memory)
            assert bytes(4096) == shared.view


class TestMemory:
    @pytest.mark.parametrize(
        "order", [[0], [0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0, 3], [2, 2, 2], [0, 2, 3, 1, 1]]
    )
    def test_pages_come_in_the_order_asked_for(self, backend, guest, order):
        with guest.share_pages(BACKEND, 4, writable=True) as shared:
            for page in range(4):
                shared.view[page * PAGE_SIZE] = shared.view[(page + 1) * PAGE_SIZE - 1] = page
            refs = [shared.refs[page] for page in order]
            with backend.map_grants(GUEST, refs, writable=False) as mapping:
                assert order == list(mapping.view[::PAGE_SIZE])
                assert order == list(mapping.view[PAGE_SIZE - 1 :: PAGE_SIZE])

    def test_scattered_pages_can_be_written(self, backend, guest):
        with guest.share_pages(BACKEND, 3, writable=True) as shared:
            with backend.map_grants(GUEST, shared.refs[::-2], writable=True) as mapping:
                mapping.view[:] = b"a" * PAGE_SIZE + b"b" * PAGE_SIZE
            assert b"b" * PAGE_SIZE + bytes(PAGE_SIZE) + b"a" * PAGE_SIZE == bytes(shared.view)

    def test_used_pages_are_zero_when_shared_again(self, guest):
        with guest.share_pages(BACKEND, 2, writable=True) as shared:
            shared.view[:] = b"x" * len(shared.view)
        with guest.share_pages(BACKEND, 3, writable=True) as shared:
            assert bytes(3 * PAGE_SIZE) == bytes(shared.view)

    def test_it_is_really_unmapped(self, backend, guest):
        with guest.share_pages(BACKEND, 3, writable=True) as shared:
            mapping = backend.map_grants(GUEST, shared.refs, writable=True)
            start = f"{mapping.address:x}-"
            with open("/proc/self/maps") as maps:
                assert [start] == [start for line in maps if line.startswith(start)]
            mapping.close()
            with open("/proc/self/maps") as maps:
                assert [] == [line for line in maps if line.startswith(start)]

    def test_a_read_only_mapping_is_read_only_for_the_processor_too(self, backend, guest):
        with guest.share_pages(BACKEND, 1, writable=True) as shared:
            mapping = backend.map_grants(GUEST, shared.refs, writable=False)
            start = f"{mapping.address:x}-"
            with open("/proc/self/maps") as maps:
                assert ["r--s"] == [line.split()[1] for line in maps if line.startswith(start)]
            mapping.close()

    def test_a_guest_that_shares_all_it_has_is_told_when_there_is_no_more(self, guest):
        with guest.share_pages(BACKEND, 500, writable=True):
            assert errno.ENOSPC == refused(guest.share_pages, BACKEND, 13, writable=True)
            guest.share_pages(BACKEND, 12, writable=True).close()
        guest.share_pages(BACKEND, 512, writable=True).close()

    def test_sharing_nothing_is_refused(self, guest):
        assert errno.ENOSPC == refused(guest.share_pages, BACKEND, 0, writable=True)


class TestRevoking:
    def test_what_is_mapped_is_still_in_use(self, backend, guest):
        shared = guest.share_pages(BACKEND, 3, writable=True)
        mapping = backend.map_grants(GUEST, shared.refs[:2], writable=True)
        assert 2 == guest.in_use(shared.refs)
        with pytest.raises(HypervisorError, match="2 of 3 granted pages are still in use"):
            shared.close()
        backend.map_grants(GUEST, shared.refs, writable=True).close()  # it stays granted
        mapping.close()
        assert 0 == guest.in_use(shared.refs)
        shared.close()

    def test_the_guest_may_go_first_and_come_back(self, machine, backend):
        guest = SimulatedGuest(machine)
        shared = guest.share_pages(BACKEND, 1, writable=True)
        mapping = backend.map_grants(GUEST, shared.refs, writable=True)
        with pytest.raises(HypervisorError, match="in use"):
            guest.close()
        mapping.view[0] = 1  # still our page
        mapping.close()
        guest.close()

    def test_a_page_is_never_mapped_after_its_revocation_succeeded(
        self, backend, guest, switch_often
    ):
        stop = threading.Event()
        held = []  # not empty: surely mapped
        outcomes = set()

        def keep_mapping():
            while not stop.is_set():
                try:
                    mapping = backend.map_grants(GUEST, [FIRST_REFERENCE], writable=True)
                except HypervisorError:
                    outcomes.add("refused")
                else:
                    held.append(True)
                    outcomes.add("mapped")
                    held.clear()
                    mapping.close()

        thread = threading.Thread(target=keep_mapping)
        thread.start()
        try:
            for _ in range(60):
                shared = guest.share_pages(BACKEND, 1, writable=True)
                while True:
                    try:
                        shared.close()
                    except HypervisorError:
                        continue
                    assert [] == held
                    break
        finally:
            stop.set()
            thread.join()
        assert 0 == backend.mapped_pages
        assert outcomes


class TestBookkeeping:
    def test_operations_are_counted(self, backend, guest):
        with guest.share_pages(BACKEND, 5, writable=True) as shared:
            one = backend.map_grants(GUEST, shared.refs, writable=True)
            two = backend.map_grants(GUEST, shared.refs[:2], writable=True)
            assert (2, 0, 7) == (
                backend.counters.maps,
                backend.counters.unmaps,
                backend.mapped_pages,
            )
            one.close()
            assert 2 == backend.mapped_pages
            two.close()
        channel = guest.bind_unbound(BACKEND)
        end = backend.bind_interdomain(GUEST, channel.port)
        end.notify()
        channel.notify()
        assert (2, 2, 1, 0) == (
            backend.counters.maps,
            backend.counters.unmaps,
            backend.counters.notifications,
            backend.counters.mapped_pages,
        )

    def test_a_fault_can_be_injected(self, backend, guest):
        calls = []

        def fail_the_second(domid, refs, writable):
            calls.append((domid, list(refs), writable))
            if len(calls) == 2:
                raise HypervisorError(errno.ENOMEM, "injected")

        backend.before_map = fail_the_second
        with guest.share_pages(BACKEND, 1, writable=True) as shared:
            refs = list(shared.refs)
            backend.map_grants(GUEST, refs, writable=True).close()
            assert errno.ENOMEM == refused(backend.map_grants, GUEST, refs, writable=False)
            backend.map_grants(GUEST, refs, writable=True).close()
        assert [(GUEST, refs, True), (GUEST, refs, False), (GUEST, refs, True)] == calls
        assert 0 == backend.mapped_pages

    def test_a_thousand_rounds_leave_no_descriptor_and_no_mapping(self, backend, guest):
        def resources():
            with open("/proc/self/maps") as maps:
                return len(os.listdir("/proc/self/fd")), len(maps.readlines())

        with guest.share_pages(BACKEND, 4, writable=True) as shared:
            orders = [shared.refs, shared.refs[::-1], shared.refs[:1]]
            backend.map_grants(GUEST, shared.refs, writable=True).close()
            fds, maps = resources()
            for turn in range(1000):
                backend.map_grants(GUEST, orders[turn % 3], writable=turn % 2 == 0).close()
            fds_now, maps_now = resources()
        assert fds == fds_now
        assert maps_now <= maps + 2  # the allocator may grow

    def test_a_closed_machine_leaves_nothing(self):
        before = len(os.listdir("/proc/self/fd"))
        with SimulatedMachine() as machine, SimulatedHypervisor(machine) as backend:
            with SimulatedGuest(machine) as guest:
                shared = guest.share_pages(0, 2, writable=True)
                backend.map_grants(1, shared.refs, writable=True).close()
            machine.close()
        machine.close()
        assert before >= len(os.listdir("/proc/self/fd"))

    def test_a_kept_buffer_is_reported_when_the_backend_closes(self, machine, guest):
        backend = SimulatedHypervisor(machine)
        shared = guest.share_pages(BACKEND, 1, writable=True)
        mapping = backend.map_grants(GUEST, shared.refs, writable=True)
        kept = mapping.view[:7]
        with pytest.raises(BackendError):
            backend.close()
        kept.release()
        backend.close()
        assert 0 == backend.mapped_pages


class TestEventChannels:
    def test_as_many_as_there_are_can_be_open(self, backend, guest):
        guests = [guest.bind_unbound(BACKEND) for _ in range(CHANNELS)]
        ends = [backend.bind_interdomain(GUEST, channel.port) for channel in guests]
        assert errno.ENOSPC == refused(guest.bind_unbound, BACKEND)
        ports = [channel.port for channel in guests + ends]
        assert len(ports) == len(set(ports))

    def test_a_port_open_for_another_domain_is_refused(self, backend, guest):
        channel = guest.bind_unbound(BACKEND + 1)
        assert errno.EINVAL == refused(backend.bind_interdomain, GUEST, channel.port)

    @pytest.mark.parametrize("port", [0, 15, 16, 24, 64, 2**32 - 1])
    def test_a_port_that_is_not_open_is_refused(self, backend, port):
        assert errno.EINVAL == refused(backend.bind_interdomain, GUEST, port)

    def test_the_port_of_another_domain_is_refused(self, backend, guest):
        channel = guest.bind_unbound(BACKEND)
        assert errno.EINVAL == refused(backend.bind_interdomain, GUEST + 1, channel.port)

    def test_the_backend_may_leave_and_bind_again(self, backend, guest):
        channel = guest.bind_unbound(BACKEND)
        backend.bind_interdomain(GUEST, channel.port).close()
        backend.bind_interdomain(GUEST, channel.port).notify()
        assert is_readable(channel)

    def test_a_channel_used_again_starts_without_events(self, backend, guest):
        channel = guest.bind_unbound(BACKEND)
        end = backend.bind_interdomain(GUEST, channel.port)
        end.notify()
        channel.notify()
        end.close()
        channel.close()
        channel = guest.bind_unbound(BACKEND)
        assert channel.acknowledge() is False

    def test_a_channel_is_not_used_again_before_both_ends_left(self, backend, guest):
        channel = guest.bind_unbound(BACKEND)
        backend.bind_interdomain(GUEST, channel.port)
        channel.close()
        assert channel.port != guest.bind_unbound(BACKEND).port


CHILD = """
import sys
from xen_disk_py.simulated.hypervisor import *

machine = SimulatedMachine.attach(sys.argv[1])
guest = SimulatedGuest(machine)
for line in sys.stdin:
    try:
        result = eval(line)
    except SyntaxError:
        result = exec(line)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    print(repr(result), flush=True)
guest.close()
machine.close()
"""


@pytest.fixture
def child(machine):
    """Return ``call(line)``: what the line gives in a process that is the guest."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, machine.address],
        pass_fds=machine.descriptors,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return eval(process.stdout.readline())

    call.send = lambda line: (process.stdin.write(line + "\n"), process.stdin.flush())
    call.receive = lambda: eval(process.stdout.readline())
    call.process = process
    with process:
        try:
            yield call
            process.stdin.close()
            assert process.wait(30) in {0, -signal.SIGKILL}
        finally:
            process.kill()


class TestAcrossProcesses:
    def test_the_other_process_knows_the_machine(self, child):
        assert (GUEST, BACKEND) == child("machine.domid, machine.backend_domid")

    def test_memory_is_shared(self, backend, child):
        child("shared = guest.share_pages(1, 3, writable=True)")
        child("shared.view[4096:4101] = b'guest'")
        refs = child("shared.refs")
        with backend.map_grants(GUEST, refs[::-1], writable=True) as mapping:
            assert b"guest" == bytes(mapping.view[4096:4101])
            mapping.view[:7] = b"backend"
        assert b"backend" == child("bytes(shared.view[8192:8199])")

    def test_a_grant_is_what_the_guest_made_it(self, backend, child):
        child("shared = guest.share_pages(1, 1, writable=False)")
        refs = child("shared.refs")
        assert errno.EINVAL == refused(backend.map_grants, GUEST, refs, writable=True)
        backend.map_grants(GUEST, refs, writable=False).close()
        child("shared.close()")
        assert errno.EINVAL == refused(backend.map_grants, GUEST, refs, writable=False)

    def test_the_guest_cannot_withdraw_what_is_mapped(self, backend, child):
        child("shared = guest.share_pages(1, 2, writable=True)")
        with backend.map_grants(GUEST, child("shared.refs")[:1], writable=True):
            assert 1 == child("guest.in_use(shared.refs)")
            assert "HypervisorError: 1 of 2 granted pages are still in use: " + os.strerror(
                errno.EBUSY
            ) == child("shared.close()")
        assert child("shared.close()") is None

    def test_a_killed_guest_leaves_its_pages_to_us(self, machine, backend, child):
        child("shared = guest.share_pages(1, 1, writable=True)")
        child("shared.view[:3] = b'bye'")
        with backend.map_grants(GUEST, child("shared.refs"), writable=True) as mapping:
            child.process.kill()
            assert -signal.SIGKILL == child.process.wait()
            assert b"bye" == bytes(mapping.view[:3])

    def test_events_go_both_ways(self, backend, child):
        child("channel = guest.bind_unbound(1)")
        end = backend.bind_interdomain(GUEST, child("channel.port"))
        assert end.acknowledge() is True  # the one that Xen adds
        assert child("channel.acknowledge()") is False
        end.notify()
        assert child("channel.acknowledge(), channel.acknowledge()") == (True, False)
        child("channel.notify()")
        assert is_readable(end)
        assert end.acknowledge() is True
        assert end.acknowledge() is False

    def test_no_event_is_lost_in_many(self, backend, child):
        # Ping-pong: one lost event and both sides wait indefinitely.
        rounds = 2000
        child("import select")
        child("channel = guest.bind_unbound(1)")
        end = backend.bind_interdomain(GUEST, child("channel.port"))
        end.acknowledge()
        child("poll = select.poll()")
        child("poll.register(channel, select.POLLIN)")
        child.send(
            f"[poll.poll(30_000) and channel.acknowledge() and channel.notify()"
            f" for _ in range({rounds})].count(None)"
        )
        poll = select.poll()
        poll.register(end, select.POLLIN)
        for _ in range(rounds):
            end.notify()
            assert poll.poll(30_000)
            assert end.acknowledge()
        assert rounds == child.receive()

    def test_descriptors_of_something_else_are_refused(self):
        with tempfile.TemporaryFile() as file:
            file.write(bytes(PAGE_SIZE))
            file.flush()
            with pytest.raises(HypervisorError, match="no simulated machine"):
                SimulatedMachine.attach(str(file.fileno()))
