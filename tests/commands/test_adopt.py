"""``adopt``, whole: one disk as libxl asks for it, from state 1 to state 6."""

from __future__ import annotations

import errno
import os
import signal
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from journal import Listener
from libxl_stub import Libxl, LibxlError

from xen_disk_py.backends import Backend, sharing
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import READ, Ring
from xen_disk_py.cli import main
from xen_disk_py.commands import adopt as adopt_module
from xen_disk_py.commands.backend_arguments import spec_from
from xen_disk_py.commands.environment import Environment
from xen_disk_py.commands.parsing import parse
from xen_disk_py.datapath import claim as claim_module
from xen_disk_py.errors import BackendError, XenUnavailable
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.libxl import attachment
from xen_disk_py.libxl.attachment import AdoptedDevice
from xen_disk_py.recovery import takeover
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record, find
from xen_disk_py.xenbus.device import Device
from xen_disk_py.xenbus.states import Address, State
from xen_disk_py.xenbus.toolstack import Domain
from xen_disk_py.xenbus.vdev import VirtualDevice

ADDRESS = Address(0, 5, 51728, "vbd3")
NEW = b"new" * 4096
DEAD = "999999999"  # no process has such a number


@pytest.fixture
def libxl(host, tmp_path):
    return Libxl(host, tmp_path)


@pytest.fixture
def adopt(host, libxl, caplog):
    """Run ``adopt`` here, as ``serve`` would once the nodes are there, while a script plays."""
    caplog.set_level("INFO")

    def adopt(script, target=None, **changed):
        env = host.environment()
        errors = []
        if target is not None:
            libxl.create(target, **changed)

        def play():
            try:
                script()
            except BaseException as error:
                errors.append(error)
                host.xenstored.remove_domain(host.DOMID)  # let the command end

        thread = threading.Thread(target=play)
        thread.start()
        try:
            status = main(["adopt", "5", "51728"], env)
        finally:
            thread.join()
        if errors:
            raise AssertionError(f"{status!r}: {env.stderr.getvalue()}") from errors[0]
        assert env.stdout.getvalue() == ""
        return status

    return adopt


class Steps:
    """What libxl and the guest do, one after the other."""

    def __init__(self, host, libxl):
        self.host = host
        self.libxl = libxl

    def connect(self, **options):
        self.libxl.wait(ADDRESS, State.INIT_WAIT)
        self.libxl.run_script(ADDRESS, "add")
        frontend = self.host.frontend(ADDRESS, **options)
        frontend.connect()
        return frontend

    def detach(self, frontend):
        self.libxl.ask_to_detach(ADDRESS)
        frontend.disconnect()
        self.libxl.finish_detach(ADDRESS)


@pytest.fixture
def steps(host, libxl):
    return Steps(host, libxl)


def test_a_persistent_disk(adopt, steps, image, host, caplog):
    def script():
        frontend = steps.connect()
        frontend.write(4096, NEW)
        assert NEW == frontend.read(4096, len(NEW))
        frontend.discard(0, 4096)
        found = find(host.records, ADDRESS)
        assert found.alive
        told = {
            key: getattr(found.facts, key) for key in ("domain", "vdev", "backend", "path", "mode")
        }
        assert told == {
            "domain": "guest",
            "vdev": "xvdb",
            "backend": "raw",
            "path": str(image),
            "mode": "rw",
        }
        assert str(os.getpid()) == host.tree()[f"{ADDRESS.backend}/xen-disk-pid"]
        steps.detach(frontend)

    assert adopt(script, image) is ExitStatus.OK
    assert NEW == image.read_bytes()[4096 : 4096 + len(NEW)]
    assert [line.getMessage() for line in caplog.records] == [
        f"connected: 1 MiB raw rw {image}",
        "detached by the toolstack or with the guest",
    ]


