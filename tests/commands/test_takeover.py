"""``connect --adopt`` and ``--recover``: on with a disk whose process has died, or not."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import recorded
from libxl_stub import Libxl

from xen_disk_py.backends.overlay import OverlayBackend
from xen_disk_py.backends.vhd.check import check
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.cli import main
from xen_disk_py.commands.backend_arguments import backend_from, spec_from
from xen_disk_py.commands.parsing import parse
from xen_disk_py.datapath.double_buffer import DoubleBuffer
from xen_disk_py.errors import ImageError
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host import process
from xen_disk_py.recovery import orphans, record, temporary
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record, find
from xen_disk_py.recovery.role import Role
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.device import Device
from xen_disk_py.xenbus.states import Address, State
from xen_disk_py.xenbus.toolstack import Domain
from xen_disk_py.xenbus.vdev import parse as parse_vdev

ADDRESS = Address(0, 5, 51728, "vbd3")
NEW = b"new" * 4096
DEAD = 999_999_999  # no process has such a number

SLOW = """
import os
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 1 << 20
    survives = True

    def __init__(self, *, directory):
        self.directory = directory

    def read(self, buffers, offset):
        if os.path.exists(self.directory + "/hang"):
            open(self.directory + "/entered", "w").close()
            os.read(os.pipe()[0], 1)
        for buffer in buffers:
            buffer[:] = b"r" * len(buffer)

    def write(self, buffers, offset):
        with open(self.directory + "/written", "a") as file:
            file.write(f"{offset} ")
"""
FORGETFUL = SLOW.replace("survives = True", "")


@pytest.fixture
def orphan(host):
    """Make what a process leaves that dies before the guest has connected."""

    def orphan(*argv, temporary=None, **changed):
        args = parse(["connect", "guest", "--vdev", "xvdb", *map(str, argv)])
        vdev = parse_vdev("xvdb")
        spec = spec_from(args, temporary)
        disk = spec.open_disk()
        one = Record(host.records, ADDRESS, args.queues)
        facts = Facts.about(spec, Domain(5, "guest", ""), vdev, disk)
        one.describe(facts._replace(**{"pid": DEAD, **changed}))
        toolstack.attach(
            host.store,
            ADDRESS,
            vdev,
            backend_keys=Device(
                host.store,
                host.hypervisor,
                ADDRESS,
                disk,
                options=spec.queue_options,
                max_queues=args.queues,
            ).keys(),
            params="raw:",
            read_only=disk.read_only,
            pid=DEAD,
        )
        one.leave()
        disk.close()

    directory = os.getcwd()
    yield orphan
    os.chdir(directory)
    toolstack.detach(host.store, ADDRESS)
    record.forget(host.records, ADDRESS)


@pytest.fixture
def run(host):
    """Run a command here while a script plays the guest; its status and what it said."""

    def run(*argv, script=lambda env: None):
        env, errors, directory = host.environment(), [], os.getcwd()

        def play():
            try:
                script(env)
            except BaseException as error:
                errors.append(error)
                host.xenstored.remove_domain(host.DOMID)  # let the command end

        thread = threading.Thread(target=play)
        thread.start()
        try:
            status = main(list(map(str, argv)), env)
        finally:
            os.chdir(directory)
            thread.join()
        if errors:
            raise AssertionError(env.stderr.getvalue()) from errors[0]
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return run


@pytest.fixture
def adopt(run):
    return lambda *argv, **options: run("connect", "--adopt", *argv, "guest", "xvdb", **options)


def unplug(host, env, frontend):
    """Once the command has taken over, interrupt it; release the disk as a guest does."""
    host.until(env.stdout.getvalue)
    os.kill(os.getpid(), signal.SIGINT)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()


def trace(host):
    """Return all that somebody who takes over would find."""
    path = Path(record.path_of(host.records, ADDRESS))
    nodes = {path: value for path, value in host.tree().items() if "51728" in path}
    return nodes, path.read_bytes() if path.exists() else None


def test_a_guest_notices_nothing(host, processes, adopt, image):
    """With what it had written and what it asked for when nobody was there."""
    process = processes.start("connect", "5", "--path", str(image), "--backend=raw", "--vdev=xvdb")
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    frontend.write(4096, NEW)
    process.until("raw rw")
    process.kill()
    frontend.submit(WRITE, 65536, NEW)
    frontend.kick()

    def script(env):
        frontend.drain()
        assert NEW * 2 == frontend.read(4096, len(NEW)) + frontend.read(65536, len(NEW))
        found = find(host.records, ADDRESS)
        assert (True, os.getpid(), True) == (
            found.alive,
            found.facts.pid,
            found.facts.connected,
        )
        assert 2 == found.counters["writes"]  # of both processes
        assert str(os.getpid()) == host.tree()[f"{ADDRESS.backend}/xen-disk-pid"]
        assert frontend.backend_state is State.CONNECTED
        unplug(host, env, frontend)

    status, out, err = adopt(script=script)
    assert (ExitStatus.OK, "xvdb 51728 /dev/xvdb 1 MiB raw rw\n") == (status, out)
    assert "xvdb: unplugged\n" in err
    assert NEW == image.read_bytes()[65536 : 65536 + len(NEW)]


@pytest.mark.parametrize("option", ["--path", "--overlay"])
def test_a_guest_with_a_vhd_notices_nothing(host, processes, adopt, tmp_path, option):
    """A child, by its own name or as what is kept of its parent's changes."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    create(str(base), 1 << 20)
    disk = ["--format", "vhd", "--path", str(base if option == "--overlay" else child)]
    if option == "--overlay":
        disk += ["--overlay", str(child)]
    else:
        create_child(str(child), str(base))
    before = base.read_bytes()
    process = processes.start("connect", "5", *disk, "--vdev=xvdb")
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    frontend.write(4096, NEW)
    process.until("vhd rw")
    process.kill()
    frontend.submit(WRITE, 65536, NEW)
    frontend.kick()

    def script(env):
        frontend.drain()
        assert NEW * 2 == frontend.read(4096, len(NEW)) + frontend.read(65536, len(NEW))
        unplug(host, env, frontend)

    status, out, _ = adopt(script=script)
    assert (ExitStatus.OK, "xvdb 51728 /dev/xvdb 1 MiB vhd rw\n") == (status, out)
    assert before == base.read_bytes()
    assert [] == check(str(child))


