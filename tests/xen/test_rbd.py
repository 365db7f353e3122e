"""Disks in a Ceph cluster that two dom0s reach, and the exclusive lock that goes with the guest."""

from __future__ import annotations

import os
import shlex
import time

import pytest

from . import rbd
from .disk import block_nodes
from .guest import CAN_MOVE, PATIENCE, Dom0, Guest
from .test_migration import Host, arrived_well, begin_load, move, peer
from .test_serve import LINE, MIB, Daemon, serve, served, xl
from .test_serve import pytestmark as needs_serve

pytestmark = [
    needs_serve,
    pytest.mark.pair,
    CAN_MOVE,
    pytest.mark.skipif(not rbd.CONF.exists(), reason="needs a Ceph cluster: the lab's --ceph"),
]
__all__ = ["peer", "serve"]

AWAY = 120
"""Seconds that a host is cut off."""
LOCKED = "another client has the exclusive lock (rbd lock ls rbd/{})"


@pytest.fixture
def image(request: pytest.FixtureRequest) -> str:
    """Return the name of an image of 8 MiB in the pool ``rbd``."""
    name = f"disk-of-{request.node.name.replace('_', '-')}"
    rbd.create(name, os.urandom(8 * MIB))
    return name


def line(image: str) -> str:
    """Return xl's line of the disk."""
    return LINE.format("xvdb", "rw", f"rbd:rbd/{image},option.conf={rbd.CONF}")


@pytest.mark.timeout(1800)
def test_a_guest_moves_with_its_lock(serve: Daemon, peer: Host, image: str) -> None:
    """Under load; the other host has the lock, and writes, when this host's writes are all done.

    As long as the guest is here, the other host can give the disk to none of its own.
    """
    with Guest("pvh", fio=True, disks=[line(image)]) as guest:
        begin_load(guest)
        domid = guest.domid
        status, said = peer.run(f"xl block-attach 0 {shlex.quote(line(image))}")
        assert status != 0, said
        # xl says it, too, unless the machine is so slow that its 10 s are over before
        refused = f"grep -qF {shlex.quote(LOCKED.format(image))} $XEN_LAB_RESULTS/serve.log"
        peer.wait_until(refused, PATIENCE, "it is not refused")
        peer.wait_until("xl block-detach 0 xvdb", PATIENCE, "it is not taken away")

        before = len(rbd.events())
        status, said = move(guest, peer)
        assert status == 0, said
        assert block_nodes(domid) == {}
        serve.wait_for("STATUS=0 disks")
        assert served() == []
        arrived_well(guest, peer, lambda: rbd.content(image))

    events = rbd.events()[before:]
    ours = [event.is_answer for event in events if event[:2] == (1, "write")]
    assert 0 < len(ours) == 2 * sum(ours)
    released = events.index(rbd.Event(1, "unlock", False))
    taken = events.index(rbd.Event(2, "lock", True))
    first = events.index(rbd.Event(2, "write", False))
    assert released < taken < first
    late = [event for event in events[released:] if event[:2] == (1, "write")]
    assert not late, "this host was not done when it gave the lock back"
    theirs = events.count(rbd.Event(2, "write", True))
    print(f"{len(ours) // 2} writes by this host, unlock, lock, {theirs} writes by the other")


@pytest.mark.timeout(1200)
def test_a_host_that_is_cut_off(serve: Daemon, peer: Host, image: str, dom0: Dom0) -> None:
    """Its lock is broken when the cluster has not heard of it for 30 s; it writes no more then.

    Each dom0 is a guest of itself.
    """
    attach = ["block-attach", "0", line(image)]
    peer.check(f"modprobe xen-blkfront; xl {shlex.join(attach)}")
    peer.wait_until("[ -b /dev/xvdb ]", PATIENCE, "no disk")
    write = "dd if=/dev/zero of=/dev/xvdb bs=4k seek=7 count=1 oflag=direct conv=notrunc"
    loop = f"until [ -e /tmp/enough ]; do {write} || sleep 1; done"
    peer.check(f"rm -f /tmp/enough; setsid sh -c {shlex.quote(loop)} > /tmp/writes 2>&1 & echo")
    peer.wait_until("[ $(grep -c copied /tmp/writes) -gt 5 ]", PATIENCE, "nothing is written")
    away = f"sleep 2; ip link set eth0 down; sleep {AWAY}; ip link set eth0 up"
    peer.check(f"setsid sh -c {shlex.quote(away)} > /dev/null 2>&1 & echo")
    cut = time.monotonic() + 2
    time.sleep(5)

    status = 1
    while status:
        status, said = xl(*attach)
        print(f"{time.monotonic() - cut:.0f} s after the cut: {status} {said}")
        if status:
            assert time.monotonic() - cut < PATIENCE
            xl("block-detach", "0", "xvdb")
            time.sleep(2)
    dom0.wait_for_device("xvdb")
    data = os.urandom(8 * MIB)
    with open("/dev/xvdb", "r+b") as disk:
        disk.write(data)
        disk.flush()
        os.fsync(disk.fileno())
    assert rbd.content(image) == data

    time.sleep(max(0.0, cut + AWAY + 2 - time.monotonic()))
    broken = "grep -q 'broke our lock' $XEN_LAB_RESULTS/serve.log"
    peer.wait_until(broken, PATIENCE, "it does not know that its lock is another's")
    peer.check("touch /tmp/enough; xl block-detach 0 xvdb")
    assert rbd.content(image) == data
    assert xl("block-detach", "0", "xvdb")[0] == 0
    serve.wait_for("STATUS=0 disks")
