"""Guests that move from one dom0 to another, with a disk that both reach."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from .disk import PROGRAM, block_nodes
from .guest import CAN_MOVE, PATIENCE, Guest, Shell, sh
from .peer import Peer, PeerGuest
from .test_serve import LINE, MIB, Daemon, image, serve, served
from .test_serve import pytestmark as needs_serve

pytestmark = [needs_serve, pytest.mark.pair, CAN_MOVE]
__all__ = ["image", "serve"]

HERE = "192.0.2.1"
XEN_DISK = " ".join(PROGRAM)
# Ends when it is ready, leaves it running, and says who it is.
SERVE_THERE = (
    "import pathlib, tempfile; from tests.xen.test_serve import Daemon; "
    "print(Daemon(pathlib.Path(tempfile.mkdtemp())).process.pid)"
)
READ_AND_WRITTEN = "$(awk '{print $1 + $5}' /sys/block/xvdb/stat)"


class Host(Peer):
    """The other host, where ``serve`` runs."""

    def __init__(self) -> None:
        self.check(f"{XEN_DISK} install")
        self.serve()

    def serve(self) -> None:
        """Start it, and wait until it is ready."""
        self._pid = int(self.check(f'python3 -c "{SERVE_THERE}"').split()[-1])

    def kill(self, name: str = "TERM") -> None:
        """Send it a signal, and wait for its end."""
        gone = f"[ ! -e /proc/{self._pid} ] || grep -q 'State:.Z' /proc/{self._pid}/status"
        self.check(f"kill -{name} {self._pid}")
        self.wait_until(gone, PATIENCE, "serve runs on")

    def guests(self) -> list[str]:
        """Return their domain ids."""
        return self.check("xl list | awk 'NR > 2 {print $2}'").split()


@pytest.fixture
def peer() -> Iterator[Host]:
    """Return the other host; nothing of a test is left there."""
    there = Host()
    yield there
    for guest in there.guests():
        there.run(f"xl destroy {guest}")
    there.kill()


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


def events(log: Path) -> list[tuple[int, str, bool]]:
    """Return what the server was asked, in order: connection, what, whether it is the answer."""
    found = re.findall(r"connection=(\d+) (\.\.\.)?(\w+)", log.read_text())
    return [(int(who), what, bool(end)) for who, end, what in found]


def move(guest: Guest, peer: Host) -> tuple[int, str]:
    """Move a guest there; return xl's status and what both sides said."""
    status, said = guest.migrate(peer.stream("xl migrate-receive"))
    return status, said + peer.check("tail -n 50 $XEN_LAB_RESULTS/peer.log")


def begin_load(guest: Guest) -> None:
    """Write and verify without end, or until an error."""
    guest.wait_for_device("xvdb")
    once = (
        "fio --name=load --filename=/dev/xvdb --rw=randrw --bsrange=4k-64k --iodepth=8 "
        "--allow_file_create=0 --direct=1 --ioengine=libaio --size=4M --randseed=$n "
        "--verify=crc32c --verify_fatal=1 --verify_backlog=64 --minimal"
    )
    # What it says is read on the other host, where there is no job of ours to ask for it.
    loop = f"n=1; until [ -e /tmp/enough ]; do {once} || exit 1; n=$((n+1)); done"
    guest.check(f"({loop}; echo well) > /tmp/load 2>&1 & sleep 1")
    flows(guest)


def flows(shell: Shell) -> None:
    """Wait until fifty requests more are done."""
    before = int(shell.check(f"echo {READ_AND_WRITTEN}"))
    shell.wait_until(f'[ "{READ_AND_WRITTEN}" -gt {before + 50} ]', PATIENCE, "nothing flows")


