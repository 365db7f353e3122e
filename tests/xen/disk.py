"""The product as the tests run it, and what must be the same before and after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Callable

from .guest import LAB, PATIENCE, RESULTS, START_SECONDS, Guest, Shell, no_errors, sh

GOLD = LAB / "guest-root.ext4"
"""An image that a guest boots from, with ``lab.root=xvda`` on its kernel's command line."""
PROGRAM = (sys.executable, "-m", "xen_disk_py")
WAITING = ("connect", "disconnect", "resize", "upgrade")
"""Commands that wait, for as long as they are told."""


class DiskError(RuntimeError):
    """The product did not do what a test needs of it; the text holds what it said."""


def xenstore_snapshot(under: str = "/") -> dict[str, str]:
    """Return xenstore as path to value, but for the two nodes that libxl leaves behind, empty."""
    snapshot = {}
    for line in sh("xenstore-ls", "-f", under, check=False).splitlines():
        path, _, value = line.partition(" = ")
        if path.startswith("/") and path not in ("/libxl", "/vm"):
            snapshot[path] = value.strip('"')
    return snapshot


def gained(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """Return the nodes that are new in the second snapshot."""
    return {path: value for path, value in after.items() if path not in before}


def lost(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """Return the nodes that are missing from the second snapshot."""
    return {path: value for path, value in before.items() if path not in after}


def left_over(before: dict[str, str], timeout: float = PATIENCE) -> dict[str, str]:
    """Return the nodes that are new since a snapshot and stay.

    Behind a guest libxl removes nodes after it has let the guest go, kernels theirs when they come
    to it.
    """
    deadline = time.monotonic() + timeout
    while True:
        new = gained(before, xenstore_snapshot())
        if not new or time.monotonic() > deadline:
            return new
        time.sleep(0.2)


def mapped_grants(pid: int) -> int:
    """Count the pages of other domains that a process has mapped through /dev/xen/gntdev."""
    pages = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "xen/gntdev" in line:
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            pages += (high - low) // 4096
    return pages


def open_files(pid: int) -> dict[int, str]:
    """Return the files that a process holds open, by descriptor."""
    files = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            files[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            continue
    return files


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def patient(arguments: Sequence[str]) -> Sequence[str]:
    """Have the product wait as long as the tests do, unless it is told how long."""
    for option, goes_with in (("--timeout", ""), ("--watchdog", "--supervise")):
        if option not in arguments and (not goes_with or goes_with in arguments):
            arguments = (*arguments, option, str(PATIENCE))
    return arguments


def xen_disk(
    *arguments: str | Path, timeout: float = 2 * PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run a command of the product to its end."""
    words: Sequence[str] = [*map(str, arguments)]
    command = [*PROGRAM, *(patient(words) if words[0] in WAITING else words)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


class Disk:
    """A running ``connect``; a context manager that always ends it and removes what it may have
    left in xenstore.
    """

    def __init__(
        self,
        guest: Shell,
        *arguments: str | Path,
        wait: bool = True,
        cwd: Path | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.guest = guest
        self.info: dict[str, Any] = {}
        self.stderr = ""
        self.stdout = ""
        self._lines = threading.Condition()
        self._before = set(block_nodes(guest.domid))
        words = patient([*map(str, arguments)])
        self.command = [*program, "connect", guest.name, *words, "--json"]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            text=True,
            errors="replace",
        )
        self._threads = [
            threading.Thread(target=self._collect, args=(name,), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for thread in self._threads:
            thread.start()
        try:
            if wait:
                self.wait_connected()
        except BaseException:
            self.close()
            raise

    def _collect(self, name: str) -> None:
        stream = getattr(self.process, name)
        for line in stream:
            with self._lines:
                setattr(self, name, getattr(self, name) + line)
                self._lines.notify_all()
        with self._lines:
            self._lines.notify_all()

    def __enter__(self) -> Disk:  # noqa: PYI034 - typing.Self came with 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def describe(self) -> str:
        """Tell what was run and what it said, for a failing test."""
        nodes = "\n".join(f"{k} = {v}" for k, v in block_nodes(self.guest.domid).items())
        said = f"stdout: {self.stdout}\nstderr: {self.stderr}"
        return f"{' '.join(self.command[2:])}\n{said}\n{nodes}"

    def wait_connected(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait for the one line on stdout and return it."""
        deadline = time.monotonic() + timeout
        with self._lines:
            while "\n" not in self.stdout:
                if self.process.poll() is not None and not self._threads[0].is_alive():
                    raise DiskError(
                        f"connect ended with status {self.process.returncode}: {self.describe()}"
                    )
                if time.monotonic() > deadline:
                    raise DiskError(f"not connected after {timeout} s: {self.describe()}")
                self._lines.wait(0.5)
        self.info = json.loads(self.stdout.splitlines()[0])
        return self.info

    def wait_stderr(self, text: str, timeout: float = PATIENCE) -> None:
        """Wait until the product has said something."""
        deadline = time.monotonic() + timeout
        with self._lines:
            while text not in self.stderr:
                if time.monotonic() > deadline or not self._threads[1].is_alive():
                    raise DiskError(f"never said {text!r}: {self.describe()}")
                self._lines.wait(0.5)

    @property
    def vdev(self) -> str:
        """The name of the disk as the toolstack has it, such as ``xvdb``."""
        return str(self.info["vdev"])

    @property
    def number(self) -> int:
        """The number of the disk, the name of its nodes in xenstore."""
        return int(self.info["number"])

    @property
    def device(self) -> str:
        """The device in the guest, without ``/dev/``."""
        return str(self.info["device"]).replace("/dev/", "")

    @property
    def size(self) -> int:
        """The size in bytes."""
        return int(self.info["size"])

    @property
    def backend(self) -> str:
        """Which backend serves it."""
        return str(self.info["backend"])

    @property
    def mode(self) -> str:
        """Whether the guest may write, as the product says it."""
        return str(self.info["mode"])

    @property
    def pid(self) -> int:
        """The process that serves it."""
        return self.process.pid

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        self.process.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end and return the status (negative: killed by that signal)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise DiskError(f"still running after {timeout} s: {self.describe()}") from None
        for thread in self._threads:
            thread.join(PATIENCE)
        return status

    def disconnect(self, timeout: float = PATIENCE) -> int:
        """Ask gracefully, as Ctrl-C does, and wait for the end."""
        self.interrupt()
        return self.wait(timeout)

    def close(self) -> None:
        """End the process whatever it takes, and take away what it has left in xenstore."""
        if self.process.poll() is None:
            self.interrupt()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for thread in self._threads:
            thread.join(10)
        with (RESULTS / "connect.log").open("a") as log:
            log.write(f"--- {self.describe()}\nstatus {self.process.returncode}\n")
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        sweep(self.guest.domid, self._before)


def block_nodes(domid: int) -> dict[str, str]:
    """Return what xenstore has about the block devices of a guest, as path to value."""
    nodes = {}
    for path in (
        *(f"/local/domain/0/backend/{kind}/{domid}" for kind in ("vbd", "vbd3", "qdisk")),
        f"/local/domain/{domid}/device/vbd",
        f"/libxl/{domid}/device/vbd",
    ):
        nodes.update(xenstore_snapshot(path))
    return nodes


def wait_offered(disk: Disk, timeout: float = PATIENCE) -> None:
    """Wait until the guest, which cannot answer yet, would find the disk."""
    deadline = time.monotonic() + timeout
    while not any("/device/vbd/" in path for path in block_nodes(disk.guest.domid)):
        if disk.process.poll() is not None or time.monotonic() > deadline:
            raise DiskError(f"not in xenstore after {timeout} s: {disk.describe()}")
        time.sleep(0.2)


def boot_and_write(
    new_guest: Callable[..., Guest], connect: Callable[..., Disk], *arguments: str | Path
) -> None:
    """Have a guest boot from a disk, change files on it, read them again, and power off.

    Created paused, connected, unpaused: the disk is there before its kernel starts.

    Args:
        new_guest: the fixture.
        connect: the fixture.
        arguments: the disk, as ``connect`` takes it; it has the files of :data:`GOLD`.
    """
    before = xenstore_snapshot()
    guest = new_guest("pv", paused=True, cmdline="lab.root=xvda")
    boot = ("--vdev", "xvda", "--timeout", str(START_SECONDS))
    disk = connect(guest, *arguments, *boot, wait=False)
    wait_offered(disk)
    guest.unpause()
    disk.wait_connected(START_SECONDS)
    guest.wait_ready()
    assert "/dev/xvda / ext4 rw" in guest.check("cat /proc/mounts"), disk.describe()
    guest.check("echo from the guest > /new && cp /new /sbin/new && rm /lab-root && sync")
    guest.check("echo 3 > /proc/sys/vm/drop_caches")
    assert guest.check("cat /new /sbin/new") == "from the guest\n" * 2
    assert guest.run("ls /lab-root")[0] != 0
    assert no_errors(guest), guest.dmesg()
    guest.shutdown()
    guest.wait_dead()
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(guest.domid) == {}
    assert left_over(before) == {}


def sweep(domid: int, before: set[str]) -> None:
    """Remove the block devices of a guest that were not there before.

    For cleaning up after a test, never for passing one.
    """
    roots = set()
    for path in block_nodes(domid):
        parts = path.split("/")
        # /local/domain/0/backend/KIND/DOMID/NUMBER, /local/domain/DOMID/device/vbd/NUMBER,
        # /libxl/DOMID/device/vbd/NUMBER
        depth = 6 if parts[1] == "libxl" else 7 if parts[4] == "device" else 8
        root = "/".join(parts[:depth])
        if len(parts) >= depth and root not in before:
            roots.add(root)
    for root in sorted(roots):
        sh("xenstore-rm", root, check=False)
