"""A fuzzer: bytes become slots, a page of descriptors and frontend keys, and the oracle watches.

With atheris (``pip install atheris``) it is guided by coverage, and takes libFuzzer's options;
without, it changes the files of the corpus at random::

    python tests/hostile/fuzz_slots.py -max_total_time=60 [a directory for new inputs]
    python tests/hostile/fuzz_slots.py tests/hostile/corpus/slot-read   # one input again

An input's first byte says what it is: 0 to 5 a layout and a way to the guest's pages, then a
count of slots, the slots, and what stands in the first page; 255 a list of keys, each the number
of a name, the length of a value, the value.
"""

from __future__ import annotations

import contextlib
import logging
import random
import struct
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

try:
    import atheris
except ImportError:
    atheris = None

# atheris counts what is executed in modules that are imported here.
with atheris.instrument_imports() if atheris else contextlib.nullcontext():
    from hostile.attacker import Memory
    from hostile.oracle import READ, Oracle
    from xen_disk_py.blkif import X86_32, X86_64, Connection, Ring, abi_named, decode_response
    from xen_disk_py.datapath.disk import Disk
    from xen_disk_py.datapath.grants import Grants
    from xen_disk_py.datapath.queue import Options, Queue
    from xen_disk_py.errors import GuestMisbehaved
    from xen_disk_py.ring import FrontRing
    from xen_disk_py.simulated.hypervisor import (
        SimulatedGuest,
        SimulatedHypervisor,
        SimulatedMachine,
    )
    from xen_disk_py.xenbus.states import State

ABIS = (X86_64, X86_32)
WAYS = (Grants.AUTO, Grants.COPY, Grants.MAP)
CORPUS = HERE / "corpus"
KEYS = 255
MOST = 20  # indirect segments offered
SECTORS = 256
PAGES = 24  # the last two for reading only; the first holds descriptors

NAMES = [
    "protocol",
    "feature-persistent",
    "ring-page-order",
    "multi-queue-num-queues",
    "state",
    *(f"{where}{name}" for where in ("", "queue-0/", "queue-1/", "queue-2/", "queue-3/")
      for name in ("ring-ref", "ring-ref0", "ring-ref1", "event-channel")),
]  # fmt: skip


