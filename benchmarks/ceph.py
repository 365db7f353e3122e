"""``rbd bench`` on a cluster of our own: what else does requests to an RBD image."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

from xen_disk_py.blkif import WRITE

from .workload import Sample

_RESULT = re.compile(r"ops:\s*([0-9]+)\s+ops/sec:\s*([0-9.]+)")
_FEWEST = 64  # requests of one run


class Image:
    """An image in the cluster."""

    def __init__(self, cluster: Any, name: str) -> None:
        self._cluster = cluster
        self.name = f"rbd/{name}"
        self.arguments = ["--path", f"rbd:{self.name}", "--option", f"conf={cluster.conf}"]

    def bench(self, operation: int, size: int, depth: int) -> Callable[[float], Sample]:
        """Return a run of random requests, without librbd's cache, which a disk has not either.

        ``rbd bench`` takes no time but an amount: what the run before would have done in that time.
        """
        way = "write" if operation == WRITE else "read"
        command = ["rbd", "bench", *self._cluster.arguments, "--rbd-cache=false"]
        command += ["--io-type", way, "--io-pattern", "rand", "--io-size", str(size)]
        command += ["--io-threads", str(depth), self.name]
        rate = 200.0

        def loop(seconds: float) -> Sample:
            nonlocal rate
            total = max(_FEWEST, int(rate * seconds)) * size
            with tempfile.TemporaryFile("w+") as said:
                process = subprocess.Popen(
                    [*command, "--io-total", str(total)], stdout=said, stderr=said
                )
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                said.seek(0)
                text = said.read()
            found = _RESULT.findall(text)
            if process.returncode or not found:
                raise RuntimeError(f"rbd bench: {text}")
            requests, rate = int(found[-1][0]), float(found[-1][1])
            return Sample(requests, requests / rate, usage.ru_utime + usage.ru_stime)

        return loop


def missing() -> str:
    """Say what this machine lacks; empty if nothing."""
    from tests.ceph import cluster

    return cluster.missing()


@contextmanager
def image(size: int) -> Iterator[Image]:
    """Start a cluster with an image of so many bytes, all of them written."""
    from tests.ceph.cluster import Cluster

    with tempfile.TemporaryDirectory(prefix="ceph-") as directory:
        cluster = Cluster(Path(directory))
        try:
            content = Path(directory, "content")
            content.write_bytes(os.urandom(size))
            cluster.rbd("import", str(content), "rbd/bench")
            yield Image(cluster, "bench")
        finally:
            cluster.close()
