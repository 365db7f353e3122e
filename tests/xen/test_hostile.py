"""A guest that means harm, on real Xen: the process lives, others are served, nothing is left.

Domain 0 is its own guest, its driver one of ours whose every byte and every key is the test's.
What the same attacks do to each layer is in tests/hostile, without Xen.
"""

from __future__ import annotations

import os
import random
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from xen_disk_py.blkif import (
    DISCARD,
    ERROR,
    INDIRECT,
    OKAY,
    READ,
    WRITE,
    X86_64,
    Connection,
    Discard,
    Indirect,
    Response,
    Ring,
    Transfer,
    decode_response,
    encode_segments,
)
from xen_disk_py.libxen import Xen
from xen_disk_py.ring import FrontRing
from xen_disk_py.xenbus.states import State
from xen_disk_py.xenbus.xenstore import Store

from .disk import Disk, block_nodes, mapped_grants, open_files, resident, xen_disk
from .driver import frontend_path
from .guest import PATIENCE, RESULTS, Dom0, Guest

MIB = 1 << 20
SIZE = 8 * MIB
SECTORS = SIZE // 512
FLOOD = 5  # seconds
PAGES = 16  # few: the kernel grants 1024 pages on behalf of programs, no more
BAD_REFERENCES = (0, 0x00FF_FFFF, 0xFFFF_FFFF)
TICKS = os.sysconf("SC_CLK_TCK")

Connect = Callable[..., Disk]


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def processor_time(pid: int) -> float:
    """Return the seconds that a process has had of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def report(text: str) -> None:
    """Keep a figure."""
    print(text)
    with (RESULTS / "hostile.txt").open("a") as file:
        file.write(f"{text}\n")


class Attacker:
    """Domain 0's half of a disk.

    Args:
        disk: a running ``connect`` that nobody else looks at.
        persistent: promise to use the same grants again and again.
    """

    def __init__(self, disk: Disk, *, persistent: bool) -> None:
        self.disk = disk
        self.persistent = persistent
        self.front = frontend_path(disk)
        self._undo = ExitStack()
        self.store = self._undo.enter_context(Store.open(timeout=PATIENCE))
        self.xen = self._undo.enter_context(Xen())
        self.back = str(self.store.read(f"{self.front}/backend"))
        self.data = self.xen.share_pages(0, PAGES, writable=True)
        self.refs = list(self.data.refs)
        self.connected = False

    def state(self) -> State | None:
        """Return the backend's."""
        return State.parse(self.store.read(f"{self.back}/state"))

    def switch(self, state: State, expected: State) -> None:
        """Publish a state, and wait for the one that the backend answers with."""
        self.store.write(f"{self.front}/state", str(int(state)))
        until(lambda: self.state() is expected, f"{expected} after {state}")

    def keys(self) -> dict[str, str]:
        """Share a fresh ring; return the keys that lead to it."""
        self.pages = self.xen.share_pages(0, 1, writable=True)
        self.ring = FrontRing(self.pages.view, X86_64.slot_size, self.xen.fence)
        self.channel = self.xen.bind_unbound(0)
        rings = (Ring(tuple(self.pages.refs), self.channel.port),)
        return Connection(rings, X86_64.name, self.persistent).to_keys()

    def connect(self, **changes: str) -> None:
        """Come to Connected, with keys that are right but for ``changes``."""
        for name, value in {**self.keys(), **changes}.items():
            self.store.write(f"{self.front}/{name.replace('_', '-')}", value)
        self.switch(State.INITIALISED, State.CLOSING if changes else State.CONNECTED)
        if not changes:
            self.store.write(f"{self.front}/state", str(int(State.CONNECTED)))
            self.disk.wait_connected()
        self.connected = True

    def leave(self) -> None:
        """Close, and see that nothing is mapped when the backend says Closed."""
        if not self.connected:
            return
        self.connected = False
        self.switch(State.CLOSED, State.CLOSED)
        assert mapped_grants(self.disk.pid) == 0
        self.ring.close()
        self.channel.close()
        self.pages.close()
        self.switch(State.INITIALISING, State.INIT_WAIT)

    def close(self) -> None:
        """Give everything back."""
        self.data.close()
        self._undo.close()

    # -- requests ----------------------------------------------------------------------

    def ask(self, *slots: bytes) -> list[Response]:
        """Put requests, and return their answers."""
        for slot in slots:
            self.ring.put(slot.ljust(X86_64.slot_size, b"\0"))
        if self.ring.push():
            self.channel.notify()
        found: list[Response] = []
        deadline = time.monotonic() + PATIENCE
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        while len(found) < len(slots):
            answers = self.ring.take()
            found.extend(map(decode_response, answers))
            if not answers and not self.ring.arm():
                assert time.monotonic() < deadline, f"{len(found)} answers of {len(slots)}"
                poll.poll(1000)
                self.channel.acknowledge()
        return found

    def works(self) -> bool:
        """Tell whether what it reads is what the image holds."""
        answers = self.ask(transfer(1, READ, 0, self.refs[:8]))
        return [(1, READ, OKAY)] == answers and self.data.view[: 8 * 4096] == image_of(8 * 4096)


