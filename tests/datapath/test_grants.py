"""The guest's pages as buffers: kept, copied or mapped, and given back."""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace

import pytest

from xen_disk_py.blkif import READ, WRITE, Transfer, encode_segments
from xen_disk_py.datapath import grants
from xen_disk_py.datapath.grants import PERSISTENT_LIMIT, Grants, GuestPages
from xen_disk_py.datapath.stopwatch import kind
from xen_disk_py.errors import HypervisorError

KEPT = {"persistent": True}
COPIED = {"persistent": False, "grants": Grants.COPY}
MAPPED = {"persistent": False, "grants": Grants.MAP}
every_way = pytest.mark.parametrize("way", [KEPT, COPIED, MAPPED], ids=["kept", "copied", "mapped"])


@pytest.fixture
def make(host):
    made = []

    def make(persistent=True, **options):
        made.append(GuestPages(host.hypervisor, host.DOMID, persistent=persistent, **options))
        return made[-1]

    yield make
    for pages in made:
        pages.close()


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds, to be set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(grants, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def ask(operation, refs, segments=None):
    """Ask for whole pages, or for parts of them; with what it would be read from."""
    firsts, lasts = zip(*(segments or [(0, 7)] * len(refs)))
    sectors = sum(lasts) - sum(firsts) + len(refs)
    request = Transfer(1, operation, 0, sectors, tuple(refs), firsts, lasts)
    return request, encode_segments(list(zip(refs, firsts, lasts)))


def use(pages, refs, operation=READ):
    """Do a request."""
    pages.acquire(*ask(operation, refs)).release(deliver=True)


def some_segments(dice, count):
    return [tuple(sorted(dice.choices(range(8), k=2))) for _ in range(count)]


def places(shared, refs, segments):
    """Say which bytes of the shared pages the segments are."""
    for ref, (first, last) in zip(refs, segments):
        page = 4096 * shared.refs.index(ref)
        yield slice(page + 512 * first, page + 512 * (last + 1))


# -- the same bytes, whichever way ---------------------------------------------------------


@every_way
def test_acquired_buffers_are_the_segments_in_order(host, make, way):
    """And nothing else of the pages is changed by a read."""
    dice = random.Random(1)
    shared = host.share(20)
    pages = make(**way)
    model = bytearray(dice.randbytes(20 * 4096))
    shared.view[:] = model
    for _ in range(60):
        refs = dice.sample(shared.refs, dice.randint(1, 20))
        segments = some_segments(dice, len(refs))
        operation = dice.choice([READ, WRITE])
        acquired = pages.acquire(*ask(operation, refs, segments))
        wanted = list(places(shared, refs, segments))
        if operation == WRITE:
            assert b"".join(model[place] for place in wanted) == b"".join(acquired.buffers)
        else:
            new = dice.randbytes(sum(place.stop - place.start for place in wanted))
            at = 0
            for buffer in acquired.buffers:
                buffer[:] = new[at : at + len(buffer)]
                at += len(buffer)
            del buffer  # else its pages could not be unmapped
            assert at == len(new)
            at = 0
            for place in wanted:
                model[place] = new[at : at + place.stop - place.start]
                at += place.stop - place.start
        acquired.release(deliver=True)
        assert model == shared.view


@every_way
def test_what_is_read_of_pages_is_a_copy(host, make, way):
    shared = host.share(8)
    shared.view[:] = random.Random(2).randbytes(8 * 4096)
    pages = make(**way)
    for refs, length in [((0,), 8), ((3,), 4096), ((7, 0, 2), 3 * 4096), ((1, 2), 4096 + 16)]:
        found = pages.read([shared.refs[index] for index in refs], length)
        whole = b"".join(shared.view[4096 * index :][:4096] for index in refs)
        assert whole[:length] == found
        assert isinstance(found, bytes)
    mapped = 5 if way is KEPT else 0
    assert mapped == host.hypervisor.mapped_pages


# -- which way -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("persistent", "mode", "can_copy", "expected"),
    [
        (True, Grants.AUTO, True, "kept"),
        (True, Grants.AUTO, False, "kept"),
        (False, Grants.AUTO, True, "copied"),
        (False, Grants.AUTO, False, "mapped"),
        (True, Grants.COPY, True, "copied"),
        (False, Grants.COPY, True, "copied"),
        (True, Grants.COPY, False, "mapped"),
        (True, Grants.MAP, True, "mapped"),
        (False, Grants.MAP, False, "mapped"),
    ],
)
def test_which_way_pages_are_got_at(host, make, monkeypatch, persistent, mode, can_copy, expected):
    monkeypatch.setattr(host.hypervisor, "can_copy", can_copy)
    shared = host.share(3)
    counters = host.hypervisor.counters
    pages = make(persistent, grants=mode)
    for turn in range(1, 4):
        acquired = pages.acquire(*ask(WRITE, shared.refs))
        in_use = host.guest.in_use(shared.refs)
        acquired.release(deliver=True)
        found = (counters.maps, counters.copies, in_use, host.guest.in_use(shared.refs))
        assert (
            found
            == {
                "kept": (1, 0, 3, 3),
                "copied": (0, turn, 0, 0),
                "mapped": (turn, 0, 3, 0),
            }[expected]
        )


