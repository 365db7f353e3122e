"""Who starts a worker again: real processes, real signals; only the clock is ours at times."""

from __future__ import annotations

import logging
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import xen_disk_py
from xen_disk_py.errors import DeviceError
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.systemd import notify
from xen_disk_py.recovery.supervisor import DELAYS, Supervisor

PACKAGE = str(Path(xen_disk_py.__file__).parents[1])
DEVICE = "5 xvdb"
PATIENCE = 30.0  # seconds for what must happen to happen
WATCHDOG = 0.02
LATER = 0.6 * WATCHDOG
"""How much later it is, as the supervisor sees it, for each worker that says so."""

# What each worker begins with. It gets as arguments what the supervisor was given or made.
PRELUDE = f"""
import os, signal, socket, sys
sys.path.insert(0, {PACKAGE!r})
from xen_disk_py.host.systemd import notify, watchdog_interval

SIGNALS = {{signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2}}

def note(text):
    with open(sys.argv[1], "a") as notes:
        notes.write(text + "\\n")

def name():
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait for wait()
    notify("X_DEVICE={DEVICE}")

def wait(*signums):
    return signal.sigwait(signums or SIGNALS).name

def tell(signum):
    os.kill(os.getppid(), signum)

def until_heard():
    for _ in range(2):  # the supervisor listens after it passes on
        tell(signal.SIGUSR2)
        wait(signal.SIGUSR2)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

with open(sys.argv[1] + ".pids", "a") as pids:
    print(os.getpid(), file=pids)
note("started " + " ".join(sys.argv[2:]))
"""
DIES = "name(); die()"
ENDS = "name(); sys.exit(0)"
WAITS = "name(); note(wait())"
SUPERVISES = f"""
import sys
sys.path.insert(0, {PACKAGE!r})
from xen_disk_py.recovery.supervisor import Supervisor

sys.exit(Supervisor(sys.argv[1:], lambda device: [], watchdog=0).run())
"""


@pytest.fixture
def notes(tmp_path):
    """Return what the workers have noted, one line for each note."""
    path = tmp_path / "notes"
    path.touch()
    return lambda: path.read_text().splitlines()


@pytest.fixture
def worker(tmp_path):
    """Make the command line of a worker that does what a script says."""

    def worker(script, *arguments):
        path = tmp_path / f"worker{len(list(tmp_path.iterdir()))}.py"
        path.write_text(PRELUDE + script)
        return [sys.executable, "-I", "-S", str(path), str(tmp_path / "notes"), *arguments]

    return worker


@pytest.fixture
def supervise(worker, tmp_path):
    """Run a supervisor; it leaves no process, descriptor or handler behind."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
    pids = tmp_path / "notes.pids"

    def state():
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        handlers = [signal.getsignal(signum) for signum in signums]
        return wakeup, handlers

    def supervise(first, *successors, watchdog=0.0, delays=(0.0,) * 3, calm=3600.0):
        commands = [worker(script) for script in successors]

        def again(device):
            return [*(commands.pop(0) if len(commands) > 1 else commands[0]), "adopts", device]

        before, descriptors = state(), len(os.listdir("/proc/self/fd"))
        try:
            return Supervisor(
                worker(first), again, watchdog=watchdog, delays=delays, calm=calm
            ).run()
        finally:
            assert before == state()
            assert descriptors >= len(os.listdir("/proc/self/fd"))  # others may close some
            for pid in map(int, pids.read_text().split()):
                with pytest.raises(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    return supervise


@pytest.fixture
def clock(notes, monkeypatch):
    """A time that passes only when a worker notes that it is later."""
    monkeypatch.setattr(
        "xen_disk_py.recovery.supervisor.time",
        SimpleNamespace(monotonic=lambda: notes().count("later") * LATER),
    )


@pytest.fixture
def on_restart():
    """Have something done when the first restart is announced, before its delay."""
    actions = []
    handler = logging.Handler()
    handler.emit = lambda record: actions.pop()() if actions else None
    log = logging.getLogger("xen_disk_py")
    log.addHandler(handler)
    yield actions.append
    log.removeHandler(handler)
    assert not actions


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """The socket of a systemd that has started us."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield listener


def started(notes):
    return [line[len("started ") :] for line in notes() if line.startswith("started")]


# How workers end


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, ExitStatus.OK),
        (1, ExitStatus.ERROR),
        (2, ExitStatus.USAGE),
        (130, ExitStatus.INTERRUPTED),
        (120, ExitStatus.ERROR),  # Python could not write out what was printed
    ],
)
def test_one_that_ends_by_itself_ends_all(supervise, notes, status, expected):
    assert expected is supervise(f"name(); sys.exit({status})", ENDS)
    assert [""] == started(notes)


