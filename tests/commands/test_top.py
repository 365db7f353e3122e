"""``top``: what all disks do, on a terminal and elsewhere, with nothing locked."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands import rates as rates_module
from xen_disk_py.commands import top
from xen_disk_py.commands.arguments import build_parser, commands_of
from xen_disk_py.commands.rates import SORTS, in_order, rates
from xen_disk_py.commands.top_table import COLUMNS, DEAD, drawing, fitting
from xen_disk_py.datapath.latency import Latency, bucket_of
from xen_disk_py.datapath.statistics import BYTES_READ, ERRORS, READS, REQUESTS
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.process import start_time
from xen_disk_py.recovery import survey
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record
from xen_disk_py.recovery.survey import Seen
from xen_disk_py.xenbus.states import Address

QUICK = "--interval=0.001"


@pytest.fixture
def served(host):
    """Make the record of a disk, of this process."""
    records = []

    def served(domid=5, domain="guest", number=51728, vdev="xvdb", queues=1):
        one = Record(host.records, Address(0, domid, number, "vbd3"), queues)
        records.append(one)
        facts = Facts(domid=domid, domain=domain, vdev=vdev, number=number, backend="raw")
        pid = os.getpid()
        one.describe(facts._replace(pid=pid, process_started=start_time(pid)))
        return one

    yield served
    while records:
        records.pop().close()


@pytest.fixture
def run(host):
    def run(*argv):
        env = host.environment()
        status = main(["top", *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return run


def test_nothing(run):
    status, out, _ = run("--once", QUICK)
    assert (ExitStatus.OK, 1) == (status, len(out.splitlines()))
    assert "[]\n" == run("--once", QUICK, "--json")[1]


def test_a_disk_is_shown(run, served):
    served()
    _, out, _ = run("--once", QUICK)
    assert ["guest", "xvdb", "raw", "0", "0.0", "-", "-", "-", "0.0", "0", "0", "0", "B"] == (
        out.splitlines()[1].split()
    )


def test_a_guest_is_chosen_by_name_or_number(run, served):
    served()
    served(domid=7, domain="other")
    for guest in ("other", "7"):
        (row,) = json.loads(run(guest, "--once", QUICK, "--json")[1])
        assert 7 == row["domid"]


def test_a_name_moves_no_cursor(run, served):
    served(domain="a\x1b[2Jb\nc")
    out = run("--once", QUICK)[1]
    assert "a\\x1b[2Jb\\nc" in out
    assert 2 == len(out.splitlines())


def test_a_record_that_is_being_read_can_be_locked(host, served, monkeypatch):
    """A successor claims it at any moment."""
    one = served()
    one.leave()
    before, locked = survey._read, []

    def read(fd):
        seen = before(fd)
        other = os.open(one.path, os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.append(seen)
        os.close(other)
        return seen

    monkeypatch.setattr(survey, "_read", read)
    assert 1 == len(survey.look(host.records)) == len(locked)
    os.unlink(one.path)


def test_what_is_no_record_is_left_out(host, served):
    served()
    for name, data in (("x", b"?"), ("y", bytes(300_000)), ("9-1", b"")):
        with open(os.path.join(host.records, name), "wb") as file:
            file.write(data)
    os.mkfifo(os.path.join(host.records, "fifo"))
    os.mkdir(os.path.join(host.records, "directory"))
    found = survey.look(host.records)
    for name in ("x", "y", "9-1", "fifo"):
        os.unlink(os.path.join(host.records, name))
    os.rmdir(os.path.join(host.records, "directory"))
    assert ["xvdb"] == [seen.facts.vdev for seen in found]


def test_records_that_may_not_be_read(run, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(survey.os, "listdir", refuse)
    status, _, err = run("--once")
    assert ExitStatus.ERROR == status
    assert "run as root" in err


def seen(requests=0, read=0, units=(), alive=True, **facts):
    counts = [0] * 500
    for each in units:
        counts[bucket_of(each)] += 1
    counters = dict.fromkeys(
        ("reads", "writes", "bytes_written", "held", "errors", "refused", "memory"), 0
    )
    counters.update(requests=requests, bytes_read=read, in_flight=3)
    latencies = [Latency(counts, sum(units) * 250)]
    return Seen(Facts(domid=5, number=1, **facts), counters, latencies, alive)


def test_rates_are_those_of_the_interval():
    before, now = seen(100, 1000, [4000]), seen(300, 9000, [4000, 8000, 8000])
    (row,) = rates([before], [now], 2.0)
    assert (100, 4000) == (row["iops"], row["bytes_per_second"])
    assert row["latency_p50"] == row["latency_max"] == pytest.approx(0.002, rel=1 / 32)
    assert row["queue_depth"] == pytest.approx(0.2)  # 100 requests a second, of 2 ms each
    assert 3 == row["in_flight"]


def test_a_disk_that_begins_anew_has_no_negative_rate():
    (row,) = rates([seen(100, 1000, [4000])], [seen(3, 10)], 1.0)
    assert (0, 0, None) == (row["iops"], row["bytes_per_second"], row["latency_p50"])


def test_of_a_process_that_died_nothing_is_in_flight():
    (row,) = rates([], [seen(alive=False)], 1.0)
    assert (False, 0) == (row["alive"], row["in_flight"])


@pytest.mark.parametrize("by", SORTS)
def test_disks_are_sorted(by):
    (low,), (high,) = (rates([], [seen(domain=name, vdev="x")], 1.0) for name in "ab")
    key = rates_module._KEYS.get(by)
    if key:
        high[key] = 5
        assert [high, low] == in_order([low, high], by)
    else:
        assert [low, high] == in_order([high, low], by)


def test_options_name_every_order():
    actions = commands_of(build_parser())["top"]._actions
    (choices,) = (each.choices for each in actions if each.dest == "sort")
    assert SORTS == tuple(choices)
    assert set(SORTS) == set(top._SORT_KEYS.values())


def test_the_record_of_a_disk_at_work(run, served):
    one = served(queues=2)
    words = one.statistics.of_queue(1).words
    words[REQUESTS], words[READS], words[BYTES_READ] = 5, 5, 20480
    (row,) = json.loads(run("--once", QUICK, "--json")[1])
    assert (5, True, 0.0) == (row["domid"], row["alive"], row["iops"])


def test_nobody_reads_any_longer(host, served):
    served()
    reader, writer = os.pipe()
    os.close(reader)
    env = host.environment()
    with open(writer, "w") as env.stdout:
        assert ExitStatus.ERROR == main(["top", "--interval=1000"], env)
    assert "" == env.stderr.getvalue()


def test_an_interval_of_nothing(run):
    assert ExitStatus.USAGE == run("--interval=0")[0]


@pytest.fixture(params=["plain", pytest.param("rich", marks=pytest.mark.each_python)])
def drawn(request, monkeypatch):
    """How the table is drawn on a terminal."""
    if request.param == "rich":
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    return drawing()


class Terminal:
    """What a person sees of ``top``, who presses keys, each when all before it is drawn."""

    def __init__(self, columns, keys):
        self._master, self._slave = pty.openpty()
        size = struct.pack("HHHH", 10 if columns else 0, columns, 0, 0)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, size)
        self._settings = termios.tcgetattr(self._slave)
        self._keys = keys
        self._out = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def _read(self):
        pressed = 0
        while not self._out.endswith(b"\x1b[?1049l"):
            self._out.extend(os.read(self._master, 4096))
            if pressed < min(len(self._keys), self._out.count(b"\x1b[J")):
                os.write(self._master, self._keys[pressed : pressed + 1])
                pressed += 1

    def run(self, env, *argv):
        """Return the screens, one after another, without colours."""
        self._reader.start()
        with open(os.dup(self._slave), "w") as env.stdout, open(os.dup(self._slave)) as env.stdin:
            assert ExitStatus.OK == main(["top", *argv], env)
        self._reader.join(30)
        assert not self._reader.is_alive()
        assert self._settings == termios.tcgetattr(self._slave)
        os.close(self._master)
        os.close(self._slave)
        text = self._out.decode()
        assert text.startswith("\x1b[?1049h\x1b[?25l")
        shown = re.sub("\x1b\\[[0-9;]*m|\x1b\\[K", "", text)
        return [screen.split("\r\n") for screen in re.findall("\x1b\\[H(.*?)\x1b\\[J", shown, re.S)]


def test_a_terminal_that_does_not_know_its_size(host, served, drawn):
    """A serial console's is 0 by 0."""
    served()
    screens = Terminal(0, b"q").run(host.environment(), "--interval=1000")
    assert "1 disk, 0 IOPS" in screens[0][0]
    assert screens[0][2].startswith("GUEST  VDEV  BACKEND  IOPS")
    assert all(len(line) < 80 for line in screens[0])


