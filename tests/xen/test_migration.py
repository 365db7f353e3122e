"""Guests that move from one dom0 to another, with a disk that both reach."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .disk import PROGRAM, block_nodes
from .guest import CAN_MOVE, PATIENCE, Guest, sh
from .peer import Peer, PeerGuest
from .test_serve import LINE, MIB, Daemon, image, pytestmark, serve, served

pytestmark = [pytestmark, pytest.mark.pair, CAN_MOVE]
__all__ = ["image", "serve"]

HERE = "192.0.2.1"
XEN_DISK = " ".join(PROGRAM)
# Ends when it is ready, and leaves it running.
SERVE_THERE = (
    "import pathlib, tempfile; from tests.xen.test_serve import Daemon; "
    "Daemon(pathlib.Path(tempfile.mkdtemp()))"
)


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Return the other host, where ``serve`` runs."""
    there = Peer()
    there.check(f"{XEN_DISK} install")
    there.check(f'python3 -c "{SERVE_THERE}"')
    yield there
    there.run("for n in $(xl list | awk 'NR > 2 {print $2}'); do xl destroy $n; done")
    there.run("pkill -f 'xen_disk_py serve'")


@pytest.fixture
def log(image: Path, tmp_path: Path) -> Iterator[Path]:
    """Return the log of an NBD server of the image, which both hosts reach at ``HERE``."""
    log = tmp_path / "nbd.log"
    where = ("-f", "-i", HERE, "-p", "10809")
    command = ["nbdkit", *where, "--filter=log", "file", str(image), f"logfile={log}"]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + PATIENCE
        while server.poll() is None and "10809" not in sh("ss", "-ltn"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield log
    finally:
        server.terminate()
        server.wait(PATIENCE)


Event = "tuple[int, str, bool, str]"


def events(log: Path) -> list[tuple[int, str, bool, str]]:
    """Return what the server was asked: connection, operation, whether it is the answer, number."""
    pattern = r"connection=(\d+) (\.\.\.)?(\w+) id=(\d+)"
    found = re.findall(pattern, log.read_text())
    return [(int(who), what, bool(end), number) for who, end, what, number in found]


@pytest.mark.timeout(1800)
def test_a_guest_moves_under_load(serve: Daemon, peer: Peer, image: Path, log: Path) -> None:
    """It notices nothing; this host has had its last write done before the other writes at all."""
    line = LINE.format("xvdb", "rw", f"nbd://{HERE}/")
    with Guest("pvh", fio=True, disks=[line]) as guest:
        guest.wait_for_device("xvdb")
        once = (
            "fio --name=load --filename=/dev/xvdb --rw=randrw --bsrange=4k-64k --iodepth=8 "
            "--allow_file_create=0 --direct=1 --ioengine=libaio --size=4M --randseed=$n "
            "--verify=crc32c --verify_fatal=1 --verify_backlog=64 --minimal"
        )
        # What it says is read on the other host, where there is no job of ours to ask for it.
        loop = f"n=1; until [ -e /tmp/enough ]; do {once} || exit 1; n=$((n+1)); done"
        guest.check(f"({loop}; echo well) > /tmp/load 2>&1 & sleep 1")
        field = "$(awk '{print $1 + $5}' /sys/block/xvdb/stat)"
        guest.wait_until(f'[ "{field}" -gt 50 ]', PATIENCE, "the load does not flow")
        domid, ours = guest.domid, {event[0] for event in events(log)}
        status, said = guest.migrate(peer.stream("xl migrate-receive"))
        assert status == 0, said + peer.run("cat $XEN_LAB_RESULTS/peer.log")[1]
        assert block_nodes(domid) == {}
        serve.wait_for("STATUS=0 disks")
        assert served() == []
        assert subprocess.run(["xl", "domid", guest.name], check=False).returncode != 0

        moved = PeerGuest(peer, "pvh", guest.name)
        before = int(moved.check(f"echo {field}"))
        moved.wait_until(f'[ "{field}" -gt {before + 50} ]', PATIENCE, "nothing flows now")
        moved.check("touch /tmp/enough")
        moved.wait_until("tail -n 1 /tmp/load | grep -qx well", 2 * PATIENCE, "the load runs")
        assert "I/O error" not in moved.dmesg()
        (disk,) = json.loads(peer.check(f"{XEN_DISK} list --json"))
        assert (disk["domid"], disk["alive"]) == (moved.domid, True)
        whole = f"dd if=/dev/xvdb bs=1M count={8 * MIB // MIB} iflag=direct 2>/dev/null | sha256sum"
        assert moved.check(whole).split()[0] == sh("sha256sum", str(image)).split()[0].lstrip("\\")
        assert peer.run(f"xl destroy {guest.name}")[0] == 0

    asked = events(log)
    writes = [(who in ours, end) for who, what, end, _ in asked if what == "Write"]
    here = [end for own, end in writes if own]
    assert here.count(True) == here.count(False) > 0
    assert (False, False) in writes
    last = max(at for at, (own, _) in enumerate(writes) if own)
    first = writes.index((False, False))
    print(
        f"{len(here) // 2} writes by this host, then {(len(writes) - len(here)) // 2} by the other"
    )
    assert last < first, "this host was not done when the other began to write"
