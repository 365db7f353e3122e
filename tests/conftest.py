"""A simulated host with one guest, and a check of what a test leaves behind."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import sysconfig
import textwrap
import threading
import time
from pathlib import Path

import long_run
import pytest
from processes import Processes
from rings import responses_of

import xen_disk_py
from xen_disk_py.backends import Backend
from xen_disk_py.backends.queues import here
from xen_disk_py.blkif import X86_64, Ring
from xen_disk_py.cli import STACK
from xen_disk_py.commands.environment import Environment
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import PERSISTENT_LIMIT, Grants
from xen_disk_py.datapath.queue import Options, Queue
from xen_disk_py.errors import XenDiskError
from xen_disk_py.recovery import control, survey
from xen_disk_py.ring import FrontRing
from xen_disk_py.session import Interrupts, Observer, Session
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.device import Device
from xen_disk_py.xenbus.states import Address
from xen_disk_py.xenbus.vdev import parse
from xen_disk_py.xenbus.xenstore import Store

# Where several Pythons run the tests, the first says how many need Xen.
OURS, PYTHONS = long_run.sharing()
collect_ignore = ["xen"] if OURS else []

with contextlib.suppress(ImportError):  # dom0 of the lab has none
    from hypothesis import HealthCheck, settings

    # A busy machine may stop any example for seconds, and the ordinary run is the same each time:
    # of one Python all examples by the name of the property, of several each by its own seed.
    settings.register_profile(
        "ordinary",
        deadline=None,
        database=None,
        derandomize=not long_run.LONG and PYTHONS == 1,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("ordinary")
    from hypothesis.internal.conjecture import providers  # last: an old one has none

    if not long_run.LONG and hasattr(providers, "_local_constants"):
        # Else it parses all modules of ours, for 3 s, to draw numbers that stand in the tests.
        nothing_local = providers._local_constants
        providers._get_local_constants = lambda: nothing_local

# Whoever started us in the background may have had these ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

threading.stack_size(STACK)  # as the program does

# What a test starts finds this package and the tests' modules wherever it runs, installed or not.
TESTS = Path(__file__).parent
PLACES = str(Path(xen_disk_py.__file__).parents[1]), str(TESTS), os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PLACES))

# A guest, a queue and a test are threads of one process that wait for each other: with the usual
# 5 ms whoever polls keeps the rest waiting, and the tests take a sixth longer.
sys.setswitchinterval(0.5e-3)

# Python 3.13 without the GIL never frees a class, nor what the methods of one that was made in a
# function refer to: a record's mapping, say.
FREES_CLASSES = not sysconfig.get_config_var("Py_GIL_DISABLED") or sys.version_info >= (3, 14)

DOMID = 5
PATIENCE = 30.0  # seconds for what must happen to happen


class Memory(Backend):
    """A disk in memory that notes its calls as (operation, offset, length)."""

    def __init__(self, size=1 << 20, **attributes):
        self.data = bytearray(size)
        self.size = size
        self.calls = []
        self.closed = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def read(self, buffers, offset):
        self.calls.append(("read", offset, sum(map(len, buffers))))
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, buffers, offset):
        self.calls.append(("write", offset, sum(map(len, buffers))))
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self):
        self.calls.append(("flush", 0, 0))

    def discard(self, offset, length):
        self.calls.append(("discard", offset, length))
        self.data[offset : offset + length] = bytes(length)

    def close(self):
        self.closed += 1


class Line:
    """A ring with the queue that serves it; its requests are laid out by hand."""

    def __init__(self, host, disk, abi, order, persistent, options, number):
        self.guest = host.guest
        self.abi = abi
        self.disk = disk
        self.failures = []
        self.pages = host.guest.share_pages(0, 1 << order, writable=True)
        self.ring = FrontRing(self.pages.view, abi.slot_size, host.guest.fence)
        self.channel = host.guest.bind_unbound(0)
        self.queue = Queue(
            host.hypervisor,
            DOMID,
            Ring(tuple(self.pages.refs), self.channel.port),
            abi,
            disk,
            options=options,
            persistent=persistent,
            number=number,
            statistics=disk.statistics.of_queue(number),
            on_failure=self.failures.append,
        )
        self.queue.start()

    def put(self, *requests):
        for request in requests:
            slot = request if isinstance(request, bytes) else self.abi.encode(request)
            self.ring.put(slot.ljust(self.abi.slot_size, b"\0"))

    def kick(self):
        if self.ring.push():
            self.channel.notify()

    def responses(self, count):
        """Wait for that many responses; the next has to come within ``PATIENCE``."""
        return responses_of(self, count)

    def ask(self, *requests):
        """Put requests and return their responses; a single one for a single request."""
        self.put(*requests)
        self.kick()
        answers = self.responses(len(requests))
        return answers[0] if len(answers) == 1 else answers

    def close(self):
        assert self.queue.stop(PATIENCE)
        self.ring.close()
        self.channel.close()
        self.pages.close()


class Watching(Observer):
    """Passes on what a session says; a test may put something else in place of any of it."""

    def __init__(self, serving):
        self._serving = serving

    def attach(self):
        self._serving.attach()

    def connected(self):
        self._serving.connected.set()

    def unplugging(self):
        self._serving.unplugging.set()


class Serving:
    """A disk served by a session in a thread of its own."""

    def __init__(self, host, backend, vdev, patience, timeout, options):
        self.host = host
        self.backend = backend
        self.vdev = parse(vdev)
        self.address = Address(0, DOMID, self.vdev.number, "vbd3")
        self.store = host.open_store(timeout=timeout)
        self.disk = Disk(backend)
        self.interrupts = Interrupts()
        self.device = Device(
            self.store,
            host.hypervisor,
            self.address,
            self.disk,
            on_failure=self.interrupts.fail,
            **options,
        )
        self.session = Session(
            self.store, self.device, self.vdev, self.interrupts, patience=patience
        )
        self.connected = threading.Event()
        self.unplugging = threading.Event()
        self.observer = Watching(self)
        self.outcome = None
        self.error = None
        self.thread = threading.Thread(target=self._run, name="session")

    def start(self):
        self.thread.start()
        self.host.until(lambda: self.device.address.backend in self.host.tree())
        return self

    def _run(self):
        try:
            self.outcome = self.session.run(self.observer)
        except BaseException as error:  # for wait() to raise
            self.error = error

    def attach(self):
        toolstack.attach(
            self.store,
            self.address,
            self.vdev,
            backend_keys=self.device.keys(),
            params="memory:",
            read_only=self.disk.read_only,
            pid=os.getpid(),
        )

    def frontend(self, **options):
        """Return a connected frontend."""
        frontend = self.host.frontend(self.address, **options)
        frontend.connect()
        return frontend

    def unplug(self):
        self.interrupts.asked = True
        self.interrupts.wake()

    def wait(self, seconds=PATIENCE):
        """Wait for the session's end, and return its outcome or raise its error."""
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the session does not end"
        if self.error is not None:
            raise self.error
        return self.outcome

    def close(self):
        if self.thread.ident is not None:
            self.thread.join(PATIENCE)
        os.close(self.interrupts._read)
        os.close(self.interrupts._write)
        assert not self.thread.is_alive(), "the session does not end"