def test_copy_on_write(adopt, steps, image):
    def script():
        frontend = steps.connect()
        frontend.write(4096, NEW)
        assert NEW == frontend.read(4096, len(NEW))
        steps.detach(frontend)

    before = image.read_bytes()
    assert adopt(script, f"{image},backend=cow,cow-limit=1M") is ExitStatus.OK
    assert before == image.read_bytes()


@pytest.mark.parametrize("backend", ["raw", "cow", "mmap"])
def test_read_only_comes_from_the_mode(adopt, steps, image, backend):
    def script():
        frontend = steps.connect()
        assert frontend.features.read_only
        assert not frontend.features.discard
        steps.detach(frontend)

    assert adopt(script, f"{image},backend={backend}", mode="r") is ExitStatus.OK


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_discard_is_the_toolstacks_to_allow(adopt, steps, image, enabled):
    def script():
        frontend = steps.connect()
        assert (enabled == "1") is frontend.features.discard
        steps.detach(frontend)

    assert adopt(script, image, discard_enable=enabled) is ExitStatus.OK


def test_an_overlay_keeps_the_changes(adopt, steps, image, tmp_path):
    before = image.read_bytes()
    target = f"{image},overlay={tmp_path}/web.overlay"

    def write():
        frontend = steps.connect()
        frontend.write(4096, NEW)
        steps.detach(frontend)

    def read():
        frontend = steps.connect()
        assert NEW == frontend.read(4096, len(NEW))
        steps.detach(frontend)

    for script in (write, read):
        assert adopt(script, target) is ExitStatus.OK
    assert before == image.read_bytes()


def test_requests_are_retried_with_on_error_hold(adopt, steps, image, monkeypatch, caplog):
    """The storage fails until the log says so; then it works."""

    def fail_at_first(disk, buffers, offset):
        if "to be retried" not in caplog.text:
            raise OSError(errno.EIO, "the storage is gone")
        return os.preadv(disk._fd, buffers, offset)

    monkeypatch.setattr(RawBackend, "read", fail_at_first)
    monkeypatch.setattr(RawBackend, "read_nowait", Backend.read_nowait)
    before = image.read_bytes()

    def script():
        frontend = steps.connect()
        assert before[:4096] == frontend.read(0, 4096)
        steps.detach(frontend)

    assert adopt(script, f"{image},on-error=hold") is ExitStatus.OK
    assert "the storage is gone" in caplog.text


def test_options_reach_the_guest(adopt, steps, image):
    def script():
        frontend = steps.connect(max_segments=100)
        assert 32 == frontend.features.max_indirect_segments
        steps.detach(frontend)

    assert adopt(script, f"{image},indirect-segments=32") is ExitStatus.OK


def test_it_connects_only_after_the_script(adopt, steps, host, libxl, image, monkeypatch):
    """libxl would miss a state 2 that is gone before it looks."""
    looked_at = []
    update = AdoptedDevice.update

    def watched(device):
        frontend_state = host.tree().get(f"{ADDRESS.frontend}/state")
        update(device)
        looked_at.append((frontend_state, device.state))

    monkeypatch.setattr(AdoptedDevice, "update", watched)

    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        frontend = host.frontend(ADDRESS)
        connecting = threading.Thread(target=frontend.connect)
        connecting.start()
        host.until(lambda: ("3", State.INIT_WAIT) in looked_at)
        libxl.wait(ADDRESS, State.INIT_WAIT)
        libxl.run_script(ADDRESS, "add")
        connecting.join()
        assert frontend.backend_state is State.CONNECTED
        steps.detach(frontend)

    assert adopt(script, image) is ExitStatus.OK


@pytest.fixture
def held(monkeypatch):
    """Have another host hold the lock of each disk that is opened, until ``free`` is set."""

    class Held:
        free, asked = threading.Event(), threading.Event()
        arrives = None

    opened = RawBackend.__init__

    def init(self, *args, **options):
        Held.arrives = sharing.is_arriving()
        opened(self, *args, **options)

    def claim(self):
        assert self.size
        Held.asked.set()
        if not Held.free.is_set():
            raise BackendError("another client has the lock")

    monkeypatch.setattr(RawBackend, "__init__", init)
    monkeypatch.setattr(RawBackend, "claim", claim)
    monkeypatch.setattr(claim_module, "_PATIENCE", 0)
    return Held


