"""What a power cut could leave of an overlay's own file, torn at sectors, opened again."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

from xen_disk_py.backends.overlay import file as file_module
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.trace.powercut import (
    ZEROS,
    Change,
    Flush,
    choice,
    epochs,
    extents_of,
    states_of,
)

SIZE = 256 << 10
SECTOR = 512


class Recorder:
    """Notes what is done to a file, in the order in which it is done."""

    def __init__(self, monkeypatch, *, syncs):
        self.events, self.data = [], bytearray()
        self.acknowledged = []  # with each flush of the guest: what may be read after it
        self._time = 0
        pwrite, pwritev, fdatasync = os.pwrite, os.pwritev, os.fdatasync
        punch = file_module.punch_hole

        def note_write(fd, buffers, offset):
            done = pwritev(fd, buffers, offset)
            note(fd, b"".join(buffers)[:done], offset)
            return done

        def note_one(fd, buffer, offset):
            done = pwrite(fd, buffer, offset)
            note(fd, bytes(buffer)[:done], offset)
            return done

        def note(fd, data, offset):
            start = offset // SECTOR * SECTOR  # the file is read again: what storage has is sectors
            end = -(-(offset + len(data)) // SECTOR) * SECTOR
            self._change(start, end - start, len(self.data))
            self.data += os.pread(fd, end - start, start).ljust(end - start, b"\0")

        def note_punch(fd, offset, length):
            punch(fd, offset, length)
            first, last = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
            if first < last:
                self._change(first, last - first, ZEROS)

        def note_sync(fd):
            if syncs:
                fdatasync(fd)
                self.events.append(Flush(*self._tick()))

        monkeypatch.setattr(os, "pwrite", note_one)
        monkeypatch.setattr(os, "pwritev", note_write)
        monkeypatch.setattr(os, "fdatasync", note_sync)
        monkeypatch.setattr(file_module, "punch_hole", note_punch)

    def _tick(self):
        self._time += 2
        return self._time, self._time + 1

    def _change(self, offset, length, source):
        self.events.append(Change(len(self.events), *self._tick(), offset, length, source))

    @property
    def now(self):
        return self._time + 2


def work(disk, recorder, image, dice):
    """Write, discard and flush; note what each sector may be after a power cut, from when on."""
    model = bytearray(image)
    allowed = [{bytes(model[at : at + SECTOR])} for at in range(0, SIZE, SECTOR)]
    told = [(0, [set(each) for each in allowed])]
    for step in range(60):
        offset = dice.randrange(SIZE // SECTOR - 16) * SECTOR
        end = offset + dice.choice((1, 3, 8, 16)) * SECTOR
        if dice.randrange(2):  # as most requests of a guest are: one block
            offset = offset // 4096 * 4096
            end = offset + 4096
        kind = dice.choices(("write", "discard", "flush"), (6, 1, 2))[0]
        if kind == "write":
            data = bytes([step + 1]) * (end - offset)
            for at in range(offset, end, SECTOR):
                told[-1][1][at // SECTOR].add(data[:SECTOR])
            disk.write([memoryview(data)], offset)
            model[offset:end] = data
        elif kind == "discard":
            first, last = -(-offset // 4096) * 4096, end // 4096 * 4096
            for at in range(first, last, SECTOR):
                told[-1][1][at // SECTOR] |= {image[at : at + SECTOR], bytes(SECTOR)}
            disk.discard(offset, end - offset)
            if first < last:
                model[first:last] = image[first:last]
        else:
            disk.flush()
            now = [{bytes(model[at : at + SECTOR])} for at in range(0, SIZE, SECTOR)]
            told.append((recorder.now, now))
    return told


def put(content, extents, data):
    for offset, length, source in extents:
        content[offset : offset + length] = (
            bytes(length) if source == ZEROS else data[source : source + length]
        )


def wrong_states(tmp_path, monkeypatch, boot, *, syncs, turns):
    """Return how many states are tried, and which read what cannot be right."""
    dice = random.Random(11)
    image, overlay = tmp_path / "disk.img", tmp_path / "overlay"
    content = b"".join(bytes([200 + at % 50]) * SECTOR for at in range(SIZE // SECTOR))
    image.write_bytes(content)
    OverlayBackend(str(image), overlay=str(overlay)).close()
    stored = bytearray(overlay.read_bytes())
    boot("b")
    with monkeypatch.context() as patch:
        recorder = Recorder(patch, syncs=syncs)
        with closing(OverlayBackend(str(image), overlay=str(overlay))) as disk:
            told = work(disk, recorder, content, dice)
    boot("c")
    tried, wrong = 0, []
    for epoch in epochs(recorder.events):
        put(stored, epoch.stored, recorder.data)
        until = recorder.now if epoch.until is None else epoch.until
        # the newest flush that had been answered by then, and all that was written since
        answered = [allowed for when, allowed in told if when <= max(until, 0)][-1]
        for turn in range(min(turns, states_of(epoch, SECTOR))):
            state = bytearray(stored)
            put(state, extents_of(epoch, choice(epoch, SECTOR, 1, turn), SECTOR), recorder.data)
            tried += 1
            found = read_again(state, image, overlay)
            bad = [
                at
                for at, each in enumerate(answered)
                if found[at * SECTOR : (at + 1) * SECTOR] not in each
            ]
            if bad:
                wrong.append((epoch.number, turn, bad))
    return tried, wrong


def read_again(state: bytearray, image: Path, overlay: Path) -> bytes:
    overlay.write_bytes(state)
    with closing(OverlayBackend(str(image), overlay=str(overlay))) as disk:
        page = memoryview(bytearray(SIZE))
        disk.read([page], 0)
        return bytes(page)


def test_every_state_has_what_was_flushed(tmp_path, monkeypatch, boot):
    tried, wrong = wrong_states(tmp_path, monkeypatch, boot, syncs=True, turns=12)
    assert tried > 100
    assert [] == wrong


def test_an_overlay_that_does_not_wait_for_its_storage_is_found(tmp_path, monkeypatch, boot):
    tried, wrong = wrong_states(tmp_path, monkeypatch, boot, syncs=False, turns=12)
    assert tried
    assert wrong
