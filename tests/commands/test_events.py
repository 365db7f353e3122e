"""What systemd's journal has of a disk: each turn of its life once, in order."""

from __future__ import annotations

import signal

import pytest
from journal import Listener

from commands.test_filter import (  # noqa: F401 - connect is a fixture
    ADDRESS,
    connect,
    end,
    read_status,
)
from xen_disk_py.blkif import ERROR, READ
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.events import KINDS
from xen_disk_py.recovery.record import find


@pytest.fixture
def journal(host):
    listener = Listener(host.journal)
    yield listener
    listener.close()


def kinds(journal, count):
    return [journal.next()["XEN_DISK_EVENT"].decode() for _ in range(count)]


def test_the_life_of_a_disk(host, connect, journal, processes, image):  # noqa: F811
    process, frontend = connect("error:operations=read,armed=no")
    entry = journal.next()
    shown = {name: value.decode() for name, value in entry.items()}
    assert f"guest/xvdb: attached: 1 MiB raw {image} rw" == shown.pop("MESSAGE")
    assert {
        "MESSAGE_ID": "1ed457ff8b3f44d19152357bbc6a3d9e",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "xen-disk",
        "XEN_DISK_EVENT": "attached",
        "XEN_DISK_GUEST": "guest",
        "XEN_DISK_DOMID": "5",
        "XEN_DISK_VDEV": "xvdb",
        "XEN_DISK_BACKEND": "raw",
        "XEN_DISK_PATH": str(image),
    } == shown
    assert ["connected"] == kinds(journal, 1)

    assert ExitStatus.OK == main(["filter", "guest", "xvdb", "arm"], host.environment())
    assert [ERROR] * 3 == [read_status(frontend) for _ in range(3)]
    assert ExitStatus.OK == main(["upgrade", "guest", "xvdb"], host.environment())
    failed = 0
    while failed < 3:  # one entry, unless something has kept us for seconds
        entry = journal.next()
        assert (b"errors", b"3") == (entry["XEN_DISK_EVENT"], entry["PRIORITY"])
        assert entry["XEN_DISK_ERROR"].startswith(b"read: ")
        failed += int(entry["XEN_DISK_COUNT"])
    assert 3 == failed
    entry = journal.next()
    assert b"taken-over" == entry["XEN_DISK_EVENT"]
    assert float(entry["XEN_DISK_PAUSE"]) >= 0
    process.signal(signal.SIGKILL)
    process.wait()
    host.machine.bury_backend()
    process = processes.start("connect", "--adopt", "guest", "xvdb")
    process.until(" rw")
    entry = journal.next()
    assert b"taken-over" == entry["XEN_DISK_EVENT"]
    assert "XEN_DISK_PAUSE" not in entry
    end(host, process, frontend)
    entry = journal.next()
    assert (b"detached", b"unplugged") == (entry["XEN_DISK_EVENT"], entry["XEN_DISK_OUTCOME"])
    assert journal.is_empty


HELD = """
import os
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 1 << 20

    def __init__(self, *, flag):
        self.flag = flag

    def read(self, buffers, offset):
        if not os.path.exists(self.flag):
            raise OSError(28, "no space")

    def write(self, buffers, offset):
        pass
"""


def test_requests_that_are_tried_again(host, journal, processes, tmp_path):
    disk, flag = tmp_path / "disk.py", tmp_path / "flag"
    disk.write_text(HELD)
    argv = ["--path", str(disk), "--option", f"flag={flag}", "--vdev=xvdb", "--on-error=hold"]
    process = processes.start("connect", "guest", *argv)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    assert ["attached", "connected"] == kinds(journal, 2)
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    host.until(lambda: find(host.records, ADDRESS).counters["held"])
    flag.touch()
    frontend.drain()
    entry = journal.next()
    assert [b"retrying", b"1"] == [entry["XEN_DISK_EVENT"], entry["XEN_DISK_COUNT"]]
    assert b"read: disk.py:13: OSError: [Errno 28] no space" == entry["XEN_DISK_ERROR"]
    assert ["recovered"] == kinds(journal, 1)
    end(host, process, frontend)
    assert ["detached"] == kinds(journal, 1)


def test_a_guest_that_does_not_connect(host, journal, image):
    argv = ["connect", "guest", "--path", str(image), "--backend=raw", "--timeout=0.01"]
    assert ExitStatus.ERROR == main(argv, host.environment())
    assert b"attached" == journal.next()["XEN_DISK_EVENT"]
    entry = journal.next()
    assert (b"detached", b"3") == (entry["XEN_DISK_EVENT"], entry["PRIORITY"])
    assert b"did not connect within" in entry["XEN_DISK_OUTCOME"]


def test_each_kind_has_a_message_id_of_its_own():
    assert len(KINDS) == len({kind.id for kind in KINDS})
    assert {32} == {len(kind.id) for kind in KINDS}
