"""A Ceph cluster beside the machines of a pair, and the network that joins all three.

The lab goes into a network namespace of its own for it, with a bridge that nobody else is on.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from .machine import LabError
from .recipe import CHECKOUT

ADDRESS = "192.0.2.9"
CONF = "ceph.conf"
"""What a machine's share has for clients."""
_CLONE_NEWNET = 0x4000_0000


@contextmanager
def ceph(share: Path) -> Iterator[None]:
    """Join machines 1 and 2 to a cluster, whose files are in ``share/ceph``.

    Raises:
        LabError: this machine lacks something.
    """
    sys.path.append(str(CHECKOUT / "tests"))
    made = import_module("ceph.cluster")
    if reason := made.missing():
        raise LabError(f"--ceph {reason}")
    _make_network()
    directory = share / "ceph"
    directory.mkdir()
    # The OSD notes what it is asked, and by whom.
    cluster = made.Cluster(directory, ADDRESS, debug_ms="1/1", debug_osd="10/10", log_max_recent=1)
    try:
        lines = [f"mon host = {cluster.addresses}"]
        lines += [f"auth {what} required = none" for what in ("cluster", "service", "client")]
        for place in (share, share / "peer"):
            (place / CONF).write_text("\n".join(["[global]", *lines, ""]))
        yield
    finally:
        cluster.close()


def _make_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise LabError(f"no network namespace: {os.strerror(number)}")
    steps = ["link set lo up", "link add lab type bridge", f"address add {ADDRESS}/24 dev lab"]
    steps.append("link set lab up")
    for number in (1, 2):
        steps.append(f"tuntap add lab{number} mode tap")
        steps.append(f"link set lab{number} master lab up")
    for step in steps:
        subprocess.run(["ip", *step.split()], check=True)