class Host:
    """A xenstored, a machine with a guest, and both sides' view of it."""

    DOMID = DOMID
    PATIENCE = PATIENCE

    def __init__(self, stack, records):
        self._stack = stack
        self._servings = []
        self._frontends = []
        self._shared = []
        self.records = str(records)
        self.journal = f"{records}.journal"
        self.xenstored = stack.enter_context(SimulatedXenstored())
        self.xenstored.add_domain(DOMID, "guest", f"00000000-0000-0000-0000-{DOMID:012}")
        self.machine = stack.enter_context(SimulatedMachine(domid=DOMID))
        self.hypervisor = stack.enter_context(SimulatedHypervisor(self.machine))
        self.guest = stack.enter_context(SimulatedGuest(self.machine))
        self.store = self.open_store()
        # What a toolstack makes and every domain has; without it our own nodes would be the
        # only ones, and their parents go with them.
        for path in (f"/libxl/{DOMID}/type", f"/local/domain/{DOMID}/device/suspend"):
            self.store.write(path, "")

    def open_store(self, domid=0, timeout=PATIENCE):
        """Open a store, closed at the end; each thread needs its own."""
        path = self.xenstored.socket_path(domid)
        return self._stack.enter_context(Store.open(path, timeout))

    def tree(self):
        """Return what is in xenstore, whatever it answers just now."""
        return {path: node.value.decode() for path, node in list(self.xenstored.nodes.items())}

    def facts(self):
        """What the records say."""
        return [seen.facts for seen in survey.look(self.records)]

    def memory(self, size=1 << 20, **attributes):
        return Memory(size, **attributes)

    def line(
        self,
        backend,
        abi=X86_64,
        *,
        order=0,
        persistent=False,
        grants=Grants.AUTO,
        limit=PERSISTENT_LIMIT,
        max_indirect_segments=256,
        number=0,
        latency=True,
    ):
        """Serve a backend, or a disk that others serve too, on a ring, without xenstore."""
        disk = backend if isinstance(backend, Disk) else Disk(backend)
        options = Options(max_indirect_segments, grants, limit, latency)
        line = Line(self, disk, abi, order, persistent, options, number)
        self._stack.callback(line.close)
        return line

    def share(self, count=1, *, writable=True):
        """Grant pages of the guest, to be taken back at the end."""
        pages = self.guest.share_pages(0, count, writable=writable)
        self._shared.append(pages)
        return pages

    def serving(
        self,
        backend,
        vdev="xvda",
        *,
        patience=PATIENCE,
        timeout=PATIENCE,
        start=True,
        **options,
    ):
        """Attach a backend and serve it until the end of the test."""
        serving = Serving(self, backend, vdev, patience, timeout, options)
        self._stack.callback(serving.close)
        self._servings.append(serving)
        return serving.start() if start else serving

    def frontend(self, address, **options):
        """Return a frontend that is not connected yet; closed at the end."""
        options.setdefault("timeout", PATIENCE)
        frontend = Frontend(self.open_store(DOMID), self.guest, address.frontend, **options)
        self._frontends.append(frontend)
        return frontend

    def environment(self, stderr=None):
        """Return what a command gets to see of this host."""
        return Environment(
            stdout=io.StringIO(),
            stderr=stderr if stderr is not None else io.StringIO(),
            open_store=lambda: Store.open(self.xenstored.socket_path(0)),
            open_hypervisor=lambda: self.hypervisor,
            xen_version=lambda: (4, 20),
            record_directory=self.records,
            journal=self.journal,
            stdin=None,
        )

    def end_sessions(self):
        """Have the guest release all disks, then wait for their sessions."""
        for serving in self._servings:
            serving.unplug()
        for frontend in self._frontends:
            if frontend.max_bytes:
                with contextlib.suppress(XenDiskError):  # a test may have broken everything
                    frontend.disconnect()
        for serving in self._servings:
            if serving.thread.ident is not None:
                serving.thread.join(PATIENCE)
        for frontend in self._frontends:
            frontend.close()

    @staticmethod
    def until(condition, seconds=PATIENCE, what="the condition"):
        """Wait until it holds."""
        deadline = time.monotonic() + seconds
        pause = 0.001
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come true in {seconds} s"
            time.sleep(pause)
            pause = min(1.2 * pause, 0.02)  # a condition may take a while to ask


