"""``rbd bench`` and fio on a cluster of our own: what else does requests to an RBD image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import isinf
from pathlib import Path
from typing import Any, Callable

from xen_disk_py.blkif import WRITE

from .workload import Sample

_RESULT = re.compile(r"ops:\s*([0-9]+)\s+ops/sec:\s*([0-9.]+|inf)")
_FEWEST = 64  # requests of one run


class Image:
    """An image in the cluster."""

    def __init__(self, cluster: Any, name: str) -> None:
        self._cluster = cluster
        self.name = f"rbd/{name}"
        self.path, self.option = f"rbd:{self.name}", f"conf={cluster.conf}"
        self.arguments = ["--path", self.path, "--option", self.option]

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
            found: list[tuple[str, str]] = []
            status = 0
            while not status and (not found or isinf(float(found[-1][1]))):  # it took no time
                total = max(_FEWEST, int(rate * seconds)) * size
                text, status, cpu = _run([*command, "--io-total", str(total)])
                found = _RESULT.findall(text)
                rate *= 8
            if status or not found:
                raise RuntimeError(f"rbd bench: {text}")
            requests, rate = int(found[-1][0]), float(found[-1][1])
            return Sample(requests, requests / rate, cpu)

        return loop

    def fio(self, operation: int, size: int, depth: int) -> Callable[[float], Sample]:
        """Return a run of random requests by fio's rbd engine, without a cache as well."""
        way = "write" if operation == WRITE else "read"
        pool, _, name = self.name.partition("/")
        command = ["fio", "--name=j", "--ioengine=rbd", "--clientname=admin", f"--pool={pool}"]
        command += [f"--rbdname={name}", f"--rw=rand{way}", f"--bs={size}", f"--iodepth={depth}"]
        command += ["--time_based", "--output-format=json"]
        conf = self._cluster.conf.with_name("uncached.conf")  # fio has no option for that
        conf.write_text(self._cluster.conf.read_text() + "rbd cache = false\n")
        environment = {**os.environ, "CEPH_CONF": str(conf)}

        def loop(seconds: float) -> Sample:
            text, status, cpu = _run([*command, f"--runtime={int(seconds * 1000)}ms"], environment)
            if status:
                raise RuntimeError(f"fio: {text}")
            done = json.loads(text[text.index("{") :])["jobs"][0][way]
            return Sample(done["total_ios"], done["runtime"] / 1000, cpu)

        return loop


def _run(command: list[str], environment: dict[str, str] | None = None) -> tuple[str, int, float]:
    """Run a command: what it said, its status, and its processor time in seconds."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return said.read(), process.returncode, usage.ru_utime + usage.ru_stime


def missing() -> str:
    """Say what this machine lacks; empty if nothing."""
    from tests.ceph import cluster

    return cluster.missing() or ("" if shutil.which("fio") else "needs fio")


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
