"""The block protocol as Linux's blkfront speaks it, in every way that it can be told to.

Each test has blkfront negotiate something, sees in xenstore that it did, and then moves data both
ways: what the guest reads is what the image holds, what it writes is what the image holds then.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.blkif import (
    FLUSH,
    READ,
    WRITE,
    WRITE_BARRIER,
    X86_32,
    X86_64,
    Abi,
    Connection,
)
from xen_disk_py.simulated.frontend import Frontend

from .disk import Disk, mapped_grants, xen_disk, xenstore_snapshot
from .driver import Driver, drivers
from .guest import PATIENCE, Dom0, Guest, SharedGuest
from .test_integrity import traced

MIB = 1 << 20
PART = 7 * MIB  # a whole number of pieces of 7 sectors, which end within a page

Connect = Callable[..., Disk]


@pytest.fixture(scope="module")
def guest_of() -> Iterator[Callable[[str], Guest]]:
    """Return a function that gives this module's guest of a kind, of two processors."""
    guests: dict[str, SharedGuest] = {}
    with ExitStack() as stack:

        def get(kind: str) -> Guest:
            if kind not in guests:
                guests[kind] = SharedGuest(kind, vcpus=2, memory=256)
                stack.callback(guests[kind].close)
            return guests[kind].get()

        yield get


@pytest.fixture
def kind() -> str:
    """The kind of guest that a test gets unless it says something else."""
    return "pv"


@pytest.fixture
def guest(kind: str, guest_of: Callable[[str], Guest]) -> Guest:
    """The guest of the kind that the test is parametrized with."""
    return guest_of(kind)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of three parts, the first full of noise."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(PART) + bytes(2 * PART))
    return path


@contextmanager
def attached(
    guest: Guest, connect: Connect, image: Path, *arguments: str, **parameters: int
) -> Iterator[Disk]:
    """Have a disk in a guest whose blkfront was loaded with these module parameters."""
    guest.check("dmesg -c > /dev/null")
    guest.load_blkfront(**parameters)
    disk = connect(guest, "--path", image, "--backend", "raw", *arguments)
    guest.wait_for_device(disk.device)
    yield disk
    assert disk.disconnect() == 0, disk.describe()
    guest.wait_gone(disk.device)
    assert "error" not in guest.dmesg().lower(), guest.dmesg()


def published(disk: Disk) -> dict[str, str]:
    """Return what the frontend has published."""
    front = f"/local/domain/{disk.guest.domid}/device/vbd/{disk.number}/"
    return {path[len(front) :]: value for path, value in xenstore_snapshot(front[:-1]).items()}


def queue(disk: Disk, attribute: str) -> int:
    """Return a number that the guest's kernel has of the disk's queue."""
    return int(disk.guest.check(f"cat /sys/block/{disk.device}/queue/{attribute}"))


def copy(disk: Disk, image: Path) -> None:
    """Have the guest copy the disk's first part to the two others, which takes as much reading.

    Large, middle-sized and odd pieces past the page cache, on both processors at once; and all of
    it through the page cache, which makes many requests of the size it likes.
    """
    guest, device = disk.guest, f"/dev/{disk.device}"
    first = image.read_bytes()[:PART]
    read = f"dd if={device} bs=1M count=1 iflag=direct 2>/dev/null | md5sum"
    assert guest.check(read).split()[0] == hashlib.md5(first[:MIB]).hexdigest(), disk.describe()

    def piece(cpu: int, size: int, skip: int, count: int) -> str:
        sizes = f"bs={size} count={count} skip={skip} seek={skip + PART // size}"
        flags = "conv=notrunc iflag=direct oflag=direct"
        return f"(taskset {cpu} dd if={device} of={device} {sizes} {flags} || echo failed) &"

    output = guest.check(
        f"{piece(1, MIB, 0, 4)} {piece(2, 64 << 10, 64, 32)} {piece(2, 3584, 1755, 293)} wait; "
        f"dd if={device} of={device} bs=64k count=112 seek=224 conv=notrunc,fsync || echo failed",
        2 * PATIENCE,
    )
    assert "failed" not in output, output + disk.describe()
    assert image.read_bytes() == first * 3, disk.describe()


