"""``demo``: a second process plays the guest, and tells right from wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands import demo as demo_module
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.program import own_command
from xen_disk_py.session import Interrupts
from xen_disk_py.simulated import guest as guest_module
from xen_disk_py.simulated.guest import Phase, Plan, VerificationFailed, pattern, work

PATIENCE = 30.0
MEMORY_DISK = """\
import os
from xen_disk_py.backends import Backend

class Disk(Backend):
    def __init__(self, size: int = 1 << 20, fault="", read_only=False):
        self.data = bytearray(size)
        self.size = size
        self.fault = fault
        self.read_only = read_only
        self.keeps_data = fault != "forgets"

    def read(self, buffers, offset):
        if self.fault == "raises":
            raise ValueError("on purpose")
        is_block = sum(map(len, buffers)) == 4096
        while self.fault == "held" and is_block and os.path.exists(__file__ + ".held"):
            pass
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)
            if self.fault in ("corrupts", "forgets") and offset % 131072 == 0:
                buffer[-7] ^= 1

    def write(self, buffers, offset):
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(demo_module, "_BLOCKS", 300)


class Demo:
    """Runs ``demo`` and gives its status, stdout and stderr."""

    def __init__(self, host):
        self.host = host
        self.env = Environment(stdout=io.StringIO(), stderr=io.StringIO())
        self.thread = None

    def __call__(self, *argv):
        before = self.env.stdout.tell(), self.env.stderr.tell()
        status = main(["demo", "--bytes", "512K", *argv], self.env)
        if self.thread is not None:
            self.thread.join()
        out, err = self.env.stdout.getvalue(), self.env.stderr.getvalue()
        return status, out[before[0] :], err[before[1] :]

    def while_busy(self, act, held):
        """Act while the guest waits for a single block; it gets it afterwards."""
        held.touch()

        def wait_and_act():
            try:
                self.host.until(lambda: "sequential read" in self.env.stdout.getvalue())
                act()
            finally:
                held.unlink()

        self.thread = threading.Thread(target=wait_and_act)
        self.thread.start()


@pytest.fixture
def demo(host):
    """With a host beside it only to see that nothing is left."""
    return Demo(host)


@pytest.fixture
def disk_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MEMORY_DISK)
    return str(path)


@pytest.fixture
def held(disk_file):
    """While that is there, the disk holds reads of single blocks, with ``fault=held``."""
    return Path(disk_file + ".held")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(pattern(1 << 20)[::-1])
    return path


FOUR = ["sequential write", "sequential read", "random 4 KiB read", "random 4 KiB write"]


def names(out):
    return [line[:20].strip() for line in out.splitlines() if "IOPS" in line]


def test_by_default(demo):
    status, out, err = demo()
    assert status is ExitStatus.OK
    assert names(out) == FOUR
    assert "MB/s" in out
    assert out.splitlines()[-1].startswith("image untouched: sha256")
    assert err == ""


def test_a_vhd(demo, tmp_path):
    path = tmp_path / "disk.vhd"
    assert ExitStatus.OK is main(["create", str(path), "--size", "1M"], demo.env)
    before = path.read_bytes()
    status, out, err = demo("--path", str(path), "--format", "vhd")
    assert status is ExitStatus.OK
    assert "only reading: writing would change" in err
    assert before == path.read_bytes()
    status, out, err = demo("--path", str(path), "--format", "vhd", "--overwrite")
    assert status is ExitStatus.OK
    assert names(out) == FOUR
    assert err == ""
    assert before != path.read_bytes()


