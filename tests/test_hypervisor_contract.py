"""What a backend may rely on, whichever hypervisor is under it."""

import os
import random
import select

import pytest
import xen_stub

from xen_disk_py.errors import BackendError, HypervisorError
from xen_disk_py.hypervisor import PAGE_SIZE, Piece
from xen_disk_py.libxen import GNTALLOC, GNTDEV, Xen
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine


class Host:
    """Both sides, and what each calls the other."""

    def __init__(self, backend, guest, backend_domid, guest_domid, patience=0.002):
        self.backend = backend
        self.guest = guest
        self.backend_domid = backend_domid
        self.guest_domid = guest_domid
        self.patience = patience  # seconds in which an event that is to come has come

    def share(self, count, writable=True):
        return self.guest.share_pages(self.backend_domid, count, writable=writable)

    def map(self, refs, writable=True):
        return self.backend.map_grants(self.guest_domid, refs, writable=writable)

    def channel(self):
        """Return a bound channel, the backend's end and the guest's, with nothing pending."""
        guest = self.guest.bind_unbound(self.backend_domid)
        backend = self.backend.bind_interdomain(self.guest_domid, guest.port)
        for end in (backend, guest):
            while is_readable(end, self.patience):
                end.acknowledge()
        return backend, guest


def is_readable(channel, seconds=30.0):
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory):
    return xen_stub.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture(params=["simulated", "stub", pytest.param("xen", marks=pytest.mark.xen)])
def host(request, monkeypatch):
    if request.param == "simulated":
        with (
            SimulatedMachine(domid=5, backend_domid=2) as machine,
            SimulatedHypervisor(machine) as backend,
            SimulatedGuest(machine) as guest,
        ):
            yield Host(backend, guest, 2, 5)
        return
    if request.param == "stub":
        xen_stub.install(monkeypatch, request.getfixturevalue("stub_library"))
    else:
        for path in ("/proc/xen", GNTDEV.path, GNTALLOC.path):
            if not os.path.exists(path):
                pytest.skip(f"no Xen dom0 here: {path} does not exist")
    with Xen() as both:  # domain 0 is its own guest
        yield Host(both, both, 0, 0, patience=0.05 if request.param == "xen" else 0.002)


