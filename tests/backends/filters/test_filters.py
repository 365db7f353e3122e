"""The filters of ours."""

import errno
import json
import os
import threading
import time

import pytest

from backends.blocks import buffers, read, write
from xen_disk_py.backends import Backend
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.filters import waiting as waiting_module
from xen_disk_py.backends.loader import open_backend, wrap
from xen_disk_py.errors import UsageError


class Memory(Backend):
    size = 1 << 20

    def __init__(self, threads=1):
        self.data = bytearray(self.size)
        self.threads = threads
        self.calls = []

    def read(self, buffers, offset):
        self.calls.append("read")
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, buffers, offset):
        self.calls.append("write")
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self):
        self.calls.append("flush")

    def discard(self, offset, length):
        self.calls.append("discard")

    def discard_securely(self, offset, length):
        self.calls.append("discard_securely")


def do(disk, operation):
    if operation in ("read", "write"):
        getattr(disk, operation)(buffers(bytes(512)), 0)
    elif operation == "flush":
        disk.flush()
    else:
        getattr(disk, operation)(0, 512)


OPERATIONS = ("read", "write", "flush", "discard", "discard_securely")


class TestDelay(BackendConformance):
    def open_disk(self, tmp_path):
        path = tmp_path / "disk"
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        return open_backend("raw", {"path": str(path)}, ["delay:read=1us-20us,write=1us"])


class TestLog(BackendConformance):
    def open_disk(self, tmp_path):
        path = tmp_path / "disk"
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        return open_backend("raw", {"path": str(path)}, [f"log:file={tmp_path}/log"])


class TestError(BackendConformance):
    """One that never fails, since no file arms it."""

    def open_disk(self, tmp_path):
        path = tmp_path / "disk"
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        return open_backend("raw", {"path": str(path)}, [f"error:armed={tmp_path}/armed"])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_waits_its_time(monkeypatch, operation):
    waited = []
    monkeypatch.setattr(waiting_module.time, "sleep", waited.append)
    name = operation.partition("_")[0]
    disk = wrap(Memory(), [f"delay:{name}=20ms"])
    for each in OPERATIONS:
        do(disk, each)
    expected = sum(each.partition("_")[0] == name for each in OPERATIONS)
    assert [0.02] * expected == waited
    assert list(OPERATIONS) == disk.source.calls


def test_a_time_between_two_is_drawn_again_by_the_same_seed(monkeypatch):
    waited = []
    monkeypatch.setattr(waiting_module.time, "sleep", waited.append)
    for _ in range(2):
        disk = wrap(Memory(), ["delay:read=5ms-20ms,seed=3"])
        for _ in range(50):
            do(disk, "read")
    assert waited[:50] == waited[50:]
    assert 0.005 <= min(waited) < 0.008
    assert 0.017 < max(waited) <= 0.02


