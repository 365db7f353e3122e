"""What is seen of a guest at work, and recorded: ``top``, ``metrics``, ``record`` and the rest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from journal import Listener

from xen_disk_py.host import journald
from xen_disk_py.trace.format import GAP, WRITE
from xen_disk_py.trace.reader import TraceReader

from .disk import PROGRAM, Disk, xen_disk
from .guest import PATIENCE, Dom0, Guest
from .test_integrity import leave
from .test_reliability import taken_over, worker

Connect = Callable[..., Disk]

MIB = 1 << 20
RESULTS = os.environ.get("XEN_LAB_RESULTS")


def run(*words: str | Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = xen_disk(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def keep(name: str, text: str) -> None:
    """Keep what a command printed: the documents show it."""
    if RESULTS is not None:
        (Path(RESULTS) / name).write_text(text)


def shown(*words: str | Path) -> Any:
    """Run a command with ``--json``."""
    return json.loads(run(*words, "--json"))


def counted(guest: Guest) -> int:
    """Return how many requests ``list`` says that the guest's only disk has done."""
    (row,) = shown("list", guest.name)
    return int(row["counters"]["requests"])


def on_a_terminal(*words: str, until: str) -> str:
    """Run a command on a terminal till it shows something, press ``q``; return all that it drew."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen([*PROGRAM, *words], stdin=its, stdout=its, env=environment) as process:
        os.close(its)
        over = threading.Timer(PATIENCE, process.kill)
        over.start()
        drawn = b""
        try:
            while until.encode() not in drawn:
                drawn += os.read(ours, 65536)
            os.write(ours, b"q")
            while process.poll() is None or not drawn.endswith(b"\x1b[?1049l"):
                drawn += os.read(ours, 65536)
        except OSError:
            assert drawn.endswith(b"\x1b[?1049l"), drawn  # the end of a terminal that nobody has
        finally:
            over.cancel()
        assert process.wait() == 0, drawn
    os.close(ours)
    return drawn.decode()


def test_top_and_metrics_show_what_a_guest_does(
    pv_guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    """While fio runs in it; and nothing of the disk when that is gone."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 * MIB))
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    job = pv_guest.spawn(
        f"fio --name=load --filename=/dev/{disk.device} --rw=randrw --bsrange=4k-64k --iodepth=8 "
        "--ioengine=libaio --direct=1 --time_based --runtime=600"
    )
    while counted(pv_guest) < 200:
        assert job.status() is None, job.output() + disk.describe()

    (row,) = shown("top", pv_guest.name, "--once")
    assert (row["domain"], row["vdev"]) == (pv_guest.name, disk.vdev)
    assert (row["backend"], row["alive"], row["errors"]) == ("raw", True, 0)
    assert row["iops"] > 0
    assert row["bytes_per_second"] > 0
    assert 0 < row["latency_p50"] <= row["latency_p99"] <= row["latency_max"] < 60
    text = run("top", "--once", "--interval", "5")
    keep("top.txt", text)
    assert re.search(rf"^{pv_guest.name} +{disk.vdev} +raw ", text, re.MULTILINE), text

    drawn = on_a_terminal("top", "--interval", "5", until=f"{pv_guest.name} ")
    keep("terminal.txt", drawn)
    assert "1 disk, " in drawn
    assert re.search(r"\x1b\[[0-9;]*1[0-9;]*m", drawn), "Rich draws no colours"

    before = counted(pv_guest)
    new = tmp_path / "xen-disk.prom"
    run("metrics", "-o", new)
    after = counted(pv_guest)
    text = new.read_text()
    keep("metrics.txt", text)
    labels = re.escape(f'backend="raw",domain="{pv_guest.name}",domid="{pv_guest.domid}"')
    values = re.findall(rf"^xen_disk_(\w+){{{labels}[^}}]*}} (\S+)$", text, re.MULTILINE)
    found = {name: float(value) for name, value in values}
    assert before <= found["requests_total"] <= after
    assert (found["up"], found["size_bytes"], found["errors_total"]) == (1, 16 * MIB, 0)
    assert found["read_bytes_total"] > 0 < found["request_duration_seconds_count"]

    job.kill()
    leave(pv_guest, disk)
    assert shown("top", pv_guest.name, "--once") == []
    assert pv_guest.name not in run("metrics")