def test_a_request_that_was_under_way(host, processes, adopt, tmp_path):
    """It is done again; so are those behind it, once each."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hang").touch()
    disk = ["--path", str(tmp_path / "slow.py"), "--option", f"directory={tmp_path}"]
    process = processes.start("connect", "guest", "--vdev=xvdb", *disk)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    read = []
    frontend.submit(READ, 0, length=4096, done=lambda data: read.append(bytes(data)))
    frontend.submit(WRITE, 8192, NEW)
    frontend.kick()
    host.until((tmp_path / "entered").exists)
    process.kill()
    (tmp_path / "hang").unlink()

    def script(env):
        frontend.drain()
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt("--json", script=script)[0]
    assert ([b"r" * 4096], "8192 ") == (read, (tmp_path / "written").read_text())


def test_the_arguments_are_those_that_there_were(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw", "--read-only", "--indirect-segments=32", "--queues=2")

    def script(env):
        frontend = host.frontend(ADDRESS, queues=2, max_segments=32)
        features = frontend.connect()
        assert (True, 32, 2) == (
            features.read_only,
            features.max_indirect_segments,
            features.max_queues,
        )
        assert image.read_bytes()[:4096] * 2 == frontend.read(0, 4096) * 2
        unplug(host, env, frontend)

    status, out, _ = adopt("--json", script=script)
    assert (ExitStatus.OK, "ro", os.getpid()) == (
        status,
        json.loads(out)["mode"],
        json.loads(out)["pid"],
    )


@pytest.mark.parametrize("adopts", [False, True])
def test_whoever_started_it_is_told(host, run, orphan, image, monkeypatch, adopts):
    """Which disk it is before there is anything to leave behind, then that it is served."""
    if adopts:
        orphan("--path", image, "--backend=raw")
    told = []

    def notify(*assignments):
        tree = host.tree()
        pid = tree.get(f"{ADDRESS.backend}/xen-disk-pid")
        told.append((assignments[0], pid, tree.get(f"{ADDRESS.backend}/state")))

    monkeypatch.setattr("xen_disk_py.commands.connect.notify", notify)

    def script(env):
        host.until(lambda: f"{ADDRESS.frontend}/state" in host.tree())
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        unplug(host, env, frontend)

    new = ["guest", "--vdev=xvdb", "--path", image, "--backend=raw"]
    status, _, _ = run("connect", *(["--adopt", "guest", "xvdb"] if adopts else new), script=script)
    assert status is ExitStatus.OK
    ours = str(os.getpid())
    assert [
        ("X_DEVICE=5 xvdb", str(DEAD), "2") if adopts else ("X_DEVICE=5 xvdb", None, None),
        ("READY=1", ours, "4"),
    ] == told[:2]
    # asked first, told then; the guest may have been quick
    assert [("STOPPING=1", ours, True)] == [(*pair, state in "56") for *pair, state in told[2:]]


def change_file(image):
    image.with_name("other").write_bytes(image.read_bytes())
    image.with_name("other").replace(image)


@pytest.mark.parametrize(
    ("argv", "change", "said"),
    [
        (["--backend=raw"], change_file, "is not what xvdb was made of"),
        (["--backend=raw"], os.remove, "of which xvdb was made, is not there: put it back"),
        (["--backend=raw"], lambda path: os.truncate(path, 4096), "is 4 KiB long now, xvdb 1 MiB"),
        (["--backend=cow"], lambda path: None, "has died with process 999999999"),
    ],
)
def test_what_nobody_can_take_over(host, adopt, orphan, image, caplog, argv, change, said):
    """It stays as it is, for whoever repairs it."""
    orphan("--path", image, *argv)
    change(image)
    before = trace(host)
    status, out, err = adopt()
    assert (ExitStatus.ERROR, "", 1) == (status, out, len(err.splitlines()))
    assert said in err
    assert before == trace(host)
    assert not find(host.records, ADDRESS).alive
    passes = "KiB" in said or "put it back" in said
    assert (ExitStatus.CRASHED if passes else ExitStatus.ERROR) is adopt(
        *Role(leaves=True).words()
    )[0]
    assert before == trace(host)
    caplog.clear()  # what is logged refers to everything


@pytest.mark.parametrize("kind", ["vhd", "at"])
def test_what_a_disk_names_itself_is_the_same_too(host, adopt, orphan, tmp_path, kind):
    """A VHD's parent, or the image of a trace."""
    base = tmp_path / "base"
    base.write_bytes(b"\1" * recorded.SIZE)
    if kind == "vhd":
        create_child(str(tmp_path / "disk"), str(base), is_raw=True)
        orphan("--path", tmp_path / "disk", "--format", "vhd")
    else:
        head = recorded.header(base)
        recorded.make(tmp_path / "disk", head, [recorded.stopped(50)])
        orphan("--path", f"at:{tmp_path}/disk@end")
    status = base.stat()
    change_file(base)
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    status, _, err = adopt()
    assert ExitStatus.ERROR is status
    assert f"{base} is not what xvdb was made of" in err