def transfer(id_: int, operation: int, sector: int, refs: Sequence[int]) -> bytes:
    """Lay out a request for whole pages."""
    count = len(refs)
    return X86_64.encode(
        Transfer(id_, operation, sector, 8 * count, tuple(refs), (0,) * count, (7,) * count)
    )


def indirect(id_: int, operation: int, sector: int, count: int, ref: int) -> bytes:
    """Lay out an indirect request."""
    return X86_64.encode(Indirect(id_, operation, sector, count, (ref,)))


def image_of(size: int) -> bytes:
    """Return what is in the image: each run of 32 KiB says where it is."""
    return b"".join(n.to_bytes(8, "little") * 4096 for n in range(-(-size // 32768)))[:size]


WAYS = {"kept": (True, "auto"), "copied": (False, "copy"), "mapped": (False, "map")}


@pytest.fixture(scope="module", autouse=True)
def without_blkfront(dom0: Dom0, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take Linux's driver out of dom0 for the time; after it all a disk is as good as ever."""
    dom0.unload_blkfront()
    yield
    dom0.load_blkfront()
    path = tmp_path_factory.mktemp("afterwards") / "disk.raw"
    path.write_bytes(image_of(SIZE))
    with Disk(dom0, "--path", path, "--backend", "raw") as disk:
        dom0.wait_for_device(disk.device)
        sent = dom0.check(f"dd if=/dev/{disk.device} bs=1M iflag=direct 2> /dev/null | sha256sum")
        assert sent == dom0.check(f"sha256sum < {path}")
        assert disk.disconnect() == 0, disk.describe()


@pytest.fixture(params=WAYS, scope="module")
def attacker(
    request: pytest.FixtureRequest,
    dom0: Dom0,
    tmp_path_factory: pytest.TempPathFactory,
    without_blkfront: None,
) -> Iterator[Attacker]:
    """One process of ours for each way to the guest's pages, through all the attacks.

    At the end it has nothing mapped, leaves as ever, and nothing in xenstore. It asks for
    ``without_blkfront`` by name, so that pytest ends it first: else blkfront takes its disk for one
    that is about to connect, and waits 270 s for that.
    """
    persistent, grants = WAYS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "disk.raw"
    path.write_bytes(image_of(SIZE))
    before = set(block_nodes(0))
    command = ("--path", path, "--backend", "raw", "--read-only", "--grants", grants)
    with Disk(dom0, *command, wait=False) as disk:
        made = Attacker(disk, persistent=persistent)
        made.connect()
        yield made
        made.leave()
        assert disk.process.poll() is None, disk.describe()
        assert mapped_grants(disk.pid) == 0
        made.connect()
        assert made.works()
        made.leave()
        assert disk.disconnect() == 0, disk.describe()
        assert set(block_nodes(0)) == before
        made.close()
    assert path.read_bytes() == image_of(SIZE)


@pytest.fixture
def connected(attacker: Attacker) -> Attacker:
    """The attacker with a fresh connection, which works."""
    attacker.leave()
    attacker.connect()
    assert attacker.works()
    return attacker


@pytest.mark.parametrize("ahead", [33, 1 << 31, (1 << 32) - 1])
def test_producer_overflow(connected: Attacker, ahead: int) -> None:
    """The ring is served no longer, which costs nothing, and the next one is."""
    disk = connected.disk
    said = disk.stderr.count("not served any longer")
    with connected.pages.view[:16].cast("I") as indices:
        indices[0] = indices[2] + ahead & 0xFFFF_FFFF
        answered = indices[2]
        connected.channel.notify()
        until(lambda: disk.stderr.count("not served any longer") > said, "the ring is dead")

        def costs() -> float:
            spent = processor_time(disk.pid)
            for _ in range(20):
                connected.channel.notify()
                time.sleep(0.02)
            return processor_time(disk.pid) - spent

        # more than once: a machine that stands still is counted to whoever was running
        assert any(costs() < 0.2 for _ in range(5))
        assert answered == indices[2]
    connected.leave()
    connected.connect()
    assert connected.works()


@pytest.mark.smoke
def test_bad_references(connected: Attacker) -> None:
    """Each is an error of its request, wherever it stands; the others are done."""
    refs, disk = connected.refs, connected.disk
    mapped = mapped_grants(disk.pid)
    for bad in BAD_REFERENCES:
        for place in (0, 5, 10):
            wrong = [*refs[:place], bad, *refs[place + 1 : 11]]
            connected.data.view[12 * 4096 : 12 * 4096 + 88] = encode_segments(
                [(ref, 0, 7) for ref in wrong]
            )
            answers = connected.ask(
                transfer(1, READ, 0, wrong),
                indirect(2, READ, 0, 11, refs[12]),
                indirect(3, READ, 0, 11, bad),
                transfer(4, READ, 0, refs[:11]),
            )
            assert [ERROR, ERROR, ERROR, OKAY] == [answer.status for answer in answers]
    assert mapped_grants(disk.pid) <= mapped + PAGES
    assert connected.works()


@pytest.mark.smoke
def test_double_fetch(connected: Attacker) -> None:
    """Slots, descriptors and data that another thread rewrites all the time: legal answers."""
    refs, view = connected.refs, connected.data.view
    good = encode_segments([(ref, 0, 7) for ref in refs[2:14]])
    lists = [good, encode_segments([(BAD_REFERENCES[1], 9, 200)] * 12), os.urandom(96)]
    slots = [transfer(1, READ, 0, refs[2:10]), indirect(2, READ, 0, 12, refs[0]), os.urandom(112)]
    dice, stop = random.Random(1), threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            view[:96] = dice.choice(lists)
            at = 64 + 112 * dice.randrange(32)
            connected.pages.view[at : at + 112] = dice.choice(slots)
            view[4096 : 2 * 4096] = dice.randbytes(4096)

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        asked, end = 0, time.monotonic() + 2
        while time.monotonic() < end or asked <= 32:
            connected.ask(*slots[:2] * 8)  # what the answers say is overwritten, perhaps
            asked += 16
    finally:
        stop.set()
        scribbler.join()
    view[:96] = good
    assert [(2, READ, OKAY)] == connected.ask(slots[1])
    assert connected.works()


@pytest.mark.smoke
def test_wrong_requests(connected: Attacker) -> None:
    """Ten thousand, or those of 6 s, cost neither descriptors nor mappings nor memory."""
    refs, disk = connected.refs, connected.disk
    connected.data.view[:16] = encode_segments([(refs[1], 3, 2), (BAD_REFERENCES[1], 0, 7)])
    kinds = [
        transfer(1, READ, (1 << 64) - 8, refs[:1]),
        transfer(2, WRITE, 0, refs[:1]),
        struct.pack("<BBH4xQQ", READ, 255, 0, 3, 0),
        X86_64.encode(Discard(4, DISCARD, 0, (1 << 64) - 1, secure=False)),
        indirect(5, READ, 0, 1, refs[0]),
        indirect(6, READ, 0, 65535, refs[0]),
        transfer(7, READ, 0, [BAD_REFERENCES[1]]),
        indirect(8, READ, 0, 1, BAD_REFERENCES[2]),
        struct.pack("<BBH4xQQ", INDIRECT, 255, 1, 9, 0),
        b"\xee" * 112,
    ]

    def batch() -> None:
        answers = connected.ask(*(kinds * 4)[:32])
        assert not any(answer.status == OKAY for answer in answers), answers

    for _ in range(20):
        batch()
    before = len(open_files(disk.pid)), mapped_grants(disk.pid), resident(disk.pid)
    said, start = disk.stderr.count("refused a request"), time.monotonic()
    done = 0
    while done <= 300 or (done < 10_000 and time.monotonic() - start < 6):
        batch()
        done += 32
    seconds = time.monotonic() - start
    after = len(open_files(disk.pid)), mapped_grants(disk.pid), resident(disk.pid)
    assert before[:2] == after[:2]
    assert after[2] - before[2] < MIB
    assert disk.stderr.count("refused a request") - said < 10 + seconds  # one a second
    report(f"{done} wrong requests: {done / seconds:.0f}/s, {after[2] - before[2]} bytes more")
    assert connected.works()


@pytest.mark.parametrize(
    "changes",
    [
        {"ring_ref": "4294967295"},
        {"ring_ref": "4294967296"},
        {"ring_ref": "-1"},
        {"event_channel": "4294967295"},
        {"event_channel": "x" * 2000},
        {"ring_page_order": "5"},
        {"multi_queue_num_queues": "2"},
        {"protocol": "sparc-abi"},
        {"feature_persistent": "%s%n"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("attacker", ["kept"], indirect=True)
def test_keys(attacker: Attacker, changes: dict[str, str]) -> None:
    """They are refused, with nothing mapped; a better try works."""
    attacker.leave()
    attacker.connect(**changes)
    assert mapped_grants(attacker.disk.pid) == 0
    attacker.leave()
    for name in changes:
        attacker.store.remove(f"{attacker.front}/{name.replace('_', '-')}")
    attacker.connect()
    assert attacker.works()


def test_states_back_and_forth(connected: Attacker) -> None:
    """Two hundred times or 6 s, and until it was connected, with requests on the ring: all is in
    order after.
    """
    disk, dice = connected.disk, random.Random(1)
    slot = transfer(1, READ, 0, connected.refs[:8])
    view = connected.pages.view
    files = len(open_files(disk.pid))
    seen = set()
    end = time.monotonic() + 6
    toggles = 0
    while State.CONNECTED not in seen or (toggles < 200 and time.monotonic() < end):
        toggles += 1
        connected.store.write(f"{connected.front}/state", dice.choice("33446615"))
        with view[:16].cast("I") as indices:
            for index in range(4):
                at = 64 + 112 * (indices[2] + index & 31)
                view[at : at + 112] = slot
            indices[0] = indices[2] + 4 & 0xFFFF_FFFF
        connected.channel.notify()
        time.sleep(dice.choice([0, 0, 0.01, 0.1]))
        seen.add(connected.state())
    report(f"{toggles} states of the frontend; of the backend {sorted(map(str, seen))}")
    connected.switch(State.CLOSED, State.CLOSED)  # perhaps of an earlier toggle, while it connects
    connected.switch(State.INITIALISING, State.INIT_WAIT)  # after that, and after all of them
    assert mapped_grants(disk.pid) == 0
    assert len(open_files(disk.pid)) <= files
    connected.leave()
    connected.connect()
    assert connected.works()


@pytest.mark.parametrize("attacker", ["kept"], indirect=True)
def test_event_flood(
    connected: Attacker, pv_guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    """Events without requests, as many as can be sent: little work, no harm to another disk."""
    path = tmp_path / "other.raw"
    path.write_bytes(image_of(SIZE))
    other = connect(pv_guest, "--path", path, "--backend", "raw")
    pv_guest.wait_for_device(other.device)
    read = f"dd if=/dev/{other.device} of=/dev/null bs=64k iflag=direct"

    def took() -> float:
        start = time.monotonic()
        pv_guest.check(read)
        return time.monotonic() - start

    took()
    before = min(took() for _ in range(3))
    stop, sent = threading.Event(), [0]

    def flood() -> None:
        while not stop.is_set():
            connected.channel.notify()
            sent[0] += 1

    pid = connected.disk.pid

    def share() -> float:
        stop.clear()
        sent[0] = 0
        attack = threading.Thread(target=flood)
        spent, start = processor_time(pid), time.monotonic()
        attack.start()
        try:
            during = took()
            time.sleep(max(0.0, FLOOD - (time.monotonic() - start)))
        finally:
            stop.set()
            attack.join()
        seconds = time.monotonic() - start
        spent = processor_time(pid) - spent
        report(
            f"{sent[0] / seconds:.0f} events/s: {spent:.2f} s of the processor in {seconds:.1f} s; "
            f"another disk takes {before:.2f} s before, {during:.2f} s during "
            f"({during / before:.2f})"
        )
        return spent / seconds

    # more than once: a machine that stands still is counted to whoever was running
    assert any(share() < 0.5 for _ in range(3))
    assert connected.works()
    assert other.disconnect() == 0, other.describe()


@pytest.mark.parametrize("connected_before", [True, False])
def test_a_guest_that_floods_its_own_state_does_not_keep_the_disk(
    pv_guest: Guest, connect: Connect, tmp_path: Path, *, connected_before: bool
) -> None:
    """It writes the node that we watch, and that the removal's transaction is about."""
    path = tmp_path / "disk.raw"
    path.write_bytes(image_of(SIZE))
    disk = connect(pv_guest, "--path", path, "--backend", "raw", "--supervise")
    pv_guest.wait_for_device(disk.device)
    front = f"/local/domain/{pv_guest.domid}/device/vbd/{disk.info['number']}"
    state = State.CONNECTED if connected_before else State.INITIALISING
    payload = f"{front}/state\0{int(state)}".encode()
    message = struct.pack("<4I", 11, 0, 0, len(payload)) + payload  # XS_WRITE (xs_wire.h)
    octal = "".join(f"\\{byte:03o}" for byte in message)
    pv_guest.check("rm -f /tmp/enough; mkdir -p /dev/xen; [ -e /dev/xen/xenbus ]")
    once = f"printf '{octal}' >&3; dd bs=4096 count=1 <&3 > /dev/null 2>&1"
    job = pv_guest.spawn(f"exec 3<>/dev/xen/xenbus; until [ -e /tmp/enough ]; do {once}; done")
    try:
        with Store.open(timeout=PATIENCE) as store:
            store.watch(f"{front}/state")
            seen = [0]

            def flooded() -> bool:
                seen[0] += len(store.pending())
                return seen[0] > 50

            start = time.monotonic()
            until(flooded, "no flood")
            report(f"{seen[0] / (time.monotonic() - start):.0f} states/s by a guest")
        start = time.monotonic()
        gone = xen_disk("disconnect", pv_guest.name, disk.vdev, "--force")
        assert gone.returncode == 0, gone
        report(f"disconnected by force in {time.monotonic() - start:.1f} s meanwhile")
        disk.wait()
        assert len(disk.stderr.splitlines()) < 100, disk.stderr[-2000:]
        assert not [n for n in block_nodes(pv_guest.domid) if f"/{disk.info['number']}/" in n]
    finally:
        pv_guest.check("touch /tmp/enough")
        job.wait()
