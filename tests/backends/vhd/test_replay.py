"""What a crash leaves: every prefix of the writes, and every part of those not flushed yet."""

import contextlib
import itertools
import os
import random

import pytest

from xen_disk_py.backends.vhd import VhdBackend, layout
from xen_disk_py.backends.vhd.chain import Committed
from xen_disk_py.backends.vhd.check import check as vhd_check
from xen_disk_py.backends.vhd.commit import commit
from xen_disk_py.backends.vhd.create import create, create_child

from .conftest import (
    OTHER_UUID,
    UUID,
    build,
    content_of,
    needs,
    qemu_content,
    read,
    run,
    write,
)

SIZE = 32 << 10
BLOCK = 4096
PARENT = b"p" * SIZE


class Recorder:
    """Notes what is done to one file, and what the guest knows of it."""

    def __init__(self, monkeypatch):
        self.events = []
        self._file = None
        pwritev, fdatasync, ftruncate = os.pwritev, os.fdatasync, os.ftruncate

        def is_ours(fd):
            return self._file is not None and os.path.samestat(os.fstat(fd), self._file)

        def note_write(fd, buffers, offset):
            if is_ours(fd):
                self.events.append(("write", offset, b"".join(buffers)))
            return pwritev(fd, buffers, offset)

        def note_sync(fd):
            if is_ours(fd):
                self.events.append(("sync",))
            fdatasync(fd)

        def note_truncate(fd, length):
            if is_ours(fd):
                self.events.append(("truncate", length))
            ftruncate(fd, length)

        monkeypatch.setattr(os, "pwritev", note_write)
        monkeypatch.setattr(os, "fdatasync", note_sync)
        monkeypatch.setattr(os, "ftruncate", note_truncate)

    def watch(self, path):
        self._file = os.stat(path)


def make(tmp_path, kind, gap):
    """A VHD that has a block, partly, with something stale where its bits are clear."""
    stale = b"s" * BLOCK
    if kind == layout.DYNAMIC:
        return build(
            tmp_path / "a.vhd", SIZE, block_size=BLOCK, blocks=[(2, {0, 1}, stale)], gap=gap
        ), bytes(SIZE)
    build(
        tmp_path / "base.vhd",
        SIZE,
        block_size=BLOCK,
        blocks=[(number, set(range(8)), b"p" * BLOCK) for number in range(8)],
    )
    path = build(
        tmp_path / "a.vhd",
        SIZE,
        block_size=BLOCK,
        kind=layout.DIFFERENCING,
        uuid=OTHER_UUID,
        blocks=[(2, {0, 1}, stale)],
        gap=gap,
        parent_uuid=UUID,
        parent_name="base.vhd",
    )
    return path, PARENT


def record(tmp_path, monkeypatch, kind, seed, place=lambda path: path):
    """Have a guest write and flush; return the file before, the events, what it read before.

    Args:
        place: given the VHD, puts it where it is used.
    """
    # With this gap the next block starts where the footer is.
    path, model = make(tmp_path, kind, gap=1024 if seed % 2 else 0)
    path, parents = place(path), str(tmp_path)
    with contextlib.closing(VhdBackend(path, read_only=True, parents=parents)) as disk:
        before = read(disk)
    assert model[:BLOCK] == before[:BLOCK]
    start = content_of(path)
    recorder = Recorder(monkeypatch)
    recorder.watch(path)
    dice = random.Random(seed)
    disk = VhdBackend(path, parents=parents)
    for step in range(9):
        first = dice.choice((0, 1, 7, 8, 16, 17, 18, 19, 23, 40, dice.randrange(60)))
        count = dice.choice((1, 1, 2, 4))
        content = bytes([65 + step]) * 512 * count
        recorder.events.append(("begin", first, count, content[:512]))
        write(disk, first * 512, content)
        recorder.events.append(("answered",))
        if dice.random() < 0.3:
            disk.flush()
            recorder.events.append(("flushed",))
    disk.close()
    monkeypatch.undo()
    return start, recorder.events, before


class Known:
    """What may be read of each sector."""

    def __init__(self, content):
        self.answered = [{content[at : at + 512]} for at in range(0, len(content), 512)]
        self.after_a_crash = [set(each) for each in self.answered]
        self._begun = None

    def see(self, event):
        if event[0] == "begin":
            self._begun = event
            _, first, count, content = event
            for sector in range(first, first + count):
                self.answered[sector] = self.answered[sector] | {content}
                self.after_a_crash[sector] = self.after_a_crash[sector] | {content}
        elif event[0] == "answered":
            _, first, count, content = self._begun
            for sector in range(first, first + count):
                self.answered[sector] = {content}
        elif event[0] == "flushed":
            self.after_a_crash = [set(each) for each in self.answered]


