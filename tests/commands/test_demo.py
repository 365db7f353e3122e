"""``demo``: a second process plays the guest, and tells right from wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands import demo as demo_module
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.session import Interrupts
from xen_disk_py.simulated.guest import Phase, Plan, VerificationFailed, pattern, work

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
        while self.fault == "held" and len(buffers) == 1 and os.path.exists(__file__ + ".held"):
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
    path.write_bytes(pattern(1 << 20))
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
    assert "only reading: vhd would change" in err
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
        (["--format", "qcow2", "--path", "x"], "invalid choice"),
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


def test_raw_only_reads_unless_it_may_overwrite(demo, image):
    before = image.read_bytes()
    status, out, err = demo("--path", str(image), "--backend", "raw")
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))
    assert f"only reading: raw would change {image}" in err
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
    assert f"only reading: overlay would change {overlay}" in err
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
    status, out, err = demo("--path", disk_file)
    assert (ExitStatus.OK, FOUR, "") == (status, names(out), err)


def test_a_disk_of_ones_own_that_is_read_only(demo, disk_file):
    status, out, _ = demo("--path", disk_file, "--read-only")
    assert (ExitStatus.OK, FOUR[1:3]) == (status, names(out))


def test_a_disk_that_keeps_nothing_is_not_compared(demo, disk_file):
    assert demo("--path", disk_file, "--option", "fault=forgets")[0] is ExitStatus.OK


def test_wrong_data(demo, disk_file):
    status, _, err = demo("--path", disk_file, "--option", "fault=corrupts")
    assert status is ExitStatus.ERROR
    assert "4 of 128 blocks came back wrong, the first at byte 126976" in err


def test_a_disk_that_fails(demo, disk_file, caplog):
    status, _, err = demo("--path", disk_file, "--option", "fault=raises")
    assert status is ExitStatus.ERROR
    assert "error: the guest says: " in err
    assert "the backend answered status -1" in err
    assert "mine.py:14: ValueError: on purpose" in caplog.text


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
    status, _, err = demo("--path", disk_file, "--option", "fault=held")
    assert status is ExitStatus.ERROR
    assert "interrupted: the guest has gone" in err


def test_interrupts(demo, disk_file, held, monkeypatch):
    """The first asks the guest, which has no ear for it; the second ends everything."""

    made = []
    monkeypatch.setattr(demo_module, "Interrupts", lambda: made.append(Interrupts()) or made[0])

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        demo.host.until(lambda: made[0].asked)  # two at once are one
        os.kill(os.getpid(), signal.SIGINT)
        demo.host.until(lambda: made[0].calm)  # it was heard

    demo.while_busy(interrupt, held)
    status, _, err = demo("--path", disk_file, "--option", "fault=held")
    assert status is ExitStatus.ERROR
    assert "interrupted: unplugged by force" in err


# -- the guest, in this process ------------------------------------------------------------


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