@pytest.mark.parametrize("crash", ["die()", "sys.exit(70)", "os.abort()"])
def test_one_that_crashes_has_a_successor(supervise, notes, crash, caplog):
    assert ExitStatus.ERROR is supervise(f"name(); {crash}", "name(); sys.exit(1)")
    assert ["", f"adopts {DEVICE}"] == started(notes)
    assert f"disk {DEVICE}: process " in caplog.text


@pytest.mark.parametrize("crash", ["die()", "sys.exit(70)", "notify('READY=1'); die()"])
def test_one_that_crashes_with_nothing_to_leave_behind(supervise, notes, crash):
    with pytest.raises(DeviceError, match=r"process \d+ .* before it attached the disk"):
        supervise(crash, ENDS)
    assert [""] == started(notes)


def test_the_last_name_counts(supervise, notes):
    """A device that somebody else was quicker to take was named, too."""
    first = "notify('X_DEVICE=5 xvda'); notify('READY=1', 'X_DEVICE=5 xvdc'); die()"
    assert ExitStatus.OK is supervise(first, ENDS)
    assert ["", "adopts 5 xvdc"] == started(notes)


def test_what_cannot_be_started():
    with pytest.raises(DeviceError, match=r"cannot be started \(.*/nowhere/python"):
        Supervisor(["/nowhere/python"], lambda device: [], watchdog=0).run()


# How often


@pytest.mark.parametrize(("crashes", "gives_up"), [(1, False), (3, False), (4, True)])
def test_it_gives_up(supervise, notes, crashes, gives_up, caplog):
    successors = [DIES] * (crashes - 1) + [ENDS]
    if gives_up:
        with pytest.raises(DeviceError) as caught:
            supervise(DIES, *successors, delays=(0, 0, 0))
        assert f"xen-disk connect --adopt {DEVICE};" in str(caught.value)
        assert f"xen-disk disconnect {DEVICE} --force" in str(caught.value)
        assert "after 3 restarts" in str(caught.value)
        assert crashes == len(started(notes))
    else:
        assert ExitStatus.OK is supervise(DIES, *successors, delays=(0, 0, 0))
        assert crashes + 1 == len(started(notes))
    assert min(crashes, 3) == caplog.text.count("another takes over in 0 s")


def test_successors_that_cannot_be_started_are_restarts(worker, notes):
    supervisor = Supervisor(worker(DIES), lambda device: ["/nowhere"], watchdog=0, delays=(0, 0))
    with pytest.raises(DeviceError, match=r"cannot be started .* after 2 restarts"):
        supervisor.run()
    assert [""] == started(notes)


def test_a_calm_time_is_a_new_beginning(supervise, clock, notes):
    calmly = "name(); note('later'); note('later'); die()"
    successors = [DIES, calmly, DIES, calmly, DIES, ENDS]
    assert ExitStatus.OK is supervise(DIES, *successors, delays=(0, 0), calm=1.5 * LATER)
    assert 7 == len(started(notes))


def test_it_waits_longer_each_time(supervise, caplog):
    with pytest.raises(DeviceError):
        supervise(DIES, DIES, delays=(0, 0.01, 0.02))
    said = [
        record.getMessage().rpartition("another takes over in ")[2] for record in caplog.records
    ]
    assert ["0 s", "0.01 s", "0.02 s"] == said
    assert (0, list(DELAYS)) == (DELAYS[0], sorted(DELAYS))


# Silence