@pytest.fixture
def incoming(host):
    """Call the guest what ``xl migrate-receive`` calls it."""
    name = f"/local/domain/{host.DOMID}/name"
    before = host.store.read(name)
    host.store.write(name, f"{before}--incoming")
    yield
    if host.store.exists(name):
        host.store.write(name, before)


@pytest.mark.parametrize("died", [False, True])
def test_a_guest_that_comes_from_another_host_waits_for_its_disk(
    adopt, steps, host, libxl, orphan, image, held, caplog, request, died
):
    """Also under the successor of a process that has died as it waited: the name is right then."""
    if died:
        orphan(image)
    else:
        request.getfixturevalue("incoming")

    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        libxl.run_script(ADDRESS, "add")
        assert not held.asked.is_set()
        frontend = host.frontend(ADDRESS)
        connecting = threading.Thread(target=frontend.connect)
        connecting.start()
        host.until(lambda: "the guest waits for its disk: another client" in caplog.text)
        assert "2" == host.tree()[f"{ADDRESS.backend}/state"]
        assert host.hypervisor.mapped_pages == 0
        held.free.set()
        connecting.join()
        frontend.write(4096, NEW)
        steps.detach(frontend)

    assert adopt(script, None if died else image) is ExitStatus.OK
    assert held.arrives
    assert 1 == caplog.text.count("the guest waits for its disk")
    assert "the guest has its disk now" in caplog.text
    assert NEW == image.read_bytes()[4096 : 4096 + len(NEW)]


@pytest.mark.parametrize("end", ["detached", "destroyed"])
def test_a_guest_that_never_gets_its_disk(adopt, host, libxl, image, held, incoming, end):
    """It may be taken away again, though the other host has it, and nobody asks any more."""

    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        libxl.run_script(ADDRESS, "add")
        host.store.write(f"{ADDRESS.frontend}/state", "3")
        assert held.asked.wait(host.PATIENCE)
        if end == "destroyed":
            host.xenstored.remove_domain(host.DOMID)
            libxl.wait(ADDRESS, State.CLOSED)
            libxl.remove(ADDRESS)
        else:
            libxl.ask_to_detach(ADDRESS)
            host.store.write(f"{ADDRESS.frontend}/state", "6")
            libxl.finish_detach(ADDRESS)

    assert adopt(script, image) is ExitStatus.OK


def test_no_other_guest_waits(adopt, steps, image, held):
    """It is refused if somebody has the disk; here nobody has."""
    assert adopt(lambda: steps.detach(steps.connect()), image) is ExitStatus.OK
    assert (False, False) == (held.arrives, held.asked.is_set())


def test_detached_before_the_script_ran(adopt, libxl, image):
    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        libxl.detach(ADDRESS)

    assert adopt(script, image) is ExitStatus.OK


@pytest.mark.parametrize("ran", [False, True])
def test_the_guest_is_destroyed(adopt, host, libxl, steps, image, ran):
    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        if ran:
            steps.connect()
        host.xenstored.remove_domain(host.DOMID)
        libxl.wait(ADDRESS, State.CLOSED)
        libxl.remove(ADDRESS)

    assert adopt(script, image) is ExitStatus.OK


def test_a_signal_unplugs_and_leaves_the_nodes_to_libxl(adopt, host, libxl, steps, image, caplog):
    def script():
        frontend = steps.connect()
        os.kill(os.getpid(), signal.SIGTERM)
        host.until(lambda: frontend.backend_state is State.CLOSING)
        frontend.disconnect()
        libxl.wait(ADDRESS, State.CLOSED)

    assert adopt(script, image) is ExitStatus.OK
    assert "unplugged" in caplog.text
    assert str(os.getpid()) == host.tree()[f"{ADDRESS.backend}/xen-disk-pid"]
    libxl.detach(ADDRESS)


