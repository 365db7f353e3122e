"""``crashtest``: the states that a power cut could have left, tried by a command."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from recorded import SIZE, flush, header, make, resized, stopped, write

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.crashtest import search, trial
from xen_disk_py.exit_status import ExitStatus

OTHERS = [write(20 + n, 21 + n, 16384 + 512 * n, bytes([n + 65]) * 512) for n in range(4)]
# A guest that writes data, flushes, and then a mark that says that the data is there.
GOOD = [write(0, 1, 4096, b"d" * 1024), flush(2, 3), *OTHERS, write(30, 31, 0, b"m" * 512)]
BAD = [write(0, 1, 4096, b"d" * 1024), *OTHERS, write(30, 31, 0, b"m" * 512), flush(40, 41)]
MARK = 'test "$(head -c 1 {})" != m || test "$(tail -c +4609 {} | head -c 1)" = d'


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.raw"
    path.write_bytes(b"\1" * SIZE)
    yield path
    assert b"\1" * SIZE == path.read_bytes()


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "views"
    path.mkdir()
    yield path
    assert [] == os.listdir(path)


@pytest.fixture
def crashtest(tmp_path, base, directory):
    def crashtest(records, check, *options):
        trace = tmp_path / "t.xdt"
        trace.unlink(missing_ok=True)
        make(trace, header(base), [*records, stopped(50)])
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        words = ["crashtest", trace, "--base", base, "--check", check, "--directory", directory]
        status = main([*map(str, words), *options], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return crashtest


def test_a_guest_that_flushes_comes_through(crashtest):
    status, out, _ = crashtest(GOOD, MARK, "--limit", "20", "--json")
    assert ExitStatus.OK == status
    found = json.loads(out)
    assert (20, 1, None) == (found["tried"] + found["same"], found["flushes"], found["failure"])


def test_one_that_does_not_is_found_with_the_least_that_shows_it(crashtest):
    status, out, _ = crashtest(BAD, MARK, "--limit", "60", "--json")
    assert ExitStatus.ERROR == status
    failure = json.loads(out)["failure"]
    assert ("0:5", 6, 1, True) == tuple(
        failure[k] for k in ("least", "pending", "status", "steady")
    )
    (mark,) = failure["writes"]
    assert (5, 0, 512) == (mark["request"], mark["offset"], mark["length"])
    for name in (failure["state"], failure["least"]):
        assert ExitStatus.ERROR == crashtest(BAD, MARK, "--state", name)[0]
    assert ExitStatus.OK == crashtest(BAD, MARK, "--state", "0:0,5")[0]
    assert ExitStatus.ERROR == crashtest(BAD, MARK, "--state", "0:0/0-0,5")[0]


def test_it_is_the_first_whatever_the_number_of_jobs(crashtest):
    names = set()
    for jobs in ("1", "3"):
        out = crashtest(BAD, MARK, "--limit", "40", "--jobs", jobs, "--json")[1]
        names.add(json.loads(out)["failure"]["state"])
    assert 1 == len(names)


def test_a_person_reads_what_to_do_again(crashtest):
    out = crashtest(BAD, f"{MARK} || {{ echo mark without data; false; }}", "--limit", "60")[1]
    lines = out.splitlines()
    assert "states tried" in lines[0]
    assert "fails: status 1" in lines[1]
    assert "with 1 of the 6 writes that were not flushed:" in lines[2]
    assert "    request 5 at 0.000000 s: 512 bytes at 0" == lines[3]
    assert "    mark without data" in lines
    assert "--state 0:5" in lines[-1]


def test_the_state_is_kept_if_that_is_wanted(crashtest, directory):
    out = crashtest(BAD, MARK, "--limit", "60", "--keep", "--json")[1]
    kept = Path(json.loads(out)["failure"]["kept"])
    assert [kept.name] == os.listdir(kept.parent)
    content = kept.read_bytes()
    assert (b"m" * 512, b"\1" * 1024, SIZE) == (content[:512], content[4096:5120], len(content))
    assert 0o700 == kept.parent.stat().st_mode & 0o777
    kept.unlink()
    kept.parent.rmdir()


def test_the_check_is_told_when(crashtest, tmp_path):
    seen = tmp_path / "seen"
    names = "$XEN_DISK_STATE $XEN_DISK_FLUSH $XEN_DISK_TIME $XEN_DISK_UNTIL"
    crashtest(GOOD, f": {{}}; echo {names} >> {seen}", "--limit", "100", "--jobs", "1")
    told = seen.read_text().splitlines()
    assert "0.0 0 1000000000.000000000 1000000000.000000003" == told[0]
    assert "1.1 1 1000000000.000000003" in told


@pytest.mark.parametrize("limit", [8, 12, 40])
def test_with_few_states_there_is_some_of_each_kind(crashtest, tmp_path, limit):
    """Not only what was flushed after each of many flushes."""
    flushes = [
        each
        for at in range(0, 80, 10)
        for each in (
            *(write(at + n, at + n + 1, 4096 * n, bytes([at + n]) * 2048) for n in range(5)),
            flush(at + 6, at + 7),
        )
    ]
    seen = tmp_path / "seen"
    out = crashtest(flushes, f": {{}}; echo $XEN_DISK_STATE >> {seen}", "--limit", str(limit))[1]
    states = [tuple(map(int, line.split("."))) for line in seen.read_text().split()]
    assert f"{len(states)} states tried" in out
    assert len({number for number, _ in states}) >= 7
    turns = {turn for _, turn in states}
    assert 0 in turns
    assert len(turns) > 3


def test_a_check_may_write(crashtest):
    check = "test $(tail -c 1 {}) != x && printf x | dd of={} bs=1 seek=65535 conv=notrunc 2>&1"
    assert ExitStatus.OK == crashtest(GOOD, check, "--limit", "6", "--jobs", "1")[0]


def test_a_check_that_takes_too_long_has_failed_and_is_gone(crashtest, tmp_path):
    fifo = tmp_path / "open while it lives"
    os.mkfifo(fifo)
    alive = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    ours = os.open(fifo, os.O_WRONLY)
    check = f": {{}}; sleep 1000 > '{fifo}' & wait"
    status, out, _ = crashtest(GOOD, check, "--limit", "1", "--timeout", "0.2", "--json")
    assert (ExitStatus.ERROR, None) == (status, json.loads(out)["failure"]["status"])
    os.close(ours)
    assert [(alive, select.POLLHUP)] == _gone(alive)
    os.close(alive)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_what_a_check_has_mounted_goes_with_it(crashtest, tmp_path):
    place, mounted = tmp_path / "mnt", tmp_path / "mounted"
    place.mkdir()
    check = f": {{}}; mount -t tmpfs none {place} && echo >> {mounted}; exit 1"
    try:
        crashtest(GOOD, check, "--limit", "1", "--reduce", "0")
        if not mounted.exists():
            pytest.skip("nothing can be mounted here")
        assert not os.path.ismount(place)
    finally:
        if os.path.ismount(place):
            subprocess.run(["umount", "--lazy", place], check=True)


def _gone(fd):
    poller = select.poll()
    poller.register(fd, 0)
    return poller.poll(30_000)


def test_only_what_comes_after_a_moment(crashtest):
    assert ExitStatus.OK == crashtest(BAD, MARK, "--limit", "40", "--from", "flush:1")[0]
    assert ExitStatus.ERROR == crashtest(BAD, MARK, "--limit", "40", "--from", "0")[0]
    later = [*BAD, flush(1000, 1100)]
    assert ExitStatus.OK == crashtest(later, MARK, "--limit", "40", "--from", "1us")[0]


def test_what_came_before_a_resize_is_tried(crashtest):
    status, _, err = crashtest([*GOOD[:2], resized(4, 2 * SIZE), *GOOD[2:]], ": {}", "--limit", "9")
    assert ExitStatus.OK == status
    assert "the disk was resized before request 2: only what came before is tried" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--state", "x"), "write it as FLUSH.NUMBER"),
        (("--state", "9.0"), "the trace has 1 flushes"),
        (("--state", "1:77"), "77 is no request that was not flushed then"),
        (("--state", "0.9"), "there are 4 states after that flush"),
        (("--from", "end"), "give flush:N or a time"),
        # No state that is tried is no state that is good.
        (
            ("--from", "flush:2"),
            "t.xdt: ends before that moment: it has request:0 to request:6, flush:0",
        ),
        (("--from", "1us"), "flush:0 to flush:1, 0s to 0.000000s, 2001-09-09T01:46:40Z to 2001-"),
        (("--from", "2001-09-09T01:46:39"), "t.xdt: was begun after that moment: it has request:0"),
    ],
)
def test_what_is_not_there(crashtest, options, words):
    status, out, err = crashtest(GOOD, ": {}", *options)
    assert (ExitStatus.USAGE, "") == (status, out)
    assert words in err


@pytest.mark.parametrize(
    ("state", "option"),
    [(state, option) for state in ("0.0", "0:0") for option in ("limit", "from", "jobs", "reduce")]
    + [("0:0", "seed")],
)
def test_one_state_and_what_is_for_many(crashtest, state, option):
    status, out, err = crashtest(GOOD, ": {}", "--state", state, f"--{option}", "1")
    assert (ExitStatus.USAGE, "") == (status, out)
    assert f"--state is one state, --{option} is for many" in err


def test_a_base_that_was_written_meanwhile_is_told(tmp_path, crashtest, base):
    status, out, err = crashtest(GOOD, f": {{}}; touch {base}", "--limit", "2")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "was written meanwhile" in err


@pytest.mark.parametrize(("most", "steady"), [("0", None), ("1", True)])
def test_a_slow_check_need_not_be_run_for_the_least(crashtest, tmp_path, most, steady):
    ran = tmp_path / "ran"
    check = f"echo >> {ran}; {MARK}"
    options = ("--jobs", "1", "--limit", "60", "--json", "--reduce", most)
    found = json.loads(crashtest(BAD, check, *options)[1])
    assert len(ran.read_text()) == found["tried"] + int(most)
    failure = found["failure"]
    assert steady is failure["steady"]
    assert ExitStatus.ERROR == crashtest(BAD, MARK, "--state", failure["least"])[0]


@pytest.mark.parametrize("option", ["--limit", "--timeout", "--jobs"])
def test_nothing_to_try_and_no_time_are_refused(crashtest, option):
    status, out, err = crashtest(GOOD, ": {}", option, "0")
    assert (ExitStatus.USAGE, "") == (status, out)
    assert f"argument {option}" in err
    assert ": '0' is no" in err


def test_a_directory_that_is_not_there(tmp_path, crashtest):
    path = tmp_path / "nowhere"
    status, _, err = crashtest(GOOD, ": {}", "--directory", str(path))
    assert (ExitStatus.ERROR, f"xen-disk: error: {path}: No such file or directory\n") == (
        status,
        err,
    )


def test_the_state_is_named_before_its_least_is_looked_for(crashtest):
    err = crashtest(BAD, MARK, "--limit", "60")[2]
    assert "fails; looking for the least of it that does" in err
    assert "" == crashtest(BAD, MARK, "--limit", "60", "--quiet")[2]


def test_a_command_that_is_not_there(crashtest):
    status, _, err = crashtest(GOOD, "no-such-command {}")
    assert (ExitStatus.USAGE, True) == (status, "the command cannot be run" in err)


def test_a_command_that_names_no_image(crashtest):
    assert "has no {}" in crashtest(GOOD, "true")[2]


def test_no_space(crashtest, monkeypatch):
    real = os.statvfs

    def full(path):
        return os.statvfs_result([0 if at == 4 else each for at, each in enumerate(real(path))])

    monkeypatch.setattr(os, "statvfs", full)
    status, _, err = crashtest(GOOD, ": {}")
    assert (ExitStatus.ERROR, True) == (status, "name another --directory" in err)


@pytest.mark.parametrize("options", [["--jobs", "1"], ["--state", "0:0"]])
def test_a_signal_ends_it_and_leaves_nothing(crashtest, directory, tmp_path, options):
    started, alive = tmp_path / "started", tmp_path / "open while it lives"
    os.mkfifo(started)
    os.mkfifo(alive)

    def interrupt():
        with open(started, encoding="ascii"):
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    ours = os.open(alive, os.O_WRONLY)
    try:
        check = f": {{}}; exec 3> '{alive}'; echo > '{started}'; sleep 1000"
        status = crashtest(GOOD, check, *options)[0]
    finally:
        thread.join()
    assert ExitStatus.INTERRUPTED == status
    os.close(ours)
    assert [(reader, select.POLLHUP)] == _gone(reader)
    os.close(reader)


def test_a_signal_while_a_check_is_being_started_ends_it_too(crashtest, tmp_path, monkeypatch):
    """Whoever looks after it does so from its first moment."""
    alive = tmp_path / "open while it lives"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    ours = os.open(alive, os.O_WRONLY)
    real = subprocess.Popen

    def popen(*arguments, **options):
        process = real(*arguments, **options, pass_fds=[ours])
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(trial.subprocess, "Popen", popen)
    status = crashtest(GOOD, ": {}; sleep 1000", "--state", "0:0")[0]
    assert ExitStatus.INTERRUPTED == status
    os.close(ours)
    assert [(reader, select.POLLHUP)] == _gone(reader)
    os.close(reader)


def test_a_check_ends_with_one_that_was_killed(crashtest, tmp_path, directory):
    """With what it has started, and whatever that ignores."""
    started, alive = tmp_path / "started", tmp_path / "open while it lives"
    os.mkfifo(started)
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    ours = os.open(alive, os.O_WRONLY)
    child = os.fork()
    if not child:
        check = (
            f": {{}}; trap '' HUP TERM; exec 3> '{alive}'; (echo > '{started}'; sleep 1000) & wait"
        )
        with suppress(BaseException):
            crashtest(GOOD, check, "--jobs", "2", "--limit", "4")
        os._exit(1)
    with open(started, encoding="ascii"):
        os.kill(child, signal.SIGKILL)
    assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(ours)
    assert [(reader, select.POLLHUP)] == _gone(reader)
    os.close(reader)
    until = time.monotonic() + 30
    while True:
        with search.temporary(str(directory)):  # removes what it has left, and nobody has any more
            left = len(os.listdir(directory))
        if left == 1 or time.monotonic() > until:  # the other job may take a moment to end
            break
        time.sleep(0.01)
    assert 1 == left


def test_a_check_reads_nothing_and_has_no_more_files_than_it_is_given(crashtest):
    check = ': {}; test -z "$(cat)" && test ! -e /proc/self/fd/3'
    status, out, _ = crashtest(GOOD, check, "--limit", "1")
    assert (ExitStatus.OK, True) == (status, out.startswith("1 states tried"))


def test_one_that_begins_as_another_sweeps_has_a_directory(directory, monkeypatch):
    real, sweeps = search.fcntl.flock, [search._sweep]

    def flock(fd, operation):
        if sweeps:
            sweeps.pop()(str(directory))
        real(fd, operation)

    monkeypatch.setattr(search.fcntl, "flock", flock)
    with search.temporary(str(directory)) as (path, _):
        assert [] == sweeps
        assert os.path.isdir(path)
    assert [] == os.listdir(directory)


def test_what_one_that_was_killed_has_left_goes_with_the_next(crashtest, directory):
    child = os.fork()
    if not child:
        with search.temporary(str(directory)) as (path, _):
            os.truncate(os.open(f"{path}/disk0.raw", os.O_CREAT | os.O_RDWR), 1 << 30)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert 1 == len(os.listdir(directory))
    with search.temporary(str(directory)) as (path, kept):
        assert [os.path.basename(path)] == os.listdir(directory)
        kept.append(f"{path}/file")
        Path(kept[0]).touch()
        with search.temporary(str(directory)):
            assert 2 == len(os.listdir(directory))  # who lives keeps his
    with search.temporary(str(directory)):
        assert ["file"] == os.listdir(path)  # what was to be kept is kept
    Path(kept[0]).unlink()
    os.rmdir(path)