@pytest.mark.parametrize("parent", ["raw", "vhd"])
def test_changes_kept_in_a_vhd(demo, tmp_path, image, parent):
    overlay = tmp_path / "changes.vhd"
    words = ["--overlay", str(overlay)]
    if parent == "vhd":
        image = tmp_path / "gold.vhd"
        assert ExitStatus.OK is main(["create", str(image), "--size", "1M"], demo.env)
        words += ["--format", "vhd"]
    before = image.read_bytes()
    status, out, err = demo("--path", str(image), *words)
    assert status is ExitStatus.OK
    assert names(out) == FOUR
    assert "image untouched" in out
    assert err == ""
    assert before == image.read_bytes()
    length = overlay.stat().st_size
    assert length > len(before)
    status, _, err = demo(*words[:2])  # again, by the name of the changes alone
    assert status is ExitStatus.OK
    assert "only reading" in err
    assert length == overlay.stat().st_size


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--format", "vhd"], "needs --path"),
        (["--format", "vhd", "--path", "x", "--backend", "raw"], "leave out one of them"),
        (["--format", "raw", "--path", "x", "--backend", "vhd"], "leave out one of them"),
        (["--format", "vhd", "--path", "x", "--overlay", "y"], "a name that ends in .vhd"),
        (["--overlay", "/none.vhd"], "there is no such file yet"),
        (["--overlay", "a.vhd", "--path", "x", "--backend", "raw"], "does not keep changes"),
        (["--overlay", "a.vhd", "--path", "x", "--cow-limit", "1M"], "takes no --cow-limit"),
        (["--format", "bochs", "--path", "x"], "invalid choice"),
    ],
)
def test_formats_that_do_not_fit(demo, words, text):
    status, _, err = demo(*words)
    assert status is ExitStatus.USAGE
    assert text in err


@pytest.mark.parametrize("backend", ["discard", "raw", "mmap"])
def test_backends_without_an_image(demo, backend):
    status, out, err = demo("--backend", backend)
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)
    assert "image" not in out


def test_an_image_is_not_touched(demo, image):
    before = hashlib.sha256(image.read_bytes()).digest()
    status, out, _ = demo("--path", str(image), "--json")
    assert status is ExitStatus.OK
    result = json.loads(out)
    assert (result["backend"], result["path"]) == ("cow", str(image))
    assert result["image_untouched"]
    assert [phase["name"] for phase in result["phases"]] == FOUR
    assert {512 << 10} == {phase["bytes"] for phase in result["phases"][:2]}
    assert before == hashlib.sha256(image.read_bytes()).digest()


def test_an_image_that_is_touched(demo, image, monkeypatch):
    """By somebody else; the demo sees it."""
    drive = demo_module._drive

    def drive_and_write(*args):
        phases = drive(*args)
        image.write_bytes(bytes(1 << 20))
        return phases

    monkeypatch.setattr(demo_module, "_drive", drive_and_write)
    status, out, _ = demo("--path", str(image))
    assert status is ExitStatus.ERROR
    assert "image CHANGED" in out


def test_a_damaged_vhd_that_is_only_read_is_not_repaired(demo, tmp_path):
    path = tmp_path / "disk.vhd"
    assert ExitStatus.OK is main(["create", str(path), "--size", "1M"], demo.env)
    path.write_bytes(path.read_bytes()[:-512])  # without its footer
    before = path.read_bytes()
    status, out, err = demo("--path", str(path), "--format", "vhd")
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))
    assert f"only reading: writing would change {path}" in err
    assert before == path.read_bytes()
    status, out, err = demo("--path", str(path), "--format", "vhd", "--read-only")
    assert (ExitStatus.OK, "") == (status, err)
    assert before == path.read_bytes()
    status, out, err = demo("--path", str(path), "--format", "vhd", "--overwrite")
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)
    assert path.read_bytes().endswith(before[:512])


def test_changes_to_a_qcow2_are_none_of_a_vhd(demo, image, tmp_path):
    overlay = tmp_path / "changes.vhd"
    status, _, err = demo("--path", str(image), "--format", "qcow2", "--overlay", str(overlay))
    assert ExitStatus.USAGE is status
    assert "QEMU keeps changes itself: make them a file of their own" in err
    assert not overlay.exists()


def test_raw_only_reads_unless_it_may_overwrite(demo, image):
    before = image.read_bytes()
    status, out, err = demo("--path", str(image), "--backend", "raw")
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))
    assert f"only reading: writing would change {image}" in err
    assert before == image.read_bytes()
    status, out, err = demo("--path", str(image), "--backend", "raw", "--overwrite")
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)
    assert before != image.read_bytes()
    assert before[512 << 10 :] == image.read_bytes()[512 << 10 :]