def test_a_hangup_resizes(adopt, steps, host, image):
    """There is never a terminal whose end it could tell."""

    def script():
        frontend = steps.connect()
        os.truncate(image, 2 << 20)
        os.kill(os.getpid(), signal.SIGHUP)
        host.until(lambda: host.tree()[f"{ADDRESS.backend}/sectors"] == "4096")
        assert 2 << 20 == find(host.records, ADDRESS).facts.size
        steps.detach(frontend)

    assert adopt(script, image) is ExitStatus.OK


def test_a_driver_that_comes_back(adopt, steps, host, libxl, image):
    def script():
        frontend = steps.connect()
        frontend.disconnect()
        libxl.wait(ADDRESS, State.CLOSED)
        frontend = host.frontend(ADDRESS)
        host.store.write(f"{ADDRESS.frontend}/state", "1")
        frontend.connect()
        assert image.read_bytes()[:4096] == frontend.read(0, 4096)
        steps.detach(frontend)

    assert adopt(script, image) is ExitStatus.OK


@pytest.mark.parametrize(
    ("target", "changed", "said"),
    [
        ("/nowhere/x.raw", {}, "/nowhere/x.raw: "),
        ("/", {}, "/: a directory"),
        ("disk.raw", {}, "give an absolute path"),
        ("IMAGE,colour=blue", {}, "there is no option colour="),
        ("IMAGE,backend=magnetic", {}, "there is no backend magnetic"),
        ("IMAGE,cow-limit=1G", {}, "the raw backend takes no --cow-limit"),
        ("IMAGE,cow-limit=much", {}, "'much' is not a size"),
        ("IMAGE,option.path=/x", {}, "use --path for that"),
        ("IMAGE,indirect-segments=-1", {}, "'-1' is not a number"),
        ("IMAGE", {"params": "qcow:/x"}, "'qcow' images are not served"),
        ("IMAGE", {"params": "vhd:/nowhere/x.vhd"}, "no such file"),
        ("IMAGE", {"device_type": "cdrom"}, "a CD-ROM is not served"),
        ("/now here/\x7f.raw", {}, "/now here/?.raw"),
        ("/" + "long/" * 500, {}, "/long/long/"),
    ],
)
def test_what_cannot_be_had_is_told_by_xl(adopt, libxl, image, target, changed, said):
    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        with pytest.raises(LibxlError) as caught:
            libxl.run_script(ADDRESS, "add")
        assert said in str(caught.value)
        assert "error" == libxl.store.read(f"{ADDRESS.backend}/hotplug-status")
        libxl.remove(ADDRESS)

    target = target.replace("IMAGE", str(image))
    assert adopt(script, target, **changed) is ExitStatus.OK


def test_a_disk_that_takes_too_long_to_open(adopt, host, libxl, image, monkeypatch):
    """``xl`` says why it has none, instead of nothing but that it has waited in vain."""
    told = threading.Event()
    opened = RawBackend.__init__

    def init(self, *args, **options):
        assert told.wait(host.PATIENCE)
        opened(self, *args, **options)

    monkeypatch.setattr(RawBackend, "__init__", init)
    monkeypatch.setattr("xen_disk_py.commands.adopt._PATIENCE", 0.1)

    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        with pytest.raises(LibxlError, match=r"disk.raw is not open after 0\.1 s: .*; try again"):
            libxl.run_script(ADDRESS, "add")
        told.set()
        libxl.remove(ADDRESS)

    adopt(script, image)  # libxl has the nodes away before or after it is open