def test_a_recording_begins_and_ends_while_the_guest_works(
    dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """What was asked between ``start`` and ``stop`` is in the trace, and nothing else."""
    image, trace = tmp_path / "disk.raw", tmp_path / "now.xdt"
    image.write_bytes(bytes(MIB))
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)

    def write(letter: str, seek: int) -> None:
        dom0.check(
            f"head -c 65536 /dev/zero | tr '\\0' {letter} | dd of=/dev/{disk.device} bs=64k "
            f"iflag=fullblock seek={seek} oflag=direct conv=notrunc,fsync 2>/dev/null"
        )

    write("a", 0)
    shutil.copy(image, tmp_path / "base.raw")
    said = [run("record", "Domain-0", disk.vdev, "start", trace, "--data")]
    write("b", 1)
    write("c", 2)
    said.append(run("record", "Domain-0", disk.vdev, "status"))
    assert shown("record", "Domain-0", disk.vdev, "status")["recording"]
    said.append(run("record", "Domain-0", disk.vdev, "stop"))
    keep("record.txt", "".join(said))
    after = hashlib.sha256(image.read_bytes()).digest()
    write("d", 3)
    leave(dom0, disk)

    facts = shown("trace", trace, "--summary")
    assert facts["operations"]["write"]["bytes"] == 2 * 65536
    keep("summary.txt", run("trace", trace, "--summary"))
    new = tmp_path / "new.raw"
    run("rewind", trace, "--base", tmp_path / "base.raw", "--at", "end", "-o", new)
    assert after == hashlib.sha256(new.read_bytes()).digest()


def test_a_recording_of_a_guest_under_load(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """It begins amid it, on a disk without a filter; what is written last is what the disk has."""
    image, first, second = tmp_path / "disk.raw", tmp_path / "1.xdt", tmp_path / "2.xdt"
    image.write_bytes(bytes(8 * MIB))
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    pv_guest.check("rm -f /tmp/enough")
    once = (
        f"fio --name=load --filename=/dev/{disk.device} --rw=randrw --bsrange=4k-64k --iodepth=16 "
        "--ioengine=libaio --direct=1 --size=2M --verify=crc32c --verify_fatal=1 --randseed=$n "
        "--minimal"
    )
    job = pv_guest.spawn(f"n=1; until [ -e /tmp/enough ]; do {once} || exit 1; n=$((n+1)); done")
    while counted(pv_guest) < 100:
        assert job.status() is None, job.output() + disk.describe()

    def record(*words: str | Path) -> Any:
        return shown("record", pv_guest.name, disk.vdev, *words)

    for trace in (first, second):
        assert record("start", trace, "--data")["recording"]
        while record("status")["requests"] < 100:
            assert job.status() is None, job.output() + disk.describe()
        if trace == first:
            assert record("stop")["lost"] == 0
    pv_guest.check("touch /tmp/enough")
    status, output = job.wait()
    assert status == 0, output + disk.describe()
    assert record("stop")["lost"] == 0
    leave(pv_guest, disk)

    shadow, is_written = bytearray(8 * MIB), bytearray(8 * MIB)
    with TraceReader(str(second)) as reader:
        records = list(reader.records(data=True))
        assert reader.ending is not None
        assert reader.ending.is_complete
    for each in records:
        assert each.operation != GAP
        assert each.status == 0
        if each.operation == WRITE:
            assert each.data is not None
            end = each.offset + each.length
            shadow[each.offset : end] = each.data
            is_written[each.offset : end] = b"\1" * each.length
    content = image.read_bytes()
    assert sum(is_written) > MIB // 4
    for at in range(0, 8 * MIB, 512):
        if is_written[at]:
            assert content[at : at + 512] == shadow[at : at + 512], at
    assert shown("trace", first, "--summary")["gaps"] == 0


class Journal:
    """Has the journal's socket; what journald understands of it is tested elsewhere."""

    def __init__(self) -> None:
        os.makedirs(os.path.dirname(journald.SOCKET), exist_ok=True)
        self._listener = Listener(journald.SOCKET)

    def next(self) -> dict[str, str]:
        """Wait for an entry."""
        return {name: value.decode() for name, value in self._listener.next().items()}

    def close(self) -> None:
        """Let nobody listen."""
        self._listener.close()
        os.unlink(journald.SOCKET)


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal()
    yield journal
    journal.close()


def test_the_journal_has_the_life_of_a_disk(
    journal: Journal, pv_guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    """Attached, connected, taken over, detached: an entry for each, in order, of this guest."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    disk = connect(pv_guest, "--supervise", "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    os.kill(worker(disk), signal.SIGKILL)
    taken_over(disk, 1)
    leave(pv_guest, disk)
    entries = [journal.next() for _ in range(4)]
    keep("journal.txt", json.dumps(entries, indent=1))
    assert [each["XEN_DISK_EVENT"] for each in entries] == [
        *("attached", "connected", "taken-over", "detached"),
    ]
    for each in entries:
        assert each["XEN_DISK_GUEST"] == pv_guest.name
        assert each["XEN_DISK_DOMID"] == str(pv_guest.domid)
        assert each["XEN_DISK_VDEV"] == disk.vdev
        assert each["XEN_DISK_BACKEND"] == "raw"
        assert each["XEN_DISK_PATH"] == str(image)
    assert "XEN_DISK_OUTCOME" in entries[-1]
