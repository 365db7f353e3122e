import os
import subprocess
import sys
from pathlib import Path

import pytest

from xen_disk_py.backends import Backend, conformance
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.discard import DiscardBackend
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.mmap import MmapBackend
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


class TestRawLarge(BackendConformance):
    @pytest.fixture(autouse=True)
    def _image(self, make_image):
        self.image = make_image(5 << 40, sparse=True)

    def open_disk(self, tmp_path):
        return RawBackend(self.image)


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
        self.image = make_image(3 << 30, sparse=True)

    def open_disk(self, tmp_path):
        return CowBackend(self.image)


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

    def discard(self, offset, length):
        self.data[offset : offset + length] = bytes(length)


class TestLargeSectors(BackendConformance):
    def open_disk(self, tmp_path):
        return Good()


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


def fails(disk_class, name):
    """Tell whether a test of the suite fails on a writable disk that keeps its data."""
    arguments = {"seed": 1} if name == "test_it_behaves_like_memory" else {}
    try:
        getattr(BackendConformance(), name)(disk_class(), **arguments)
    except (Exception, pytest.fail.Exception):
        return True
    return False


def test_a_good_disk_passes():
    tests = [name for name in dir(BackendConformance) if name.startswith("test_")]
    assert [] == [name for name in tests if fails(Good, name)]


@pytest.mark.parametrize(
    ("disk_class", "test"),
    [
        (ForgetsToReadTheTail, "test_a_read_fills_every_byte"),
        (StepsByPages, "test_a_read_gives_the_same_in_buffers_of_any_shape"),
        (AnswersShort, "test_the_first_and_the_last_sector_can_be_read"),
        (AnswersTrue, "test_the_largest_request_can_be_written"),
        (DropsWrites, "test_what_was_written_is_read_after_a_flush"),
        (WritesTooFar, "test_what_was_written_is_read_and_the_neighbours_are_spared"),
        (ScribblesOnTheGuest, "test_the_largest_request_can_be_written"),
        (KeepsBuffers, "test_no_buffer_is_kept"),
        (DiscardsTooMuch, "test_a_discard_spares_its_neighbours"),
        (CannotFlush, "test_a_flush_with_nothing_to_do_returns"),
        (Shrinks, "test_the_size_and_the_sectors_stay_what_they_are"),
        (ClosesOnce, "test_closing_twice_does_no_harm"),
        (FailsWritesHalfway, "test_it_behaves_like_memory"),
    ],
)
def test_a_fault_is_found(disk_class, test):
    assert fails(disk_class, test)


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "xen_disk_py.backends.conformance", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_checks_a_disk_whatever_the_folder_is_configured_to(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n", encoding="ascii")
    (tmp_path / "conftest.py").write_text("1 / 0\n", encoding="ascii")
    done = run(EXAMPLES / "counting_disk.py", "--size", "1M", "--", "-q", cwd=tmp_path)
    assert "14 passed, 2 skipped" in done.stdout
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
    done = run("./bad.py", "--", "-q", "-k", "fills_every_byte", cwd=tmp_path)
    assert "the guest would see old memory" in done.stdout
    assert 1 == done.returncode


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["./gone.py"], 1, "xen_disk_py: error: ./gone.py: no such file: check the name\n"),
        (["raw"], 2, "xen_disk_py: error: the raw backend needs --path\n"),
        (["discard", "--option", "x"], 2, "xen_disk_py: error: --option x: write it as"),
    ],
)
def test_the_command_says_in_one_line_what_cannot_be_opened(capsys, arguments, status, message):
    assert status == conformance.main(arguments)
    assert capsys.readouterr().err.startswith(message)


def test_a_size_that_is_none_is_refused_by_the_command(capsys):
    with pytest.raises(SystemExit):
        conformance.main(["discard", "--size", "big"])
    assert "'big' is not a size" in capsys.readouterr().err