@pytest.mark.parametrize("died", [False, True])
def test_another_disk_that_is_attached_meanwhile_is_not_what_hung(
    adopt, host, libxl, orphan, image, monkeypatch, tmp_path, caplog, died
):
    """It is refused while the first one hangs, and a process of its own serves it after that."""
    told = threading.Event()
    opened = RawBackend.__init__
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(1 << 20))

    def init(self, *args, **options):
        entered.set()
        assert told.wait(host.PATIENCE)
        opened(self, *args, **options)

    if died:
        orphan(image)
    entered = threading.Event()
    monkeypatch.setattr(RawBackend, "__init__", init)
    monkeypatch.setattr("xen_disk_py.commands.adopt._PATIENCE", 0.1)

    def script():
        if not died:
            libxl.wait(ADDRESS, State.INIT_WAIT)
        assert entered.wait(host.PATIENCE)
        libxl.remove(ADDRESS)
        for _ in range(2):
            libxl.create(other)
            libxl.wait(ADDRESS, State.INIT_WAIT)
            with pytest.raises(LibxlError, match=r"disk\.raw is not open after"):
                libxl.run_script(ADDRESS, "add")
            libxl.remove(ADDRESS)
        monkeypatch.setattr("xen_disk_py.libxl.attachment.refuse", lambda *_: False)
        libxl.create(other)
        told.set()

    assert adopt(script, None if died else image) is ExitStatus.OK
    assert "the toolstack has" in caplog.text
    keys = host.tree()
    assert "1" == keys[f"{ADDRESS.backend}/state"]
    assert f"{ADDRESS.backend}/xen-disk-pid" not in keys
    assert find(host.records, ADDRESS) is None
    libxl.remove(ADDRESS)


def test_a_disk_is_served_though_nobody_can_tell_whether_it_hangs(
    adopt, image, steps, monkeypatch, caplog
):
    """A task too many: ``pids.max``."""

    class Refused(threading.Thread):
        def start(self):
            if self.name == "late":
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(adopt_module.threading, "Thread", Refused)
    assert adopt(lambda: steps.detach(steps.connect()), image) is ExitStatus.OK
    assert "if its storage hangs, nobody will be told: can't start new thread" in caplog.text


def test_an_image_in_use(adopt, libxl, image):
    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        with pytest.raises(LibxlError, match="in use by process"):
            libxl.run_script(ADDRESS, "add")
        libxl.remove(ADDRESS)

    with closing(RawBackend(str(image))):
        assert adopt(script, image) is ExitStatus.OK


def test_no_hypervisor(adopt, host, libxl, image, monkeypatch):
    def missing(env):
        raise XenUnavailable("no /dev/xen/gntdev: modprobe xen-gntdev")

    monkeypatch.setattr(Environment, "hypervisor", missing)

    def script():
        libxl.wait(ADDRESS, State.INIT_WAIT)
        with pytest.raises(LibxlError, match="modprobe xen-gntdev"):
            libxl.run_script(ADDRESS, "add")
        libxl.remove(ADDRESS)

    assert adopt(script, image) is ExitStatus.OK


def test_a_process_that_still_ends(adopt, host, libxl, steps, image):
    """libxl may attach a device anew before the process that served it has gone."""
    old = Record(host.records, ADDRESS)

    def script():
        host.until(lambda: find(host.records, ADDRESS).alive)
        old.close()
        steps.detach(steps.connect())

    assert adopt(script, image) is ExitStatus.OK


def test_a_device_that_another_process_serves(adopt, host, libxl, image, monkeypatch):
    """Two supervisors saw it at once; the quicker one's disk is not disturbed."""
    exists = host.store.exists

    with Record(host.records, ADDRESS):

        def script():
            host.until(lambda: exists(f"{ADDRESS.backend}/state"))
            host.store.write(f"{ADDRESS.backend}/xen-disk-pid", "1")

        libxl.create(image)
        assert adopt(script) is ExitStatus.OK
        assert "1" == host.store.read(f"{ADDRESS.backend}/state")
        assert not exists(f"{ADDRESS.backend}/hotplug-error")
    libxl.remove(ADDRESS)


