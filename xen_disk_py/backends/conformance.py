"""What every disk must do, as tests that its author can run.

From a shell, with pytest installed; what follows ``--`` goes to pytest::

    python -m xen_disk_py.backends.conformance ./mydisk.py
    python -m xen_disk_py.backends.conformance raw --path copy.img -- -v -x

Or as a part of your own tests::

    from xen_disk_py.backends.conformance import BackendConformance

    class TestMyDisk(BackendConformance):
        def open_disk(self, tmp_path):
            return MyDisk(size=1 << 20)

The tests write all over the disk, and discard parts of it: give them a copy. What is written is
compared with what is read unless the disk says ``keeps_data = False``. A disk that is
``read_only`` is only read. A write may fail with ``OSError`` (a full disk does) in the random
test: each of its sectors must then be the old or the new one. One that defines ``resize`` is made
1 MiB longer for a moment; where it refuses, it must be as it was. One whose ``threads`` are more
than one has several in it at once. One that ``survives`` is closed and opened again, also after a
child process that ended without closing it: what was written must be there.

No test takes longer than ``patience`` seconds: a disk that waits for itself fails.
"""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

try:
    import pytest
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    sys.exit("xen-disk: error: this needs pytest: pip install pytest")

from ..errors import UsageError, XenDiskError
from ..units import parse_size
from . import Backend
from .finding import QEMU_FORMATS, builtin_names, choose, is_file
from .loader import check, open_backend

PAGE = 4096
MOST_BUFFERS = 256
REGION = 2 << 20
"""The random test works on so many bytes, at each end of the disk."""
STEPS = 100
THREADS = 8
"""So many are in the disk at once, where it lets that many in."""


class Pages:
    """Pages of a guest that are full of garbage, and the parts of them that a request uses.

    Args:
        parts: for each page, where the part starts in it, and how long it is.
        garbage: the byte that every page is full of.
    """

    def __init__(self, parts: Sequence[tuple[int, int]], garbage: int = 0xA5) -> None:
        self.parts = parts
        self.garbage = garbage
        self.pages = [bytearray([garbage]) * PAGE for _ in parts]
        self.length = sum(length for _, length in parts)

    def views(self) -> list[memoryview]:
        """Return fresh views of the parts."""
        return [
            memoryview(page)[start : start + length]
            for page, (start, length) in zip(self.pages, self.parts)
        ]

    def store(self, content: bytes) -> None:
        """Put ``content`` into the parts."""
        for view in self.views():
            view[:] = content[: len(view)]
            content = content[len(view) :]

    def content(self) -> bytes:
        """Return what is in the parts."""
        return b"".join(self.views())

    def rest_is_garbage(self) -> bool:
        """Tell whether everything outside the parts is as it was."""
        return all(
            page.count(self.garbage, 0, start) == start
            and page.count(self.garbage, start + length) == PAGE - start - length
            for page, (start, length) in zip(self.pages, self.parts)
        )


def whole_pages(length: int) -> list[tuple[int, int]]:
    """Cut ``length`` bytes into pages, the last one perhaps shorter."""
    return [(0, min(PAGE, length - start)) for start in range(0, length, PAGE)]