def arrived_well(guest: Guest, peer: Host, content: Callable[[], bytes]) -> None:
    """See that the guest continues there, has noticed nothing, and that no byte is lost."""
    assert subprocess.run(["xl", "domid", guest.name], check=False).returncode != 0
    moved = PeerGuest(peer, guest.kind, guest.name)
    flows(moved)
    moved.check("touch /tmp/enough")
    moved.wait_until("tail -n 1 /tmp/load | grep -qx well", 2 * PATIENCE, "the load runs")
    assert "I/O error" not in moved.dmesg()
    (disk,) = json.loads(peer.check(f"{XEN_DISK} list --json"))
    assert (disk["domid"], disk["alive"]) == (moved.domid, True)
    whole = f"dd if=/dev/xvdb bs=1M count={8 * MIB // MIB} iflag=direct 2>/dev/null | sha256sum"
    assert moved.check(whole).split()[0] == hashlib.sha256(content()).hexdigest()
    assert peer.run(f"xl destroy {guest.name}")[0] == 0


@pytest.mark.timeout(1800)
def test_a_guest_moves_under_load(serve: Daemon, peer: Host, image: Path, log: Path) -> None:
    """It notices nothing; this host has had its last write done before the other writes at all.

    That is the order in which the server was asked. Nothing forces it: both hosts are connected
    then, and of a write that storage holds up here the other host knows nothing.
    """
    with Guest("pvh", fio=True, disks=[LINE.format("xvdb", "rw", f"nbd://{HERE}/")]) as guest:
        begin_load(guest)
        domid, ours = guest.domid, {event[0] for event in events(log)}
        status, said = move(guest, peer)
        assert status == 0, said
        assert block_nodes(domid) == {}
        serve.wait_for("STATUS=0 disks")
        assert served() == []
        arrived_well(guest, peer, image.read_bytes)

    asked = [(who in ours, what, end) for who, what, end in events(log)]
    begun, done = asked.count((True, "Write", False)), asked.count((True, "Write", True))
    assert begun == done > 0
    first = asked.index((False, "Write", False))
    still = len(ours) - asked[:first].count((True, "Disconnect", False))
    print(
        f"{done} writes by this host, then {asked.count((False, 'Write', True))} by the other; "
        f"then {still} of this host's {len(ours)} connections were open"
    )
    late = {what for own, what, _ in asked[first:] if own}
    print(f"after the other's first write this host asked for {sorted(late)}")
    assert not late & {"Write", "Trim", "Zero"}, "this host was not done when the other began"


@pytest.mark.timeout(2700)
def test_what_dies_on_the_other_host(serve: Daemon, peer: Host, image: Path, log: Path) -> None:
    """Without ``serve`` the guest stays. With it, it moves, though the disk's process dies."""
    with Guest("pvh", fio=True, disks=[LINE.format("xvdb", "rw", f"nbd://{HERE}/")]) as guest:
        begin_load(guest)
        domid = guest.domid
        peer.kill("KILL")
        status, said = move(guest, peer)
        assert status != 0
        assert "resuming at sender" in said, said
        assert guest.domid == domid
        assert [row["domid"] for row in served()] == [domid]
        flows(guest)
        assert "I/O error" not in guest.dmesg()
        assert peer.guests() == []
        assert peer.run("xenstore-exists /local/domain/0/backend/vbd3")[0] != 0

        peer.serve()
        # The guest gets it when all its memory is there, and runs a moment later.
        nodes = "xenstore-ls -f /local/domain/0/backend/vbd3 2>&1"
        ready = f"{nodes} | grep -q 'hotplug-status = .connected'"
        kill = f"until {ready}; do sleep 0.2; done; pkill -KILL -f '^xen-disk adopt '"
        peer.check(f"setsid sh -c {shlex.quote(kill)} > /tmp/killed 2>&1 & echo")
        status, said = move(guest, peer)
        assert status == 0, said
        assert "another process takes over" in peer.check("cat $XEN_LAB_RESULTS/serve.log")
        serve.wait_for("STATUS=0 disks")
        arrived_well(guest, peer, image.read_bytes)