def apply(content, operations):
    content = bytearray(content)
    for operation in operations:
        if operation[0] == "truncate":
            length = operation[1]
            content = content[:length] + bytes(max(0, length - len(content)))
        else:
            _, offset, data = operation
            content += bytes(max(0, offset + len(data) - len(content)))
            content[offset : offset + len(data)] = data
    return bytes(content)


def check(path, content, allowed, what):
    with open(path, "wb") as file:
        file.write(content)
    with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
        found = read(disk)
    for sector, each in enumerate(allowed):
        assert found[sector * 512 : sector * 512 + 512] in each, (what, sector)


@pytest.mark.parametrize("kind", [layout.DYNAMIC, layout.DIFFERENCING])
@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_ends_anywhere(tmp_path, monkeypatch, kind, seed):
    ends_anywhere(tmp_path, *record(tmp_path, monkeypatch, kind, seed))


def ends_anywhere(tmp_path, content, events, before):
    known = Known(before)
    path = str(tmp_path / "a.vhd")
    for number, event in enumerate(events):
        if event[0] in ("write", "truncate"):
            content = apply(content, [event])
        known.see(event)
        check(path, content, known.answered, (number, event[:2]))


@pytest.mark.parametrize("kind", [layout.DYNAMIC, layout.DIFFERENCING])
@pytest.mark.parametrize("seed", range(3))
def test_a_host_that_crashes_anywhere(tmp_path, monkeypatch, kind, seed):
    """Of what was not flushed any part may be on storage, by writes and by single sectors."""
    crashes_anywhere(tmp_path, seed, *record(tmp_path, monkeypatch, kind, seed))


def crashes_anywhere(tmp_path, seed, flushed, events, before):
    known = Known(before)
    path = str(tmp_path / "a.vhd")
    dice = random.Random(seed)
    loose = []
    for number, event in enumerate(events):
        known.see(event)
        if event[0] == "sync":
            flushed, loose = apply(flushed, loose), []
        elif event[0] in ("write", "truncate"):
            loose.append(event)
            for kept in some_parts(loose, dice):
                check(path, apply(flushed, kept), known.after_a_crash, (number, kept))


def some_parts(operations, dice):
    """All parts of a few operations, some of many; and some of their sectors."""
    if len(operations) <= 5:
        for count in range(len(operations) + 1):
            yield from itertools.combinations(operations, count)
    else:
        for _ in range(24):
            yield [each for each in operations if dice.random() < 0.5]
    sectors = []
    for operation in operations:
        if operation[0] == "truncate":
            sectors.append(operation)
        else:
            _, offset, data = operation
            cuts = range(0, len(data), 512)
            sectors += [("write", offset + at, data[at : at + 512]) for at in cuts]
    if len(sectors) > len(operations):
        for _ in range(8):
            yield [each for each in sectors if dice.random() < 0.5]


def test_a_host_that_crashes_while_a_child_is_committed(tmp_path, monkeypatch):
    """Until the child is gone it reads as before, and to commit it again completes it."""
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    build(base, SIZE, block_size=BLOCK, uuid=UUID, blocks=[(0, {0, 1}, b"b" * BLOCK)], gap=512)
    build(
        path,
        SIZE,
        block_size=BLOCK,
        kind=layout.DIFFERENCING,
        uuid=OTHER_UUID,
        blocks=[(0, {1, 2}, b"c" * BLOCK), (2, {5}, b"d" * BLOCK), (5, {0, 7}, b"e" * BLOCK)],
        parent_uuid=UUID,
        parent_name="base.vhd",
    )
    with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
        expected = read(disk)
    child, flushed = content_of(path), content_of(base)
    recorder = Recorder(monkeypatch)
    recorder.watch(base)
    commit(path, keep=False, progress=lambda done, total: None)
    monkeypatch.undo()
    assert not os.path.exists(path)
    dice, loose, states = random.Random(5), [], 0
    for event in recorder.events:
        if event[0] == "sync":
            flushed, loose = apply(flushed, loose), []
            continue
        loose.append(event)
        parts = [*some_parts(loose, dice)]
        for kept in dice.sample(parts, min(3, len(parts))):
            for name, content in ((base, apply(flushed, kept)), (path, child)):
                with open(name, "wb") as file:
                    file.write(content)
            with (
                contextlib.suppress(Committed),  # all of it is in the parent, which says so
                contextlib.closing(VhdBackend(path, read_only=True)) as disk,
            ):
                assert expected == read(disk), (event[:2], kept)
            commit(path, keep=False, progress=lambda done, total: None)
            with contextlib.closing(VhdBackend(base, read_only=True)) as disk:
                assert expected == read(disk), (event[:2], kept)
            assert [] == errors(base), (event[:2], kept)
            states += 1
    assert states > 20
    for kept in ([], loose):  # the child is gone
        with open(base, "wb") as file:
            file.write(apply(flushed, kept))
        with contextlib.closing(VhdBackend(base, read_only=True)) as disk:
            assert expected == read(disk)