def calls(disk: Disk, trace: Path) -> set[str]:
    """Return which of the grant device's calls it takes to do some reads and writes."""
    device = f"/dev/{disk.device}"
    with traced(disk, "ioctl", trace):
        disk.guest.check(f"dd if={device} bs=256k count=1 iflag=direct of=/dev/null")
        disk.guest.check(f"dd if=/dev/zero bs=64k count=1 of={device} oflag=direct conv=notrunc")
    return set(re.findall(r"GNTDEV_(MAP_GRANT_REF|GRANT_COPY)", trace.read_text()))


# -- grants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "persistent", "grants"),
    [
        ("pv", True, "auto"),
        pytest.param("pv", True, "copy", marks=pytest.mark.long),
        ("pv", True, "map"),
        ("pv", False, "auto"),
        pytest.param("pv", False, "copy", marks=pytest.mark.long),
        ("pv", False, "map"),
        ("pvh", True, "auto"),
        ("pvh", False, "auto"),
        ("pvh", False, "map"),
    ],
)
def test_grants(
    persistent: bool,
    grants: str,
    guest: Guest,
    connect: Connect,
    image: Path,
    tmp_path: Path,
    xenstore_unchanged: None,
) -> None:
    """Pages are kept mapped if the guest promises to use them again and we like it so; otherwise
    copied, or mapped and unmapped each time.
    """
    with attached(
        guest, connect, image, "--grants", grants, feature_persistent=int(persistent)
    ) as disk:
        assert published(disk)["feature-persistent"] == str(int(persistent))
        copy(disk, image)
        if persistent and grants == "auto":
            assert mapped_grants(disk.pid) > 32, disk.describe()
            expected = set()
        else:
            assert mapped_grants(disk.pid) == 1, disk.describe()  # the ring
            expected = {"MAP_GRANT_REF" if grants == "map" else "GRANT_COPY"}
        trace = tmp_path / "trace"
        assert calls(disk, trace) == expected, trace.read_text()[:2000]