def test_a_process_that_died(adopt, host, libxl, image):
    """Its guest is told that what it waits for has failed, and libxl that the disk is closed."""
    serving = host.serving(host.memory(), "xvdb", start=False)
    libxl.create(image, state="4", xen_disk_pid="123456789", hotplug_status="connected")
    for key, value in serving.device.keys().items():
        if key != "state":
            host.store.write(f"{ADDRESS.backend}/{key}", value)
    os.close(Record(host.records, ADDRESS)._fd)  # as when a process is killed

    def script():
        libxl.wait(ADDRESS, State.CLOSED)
        libxl.finish_detach(ADDRESS)

    libxl.ask_to_detach(ADDRESS)
    assert adopt(script) is ExitStatus.OK
    assert not os.path.exists(f"{host.records}/5-51728")


@pytest.mark.parametrize("readable", [True, False])
def test_the_responder_knows_what_the_process_had_noted(
    adopt, host, libxl, image, monkeypatch, readable
):
    seen = []

    @contextmanager
    def stand_in(store, open_hypervisor, address, journals):
        seen.append([journal.recall(Ring((8,), 17), 112) for journal in journals])
        assert find(host.records, ADDRESS).alive
        yield

    monkeypatch.setattr("xen_disk_py.commands.adopt.stand_in", stand_in)
    libxl.create(image, state="4", xen_disk_pid="123456789", hotplug_status="connected")
    left = Record(host.records, ADDRESS, 2)
    if readable:
        left.describe(Facts())
    left.journals[1].begin(Ring((8,), 17), 112)
    left.journals[1].note(7, [], [b"x" * 112])
    left.leave()
    libxl.ask_to_detach(ADDRESS)
    host.store.write(f"{ADDRESS.frontend}/state", "6")

    def script():
        libxl.wait(ADDRESS, State.CLOSED)
        libxl.finish_detach(ADDRESS)

    assert adopt(script) is ExitStatus.OK
    assert [[None, (7, [], [b"x" * 112])] if readable else [None]] == seen
    assert not os.path.exists(f"{host.records}/5-51728")


def test_each_queue_has_a_journal(adopt, steps, image, host):
    def script():
        frontend = steps.connect(queues=2)
        for _ in range(4):
            frontend.write(4096, NEW)
            assert NEW == frontend.read(4096, len(NEW))
        steps.detach(frontend)

    assert adopt(script, f"{image},queues=2") is ExitStatus.OK


@pytest.fixture
def orphan(host, libxl):
    """Make what a process leaves that dies before the guest has connected."""

    def orphan(target, **changed):
        keys = {"xen_disk_pid": DEAD, "hotplug_status": "connected", **changed}
        libxl.create(target, state="2", **keys)
        config = attachment.read_config(host.store, ADDRESS)
        options = parse(["connect", "5", *config.arguments])
        spec = spec_from(options)
        disk = spec.open_disk()
        vdev = VirtualDevice(ADDRESS.devid, "xvdb")
        with Record(host.records, ADDRESS, options.queues) as one:
            one.describe(Facts.about(spec, Domain(5, "guest", ""), vdev, disk))
            one.leave()
        for name, value in Device(host.store, host.hypervisor, ADDRESS, disk).keys().items():
            host.store.write(f"{ADDRESS.backend}/{name}", value)
        disk.close()

    return orphan


def test_a_disk_that_takes_too_long_to_open_is_taken_over_late(
    adopt, steps, host, orphan, image, monkeypatch, caplog
):
    orphan(image)
    opened = RawBackend.__init__

    def init(self, *args, **options):
        host.until(lambda: f"{image} is not open after 0.1 s" in caplog.text)
        opened(self, *args, **options)

    monkeypatch.setattr(RawBackend, "__init__", init)
    monkeypatch.setattr("xen_disk_py.commands.signals.ANSWER", 0.1)
    assert adopt(lambda: steps.detach(steps.connect())) is ExitStatus.OK