def test_mapping_for_a_write_needs_no_more_than_reading(host, make):
    shared = host.share(writable=False)
    pages = make(**MAPPED)
    acquired = pages.acquire(*ask(WRITE, shared.refs))
    assert acquired.buffers[0].readonly
    acquired.release(deliver=True)
    with pytest.raises(HypervisorError):
        pages.acquire(*ask(READ, shared.refs))


def test_copying_for_a_write_needs_no_more_than_reading(host, make):
    shared = host.share(writable=False)
    pages = make(**COPIED)
    use(pages, shared.refs, WRITE)
    acquired = pages.acquire(*ask(READ, shared.refs))
    with pytest.raises(HypervisorError):
        acquired.release(deliver=True)


def test_kept_pages_are_writable_and_mapped_once(host, make):
    shared = host.share(6)
    pages = make()
    for _ in range(4):
        acquired = pages.acquire(*ask(WRITE, shared.refs[:4]))
        assert not acquired.buffers[0].readonly
        acquired.release(deliver=True)
    assert host.hypervisor.counters.maps == 1
    use(pages, shared.refs)  # only what is new is mapped
    assert host.hypervisor.counters.maps == 2
    assert host.hypervisor.mapped_pages == len(pages.kept) == 6


def test_one_page_named_twice_is_mapped_once(host, make):
    shared = host.share()
    pages = make(limit=1)
    acquired = pages.acquire(*ask(WRITE, shared.refs * 11))
    assert 11 * 4096 == sum(map(len, acquired.buffers))
    assert host.hypervisor.mapped_pages == len(pages.kept) == 1


# -- buffers that are joined ---------------------------------------------------------------


def runs(sectors):
    """Cut a list of sectors where the next one is not the one behind: the length of each run."""
    lengths = [1]
    for before, sector in zip(sectors, sectors[1:]):
        if sector == before + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


