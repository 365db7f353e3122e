"""nbdkit and qemu-nbd, driven by fio through libnbd: what else serves a disk on this host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Callable

from xen_disk_py.blkif import WRITE
from xen_disk_py.host.process import end_with_parent

from .results import output
from .workload import Sample, cpu_seconds

_SOCKET = "{socket}"
"""In a command line: where the socket's name goes."""


def version() -> str:
    """Return its version and fio's, or what is missing."""
    missing = [name for name in ("nbdkit", "fio") if not shutil.which(name)]
    if missing:
        return f"not measured: {' and '.join(missing)} not installed"
    return f"{output('nbdkit', '--version')}, {output('fio', '--version')}"


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self._process = process
        self.uri = f"nbd+unix:///?socket={socket}"

    def fio(
        self, operation: int, size: int, depth: int, *, counts_client: bool = False
    ) -> Callable[[float], Sample]:
        """Return a run of random requests.

        Args:
            operation: READ or WRITE.
            size: of each, in bytes.
            depth: how many at once.
            counts_client: the processor time is fio's own, not the server's.
        """
        way = "randwrite" if operation == WRITE else "randread"
        options = [f"--rw={way}", f"--bs={size}", f"--iodepth={depth}", f"--uri={self.uri}"]
        command = ["fio", "--name=j", "--ioengine=nbd", *options, "--output-format=json"]

        def loop(seconds: float) -> Sample:
            cpu = cpu_seconds(self._process.pid)
            runtime = ["--time_based", f"--runtime={int(seconds * 1000)}ms"]
            result = subprocess.run([*command, *runtime], stdout=subprocess.PIPE, check=True)
            cpu = cpu_seconds(self._process.pid) - cpu
            text = result.stdout.decode()
            job = json.loads(text[text.index("{") :])["jobs"][0]
            half = job["write" if operation == WRITE else "read"]
            if counts_client:
                cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * half["runtime"] / 1000
            return Sample(half["total_ios"], half["runtime"] / 1000, cpu)

        return loop


def has(plugin: str) -> bool:
    """Tell whether nbdkit is here, and has a plugin: each is a package of its own."""
    try:
        command = ["nbdkit", plugin, "--version"]
        return not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return False


def served(*plugin: str) -> AbstractContextManager[Server]:
    """Run nbdkit with a plugin and its parameters."""
    return _served("nbdkit", "--foreground", "--unix", _SOCKET, *plugin)


def served_by_qemu(path: str, image_format: str) -> AbstractContextManager[Server]:
    """Run qemu-nbd on an image, whose format is called as QEMU calls it."""
    return _served("qemu-nbd", f"--format={image_format}", "--persistent", "-k", _SOCKET, path)


@contextmanager
def _served(*command: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory:
        socket = Path(directory) / "socket"
        words = [str(socket) if word == _SOCKET else word for word in command]
        process = subprocess.Popen(
            words,
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 we have no threads
        )
        try:
            while not socket.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
                time.sleep(0.01)
            yield Server(process, socket)
        finally:
            process.terminate()
            process.wait()