def test_it_takes_over_from_a_process_that_died(adopt, steps, host, orphan, image, caplog):
    """Its guest is as it was; what it is to serve the nodes say, as they did then."""
    orphan(image, discard_enable="0")

    def script():
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        frontend.write(4096, NEW)
        with pytest.raises(OSError, match="-2"):
            frontend.discard(0, 4096)
        found = find(host.records, ADDRESS)
        assert (True, os.getpid()) == (found.alive, found.facts.pid)
        assert str(os.getpid()) == host.tree()[f"{ADDRESS.backend}/xen-disk-pid"]
        steps.detach(frontend)

    assert adopt(script) is ExitStatus.OK
    assert NEW == image.read_bytes()[4096 : 4096 + len(NEW)]
    assert "detached by the toolstack" in caplog.text
    assert [] == os.listdir(host.records)


def test_the_journal_has_each_turn_of_its_life(adopt, steps, host, orphan, image):
    """Also of a disk that libxl has made, and of one that another process served."""
    journal = Listener(host.journal)
    entries = []

    def attach():
        detach(steps.connect())

    def take_over():
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        detach(frontend)

    def detach(frontend):
        # Told by then: a guest that leaves at once may never be seen connected.
        entries.extend(journal.next() for _ in range(2))
        steps.detach(frontend)

    try:
        assert adopt(attach, image) is ExitStatus.OK
        entries.append(journal.next())
        orphan(image, discard_enable="0")
        assert adopt(take_over) is ExitStatus.OK
        entries.append(journal.next())
        assert journal.is_empty
    finally:
        journal.close()
    kinds = [entry["XEN_DISK_EVENT"] for entry in entries]
    assert [b"attached", b"connected", b"detached"] == kinds[:3]
    assert [b"taken-over", b"connected", b"detached"] == kinds[3:]
    assert {(b"guest", b"xvdb", str(image).encode())} == {
        (entry["XEN_DISK_GUEST"], entry["XEN_DISK_VDEV"], entry["XEN_DISK_PATH"])
        for entry in entries
    }
    assert {b"6"} == {entry["PRIORITY"] for entry in entries if b"taken" not in entry["MESSAGE"]}


def test_filters_of_the_line_are_set_while_the_guest_uses_the_disk(adopt, steps, host, image):
    def script():
        frontend = steps.connect()
        env = host.environment()
        argv = ["filter", "5", "xvdb", "set", "delay", "read=1us"]
        assert ExitStatus.OK is main(argv, env), env.stderr.getvalue()
        assert "1 delay read=1us write=2us" in env.stdout.getvalue()
        frontend.read(0, 4096)
        assert ("delay:read=1us,write=2us",) == find(host.records, ADDRESS).facts.spec.filters
        steps.detach(frontend)

    assert adopt(script, f"{image},filter=delay:read=0;write=2us") is ExitStatus.OK


def test_filters_are_taken_over_as_they_were_set_last(adopt, steps, host, orphan, image):
    orphan(f"{image},filter=protect:range=0-4K")
    with closing(Record.adopt(host.records, ADDRESS)) as left:
        spec = left.facts.spec._replace(filters=("protect:range=8K-12K",))
        left.update(disk=spec.plain())
        left.leave()

    def script():
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        frontend.write(0, NEW[:4096])
        with pytest.raises(OSError, match="-1"):
            frontend.write(8192, NEW[:4096])
        steps.detach(frontend)

    assert adopt(script) is ExitStatus.OK


def test_libxl_detaches_while_nobody_serves(adopt, host, libxl, orphan, image):
    """The guest can put what it has not written yet into the disk."""
    orphan(image)
    libxl.ask_to_detach(ADDRESS)

    def script():
        libxl.finish_detach(ADDRESS)

    assert adopt(script) is ExitStatus.OK
    assert [] == os.listdir(host.records)


