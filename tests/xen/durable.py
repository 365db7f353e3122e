"""Run as a program in dom0, which is the guest: writes, flushes, and notes what must be on storage.

Each writer has blocks of its own. A write that was answered OK, and then a flush that was answered
OK, mean that it is on storage, whatever failed before or fails after; a flush that fails means that
what was written since the last one may be there or not. The journal (a file, a
JSON line for each thing that happened) says so while it runs; the last line holds, for each block,
what may be found there.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import threading
from pathlib import Path
from typing import Callable

BLOCK = 4096
WRITES = 12  # before each flush


def content(number: int) -> bytes:
    """Return what a block looks like after a write of that number."""
    return number.to_bytes(8, "big") * (BLOCK // 8)


class Writer(threading.Thread):
    """Writes and flushes one after another, as a database would, until it is told to stop."""

    def __init__(
        self, device: str, blocks: range, first: int, note: Callable[..., None], stop: Path
    ) -> None:
        super().__init__()
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._blocks, self._number, self._note, self._stop_file = blocks, first, note, stop
        self._page = mmap.mmap(-1, BLOCK)
        self.possible: dict[int, list[int]] = {}  # the newest is the last; all of them may be there
        self.answered: dict[int, int] = {}  # since the last flush that was answered OK
        self.durable: set[int] = set()

    def _write(self, block: int) -> None:
        self._number += 1
        self._page[:] = content(self._number)
        before = self.possible.setdefault(block, [0])
        before.append(self._number)
        try:
            done = os.pwrite(self._fd, self._page, block * BLOCK)
        except OSError as error:
            self._note(write=block, error=error.errno)
        else:
            assert done == BLOCK
            self.answered[block] = self._number

    def run(self) -> None:
        dice = random.Random(self._number)
        fresh = list(self._blocks)
        while not self._stop_file.exists():
            for _ in range(WRITES):
                self._write(fresh.pop() if fresh else dice.choice(self._blocks))
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._note(flush="failed", error=error.errno)
                self.answered.clear()  # whether that is there is told once, and was now
                continue
            for block, number in self.answered.items():
                values = self.possible[block]
                del values[: values.index(number)]  # what is older cannot be there any more
                self.durable.add(block)
            self.answered.clear()
            self._note(flush="good", blocks=len(self.durable))


def main(device: str, journal: str, stop: str, writers: int, blocks: int) -> None:
    """Write to the first ``blocks`` of a device until the file ``stop`` is there."""
    lock = threading.Lock()
    with open(journal, "a", encoding="utf-8") as file:

        def note(**what: object) -> None:
            with lock:
                file.write(json.dumps(what) + "\n")
                file.flush()

        each = blocks // writers
        threads = [
            Writer(device, range(n * each, (n + 1) * each), n << 32, note, Path(stop))
            for n in range(writers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = {b: values for thread in threads for b, values in thread.possible.items()}
        note(possible=found, durable=sum(len(thread.durable) for thread in threads))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
