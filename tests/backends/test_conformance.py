import collections
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import recorded

from backends.child import conformance_command
from xen_disk_py.backends import Backend, conformance
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.discard import DiscardBackend
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.raw import RawBackend

EXAMPLES = Path(__file__).parents[2] / "examples"
ODD = (3 << 19) + 512  # the last page is not whole


class TestDiscard(BackendConformance):
    def open_disk(self, tmp_path):
        return DiscardBackend()


class TestTinyDiscard(BackendConformance):
    def open_disk(self, tmp_path):
        return DiscardBackend(size=512)


class OnAnImage(BackendConformance):
    @pytest.fixture(autouse=True)
    def _image(self, make_image):
        self.image = make_image(ODD)


class TestRaw(OnAnImage):
    def open_disk(self, tmp_path):
        return RawBackend(self.image)


class TestRawReadOnly(OnAnImage):
    def open_disk(self, tmp_path):
        return RawBackend(self.image, read_only=True)


class TestAt(OnAnImage):
    def open_disk(self, tmp_path):
        path = tmp_path / "disk.xdt"
        if not path.exists():
            records = [
                recorded.write(0, 1, 512, b"w" * 5120),
                recorded.flush(2, 3),
                recorded.discard(4, 5, 2048, 1024),
                recorded.write(6, 7, ODD - 512, b"e" * 512),
            ]
            recorded.make(path, recorded.header(size=ODD), records)
        return open_backend(None, {"path": f"at:{path}@end", "base": self.image})


class TestRawLarge(BackendConformance):
    @pytest.fixture(autouse=True)
    def _image(self, make_image):
        self.image = make_image(5 << 40, sparse=True)

    def open_disk(self, tmp_path):
        return RawBackend(self.image)


class TestMmapLarge(TestRawLarge):
    def open_disk(self, tmp_path):
        return MmapBackend(self.image)


class TestRawOnABlockDevice(BackendConformance):
    @pytest.fixture(autouse=True)
    def _device(self, loop_device):
        self.device = loop_device

    def open_disk(self, tmp_path):
        return RawBackend(self.device)


class TestMmap(OnAnImage):
    def open_disk(self, tmp_path):
        return MmapBackend(self.image)


class TestMmapReadOnly(OnAnImage):
    def open_disk(self, tmp_path):
        return MmapBackend(self.image, read_only=True)


class TestCow(OnAnImage):
    def open_disk(self, tmp_path):
        return CowBackend(self.image)


class TestCowReadOnly(OnAnImage):
    def open_disk(self, tmp_path):
        return open_backend("cow", {"path": self.image, "read_only": True})


class TestCowThatFillsUp(OnAnImage):
    def open_disk(self, tmp_path):
        return CowBackend(self.image, cow_limit=1100 << 10)


class TestCowLarge(BackendConformance):
    @pytest.fixture(autouse=True)
    def _image(self, make_image):
        self.image = make_image(5 << 40, sparse=True)

    def open_disk(self, tmp_path):
        return CowBackend(self.image)


class TestOverlay(OnAnImage):
    def open_disk(self, tmp_path):
        return OverlayBackend(self.image, overlay=str(tmp_path / "changes"))


class TestOverlayThatFillsUp(OnAnImage):
    def open_disk(self, tmp_path):
        return OverlayBackend(self.image, overlay=str(tmp_path / "changes"), cow_limit=1100 << 10)


class TestOverlayLarge(TestRawLarge):
    def open_disk(self, tmp_path):
        return OverlayBackend(self.image, overlay=str(tmp_path / "changes"))


class WithLargeSectors(BackendConformance):
    @pytest.fixture(autouse=True)
    def _image(self, make_image):
        self.image = make_image(3 << 19)

    def open_disk(self, tmp_path):
        return open_backend(self.backend, {"path": self.image, "sector_size": 4096})


class TestRawWithLargeSectors(WithLargeSectors):
    backend = "raw"


class TestMmapWithLargeSectors(WithLargeSectors):
    backend = "mmap"


class TestCowWithLargeSectors(WithLargeSectors):
    backend = "cow"


class TestOverlayWithLargeSectors(WithLargeSectors):
    def open_disk(self, tmp_path):
        options = {"path": self.image, "overlay": str(tmp_path / "changes"), "sector_size": 4096}
        return open_backend("overlay", options)


class TestAddressExample(BackendConformance):
    def open_disk(self, tmp_path):
        return open_backend(str(EXAMPLES / "address_disk.py"), {"size": 3 << 40})


class TestCountingExample(BackendConformance):
    def open_disk(self, tmp_path):
        return open_backend(str(EXAMPLES / "counting_disk.py"), {"size": ODD})