def errors(path):
    return [each.text for each in vhd_check(path) if each.is_error]


def test_a_copy_of_the_footer_that_is_old_is_renewed_before_anything_is_written(tmp_path):
    """Who changed the footer, such as a commit or a resize, was killed between the two."""
    path = str(tmp_path / "a.vhd")
    build(path, SIZE, block_size=BLOCK, blocks=[(2, {0}, b"b" * BLOCK)])
    with open(path, "r+b") as file:
        copy = layout.Footer.parse(file.read(layout.FOOTER))
        file.seek(0)
        file.write(copy.with_uuid(OTHER_UUID).raw)
    assert ["the two footers do not match: uuid"] == errors(path)
    before = content_of(path)
    with contextlib.closing(VhdBackend(path, read_only=True)) as disk:
        expected = read(disk)
    assert before == content_of(path)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 0, b"n" * 512)
        assert b"n" * 512 + expected[512:] == read(disk)
    assert [] == errors(path)


# -- what other programs read meanwhile ----------------------------------------------------------

LARGE = 8 << 20
WRITTEN = (5, 6, 4095, 9000)
LOOKED_AT = (0, *WRITTEN, 7, 4096, 16383)


def record_for_others(path, monkeypatch):
    """Have a guest write and flush; return the file before, and the events."""
    content = content_of(path)
    recorder = Recorder(monkeypatch)
    recorder.watch(path)
    disk = VhdBackend(path)
    for sector in WRITTEN:
        new = bytes([sector % 251]) * 512
        recorder.events.append(("begin", sector, 1, new))
        write(disk, sector * 512, new)
        recorder.events.append(("answered",))
        if sector == 6:
            disk.flush()
            recorder.events.append(("flushed",))
    disk.close()
    monkeypatch.undo()
    return content, recorder.events


def agree(found, allowed):
    for sector in LOOKED_AT:
        assert found[sector * 512 : sector * 512 + 512] in allowed[sector], sector


@needs("qemu-img")
def test_qemu_reads_what_a_process_leaves_that_ends_anywhere(tmp_path, monkeypatch):
    path = str(tmp_path / "a.vhd")
    create(path, LARGE)
    content, events = record_for_others(path, monkeypatch)
    known, states = Known(bytes(LARGE)), 0
    for event in events:
        known.see(event)
        if event[0] in ("write", "truncate"):
            content = apply(content, [event])
            with open(path, "wb") as file:
                file.write(content)
            agree(qemu_content(path, tmp_path), known.answered)
            states += 1
    assert states > 8


@needs("qemu-img")
def test_qemu_reads_what_a_host_leaves_that_crashes_anywhere(tmp_path, monkeypatch):
    path = str(tmp_path / "a.vhd")
    create(path, LARGE)
    flushed, events = record_for_others(path, monkeypatch)
    known, states = Known(bytes(LARGE)), 0
    dice, loose = random.Random(5), []
    for event in events:
        known.see(event)
        if event[0] == "sync":
            flushed, loose = apply(flushed, loose), []
        elif event[0] in ("write", "truncate"):
            loose.append(event)
            parts = list(some_parts(loose, dice))
            for kept in dice.sample(parts, min(3, len(parts))):
                with open(path, "wb") as file:
                    file.write(apply(flushed, kept))
                agree(qemu_content(path, tmp_path), known.after_a_crash)
                states += 1
    assert states > 20


@needs("7z")
@needs("vhdiinfo")
def test_others_open_a_child_at_any_moment(tmp_path, monkeypatch):
    """7-Zip reads the chain, libvhdi opens it: both demand a footer at the end."""
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, LARGE)
    with contextlib.closing(VhdBackend(base)) as disk:
        write(disk, 0, b"p" * 4096)
    create_child(path, base)
    content, events = record_for_others(path, monkeypatch)
    known, states = Known(b"p" * 4096 + bytes(LARGE - 4096)), 0
    for event in events:
        known.see(event)
        if event[0] in ("write", "truncate"):
            content = apply(content, [event])
            with open(path, "wb") as file:
                file.write(content)
            run("vhdiinfo", path)
            run("7z", "x", "-y", f"-o{tmp_path}/out", path)
            (image,) = (tmp_path / "out").iterdir()
            agree(content_of(image), known.answered)
            states += 1
    assert states > 8
