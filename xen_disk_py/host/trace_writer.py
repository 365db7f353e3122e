"""The process that writes what is left of a trace when a disk's process was killed.

It takes a few megabytes, and sleeps until then. Of what it is given, another process of the same
user gets nothing, but for the moment that Python takes to start.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from ..trace.shared import finish
from .process import set_name

_PLACE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PATIENCE = 1.0  # seconds for its start; it does no harm if it takes longer
# Isolated, and without what is installed besides: it starts in a third of the time.
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from xen_disk_py.host.privileges import hide; hide(); "
    "from xen_disk_py.host.trace_writer import main; main()"
)


def start(memory: int, trace: int, alive: int, name: str) -> None:
    """Start it, as nobody's child: whatever becomes of it, no process has to wait for it.

    Args:
        memory: descriptor of the memory that it takes from.
        trace: of the file.
        alive: of a pipe whose other end is closed when the disk's process ends.
        name: of the file, for ``ps``.

    Raises:
        OSError: it cannot be started.
    """
    numbers = (memory, trace, alive)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CODE, _PLACE, *map(str, numbers), name],
        pass_fds=numbers,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        failed = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(RuntimeError):  # without a thread it stays a zombie
            threading.Thread(target=process.wait, name="trace-start", daemon=True).start()
    else:
        if failed:
            raise OSError(errno.ECHILD, "it does not start")


def main() -> None:
    """Wait until the disk's process has ended, and finish its trace if it has not."""
    if os.fork():
        os._exit(0)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    set_name("xen-disk-trace")
    memory, trace, alive = map(int, sys.argv[2:5])
    os.read(alive, 1)  # its end
    finish(memory, trace)