class Good(Backend):
    """What the broken ones below are made from; sectors of 2 KiB."""

    sector_size = 2048
    size = 1 << 20
    threads = 4

    def __init__(self):
        self.data = bytearray(self.size)

    def read(self, buffers, offset):
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, buffers, offset):
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def read_nowait(self, buffers, offset):
        Good.read(self, buffers, offset)
        return sum(map(len, buffers))

    def write_nowait(self, buffers, offset):
        Good.write(self, buffers, offset)
        return sum(map(len, buffers))

    def discard(self, offset, length):
        self.data[offset : offset + length] = bytes(length)

    def resize(self, size):
        if size is not None:
            self.data = self.data[:size].ljust(size, b"\0")
            self.size = size
        return self.size


class TestLargeSectors(BackendConformance):
    def open_disk(self, tmp_path):
        return Good()


class MovesOneSectorAtATime(Good):
    """As the contract allows."""

    def read(self, buffers, offset):
        super().read([buffers[0][:2048]], offset)
        return 2048

    def write(self, buffers, offset):
        super().write([buffers[0][:2048]], offset)
        return 2048

    def read_nowait(self, buffers, offset):
        return self.read(buffers, offset)

    def write_nowait(self, buffers, offset):
        return self.write(buffers, offset)


class TestShortCounts(BackendConformance):
    def open_disk(self, tmp_path):
        return MovesOneSectorAtATime()


class RefusesToResize(Good):
    """As the contract allows, too."""

    def resize(self, size):
        raise OSError("no")


class TestRefusedResize(BackendConformance):
    def open_disk(self, tmp_path):
        return RefusesToResize()


class ForgetsToReadTheTail(Good):
    def read(self, buffers, offset):
        super().read(buffers[:64], offset)


class StepsByPages(Good):
    def read(self, buffers, offset):
        for buffer in buffers:
            content = self.data[offset : offset + len(buffer)]
            buffer[: len(content)] = content
            offset += 4096


class AnswersShort(Good):
    def read(self, buffers, offset):
        super().read(buffers, offset)
        return len(buffers[0]) - 512


class AnswersNothing(Good):
    def read(self, buffers, offset):
        super().read(buffers, offset)
        return 0


class AnswersTooMuch(Good):
    def write(self, buffers, offset):
        super().write(buffers, offset)
        return sum(map(len, buffers)) + 2048


class AnswersTrue(Good):
    def write(self, buffers, offset):
        super().write(buffers, offset)
        return True


class DropsWrites(Good):
    def write(self, buffers, offset):
        pass


class WritesTooFar(Good):
    def write(self, buffers, offset):
        super().write(buffers, offset)
        end = offset + sum(map(len, buffers))
        if end < self.size:
            self.data[end] ^= 1


class ScribblesOnTheGuest(Good):
    def write(self, buffers, offset):
        super().write(buffers, offset)
        buffers[0][0] = 0


class TakesBuffersOut(Good):
    def read(self, buffers, offset):
        while buffers:
            super().read(buffers[:1], offset)
            offset += len(buffers.pop(0))


class KeepsBuffers(Good):
    def write(self, buffers, offset):
        super().write(buffers, offset)
        self.last = buffers


class DiscardsTooMuch(Good):
    def discard(self, offset, length):
        super().discard(offset, min(length + 2048, self.size - offset))


class CannotFlush(Good):
    def flush(self):
        raise OSError("no")


class Shrinks(Good):
    def write(self, buffers, offset):
        super().write(buffers, offset)
        self.size -= 2048


class ClosesOnce(Good):
    def close(self):
        del self.data


class FailsWritesHalfway(Good):
    def write(self, buffers, offset):
        if len(buffers) > 4:
            buffers[0:1] = [memoryview(bytes(len(buffers[0])))]
            super().write(buffers, offset)
            raise OSError("half of it is wrong")
        super().write(buffers, offset)


class KeepsBuffersThatDoNotWait(Good):
    def read_nowait(self, buffers, offset):
        self.last = buffers
        return 0


class SaysItWroteAtOnce(Good):
    def write_nowait(self, buffers, offset):
        return sum(map(len, buffers))


class SaysItReadAtOnce(Good):
    def read_nowait(self, buffers, offset):
        return sum(map(len, buffers))


class AnswersNoneAtOnce(Good):
    def read_nowait(self, buffers, offset):
        return None