class Target:
    """A machine, and for each layout and way a queue whose thread never starts.

    Its requests are served in this thread: the same input always takes the same path.
    """

    def __init__(self):
        self._undo = contextlib.ExitStack()
        enter = self._undo.enter_context
        machine = enter(SimulatedMachine(domid=5, pages=256))
        self.hypervisor = enter(SimulatedHypervisor(machine))
        self.guest = enter(SimulatedGuest(machine))
        shared = enter(self.guest.share_pages(0, PAGES - 2, writable=True))
        fixed = enter(self.guest.share_pages(0, 2, writable=False))
        self.refs = [*shared.refs, *fixed.refs]
        self.views = [
            each.view[at : at + 4096]
            for each in (shared, fixed)
            for at in range(0, len(each.view), 4096)
        ]
        self._undo.callback(self.views.clear)
        self.lines = {(abi, way): self._line(abi, way) for abi in ABIS for way in WAYS}
        self.rings = {ref for *_, refs in self.lines.values() for ref in refs}
        self.first = random.Random(1).randbytes(SECTORS * 512)

    def close(self):
        self._undo.close()

    def _line(self, abi, way):
        """Make a queue; return its ring's other end, itself, its backend, its ring's pages."""
        backend = Memory(SECTORS * 512)
        disk = Disk(backend)
        pages = self._undo.enter_context(self.guest.share_pages(0, 1, writable=True))
        ring = FrontRing(pages.view, abi.slot_size, self.guest.fence)
        self._undo.callback(ring.close)
        channel = self._undo.enter_context(self.guest.bind_unbound(0))
        queue = Queue(
            self.hypervisor,
            5,
            Ring(tuple(pages.refs), channel.port),
            abi,
            disk,
            options=Options(MOST, way),
            persistent=way is Grants.AUTO,
            statistics=disk.statistics.of_queue(0),
            on_failure=print,
        )
        self._undo.callback(queue.stop)
        return ring, queue, backend, pages.refs

    def slots(self, data):
        """Serve slots, and compare all that came of it with the oracle."""
        abi, way = ABIS[data[0] % 2], WAYS[data[0] // 2 % 3]
        ring, queue, backend, _ = self.lines[abi, way]
        count = 1 + data[1] % 8
        size = abi.slot_size
        slots = [data[2 + size * n : 2 + size * (n + 1)].ljust(size, b"\0") for n in range(count)]
        content = data[2 + size * count :][:4096]
        words = (each[: len(each) & ~3] for each in (*slots, content))
        if any(word in self.rings for part in words for (word,) in struct.iter_unpack("<I", part)):
            return  # a guest that has its own ring overwritten: test_checklist does that
        self.views[0][: len(content)] = content
        self.views[0][len(content) :] = bytes(4096 - len(content))
        for number, view in enumerate(self.views[1:], 1):
            view[:512] = bytes([number]) * 512
        backend.data[:] = self.first
        queue._pages.close()  # nothing is known of earlier inputs
        oracle = Oracle(
            padding=size - 108,
            most=MOST,
            sectors=SECTORS,
            pages=[bytearray(view) for view in self.views],
            references={ref: number for number, ref in enumerate(self.refs)},
            keeps=way is Grants.AUTO,
        )
        oracle.disk[:] = self.first
        expected, defined = [], True
        for slot in slots:
            operation, status, todo = oracle.judge(slot)
            expected.append((*struct.unpack_from("<Q", slot, size - 104), operation, status))
            if todo:
                refs = [segment[0] for segment in todo[3]]
                # In which order a read goes to one page twice is not defined.
                defined &= operation != READ or len(set(refs)) == len(refs)
                oracle.do(*todo)
            ring.put(slot)
        ring.push()
        queue._serve(queue._ring.take())
        assert expected == [tuple(decode_response(each)) for each in ring.take()]
        if defined:
            assert oracle.disk == backend.data
            assert oracle.pages == self.views
        assert self.hypervisor.mapped_pages <= len(ABIS) * PAGES + len(self.lines)
        assert not queue._pages._stuck

    def keys(self, data):
        """Read a frontend's keys: values in range, or a refusal in a short printable line."""
        keys, at = {}, 1
        while at + 2 <= len(data):
            length = data[at + 1]
            value = data[at + 2 : at + 2 + length].decode("utf-8", "backslashreplace")
            keys[NAMES[data[at] % len(NAMES)]] = value
            at += 2 + length
        State.parse(keys.get("state"))
        try:
            connection = Connection.from_keys(keys.get, 1, 4)
            abi_named(connection.protocol, "x86_64")
        except GuestMisbehaved as error:
            said = str(error)
        else:
            said = ""
        assert len(said) < 400
        assert said.isprintable()
        if said:
            return
        assert 1 <= len(connection.rings) <= 4
        for ring in connection.rings:
            assert len(ring.refs) in (1, 2)
            assert all(0 <= number < 2**32 for number in (*ring.refs, ring.event_channel))

    def __call__(self, data):
        if len(data) < 2:
            return
        if data[0] == KEYS:
            self.keys(data)
        else:
            self.slots(data)


def mutations(dice):
    """Give inputs made of those of the corpus, without end."""
    corpus = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    known = [bytes([each]) for each in range(8, 8 + PAGES)]  # references, in their first byte
    while True:
        data = bytearray(dice.choice(corpus))
        for _ in range(dice.randint(1, 8)):
            at = dice.randrange(len(data))
            change = dice.randrange(6)
            if change == 0:
                data[at] ^= 1 << dice.randrange(8)
            elif change == 1:
                data[at] = dice.choice([0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 127, 128, 254, 255])
            elif change == 2:
                data[at : at + 1] = dice.choice(known)
            elif change == 3:
                data[at : at + 8] = dice.randbytes(8)
            elif change == 4:
                other = dice.choice(corpus)
                data[at:] = other[at:]
            else:
                data[at:at] = data[at : at + 112]
        yield bytes(data or b"\0\0")


def main(arguments):
    """Fuzz as the options say; libFuzzer's, of which the simple loop knows two."""
    logging.disable(logging.CRITICAL)
    target = Target()
    if atheris:
        directories = [each for each in arguments if not each.startswith("-")]
        if not directories:
            arguments = [*arguments, str(CORPUS)]
        atheris.Setup([sys.argv[0], "-max_len=2048", *arguments], target)
        atheris.Fuzz()
        return
    options = dict(each[1:].split("=") for each in arguments if each.startswith("-"))
    for path in (each for each in arguments if not each.startswith("-")):
        if Path(path).is_file():
            target(Path(path).read_bytes())
    end = time.monotonic() + float(options.get("max_total_time", 60))
    runs = 0
    for data in mutations(random.Random(int(options.get("seed", 1)))):
        if time.monotonic() >= end:
            break
        try:
            target(data)
        except BaseException:
            Path("crash").write_bytes(data)
            raise
        runs += 1
    target.close()
    print(f"{runs} inputs without atheris (pip install atheris: guided by coverage)")


if __name__ == "__main__":
    main(sys.argv[1:])
