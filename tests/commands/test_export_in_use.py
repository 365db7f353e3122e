"""``export`` of a disk whose guest writes all the time, on ext4, which cannot clone files."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import storage

from xen_disk_py.backends import exporting
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.vhd import export as vhd_export
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import export_in_use
from xen_disk_py.xenbus.states import Address, State

ADDRESS = Address(0, 5, 51728, "vbd3")
SIZE = 8 << 20
PLACES = 61
STEP = 128 << 10


class Guest:
    """Writes a number that grows, all the time: to each of its places in turn, one at a time."""

    def __init__(self, frontend):
        self._frontend = frontend
        self._go = True
        self.answered = -1
        self.error = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        number = 0
        try:
            while self._go:
                place = number % PLACES
                self._frontend.write(place * STEP, number.to_bytes(8, "big") * 512)
                self.answered, number = number, number + 1
                if not number % 8:
                    time.sleep(0.002)  # leave the processor to those who export
        except OSError as error:
            self.error = error

    def stop(self):
        self._go = False
        self._thread.join(30)
        assert not self._thread.is_alive()


def moment_of(content):
    """Return the number written last, maybe in part; all others must be those before it."""
    found = [content[place * STEP : place * STEP + 4096] for place in range(PLACES)]
    numbers = [
        {int.from_bytes(block[at : at + 8], "big") for at in range(0, 4096, 8)} for block in found
    ]
    last = max(map(max, numbers))
    for place, each in enumerate(numbers):
        number = last - (last - place) % PLACES
        before = max(number - PLACES, 0)
        assert each == {max(number, 0)} or (number == last and each == {number, before}), (
            place,
            last,
        )
    return last


@pytest.fixture
def directory(tmp_path):
    with ExitStack() as stack:
        yield storage.file_system(tmp_path, stack).directory


PATIENT = """
from xen_disk_py.backends import before_images

before_images.WAIT = 30.0  # there is room for all: nobody is dropped since a machine is busy
"""
IMPATIENT = """
from xen_disk_py.backends import before_images

times = {times}


def begin(images, *arguments, real=before_images.BeforeImages.__init__, **more):
    global times
    times -= 1
    before_images.WAIT = 0.01 if times >= 0 else 30.0
    real(images, *arguments, **more, **({{"room": 1 << 20}} if times >= 0 else {{}}))


before_images.BeforeImages.__init__ = begin
"""


@pytest.fixture
def hook():
    """What the processes that serve do first."""
    return PATIENT


@pytest.fixture(params=["overlay", "vhd"])
def disk(host, processes, directory, request, hook):
    """The processes that serve, their file, and a guest that writes."""
    used = directory / f"used.{request.param}"
    if request.param == "vhd":
        assert ExitStatus.OK == main(["create", str(used), "--size", "8M"], host.environment())
        argv = ["--path", str(used), "--format", "vhd"]
    else:
        with open(directory / "image", "wb") as file:
            file.truncate(SIZE)
        argv = ["--path", str(directory / "image"), "--overlay", str(used)]
    processes.install(hook)
    process = processes.start("connect", "guest", "--vdev=xvdb", *argv)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    guest = Guest(frontend)
    host.until(lambda: guest.answered > PLACES)
    serving = [process]
    yield serving, str(used), guest
    guest.stop()
    assert guest.error is None
    serving[-1].signal(signal.SIGINT)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert ExitStatus.OK == serving[-1].wait()


@pytest.fixture
def during(monkeypatch):
    """Have something done before each piece that an export copies."""

    def during(action):
        for module in maintenance, vhd_export:

            def copy(*arguments, real=module._copy):
                action()
                real(*arguments)

            monkeypatch.setattr(module, "_copy", copy)

    return during


def export(host, used, new):
    env = host.environment()
    return main(["export", used, str(new)], env), env.stderr.getvalue()


def test_it_is_what_the_disk_had_at_one_instant(host, disk, directory, during):
    _, used, guest = disk

    def wait():
        before = guest.answered
        host.until(lambda: guest.answered > before + 1)

    during(wait)
    for name in ("first", "second"):
        before = guest.answered
        status, err = export(host, used, directory / name)
        assert (ExitStatus.OK, "") == (status, err)
        assert before <= moment_of((directory / name).read_bytes()) < guest.answered


def test_a_process_that_is_killed_has_lost_the_instant(host, disk, directory, during, processes):
    serving, used, guest = disk

    def kill():
        serving[0].signal(signal.SIGKILL)
        serving[0].wait()

    during(kill)
    status, err = export(host, used, directory / "new")
    assert (ExitStatus.OK, "") == (status, err)  # nobody writes any more
    assert moment_of((directory / "new").read_bytes()) in (guest.answered, guest.answered + 1)
    serving.append(processes.start("connect", "--adopt", "guest", "xvdb"))
    before = guest.answered
    host.until(lambda: guest.answered > before + PLACES)


def test_with_the_next_process_the_export_starts_again(
    host, disk, directory, during, processes, monkeypatch
):
    monkeypatch.setattr(exporting, "_SETTLING", 0.015)
    serving, used, guest = disk
    since = []

    def follow():
        if len(serving) == 1:
            serving[0].kill()
            serving.append(processes.start("connect", "--adopt", "guest", "xvdb"))
        before = guest.answered
        host.until(lambda: guest.answered > before + 1)
        since.append(before)

    during(follow)
    status, err = export(host, used, directory / "new")
    assert (ExitStatus.OK, "") == (status, err)
    assert since[0] < moment_of((directory / "new").read_bytes()) <= since[-1]


COPYING = """
import signal