def random_parts(dice: random.Random, step: int, most: int) -> list[tuple[int, int]]:
    """Make up the parts of a request: multiples of ``step``, ``most`` bytes at most."""
    count = dice.choice((1, 1, 2, 3, 11, 32, dice.randint(1, MOST_BUFFERS)))
    parts = []
    for _ in range(count):
        first, last = sorted(dice.choices(range(PAGE // step), k=2))
        length = (last + 1 - first) * step
        if length > most:
            break
        most -= length
        parts.append((first * step, length))
    return parts or [(0, step)]


def is_count(done: object, least: int, most: int) -> bool:
    """Tell whether a method returned a number within these bounds."""
    return isinstance(done, int) and least <= done <= most


def call(disk: Backend, what: str, views: Sequence[memoryview], offset: int) -> object:
    """Call the method ``what``, which must leave the list that it gets as it is."""
    given = list(views)
    done: object = getattr(disk, what)(given, offset)
    if [*map(id, given)] != [*map(id, views)]:
        pytest.fail(f"{what} changed the list of its buffers, which is used again: copy it first")
    return done


def move_all(disk: Backend, what: str, views: list[memoryview], offset: int) -> None:
    """Call ``read`` or ``write`` (``what``), and again for the rest, until all is moved."""
    rest = sum(map(len, views))
    while rest:
        done = call(disk, what, views, offset)
        if done is None:
            return
        if not isinstance(done, int) or not 0 < done <= rest or done % disk.sector_size:
            pytest.fail(
                f"{what} returned {done!r}: return the number of bytes, {rest} here or fewer in "
                "whole sectors, or None"
            )
        rest -= done
        offset += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]


def read(
    disk: Backend, offset: int, parts: Sequence[tuple[int, int]], garbage: int = 0xA5
) -> bytes:
    """Read, see that only the parts were touched, and return what was read."""
    pages = Pages(parts, garbage)
    move_all(disk, "read", pages.views(), offset)
    assert pages.rest_is_garbage(), "read wrote outside its buffers"
    return pages.content()


def write(disk: Backend, offset: int, parts: Sequence[tuple[int, int]], content: bytes) -> None:
    """Write, from buffers that cannot be written to."""
    pages = Pages(parts)
    pages.store(content)
    move_all(disk, "write", [view.toreadonly() for view in pages.views()], offset)


def read_extent(disk: Backend, offset: int, length: int) -> bytes:
    """Read any length, in whole pages."""
    most = MOST_BUFFERS * PAGE
    return b"".join(
        read(disk, start, whole_pages(min(most, offset + length - start)))
        for start in range(offset, offset + length, most)
    )


def compare(expected: bytes | bytearray, actual: bytes, offset: int) -> None:
    """See that ``actual``, read at ``offset``, is what it should be; say where it is not."""
    if expected != actual:
        pairs = enumerate(zip(expected, actual))
        where, (wanted, found) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        pytest.fail(
            f"byte {offset + where} of the disk is {found:#04x}, it should be {wanted:#04x} "
            f"(in a comparison of {len(expected)} bytes at {offset})"
        )


def places(disk: Backend, length: int) -> list[int]:
    """List offsets where ``length`` bytes fit and something may go wrong."""
    sector = disk.sector_size
    last = disk.size - length
    wanted = [0, sector, PAGE - sector, PAGE, last - sector, last]
    for boundary in (1 << 30, 1 << 31, 1 << 32, 1 << 41):
        wanted += [boundary - sector, boundary]
    wanted.append(disk.size // 2 // sector * sector)
    return sorted({place for place in wanted if 0 <= place <= last})


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Fail if what is done in here takes longer; only the main thread can be bounded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        where = traceback.extract_stack(frame)[-1]
        pytest.fail(
            f"after {seconds:g} seconds it is still in {where.name} ({where.filename}:"
            f"{where.lineno}): does a method of the disk wait for itself? "
            "If it is only slow, set a longer patience (--patience)"
        )

    before = signal.signal(signal.SIGALRM, give_up)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if rest:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, rest - (time.monotonic() - start)))


def in_threads(count: int, run: Callable[[int], None]) -> None:
    """Call ``run`` in so many threads at once, and raise the first error.

    They are daemons: one that never returns does not keep the program from ending.
    """
    errors: list[BaseException] = []

    def call_it(number: int) -> None:
        try:
            run(number)
        except BaseException as error:  # noqa: BLE001 - to be raised below
            errors.append(error)

    threads = [
        threading.Thread(target=call_it, args=(number,), daemon=True) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class BackendConformance:
    """The tests. Derive a class whose name starts with ``Test``, and define ``open_disk``."""

    patience: float = 120
    """Seconds that a test may take."""

    def open_disk(self, tmp_path: Path) -> Backend:
        """Open the disk under test, which the test closes.

        A test may do that again with the same ``tmp_path``, after it has closed the first: a disk
        that ``survives`` has to be the same then.
        """
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _bounded(self) -> Iterator[None]:
        with bounded(self.patience):
            yield

    @pytest.fixture
    def disk(self, tmp_path: Path, _bounded: None) -> Iterator[Backend]:
        """An open disk whose attributes are in order."""
        disk = self.open_disk(tmp_path)
        check(disk)
        yield disk
        with bounded(self.patience):
            disk.close()

    @pytest.fixture
    def writable(self, disk: Backend) -> Backend:
        """The same, where it can be written."""
        if disk.read_only:
            pytest.skip("the disk is read-only")
        return disk

    @pytest.fixture
    def keeping(self, writable: Backend) -> Backend:
        """The same, where what is written stays."""
        if not writable.keeps_data:
            pytest.skip("the disk says keeps_data = False")
        return writable

    def test_the_first_and_the_last_sector_can_be_read(self, disk: Backend) -> None:
        sector = disk.sector_size
        for offset in (0, disk.size - sector):
            assert sector == len(read(disk, offset, [(0, sector)]))

    def test_a_read_fills_every_byte(self, disk: Backend) -> None:
        """What still shows the garbage of two reads with different garbage was not filled."""
        dice = random.Random(1)
        requests = [(0, whole_pages(min(MOST_BUFFERS * PAGE, disk.size)))]
        for offset in places(disk, disk.sector_size):
            requests.append((offset, random_parts(dice, disk.sector_size, disk.size - offset)))
        for offset, parts in requests:
            one = read(disk, offset, parts, 0x55)
            two = read(disk, offset, parts, 0xAA)
            for start in range(0, len(one), 16):
                unfilled = one[start : start + 16] == b"\x55" * 16
                assert not (unfilled and two[start : start + 16] == b"\xaa" * 16), (
                    f"a read of {len(one)} bytes at {offset} did not fill byte {start}: "
                    "the guest would see old memory"
                )

    def test_a_read_gives_the_same_in_buffers_of_any_shape(self, disk: Backend) -> None:
        if not disk.keeps_data:
            pytest.skip("the disk says keeps_data = False")
        dice = random.Random(2)
        for offset in places(disk, disk.sector_size):
            parts = random_parts(dice, disk.sector_size, min(128 << 10, disk.size - offset))
            length = sum(length for _, length in parts)
            if not disk.read_only:  # something to tell the sectors apart by
                write(disk, offset, whole_pages(length), dice.randbytes(length))
            one_by_one = b"".join(
                read(disk, start, [(0, disk.sector_size)])
                for start in range(offset, offset + length, disk.sector_size)
            )
            compare(one_by_one, read(disk, offset, parts), offset)

    def test_the_largest_request_can_be_read(self, disk: Backend) -> None:
        length = min(MOST_BUFFERS * PAGE, disk.size)
        for offset in places(disk, length):
            assert length == len(read(disk, offset, whole_pages(length)))

    def test_the_largest_request_can_be_written(self, writable: Backend) -> None:
        length = min(MOST_BUFFERS * PAGE, writable.size)
        content = random.Random(3).randbytes(length)
        write(writable, writable.size - length, whole_pages(length), content)
        if writable.keeps_data:
            offset = writable.size - length
            compare(content, read_extent(writable, offset, length), offset)

    def test_what_was_written_is_read_and_the_neighbours_are_spared(self, keeping: Backend) -> None:
        dice = random.Random(4)
        for offset in places(keeping, keeping.sector_size):
            parts = random_parts(dice, keeping.sector_size, keeping.size - offset)
            content = dice.randbytes(sum(length for _, length in parts))
            start = max(0, offset - PAGE)
            end = min(keeping.size, offset + len(content) + PAGE)
            before = read_extent(keeping, start, end - start)
            write(keeping, offset, parts, content)
            expected = before[: offset - start] + content
            expected += before[len(expected) :]
            compare(expected, read_extent(keeping, start, end - start), start)

    def test_what_was_written_is_read_after_a_flush(self, keeping: Backend) -> None:
        content = random.Random(5).randbytes(keeping.sector_size)
        write(keeping, 0, [(0, len(content))], content)
        keeping.flush()
        compare(content, read(keeping, 0, [(0, len(content))]), 0)

    def test_no_place_is_another_place(self, keeping: Backend) -> None:
        """All are written before any is read: an offset that wraps would show."""
        dice = random.Random(9)
        sector = keeping.sector_size
        contents = {at: dice.randbytes(sector) for at in places(keeping, sector)}
        for offset, content in contents.items():
            write(keeping, offset, [(0, sector)], content)
        for offset, content in contents.items():
            compare(content, read(keeping, offset, [(0, sector)]), offset)

    @pytest.mark.parametrize("end", ["close", "kill"])
    def test_what_was_written_is_there_when_it_is_opened_again(
        self, keeping: Backend, tmp_path: Path, end: str
    ) -> None:
        """A write that returned is in the disk: no flush is needed for that, nor a close."""
        if not keeping.survives:
            pytest.skip("the disk does not say survives = True")
        dice = random.Random(10)
        sector = keeping.sector_size
        contents = {at: dice.randbytes(sector) for at in places(keeping, sector)}
        if end == "close":
            self._write_all(keeping, contents)
            keeping.close()
        else:
            keeping.close()
            self._in_a_child(lambda: self._write_all(self.open_disk(tmp_path), contents))
        again = self.open_disk(tmp_path)
        try:
            for offset, content in contents.items():
                compare(content, read(again, offset, [(0, sector)]), offset)
        finally:
            again.close()

    def _write_all(self, disk: Backend, contents: dict[int, bytes]) -> None:
        for offset, content in contents.items():
            write(disk, offset, [(0, len(content))], content)

    def _in_a_child(self, run: Callable[[], None]) -> None:
        """Run it in a child process, which then ends without any cleaning up."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that are not in the child
            child = os.fork()
        if not child:
            status = 1
            try:
                run()
                status = 0
            except BaseException:  # noqa: BLE001 - it must not get back into pytest
                traceback.print_exc()
            finally:
                os._exit(status)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:  # the patience is at its end
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        assert status == 0, "a child process could not open and write the disk"

    def test_a_flush_with_nothing_to_do_returns(self, disk: Backend) -> None:
        disk.flush()
        disk.flush()

    @pytest.mark.parametrize("seed", range(3))
    def test_it_behaves_like_memory(self, keeping: Backend, seed: int) -> None:
        """Random requests, done to the disk and to a ``bytearray``."""
        dice = random.Random(seed)
        sector = keeping.sector_size
        length = min(REGION, keeping.size)
        base = dice.choice((0, keeping.size - length))
        model = bytearray(read_extent(keeping, base, length))
        done = 0
        for _ in range(STEPS):
            at = dice.randrange(length // sector) * sector
            parts = random_parts(dice, sector, length - at)
            size = sum(part for _, part in parts)
            action = dice.random()
            if action < 0.5:
                content = dice.randbytes(size)
                try:
                    write(keeping, base + at, parts, content)
                except OSError:
                    found = read_extent(keeping, base + at, size)
                    for start in range(0, size, sector):
                        assert found[start : start + sector] in (
                            content[start : start + sector],
                            model[at + start : at + start + sector],
                        ), "after a write that failed, a sector is neither old nor new"
                    content = found
                else:
                    done += 1
                model[at : at + size] = content
            elif action < 0.9:
                compare(model[at : at + size], read(keeping, base + at, parts), base + at)
            elif action < 0.95 and keeping.can_discard:
                keeping.discard(base + at, size)
                model[at : at + size] = read_extent(keeping, base + at, size)
            else:
                keeping.flush()
            assert keeping.memory >= 0, f"memory is {keeping.memory}"
        compare(model, read_extent(keeping, base, length), base)
        assert done, "every write failed"

    def test_a_discard_spares_its_neighbours(self, writable: Backend) -> None:
        if not writable.can_discard:
            pytest.skip("the disk has no discard")
        dice = random.Random(6)
        sector = writable.sector_size
        for offset in places(writable, sector):
            length = min(dice.randint(1, 64) * sector, writable.size - offset)
            start = max(0, offset - PAGE)
            end = min(writable.size, offset + length + PAGE)
            before = dice.randbytes(end - start)
            write(writable, start, whole_pages(end - start), before)
            writable.discard(offset, length)
            after = read_extent(writable, start, end - start)
            if writable.keeps_data:
                compare(before[: offset - start], after[: offset - start], start)
                past = offset - start + length
                compare(before[past:], after[past:], start + past)

    def test_all_of_it_can_be_discarded_and_written_again(self, writable: Backend) -> None:
        if not writable.can_discard:
            pytest.skip("the disk has no discard")
        writable.discard(0, writable.size)
        content = random.Random(7).randbytes(writable.sector_size)
        write(writable, 0, [(0, len(content))], content)
        if writable.keeps_data:
            compare(content, read(writable, 0, [(0, len(content))]), 0)

    def test_no_buffer_is_kept(self, disk: Backend) -> None:
        """A page goes back to the guest when the call returns: no view of it may be left."""
        calls: list[Callable[[list[memoryview], int], object]] = [disk.read]
        if not disk.read_only:
            calls.append(disk.write)
        if disk.threads > 1:
            calls += [disk.read_nowait] if disk.read_only else [disk.read_nowait, disk.write_nowait]
        for call in calls:
            pages = Pages([(0, disk.sector_size)])
            call(pages.views(), 0)
            try:
                pages.pages[0].append(0)  # impossible while a view exists
            except BufferError:
                gc.collect()
            try:
                pages.pages[0].append(0)
            except BufferError:
                pytest.fail(f"{call.__name__} kept a buffer after it returned: copy it instead")

    @pytest.mark.parametrize("seed", range(2))
    def test_what_takes_no_waiting_is_what_waiting_gives(self, disk: Backend, seed: int) -> None:
        """However much ``read_nowait`` and ``write_nowait`` do: all of it must be right."""
        if disk.threads == 1:
            pytest.skip("the disk lets one thread in, which always waits")
        dice = random.Random(seed)
        for offset in places(disk, disk.sector_size):
            parts = random_parts(dice, disk.sector_size, min(128 << 10, disk.size - offset))
            pages = Pages(parts)
            if not disk.read_only:
                content = dice.randbytes(pages.length)
                pages.store(content)
                views = [view.toreadonly() for view in pages.views()]
                done = call(disk, "write_nowait", views, offset)
                assert is_count(done, 0, pages.length), f"write_nowait returned {done!r}"
                if done != pages.length:
                    write(disk, offset, parts, content)
                if disk.keeps_data:
                    compare(content, read(disk, offset, parts), offset)
            pages = Pages(parts)
            done = call(disk, "read_nowait", pages.views(), offset)
            assert is_count(done, 0, pages.length), f"read_nowait returned {done!r}"
            assert pages.rest_is_garbage(), "read_nowait wrote outside its buffers"
            if disk.keeps_data and done == pages.length:
                compare(read(disk, offset, parts), pages.content(), offset)

    def test_it_lets_several_threads_in(self, disk: Backend) -> None:
        """Each has sectors of its own, side by side with those of the others."""
        if disk.threads == 1:
            pytest.skip("the disk lets one thread in")
        sector = disk.sector_size
        sectors = min(disk.size, 64 << 10) // sector
        threads = min(disk.threads, THREADS, sectors)
        model = bytearray(read_extent(disk, 0, sectors * sector))
        start = threading.Barrier(threads)

        def run(number: int) -> None:
            dice = random.Random(number)
            start.wait()
            for _ in range(STEPS):
                at = dice.randrange(number, sectors, threads) * sector
                if disk.read_only or dice.random() < 0.5:
                    found = read(disk, at, [(0, sector)])
                    if disk.keeps_data:
                        compare(model[at : at + sector], found, at)
                    continue
                content = dice.randbytes(sector)
                try:
                    write(disk, at, [(0, sector)], content)
                except OSError:  # a full disk
                    content = read(disk, at, [(0, sector)])
                model[at : at + sector] = content
                if dice.random() < 0.02:
                    disk.flush()

        in_threads(threads, run)
        if disk.keeps_data:
            compare(model, read_extent(disk, 0, len(model)), 0)

    def test_a_resize(self, disk: Backend) -> None:
        """To what can be had, or to nothing; in either case the content stays."""
        if type(disk).resize is Backend.resize:
            pytest.skip("the disk has no resize")
        before = disk.size
        kept = min(before, REGION)
        content = read_extent(disk, before - kept, kept)
        for size in (None, before + (1 << 20), before):
            expected = disk.size
            try:
                done = disk.resize(size)
            except Exception:  # noqa: BLE001 - any says that the disk is as it was
                pass
            else:
                if size is None:  # a question, no more
                    assert is_count(done, 1, 1 << 63), f"resize(None) returned {done!r}"
                else:
                    assert size == done, f"resize({size}) returned {done!r}"
                    expected = size
            assert expected == disk.size, f"size is {disk.size} after resize({size})"
            if disk.size > before:
                self._use_the_last_sector(disk)
            if disk.keeps_data:
                compare(content, read_extent(disk, before - kept, kept), before - kept)

    def _use_the_last_sector(self, disk: Backend) -> None:
        parts, last = [(0, disk.sector_size)], disk.size - disk.sector_size
        read(disk, last, parts)
        if not disk.read_only:
            content = random.Random(8).randbytes(disk.sector_size)
            write(disk, last, parts, content)
            if disk.keeps_data:
                compare(content, read(disk, last, parts), last)

    def test_the_size_and_the_sectors_stay_what_they_are(self, disk: Backend) -> None:
        def facts() -> list[object]:
            return [disk.size, disk.sector_size, disk.read_only, disk.can_discard]

        before = facts()
        sector = [(0, disk.sector_size)]
        last = disk.size - disk.sector_size
        read(disk, last, sector)
        if not disk.read_only:
            write(disk, last, sector, bytes(disk.sector_size))
        disk.flush()
        assert before == facts(), "size, sector_size, read_only or can_discard changed"

    def test_closing_twice_does_no_harm(self, disk: Backend) -> None:
        disk.close()
        disk.close()


class TestBackend(BackendConformance):
    """The tests on the disk of the command line."""

    @pytest.fixture(autouse=True)
    def _command_line(self, opener: _Opener) -> None:
        self.opener = opener

    @pytest.fixture(autouse=True)
    def _bounded(self, opener: _Opener) -> Iterator[None]:
        with bounded(opener.patience):
            yield

    def open_disk(self, tmp_path: Path) -> Backend:
        """Open it as ``connect`` would."""
        return self.opener.open()


class _Opener:
    """The disk of the command line; a plugin of pytest too, to get it into the tests."""

    def __init__(
        self,
        backend: str,
        options: dict[str, object],
        pairs: Sequence[str],
        filters: Sequence[str],
        patience: float,
    ) -> None:
        self.backend = backend
        self.options = options
        self.pairs = pairs
        self.filters = filters
        self.patience = patience

    def open(self) -> Backend:
        return open_backend(self.backend, self.options, self.filters, pairs=self.pairs)

    @pytest.fixture
    def opener(self) -> _Opener:
        return self


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _backend(name: str | None, image_format: str | None, path: str | None) -> str:
    """Name the backend: by its name, by the format that it reads and writes, or by the path."""
    if image_format in QEMU_FORMATS and name in (None, "qemu"):
        return "qemu"
    if image_format is not None and name in (None, image_format):
        return image_format
    if image_format is None and (name or (path is not None and not is_file(path))):
        return choose(name, path)
    if name and path is None and name not in builtin_names():
        raise UsageError(f"{name} is no backend: give an image as --path {name}")
    raise UsageError("name a backend, or the --format of the image")


def main(arguments: Sequence[str]) -> int:
    """Run the suite on one disk; return pytest's exit status, or 1 or 2 for our own errors."""
    parser = argparse.ArgumentParser(
        prog="python -m xen_disk_py.backends.conformance",
        description="Check that a disk keeps the contract of backends. Its content is lost!",
    )
    parser.add_argument(
        "backend", nargs="?", help="file.py, file.py:Class, package.module:Class or a name"
    )
    parser.add_argument("setting", nargs="*", help="name=value, as --option; for nbdkit's plugins")
    parser.add_argument(
        "--format",
        choices=("raw", "vhd", *QEMU_FORMATS),
        help="what the image is, in place of a backend's name",
    )
    parser.add_argument("--path", help="the image, where the disk has one: give a copy")
    parser.add_argument("--size", type=_size)
    parser.add_argument("--cow-limit", type=_size)
    parser.add_argument("--overlay", help="the file of an overlay disk")
    parser.add_argument("--sector-size", type=_size)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--filter", action="append", default=[], metavar="NAME[:KEY=VALUE,...]")
    parser.add_argument(
        "--patience",
        type=float,
        default=BackendConformance.patience,
        metavar="SECONDS",
        help="how long a test may take (default: %(default)g)",
    )
    parser.epilog = "What follows a -- goes to pytest: -- -v -x"
    split = [*arguments, "--"].index("--")
    given, for_pytest = parser.parse_intermixed_args(arguments[:split]), arguments[split + 1 :]
    names = ("path", "size", "cow_limit", "sector_size", "read_only", "overlay")
    try:
        options = {name: getattr(given, name) for name in names}
        backend = _backend(given.backend, given.format, given.path)
        if given.format in QEMU_FORMATS:
            options["format"] = given.format
        pairs = [*given.option, *given.setting]
        opener = _Opener(backend, options, pairs, given.filter, given.patience)
        with bounded(given.patience):
            opener.open().close()  # what is wrong here is said once, and without a traceback
    except pytest.fail.Exception as error:
        print(f"xen-disk: error: {error}", file=sys.stderr)
        return 1
    except XenDiskError as error:
        print(f"xen-disk: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    with tempfile.TemporaryDirectory() as directory:
        # A configuration file of its own, or pytest would take the one of the current project.
        settings = os.path.join(directory, "pytest.ini")
        Path(settings).write_text("[pytest]\n", encoding="ascii")
        ours = ["-c", settings, "--rootdir", directory, "--noconftest", "-p", "no:cacheprovider"]
        tests = f"{os.path.abspath(__file__)}::TestBackend"
        return int(pytest.main([*ours, "-rs", *for_pytest, tests], [opener]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