class TestGrants:
    def test_shared_pages_are_zero_at_first(self, host):
        with host.share(3) as shared:
            assert bytes(3 * PAGE_SIZE) == bytes(shared.view)

    def test_each_page_has_a_reference_of_its_own_and_none_is_reserved(self, host):
        with host.share(4) as shared:
            assert 4 == len(set(shared.refs))
            assert [] == [ref for ref in shared.refs if ref < 2]

    def test_pages_are_mapped_in_the_order_of_the_references(self, host):
        with host.share(5) as shared:
            for page in range(5):
                shared.view[page * PAGE_SIZE] = 10 + page
            order = [3, 0, 4, 1]
            with host.map([shared.refs[page] for page in order]) as mapping:
                assert 4 * PAGE_SIZE == len(mapping.view)
                assert [13, 10, 14, 11] == list(mapping.view[::PAGE_SIZE])

    def test_one_memory_is_seen_from_both_sides(self, host):
        with host.share(2) as shared, host.map(shared.refs) as mapping:
            mapping.view[PAGE_SIZE : PAGE_SIZE + 5] = b"hello"
            assert b"hello" == bytes(shared.view[PAGE_SIZE : PAGE_SIZE + 5])
            shared.view[0:3] = b"you"
            assert b"you" == bytes(mapping.view[0:3])

    def test_a_single_page_is_mapped_like_many(self, host):
        with host.share(1) as shared, host.map(shared.refs) as mapping:
            mapping.view[PAGE_SIZE - 1] = 7
            assert 7 == shared.view[PAGE_SIZE - 1]

    def test_words_can_be_addressed(self, host):
        with host.share(1) as shared, host.map(shared.refs) as mapping:
            words = mapping.view.cast("I")
            words[3] = 0xDEADBEEF
            assert 0xDEADBEEF.to_bytes(4, "little") == bytes(shared.view[12:16])
            words.release()

    def test_a_mapping_for_reading_cannot_be_written(self, host):
        with host.share(2) as shared, host.map(shared.refs, writable=False) as mapping:
            shared.view[9] = 1
            assert 1 == mapping.view[9]
            assert mapping.view.readonly
            with pytest.raises(TypeError):
                mapping.view[9] = 2

    def test_pages_granted_for_reading_can_be_mapped_for_reading_only(self, host):
        with host.share(2, writable=False) as shared:
            with host.map(shared.refs, writable=False) as mapping:
                assert mapping.view.readonly
            with pytest.raises(HypervisorError):
                host.map(shared.refs, writable=True)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_one_wrong_reference_among_good_ones_maps_nothing(self, host, place):
        with host.share(2) as shared:
            refs = list(shared.refs)
            refs.insert(place, 0xFFFFFFF0)
            with pytest.raises(HypervisorError) as caught:
                host.map(refs)
            assert caught.value.errno != 0
            with host.map(shared.refs):
                pass

    def test_no_reference_at_all_is_refused(self, host):
        with pytest.raises(HypervisorError):
            host.map([])

    def test_the_pages_of_another_domain_are_out_of_reach(self, host):
        with host.share(1) as shared, pytest.raises(HypervisorError):
            host.backend.map_grants(host.guest_domid + 77, shared.refs, writable=True)

    def test_a_page_may_be_mapped_twice(self, host):
        with host.share(1) as shared, host.map(shared.refs) as one, host.map(shared.refs) as two:
            one.view[0] = 5
            assert 5 == two.view[0]

    def test_closing_twice_is_harmless(self, host):
        shared = host.share(1)
        mapping = host.map(shared.refs)
        for _ in range(2):
            mapping.close()
        for _ in range(2):
            shared.close()

    def test_a_closed_mapping_has_no_bytes(self, host):
        with host.share(1) as shared:
            mapping = host.map(shared.refs)
            mapping.close()
            with pytest.raises(ValueError, match="released"):
                mapping.view[0]

    def test_pages_stay_mapped_while_a_slice_is_held(self, host):
        with host.share(2) as shared:
            mapping = host.map(shared.refs)
            kept = mapping.view[PAGE_SIZE:]
            with pytest.raises(BackendError, match="2 pages stay mapped"):
                mapping.close()
            shared.view[PAGE_SIZE] = 99
            assert 99 == kept[0]
            kept.release()
            mapping.close()

    def test_closing_the_hypervisor_closes_what_is_open(self, host):
        shared = host.share(2)
        mapping = host.map(shared.refs)
        backend, guest = host.channel()
        host.backend.close()
        host.guest.close()
        for view in (mapping.view, shared.view):
            with pytest.raises(ValueError, match="released"):
                bytes(view)
        for channel in (backend, guest):
            with pytest.raises(HypervisorError):
                channel.notify()

    def test_two_hundred_rounds_leave_no_descriptor_and_no_mapping(self, host):
        def resources():
            with open("/proc/self/maps") as maps:
                return len(os.listdir("/proc/self/fd")), len(maps.readlines())

        with host.share(4) as shared:
            host.map(shared.refs).close()
            before = resources()
            for _ in range(200):
                host.map(shared.refs[::-1]).close()
            fds, maps = resources()
        assert before[0] == fds
        assert maps <= before[1] + 2  # the allocator may grow


class TestCopying:
    """As mapping does, but nothing is mapped."""

    @staticmethod
    def some_pieces(dice, refs):
        pieces = []
        for ref in dice.choices(refs, k=dice.randint(1, 40)):
            offset = dice.randrange(PAGE_SIZE)
            pieces.append(Piece(ref, offset, dice.randint(1, PAGE_SIZE - offset)))
        return pieces

    @staticmethod
    def place(shared, piece):
        start = PAGE_SIZE * shared.refs.index(piece.ref) + piece.offset
        return slice(start, start + piece.length)

    def test_it_can_be_done(self, host):
        assert host.backend.can_copy

    def test_pieces_come_one_after_the_other(self, host):
        dice = random.Random(1)
        with host.share(5) as shared:
            shared.view[:] = dice.randbytes(5 * PAGE_SIZE)
            for _ in range(30):
                pieces = self.some_pieces(dice, shared.refs)
                expected = b"".join(bytes(shared.view[self.place(shared, p)]) for p in pieces)
                memory = bytearray(len(expected))
                host.backend.copy_from_grants(host.guest_domid, pieces, memoryview(memory))
                assert expected == memory

    def test_pieces_are_filled_and_nothing_else_is(self, host):
        dice = random.Random(2)
        with host.share(5) as shared:
            model = bytearray(shared.view)
            for _ in range(30):
                pieces = self.some_pieces(dice, shared.refs)
                memory = bytearray(dice.randbytes(sum(piece.length for piece in pieces)))
                host.backend.copy_to_grants(host.guest_domid, pieces, memoryview(memory))
                at = 0
                for piece in pieces:
                    model[self.place(shared, piece)] = memory[at : at + piece.length]
                    at += piece.length
                assert model == bytes(shared.view)

    def test_from_a_part_of_memory(self, host):
        memory = bytearray(b"0123456789")
        with host.share(1) as shared:
            piece = Piece(shared.refs[0], 7, 3)
            host.backend.copy_to_grants(host.guest_domid, [piece], memoryview(memory)[4:7])
            assert b"\0" * 7 + b"456" + b"\0" == bytes(shared.view[:11])
            host.backend.copy_from_grants(host.guest_domid, [piece], memoryview(memory)[:3])
        assert b"4563456789" == memory

    def test_pages_granted_for_reading_can_be_copied_from_only(self, host):
        with host.share(1, writable=False) as shared:
            shared.view[:2] = b"ro"
            memory = bytearray(2)
            pieces = [Piece(shared.refs[0], 0, 2)]
            host.backend.copy_from_grants(host.guest_domid, pieces, memoryview(memory))
            assert b"ro" == memory
            with pytest.raises(HypervisorError):
                host.backend.copy_to_grants(host.guest_domid, pieces, memoryview(bytearray(2)))
            assert b"ro" == bytes(shared.view[:2])

    @pytest.mark.parametrize("copy", ["copy_from_grants", "copy_to_grants"])
    def test_a_wrong_reference_or_domain_is_refused(self, host, copy):
        with host.share(2) as shared:
            copy, good = getattr(host.backend, copy), [Piece(ref, 0, 1) for ref in shared.refs]
            for place in range(3):
                pieces = [*good[:place], Piece(0xFFFFFFF0, 0, 1), *good[place:]]
                with pytest.raises(HypervisorError) as caught:
                    copy(host.guest_domid, pieces, memoryview(bytearray(3)))
                assert caught.value.errno != 0
            with pytest.raises(HypervisorError):
                copy(host.guest_domid + 77, good, memoryview(bytearray(2)))
            copy(host.guest_domid, good, memoryview(bytearray(2)))