@pytest.mark.parametrize("threads", [1, 3])
def test_requests_wait_side_by_side_and_continue_as_the_source_lets_them(monkeypatch, threads):
    """All wait at once; below, never more are at work than may be."""
    everyone = threading.Barrier(20)
    monkeypatch.setattr(waiting_module.time, "sleep", lambda seconds: everyone.wait(30))
    source = Memory(threads)
    inside, most = [], []
    real = source.read

    def counted(views, offset):
        inside.append(1)
        most.append(len(inside))
        os.sched_yield()
        real(views, offset)
        inside.pop()

    source.read = counted
    disk = wrap(source, ["delay:read=1s"])
    assert 64 == disk.threads
    workers = [threading.Thread(target=do, args=(disk, "read")) for _ in range(20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert 20 == source.calls.count("read")
    assert max(most) <= threads


@pytest.mark.parametrize("failing", ["read", "write", "flush", "discard"])
def test_only_some_operations_fail_and_do_not_reach_the_source(failing):
    disk = wrap(Memory(), [f"error:operations={failing},errno=ENOSPC"])
    for operation in OPERATIONS:
        if operation.partition("_")[0] == failing:
            with pytest.raises(OSError, match="the error filter") as caught:
                do(disk, operation)
            assert errno.ENOSPC == caught.value.errno
        else:
            do(disk, operation)
    done = [operation for operation in OPERATIONS if operation.partition("_")[0] != failing]
    assert done == disk.source.calls


def outcomes(disk, count):
    """Tell of each read whether it failed."""
    found = []
    for _ in range(count):
        try:
            do(disk, "read")
            found.append(False)
        except OSError:
            found.append(True)
    return found


def test_every_so_many_fail():
    disk = wrap(Memory(), ["error:every=3"])
    assert [False, False, True] * 4 == outcomes(disk, 12)


def test_a_part_fails_the_same_by_the_same_seed():
    one, other = (outcomes(wrap(Memory(), ["error:rate=0.2,seed=5"]), 500) for _ in range(2))
    assert one == other
    assert 60 < sum(one) < 140
    assert [False] * 100 == outcomes(wrap(Memory(), ["error:rate=0"]), 100)


def test_a_sticky_error_stays():
    found = outcomes(wrap(Memory(), ["error:every=4,sticky=yes"]), 8)
    assert [False] * 3 + [True] * 5 == found


def test_a_file_arms_it(tmp_path):
    disk = wrap(Memory(), [f"error:armed={tmp_path}/armed"])
    assert [False] * 3 == outcomes(disk, 3)
    (tmp_path / "armed").touch()
    assert [True] * 3 == outcomes(disk, 3)
    (tmp_path / "armed").unlink()
    assert [False] == outcomes(disk, 1)


def test_a_range_of_bytes_fails():
    disk = wrap(Memory(), ["error:range=8K-12K"])
    for offset, length in ((0, 8192), (12288, 512)):
        read(disk, offset, length)
    for offset, length in ((4096, 4608), (8192, 512), (11776, 4096)):
        with pytest.raises(OSError, match="error filter"):
            disk.read(buffers(bytes(length)), offset)
    disk.flush()


def test_each_request_is_a_line(tmp_path):
    path = tmp_path / "log"
    disk = wrap(Memory(), [f"log:file={path}"])
    write(disk, 4096, b"x" * 1024)
    disk.flush()
    disk.discard(0, 512)
    disk.close()
    disk.close()
    lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    assert [["write", "4096", "1024"], ["flush", "0", "0"], ["discard", "0", "512"]] == [
        words[1:4] for words in lines
    ]
    assert ["ok"] * 3 == [words[5] for words in lines]
    assert 0o600 == os.stat(path).st_mode & 0o777


def test_a_line_of_json_tells_what_failed(tmp_path):
    path = tmp_path / "log"
    texts = ["error:operations=read,errno=ENOSPC", f"log:file={path},format=json"]
    disk = wrap(Memory(), texts)
    with pytest.raises(OSError, match="error filter"):
        do(disk, "read")
    disk.close()
    facts = json.loads(path.read_text(encoding="ascii"))
    assert abs(time.time() - facts.pop("time")) < 1000
    assert facts.pop("seconds") >= 0
    assert {"operation": "read", "offset": 0, "length": 512, "outcome": "ENOSPC"} == facts


@pytest.mark.parametrize("content", [bytes(4096), b"MBR", b"text\n"])
def test_a_log_is_not_appended_to_a_disk(tmp_path, content):
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="there is something else: give another name"):
        wrap(Memory(), [f"log:file={path}"])
    assert content == path.read_bytes()


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_is_continued(tmp_path, form):
    path = tmp_path / "log"
    for lines in (1, 2):
        disk = wrap(Memory(), [f"log:file={path},format={form}"])
        disk.read([memoryview(bytearray(512))], 0)
        disk.close()
        assert lines == len(path.read_text().splitlines())


def test_a_log_that_cannot_be_written_changes_nothing():
    disk = wrap(Memory(), ["log:file=/dev/full"])
    write(disk, 0, b"x" * 512)
    assert b"x" * 512 == read(disk, 0, 512)
    disk.close()


def test_a_symbolic_link_is_not_followed(tmp_path):
    os.symlink(tmp_path / "target", tmp_path / "link")
    with pytest.raises(Exception, match=os.strerror(errno.ELOOP)):
        wrap(Memory(), [f"log:file={tmp_path}/link"])
    assert not (tmp_path / "target").exists()
