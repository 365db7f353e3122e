"""The record of a serving process: locked, read by others, and gone with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import pytest
import storage

from xen_disk_py import __version__
from xen_disk_py.blkif import Ring
from xen_disk_py.datapath import statistics
from xen_disk_py.datapath.journal import SIZE, Unanswered
from xen_disk_py.datapath.latency import SIZE as LATENCIES
from xen_disk_py.errors import DeviceError, DeviceTaken, XenUnavailable
from xen_disk_py.host import process
from xen_disk_py.host.process import start_time
from xen_disk_py.recovery import record
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import HEAD, Found, Record, find, forget
from xen_disk_py.xenbus.states import Address

ADDRESS = Address(0, 5, 51728, "vbd3")
ROOM = (32 * 1024 - 8) // 2 - 4  # bytes of facts
FACTS = Facts(vdev="xvdb", path="/images/größe.img", size=1 << 40)
EMPTY = len(Facts(path="").encode())


UNREADABLE = [b"", b"{", b"nonsense", b"\xff\xfe", b'{"a": 1', b"[]", b"7", b"[" * ROOM]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(record, "_PAUSE", 0.001)


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path / "run" / "xen_disk_py")


def path_in(directory):
    return Path(directory, "5-51728")


def in_another_process(code, *arguments):
    """Run code there with what it needs at hand; give what it prints as JSON."""
    prologue = (
        "import json, os, sys\n"
        "from xen_disk_py.recovery.record import *\n"
        "from xen_disk_py.recovery.facts import Facts\n"
        "from xen_disk_py.xenbus.states import Address\n"
        "ADDRESS = Address(0, 5, 51728, 'vbd3')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prologue + code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "" == done.stderr
    return json.loads(done.stdout)


class TestServing:
    def test_another_process_sees_who_serves_what_and_the_counters(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            for _ in range(3):
                mine.statistics.add(statistics.BYTES_READ, 1 << 40)
            mine.statistics.of_queue(7).add(statistics.BYTES_READ, 1)
            found = in_another_process(
                "found = find(sys.argv[1], ADDRESS)\n"
                "print(json.dumps([found.facts.path, found.counters, found.alive]))",
                directory,
            )

        expected = dict.fromkeys(statistics.Statistics().as_dict(), 0)
        expected["bytes_read"] = (3 << 40) + 1
        assert [FACTS.path, expected, True] == found

    def test_what_is_read_is_what_was_counted_last(self, directory):
        with Record(directory, ADDRESS) as mine:
            for number in range(1, 20):
                mine.statistics.add(statistics.REQUESTS)
                assert number == find(directory, ADDRESS).counters["requests"]

    def test_the_last_description_counts(self, directory):
        with Record(directory, ADDRESS) as mine:
            assert find(directory, ADDRESS).facts is None
            mine.describe(Facts(path="a" * 1000))
            mine.describe(FACTS)
            assert FACTS == find(directory, ADDRESS).facts

    def test_one_who_reads_amid_a_description_reads_again(self, directory, monkeypatch):
        """What a living process has not wholly written is not taken for what it says."""
        mixtures, pread = [3, 2, 1], os.pread

        def read(fd, length, offset):
            data = bytearray(pread(fd, length, offset))
            if mixtures:
                data[data.index(b"torn.raw")] ^= mixtures.pop()
            return bytes(data)

        with Record(directory, ADDRESS) as mine:
            pid = os.getpid()
            facts = Facts(path="/torn.raw", pid=pid, process_started=start_time(pid))
            mine.describe(facts)
            monkeypatch.setattr(record.os, "pread", read)
            assert Found(facts, mine.statistics.as_dict(), True) == find(directory, ADDRESS)
            monkeypatch.undo()

    def test_the_format_is_told_with_the_facts(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.describe(Facts(path="/a"))
            assert Facts(path="/a", format=record.FORMATS[-1]) == find(directory, ADDRESS).facts
            assert mine.facts == find(directory, ADDRESS).facts

    @pytest.mark.parametrize("count", [1, 2])
    def test_facts_of_half_their_place_fit(self, directory, count):
        facts = Facts(path="x" * (ROOM - EMPTY))
        with Record(directory, ADDRESS) as mine:
            mine.statistics.add(statistics.REQUESTS, 7)
            for _ in range(count):
                mine.describe(facts)
            assert Found(facts, mine.statistics.as_dict(), True) == find(directory, ADDRESS)

    def test_facts_that_do_not_fit_are_an_error_and_the_old_ones_stay(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.statistics.add(statistics.REQUESTS, 7)
            mine.describe(FACTS)
            with pytest.raises(DeviceError, match=f"too long to be noted: {ROOM + 1} bytes"):
                mine.describe(Facts(path="x" * (ROOM + 1 - EMPTY)))
            assert FACTS == mine.facts
            assert Found(FACTS, mine.statistics.as_dict(), True) == find(directory, ADDRESS)

    def test_a_device_is_served_once(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            with pytest.raises(DeviceTaken, match="another process serves device 51728"):
                Record(directory, ADDRESS)
            name = in_another_process(
                "try: Record(sys.argv[1], ADDRESS)\n"
                "except Exception as error: print(json.dumps(type(error).__name__))",
                directory,
            )
            assert "DeviceTaken" == name
            assert FACTS == find(directory, ADDRESS).facts  # they took nothing away
            assert find(directory, ADDRESS).alive

    def test_other_devices_and_guests_are_served_beside_it(self, directory):
        others = [Address(0, 5, 51744, "vbd3"), Address(0, 6, 51728, "vbd3")]
        with contextlib.ExitStack() as stack:
            for number, address in enumerate([ADDRESS, *others]):
                one = stack.enter_context(Record(directory, address))
                one.describe(Facts(number=number))
                one.statistics.add(statistics.READS, number)
            for number, address in enumerate([ADDRESS, *others]):
                found = find(directory, address)
                assert (number, number) == (found.facts.number, found.counters["reads"])

    def test_one_who_looks_does_not_make_the_device_look_taken(self, directory, monkeypatch):
        Path(directory).mkdir(parents=True)
        path_in(directory).touch()
        with path_in(directory).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # as find does, for a moment
            monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(file, fcntl.LOCK_UN))
            with Record(directory, ADDRESS):
                assert find(directory, ADDRESS).alive


class TestEnd:
    def test_nothing_is_left(self, directory):
        with Record(directory, ADDRESS):
            assert [path_in(directory)] == list(Path(directory).iterdir())

        assert [] == list(Path(directory).iterdir())
        assert find(directory, ADDRESS) is None

    def test_closing_again_does_nothing(self, directory):
        mine = Record(directory, ADDRESS)
        mine.close()
        with Record(directory, ADDRESS):
            mine.close()
            assert find(directory, ADDRESS).alive

    def test_its_counters_stay_readable(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.statistics.add(statistics.WRITES, 3)
        mine.statistics.add(statistics.WRITES)

        assert 4 == mine.statistics.as_dict()["writes"]

    def test_the_device_can_be_served_again_at_once_with_fresh_counters(self, directory):
        for _ in range(5):
            again = Record(directory, ADDRESS)
            assert 0 == again.statistics.as_dict()["reads"]
            again.statistics.add(statistics.READS, 9)
            again.describe(FACTS)
            again.close()

    def test_a_record_that_somebody_removed_is_no_problem(self, directory):
        with Record(directory, ADDRESS):
            path_in(directory).unlink()

    def test_it_removes_no_record_but_its_own(self, directory):
        with Record(directory, ADDRESS):
            path_in(directory).unlink()
            successor = Record(directory, ADDRESS)

        assert find(directory, ADDRESS).alive
        successor.close()
        assert find(directory, ADDRESS) is None


class TestEndAsAnotherUser:
    """Whose process may not remove the file."""

    @pytest.fixture(autouse=True)
    def ended(self, directory, monkeypatch):
        def refuse(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)

        mine = Record(directory, ADDRESS)
        mine.describe(FACTS)
        mine.statistics.add(statistics.BYTES_READ, 7)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            mine.close()
        self.mine = mine

    def test_the_record_tells_nothing_and_is_not_alive(self, directory):
        found = find(directory, ADDRESS)
        assert (None, False) == (found.facts, found.alive)
        assert 7 == self.mine.statistics.as_dict()["bytes_read"]

    def test_the_next_of_any_device_removes_it(self, directory):
        with Record(directory, Address(0, 6, 51712, "vbd3")):
            assert ["6-51712"] == os.listdir(directory)
        assert [] == os.listdir(directory)

    def test_the_next_of_its_device_takes_its_place(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            assert FACTS == find(directory, ADDRESS).facts
        assert [] == os.listdir(directory)

    def test_nobody_adopts_it(self, directory):
        with pytest.raises(DeviceError, match="cannot be adopted"):
            Record.adopt(directory, ADDRESS)
        with Record(directory, Address(0, 6, 51712, "vbd3")):
            assert ["6-51712"] == os.listdir(directory)

    def test_neither_a_living_record_nor_a_killed_ones_is_removed(self, directory):
        killed = Record(directory, Address(0, 7, 51712, "vbd3"))
        killed.describe(FACTS)
        killed.leave()
        half = Path(directory, "8-51712")
        half.write_bytes(b"")
        with Record(directory, Address(0, 6, 51712, "vbd3")):  # not described yet
            Record(directory, Address(0, 9, 51712, "vbd3")).close()
            assert ["6-51712", "7-51712", "8-51712"] == sorted(os.listdir(directory))


class TestStale:
    """What a process leaves that is killed."""

    @pytest.fixture
    def stale(self, directory):
        in_another_process(
            "mine = Record(sys.argv[1], ADDRESS)\n"
            "mine.describe(Facts(pid=os.getpid()))\n"
            "mine.statistics.add(0, 77)\n"
            "print(os.getpid(), flush=True)\n"
            "os._exit(0)",
            directory,
        )

    @pytest.mark.usefixtures("stale")
    def test_it_can_be_read_and_is_not_alive(self, directory):
        found = find(directory, ADDRESS)

        assert 77 == found.counters["requests"]
        assert found.facts.pid > 0
        assert not found.alive

    @pytest.mark.usefixtures("stale")
    def test_a_successor_takes_it_over_and_starts_from_nothing(self, directory):
        with Record(directory, ADDRESS) as mine:
            assert Found(None, dict.fromkeys(mine.statistics.as_dict(), 0), True) == find(
                directory, ADDRESS
            )

    @pytest.mark.usefixtures("stale")
    def test_it_can_be_forgotten(self, directory):
        forget(directory, ADDRESS)

        assert find(directory, ADDRESS) is None
        assert [] == list(Path(directory).iterdir())

    @pytest.mark.usefixtures("stale")
    def test_it_is_forgotten_though_somebody_looks_just_then(self, directory):
        with open(path_in(directory), "rb") as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)
            gone = threading.Timer(0.02, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
            gone.start()
            forget(directory, ADDRESS)
            gone.join()
        assert [] == os.listdir(directory)

    def test_what_is_not_there_can_be_forgotten(self, directory):
        forget(directory, ADDRESS)
        Path(directory).mkdir(parents=True)
        forget(directory, ADDRESS)

    def test_what_lives_is_not_forgotten(self, directory):
        with Record(directory, ADDRESS):
            forget(directory, ADDRESS)
            assert find(directory, ADDRESS).alive


RING = Ring((8, 9), 17)
LEFT = Unanswered(7, [b"a" * 12], [b"b" * 112, b"c" * 112])


class TestAdopting:
    """The record of a killed process is taken over."""

    @pytest.fixture
    def killed(self, directory):
        """A record of three queues whose process was killed."""
        program = (
            "import os, sys, time\n"
            "from xen_disk_py.blkif import Ring\n"
            "from xen_disk_py.recovery.facts import Facts\n"
            "from xen_disk_py.recovery.record import Record\n"
            "from xen_disk_py.xenbus.states import Address\n"
            "mine = Record(sys.argv[1], Address(0, 5, 51728, 'vbd3'), 3)\n"
            "mine.describe(Facts(path='/a'))\n"
            "mine.statistics.add(0, 77)\n"
            "mine.statistics.of_queue(2).add(0, 5)\n"
            "mine.journals[2].begin(Ring((8, 9), 17), 112)\n"
            "mine.journals[2].note(7, [b'a' * 12], [b'b' * 112, b'c' * 112])\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)\n"
        )
        command = [sys.executable, "-c", program, directory]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        with child:
            assert b"ready\n" == child.stdout.readline()
            with pytest.raises(DeviceTaken, match="a process that lives serves xvdb of domain 5"):
                Record.adopt(directory, ADDRESS)
            child.send_signal(signal.SIGKILL)
        assert -signal.SIGKILL == child.returncode

    @pytest.mark.usefixtures("killed")
    def test_all_is_as_it_was_and_continues(self, directory):
        assert not find(directory, ADDRESS).alive
        mine = Record.adopt(directory, ADDRESS)
        assert Facts(path="/a") == mine.facts
        assert 82 == mine.statistics.as_dict()["requests"]
        assert [None, None, LEFT] == [journal.recall(RING, 112) for journal in mine.journals]
        mine.statistics.add(statistics.REQUESTS)
        mine.update(pid=4)
        found = find(directory, ADDRESS)
        assert (Facts(path="/a", pid=4), 83, True) == (
            found.facts,
            found.counters["requests"],
            found.alive,
        )
        with pytest.raises(DeviceTaken):
            Record(directory, ADDRESS)
        mine.close()
        assert [] == os.listdir(directory)

    @pytest.mark.usefixtures("killed")
    def test_what_was_left_is_adopted_again_and_again(self, directory):
        for number in range(3):
            mine = Record.adopt(directory, ADDRESS)
            assert 82 + number == mine.statistics.as_dict()["requests"]
            mine.statistics.add(statistics.REQUESTS)
            (*_, journal) = mine.journals
            assert LEFT._replace(start=7 + number) == journal.recall(RING, 112)
            journal.note(8 + number, LEFT.responses, LEFT.requests)
            mine.leave()
            mine.leave()  # it has
            mine.close()  # nothing any longer
            found = find(directory, ADDRESS)
            assert (False, 83 + number) == (found.alive, found.counters["requests"])
        forget(directory, ADDRESS)
        assert [] == os.listdir(directory)

    @pytest.mark.usefixtures("killed")
    def test_of_two_processes_one_adopts(self, directory):
        program = (
            "import sys\n"
            "from xen_disk_py.errors import DeviceTaken\n"
            "from xen_disk_py.recovery.facts import Facts\n"
            "from xen_disk_py.recovery.record import Record\n"
            "from xen_disk_py.xenbus.states import Address\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n"
            "try:\n"
            "    mine = Record.adopt(sys.argv[1], Address(0, 5, 51728, 'vbd3'))\n"
            "except DeviceTaken:\n"
            "    print('taken', flush=True)\n"
            "else:\n"
            "    print('adopted', flush=True)\n"
            "    sys.stdin.readline()\n"
            "    mine.leave()\n"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", program, directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            for _ in range(2)
        ]
        with contextlib.ExitStack() as stack:
            for child in children:
                stack.enter_context(child)
                assert "ready\n" == child.stdout.readline()
            for child in children:
                child.stdin.write("go\n")
            said = [child.stdout.readline().strip() for child in children]
            assert ["adopted", "taken"] == sorted(said)
        with Record.adopt(directory, ADDRESS):
            pass

    def test_nothing_is_adopted_without_a_record(self, directory):
        for _ in range(2):
            with pytest.raises(DeviceError, match="no record of xvdb of domain 5"):
                Record.adopt(directory, ADDRESS)
            Path(directory).mkdir(parents=True, exist_ok=True)
        assert [] == os.listdir(directory)

    def test_a_file_that_cannot_be_opened_names_the_remedy(self, directory):
        path_in(directory).mkdir(parents=True)
        with pytest.raises(XenUnavailable, match="Is a directory; run as root"):
            Record.adopt(directory, ADDRESS)

    @staticmethod
    def other_format(mine, path):
        mine._facts.write(b'{"path": "/a", "format": 1}')

    @staticmethod
    def no_format(mine, path):
        mine._facts.write(b'{"path": "/a"}')

    @staticmethod
    def damaged(mine, path):
        with path.open("r+b") as file:
            file.write(b"\3")

    @staticmethod
    def one_byte_more(mine, path):
        os.truncate(path, path.stat().st_size + 1)

    @staticmethod
    def no_journal(mine, path):
        os.truncate(path, path.stat().st_size - SIZE)

    @staticmethod
    def empty(mine, path):
        os.truncate(path, 0)

    @pytest.mark.parametrize(
        "harm", ["other_format", "no_format", "damaged", "one_byte_more", "no_journal", "empty"]
    )
    def test_what_cannot_be_read_is_left_to_disconnect(self, directory, harm):
        mine = Record(directory, ADDRESS)
        mine.describe(FACTS)
        getattr(self, harm)(mine, path_in(directory))
        mine.leave()
        content = path_in(directory).read_bytes()
        refusals = []  # kept: with the first one's traceback its mapping lives on
        for _ in range(2):
            with pytest.raises(DeviceError, match="xen-disk disconnect 5 xvdb --force") as refused:
                Record.adopt(directory, ADDRESS)
            assert not isinstance(refused.value, DeviceTaken)
            refusals.append(refused)
        assert content == path_in(directory).read_bytes()
        with Record(directory, ADDRESS) as successor:  # the lock is free
            successor.describe(FACTS)
        assert [] == os.listdir(directory)

    @pytest.mark.parametrize("text", UNREADABLE)
    def test_facts_that_cannot_be_read_are_left_to_disconnect(self, directory, text):
        mine = Record(directory, ADDRESS)
        mine._facts.write(text)
        mine.leave()
        with pytest.raises(DeviceError, match="damaged, or another version wrote it"):
            Record.adopt(directory, ADDRESS)
        forget(directory, ADDRESS)
        assert [] == os.listdir(directory)

    @pytest.mark.parametrize("sealed", [False, True])
    @pytest.mark.parametrize("size", [HEAD + SIZE, HEAD + 12345])
    def test_what_a_newer_version_wrote_is_left_to_that_version(self, directory, sealed, size):
        """It may be shorter or longer than ours."""
        mine = Record(directory, ADDRESS)
        newer = json.dumps({**json.loads(FACTS.encode()), "format": 99, "version": "9.1"})
        mine._facts.write(newer.encode() if not sealed else FACTS._replace(version="9.1").encode())
        mine.leave()
        path = path_in(directory)
        if sealed:
            Path(f"{path}.sealed").write_text(newer)
        os.truncate(path, size)
        before = {name: Path(directory, name).read_bytes() for name in os.listdir(directory)}
        with pytest.raises(DeviceError) as refused:
            Record.adopt(directory, ADDRESS)
        assert (
            f"{path} was written by xen-disk 9.1, in terms that {__version__} does not know: xvdb "
            "of domain 5 cannot be adopted, and is as it was; take it over with that version "
            "(xen-disk connect --adopt 5 xvdb), or take it away with: xen-disk disconnect 5 xvdb "
            "--force"
        ) == str(refused.value)
        assert before == {name: Path(directory, name).read_bytes() for name in before}
        assert not find(directory, ADDRESS).alive  # the lock is free

    def test_a_file_that_cannot_be_mapped_stays_and_its_lock_is_free(self, directory, monkeypatch):
        mine = Record(directory, ADDRESS)
        mine.describe(FACTS)
        mine.leave()

        def fail(*arguments):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        with monkeypatch.context() as patch:
            patch.setattr(record.mmap, "mmap", fail)
            with pytest.raises(OSError, match="Cannot allocate"):
                Record.adopt(directory, ADDRESS)
        with Record.adopt(directory, ADDRESS) as again:
            assert FACTS == again.facts

    @pytest.mark.parametrize("queues", [1, 8])
    def test_a_record_of_format_2_gets_histograms_that_begin_anew(self, directory, queues):
        with Record(directory, ADDRESS, queues) as mine:
            mine.describe(Facts(path="/a", format=2))
            mine.statistics.add(statistics.BYTES_READ, 7)
            content = path_in(directory).read_bytes()
        path_in(directory).write_bytes(content[: -queues * LATENCIES])
        assert record.queues_in(len(content) - queues * LATENCIES) == queues
        with Record.adopt(directory, ADDRESS) as again:
            assert (2, 7) == (again.facts.format, again.statistics.as_dict()["bytes_read"])
            assert queues == len(again.journals)
            again.statistics.of_queue(queues - 1).latencies[0] = 5
            assert len(content) == path_in(directory).stat().st_size
            again.leave()
        with Record.adopt(directory, ADDRESS) as third:  # killed before it was described anew
            assert 5 == third.statistics.of_queue(queues - 1).latencies[0]

    def test_without_room_for_histograms_a_record_of_format_2_is_taken_over(
        self, directory, monkeypatch
    ):
        with Record(directory, ADDRESS) as mine:
            mine.describe(Facts(path="/a", format=2))
            content = path_in(directory).read_bytes()
        path_in(directory).write_bytes(content[:-LATENCIES])

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(record.os, "posix_fallocate", full)
        with Record.adopt(directory, ADDRESS) as again:
            assert "/a" == again.facts.path
            again.statistics.of_queue(0).latencies[0] = 5


class TestFinding:
    @pytest.mark.parametrize(
        "content",
        [b"", b"\0", b"{}", b"x" * 4096, b"\0" * (4096 + 8)],
        ids=["empty", "a byte", "short", "a page", "a page and a word"],
    )
    def test_half_a_record_is_none(self, directory, content):
        Path(directory).mkdir(parents=True)
        path_in(directory).write_bytes(content)

        assert find(directory, ADDRESS) is None

    @pytest.mark.parametrize("text", UNREADABLE)
    def test_facts_that_cannot_be_read_are_none(self, directory, text):
        with Record(directory, ADDRESS) as mine:
            mine.statistics.add(statistics.READS)
            mine._facts.write(text)
            assert Found(None, mine.statistics.as_dict(), True) == find(directory, ADDRESS)

    @pytest.mark.parametrize("head", [b"\3", b"\1\0\0\0\0\0\0\0\xff\xff"])
    def test_facts_whose_place_is_damaged_are_none(self, directory, head):
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            with path_in(directory).open("r+b") as file:
                file.write(head)
            assert Found(None, mine.statistics.as_dict(), True) == find(directory, ADDRESS)

    def test_none_without_a_directory(self, directory):
        assert find(directory, ADDRESS) is None


class TestTrouble:
    def test_a_directory_that_cannot_be_made_names_the_remedy(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(XenUnavailable, match=r"cannot write .*5-51728: Not a directory: see"):
            Record(str(tmp_path / "file" / "run"), ADDRESS)

    def test_a_file_that_cannot_be_made_names_the_remedy(self, directory):
        path_in(directory).mkdir(parents=True)
        with pytest.raises(XenUnavailable, match="Is a directory: see whether"):
            Record(directory, ADDRESS)

    def test_a_full_file_system_is_said_and_no_empty_file_is_left(self, tmp_path):
        with contextlib.ExitStack() as stack:
            run = storage.small_file_system(tmp_path, stack, "16k")
            said = r"No space left on device: make room there \(df -h .*/tmpfs/records\)"
            with pytest.raises(XenUnavailable, match=said):
                Record(str(run / "records"), ADDRESS)
            assert [] == os.listdir(run / "records")
            (run / "other").write_bytes(bytes(12 << 10))
            with pytest.raises(XenUnavailable, match="make room there"):
                Record(str(run / "records"), ADDRESS)
            assert [] == os.listdir(run / "records")

    def test_where_no_file_can_be_locked_none_stays_open(self, directory, monkeypatch):
        def fail(descriptor, how):
            tried.append(descriptor)
            raise OSError(errno.ENOLCK, "No locks available")

        tried = []
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", fail)
            with pytest.raises(XenUnavailable, match="No locks available"):
                Record(directory, ADDRESS)
        for descriptor in tried:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)

    def test_a_failure_half_way_leaves_the_lock_to_others(self, directory, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", fail)
            with pytest.raises(XenUnavailable, match="No space left on device: make room there"):
                Record(directory, ADDRESS)
        with Record(directory, ADDRESS):
            assert find(directory, ADDRESS).alive


class TestRaces:
    """Between opening the file and locking it, its name may be lost."""

    @pytest.fixture
    def before_locking(self, monkeypatch):
        """Have something done when the next lock is asked for."""

        def arrange(action):
            def lock(*arguments):
                monkeypatch.setattr(fcntl, "flock", flock)
                action()
                return flock(*arguments)

            flock = fcntl.flock
            monkeypatch.setattr(fcntl, "flock", lock)

        return arrange

    @pytest.mark.parametrize("successor", [False, True])
    def test_a_lock_on_a_removed_file_is_worth_nothing(self, directory, before_locking, successor):
        Path(directory).mkdir(parents=True)
        path_in(directory).touch()

        def end():
            path_in(directory).unlink()
            if successor:
                path_in(directory).touch()

        before_locking(end)
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            assert FACTS == find(directory, ADDRESS).facts
            with pytest.raises(DeviceTaken):
                Record(directory, ADDRESS)

    def test_one_that_ends_meanwhile_is_followed(self, directory, before_locking):
        before = Record(directory, ADDRESS)
        before_locking(before.close)
        with Record(directory, ADDRESS):
            assert find(directory, ADDRESS).alive

    def test_one_that_is_quicker_keeps_the_device(self, directory, before_locking):
        Path(directory).mkdir(parents=True)
        path_in(directory).touch()
        quicker = []

        def take_over():
            path_in(directory).unlink()
            quicker.append(Record(directory, ADDRESS))

        before_locking(take_over)
        with pytest.raises(DeviceTaken):
            Record(directory, ADDRESS)
        assert find(directory, ADDRESS).alive
        quicker[0].close()

    def test_a_successor_is_not_forgotten_for_its_predecessor(self, directory, before_locking):
        Path(directory).mkdir(parents=True)
        path_in(directory).touch()
        successors = []

        def replace():
            path_in(directory).unlink()
            successors.append(Record(directory, ADDRESS))

        before_locking(replace)
        forget(directory, ADDRESS)
        assert find(directory, ADDRESS).alive
        successors[0].close()

    def test_whatever_the_order_no_two_serve_a_device(self, directory):
        serving, most, served = [], [], []

        def serve():
            while len(most) < 100:
                try:
                    with Record(directory, ADDRESS):
                        serving.append(1)
                        most.append(len(serving))
                        found = find(directory, ADDRESS)
                        served.append(found is not None and found.alive)
                        serving.pop()
                except DeviceTaken:
                    pass

        def look():
            while len(most) < 100:
                find(directory, ADDRESS)
                forget(directory, ADDRESS)

        threads = [threading.Thread(target=target) for target in (serve, serve, serve, look)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert {1} == set(most)
        assert all(served)
        assert find(directory, ADDRESS) is None


class TestStrangers:
    """Whoever can open a record can lock it, and a locked record is one that somebody serves."""

    def test_nobody_else_can_open_a_record(self, directory):
        with Record(directory, ADDRESS):
            assert 0o700 == stat.S_IMODE(os.stat(directory).st_mode)
            (name,) = os.listdir(directory)
            assert 0o600 == stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode)

    def test_a_directory_of_an_older_version_is_closed(self, directory):
        os.makedirs(directory, 0o755)
        Record(directory, ADDRESS).close()
        assert 0o700 == stat.S_IMODE(os.stat(directory).st_mode)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
    def test_a_directory_that_somebody_else_has_made_is_refused(self, directory):
        os.makedirs(directory)
        os.chown(directory, 65534, 65534)
        with pytest.raises(XenUnavailable, match="somebody else has made it"):
            Record(directory, ADDRESS)

    def test_a_link_in_the_place_of_a_record_is_not_followed(self, directory, tmp_path):
        os.makedirs(directory)
        target = tmp_path / "target"
        target.write_bytes(b"theirs")
        os.symlink(target, os.path.join(directory, f"{ADDRESS.frontend_domid}-{ADDRESS.devid}"))
        with pytest.raises(XenUnavailable):
            Record(directory, ADDRESS)
        assert b"theirs" == target.read_bytes()

    def test_a_lock_for_a_moment_does_not_make_a_dead_process_live(self, directory):
        """As that of a sweep, which looks into every record."""
        mine = Record(directory, ADDRESS)
        mine.describe(Facts(path="/a", pid=999_999_999, process_started=1))
        mine.leave()
        path = os.path.join(directory, f"{ADDRESS.frontend_domid}-{ADDRESS.devid}")
        with open(path, "rb") as sweeping:
            fcntl.flock(sweeping, fcntl.LOCK_EX)
            gone = threading.Timer(0.05, lambda: fcntl.flock(sweeping, fcntl.LOCK_UN))
            gone.start()
            assert not find(directory, ADDRESS).alive
            gone.join()

    def test_a_process_that_lives_is_seen_at_once(self, directory, monkeypatch):
        monkeypatch.setattr(record.time, "sleep", lambda seconds: pytest.fail("waited"))
        with Record(directory, ADDRESS) as mine:
            started = process.start_time(os.getpid())
            mine.describe(Facts(path="/a", pid=os.getpid(), process_started=started))
            assert find(directory, ADDRESS).alive


def test_a_process_that_has_died_is_none_that_serves_though_a_queue_s_process_keeps_the_lock(
    directory, monkeypatch
):
    """Whoever takes the disk over waits for that one."""
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as queue,
        Record(directory, ADDRESS) as mine,
    ):
        facts = Facts(pid=999_999_999, survives=True, disk={}, format=record.FORMATS[-1])
        mine.describe(facts._replace(queues=((queue.pid, start_time(queue.pid)),)))
        found = find(directory, ADDRESS)
        assert (False, True) == (found.alive, found.is_orphan)
        assert [queue.pid] == found.facts.queue_pids
        with monkeypatch.context() as patch:
            patch.setattr(record, "_TRIES", 1)
            with pytest.raises(DeviceTaken, match="has died, but of its queues' processes"):
                Record.adopt(directory, ADDRESS)
        waiting = threading.Thread(target=record.await_end, args=(directory, ADDRESS))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        queue.kill()
        queue.wait()
        waiting.join(30)
        assert not waiting.is_alive()


def test_whoever_waits_for_that_one_still_starts(directory, tmp_path, monkeypatch):
    """A supervisor has it neither be silent, nor take signals yet."""
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as queue,
        Record(directory, ADDRESS) as mine,
    ):
        listener.bind(path)
        queues = ((queue.pid, start_time(queue.pid)),)
        mine.describe(Facts(pid=999_999_999, queues=queues))

        def end(seconds):
            queue.kill()
            queue.wait()

        monkeypatch.setattr(record.time, "sleep", end)
        record.await_end(directory, ADDRESS)
        assert b"EXTEND_TIMEOUT_USEC=60000000" == listener.recv(100)


def test_nobody_waits_for_a_process_that_has_ended_because_nobody_else_has(directory, monkeypatch):
    """A zombie: where process 1 does not wait for those whose parents have died, it stays one."""
    monkeypatch.setattr(record.time, "sleep", lambda seconds: pytest.fail("waited"))
    with subprocess.Popen([sys.executable, "-c", ""]) as queue:
        os.waitid(os.P_PID, queue.pid, os.WEXITED | os.WNOWAIT)
        mine = Record(directory, ADDRESS)
        mine.describe(Facts(pid=999_999_999, queues=((queue.pid, start_time(queue.pid)),)))
        mine.leave()
        record.await_end(directory, ADDRESS)


class TestSealed:
    """What counts of a record whose process has given its privileges up, and may be another's."""

    SPEC = MappingProxyType(
        {"path": "/images/a", "user": "nobody", "filters": ["log:file=/l", "delay:read=1ms"]}
    )
    SERVED = FACTS._replace(pid=7, process_started=1, files={"/images/a": 1}, disk=dict(SPEC))

    def leave(self, directory, *described, seal=SERVED):
        mine = Record(directory, ADDRESS)
        mine.seal(seal)
        for facts in (seal, *described):
            mine.describe(facts)
        mine.leave()

    @pytest.mark.parametrize(
        "forged",
        [
            {"path": "/etc/shadow", "user": "nobody", "filters": SPEC["filters"]},
            {"path": "/images/a"},
            {**SPEC, "filters": ["log:file=/etc/cron.d/log", "delay:read=1ms"]},
            {**SPEC, "filters": ["log:file=/l,file=/other", "delay:read=1ms"]},
            {**SPEC, "filters": ["log:file=/l", "/tmp/evil.py"]},
            {**SPEC, "filters": ["log:file=/l", "delay:/tmp/evil.py:read=1"]},
            {**SPEC, "filters": ["log:file=/l", "delay:read=1ms", "record:file=/etc/cron.d/t"]},
            {**SPEC, "filters": ["log:file=/l"]},
            {**SPEC, "filters": ["log:file=/l", 7]},
            {**SPEC, "filters": "log"},
            None,
        ],
    )
    def test_a_process_without_privileges_names_nothing_that_is_opened(self, directory, forged):
        self.leave(
            directory,
            self.SERVED._replace(disk=forged, pid=1, process_started=2, files={}, storage=()),
        )
        assert self.SERVED == find(directory, ADDRESS).facts
        with Record.adopt(directory, ADDRESS) as mine:
            assert self.SERVED == mine.facts

    def test_how_things_are_with_the_disk_is_what_it_says(self, directory):
        filters = ["log:file=/l,format=json", "delay:read=9ms,write=1ms"]
        now = self.SERVED._replace(
            size=7,
            resizing=8,
            connected=True,
            pause=1.5,
            started=2.5,
            disk={**self.SPEC, "filters": filters},
        )
        self.leave(directory, now)
        assert now == find(directory, ADDRESS).facts

    def test_an_author_s_filter_keeps_the_options_that_it_had(self, directory):
        served = self.SERVED._replace(disk={**self.SPEC, "filters": ["/my.py:at=/a"]})
        forged = {**self.SPEC, "filters": ["/my.py:at=/b"]}
        self.leave(directory, served._replace(disk=forged), seal=served)
        assert served == find(directory, ADDRESS).facts

    @pytest.mark.parametrize("text", [b"", b"{", b'{"format": 99}'])
    def test_what_was_sealed_cannot_be_read(self, directory, text):
        self.leave(directory)
        Path(f"{path_in(directory)}.sealed").write_bytes(text)
        with pytest.raises(DeviceError, match="another version wrote it"):
            Record.adopt(directory, ADDRESS)
        assert not find(directory, ADDRESS).is_orphan

    def test_it_goes_with_the_record_and_is_its_own(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.seal(self.SERVED)
            assert 0o600 == stat.S_IMODE(os.stat(f"{mine.path}.sealed").st_mode)
            mine.describe(self.SERVED)
        assert [] == os.listdir(directory)
        Path(f"{path_in(directory)}.sealed").write_bytes(self.SERVED.encode())  # of one before
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            assert FACTS == find(directory, ADDRESS).facts

    def test_a_record_that_its_process_emptied_goes_with_it(self, directory):
        self.leave(directory)
        with Record.adopt(directory, ADDRESS) as mine:
            mine._facts.clear()
            mine.leave()
        record.sweep(directory)
        assert [] == os.listdir(directory)

    def test_one_that_was_not_complete_when_its_process_was_killed_goes_with_it(self, directory):
        with Record(directory, ADDRESS) as mine:
            mine.describe(FACTS)
            Path(f"{mine.path}.sealed.new").write_bytes(b"{")
        assert [] == os.listdir(directory)

    def test_no_room_for_it(self, directory):
        with Record(directory, ADDRESS) as mine:
            os.mkdir(f"{mine.path}.sealed")
            with pytest.raises(XenUnavailable, match=r"5-51728\.sealed: Is a directory: see"):
                mine.seal(FACTS)
            os.rmdir(f"{mine.path}.sealed")
            assert [os.path.basename(mine.path)] == os.listdir(directory)
