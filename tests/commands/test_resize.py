"""``resize``: the whole way from the command line to the guest, and what it says when it fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from pathlib import Path

import pytest

from xen_disk_py.backends.discard import DiscardBackend
from xen_disk_py.backends.filter import Filter
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.backends.vhd.create import create
from xen_disk_py.cli import main
from xen_disk_py.commands import resize as resize_module
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import record
from xen_disk_py.recovery.record import Record
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import Address

MIB = 1 << 20


@pytest.fixture
def resize(host):
    """Run ``resize``; give its status, stdout and stderr."""

    def resize(*argv):
        env = host.environment()
        status = main(["resize", *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return resize


@pytest.fixture
def serve(host):
    """Serve a backend as ``xvdb`` by a living process."""
    records = []

    def serve(backend, **options):
        serving = host.serving(backend, "xvdb", start=False, **options)
        records.append(Record(host.records, serving.address))
        return serving.start()

    yield serve
    host.end_sessions()
    while records:  # their counters are in files
        records.pop().close()


def requests(host, serving):
    """Return what commands have left in xenstore."""
    root = f"{serving.address.backend}/resize/"
    return [path for path in host.tree() if path.startswith(root)]


def test_an_image_is_made_longer_and_shorter(host, serve, resize, tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(b"a" * MIB)
    backend = RawBackend(str(image))
    serving = serve(backend)
    frontend = serving.frontend()
    assert (ExitStatus.OK, "xvdb 51728 /dev/xvdb 2 MiB\n", "") == resize("guest", "xvdb", "2M")
    host.until(lambda: frontend.look_again().sectors == 2 * MIB // 512)
    frontend.write(2 * MIB - 4096, b"z" * 4096)
    assert b"a" * MIB + bytes(MIB - 4096) + b"z" * 4096 == image.read_bytes()

    status, out, err = resize("guest", "xvdb", "1M")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "1048576 bytes is less than the disk has, 2097152" in err
    assert "--force" in err
    assert 2 * MIB == image.stat().st_size

    assert ExitStatus.OK is resize("guest", "xvdb", "1M", "--force")[0]
    assert b"a" * MIB == image.read_bytes()
    assert [] == requests(host, serving)

    os.truncate(image, 3 * MIB)
    status, out, _ = resize("5", "51728", "--json")
    assert status is ExitStatus.OK
    assert {
        "domid": 5,
        "vdev": "xvdb",
        "number": 51728,
        "device": "/dev/xvdb",
        "size": 3 * MIB,
    } == json.loads(out)
    backend.close()


def test_a_vhd_is_made_longer_as_far_as_its_table_has_room(host, serve, resize, tmp_path):
    path = str(tmp_path / "a.vhd")
    create(path, MIB)
    backend = VhdBackend(path)
    serving = serve(backend)
    frontend = serving.frontend()
    frontend.write(MIB - 4096, b"a" * 4096)
    assert (ExitStatus.OK, "xvdb 51728 /dev/xvdb 5 MiB\n", "") == resize("guest", "xvdb", "5M")
    host.until(lambda: frontend.look_again().sectors == 5 * MIB // 512)
    frontend.write(5 * MIB - 4096, b"z" * 4096)
    assert b"a" * 4096 == frontend.read(MIB - 4096, 4096)
    assert bytes(4096) == frontend.read(MIB, 4096)
    status, out, err = resize("guest", "xvdb", "10G")
    assert (ExitStatus.ERROR, "", 1) == (status, out, err.count("\n"))
    assert "its table has room for 1 GiB" in err
    assert f"xen-disk create NEW --parent {path} --size {10 << 30}" in err
    backend.close()


def test_a_throwaway_disk(host, serve, resize):
    serving = serve(DiscardBackend(size=MIB))
    assert "xvdb 51728 /dev/xvdb 1 MiB\n" == resize("guest", "xvdb")[1]
    assert "xvdb 51728 /dev/xvdb 2 TiB\n" == resize("guest", "xvdb", "2T")[1]
    assert 2 << 40 == serving.disk.sectors * 512


def test_a_disk_that_keeps_its_size(host, serve, resize):
    serve(host.memory())
    status, out, err = resize("guest", "xvdb", "2M")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "keeps its size" in err


def test_the_guest_cannot_read_what_is_asked_and_answered(host, serve, resize, monkeypatch):
    serving = serve(DiscardBackend(size=MIB))
    seen = []
    parse = resize_module.resize.parse_answer

    def look(text):
        root = f"{serving.address.backend}/resize"
        seen.extend(host.store.get_permissions(path) for path in (root, f"{root}/{os.getpid()}"))
        return parse(text)

    monkeypatch.setattr(resize_module.resize, "parse_answer", look)
    monkeypatch.setattr(resize_module.Store, "remove", lambda store, path: None)
    assert ExitStatus.OK is resize("guest", "xvdb", "2M")[0]
    assert [["n0"], ["n0"]] == seen


@pytest.mark.parametrize("size", ["0", "100", "1.5K1", "513"])
def test_a_size_that_no_disk_has(resize, size):
    status, out, err = resize("guest", "xvdb", size)
    assert (ExitStatus.USAGE, "") == (status, out)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nobody", "xvdb"], "no domain 'nobody' is running"),
        (["guest", "xvdc"], "no xvdc of ours in domain 5; connected there: xvdb"),
    ],
)
def test_what_is_not_there(serve, resize, argv, said):
    serve(DiscardBackend(size=MIB))
    status, out, err = resize(*argv)
    assert (ExitStatus.ERROR, "") == (status, out)
    assert said in err


def test_a_process_that_has_ended(host, resize):
    serving = host.serving(DiscardBackend(size=MIB), "xvdb", start=False)
    serving.attach()
    one = Record(host.records, serving.address)
    content = Path(one.path).read_bytes()
    one.close()
    Path(one.path).write_bytes(content)
    status, _, err = resize("guest", "xvdb")
    assert status is ExitStatus.ERROR
    assert f"the process that served xvdb, {os.getpid()}, has ended" in err
    assert "xen-disk disconnect 5 xvdb" in err
    assert "adopt" not in err
    assert [] == requests(host, serving)
    toolstack.detach(host.store, serving.address)
    os.unlink(one.path)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_process_that_was_killed(host, processes, resize, tmp_path, monkeypatch, when):
    """Before the command asks, or while it waits: it says so, and what can be done."""
    address = Address(0, host.DOMID, 51728, "vbd3")
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    where = ("--vdev", "xvdb", "--path", str(tmp_path / "disk.raw"), "--backend", "raw")
    process = processes.start("connect", "guest", *where)
    host.until(lambda: address.backend in host.tree())
    frontend = host.frontend(address)
    frontend.connect()
    process.until("raw rw")
    process.signal(signal.SIGSTOP)
    if when == "before":
        process.kill()
    wait = resize_module.until

    def late(*arguments):
        process.kill()
        return wait(*arguments)

    monkeypatch.setattr(resize_module, "until", late)
    status, out, err = resize("guest", "xvdb", "2M", "--timeout", "0.05")
    assert (ExitStatus.ERROR, "", 1) == (status, out, err.count("\n"))
    meanwhile = "" if when == "before" else ", and no other has taken over within 0.05 s"
    assert f"the process that served xvdb, {process.pid}, has ended{meanwhile}: " in err
    assert "xen-disk connect --adopt 5 xvdb" in err
    assert [] == [path for path in host.tree() if "/resize/" in path]
    frontend.close()
    toolstack.detach(host.store, address)
    record.forget(host.records, address)


def test_a_process_that_does_not_answer(host, resize):
    serving = host.serving(DiscardBackend(size=MIB), "xvdb", start=False)
    serving.attach()  # and nobody looks
    with Record(host.records, serving.address):
        status, out, err = resize("guest", "xvdb", "2M", "--timeout", "0.05")
        assert (ExitStatus.ERROR, "") == (status, out)
        assert "does not answer within 0.05 s" in err
        assert [] == requests(host, serving)
    toolstack.detach(host.store, serving.address)


def test_a_disk_that_goes_while_we_wait(host, resize, monkeypatch):
    serving = host.serving(DiscardBackend(size=MIB), "xvdb", start=False)
    serving.attach()
    wait = resize_module.until

    def late(store, path, done, timeout):
        toolstack.detach(host.store, serving.address)
        return wait(store, path, done, timeout)

    monkeypatch.setattr(resize_module, "until", late)
    with Record(host.records, serving.address):
        status, _, err = resize("guest", "xvdb", "2M")
    assert (ExitStatus.ERROR, True) == (status, "xvdb was disconnected meanwhile" in err)


def test_a_disk_that_goes_before_we_ask(host, resize, monkeypatch):
    """Its directory is not made anew."""
    serving = host.serving(DiscardBackend(size=MIB), "xvdb", start=False)
    serving.attach()
    find = toolstack.find_attached

    def late(store, domid, vdev):
        disk = find(store, domid, vdev)
        toolstack.detach(host.store, serving.address)
        return disk

    monkeypatch.setattr(resize_module.toolstack, "find_attached", late)
    with Record(host.records, serving.address):
        status, _, err = resize("guest", "xvdb", "2M")
    assert (ExitStatus.ERROR, True) == (status, "xvdb was disconnected meanwhile" in err)
    assert serving.address.backend not in host.tree()


class Noticing(DiscardBackend):
    """A disk whose storage somebody else resizes."""

    def __init__(self, size):
        super().__init__(size=size)
        self.storage = size
        self.resize_notice, self.tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def resize(self, size):
        if size is None:
            with contextlib.suppress(BlockingIOError):
                os.read(self.resize_notice, 4096)
            return self.storage
        self.size = size
        return size

    def change(self, size):
        self.storage = size
        os.write(self.tell, b"x")

    def close(self):
        os.close(self.resize_notice)
        os.close(self.tell)


@pytest.fixture
def noticing(host):
    backend = Noticing(MIB)
    yield backend
    host.end_sessions()
    backend.close()


@pytest.mark.parametrize("is_filtered", [False, True])
def test_storage_that_tells_of_another_size_is_followed(host, noticing, serve, caplog, is_filtered):
    backend = noticing
    serving = serve(Filter(backend) if is_filtered else backend)
    frontend = serving.frontend()
    for size in (2 * MIB, 3 * MIB):
        backend.change(size)
        host.until(lambda size=size: frontend.look_again().sectors == size // 512)
    backend.change(3 * MIB)  # something else has changed
    backend.change(MIB)
    host.until(lambda: "less than the disk has" in caplog.text)  # it takes nothing away
    assert 3 * MIB // 512 == frontend.look_again().sectors


def test_storage_that_cannot_tell_its_size_is_served_on(host, noticing, serve, caplog):
    backend = noticing
    serving = serve(backend)
    frontend = serving.frontend()

    def fail(size):
        os.read(backend.resize_notice, 4096)
        raise OSError(errno.EIO, "away")

    backend.resize = fail
    backend.change(2 * MIB)
    host.until(lambda: "not resized" in caplog.text)
    del backend.resize
    backend.change(2 * MIB)
    host.until(lambda: frontend.look_again().sectors == 2 * MIB // 512)