def test_an_overlay_that_has_vanished_is_not_made_anew(host, adopt, orphan, image, tmp_path):
    orphan("--path", image, "--overlay", tmp_path / "changes")
    (tmp_path / "changes").unlink()
    assert "changes, of which xvdb was made, is not there" in adopt()[2]
    assert not (tmp_path / "changes").exists()


def test_a_disk_of_your_own(host, adopt, orphan, tmp_path):
    """Its code may change, its data is its own business; unless it says so, it does not survive."""
    code = tmp_path / "disk.py"
    code.write_text(FORGETFUL)
    orphan("--path", code, "--option", f"directory={tmp_path}")
    assert "has died with process" in adopt()[2]


def test_the_code_of_a_disk_of_your_own_may_change(host, adopt, orphan, tmp_path):
    code = tmp_path / "disk.py"
    code.write_text(SLOW)
    orphan("--path", code, "--option", f"directory={tmp_path}")
    code.unlink()
    code.write_text(SLOW.replace('b"r"', 'b"R"'))

    def script(env):
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        assert b"R" * 512 == frontend.read(0, 512)
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt(script=script)[0]


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["guest", "xvdb"], 1, "no xvdb of ours in guest (domain 5): nothing to adopt"),
        (["guest", "xvd"], 2, "xvd"),
        (["nobody", "xvdb"], 1, "no domain 'nobody' is running"),
        (["77", "xvdb"], 1, "no domain '77' is running"),
        (["guest"], 2, "VM VDEV goes with --adopt"),
        (["guest", "xvdb", "--backend=raw"], 2, "takes a disk over with the options that it had"),
    ],
)
def test_nothing_there(run, argv, status, said):
    result, out, err = run("connect", "--adopt", *argv)
    assert (status, "", 1) == (result, out, len(err.splitlines()))
    assert said in err


