"""Output that never fails and never waits: real pipes, terminals, sockets and full disks."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import tty

import pytest

from xen_disk_py.host import output as output_module
from xen_disk_py.host.output import LIMIT, Output, relayed_stderr

PATIENCE = 30.0  # seconds for what must happen to happen


@pytest.fixture
def stream():
    """Open a descriptor as a text stream, closed at the end."""
    opened = []

    def stream(descriptor):
        opened.append(os.fdopen(descriptor, "w", encoding="utf-8"))
        return opened[-1]

    yield stream
    for each in opened:
        try:
            each.close()
        except OSError:
            pass


@pytest.fixture
def output(stream):
    """Make an output of a descriptor."""
    made = []

    def output(descriptor):
        made.append(Output(stream(descriptor)))
        return made[-1]

    yield output
    for each in made:
        each.close()


def pipe():
    return os.pipe2(os.O_CLOEXEC)


def socket_pair():
    left, right = socket.socketpair()
    return left.detach(), right.detach()


def terminal():
    master, slave = pty.openpty()
    tty.setraw(slave)
    return master, slave


KINDS = pytest.mark.parametrize("kind", [pipe, socket_pair, terminal])


def read_all(descriptor, until):
    """Read what has come until it ends with that."""
    found = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while not found.endswith(until):
        assert poller.poll(PATIENCE * 1000)
        found += os.read(descriptor, 65536)
    return found


@KINDS
def test_lines_arrive_at_once_and_in_their_order(kind, output):
    theirs, ours = kind()
    try:
        out = output(ours)
        for number in range(3):
            assert 7 == out.write(f"line {number}\n")
        assert not out.is_behind
        assert b"line 0\nline 1\nline 2\n" == read_all(theirs, b"2\n")
        assert (True, kind is terminal) == (out.writable(), out.isatty())
        assert ours == out.fileno()
    finally:
        os.close(theirs)


@KINDS
def test_nobody_reads(kind, output):
    """What does not fit is dropped and counted; a reader who comes back gets the rest, whole."""
    theirs, ours = kind()
    try:
        out = output(ours)
        lines = 3_000  # more than any of them holds
        filler = "." * 108
        for number in range(lines):
            out.write(f"line {number:06}{filler}\n")
        assert out.is_behind
        reader = threading.Thread(target=lambda: found.append(read_all(theirs, b"read them)\n")))
        found = []
        reader.start()
        out.drain(PATIENCE)
        reader.join(PATIENCE)
        *whole, last = found[0].decode().splitlines()
        numbers = [int(line[5:11]) for line in whole]
        assert [f"line {number:06}{filler}" for number in numbers] == whole
        assert sorted(set(numbers)) == numbers  # a terminal makes room while it is being filled
        assert f"({lines - len(whole)} lines were lost: nobody read them)" == last
        assert len(whole) * 120 >= LIMIT - 120
    finally:
        os.close(theirs)


@KINDS
def test_others_that_share_the_descriptor_wait_as_before(kind, output):
    """It is not made non-blocking for them."""
    theirs, ours = kind()
    try:
        output(ours).write("x\n")
        assert not fcntl.fcntl(ours, fcntl.F_GETFL) & os.O_NONBLOCK
    finally:
        os.close(theirs)


@KINDS
def test_the_reader_has_gone(kind, output):
    theirs, ours = kind()
    out = output(ours)
    os.close(theirs)
    for _ in range(3):
        out.write("line\n")
    assert out.failure is not None
    assert not out.is_behind
    out.drain(PATIENCE)


def test_a_reader_that_has_gone_before(output):
    theirs, ours = pipe()
    os.close(theirs)
    out = output(ours)
    out.write("line\n")
    assert os.strerror(out.failure) == "Broken pipe"


def test_a_descriptor_that_cannot_be_opened_once_more(monkeypatch, output):
    """Another user's, say: it waits for nobody all the same."""
    opened = os.open

    def refuse(path, *more):
        if str(path).startswith("/proc/self/fd"):
            raise PermissionError
        return opened(path, *more)

    monkeypatch.setattr(output_module.os, "open", refuse)
    theirs, ours = pipe()
    try:
        out = output(ours)
        for _ in range(20_000):
            out.write("a line\n")
        assert out.is_behind
        assert set(read_all(theirs, b"line\n").splitlines()) == {b"a line"}
    finally:
        os.close(theirs)


def test_a_full_disk(output):
    out = output(os.open("/dev/full", os.O_WRONLY))
    out.write("line\n")
    assert os.strerror(out.failure) == "No space left on device"


def test_a_disk_that_has_room_again(output, tmp_path):
    """What was written meanwhile is lost, nothing else."""
    out = output(os.open("/dev/full", os.O_WRONLY))
    out.write("lost\n")
    path = tmp_path / "log"
    other = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(other, out.fileno())
    os.close(other)
    out.write("there\n")
    assert ("there\n", None) == (path.read_text(), out.failure)


def test_closed_descriptors_and_streams(stream, output):
    for out in (Output(None), Output(closed(io.StringIO()))):
        out.write("line\n")
        out.flush()
        assert not out.isatty()
        with pytest.raises(io.UnsupportedOperation):
            out.fileno()
    theirs, ours = pipe()
    os.close(theirs)
    out = output(os.dup(ours))
    keep = os.dup(ours)
    os.close(out.fileno())
    out.write("line\n")
    os.dup2(keep, out.fileno())
    os.close(keep)
    os.close(ours)