class TestEvents:
    def test_an_event_of_the_guest_wakes_the_backend_once(self, host):
        backend, guest = host.channel()
        assert not is_readable(backend, seconds=0)
        guest.notify()
        assert is_readable(backend)
        assert backend.acknowledge() is True
        assert backend.acknowledge() is False
        assert not is_readable(backend, host.patience)

    def test_an_event_of_the_backend_wakes_the_guest_once(self, host):
        backend, guest = host.channel()
        backend.notify()
        assert is_readable(guest)
        assert guest.acknowledge() is True
        assert guest.acknowledge() is False

    def test_nobody_wakes_himself(self, host):
        _, guest = host.channel()
        guest.notify()
        assert not is_readable(guest, host.patience)

    def test_several_events_may_be_delivered_as_one_but_never_as_none(self, host):
        backend, guest = host.channel()
        for _ in range(50):
            for _ in range(3):
                guest.notify()
            assert is_readable(backend)
            while backend.acknowledge():
                pass

    def test_an_event_sent_after_acknowledging_is_a_new_one(self, host):
        backend, guest = host.channel()
        for _ in range(20):
            guest.notify()
            assert is_readable(backend)
            assert backend.acknowledge()
            guest.notify()
            assert is_readable(backend)
            assert backend.acknowledge()

    def test_channels_are_independent(self, host):
        one, _ = host.channel()
        two, other_guest = host.channel()
        other_guest.notify()
        assert is_readable(two)
        assert not is_readable(one, host.patience)

    def test_an_event_sent_before_the_backend_was_there_is_not_lost(self, host):
        guest = host.guest.bind_unbound(host.backend_domid)
        guest.notify()
        backend = host.backend.bind_interdomain(host.guest_domid, guest.port)
        assert is_readable(backend)

    def test_a_port_that_nobody_opened_is_refused(self, host):
        with pytest.raises(HypervisorError):
            host.backend.bind_interdomain(host.guest_domid, 1_000_000)

    def test_a_port_is_bound_once(self, host):
        _, guest = host.channel()
        with pytest.raises(HypervisorError):
            host.backend.bind_interdomain(host.guest_domid, guest.port)

    def test_sending_to_a_guest_that_closed_its_end_is_harmless(self, host):
        backend, guest = host.channel()
        guest.close()
        backend.notify()

    def test_closing_twice_is_harmless_and_using_it_afterwards_is_an_error(self, host):
        for channel in host.channel():
            channel.close()
            channel.close()
            for use in (channel.notify, channel.acknowledge, channel.fileno):
                with pytest.raises(HypervisorError):
                    use()

    def test_a_reserved_channel_works_time_after_time(self, host):
        host.backend.reserve(host.guest_domid, 1)
        for _ in range(5):
            backend, guest = host.channel()
            guest.notify()
            assert is_readable(backend)
            assert backend.acknowledge()
            backend.notify()
            assert is_readable(guest)
            backend.close()
            guest.close()

    def test_a_hundred_channels_one_after_another(self, host):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            guest = host.guest.bind_unbound(host.backend_domid)
            with guest, host.backend.bind_interdomain(host.guest_domid, guest.port):
                pass
        assert before >= len(os.listdir("/proc/self/fd"))


def test_the_fence_can_be_called(host):
    assert (None, None) == (host.backend.fence(), host.guest.fence())