def test_on_a_terminal_keys_sort_and_end_it(host, served, drawn):
    """The terminal is as it was afterwards, and what is drawn fits it."""
    served()
    busy = served(domid=6, domain="other")
    busy.statistics.of_queue(0).words[ERRORS] = 7
    screens = Terminal(70, b"e<<> q").run(host.environment(), "--interval=1000")
    assert all(len(line) < 70 for screen in screens for line in screen)
    assert all(len(screen) <= 10 for screen in screens)
    assert "2 disks, 0 IOPS" in screens[0][0]
    names = [[line.split()[0] for line in screen[3:5]] for screen in screens]
    assert ["guest", "other"] == names[0]
    assert ["other", "guest"] == names[1]  # by errors
    assert "MEMORY" not in screens[0][2]
    assert "ERRORS" in screens[0][2]


def test_disks_for_which_there_is_no_room_are_counted(host, served, drawn):
    for domid in range(5, 13):
        served(domid=domid, domain=f"guest{domid}")
    (screen,) = Terminal(80, b"q").run(host.environment(), "--interval=1000")
    assert 10 == len(screen)
    assert ["guest10", "guest11", "guest12", "guest5"] == [line.split()[0] for line in screen[3:7]]
    assert "4 more: sort, or make the terminal larger" == screen[7].rstrip()


def test_a_name_is_shortened_where_there_is_no_room(host, served, drawn):
    served(domain="a guest of a long name")
    (screen,) = Terminal(36, b"q").run(host.environment(), "--interval=1000")
    assert all(len(line.rstrip()) < 36 for line in screen)
    assert "a guest" in screen[3]
    assert "…" in screen[3]


def test_that_a_process_has_died_is_shown_on_a_narrow_terminal():
    cells = [COLUMNS, ("guest", "xvdb", DEAD, *["0"] * 9)]
    for sort in range(len(COLUMNS)):
        assert 2 in fitting(cells, sort, 30)


def test_what_does_not_fit_is_left_out_but_not_what_disks_are_sorted_by():
    cells = [COLUMNS, tuple(name.lower() for name in COLUMNS)]
    everything = range(len(COLUMNS))
    assert list(everything) == fitting(cells, 0, 200)
    for sort in everything:
        for width in range(10, 100, 10):
            kept = fitting(cells, sort, width)
            assert sort in kept
            assert {0, 1, 3} <= set(kept)
            assert kept == sorted(kept)


def test_a_guests_name_is_no_markup(drawn):
    name = "[red]x[/red]"
    cells = [COLUMNS, (name, *COLUMNS[1:])]
    rows = [{"errors": 1, "alive": True}]
    assert name in "".join(drawn(cells, rows, range(len(COLUMNS)), 3))