def test_few_persistent_grants(
    guest: Guest,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """A guest that promises more pages than are kept is served all the same."""
    with attached(guest, connect, image, "--persistent-grants", "64") as disk:
        assert published(disk)["feature-persistent"] == "1"
        copy(disk, image)
        assert 1 < mapped_grants(disk.pid) <= 65, disk.describe()


# -- rings and queues ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "order"), [("pv", 0), ("pv", 4), ("pvh", 4)])
def test_ring_pages(
    order: int,
    guest: Guest,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """A ring of one page, and one of as many as the protocol has."""
    # without persistent grants, so that the ring is all that is mapped
    with attached(guest, connect, image, max_ring_page_order=order, feature_persistent=0) as disk:
        keys = published(disk)
        assert keys.get("ring-page-order", "0") == str(order)
        assert sum(name.startswith("ring-ref") for name in keys) == 1 << order
        assert mapped_grants(disk.pid) == 1 << order
        assert queue(disk, "nr_requests") >= min(32 << order, 256)
        copy(disk, image)


def interrupts(guest: Guest) -> list[int]:
    """Return how often each of the guest's queues was notified."""
    lines = guest.check("grep blkif /proc/interrupts").splitlines()
    return [sum(int(word) for word in line.split() if word.isdigit()) for line in lines]


@pytest.mark.parametrize(("kind", "queues"), [("pv", 1), ("pv", 2), ("pvh", 2)])
def test_queues(
    queues: int,
    guest: Guest,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """A queue for each of the guest's processors, and each of them is used."""
    with attached(guest, connect, image, "--queues", str(queues)) as disk:
        keys = published(disk)
        assert keys.get("multi-queue-num-queues", "1") == str(queues)
        assert sum(name.endswith("event-channel") for name in keys) == queues
        copy(disk, image)
        counts = interrupts(guest)
        assert len(counts) == queues
        assert min(counts) >= 8, counts  # what the first processor alone has asked for in `copy`


# -- segments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wanted", "used"),
    [("pv", 0, 11), ("pv", 32, 32), ("pv", 256, 256), ("pvh", 0, 11), ("pvh", 256, 256)],
)
def test_segments(
    wanted: int,
    used: int,
    guest: Guest,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """Direct requests only, and indirect ones up to what is offered."""
    with attached(guest, connect, image, max_indirect_segments=wanted) as disk:
        assert queue(disk, "max_segments") == used
        copy(disk, image)


def test_segments_of_several_pages(
    guest: Guest,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """Requests whose descriptors need more than one indirect page."""
    with attached(
        guest,
        connect,
        image,
        "--indirect-segments",
        "4096",
        max_indirect_segments=1024,
        feature_persistent=0,  # Linux would set memory aside for every request it could ever make
    ) as disk:
        assert queue(disk, "max_segments") == 1024
        disk.guest.check(f"echo 4096 > /sys/block/{disk.device}/queue/max_sectors_kb")
        copy(disk, image)
        disk.guest.check(f"dd if=/dev/{disk.device} bs=4M count=4 of=/dev/null iflag=direct")
    assert re.search(r"^ *513-1024 +[1-9]", disk.stderr, re.MULTILINE), disk.describe()


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.smoke), "pvh"])
def test_everything_at_once(
    guest: Guest,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """Two queues with larger rings and requests, pages kept mapped.

    Not the largest: Linux sets memory aside for all requests that it could make at once.
    """
    parameters = {"max_ring_page_order": 2, "max_indirect_segments": 64}
    with attached(guest, connect, image, "--queues", "2", **parameters) as disk:
        keys = published(disk)
        assert keys["multi-queue-num-queues"] == "2"
        assert keys["ring-page-order"] == "2"
        assert keys["feature-persistent"] == "1"
        assert sum("ring-ref" in name for name in keys) == 8
        assert queue(disk, "max_segments") == 64
        copy(disk, image)
        assert mapped_grants(disk.pid) > 64, disk.describe()


# -- flush and barrier -----------------------------------------------------------------------------


@pytest.mark.smoke
def test_flushed_data_outlives_the_process(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """What the guest has synced is in the image when the process is killed amid other writes."""
    guest = new_guest("pv")
    first = image.read_bytes()[:PART]
    disk = connect(guest, "--path", image, "--backend", "raw")
    guest.wait_for_device(disk.device)
    device = f"/dev/{disk.device}"
    guest.check(f"dd if={device} of={device} bs=64k count=112 seek=112 conv=notrunc,fsync")
    once = f"dd if=/dev/urandom of={device} bs=64k count=112 seek=224 oflag=direct conv=notrunc"
    job = guest.spawn(f"while {once}; do :; done; exit 1")  # until the first error
    disk.kill()
    assert disk.wait() == -signal.SIGKILL
    assert image.read_bytes()[: 2 * PART] == first * 2
    result = xen_disk("disconnect", guest.name, disk.vdev)
    assert result.returncode == 0, result
    assert job.wait()[0] != 0
    guest.wait_gone(disk.device)


@pytest.fixture
def driver(dom0: Dom0) -> Iterator[Driver]:
    """Return what connects a driver of ours to a disk of dom0's."""
    with drivers(dom0) as start:
        yield start


@pytest.mark.smoke
def test_barrier(connect: Connect, driver: Driver, image: Path, dom0: Dom0, tmp_path: Path) -> None:
    """A barrier stores what came before it, and is done before what comes after it.

    By a driver of ours: Linux has not sent one since 2.6.37, it flushes.
    """
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    frontend = driver(disk)
    assert frontend.features.barrier
    expected = bytearray(image.read_bytes()[:MIB])
    with traced(disk, "fdatasync", tmp_path / "trace"):
        for number in range(64):
            for operation in (WRITE, WRITE_BARRIER):  # each overlaps the one before it
                offset = number * 4096 + operation * 512
                data = os.urandom(8192)
                frontend.submit(operation, offset, data)
                expected[offset : offset + len(data)] = data
        frontend.drain()
        assert image.read_bytes()[:MIB] == expected, disk.describe()
    assert (tmp_path / "trace").read_text().count("fdatasync(") >= 64
    assert frontend.read(0, MIB) == expected
    frontend.disconnect()
    assert disk.disconnect() == 0, disk.describe()


def test_a_flush_with_data(
    connect: Connect, driver: Driver, image: Path, dom0: Dom0, tmp_path: Path
) -> None:
    """The data is written, then stored. By a driver of ours: Linux flushes without any."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    frontend = driver(disk)
    expected = bytearray(image.read_bytes())
    with traced(disk, "fdatasync", tmp_path / "trace"):
        for offset in (512, PART, PART + 4096):
            expected[offset : offset + 8192] = data = os.urandom(8192)
            frontend.submit(FLUSH, offset, data)
            frontend.drain()
            assert image.read_bytes() == expected, disk.describe()
    assert (tmp_path / "trace").read_text().count("fdatasync(") >= 3
    frontend.disconnect()
    assert disk.disconnect() == 0, disk.describe()


class NumberedRing(Frontend):
    """A driver that writes ``ring-ref0`` also where there is one page, as older ones did."""

    def _keys(self, connection: Connection) -> dict[str, str]:
        keys = super()._keys(connection)
        return {"ring-page-order": "0", "ring-ref0": keys.pop("ring-ref"), **keys}


def test_the_other_name_of_a_ring_of_one_page(
    connect: Connect, driver: Driver, image: Path, dom0: Dom0
) -> None:
    """``ring-ref0`` instead of ``ring-ref``, which no Linux writes: by a driver of ours."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    frontend = driver(disk, NumberedRing)
    keys = published(disk)
    assert "ring-ref" not in keys
    assert int(keys["ring-ref0"]) > 0
    assert frontend.read(0, MIB) == image.read_bytes()[:MIB]
    frontend.disconnect()
    assert disk.disconnect() == 0, disk.describe()


def test_a_driver_that_begins_anew(
    connect: Connect, driver: Driver, image: Path, dom0: Dom0
) -> None:
    """As after a crash or kexec, of which the lab's guests have none: it has not closed before."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    mapped = []
    for number in range(4):
        begun = driver(disk)
        data = bytes([number]) * 4096
        begun.write(PART, data)  # one request at a time: one buffer, and the same pages each time
        assert begun.read(PART, 4096) == data
        mapped.append(mapped_grants(disk.pid))
    assert mapped == [mapped[0]] * 4, "what a driver before had is still mapped"
    assert begun.read(0, MIB) == image.read_bytes()[:MIB]
    begun.disconnect()
    assert mapped_grants(disk.pid) == 0
    assert disk.disconnect() == 0, disk.describe()


# -- layouts, sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "abi", [X86_64, pytest.param(X86_32, marks=pytest.mark.smoke)], ids=lambda abi: abi.name
)
def test_layouts(abi: Abi, connect: Connect, driver: Driver, image: Path, dom0: Dom0) -> None:
    """Both layouts of x86, by a driver of ours: the lab has no guest of 32 bits."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    frontend = driver(disk, abi=abi)
    assert published(disk)["protocol"] == abi.name
    content = image.read_bytes()
    assert frontend.read(0, MIB) == content[:MIB]
    frontend.write(PART, content[:MIB])
    frontend.submit(READ, PART, length=4096)
    frontend.drain()
    assert image.read_bytes() == content[:PART] + content[:MIB] + bytes(2 * PART - MIB)
    frontend.disconnect()
    assert disk.disconnect() == 0, disk.describe()