class LosesWhatOthersWrite(Good):
    """Writes four sectors back where one is changed: those that this thread knows."""

    def __init__(self):
        super().__init__()
        self.known = collections.defaultdict(lambda: bytearray(self.size))

    def write(self, buffers, offset):
        known = self.known[threading.get_ident()]
        first = offset // 8192 * 8192
        for buffer in buffers:
            known[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
        end = -(-offset // 8192) * 8192
        self.data[first:end] = known[first:end]


class LetsOneIn(Good):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.met = threading.Event()

    def read(self, buffers, offset):
        if not self.lock.acquire(blocking=False):
            self.met.set()
            raise RuntimeError("two at once")
        if threading.current_thread() is not threading.main_thread():
            self.met.wait(30)  # there is another, sooner or later
        super().read(buffers, offset)
        self.lock.release()


class ForgetsItsNewSize(Good):
    def resize(self, size):
        return size or self.size


class AnswersItsOldSize(Good):
    def resize(self, size):
        old = self.size
        super().resize(size)
        return old


class ResizesWhenAsked(Good):
    def resize(self, size):
        return super().resize(size or 2 << 20)


class IsNotAsItWas(Good):
    def resize(self, size):
        super().resize(size)
        raise OSError("too late")


class ResizesToNothing(Good):
    def resize(self, size):
        if size:
            self.data = bytearray(size)
            self.size = size
        return self.size

    def __init__(self):
        super().__init__()
        self.data[-1] = 1


class HasNoRoom(Good):
    def resize(self, size):
        if size:
            self.size = size
        return self.size


class WrapsAt4GiB(Good):
    """Keeps the low 32 bits of an offset."""

    size = 5 << 30
    resize = Backend.resize

    def __init__(self):
        self.sectors = {}

    def read(self, buffers, offset):
        for buffer in buffers:
            for at in range(0, len(buffer), 2048):
                where = (offset + at) & 0xFFFFFFFF
                buffer[at : at + 2048] = self.sectors.get(where, bytes(2048))
            offset += len(buffer)

    def write(self, buffers, offset):
        for buffer in buffers:
            for at in range(0, len(buffer), 2048):
                self.sectors[(offset + at) & 0xFFFFFFFF] = bytes(buffer[at : at + 2048])
            offset += len(buffer)


class SaysItSurvives(Good):
    survives = True


class InAFile(Good):
    """As a disk that survives may be."""

    survives = True

    def __init__(self, path="disk"):
        self.path = path
        with open(path, "ab") as file:
            file.truncate(self.size)
        with open(path, "rb") as file:
            self.data = bytearray(file.read())

    def write(self, buffers, offset):
        super().write(buffers, offset)
        self.store()

    def store(self):
        with open(self.path, "r+b") as file:
            file.write(self.data)


class StoresWhenItIsClosed(InAFile):
    def write(self, buffers, offset):
        Good.write(self, buffers, offset)

    def close(self):
        self.store()


class StoresWhenItIsFlushed(StoresWhenItIsClosed):
    def flush(self):
        self.store()

    def close(self):
        pass


def fails(disk_class, name, tmp_path, end="kill"):
    """Tell whether a test of the suite fails on a writable disk that keeps its data."""
    suite = BackendConformance()
    suite.open_disk = lambda tmp_path: disk_class()
    test = getattr(suite, name)
    known = {"seed": 1, "tmp_path": tmp_path, "end": end}
    wanted = inspect.signature(test).parameters
    try:
        test(disk_class(), **{key: value for key, value in known.items() if key in wanted})
    except pytest.skip.Exception:
        return False
    except (Exception, pytest.fail.Exception):
        return True
    return False


@pytest.mark.parametrize("disk_class", [Good, InAFile])
def test_a_good_disk_passes(disk_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = [name for name in dir(BackendConformance) if name.startswith("test_")]
    assert [] == [name for name in tests if fails(disk_class, name, tmp_path)]


@pytest.mark.parametrize(
    ("disk_class", "test"),
    [
        (ForgetsToReadTheTail, "test_a_read_fills_every_byte"),
        (StepsByPages, "test_a_read_gives_the_same_in_buffers_of_any_shape"),
        (AnswersShort, "test_the_first_and_the_last_sector_can_be_read"),
        (AnswersNothing, "test_the_first_and_the_last_sector_can_be_read"),
        (AnswersTooMuch, "test_the_largest_request_can_be_written"),
        (AnswersTrue, "test_the_largest_request_can_be_written"),
        (DropsWrites, "test_what_was_written_is_read_after_a_flush"),
        (WritesTooFar, "test_what_was_written_is_read_and_the_neighbours_are_spared"),
        (ScribblesOnTheGuest, "test_the_largest_request_can_be_written"),
        (TakesBuffersOut, "test_the_largest_request_can_be_read"),
        (KeepsBuffers, "test_no_buffer_is_kept"),
        (DiscardsTooMuch, "test_a_discard_spares_its_neighbours"),
        (CannotFlush, "test_a_flush_with_nothing_to_do_returns"),
        (Shrinks, "test_the_size_and_the_sectors_stay_what_they_are"),
        (ClosesOnce, "test_closing_twice_does_no_harm"),
        (FailsWritesHalfway, "test_it_behaves_like_memory"),
        (KeepsBuffersThatDoNotWait, "test_no_buffer_is_kept"),
        (SaysItWroteAtOnce, "test_what_takes_no_waiting_is_what_waiting_gives"),
        (SaysItReadAtOnce, "test_what_takes_no_waiting_is_what_waiting_gives"),
        (AnswersNoneAtOnce, "test_what_takes_no_waiting_is_what_waiting_gives"),
        (LosesWhatOthersWrite, "test_it_lets_several_threads_in"),
        (LetsOneIn, "test_it_lets_several_threads_in"),
        (ForgetsItsNewSize, "test_a_resize"),
        (AnswersItsOldSize, "test_a_resize"),
        (ResizesWhenAsked, "test_a_resize"),
        (IsNotAsItWas, "test_a_resize"),
        (ResizesToNothing, "test_a_resize"),
        (HasNoRoom, "test_a_resize"),
        (WrapsAt4GiB, "test_no_place_is_another_place"),
        (SaysItSurvives, "test_what_was_written_is_there_when_it_is_opened_again"),
        (StoresWhenItIsClosed, "test_what_was_written_is_there_when_it_is_opened_again"),
        (StoresWhenItIsFlushed, "test_what_was_written_is_there_when_it_is_opened_again"),
    ],
)
def test_a_fault_is_found(disk_class, test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails(disk_class, test, tmp_path)


@pytest.mark.parametrize(
    ("disk_class", "found"),
    [(SaysItSurvives, True), (StoresWhenItIsFlushed, True), (StoresWhenItIsClosed, False)],
)
def test_what_is_lost_by_a_close_is_found(disk_class, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "test_what_was_written_is_there_when_it_is_opened_again"
    assert found is fails(disk_class, name, tmp_path, end="close")


@pytest.mark.parametrize("method", ["read", "flush", "close"])
def test_a_disk_that_waits_for_itself_fails_in_time(tmp_path, method):
    (tmp_path / "stuck.py").write_text(
        "import threading\n"
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    size = 4096\n"
        "    threads = 4\n"
        "    lock = threading.Lock()\n"
        "    def read(self, buffers, offset): pass\n"
        "    def write(self, buffers, offset): pass\n"
        f"    def {method}(self, *arguments):\n"
        "        self.lock.acquire()\n"
        "        self.lock.acquire()\n",
        encoding="ascii",
    )
    name = "test_a_flush_with_nothing" if method == "flush" else "test_it_lets_several_threads_in"
    arguments = ["./stuck.py", "--patience", "0.5", "--", "-q", "-k", name]
    status, output = conformance_command(*arguments, cwd=tmp_path)
    assert "does a method of the disk wait for itself?" in output
    assert 1 == status


def run(*arguments, cwd):
    """Run the command as a shell does."""
    return subprocess.run(
        [sys.executable, "-m", "xen_disk_py.backends.conformance", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_checks_a_disk_whatever_the_directory_is_configured_to(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n", encoding="ascii")
    (tmp_path / "conftest.py").write_text("1 / 0\n", encoding="ascii")
    done = run(EXAMPLES / "counting_disk.py", "--size", "1M", "--", "-q", cwd=tmp_path)
    assert "15 passed, 8 skipped" in done.stdout
    assert 0 == done.returncode
    assert {"pytest.ini", "conftest.py"} == set(os.listdir(tmp_path))


def test_the_command_shows_what_fails(tmp_path):
    (tmp_path / "bad.py").write_text(
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    size = 4096\n"
        "    def read(self, buffers, offset): pass\n"
        "    def write(self, buffers, offset): pass\n",
        encoding="ascii",
    )
    status, output = conformance_command(
        "./bad.py", "--", "-q", "-k", "fills_every_byte", cwd=tmp_path
    )
    assert "the guest would see old memory" in output
    assert 1 == status


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["./gone.py"], 1, "xen-disk: error: ./gone.py: no such file: check the name\n"),
        (["raw"], 2, "xen-disk: error: the raw backend needs --path\n"),
        (["discard", "--option", "x"], 2, "xen-disk: error: --option x: write it as"),
        (["raw", "--format", "qcow2"], 2, "xen-disk: error: name a backend, or the --format of"),
        (["disk.qcow2", "--format", "qcow2"], 2, "xen-disk: error: disk.qcow2 is no backend: give"),
        (["--path", "disk.raw"], 2, "xen-disk: error: name a backend, or the --format of the"),
        (["--path", "nbd+unix:///"], 1, "xen-disk: error: nbd+unix:///: "),
    ],
)
def test_the_command_says_in_one_line_what_cannot_be_opened(capsys, arguments, status, message):
    assert status == conformance.main(arguments)
    assert capsys.readouterr().err.startswith(message)


def test_a_size_that_is_none_is_refused_by_the_command(capsys):
    with pytest.raises(SystemExit):
        conformance.main(["discard", "--size", "big"])
    assert "'big' is not a size" in capsys.readouterr().err