def test_it_continues_only_after_the_script(adopt, steps, host, libxl, orphan, image):
    """The process died before libxl had run it."""
    orphan(image, hotplug_status="")
    host.store.remove(f"{ADDRESS.backend}/hotplug-status")

    def script():
        steps.detach(steps.connect())

    assert adopt(script) is ExitStatus.OK


def test_the_guest_is_destroyed_while_nobody_serves(adopt, host, libxl, orphan, image):
    orphan(image)
    host.xenstored.remove_domain(host.DOMID)
    assert adopt(lambda: libxl.wait(ADDRESS, State.CLOSED)) is ExitStatus.OK
    libxl.remove(ADDRESS)
    assert [] == os.listdir(host.records)


def swap(image):
    image.with_name("other").write_bytes(image.read_bytes())
    image.with_name("other").replace(image)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (os.remove, ExitStatus.CRASHED, "is not there: put it back"),
        (lambda image: os.truncate(image, 4096), ExitStatus.CRASHED, "make it as long again"),
        (swap, ExitStatus.ERROR, "take the disk away with: xl block-detach 5 xvdb"),
    ],
)
def test_what_it_cannot_take_over(adopt, host, libxl, orphan, image, caplog, change, status, said):
    """What may pass is for another try. It stays as it is; or is given up when libxl detaches."""
    orphan(image)
    change(image)
    before, kept = host.tree(), Path(f"{host.records}/5-51728").read_bytes()
    assert adopt(lambda: None) is status
    assert said in caplog.text
    assert (before, kept) == (host.tree(), Path(f"{host.records}/5-51728").read_bytes())
    libxl.ask_to_detach(ADDRESS)
    assert adopt(lambda: libxl.finish_detach(ADDRESS)) is ExitStatus.OK
    assert [] == os.listdir(host.records)
    caplog.clear()  # what is logged refers to everything


@pytest.mark.parametrize("broken", ["queue", "loop"])
def test_an_error_of_our_own(adopt, host, libxl, steps, image, monkeypatch, broken):
    """It is left to another process; here, nobody ends, and the disk ends as it did before."""
    crashed = []
    monkeypatch.setattr(takeover, "crash", crashed.append)

    def script():
        frontend = steps.connect()
        if broken == "queue":
            monkeypatch.setattr("xen_disk_py.datapath.queue.encode_response", lambda *what: 1 / 0)
            frontend.submit(READ, 0, length=512)
            frontend.kick()
            host.until(lambda: crashed)
            monkeypatch.undo()
        libxl.ask_to_detach(ADDRESS)
        if broken == "loop":  # asked once more, at the latest when the frontend has closed
            monkeypatch.setattr("xen_disk_py.xenbus.device.react", lambda *what: 1 / 0)
        host.store.write(f"{ADDRESS.frontend}/state", "6")
        libxl.finish_detach(ADDRESS)

    adopt(script, image)
    assert [ZeroDivisionError] == [type(error) for error in crashed]


@pytest.mark.parametrize("state", ["2", "4", "6"])
def test_a_disk_that_is_served_is_left_alone(adopt, host, libxl, image, state):
    """What two supervisors start at once; the later one must not touch the ring."""
    libxl.create(image, state=state, xen_disk_pid="1", hotplug_status="connected")
    before = host.tree()
    assert adopt(lambda: None) is ExitStatus.OK
    assert before == host.tree()
    libxl.remove(ADDRESS)


def test_a_closing_disk_whose_process_lives_is_left_alone(adopt, host, libxl, image):
    libxl.create(image, state="5", xen_disk_pid="1", hotplug_status="connected")
    before = host.tree()
    with Record(host.records, ADDRESS):
        assert adopt(lambda: None) is ExitStatus.ERROR
    assert before == host.tree()
    libxl.remove(ADDRESS)


def test_it_is_not_for_people(capsys, host):
    assert main(["--help"], host.environment()) is ExitStatus.OK
    shown = capsys.readouterr().out
    assert "serve" in shown
    assert "adopt" not in shown