@pytest.mark.parametrize("silence", ["wait()", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_one_that_is_silent_is_killed(supervise, clock, notes, silence, caplog):
    first = f"name(); until_heard(); note('later'); note('later'); {silence}"
    assert ExitStatus.OK is supervise(first, ENDS, watchdog=WATCHDOG)
    assert ["", f"adopts {DEVICE}"] == started(notes)
    assert "gave no sign of life for 0.02 s; killing it" in caplog.text
    assert "died of signal 9" in caplog.text


def test_one_that_never_says_anything_is_killed(supervise, clock):
    with pytest.raises(DeviceError, match=r"died of signal 9 .* before it attached"):
        supervise("note('later'); note('later'); signal.pause()", ENDS, watchdog=WATCHDOG)


@pytest.mark.parametrize(
    ("said", "watchdog", "survives"),
    [
        ("WATCHDOG=1", WATCHDOG, True),
        ("READY=1", WATCHDOG, True),
        ("STATUS=busy", WATCHDOG, False),
        ("STATUS=busy", 0, True),
    ],
)
def test_signs_of_life(supervise, clock, notes, said, watchdog, survives):
    first = f"""
name()
until_heard()
for _ in range(3):
    note("later")
    notify({said!r})
    until_heard()
"""
    assert ExitStatus.OK is supervise(first, ENDS, watchdog=watchdog)
    assert ([""] if survives else ["", f"adopts {DEVICE}"]) == started(notes)


@pytest.mark.parametrize("step", ["EXTEND_TIMEOUT_USEC=60000000", "X_DEVICE=5 xvdb"])
def test_a_start_may_last(supervise, clock, step):
    """Each step may take as long as one that serves may be silent, of a successor, too."""
    steps = f"notify({step!r}); note('later'); " * 4
    first = f"{steps}name(); until_heard(); note('later'); note('later'); wait()"
    assert ExitStatus.OK is supervise(first, steps + ENDS, watchdog=WATCHDOG)


def test_one_that_serves_starts_no_longer(supervise, clock, notes):
    """What it says of a start is no sign of life then."""
    first = """
name()
until_heard()
notify("READY=1")
until_heard()
for _ in range(2):
    note("later")
    notify("EXTEND_TIMEOUT_USEC=60000000", "X_DEVICE=5 xvdb")
    until_heard()
"""
    assert ExitStatus.OK is supervise(first, ENDS, watchdog=WATCHDOG)
    assert ["", f"adopts {DEVICE}"] == started(notes)


def test_the_time_in_which_one_hung_was_not_calm(supervise, clock, notes):
    hangs = "name(); until_heard(); " + "note('later'); " * 3 + "wait()"
    with pytest.raises(DeviceError, match="after 2 restarts"):
        supervise(hangs, hangs, watchdog=WATCHDOG, calm=LATER, delays=(0, 0))
    assert 3 == len(started(notes))


@pytest.mark.parametrize(("watchdog", "expected"), [(1.5, "1.5"), (0, "None")])
def test_a_worker_is_told_how_often(supervise, clock, notes, monkeypatch, watchdog, expected):
    """What we have been told is for us alone."""
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", "7000000")
    supervise("note(str(watchdog_interval()))", watchdog=watchdog)
    assert expected == notes()[-1]


# Signals


def test_signals_are_passed_on(supervise, notes):
    """Each as often as it comes: the second SIGINT is to force."""
    signals = "signal.SIGHUP, signal.SIGUSR2, signal.SIGINT, signal.SIGINT, signal.SIGTERM"
    first = f"""
name()
for signum in ({signals}):
    tell(signum)
    note(wait())
sys.exit(130)
"""
    assert ExitStatus.INTERRUPTED is supervise(first)
    assert signals.replace("signal.", "").split(", ") == notes()[1:]


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_one_that_handles_no_signals_yet_ends(supervise, notes, signum):
    first = f"""
signal.signal(signal.{signum}, signal.SIG_DFL)
tell(signal.{signum})
signal.pause()
"""
    assert ExitStatus.INTERRUPTED is supervise(first, ENDS)
    assert [""] == started(notes)


def test_what_a_worker_was_asked_its_successor_does(supervise, notes):
    first = "name(); tell(signal.SIGTERM); wait(); die()"
    assert ExitStatus.OK is supervise(first, WAITS, delays=(3600,))
    assert ["started ", f"started adopts {DEVICE}", "SIGTERM"] == notes()


def test_asked_between_two_workers(supervise, notes, on_restart):
    """The next one starts at once, and is asked when it can answer."""
    on_restart(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert ExitStatus.OK is supervise(DIES, WAITS, delays=(3600,))
    assert ["started ", f"started adopts {DEVICE}", "SIGINT"] == notes()


def test_one_that_starts_is_not_asked_yet(supervise, notes, on_restart):
    """A signal would end it while it only says that its start continues."""
    on_restart(lambda: os.kill(os.getpid(), signal.SIGTERM))
    starts = "notify('EXTEND_TIMEOUT_USEC=60000000'); note('starts'); "
    assert ExitStatus.OK is supervise(DIES, starts + WAITS, delays=(3600,))
    assert ["started ", f"started adopts {DEVICE}", "starts", "SIGTERM"] == notes()


def test_told_something_else_between_two_workers(supervise, notes, on_restart):
    on_restart(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert ExitStatus.OK is supervise(DIES, WAITS, delays=(0.01,))
    assert ["started ", f"started adopts {DEVICE}", "SIGHUP"] == notes()


def test_asked_to_end_there_is_one_successor_at_most(supervise, notes, on_restart):
    on_restart(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(DeviceError, match="we have been told to end; to take it over"):
        supervise(DIES, DIES, delays=(3600, 0, 0))
    assert 2 == len(started(notes))


def test_asked_twice_between_two_workers(supervise, notes, on_restart):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    on_restart(twice)
    with pytest.raises(DeviceError, match="is left behind"):
        supervise(DIES, ENDS, delays=(3600,))
    assert [""] == started(notes)


def test_asked_twice_while_a_successor_says_nothing(supervise, notes, on_restart):
    on_restart(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(DeviceError, match=r"is left behind: process \d+ died of signal 9"):
        supervise(DIES, "tell(signal.SIGINT); signal.pause()", delays=(3600, 0))
    assert 2 == len(started(notes))


def test_a_terminal(worker, notes):
    """Its Ctrl-C comes to the worker once; its ``tostop`` does not keep it from writing."""
    script = """
name()
print("ready", flush=True)
counted = []
while "SIGTERM" not in counted:
    counted.append(wait())
    print("got", counted[-1], flush=True)
note(" ".join(counted))
"""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        attributes = termios.tcgetattr(theirs)
        attributes[3] |= termios.TOSTOP
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        # A leader of a session that opens a terminal has it as its own.
        opens = f"import os; os.open({os.ttyname(theirs)!r}, os.O_RDWR)\n"
        with subprocess.Popen(
            [sys.executable, "-c", opens + SUPERVISES, *worker(script)],
            start_new_session=True,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            try:
                said = b""
                for expected, action in (
                    (b"ready", lambda: terminal.write(b"\x03")),
                    (b"got SIGINT", lambda: process.send_signal(signal.SIGTERM)),
                ):
                    while expected not in said:
                        said += terminal.read(100)
                    action()
                assert 0 == process.wait(PATIENCE)
            finally:
                process.kill()
                os.close(theirs)
    assert ["started ", "SIGINT SIGTERM"] == notes()


def test_a_worker_outlives_a_supervisor_that_is_killed(worker):
    script = "name(); print(os.getpid(), flush=True); print(wait()); notify('STOPPING=1')"
    command = [sys.executable, "-c", SUPERVISES, *worker(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
        os.kill(pid, signal.SIGTERM)
        assert b"SIGTERM\n" == process.stdout.read()


# Messages


def test_messages_of_others_are_not_heard(supervise, notes, systemd):
    """Of a worker's own children, too."""
    first = """
name()
if not os.fork():
    notify("X_DEVICE=6 xvdz", "READY=1")
    os._exit(0)
os.wait()
die()
"""
    assert ExitStatus.OK is supervise(first, "notify('STATUS=mine')")
    assert ["", f"adopts {DEVICE}"] == started(notes)
    assert systemd.recv(1000).startswith(b"STATUS=disk 5 xvdb: process ")
    assert b"STATUS=mine" == systemd.recv(1000)


@pytest.mark.parametrize(
    "said", ["", "5", "5 xvdb --force", "-h xvdb", "5 --force", "5 xvd\u00e9", "5  xvdb", "5 xvdb "]
)
def test_a_worker_says_a_device_and_nothing_else(supervise, notes, said):
    """Whoever has got into it, too: it becomes words of the next command."""
    first = f"name()\nnotify({'X_DEVICE=' + said!r})\ndie()\n"
    assert ExitStatus.OK is supervise(first, ENDS)
    assert ["", f"adopts {DEVICE}"] == started(notes)


def test_descriptors_of_others_do_not_stay(supervise, notes):
    """The fixture counts them."""
    first = """
name()
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
    channel.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
    socket.send_fds(channel, [b"X_FD=1"], [0, 1, 2])
until_heard()
note(str(len(os.listdir(f"/proc/{os.getppid()}/fd"))))
tell(signal.SIGHUP)
wait(signal.SIGHUP)
"""
    before = len(os.listdir("/proc/self/fd")) - 1  # without listdir's own
    supervise(first)
    assert before + 3 >= int(notes()[-1])  # the mailbox, the pipe's two ends


def test_systemd_hears_what_concerns_it(supervise, systemd):
    first = """
name()
notify("READY=1", "STATUS=served", "MAINPID=1", "X_DEVICE=5 xvdb")
notify("STOPPING=1", "WATCHDOG=1")
"""
    assert ExitStatus.OK is supervise(first)
    assert b"READY=1\nSTATUS=served" == systemd.recv(1000)
    assert b"STOPPING=1" == systemd.recv(1000)
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(1000)


@pytest.mark.parametrize("first", ["name(); notify('READY=1'); note(wait())", DIES])
def test_systemd_sees_that_we_live(supervise, notes, systemd, monkeypatch, first):
    """While a worker serves, and while none does."""
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    heard = []

    def listen():
        while not systemd.recv(1000).startswith((b"READY=1", b"STATUS=disk")):
            pass
        while heard.count(b"WATCHDOG=1") < 3:
            heard.append(systemd.recv(1000))
        os.kill(os.getpid(), signal.SIGTERM)
        while systemd.recv(1000) != b"over":  # a full queue would hold the supervisor up
            pass

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert ExitStatus.OK is supervise(first, WAITS, delays=(3600,))
    finally:
        notify("over")
        thread.join()
    assert "SIGTERM" == notes()[-1]