from xen_disk_py.backends import exporting
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.vhd import export as vhd_export
from xen_disk_py.backends.vhd import export


def copy(*_):
    print("copying", file=sys.stderr, flush=True)
    while True:
        signal.pause()


maintenance._copy = export._copy = copy
"""
TAKING_NOTHING = """
from xen_disk_py.recovery import export_in_use

export_in_use.receive = lambda *_: signal.pause()
"""


@pytest.mark.parametrize("hook", [IMPATIENT.format(times=1)], ids=[""])
@pytest.mark.parametrize("is_killed", [True, False])
def test_the_guest_waits_for_no_exporter(host, disk, directory, processes, is_killed):
    """One that takes nothing is dropped when there is no room for more."""
    _, used, guest = disk
    processes.install(COPYING + ("" if is_killed else TAKING_NOTHING))
    exporter = processes.start("export", used, str(directory / "killed"))
    exporter.until("copying")
    before = guest.answered
    if is_killed:
        exporter.signal(signal.SIGKILL)
        exporter.wait()
    host.until(lambda: guest.answered > before + 10 * PLACES)
    status, err = export(host, used, directory / "new")
    assert (ExitStatus.OK, "") == (status, err)
    assert before <= moment_of((directory / "new").read_bytes()) <= guest.answered + 1
    assert not [name for name in os.listdir(directory) if name.startswith((".", "killed"))]


@pytest.mark.parametrize("hook", [IMPATIENT.format(times=3)], ids=[""])
def test_a_guest_that_overwrites_too_much_is_named(host, disk, directory, during, monkeypatch):
    """So that the administrator can pause it; and nothing more is copied in vain."""
    monkeypatch.setattr(exporting, "_copy_unchanged", lambda *_: False)
    _, used, _ = disk
    copied = []

    def receive(disk, size, images, real=export_in_use.receive):
        end = select.poll()
        end.register(disk, select.POLLRDHUP)
        assert end.poll(30_000)
        return real(disk, size, images)

    def wait():
        copied.append(1)
        host.until(lambda: "before-images" not in {each.name for each in threading.enumerate()})

    monkeypatch.setattr(export_in_use, "receive", receive)
    during(wait)
    status, err = export(host, used, directory / "new")
    assert ExitStatus.ERROR == status
    assert "overwrites more than the exporter takes): pause the guest" in err
    assert 3 == len(copied)


def test_one_export_at_a_time(host, disk, directory, processes):
    _, used, _ = disk
    processes.install(COPYING)
    exporter = processes.start("export", used, str(directory / "first"))
    exporter.until("copying")
    status, err = export(host, used, directory / "new")
    assert ExitStatus.USAGE == status
    assert "being exported already" in err
    exporter.signal(signal.SIGTERM)
    assert 130 == exporter.wait()
    assert (ExitStatus.OK, "") == export(host, used, directory / "new")