def test_nodes_without_a_record(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw")
    record.forget(host.records, ADDRESS)
    before = trace(host)
    status, _, err = adopt()
    assert (ExitStatus.ERROR, before) == (status, trace(host))
    assert "no record of xvdb of domain 5: nothing to adopt" in err


def test_a_process_that_lives(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw")
    with Record.adopt(host.records, ADDRESS) as lives:
        before = trace(host)
        status, _, err = adopt()
        assert (ExitStatus.ERROR, before) == (status, trace(host))
        assert f"process {DEAD} lives and serves xvdb of guest (domain 5)" in err
        lives.leave()


def test_a_record_of_another_version(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw", format=-1)
    before = trace(host)
    status, _, err = adopt()
    assert (ExitStatus.ERROR, before) == (status, trace(host))
    assert "another version wrote it" in err


def test_a_disk_of_libxl_s(host, adopt, orphan, image):
    """Its nodes are not ours to remove."""
    orphan("--path", image, "--backend=raw")
    host.store.write(f"{ADDRESS.backend}/script", "/etc/xen/scripts/block-xen-disk")
    before = trace(host)
    status, _, err = adopt()
    assert (ExitStatus.ERROR, before) == (status, trace(host))
    assert "xl has attached xvdb: xen-disk serve takes it over" in err


def test_an_image_that_has_become_longer(host, adopt, orphan, image):
    """The guest is told of whole physical sectors, as it was told that they are so long."""
    orphan("--path", image, "--backend=raw", connected=True)
    os.truncate(image, (2 << 20) + 512)

    def script(env):
        frontend = host.frontend(ADDRESS)
        assert 4096 == frontend.connect().sectors
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt(script=script)[0]


@pytest.mark.parametrize("vm", ["5", "guest"])
@pytest.mark.parametrize("gone", ["domain", "introduced"])
def test_the_guest_was_destroyed(host, run, orphan, image, tmp_path, monkeypatch, vm, gone):
    """Its id, which a supervisor knows, is enough to clean up by; its name is gone with it."""
    monkeypatch.setattr(temporary, "_MEMORY", str(tmp_path))
    changes = temporary.new_path()
    orphan("--path", image, temporary=changes)
    if gone == "domain":
        host.xenstored.remove_domain(5)
    else:
        del host.xenstored.domains[5]  # it was, and a toolstack cleans up now
    status, out, err = run("connect", "--adopt", vm, "xvdb")
    if (vm, gone) == ("guest", "domain"):
        assert (ExitStatus.ERROR, True) == (status, "no domain 'guest'" in err)
        return
    assert (ExitStatus.OK, "", "xvdb: the guest has gone\n") == (status, out, err)
    assert ADDRESS.backend not in host.tree()
    assert [] == os.listdir(host.records)
    assert not os.path.exists(changes)


def test_changes_in_memory_that_nobody_could_remove_at_the_end(
    host, adopt, orphan, image, tmp_path
):
    """The process becomes another user, and would have no parent that does."""
    orphan("--path", image, "--user", "nobody", temporary=str(tmp_path / "changes"))
    before = trace(host)
    status, _, err = adopt()
    assert (ExitStatus.USAGE, before) == (status, trace(host))
    assert "nobody cannot remove them at the end" in err
    assert "xen-disk connect --adopt 5 xvdb --supervise" in err


def test_a_toolstack_took_the_disk_away(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw")
    toolstack.detach(host.store, ADDRESS)
    assert (ExitStatus.OK, "", "xvdb: detached meanwhile\n") == adopt()
    assert [] == os.listdir(host.records)


@pytest.mark.parametrize("record_format", [None, -1])
def test_the_guest_of_a_record_that_cannot_be_read_was_destroyed(
    host, run, orphan, image, monkeypatch, record_format
):
    if record_format is not None:
        monkeypatch.setattr("xen_disk_py.recovery.record.FORMATS", (record_format,))
    orphan("--path", image, "--backend=raw")
    monkeypatch.undo()
    if record_format is None:
        record.forget(host.records, ADDRESS)
    del host.xenstored.domains[5]
    assert ExitStatus.OK is run("connect", "--adopt", "5", "xvdb")[0]
    assert (ADDRESS.backend in host.tree(), []) == (False, os.listdir(host.records))


def test_a_toolstack_detaches_meanwhile(host, adopt, orphan, image):
    """The process that takes over shows it Closed, and it removes the nodes."""
    orphan("--path", image, "--backend=raw")
    libxl = Libxl(host, None)
    libxl.ask_to_detach(ADDRESS)

    def script(env):
        libxl.wait(ADDRESS, State.CLOSED)
        libxl.remove(ADDRESS)

    status, out, err = adopt(script=script)
    assert (ExitStatus.OK, "") == (status, out)
    assert "xvdb: detached by the toolstack" in err
    assert [] == os.listdir(host.records)


def test_what_fails_before_anything_is_served_leaves_the_disk(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw")
    before = trace(host)[0]

    def fail(*what, **more):
        raise OSError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xen_disk_py.commands.connect.Device", fail)
        status, _, err = adopt()
    assert (ExitStatus.ERROR, True) == (status, "OSError: no" in err)
    assert before.keys() == trace(host)[0].keys()
    assert find(host.records, ADDRESS).is_orphan


def test_a_guest_that_had_the_disk_may_take_its_time(host, adopt, orphan, image):
    """Its driver is unloaded just now, say; that is announced all the same, for who waits."""
    orphan("--path", image, "--backend=raw", "--timeout=0", connected=True)

    def script(env):
        host.until(env.stdout.getvalue)
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt(script=script)[0]


def test_a_guest_that_never_had_the_disk_may_not(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw", "--timeout=0")
    status, _, err = adopt()
    assert (ExitStatus.ERROR, True) == (status, "did not connect within 0 s" in err)
    assert ADDRESS.backend not in host.tree()


def test_recover(host, run, orphan, image):
    """The disk of a process that died, with that one's arguments; else a new one."""
    orphan("--path", image, "--backend=raw", "--read-only")
    for mode in ("ro", "rw"):

        def script(env, mode=mode):
            host.until(lambda: f"{ADDRESS.frontend}/state" in host.tree())
            frontend = host.frontend(ADDRESS)
            assert (mode == "ro") is frontend.connect().read_only
            unplug(host, env, frontend)

        argv = ["--vdev=xvdb", "--path", image, "--backend=raw"]
        status, out, _ = run("connect", "--recover", "guest", *argv, script=script)
        assert (ExitStatus.OK, f"xvdb 51728 /dev/xvdb 1 MiB raw {mode}\n") == (status, out)


def test_recover_without_a_name(host, run, image):
    def script(env):
        address = Address(0, 5, 51712, "vbd3")
        host.until(lambda: f"{address.frontend}/state" in host.tree())
        frontend = host.frontend(address)
        frontend.connect()
        unplug(host, env, frontend)

    status, _, err = run("connect", "--recover", "guest", script=script)
    assert status is ExitStatus.OK
    assert err.startswith("without --vdev there is nothing to --recover by")


@pytest.mark.parametrize("broken", ["queue", "loop"])
def test_an_error_of_our_own_leaves_the_disk(host, processes, adopt, image, broken):
    """Nothing is answered by the process that has it: the next one does what it was asked."""
    processes.install(
        "from xen_disk_py.datapath import queue\nqueue.encode_response = lambda *what: 1 / 0\n"
        if broken == "queue"
        else "import signal, xen_disk_py.xenbus.device\n"
        "xen_disk_py.xenbus.device.Device.unplug = lambda self: 1 / 0\n"
    )
    disk = ["--path", str(image), "--backend=raw", "--vdev=xvdb"]
    process = processes.start("connect", "guest", "--recover", *disk)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until("raw rw")
    if broken == "queue":
        frontend.submit(WRITE, 0, NEW)
        frontend.kick()
    else:
        process.signal()
    assert ExitStatus.CRASHED == process.wait()
    assert "serving failed, and the disk is left to another process" in process.err
    assert "ZeroDivisionError" in process.err
    assert find(host.records, ADDRESS).is_orphan
    assert frontend.backend_state is State.CONNECTED
    process.kill()

    def script(env):
        frontend.drain()
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt(script=script)[0]
    assert (broken == "queue") is (NEW == image.read_bytes()[: len(NEW)])


# -- between two lives -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["raw", "mmap", "cow"])
def test_the_storage_of_an_orphan_is_nobodys_to_use(host, run, orphan, image, backend):
    orphan("--path", image, "--backend=raw")
    before = trace(host)
    argv = ("connect", "guest", "--vdev=xvdc", "--path", image, "--backend", backend)
    status, _, err = run(*argv)
    assert ExitStatus.ERROR is status
    assert "it is the disk xvdb of domain 5, whose process has died" in err
    assert "xen-disk connect --adopt 5 xvdb" in err
    assert "--force" in err
    assert before == trace(host)


def test_not_even_by_a_loop_device(host, run, orphan, image):
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("a loop device needs root and losetup")
    orphan("--path", image, "--backend=raw")
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr}")
    device = made.stdout.strip()
    try:
        status, _, err = run("connect", "guest", "--vdev=xvdc", "--path", device, "--backend=raw")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert ExitStatus.ERROR is status
    assert "whose process has died" in err


@pytest.mark.parametrize(
    "words",
    [["commit", "CHILD"], ["export", "CHILD", "NEW"], ["create", "NEW", "--parent", "CHILD"]],
)
def test_a_vhd_of_an_orphan_is_nobodys_to_use(host, run, orphan, tmp_path, words):
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    create(str(base), 1 << 20)
    create_child(str(child), str(base))
    orphan("--path", child, "--format", "vhd")
    before = child.read_bytes(), base.read_bytes()
    names = {"CHILD": child, "NEW": tmp_path / "new"}
    status, _, err = run(*(names.get(word, word) for word in words))
    assert ExitStatus.ERROR is status
    assert "whose process has died" in err
    assert before == (child.read_bytes(), base.read_bytes())
    assert not (tmp_path / "new").exists()


def test_the_parent_of_an_orphan_is_not_committed_to(host, run, orphan, tmp_path):
    base = tmp_path / "base.vhd"
    create(str(base), 1 << 20)
    for name in ("a.vhd", "b.vhd"):
        create_child(str(tmp_path / name), str(base))
    orphan("--path", tmp_path / "a.vhd", "--format", "vhd")
    before = base.read_bytes()
    status, _, err = run("commit", tmp_path / "b.vhd")
    assert ExitStatus.ERROR is status
    assert "whose process has died" in err
    assert before == base.read_bytes()


@pytest.mark.parametrize("command", ["commit", "export", "rebase"])
def test_an_overlay_of_an_orphan_is_nobodys_to_use(host, run, orphan, image, tmp_path, command):
    overlay = tmp_path / "changes"
    orphan("--path", image, "--overlay", overlay)
    before = image.read_bytes(), overlay.read_bytes()
    more = {"export": [tmp_path / "new"], "rebase": [image, "--force"]}.get(command, [])
    status, _, err = run(command, overlay, *more)
    assert ExitStatus.ERROR is status
    assert "whose process has died" in err
    assert before == (image.read_bytes(), overlay.read_bytes())


def test_the_image_of_an_orphan_is_not_committed_to(host, run, orphan, image, tmp_path):
    """Through another overlay of it: the orphan's would not fit it any more."""
    OverlayBackend(str(image), overlay=str(tmp_path / "others")).close()
    orphan("--path", image, "--overlay", tmp_path / "changes")
    inode = os.stat(image).st_ino
    status, _, err = run("commit", tmp_path / "others")
    assert ExitStatus.ERROR is status
    assert "whose process has died" in err
    assert inode == os.stat(image).st_ino


def test_who_only_reads_leaves_what_an_orphan_writes_alone(host, run, orphan, image, tmp_path):
    other = tmp_path / "other.raw"
    other.write_bytes(image.read_bytes())
    OverlayBackend(str(other), overlay=str(tmp_path / "others")).close()
    orphan("--path", image, "--backend=raw")
    for argv in (
        ("rebase", tmp_path / "others", image),
        ("export", image, tmp_path / "new", "--format", "raw"),
        ("create", tmp_path / "new", "--parent", image, "--parent-format", "raw"),
        ("demo", "--path", image),
    ):
        status, _, err = run(*argv)
        assert ExitStatus.ERROR is status, argv
        assert "whose process has died" in err, argv
        assert not (tmp_path / "new").exists()


def test_what_an_orphan_whose_guest_has_gone_had_is_everybodys(host, run, orphan, image, tmp_path):
    overlay = tmp_path / "changes"
    orphan("--path", image, "--overlay", overlay)
    name = host.xenstored.domains.pop(5)
    try:
        assert ExitStatus.OK is run("commit", overlay)[0]
    finally:
        host.xenstored.domains[5] = name
    assert not overlay.exists()


@pytest.mark.parametrize("command", ["connect", "commit", "rebase", "export", "create", "vhd"])
def test_orphans_are_looked_for_when_the_storage_is_locked(
    host, run, image, tmp_path, monkeypatch, command
):
    """Who looks before finds nothing yet of a process that is killed between the two."""
    overlay, other, new = tmp_path / "changes", tmp_path / "other", tmp_path / "new"
    other.write_bytes(image.read_bytes())
    OverlayBackend(str(image), overlay=str(overlay)).close()
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    create(str(base), 1 << 20)
    create_child(str(child), str(base))
    argv, expected = {
        "connect": (("--vdev=xvdc", "--path", image, "--backend=raw"), {image}),
        "commit": ((overlay,), {overlay, image}),
        "rebase": ((overlay, other), {overlay, other}),
        "export": ((image, new, "--format=raw"), {image}),
        "create": ((new, "--parent", image, "--parent-format=raw"), {image}),
        "vhd": ((child,), {child, base}),
    }[command]
    seen = set()

    def check(directory, storage, **options):
        for each in storage:
            with open(each.path, "rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.add(Path(each.path))
        if seen == expected:
            raise ImageError("enough")

    monkeypatch.setattr(orphans, "check", check)
    words = ("connect", "guest") if command == "connect" else (command,)
    _, _, err = run(*(("commit",) if command == "vhd" else words), *argv)
    assert "enough" in err


@pytest.mark.parametrize("end", ["killed", "closed", "hangs"])
def test_a_process_that_dies_may_have_its_record_s_lock_longer_than_its_image_s(
    host, orphan, image, monkeypatch, end
):
    """The kernel releases one after the other; here a process keeps the record, and no image."""
    orphan("--path", image, "--backend=raw")
    file = f"{host.records}/5-51728"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'rb+'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print(flush=True); sys.stdin.read()",
            file,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert b"\n" == holder.stdout.readline()
        started = process.start_time(holder.pid)
        with open(file, "rb+") as opened:
            whole = memoryview(mmap.mmap(opened.fileno(), 0))
            facts = find(host.records, ADDRESS).facts._replace(pid=holder.pid)
            DoubleBuffer(whole[: 32 << 10]).write(facts._replace(process_started=started).encode())
        clock = iter(range(1000))

        def sleep(seconds):
            if end == "closed":
                os.unlink(file)
            if end != "hangs":
                holder.kill()
                holder.wait()

        monkeypatch.setattr(orphans, "time", SimpleNamespace(sleep=sleep, monotonic=clock.__next__))
        disk = backend_from(parse(["connect", "guest", "--path", str(image), "--backend=raw"]))
        try:
            said = {"killed": "has died", "hangs": "is ending: try again"}.get(end)
            with pytest.raises(ImageError, match=said) if said else nullcontext():
                orphans.check(host.records, disk.host_storage)
        finally:
            disk.close()
            holder.kill()


def test_a_gold_image_is_shared_with_an_orphan(host, orphan, image, tmp_path):
    """Neither of them writes to it."""
    orphan("--path", image, "--overlay", tmp_path / "changes")
    disk = backend_from(parse(["connect", "guest", "--path", str(image)]))
    orphans.check(host.records, disk.host_storage, force=False)
    disk.close()


def test_an_orphan_whose_guest_has_gone_keeps_nobody_out(host, orphan, image):
    orphan("--path", image, "--backend=raw")
    disk = backend_from(parse(["connect", "guest", "--path", str(image), "--backend=raw"]))
    with pytest.raises(ImageError, match="whose process has died"):
        orphans.check(host.records, disk.host_storage, store=host.store)
    name = host.xenstored.domains.pop(5)
    orphans.check(host.records, disk.host_storage, store=host.store)
    host.xenstored.domains[5] = name
    disk.close()


def test_another_file_with_the_number_of_an_orphan_s(host, orphan, image):
    """As a file system gives it at once to the next one."""
    orphan("--path", image, "--backend=raw")
    facts = find(host.records, ADDRESS).facts
    facts.files[str(image)]["born"] = "1.0"
    with Record.adopt(host.records, ADDRESS) as one:
        one.describe(facts)
        one.leave()
    disk = backend_from(parse(["connect", "guest", "--path", str(image), "--backend=raw"]))
    orphans.check(host.records, disk.host_storage)
    disk.close()


def test_a_new_disk_in_the_place_of_an_orphan_leaves_it(host, run, orphan, image, tmp_path):
    orphan("--path", image, "--backend=raw")
    (tmp_path / "other.raw").write_bytes(bytes(4096))
    before = trace(host)
    status, _, err = run("connect", "guest", "--vdev=xvdb", "--path", tmp_path / "other.raw")
    assert ExitStatus.ERROR is status
    assert "xen-disk connect --adopt 5 xvdb" in err
    assert before == trace(host)
    found = find(host.records, ADDRESS)
    assert found.is_orphan
    assert str(image) == found.facts.path


def test_killed_between_a_smaller_image_and_the_note_of_it(host, adopt, orphan, image):
    """The guest is told by the successor."""
    orphan("--path", image, "--backend=raw", resizing=512 << 10)
    os.truncate(image, 512 << 10)

    def guest(env):
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        host.until(lambda: host.store.read(f"{ADDRESS.backend}/sectors") == "1024")
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt(script=guest)[0]


def test_killed_before_the_image_became_smaller(host, adopt, orphan, image):
    orphan("--path", image, "--backend=raw", resizing=512 << 10)

    def guest(env):
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        assert "2048" == host.store.read(f"{ADDRESS.backend}/sectors")
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt(script=guest)[0]


def test_a_device_that_nothing_identifies_is_taken_over_by_force_only(
    host, adopt, orphan, image, monkeypatch
):
    orphan("--path", image, "--backend=raw")
    monkeypatch.setattr("xen_disk_py.recovery.takeover.is_known", lambda before, now: False)
    before = trace(host)
    status, _, err = adopt()
    assert ExitStatus.ERROR is status
    assert "nothing but its path says" in err
    assert "--force" in err
    assert before == trace(host)

    def guest(env):
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        unplug(host, env, frontend)

    assert ExitStatus.OK is adopt("--force", script=guest)[0]