@every_way
def test_what_is_contiguous_is_one_buffer(host, make, way):
    dice = random.Random(3)
    shared = host.share(8)
    pages = make(**way)
    use(pages, shared.refs)  # kept together, so that they lie in this order
    seen = set()
    for _ in range(200):
        count = dice.randint(1, 8)
        start = dice.randint(0, 8 - count)
        indices = dice.choice([range(start, start + count), dice.sample(range(8), count)])
        refs = [shared.refs[index] for index in indices]
        segments = [dice.choice([(0, 7), (0, 3), (4, 7), (2, 2)]) for _ in refs]
        at = indices if way is KEPT else range(count)
        sectors = [
            8 * place + sector
            for place, (first, last) in zip(at, segments)
            for sector in range(first, last + 1)
        ]
        expected = [len(sectors)] if way is COPIED else runs(sectors)
        acquired = pages.acquire(*ask(READ, refs, segments))
        assert expected == [len(buffer) // 512 for buffer in acquired.buffers]
        acquired.release(deliver=True)
        seen.add(len(expected))
    assert seen == {1} if way is COPIED else len(seen) > 4


def test_pages_mapped_apart_are_not_joined(host, make):
    """However near they may lie in memory: each is unmapped by itself."""
    shared = host.share(4)
    pages = make()
    for ref in shared.refs:
        use(pages, [ref])
    assert [4096] * 4 == [len(buffer) for buffer in pages.acquire(*ask(READ, shared.refs)).buffers]


# -- plans ---------------------------------------------------------------------------------


def test_a_request_is_found_again_by_its_descriptors(host, make):
    shared = host.share(12)
    pages = make()
    for segments in ([(0, 7)] * 12, [(1, 2)] * 12):
        request, descriptors = ask(READ, shared.refs, segments)
        acquired = pages.acquire(request, descriptors)
        plan = pages.plans[descriptors]
        assert (request.sectors, kind(12, request.sectors * 512)) == (plan.sectors, plan.kind)
        assert acquired.buffers is plan.buffers
        acquired.release(deliver=True)
        assert plan.buffers  # still
        shared.view[4096 * 5 + 512] = 77
        assert 77 in b"".join(plan.buffers)
    assert 2 == len(pages.plans)
    use(pages, shared.refs)  # the same again
    assert 2 == len(pages.plans)


@pytest.mark.parametrize("way", [COPIED, MAPPED, {"limit": 11}, {"limit": 0}])
def test_what_is_not_kept_is_not_planned(host, make, way):
    shared = host.share(12)
    pages = make(**way)
    use(pages, shared.refs)
    assert {} == pages.plans == pages.kept


def test_plans_are_bounded(host, make, monkeypatch):
    """A guest may use its pages in any order, of which there are many."""
    monkeypatch.setattr(grants, "_PLANNED_SEGMENTS", 100)
    dice = random.Random(4)
    shared = host.share(30)
    pages = make()
    most = 0
    for _ in range(300):
        refs = dice.sample(shared.refs, dice.randint(1, 30))
        request, descriptors = ask(READ, refs)
        acquired = pages.acquire(request, descriptors)
        assert acquired.buffers is pages.plans[grants.key_of(descriptors)].buffers
        planned = sum(1 if isinstance(key, int) else len(key) // 8 for key in pages.plans)
        assert planned <= 100
        most = max(most, planned)
    assert most > 80


# -- the limit -----------------------------------------------------------------------------


def test_the_default_limit():
    assert PERSISTENT_LIMIT == 8224


@pytest.mark.parametrize("can_copy", [True, False])
def test_pages_beyond_the_limit_are_had_for_one_request(host, make, monkeypatch, clock, can_copy):
    monkeypatch.setattr(host.hypervisor, "can_copy", can_copy)
    shared = host.share(6)
    pages = make(limit=4)
    use(pages, shared.refs[:3])
    shared.view[3 * 4096 : 3 * 4096 + 2] = b"hi"
    acquired = pages.acquire(*ask(WRITE, shared.refs[1:6]))  # two too many: none of them is kept
    assert set(shared.refs[:3]) == set(pages.kept)
    assert (3 if can_copy else 8) == host.hypervisor.mapped_pages
    assert b"hi" == b"".join(acquired.buffers)[2 * 4096 :][:2]
    acquired.release(deliver=True)
    assert host.hypervisor.mapped_pages == 3
    assert b"hi" == pages.read(shared.refs[3:6], 2)
    assert host.hypervisor.mapped_pages == 3
    use(pages, shared.refs[5:])
    use(pages, shared.refs[4:5])
    assert set(pages.kept) == {*shared.refs[:3], shared.refs[5]}
    assert host.hypervisor.mapped_pages == 4


def test_the_least_recently_used_leave_after_a_turn(host, make, clock):
    shared = host.share(8)
    pages = make(limit=4)
    old, used, new, newer = (shared.refs[at : at + 2] for at in (0, 2, 4, 6))
    use(pages, old)
    use(pages, used)
    use(pages, new)  # too many; nobody has had the time to show what he needs
    assert {*old, *used} == set(pages.kept)
    assert {} == pages.plans  # who uses one makes it again, and with it shows that he does
    use(pages, used)
    clock.now += 0.9
    use(pages, new)
    assert {*old, *used} == set(pages.kept)
    clock.now += 0.2
    use(pages, new)
    assert {*used, *new} == set(pages.kept)
    assert host.guest.in_use(old) == 0
    assert host.hypervisor.mapped_pages == 4
    clock.now += 2
    use(pages, new)  # is there: nobody has to leave
    use(pages, newer)
    assert {*new, *newer} == set(pages.kept)


def test_a_plan_lives_no_longer_than_its_pages(host, make, clock):
    """Whatever is used when, the limit holds, and each plan's pages are kept."""
    dice = random.Random(5)
    shared = host.share(40)
    shared.view[:] = b"".join(bytes([index]) * 4096 for index in range(40))
    pages = make(limit=16)
    evictions = 0
    for _ in range(1500):
        clock.now += dice.choice([0, 0.1, 0.6])
        count = dice.randint(1, 6)
        near = dice.randrange(34)
        refs = [shared.refs[near + step] for step in dice.sample(range(6), count)]
        before = set(pages.kept)
        if dice.random() < 0.2:
            expected = bytes(ref - shared.refs[0] for ref in refs)
            assert expected == pages.read(refs, count * 4096)[::4096]
        else:
            acquired = pages.acquire(*ask(WRITE, refs))
            expected = bytes(ref - shared.refs[0] for ref in refs)
            assert expected == b"".join(acquired.buffers)[::4096]
            acquired.release(deliver=True)
            del acquired
        evictions += not before <= set(pages.kept)
        assert len(pages.kept) == host.hypervisor.mapped_pages <= 16
        for key in pages.plans:
            descriptors = key.to_bytes(8, "little") if isinstance(key, int) else key
            refs = [
                int.from_bytes(descriptors[at : at + 4], "little")
                for at in range(0, len(descriptors), 8)
            ]
            assert set(refs) <= set(pages.kept)
    assert evictions > 50


def test_pages_that_are_in_use_when_they_leave_are_unmapped_later(host, make, clock, caplog):
    shared = host.share(6)
    pages = make(limit=2)
    acquired = pages.acquire(*ask(READ, shared.refs[:2]))

    def turn(refs):
        clock.now += 2
        use(pages, refs, WRITE)

    turn(shared.refs[2:4])
    turn(shared.refs[2:4])
    assert set(shared.refs[2:4]) == set(pages.kept)
    assert host.guest.in_use(shared.refs[:2]) == 2
    turn(shared.refs[4:])
    turn(shared.refs[4:])
    acquired.buffers[0][:5] = b"there"  # does no harm
    assert host.guest.in_use(shared.refs[:2]) == 2
    acquired.release(deliver=True)
    del acquired
    turn(shared.refs[:1])
    assert host.guest.in_use(shared.refs[1:2]) == 0
    assert b"there" == shared.view[:5]
    assert host.hypervisor.mapped_pages <= 2
    assert [] == [record for record in caplog.records if record.levelname == "WARNING"]


def test_pages_in_use_at_the_end_are_told_of(host, make, clock, caplog):
    shared = host.share(2)
    pages = make()
    acquired = pages.acquire(*ask(READ, shared.refs[:1]))
    use(pages, shared.refs[1:])
    pages.close()
    assert "1 pages stay mapped" in caplog.text
    assert host.hypervisor.mapped_pages == 1
    del acquired
    pages.close()
    assert host.hypervisor.mapped_pages == 0


# -- memory for copies ---------------------------------------------------------------------


def test_memory_is_used_again_and_no_more_than_is_acquired_at_once(host, make):
    shared = host.share(16)
    pages = make(**COPIED)
    seen = set()
    for count in (1, 16, 3, 16, 16, 2):
        one, two = (pages.acquire(*ask(READ, shared.refs[:count])) for _ in range(2))
        assert one.buffers[0].obj is not two.buffers[0].obj
        if count == 16:
            seen |= {id(acquired.buffers[0].obj) for acquired in (one, two)}
        two.release(deliver=True)
        one.release(deliver=True)
    assert len(seen) == len(pages._spare) == 2


@pytest.mark.parametrize("end", ["failed", "short"])
def test_no_request_gets_another_one_s_data(host, make, end):
    """What a backend could not read is not what was in the memory before."""
    secret, page = host.share(), host.share()
    secret.view[:] = b"s" * 4096
    page.view[:] = b"p" * 4096
    pages = make(**COPIED)
    use(pages, secret.refs, WRITE)
    segments = [(0, 7)] if end == "failed" else [(2, 3)]
    acquired = pages.acquire(*ask(READ, page.refs, segments))
    if end == "short":
        assert 1024 == len(acquired.buffers[0])
        acquired.buffers[0][:] = b"d" * 1024
    acquired.release(deliver=end == "short")
    expected = b"p" * 1024 + b"d" * 1024 + b"p" * 2048 if end == "short" else b"p" * 4096
    assert expected == page.view


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_a_copy_that_fails_takes_nothing_with_it(host, make, operation):
    shared = host.share(3)
    pages = make(**COPIED)
    shared.view[:] = b"p" * (3 * 4096)

    def refuse(domid, refs, writable):
        raise HypervisorError(errno.EAGAIN, "cannot copy")

    for _ in range(5):
        host.hypervisor.before_copy = refuse
        with pytest.raises(HypervisorError, match="cannot copy"):
            use(pages, shared.refs, operation)
        host.hypervisor.before_copy = None
        assert b"p" * (3 * 4096) == shared.view
        assert 1 == len(pages._spare)
    acquired = pages.acquire(*ask(operation, shared.refs))
    if operation == WRITE:
        assert b"p" * (3 * 4096) == b"".join(acquired.buffers)
    acquired.release(deliver=False)


# -- what is wrong -------------------------------------------------------------------------


@every_way
def test_a_reference_that_is_none(host, make, way):
    shared = host.share(3)
    pages = make(**way)
    use(pages, shared.refs[:1])
    mapped = host.hypervisor.mapped_pages
    for bad in (3, 5000, 2**32 - 1):
        for place in range(4):
            refs = [*shared.refs[:place], bad, *shared.refs[place:]]
            for operation in (READ, WRITE):
                with pytest.raises(HypervisorError):
                    use(pages, refs, operation)
            with pytest.raises(HypervisorError):
                pages.read(refs, 4 * 4096)
            assert mapped == host.hypervisor.mapped_pages
    use(pages, shared.refs)


def test_a_page_that_somebody_keeps(host, make, caplog):
    shared = host.share(2)
    pages = make(**MAPPED)
    kept = []
    for _ in range(3):
        acquired = pages.acquire(*ask(READ, shared.refs[:1]))
        kept.append(acquired.buffers[0][:3])
        acquired.release(deliver=True)
    assert host.hypervisor.mapped_pages == 3
    assert caplog.text.count("stay mapped") == 1
    kept[0][:3] = b"sin"  # does no harm
    use(pages, shared.refs[1:])
    assert host.hypervisor.mapped_pages == 3
    kept.clear()
    pages.close()
    assert host.hypervisor.mapped_pages == 0


def test_a_kept_page_that_somebody_keeps(host, make, caplog):
    shared = host.share(2)
    pages = make()
    (buffer,) = pages.acquire(*ask(READ, shared.refs[:1])).buffers
    use(pages, shared.refs[1:])
    pages.close()
    assert "1 pages stay mapped" in caplog.text
    assert host.hypervisor.mapped_pages == 1
    del buffer
    host.hypervisor.close()


@every_way
def test_closing_twice(host, make, way):
    shared = host.share(2)
    pages = make(**way)
    use(pages, shared.refs)
    pages.close()
    pages.close()
    assert host.hypervisor.mapped_pages == 0
    assert [] == pages._spare