def _descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is closed already
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@pytest.fixture(autouse=True)
def nothing_outlives_its_test():
    """Have threads, files and sockets end in the test that left them, which then has the blame.

    What is left to the collector of garbage it finds during any later test, whose own the warning
    is then: "unclosed socket".
    """
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    if threading.active_count() > threads:
        Host.until(lambda: threading.active_count() <= threads, what="the end of all threads")
    if len(os.listdir("/proc/self/fd")) > descriptors:
        gc.collect()
    number, here.number = here.number, -1
    assert -1 == number, "the test's own thread passes for a queue's"


@pytest.fixture(autouse=True, scope="session")
def patience():
    """A busy machine may stop any thread for seconds: what a test waits for is waited for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "commands.adopt._PATIENCE",
            "commands.disconnect._FORCE_PATIENCE",
            "datapath.disk.SETTLING",
            "session._TOOLSTACK_PATIENCE",
            "simulated.xenstored._PATIENCE",
            "recovery.orphan._PATIENCE",
            "recovery.orphans._PATIENCE",
            "recovery.control._CLIENT",
            "recovery.control._GRACE",
            "trace.sink.PATIENCE",
            "backends.nbd.qemu._PATIENCE",
            "host.systemd._PATIENCE",
            "xenbus.device._FINISHING",
        ):
            patch.setattr(f"xen_disk_py.{name}", PATIENCE)
        patch.setattr(Store.open.__func__, "__defaults__", (None, PATIENCE))
        patch.setattr(Device.force, "__defaults__", (PATIENCE,))
        patch.setitem(control.ask.__kwdefaults__, "timeout", PATIENCE)
        yield


@pytest.fixture
def switch_often():
    """Have threads that race take turns all the time: more orders of things, in less time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(50e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def processes(host, tmp_path):
    """Start programs of ours as real processes; see there."""
    processes = Processes(host, tmp_path)
    yield processes
    processes.close()


@pytest.fixture
def queue_threads():
    """Return a function that tells the threads of queues that this test has started."""
    before = set(threading.enumerate())
    return lambda: [
        thread for thread in set(threading.enumerate()) - before if thread.name == "queue"
    ]


@pytest.fixture
def host(tmp_path):
    """A simulated host. At the end nothing is left of what was done on it."""
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    with contextlib.ExitStack() as stack:
        host = Host(stack, tmp_path / "records")
        nodes = host.tree()
        inner = stack.enter_context(contextlib.ExitStack())
        host._stack = inner
        yield host
        host.end_sessions()
        inner.close()
        for pages in host._shared:  # nobody has them mapped now
            pages.close()
        assert host.hypervisor.counters.mapped_pages == 0, "pages are still mapped"
        left = host.tree()
        for tree in (nodes, left):  # of domain 0 it goes with the last device
            tree.pop("/local/domain/0/device", None)
        assert not set(left) - set(nodes), "nodes are left in xenstore"
        if DOMID in host.xenstored.domains and f"/libxl/{DOMID}/type" in left:
            assert nodes == left, "xenstore is not as it was"
        assert not os.path.isdir(host.records) or not os.listdir(host.records)
        host._servings.clear()  # their counters may be in a file
    Host.until(lambda: set(threading.enumerate()) <= threads, what="the end of all threads")
    if FREES_CLASSES and set(_descriptors().items()) - set(descriptors.items()):
        gc.collect()  # some may be in a cycle
        assert set(_descriptors().items()) <= set(descriptors.items()), "descriptors are left open"


def pytest_runtest_logreport(report):
    """Name a test that is run once more, and why, in the file that the environment names, if any.

    The reason may be an earlier test's: what that left to the collector of garbage, or in a thread.
    """
    if report.outcome == "rerun" and "XEN_DISK_RERUNS" in os.environ:
        version = ".".join(map(str, sys.version_info[:2]))
        why = textwrap.indent(long_run.why(report), "    ")
        with open(os.environ["XEN_DISK_RERUNS"], "a", encoding="utf-8") as file:
            file.write(f"{report.nodeid} (Python {version}), {report.when}:\n{why}\n")


def pytest_configure(config):
    """Have each Python that shares the tests try other examples of a property, always the same."""
    if PYTHONS > 1 and hasattr(config.option, "hypothesis_seed"):
        config.option.hypothesis_seed = OURS


def pytest_terminal_summary(terminalreporter):
    """Say what processor time all this took, so that growth is seen."""
    terminalreporter.write_line(long_run.note_time(sum(os.times()[:4])))


def pytest_collection_modifyitems(config, items):
    """Have this Python run its share of the tests, where several run them."""
    chosen = long_run.of_this_python(items)
    others = [item for item, is_ours in zip(items, chosen) if not is_ours]
    items[:] = [item for item, is_ours in zip(items, chosen) if is_ours]
    if others:
        config.hook.pytest_deselected(items=others)


def pytest_collection_finish():
    """What was imported and collected stays: no collection of garbage looks through it again."""
    with contextlib.suppress(ImportError):
        from hypothesis import given, strategies

        # It looks once who refers to its random numbers, and would not find what is frozen.
        given(strategies.none())(lambda nothing: None)()
    gc.collect()
    gc.freeze()
