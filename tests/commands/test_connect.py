"""``connect``, whole: signals, output, exit status, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import signal
import threading
import time
from typing import ClassVar

import pytest

from xen_disk_py.backends import Backend
from xen_disk_py.blkif import READ
from xen_disk_py.cli import main
from xen_disk_py.commands import connect as connect_module
from xen_disk_py.datapath.queue import Queue
from xen_disk_py.errors import PrivilegeError
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host import privileges
from xen_disk_py.recovery.record import find
from xen_disk_py.recovery.spec import DiskSpec
from xen_disk_py.session import Interrupts
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import Address, State
from xen_disk_py.xenbus.vdev import parse


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Player:
    """The guest, and the user at the keyboard, in a thread beside ``connect``."""

    def __init__(self, host, env, script):
        self.host = host
        self.env = env
        self.script = script
        self.error = None
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.script(self)
        except BaseException as error:
            self.error = error
            # Whatever it was, let ``connect`` end.
            self.host.xenstored.remove_domain(self.host.DOMID)

    def address(self, vdev="xvda"):
        return Address(0, self.host.DOMID, parse(vdev).number, "vbd3")

    def frontend(self, vdev="xvda", **options):
        address = self.address(vdev)
        self.host.until(lambda: f"{address.frontend}/state" in self.host.tree())
        frontend = self.host.frontend(address, **options)
        frontend.connect()
        return frontend

    def interrupt(self, signum=signal.SIGINT):
        os.kill(os.getpid(), signum)

    def unplug(self, frontend, signum=signal.SIGINT):
        """Once it is connected, interrupt; then release the disk as a guest does."""
        self.host.until(self.env.stdout.getvalue)
        self.interrupt(signum)
        self.host.until(lambda: frontend.backend_state is State.CLOSING)
        frontend.disconnect()


@pytest.fixture
def connect(host):
    """Run ``connect`` here while the script plays; give its status and what it said."""

    def connect(script, *argv, stderr=None, xen=(4, 20)):
        env = host.environment(stderr)
        env.xen_version = lambda: xen
        player = Player(host, env, script)
        player.thread.start()
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        try:
            status = main(["connect", *argv], env)
        finally:
            player.thread.join()
        if player.error is not None:
            raise player.error
        assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
        assert host.hypervisor.mapped_pages == 0
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return connect


def session(player, vdev="xvda"):
    """A short life: connect, write, read, and release the disk when asked."""
    frontend = player.frontend(vdev)
    frontend.write(4096, b"new" * 4096)
    frontend.read(0, 65536)
    frontend.flush()
    frontend.discard(0, 4096)
    player.unplug(frontend)


@pytest.mark.parametrize("option", [[], ["--no-discard"]])
def test_discard_can_be_kept_from_the_guest(connect, option):
    def script(player):
        frontend = player.frontend()
        assert frontend.features.discard is (not option)
        player.unplug(frontend)

    assert connect(script, "guest", *option)[0] is ExitStatus.OK


def test_a_filter_changes_the_disk(connect, caplog):
    def script(player):
        frontend = player.frontend()
        with pytest.raises(OSError, match=r"status -1|I/O error"):
            frontend.write(0, b"x" * 4096)
        assert bytes(4096) == frontend.read(0, 4096)
        player.unplug(frontend)

    status, _, _ = connect(script, "guest", "--filter", "error:operations=write,errno=EROFS")
    assert status is ExitStatus.OK
    assert "Read-only file system (the error filter)" in caplog.text


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_throwaway_disk(connect, signum):
    def script(player):
        frontend = player.frontend()
        assert bytes(4096) == frontend.read(0, 4096)
        player.unplug(frontend, signum)

    status, out, err = connect(script, "guest")
    assert status is ExitStatus.OK
    assert out == "xvda 51712 /dev/xvda 1 GiB discard rw\n"
    lines = err.splitlines()
    assert lines[0].startswith("xvda: asked the guest to release the disk")
    assert lines[1] == "xvda: unplugged"
    assert ["reads", "1", "4", "KiB"] == lines[2].split()
    assert "segments per request" in lines
    assert "requests per batch" in lines


@pytest.mark.parametrize("stream", ["stdin", "stderr"])
def test_the_end_of_the_terminal(host, connect, monkeypatch, stream):
    """Whoever started it there has gone: the guest is asked to release the disk."""
    if stream == "stdin":
        env = host.environment()
        env.stdin = Terminal()
        monkeypatch.setattr(host, "environment", lambda stderr: env)

    def script(player):
        player.unplug(player.frontend(), signal.SIGHUP)

    stderr = Terminal() if stream == "stderr" else None
    status, _, err = connect(script, "guest", "--quiet", stderr=stderr)
    assert (ExitStatus.OK, True) == (status, "xvda: unplugged" in err)


def test_hangup_without_a_terminal(connect, image, caplog):
    """The guest gets what the image has become, and the record says so."""
    caplog.set_level("INFO")

    def script(player):
        frontend = player.frontend()
        player.host.until(player.env.stdout.getvalue)
        os.truncate(image, 2 << 20)
        player.interrupt(signal.SIGHUP)
        player.host.until(lambda: frontend.look_again().sectors == 4096)
        assert bytes(4096) == frontend.read((2 << 20) - 4096, 4096)
        assert find(player.host.records, player.address()).facts.size == 2 << 20
        os.truncate(image, 1 << 20)
        player.interrupt(signal.SIGHUP)
        player.host.until(lambda: "not resized: 1048576 bytes is less" in caplog.text)
        player.unplug(frontend)

    argv = ["guest", "--path", str(image), "--backend", "raw", "--json"]
    status, out, _ = connect(script, *argv)
    assert (ExitStatus.OK, 1 << 20) == (status, json.loads(out)["size"])
    assert "2097152 bytes long now, 1048576 before" in caplog.text
    caplog.clear()  # the error in it knows where it was raised, down to the record


def test_copy_on_write(connect, image):
    before = image.read_bytes()
    status, out, err = connect(session, "5", "--path", str(image))
    assert status is ExitStatus.OK
    assert out == "xvda 51712 /dev/xvda 1 MiB cow rw\n"
    assert (
        "vanish when the disk is disconnected; to keep them beside the image: --overlay FILE" in err
    )
    assert before == image.read_bytes()


def test_large_sectors(connect, image):
    def script(player):
        frontend = player.frontend()
        assert 4096 == frontend.features.sector_size
        assert 2048 == frontend.features.sectors  # of 512 bytes, as ever
        assert 4096 == len(frontend.read((1 << 20) - 4096, 4096))
        with pytest.raises(OSError, match="-1"):
            frontend.read(512, 512)
        player.unplug(frontend)

    argv = ["guest", "--path", str(image), "--sector-size", "4096"]
    status, _, err = connect(script, *argv)
    assert (ExitStatus.OK, True) == (status, "refused            1" in err)


@pytest.mark.parametrize("kind", ["pv", "pvh", ""])
def test_cdrom(host, connect, image, kind):
    host.store.write(f"/libxl/{host.DOMID}/type", kind)

    def script(player):
        frontend = player.frontend()
        assert (True, True) == (frontend.features.cdrom, frontend.features.read_only)
        tree = player.host.tree()
        assert "cdrom" == tree[f"{player.address().frontend}/device-type"]
        assert "r" == tree[f"{player.address().backend}/mode"]
        with pytest.raises(OSError, match="-1"):
            frontend.write(0, bytes(4096))
        player.unplug(frontend)

    status, out, err = connect(script, "guest", "--path", str(image), "--cdrom")
    host.store.write(f"/libxl/{host.DOMID}/type", "")
    assert (ExitStatus.OK, True) == (status, out.endswith("cow ro\n"))
    assert (kind == "pvh") == ("PVH guest: Linux does not take a CD-ROM there" in err)


@pytest.mark.parametrize(("xen", "says"), [((4, 17), True), ((4, 19), False), (None, False)])
def test_who_can_take_the_disk_away_from_a_guest_with_a_qemu(host, connect, xen, says):
    host.store.write(f"/local/domain/0/device-model/{host.DOMID}/state", "running")
    status, _, err = connect(session, "guest", xen=xen)
    host.store.remove("/local/domain/0/device-model")
    assert status is ExitStatus.OK
    told = "cannot take a disk away from a guest with a QEMU of its own; use: xen-disk disconnect "
    assert says == (f"{told}{host.DOMID} xvda" in err)


class Somebody:
    """Stands for what becoming another user does."""

    def __init__(self, monkeypatch, host, error=None):
        self.host = host
        self.error = error
        self.seen = []
        self.reserved = []
        user = privileges.User("somebody", 1234, 1234)
        monkeypatch.setattr(privileges, "find_user", lambda text: user)
        monkeypatch.setattr(privileges, "forbid_gains", lambda: self.seen.append("forbid"))
        monkeypatch.setattr(privileges, "become", self.become)
        monkeypatch.setattr(host.hypervisor, "reserve", lambda *what: self.reserved.append(what))

    def become(self, user):
        states = [path for path in self.host.tree() if path.endswith("/51712/state")]
        self.seen.append((user.name, len(states), len(os.listdir(self.host.records))))
        if self.error is not None:
            raise self.error


def test_another_user(host, connect, monkeypatch):
    """When the nodes and the record are there, and all else is open."""
    somebody = Somebody(monkeypatch, host)
    status, _, _ = connect(session, "guest", "--user", "somebody")
    assert status is ExitStatus.OK
    assert ["forbid", ("somebody", 3, 3)] == somebody.seen  # the record, its socket, the seal
    assert [(host.DOMID, 1)] == somebody.reserved


def test_another_user_cannot_be_become(host, connect, monkeypatch):
    somebody = Somebody(monkeypatch, host, PrivilegeError("cannot become somebody: no"))
    status, out, err = connect(lambda player: None, "guest", "--user", "somebody")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "error: cannot become somebody: no\n" in err
    assert 2 == len(somebody.seen)


def test_raw(connect, image):
    status, out, err = connect(session, "guest", "--path", str(image), "--backend", "raw")
    assert (ExitStatus.OK, "xvda 51712 /dev/xvda 1 MiB raw rw\n") == (status, out)
    assert "vanish" not in err
    assert b"new" * 4096 == image.read_bytes()[4096 : 4096 + 12288]


def test_json(connect, image):
    argv = ["guest", "--path", str(image), "--vdev", "/dev/xvdc", "--json"]
    _, out, _ = connect(lambda player: session(player, "xvdc"), *argv)
    assert json.loads(out) == {
        "domid": 5,
        "domain": "guest",
        "vdev": "xvdc",
        "number": 51744,
        "device": "/dev/xvdc",
        "size": 1 << 20,
        "backend": "cow",
        "path": str(image),
        "mode": "rw",
        "pid": os.getpid(),
        "queue_pids": [],
    }


def test_quiet(connect):
    status, out, err = connect(session, "guest", "--quiet", stderr=Terminal())
    assert status is ExitStatus.OK
    assert out
    assert "reads" not in err
    assert "\r" not in err
    assert "xvda: unplugged" in err


def test_a_status_line_on_a_terminal(connect, image, monkeypatch):
    monkeypatch.setattr("xen_disk_py.session.TICK", 0.05)

    def script(player):
        frontend = player.frontend()
        frontend.write(4096, b"new" * 4096)
        last = "0 in flight, 12 KiB changed"
        player.host.until(lambda: last in player.env.stderr.getvalue())
        player.unplug(frontend)

    _, out, err = connect(script, "guest", "--path", str(image), stderr=Terminal())
    status = r"xvda: \d+ requests, [\d.]+ MB/s, \d+ IOPS, \d+ in flight(, \d+ KiB changed)?"
    said = [text for text in err.split("\r\x1b[K")[1:] if not re.fullmatch(status, text)]
    assert any(text.startswith("xvda: asked") for text in said)
    # It is taken away before anything else is said.
    assert not any("in flight" in text for text in said)
    assert "\r" not in out


class Failing(Backend):
    """A disk whose storage is gone."""

    size = 1 << 20

    def read(self, buffers, offset):
        raise OSError(errno.EIO, "the storage is gone")

    write = read


def test_requests_that_are_held(connect, monkeypatch):
    """A status line tells; and so does who is asked to end. Ctrl-C again gives them up."""
    monkeypatch.setattr("xen_disk_py.session.TICK", 0.01)
    monkeypatch.setattr(DiskSpec, "open_backend", lambda spec: Failing())
    failed = []

    def script(player):
        frontend = player.frontend(persistent=False)
        for _ in range(2):
            frontend.submit(READ, 0, length=4096)
        frontend.kick()
        player.host.until(lambda: "2 held" in player.env.stderr.getvalue())
        player.interrupt()
        player.host.until(lambda: "asked the guest" in player.env.stderr.getvalue())
        player.interrupt()
        try:
            frontend.drain()
        except OSError as error:
            failed.append(error)

    status, _, err = connect(script, "guest", "--on-error=hold", stderr=Terminal())
    assert (ExitStatus.INTERRUPTED, 1) == (status, len(failed))
    assert (
        "xvda: asked the guest to release the disk, but the storage fails and 2 requests are "
        "queued for retry; Ctrl-C again answers them with errors\n" in err
    )


def test_no_status_line_elsewhere(connect, monkeypatch):
    monkeypatch.setattr("xen_disk_py.session.TICK", 0.01)

    def script(player):
        frontend = player.frontend()
        player.host.until(player.env.stdout.getvalue)
        time.sleep(0.05)
        player.unplug(frontend)

    def show(line):
        shown.append(line)

    shown = []
    monkeypatch.setattr(connect_module._StatusLine, "show", show)
    assert "\r" not in connect(script, "guest")[2]
    assert [] == shown


def test_read_only(connect, image):
    def script(player):
        frontend = player.frontend()
        assert frontend.features.read_only
        assert image.read_bytes()[:4096] == frontend.read(0, 4096)
        tree = player.host.tree()
        assert tree[f"{player.address().backend}/mode"] == "r"
        player.unplug(frontend)

    argv = ["guest", "--path", str(image), "--backend", "raw", "--read-only"]
    status, out, _ = connect(script, *argv)
    assert (ExitStatus.OK, "xvda 51712 /dev/xvda 1 MiB raw ro\n") == (status, out)


def test_the_nodes_tell_who_serves(connect, image):
    def script(player):
        frontend = player.frontend()
        tree, back = player.host.tree(), player.address().backend
        assert tree[f"{back}/params"] == f"cow:{image}"
        assert tree[f"{back}/xen-disk-pid"] == str(os.getpid())
        assert f"{player.address().toolstack}/backend" in tree
        found = find(player.env.record_directory, player.address())
        assert found.alive
        assert found.facts.path == str(image)
        frontend.read(0, 4096)
        player.host.until(lambda: find(player.env.record_directory, player.address()).counters)
        player.unplug(frontend)

    assert connect(script, "guest", "--path", str(image))[0] is ExitStatus.OK


def test_no_indirect_segments(connect):
    def script(player):
        frontend = player.frontend(max_segments=100)
        assert frontend.features.max_indirect_segments == 0
        player.unplug(frontend)

    assert connect(script, "guest", "--indirect-segments", "0")[0] is ExitStatus.OK


def test_gaps_are_filled(connect, host):
    host.serving(host.memory(), "xvda")
    host.serving(host.memory(), "xvdc")
    _, out, _ = connect(lambda player: session(player, "xvdb"), "guest")
    assert out.startswith("xvdb ")


def test_taken(connect, host):
    host.serving(host.memory(), "xvdb")
    status, out, err = connect(lambda player: None, "guest", "--vdev", "xvdb")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "xvdb is taken in domain 5; choose another --vdev" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["nobody"], 1, "no domain 'nobody' is running; running are: 0 Domain-0, 5 guest"),
        (["²"], 1, "no domain '²' is running"),
        (["guest", "--path", "/nowhere/x.raw"], 1, "/nowhere/x.raw"),
        (["guest", "--path", "/"], 1, "/"),
        (["guest", "--path", "/nowhere/x.py"], 1, "no such file"),
    ],
)
def test_wrong_input(connect, argv, status, said):
    result, out, err = connect(lambda player: None, *argv)
    assert (status, "") == (result, out)
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_timeout(connect, host):
    status, out, err = connect(lambda player: None, "guest", "--timeout", "0.1")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "did not connect within 0.1 s: its state is 1 (Initialising)" in err
    assert "modprobe xen-blkfront" in err


def test_an_interrupt_before_the_guest_connects(connect):
    def script(player):
        player.host.until(lambda: f"{player.address().frontend}/state" in player.host.tree())
        player.interrupt()

    status, out, err = connect(script, "guest")
    assert (ExitStatus.OK, "") == (status, out)
    assert "xvda: unplugged" in err


def test_the_guest_is_destroyed(connect):
    def script(player):
        player.frontend()
        player.host.xenstored.remove_domain(player.host.DOMID)

    status, _, err = connect(script, "guest")
    assert status is ExitStatus.OK
    assert "xvda: the guest has gone" in err


def test_force(connect):
    def script(player):
        frontend = player.frontend()
        player.interrupt()
        player.host.until(lambda: frontend.backend_state is State.CLOSING)
        player.host.until(lambda: "Ctrl-C again to force" in player.env.stderr.getvalue())
        player.interrupt(signal.SIGTERM)
        player.host.until(lambda: frontend.backend_state is None)

    status, _, err = connect(script, "guest")
    assert status is ExitStatus.INTERRUPTED == 130
    assert "xvda: unplugged by force" in err


class Hanging(Backend):
    size = 1 << 20
    entered = threading.Event()
    allowed = threading.Event()

    def read(self, buffers, offset):
        self.entered.set()
        self.allowed.wait(60)

    def write(self, buffers, offset):
        pass


@pytest.mark.parametrize("closing", [False, True])
def test_force_with_a_backend_that_hangs(connect, monkeypatch, caplog, queue_threads, closing):
    """Also when the guest has released the disk and it is the backend alone that we wait for."""
    monkeypatch.setattr("xen_disk_py.xenbus.device.Device.force.__defaults__", (0.2,))
    monkeypatch.setattr(DiskSpec, "open_backend", lambda spec: Hanging())
    queues = []

    start = Queue.start

    def noted(queue):
        queues.append(queue)
        return start(queue)

    monkeypatch.setattr(Queue, "start", noted)
    Hanging.entered.clear()
    Hanging.allowed.clear()

    def script(player):
        frontend = player.frontend(persistent=False)
        frontend.submit(READ, 0, length=4096)
        frontend.kick()
        assert Hanging.entered.wait(player.host.PATIENCE)
        player.interrupt()
        player.host.until(lambda: frontend.backend_state is State.CLOSING)
        if closing:
            frontend._switch(State.CLOSED)
            time.sleep(0.1)
        player.interrupt()
        player.host.until(lambda: frontend.backend_state is None)
        player.host.until(lambda: "reads" in player.env.stderr.getvalue())
        time.sleep(0.05)
        Hanging.allowed.set()
        player.host.until(lambda: not queue_threads())
        assert queues[0].stop(player.host.PATIENCE)

    status, _, err = connect(script, "guest")
    assert status is ExitStatus.INTERRUPTED
    assert "xvda: unplugged by force" in err
    assert "the backend does not return" in caplog.text
    queues.clear()
    caplog.clear()  # what is logged refers to everything


def test_a_backend_that_keeps_buffers(connect, host, monkeypatch, caplog):
    class Keeping(Hanging):
        kept: ClassVar = []

        def read(self, buffers, offset):
            self.kept.append(buffers)

    monkeypatch.setattr(DiskSpec, "open_backend", lambda spec: Keeping())

    def script(player):
        frontend = player.frontend()
        frontend.read(0, 4096)
        player.interrupt()
        player.host.until(lambda: frontend.backend_state is State.CLOSING)
        frontend._switch(State.CLOSED)
        player.thread_of_main.wait(player.host.PATIENCE)

    ended = threading.Event()
    Player.thread_of_main = ended
    close = host.hypervisor.close

    def closing():
        try:
            close()
        finally:
            Keeping.kept.clear()
            ended.set()
            close()

    monkeypatch.setattr(host.hypervisor, "close", closing)
    assert connect(script, "guest")[0] is ExitStatus.OK
    assert "a buffer was kept" in caplog.text
    caplog.clear()  # what is logged refers to everything


def test_whoever_read_our_output_has_gone(connect, host):
    """The guest has its disk all the same."""

    class Gone(io.StringIO):
        def write(self, text):
            super().write(text)  # for the script to see
            raise BrokenPipeError(errno.EPIPE, "gone")

    env = host.environment()
    env.stdout = Gone()
    host.environment = lambda stderr=None: env
    status, _, err = connect(session, "guest")
    assert status is ExitStatus.OK
    assert "cannot write to stdout: Broken pipe\n" in err


def test_serving_fails(connect, monkeypatch, queue_threads):
    def script(player):
        frontend = player.frontend()
        (queue,) = queue_threads()
        monkeypatch.setattr("xen_disk_py.datapath.queue.encode_response", lambda *args: 1 / 0)
        frontend.submit(READ, 0, length=512)
        frontend.kick()
        queue.join()

    status, _, err = connect(script, "guest")
    assert status is ExitStatus.ERROR
    assert "serving failed: ZeroDivisionError" in err


def test_two_race_for_the_first_free_number(host, monkeypatch, tmp_path):
    """Both have seen the same number free: one of them looks again."""
    barrier = threading.Barrier(2)
    free_device = toolstack.free_device
    calls = itertools.count()

    def free_together(store, domid):
        found = free_device(store, domid)
        if next(calls) < 2:
            barrier.wait(host.PATIENCE)
        return found

    all_interrupts = []

    @contextlib.contextmanager
    def installed(self):
        all_interrupts.append(self)
        try:
            yield self
        finally:
            os.close(self._read)
            os.close(self._write)

    monkeypatch.setattr(toolstack, "free_device", free_together)
    monkeypatch.setattr(Interrupts, "installed", installed)
    environments = [host.environment(), host.environment()]
    # Of two hosts' worth of records, so that it is xenstore that decides; and of one.
    environments[1].record_directory = str(tmp_path / "elsewhere")
    statuses = []
    threads = [
        threading.Thread(target=lambda env=env: statuses.append(main(["connect", "guest"], env)))
        for env in environments
    ]
    for thread in threads:
        thread.start()
    for vdev in ("xvda", "xvdb"):
        path = f"/local/domain/5/device/vbd/{parse(vdev).number}/state"
        host.until(lambda path=path: path in host.tree())
    for interrupts in all_interrupts:
        interrupts.asked = True
        interrupts.wake()
    for thread in threads:
        thread.join()
    assert statuses == [ExitStatus.OK, ExitStatus.OK]
    assert not os.listdir(tmp_path / "elsewhere")


def test_two_race_on_one_host(host, monkeypatch):
    """The loser sees it by the record of the winner, before anything is in xenstore."""
    tried = []
    record_class = connect_module.Record

    class Slow(record_class):
        def __init__(self, directory, address, queues, **options):
            tried.append(address.devid)
            super().__init__(directory, address, queues, **options)

    monkeypatch.setattr(connect_module, "Record", Slow)
    monkeypatch.setattr(connect_module.time, "sleep", lambda seconds: None)
    first = record_class(host.records, Address(0, 5, parse("xvda").number, "vbd3"))
    with first:
        env = host.environment()
        assert main(["connect", "guest"], env) is ExitStatus.ERROR
        assert "every free device was taken" in env.stderr.getvalue()
        assert tried == [51712] * 20
        env = host.environment()
        assert main(["connect", "guest", "--vdev", "xvda"], env) is ExitStatus.ERROR
        assert "another process serves device 51712" in env.stderr.getvalue()