def test_an_overlay_keeps_what_is_written_and_is_only_read_the_next_time(demo, image, tmp_path):
    overlay = tmp_path / "changes"
    before = image.read_bytes()
    status, out, err = demo("--path", str(image), "--overlay", str(overlay), "--json")
    assert (ExitStatus.OK, "") == (status, err)
    result = json.loads(out)
    assert ("overlay", str(image)) == (result["backend"], result["path"])
    assert FOUR == [phase["name"] for phase in result["phases"]]
    assert result["image_untouched"]
    written = overlay.read_bytes()
    status, out, err = demo("--overlay", str(overlay))  # it knows its image
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))
    assert f"only reading: writing would change {overlay}" in err
    assert "image untouched" in out
    assert written == overlay.read_bytes()
    status, out, err = demo("--overlay", str(overlay), "--backend", "cow", "--overwrite")
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)
    assert before == image.read_bytes()


def test_an_overlay_of_a_disk_of_ones_own(demo, disk_file, tmp_path):
    status, _, err = demo("--path", disk_file, "--overlay", str(tmp_path / "changes"))
    assert ExitStatus.USAGE is status
    assert "takes no --overlay" in err


def test_a_disk_of_ones_own(demo, disk_file):
    """It may keep its data somewhere: nothing is written unless that is said to be fine."""
    status, out, err = demo("--path", disk_file)
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))
    assert f"only reading: writing would change {disk_file}" in err
    status, out, err = demo("--path", disk_file, "--overwrite")
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)


def test_a_disk_of_ones_own_that_is_read_only(demo, disk_file):
    status, out, _ = demo("--path", disk_file, "--read-only")
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))


def test_a_disk_that_keeps_nothing_is_not_compared(demo, disk_file):
    assert demo("--path", disk_file, "--overwrite", "--option", "fault=forgets")[0] is ExitStatus.OK


def test_wrong_data(demo, disk_file):
    status, _, err = demo("--path", disk_file, "--overwrite", "--option", "fault=corrupts")
    assert status is ExitStatus.ERROR
    assert "4 of 128 blocks came back wrong, the first at byte 126976" in err


def test_a_disk_that_fails(demo, disk_file, caplog):
    status, _, err = demo("--path", disk_file, "--overwrite", "--option", "fault=raises")
    assert status is ExitStatus.ERROR
    assert "error: the guest says: " in err
    assert "I/O error: BLKIF_RSP_ERROR (-1)" in err
    assert "mine.py:14: ValueError: on purpose" in caplog.text


def test_a_flush_that_fails(demo, tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    argv = ("--path", str(disk), "--backend=raw", "--overwrite", "--filter=error:operations=flush")
    status, _, err = demo(*argv)
    assert status is ExitStatus.ERROR
    assert "error: the guest says: I/O error: a flush failed (-5)" in err


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--path", "/nowhere/at.all"], 1),
        (["--path", "/nowhere/at.py"], 1),
        (["--backend", "raw", "--path", "/"], 1),
        (["--backend", "magnetic"], 2),
    ],
)
def test_wrong_input(demo, argv, status):
    found, out, err = demo(*argv)
    assert (status, "") == (found, out)
    assert len(err.splitlines()) == 1


def test_a_guest_that_dies(demo, disk_file, held, monkeypatch):
    """Of a signal, with its disk connected."""
    guests = []
    start = demo_module._start_guest
    monkeypatch.setattr(
        demo_module, "_start_guest", lambda *args: guests.append(start(*args)) or guests[0]
    )
    demo.while_busy(lambda: os.kill(guests[0].pid, signal.SIGKILL), held)
    status, _, err = demo("--path", disk_file, "--overwrite", "--option", "fault=held")
    assert status is ExitStatus.ERROR
    assert "interrupted: the guest has gone" in err


def test_interrupts(demo, disk_file, held, monkeypatch):
    """The first asks the guest, which has no ear for it; the second ends everything."""

    made = []
    monkeypatch.setattr(demo_module, "Interrupts", lambda: made.append(Interrupts()) or made[0])

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        demo.host.until(lambda: "asked the guest" in demo.env.stderr.getvalue())
        os.kill(os.getpid(), signal.SIGINT)
        demo.host.until(lambda: made[0].calm)  # it was heard

    demo.while_busy(interrupt, held)
    status, _, err = demo("--path", disk_file, "--overwrite", "--option", "fault=held")
    assert status is ExitStatus.INTERRUPTED
    assert "asked the guest to release the disk; Ctrl-C again to force\n" in err
    assert "interrupted: unplugged by force" in err