def test_it_is_closed_where_the_interpreter_has_taken_its_modules_away(output, monkeypatch):
    """At the end of Python: an error there is told on stderr, whose reader is waited for."""
    theirs, ours = pipe()
    out = output(ours)
    with monkeypatch.context() as patch:
        patch.setattr(output_module, "os", None)
        out.close()
    out.write("line\n")  # nowhere
    os.close(ours)
    assert b"" == os.read(theirs, 1)  # nobody has the pipe open any longer
    os.close(theirs)


def closed(stream):
    stream.close()
    return stream


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_cannot_be_encoded(encoding, tmp_path):
    path = tmp_path / "log"
    with path.open("w", encoding=encoding) as stream:
        out = Output(stream)
        out.write("gr\udcfc\u00f6\n")
        out.close()
    shown = "\\xf6" if encoding == "ascii" else "\u00f6"
    assert f"gr\\udcfc{shown}\n" == path.read_text(encoding=encoding)


def test_a_stream_without_a_descriptor():
    stream = io.StringIO()
    Output(stream).write("line\n")
    assert "line\n" == stream.getvalue()


def test_closed_standard_descriptors_lead_nowhere(tmp_path):
    """No file that is opened later gets what is printed."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from xen_disk_py.host.output import open_standard_descriptors\n"
        "open_standard_descriptors()\n"
        "shown = [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]\n"
        "inherited = [os.get_inheritable(number) for number in range(3)]\n"
        "first = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "os.write(first, repr((shown, inherited, first)).encode())\n"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, program, tmp_path / "o"],
        timeout=PATIENCE,
        check=False,
    )
    shown, inherited, first = eval((tmp_path / "o").read_text())
    assert (0, ["/dev/null"] * 3, [True] * 3) == (done.returncode, shown, inherited)
    assert first >= 3


def test_what_a_child_prints_is_passed_on_and_its_end_is_the_end(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    before = os.readlink("/proc/self/fd/2")
    with relayed_stderr() as relay:
        child = subprocess.Popen(
            ["/bin/sh", "-c", "printf 'one\\033[2J\\ntwo' >&2"], stdout=subprocess.DEVNULL
        )
    relay.pass_on()
    assert before == os.readlink("/proc/self/fd/2")
    assert 0 == child.wait(PATIENCE)
    for thread in threading.enumerate():
        if thread.name == "stderr":
            thread.join(PATIENCE)
    assert "one\\x1b[2J\ntwo\n" == said.getvalue()


def test_what_a_child_prints_is_kept_for_who_explains_its_end(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with relayed_stderr() as relay:
        child = subprocess.Popen(["/bin/sh", "-c", "echo one >&2; echo two >&2"])
    assert 0 == child.wait(PATIENCE)
    assert ["one", "two"] == relay.said(PATIENCE)
    assert "" == shown.getvalue()


def test_a_child_without_a_thread_of_ours_writes_nowhere(monkeypatch):
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with relayed_stderr():
            assert "/dev/null" == os.readlink("/proc/self/fd/2")


HEIR = """
import os, sys
from xen_disk_py.host.output import Output
err = Output(sys.stderr)
err.inherit()
assert "XEN_DISK_WAITING" not in os.environ
err.write("the next program\\n")
os.write(1, b"x")
err.drain(30)
"""

BEQUEATHS = """
import os, sys
from xen_disk_py.host.output import Output
err = Output(sys.stderr)
for number in range(int(sys.argv[2])):
    err.write(f"{number:099}\\n")
with err.handed_over():
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize("lines", [0, 1000, 3000])
def test_the_program_that_a_process_becomes_says_what_it_has_not_said_yet(lines):
    reader, writer = pipe()
    command = [sys.executable, "-c", BEQUEATHS, HEIR, str(lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer) as process:
        os.close(writer)
        assert b"x" == process.stdout.read(1)  # the next one is there: until now nobody has read
        with os.fdopen(reader, encoding="utf-8") as file:
            said = file.read().splitlines()
    assert 0 == process.returncode
    assert "the next program" == said.pop()
    lost = 0
    if lines == 3000:
        lost = int(said.pop().split()[0][1:])
        assert lost > 0
    assert [f"{number:099}" for number in range(lines - lost)] == said


def test_a_descriptor_that_is_no_heir_s_is_left_alone(output, monkeypatch, tmp_path):
    """The variable may come from anywhere."""
    reader, writer = pipe()
    made = output(writer)
    with open(tmp_path / "secret", "w+", encoding="utf-8") as file:
        file.write("secret")
        file.flush()
        for value in (str(file.fileno()), "-1", "x", "9" * 30, ""):
            monkeypatch.setenv("XEN_DISK_WAITING", value)
            made.inherit()
            assert "XEN_DISK_WAITING" not in os.environ
        os.fstat(file.fileno())
    assert [] == select.select([reader], [], [], 0)[0]
    os.close(reader)


def test_a_fork_forgets_what_its_parent_will_write(output):
    reader, writer = pipe()
    made = output(writer)
    for number in range(3000):
        made.write(f"{number:099}\n")
    assert made.is_behind
    made.forget()
    assert not made.is_behind
    os.close(reader)
