"""How patient the tests are: the one place that says how slow this machine is.

No test waits for a time to pass; what they give others is only there to tell what hangs from what
is slow. How slow things are differs by ten: emulated ARM, one processor, a host with other work.
So it is measured once, by the start of the program, and every limit is that many times as long.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

ORDINARY_SECONDS = 4.0
"""How long the program takes to start on x86, emulated by a machine with little other work."""
MOST = 6.0


def factor(seconds: float) -> float:
    """Return by how much limits are to be longer, where the program takes so long to start."""
    return min(MOST, max(1.0, seconds / ORDINARY_SECONDS))


def _measured() -> float:
    if "XEN_LAB" not in os.environ:
        return 0.0
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "xen_disk_py", "help"], capture_output=True, check=False)
    return time.monotonic() - start


SECONDS = _measured()
FACTOR = factor(SECONDS)


def patient(seconds: float) -> int:
    """Return a limit, in whole seconds, from what it is on an ordinary machine."""
    return round(seconds * FACTOR)