SLOW = """\
import time
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 64 << 20

    def __init__(self, read_only=False):
        self.read_only = read_only

    def read(self, buffers, offset):
        time.sleep(0.05)
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    write = read
"""


@pytest.fixture
def slow(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(SLOW)
    return str(path)


def test_a_slow_disk_takes_as_long_as_was_said(demo, slow):
    """And no more is compared than was written."""
    status, out, _ = demo("--path", slow, "--seconds", "0.3", "--json", "--bytes=32M")
    assert status is ExitStatus.OK
    read, blocks = json.loads(out)["phases"]
    assert 0 < read["bytes"] < 32 << 20
    assert 0 < blocks["requests"] < demo_module._BLOCKS


def test_an_interrupt_ends_it_when_what_is_under_way_is_done(demo, slow, monkeypatch):
    """The guest is asked, and does so."""
    started = []
    start = demo_module._start_guest
    monkeypatch.setattr(
        demo_module, "_start_guest", lambda *args: started.append(start(*args)) or started[0]
    )

    def interrupt():
        demo.host.until(lambda: started)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, _, err = demo("--path", slow, "--seconds", "600")
    thread.join()
    assert status is ExitStatus.INTERRUPTED
    assert "interrupted: " in err


def test_progress_on_a_terminal(slow):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    env = Environment(stdout=io.StringIO(), stderr=Terminal())
    assert main(["demo", "--path", slow, "--seconds", "0.8"], env) is ExitStatus.OK
    drawn = env.stderr.getvalue().split("\r\x1b[K")
    assert any(text.startswith("sequential read: ") and text.endswith("%") for text in drawn)
    assert "" == drawn[-1]


def test_nobody_reads_on(slow):
    """``demo | head -1``."""
    command = own_command("demo", "--path", slow, "--seconds", "0.2")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("sequential read")
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(PATIENCE) in (ExitStatus.ERROR, ExitStatus.INTERRUPTED)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "argv",
    [
        ["--backend=discard", "--size=2048"],
        ["--bytes=2048"],
        ["--bytes=512"],
        ["--bytes=64K", "--sector-size=4096"],
        ["--bytes=10K", "--backend=discard", "--size=1M", "--sector-size=4096"],
        ["--bytes=6K"],
    ],
)
def test_small_disks_and_large_sectors(demo, argv):
    status, out, err = demo(*argv)
    assert (ExitStatus.OK, "") == (status, err)
    assert "verified: " in out
    if argv == ["--bytes=2048"]:
        assert "random 2 KiB read" in out


def test_an_overlay_is_not_made_to_be_read_only(demo, image, tmp_path):
    new = tmp_path / "new"
    status, _, err = demo("--path", str(image), "--read-only", "--overlay", str(new))
    assert status is ExitStatus.USAGE
    assert "leave out one of them" in err
    assert not new.exists()


def test_an_overlay_of_nothing_that_was_named(demo):
    status, out, err = demo("--backend=overlay")
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)
    assert "image untouched" in out


# -- the guest, in this process ------------------------------------------------------------


def test_more_than_one_window(host, monkeypatch):
    """What is compared is never in memory as a whole."""
    assert pattern(3 << 20, 5 << 19) == pattern(8 << 20)[5 << 19 : 11 << 19]
    assert guest_module._WINDOW <= 16 << 20
    monkeypatch.setattr(guest_module, "_WINDOW", 192 << 10)  # and the last is a part of one
    backend = host.memory(1 << 20)
    phases = work(host.serving(backend).frontend(), Plan("", "", "", 1 << 19, 10, True, "written"))
    assert FOUR == [phase.name for phase in phases]
    assert pattern(1 << 19) == backend.data[: 1 << 19]


@pytest.mark.parametrize("expect", ["written", "zeros"])
def test_the_guest_compares_what_it_reads(host, expect):
    backend = host.memory(1 << 20)
    frontend = host.serving(backend).frontend()
    plan = Plan("", "", "", 1 << 19, 10, True, expect)
    phases = work(frontend, plan)
    if expect == "written":
        assert FOUR == [phase.name for phase in phases]
        assert pattern(1 << 19) == backend.data[: 1 << 19]
    else:
        assert isinstance(next(phases), Phase)
        assert next(phases).requests == 4
        with pytest.raises(VerificationFailed, match="128 of 128 blocks came back wrong"):
            next(phases)
