"""``list``: what this host serves, and orphans."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from xen_disk_py.cli import main
from xen_disk_py.datapath.statistics import HELD, REQUESTS
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import record
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record
from xen_disk_py.xenbus.states import Address


@pytest.fixture
def listing(host):
    """Run ``list``; give its status, stdout and stderr."""

    def listing(*argv):
        env = host.environment()
        status = main(["list", *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return listing


@pytest.fixture
def served(host):
    """Serve a disk with a record, as ``connect`` does."""
    records = []

    def served(vdev, facts=None, **options):
        serving = host.serving(host.memory(**options), vdev, start=False)
        one = Record(host.records, serving.address)
        records.append(one)
        serving.disk.statistics = one.statistics
        one.describe(facts if facts is not None else Facts(backend="raw", path="/x:y.raw"))
        serving.start()
        return serving

    yield served
    host.end_sessions()
    while records:
        records.pop().close()


def test_nothing(listing):
    columns = "DOMAIN  VDEV  BACKEND  MODE  STATE  PID  READ  WRITTEN  PATH\n"
    assert listing() == (ExitStatus.OK, columns, "")
    assert listing("--json") == (ExitStatus.OK, "[]\n", "")


def test_a_disk_at_work(listing, served):
    frontend = served("xvdb").frontend()
    frontend.write(0, bytes(1 << 16))
    frontend.read(0, 4096)
    status, out, _ = listing()
    assert status is ExitStatus.OK
    _, row = out.splitlines()
    pid = str(os.getpid())
    words = f"5 xvdb raw rw connected {pid} 4 KiB 64 KiB /x:y.raw"
    assert words == " ".join(row.split())


def test_json(listing, served, host):
    serving = served("xvdb", read_only=True)
    frontend = serving.frontend()
    frontend.read(0, 8192)
    host.until(lambda: json.loads(listing("--json")[1])[0]["counters"]["in_flight"] == 0)
    (row,) = json.loads(listing("guest", "--json")[1])
    counters = row.pop("counters")
    assert row == {
        "domid": 5,
        "vdev": "xvdb",
        "number": 51728,
        "backend": "raw",
        "path": "/x:y.raw",
        "mode": "ro",
        "state": "connected",
        "frontend_state": "connected",
        "pid": os.getpid(),
        "queue_pids": [],
        "alive": True,
        "adoptable": False,
        "held": 0,
    }
    assert (1, 8192, 0) == (counters["reads"], counters["bytes_read"], counters["errors"])


def test_of_one_guest_only(listing, served, host):
    host.xenstored.add_domain(9, "other", "00000000-0000-0000-0000-000000000009")
    served("xvda")
    assert [5] == [row["domid"] for row in json.loads(listing("--json")[1])]
    assert json.loads(listing("other", "--json")[1]) == []
    status, out, err = listing("nobody")
    assert (ExitStatus.ERROR, "") == (status, out)
    assert "no domain 'nobody' is running" in err
    host.xenstored.remove_domain(9)


def test_a_dead_process(listing, host):
    """Its nodes are there; its record is, too, or is not; nobody has it locked."""
    serving = host.serving(host.memory(), "xvdb")
    (row,) = json.loads(listing("--json")[1])
    assert not row["alive"]
    assert row["counters"] == {}
    assert ("memory", None) == (row["backend"], row["path"])  # as the nodes say
    assert "dead" in listing()[1].splitlines()[1].split()

    lasting = Record(host.records, serving.address)
    lasting.describe(Facts(backend="cow", path="/some/disk.raw"))
    lasting.statistics.of_queue(0).add(REQUESTS, 77)
    content = Path(lasting.path).read_bytes()
    lasting.close()
    Path(lasting.path).write_bytes(content)
    (row,) = json.loads(listing("--json")[1])
    assert not row["alive"]
    assert row["counters"]["requests"] == 77
    assert ("cow", "/some/disk.raw") == (row["backend"], row["path"])
    record.forget(host.records, serving.address)


@pytest.mark.parametrize(
    ("changed", "word"),
    [({}, "orphan"), ({"survives": False}, "dead"), ({"disk": None}, "dead")],
)
def test_an_orphan(listing, host, changed, word):
    """Another process can take over the disk of one that has died."""
    serving = host.serving(host.memory(), "xvdb")
    facts = Facts(**{"backend": "raw", "survives": True, "disk": {}, **changed})
    with Record(host.records, serving.address) as one:
        one.describe(facts)
        (row,) = json.loads(listing("--json")[1])
        assert (True, False) == (row["alive"], row["adoptable"])
        one.leave()
    (row,) = json.loads(listing("--json")[1])
    assert (False, word == "orphan") == (row["alive"], row["adoptable"])
    assert word == listing()[1].splitlines()[1].split()[4]
    record.forget(host.records, serving.address)


def test_an_orphan_of_another_version(listing, host, monkeypatch):
    serving = host.serving(host.memory(), "xvdb")
    one = Record(host.records, serving.address)
    one.describe(Facts(backend="raw", survives=True, disk={}))
    one.leave()
    monkeypatch.setattr(record, "FORMATS", ())
    assert not json.loads(listing("--json")[1])[0]["adoptable"]
    record.forget(host.records, serving.address)


def test_a_disk_that_holds_requests(listing, served):
    serving = served("xvdb")
    serving.frontend()
    words = serving.disk.statistics.of_queue(0).words
    words[HELD] = 3
    (row,) = json.loads(listing("--json")[1])
    assert (3, "connected") == (row["held"], row["state"])
    assert "holding" == listing()[1].splitlines()[1].split()[4]
    words[HELD] = 0
    assert "connected" == listing()[1].splitlines()[1].split()[4]


def test_a_record_of_nonsense(listing, host):
    serving = host.serving(host.memory(), "xvdb")
    os.makedirs(host.records, exist_ok=True)
    path = record.path_of(host.records, serving.address)
    for content in (b"", b"{", b"not json" + bytes(9000), b"[1]" + bytes(9000)):
        Path(path).write_bytes(content)
        assert listing()[0] is ExitStatus.OK
    os.unlink(path)


def test_disks_of_others_are_not_listed(listing, host):
    """The kernel's, QEMU's, and what is half there."""
    for kind, name in [("vbd", "51712"), ("qdisk", "51712"), ("vbd3", "51728"), ("vbd3", "x")]:
        host.store.write(f"/local/domain/0/backend/{kind}/5/{name}/state", "4")
    host.store.write("/local/domain/0/backend/vbd3/5/51728/xen-disk-pid", "many")
    assert listing("--json")[1] == "[]\n"
    host.store.remove("/local/domain/0/backend")


def test_states_that_are_not_there(listing, host):
    serving = host.serving(host.memory(), "xvdb", start=False)
    serving.attach()
    host.store.remove(f"{serving.address.backend}/state")
    host.store.remove(f"{serving.address.frontend}/state")
    with Record(host.records, serving.address):
        (row,) = json.loads(listing("--json")[1])
        assert (None, None) == (row["state"], row["frontend_state"])
        assert listing()[0] is ExitStatus.OK
    serving.session._clean_up(serving.observer, forced=True)


def test_address_is_what_it_was(host):
    assert record.find(host.records, Address(0, 5, 1, "vbd3")) is None


def test_a_name_of_a_file_is_one_line_and_obeyed_by_no_terminal(listing, host):
    serving = host.serving(host.memory(), "xvdb")
    with Record(host.records, serving.address) as one:
        one.describe(Facts(backend="raw", path="a\nb\x1b[2J\udcff"))
        lines = listing()[1].splitlines()
    assert 2 == len(lines)
    assert lines[1].endswith("a\\nb\\x1b[2J\\xff")
