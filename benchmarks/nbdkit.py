"""nbdkit, driven by fio through libnbd: what else serves a disk from a few lines of Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

from xen_disk_py.blkif import WRITE

from .results import output
from .workload import Sample, cpu_seconds


def version() -> str:
    """Return its version and fio's, or what is missing."""
    missing = [name for name in ("nbdkit", "fio") if not shutil.which(name)]
    if missing:
        return f"not measured: {' and '.join(missing)} not installed"
    return f"{output('nbdkit', '--version')}, {output('fio', '--version')}"


class Server:
    """A running nbdkit."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self._process = process
        self._uri = f"nbd+unix:///?socket={socket}"

    def fio(self, operation: int, size: int, depth: int) -> Callable[[float], Sample]:
        """Return a run of random requests."""
        way = "randwrite" if operation == WRITE else "randread"
        options = [f"--rw={way}", f"--bs={size}", f"--iodepth={depth}", f"--uri={self._uri}"]
        command = ["fio", "--name=j", "--ioengine=nbd", *options, "--output-format=json"]

        def loop(seconds: float) -> Sample:
            cpu = cpu_seconds(self._process.pid)
            runtime = ["--time_based", f"--runtime={int(seconds * 1000)}ms"]
            result = subprocess.run([*command, *runtime], stdout=subprocess.PIPE, check=True)
            cpu = cpu_seconds(self._process.pid) - cpu
            text = result.stdout.decode()
            job = json.loads(text[text.index("{") :])["jobs"][0]
            half = job["write" if operation == WRITE else "read"]
            return Sample(half["total_ios"], half["runtime"] / 1000, cpu)

        return loop


@contextmanager
def served(*plugin: str) -> Iterator[Server]:
    """Run nbdkit with a plugin and its parameters."""
    with tempfile.TemporaryDirectory(prefix="nbdkit-") as directory:
        socket = Path(directory) / "socket"
        process = subprocess.Popen(["nbdkit", "--foreground", "--unix", str(socket), *plugin])
        try:
            while not socket.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"nbdkit ended with status {process.returncode}")
                time.sleep(0.01)
            yield Server(process, socket)
        finally:
            process.terminate()
            process.wait()
