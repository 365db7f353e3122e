"""``powercut``: after the power has failed, each sector holds what it may, and nothing else."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.blocks import buffers, read, write
from xen_disk_py.backends import Backend, stack
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.loader import open_backend, wrap
from xen_disk_py.errors import UsageError

SECTOR = 512
SECTORS = 32


class Memory(Backend):
    """A disk in memory with a cache of its own: what is stable is what it had at its last flush."""

    def __init__(self, sector_size=SECTOR):
        self.sector_size = sector_size
        self.size = SECTORS * sector_size
        self.data = bytearray(self.size)
        self.fails = False
        self.flushes = 0

    def read(self, buffers, offset):
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, buffers, offset):
        if self.fails:
            raise OSError(errno.EIO, "away")
        for buffer in buffers:
            assert not offset % self.sector_size
            assert not len(buffer) % self.sector_size
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self):
        self.flushes += 1

    def discard(self, offset, length):
        self.data[offset : offset + length] = bytes(length)


class TestPowercut(BackendConformance):
    def open_disk(self, tmp_path):
        path = tmp_path / "disk"
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        return open_backend("raw", {"path": str(path)}, ["powercut:limit=256K"])


def cut(disk):
    stack.change([disk], disk, ["cut=yes"], lambda texts: None)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SECTORS - 1), st.integers(1, 8)),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
        st.tuples(st.just("discard"), st.integers(0, SECTORS - 1), st.integers(1, 8)),
    ),
    max_size=40,
)


def play(steps, options, sector_size=SECTOR):
    """Do the steps; return the disk, and what each sector may hold after a cut."""
    disk = wrap(Memory(sector_size), [f"powercut:{options}"])
    now = [bytes(sector_size)] * SECTORS
    allowed = [{each} for each in now]
    for number, (step, first, most) in enumerate(steps, 1):
        count = min(most, SECTORS - first)
        if step == "write":
            content = [bytes([number, n]) * (sector_size // 2) for n in range(count)]
            write(disk, first * sector_size, b"".join(content))
            now[first : first + count] = content
            for sector in range(first, first + count):
                allowed[sector].add(now[sector])
        elif step == "flush":
            try:
                disk.flush()
            except OSError:
                return disk, allowed  # the power failed in its place
            allowed = [{each} for each in now]
        else:
            disk.discard(first * sector_size, count * sector_size)
            for sector in range(first, first + count):
                now[sector] = bytes(sector_size)
                allowed[sector].add(now[sector])
        assert b"".join(now) == read(disk, 0, disk.size)
    return disk, allowed


def sectors(disk):
    size = disk.sector_size
    return [bytes(disk.source.data[at : at + size]) for at in range(0, disk.size, size)]


@given(steps=STEPS, seed=st.integers(0, 5), limit=st.sampled_from(["1", "3000", "64M"]))
def test_a_sector_holds_what_was_flushed_or_written_since(steps, seed, limit):
    found = []
    for _ in range(2):
        disk, allowed = play(steps, f"seed={seed},limit={limit}")
        cut(disk)
        found.append(sectors(disk))
        for sector, content in enumerate(found[0]):
            assert content in allowed[sector], sector
        assert disk.source.flushes  # it is stable, for whoever opens it next
    assert found[0] == found[1]


@given(steps=STEPS, at=st.integers(1, 4), sector_size=st.sampled_from([512, 4096]))
def test_at_a_flush(steps, at, sector_size):
    disk, allowed = play(steps, f"flush={at},seed=1", sector_size)
    if sum(step == "flush" for step, _, _ in steps) >= at:
        assert all(content in allowed[n] for n, content in enumerate(sectors(disk)))
        with pytest.raises(OSError, match="the power was cut"):
            disk.flush()


def test_some_is_kept_and_some_is_lost_and_some_is_torn():
    fates = set()
    for seed in range(60):
        disk, _ = play([("write", 0, 8)], f"seed={seed}")
        assert not any(disk.source.data)
        cut(disk)
        kept = disk.counters()["kept"]
        assert 8 - kept == disk.counters()["lost"]
        fates.add("all" if kept == 8 else "none" if not kept else "torn")
    assert {"all", "none", "torn"} == fates


def test_what_was_written_last_may_lose_against_what_was_written_first():
    found = set()
    for seed in range(60):
        disk, _ = play([("write", 0, 1), ("write", 0, 1)], f"seed={seed}")
        cut(disk)
        found.add(sectors(disk)[0][0])
    assert {0, 1, 2} == found


@pytest.mark.parametrize("operation", ["read", "write", "flush", "discard"])
def test_the_guest_is_cut_off(operation):
    disk, _ = play([("write", 0, 8)], "seed=1")
    cut(disk)
    before = bytes(disk.source.data)
    call = {
        "read": lambda: disk.read(buffers(bytes(512)), 0),
        "write": lambda: disk.write(buffers(b"x" * 512), 0),
        "flush": disk.flush,
        "discard": lambda: disk.discard(0, 512),
    }[operation]
    with pytest.raises(OSError, match="the power was cut") as raised:
        call()
    assert errno.ENODEV == raised.value.errno  # nobody tries that again
    with pytest.raises(UsageError, match="the power does not come back"):
        stack.change([disk], disk, ["cut=no"], lambda texts: None)
    disk.close()
    assert before == disk.source.data


def test_a_disk_below_that_fails_ends_no_cut(caplog):
    disk, _ = play([("write", 0, 8)] * 5, "seed=2")
    disk.source.fails = True
    cut(disk)
    assert "the disk below failed while the power did" in caplog.text
    with pytest.raises(OSError, match="the power was cut"):
        disk.flush()


def test_what_a_failed_flush_did_not_write_is_written_by_the_next():
    disk, allowed = play([("write", 0, 8)], "seed=2")
    disk.source.fails = True
    with pytest.raises(OSError, match="away"):
        disk.flush()
    disk.source.fails = False
    disk.flush()
    assert all(content in allowed[n] and content[0] for n, content in enumerate(sectors(disk)[:8]))


def test_a_disk_that_is_disconnected_is_written_first():
    disk, _ = play([("write", 0, 8)], "seed=2")
    assert 4096 == disk.counters()["unflushed"]
    assert disk.memory > 4096
    disk.close()
    assert all(content[0] == 1 for content in sectors(disk)[:8])
    assert 1 == disk.source.flushes


def test_memory_is_bounded():
    disk = wrap(Memory(), ["powercut:limit=4K"])
    for number in range(100):
        write(disk, number % 16 * 1024, b"x" * 1024)
        assert disk.memory <= 4096
    assert not disk.survives
