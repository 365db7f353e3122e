"""Connect and disconnect many times in one process; print what it holds after each time.

``python -m tests.xen.churn 50`` prints lines of: descriptors, pages mapped, resident bytes. The
disk is domain 0's own, whose block driver reads a little of each.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment

from .disk import mapped_grants, open_files, patient, resident
from .guest import PATIENCE


class Announced(io.StringIO):
    """Takes the line that tells of the disk, then has somebody use the disk and press Ctrl-C."""

    def write(self, text: str) -> int:
        if text.startswith("{"):
            device = json.loads(text)["device"]
            threading.Thread(target=use, args=(device,)).start()
        return len(text)


def use(device: str) -> None:
    """Read from the disk, then end the session."""
    size = Path(f"/sys/block/{Path(device).name}/size")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if size.exists() and size.read_text() != "0\n" and Path(device).exists():
            with open(device, "rb", buffering=0) as file:
                file.read(1 << 16)
            break
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def churn(times: int) -> None:
    """Do it, and print."""
    pid = os.getpid()
    for _ in range(times):
        env = Environment(stdout=Announced())
        words = patient(["connect", "0", "--json", "--quiet", "--size", "16M"])
        status = main(list(words), env)
        if status:
            sys.exit(status)
        gc.collect()
        print(len(open_files(pid)), mapped_grants(pid), resident(pid), flush=True)


if __name__ == "__main__":
    churn(int(sys.argv[1]))
