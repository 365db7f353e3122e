"""``filter``: other settings while a guest uses the disk, and after another process took over."""

from __future__ import annotations

import json
import os
import signal

import pytest

from xen_disk_py.blkif import ERROR, OKAY
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import record
from xen_disk_py.recovery.record import find
from xen_disk_py.xenbus.states import Address, State

ADDRESS = Address(0, 5, 51728, "vbd3")


@pytest.fixture
def change(host):
    def change(*argv):
        env = host.environment()
        status = main(["filter", "guest", "xvdb", *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return change


@pytest.fixture
def connect(host, processes, image):
    """Have a real process serve a disk with filters to a guest."""

    def connect(*filters):
        options = [f"--filter={text}" for text in filters]
        argv = ["--path", str(image), "--backend=raw", "--vdev=xvdb", *options]
        process = processes.start("connect", "guest", *argv)
        host.until(lambda: ADDRESS.backend in host.tree())
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        process.until(" rw")
        return process, frontend

    return connect


def end(host, process, frontend):
    process.signal(signal.SIGINT)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


def test_errors_come_when_they_are_asked_for_and_survive_an_upgrade(
    host, connect, change, processes
):
    process, frontend = connect("error:operations=read,armed=no", "delay:read=1us")
    assert OKAY == read_status(frontend)
    status, out, err = change("arm")
    assert (ExitStatus.OK, "") == (status, err)
    assert out.startswith("1 error rate=1.0")
    assert ERROR == read_status(frontend)

    assert ExitStatus.OK is change("set", "error", "every=2", "errno=ENOSPC")[0]
    assert [OKAY, ERROR, OKAY] == [read_status(frontend) for _ in range(3)]
    status, out, _ = change("list", "--json")
    first, second = json.loads(out)
    assert {"matched": 3, "failed": 2} == first["counters"]
    assert ("2", "ENOSPC", "yes") == tuple(
        first["settings"][key] for key in ("every", "errno", "armed")
    )
    assert ("1us", 2) == (second["settings"]["read"], second["place"])

    env = host.environment()
    assert ExitStatus.OK == main(["upgrade", "guest", "xvdb"], env), env.stderr.getvalue()
    assert [OKAY, ERROR] == [read_status(frontend) for _ in range(2)]
    assert ExitStatus.OK is change("disarm")[0]
    assert [OKAY] * 3 == [read_status(frontend) for _ in range(3)]

    process.signal(signal.SIGKILL)
    process.wait()
    noted = find(host.records, ADDRESS).facts.spec.filters
    assert ("error:operations=read,armed=no,every=2,errno=ENOSPC", "delay:read=1us") == noted
    status, _, err = change("list")
    assert status is ExitStatus.ERROR
    assert "no process that lives serves xvdb" in err
    process = processes.start("connect", "--adopt", "guest", "xvdb")
    process.until(" rw")
    assert "armed=no" in change("list")[1]
    end(host, process, frontend)


def read_status(frontend):
    try:
        frontend.read(0, 4096)
    except OSError:
        return ERROR
    return OKAY


def test_what_is_wrong_changes_nothing(host, connect, change):
    process, frontend = connect("error:armed=no")
    before = change("list")
    for argv, said in (
        (["set", "error", "rate=2"], "rate=2 is not from 0 to 1"),
        (["set", "error", "rate=0.5", "colour=1"], "no option of it; it takes rate"),
        (["set", "delay", "read=1s"], "no filter delay; it has error"),
        (["set", "error"], "write it as: xen-disk filter VM VDEV set FILTER key=value"),
        (["set", "rate=1"], "write it as"),
        (["arm", "2"], "there is no filter 2"),
        (["list", "error"], "list takes no error"),
        (["dance"], "invalid choice: 'dance'"),
    ):
        status, out, err = change(*argv)
        assert (ExitStatus.USAGE, "") == (status, out)
        assert said in err
    assert before == change("list")
    end(host, process, frontend)


def test_a_disk_without_filters(host, connect, change):
    process, frontend = connect()
    assert (ExitStatus.OK, "the disk has no filters\n", "") == change("list")
    assert (ExitStatus.OK, "[]\n", "") == change("list", "--json")
    assert "connected without --filter" in change("set", "delay", "read=1s")[2]
    end(host, process, frontend)


def test_a_power_cut_cuts_the_guest_off_and_loses_what_was_not_flushed(
    host, connect, change, image
):
    process, frontend = connect("powercut:seed=1")
    frontend.write(0, b"a" * 4096)
    frontend.flush()
    assert b"a" * 4096 == image.read_bytes()[:4096]
    frontend.write(0, b"b" * 4096)
    frontend.write(8192, b"c" * 4096)
    assert b"b" * 4096 == frontend.read(0, 4096)
    assert b"a" * 4096 == image.read_bytes()[:4096]

    status, out, err = change("cut")
    assert (ExitStatus.OK, "") == (status, err)
    assert "1 powercut seed=1 flush=0 limit=67108864 cut=yes" in out
    for call in (lambda: frontend.read(0, 4096), frontend.flush):
        with pytest.raises(OSError, match=r"-1|-5"):
            call()
    assert {b"a" * 512, b"b" * 512} >= {
        image.read_bytes()[at : at + 512] for at in range(0, 4096, 512)
    }
    assert "the power does not come back" in change("set", "powercut", "cut=no")[2]
    env = host.environment()
    assert ExitStatus.ERROR is main(["upgrade", "guest", "xvdb"], env)
    end(host, process, frontend)
    assert "the power was cut" in process.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_that_has_given_up_its_privileges_listens_to_root(
    host, processes, image, change, tmp_path
):
    log = tmp_path / "log"
    argv = ["--path", str(image), "--backend=raw", "--vdev=xvdb", "--user=nobody"]
    process = processes.start("connect", "guest", *argv, f"--filter=log:file={log}")
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    assert ExitStatus.OK is change("set", "log", "format=json")[0]
    frontend.read(0, 4096)
    assert "read" == json.loads(log.read_text().splitlines()[-1])["operation"]
    status, _, err = change("set", "log", "file=/root/other")  # that is not its to open
    assert status is ExitStatus.USAGE
    assert "no permission in" in err
    assert "format=json" in change("list")[1]
    end(host, process, frontend)
    record.sweep(host.records)  # it may not itself
