"""Guests for the tests, driven over their console; and dom0, which can be a guest of itself.

Every guest runs the lab's own init (``lab/image/guest-init``): a shell that reads commands from the
console with neither echo nor prompt. :meth:`Guest.run` has it evaluated in a subshell, so that not
even a syntax error harms the shell itself, and reads up to a mark that no other output contains.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import select
import shlex
import subprocess
import threading
import time
import tty
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from .pace import patient

LAB = Path(os.environ.get("XEN_LAB", "/opt/lab"))
RESULTS = Path(os.environ.get("XEN_LAB_RESULTS", "/run/lab"))
READY = "lab: guest ready"
PATIENCE = patient(180)
"""Seconds after which what has not happened hangs: anything may stand still for a while here."""
START_SECONDS = patient(300)
SAVE_SECONDS = patient(300)
# nosoftlockup: its message, of the gravest kind, would come amid what commands print
KERNEL_OPTIONS = (
    "console=hvc0 quiet mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on nosoftlockup"
)
IS_ARM = platform.machine() == "aarch64"
CAN_MOVE = pytest.mark.skipif(IS_ARM, reason="xl on ARM has no save, restore and migrate")
_BOOTS = 3
_numbers = itertools.count(1)


class GuestError(RuntimeError):
    """A guest did not do what a test needs of it."""


class GuestDied(GuestError):
    """A guest came to its end while it booted."""


def sh(*command: str, timeout: float = PATIENCE, check: bool = True) -> str:
    """Run a program in dom0 and return what it printed."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
    )
    output = result.stdout.decode(errors="replace")
    if check and result.returncode:
        raise GuestError(f"{shlex.join(command)}: status {result.returncode}: {output.strip()}")
    return output


def no_errors(guest: Shell) -> bool:
    """Tell whether the guest's kernel knows of no error of any disk."""
    return not re.search("I/O error|blkfront.*(fail|error)|EXT4-fs.*error", guest.dmesg())


class Shell:
    """What a guest and dom0 have in common: commands, background jobs and block devices."""

    name: str
    domid: int
    is_shared = False
    """Whether other tests follow in it."""
    _insert_blkfront = "insmod /modules/xen_blkfront.ko"

    def run(self, command: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Run a shell command there; return its status and everything it printed."""
        raise NotImplementedError

    def check(self, command: str, timeout: float = PATIENCE) -> str:
        """Run a command that must succeed, and return what it printed."""
        status, output = self.run(command, timeout)
        if status:
            raise GuestError(f"{self.name}: {command!r} ended with status {status}:\n{output}")
        return output

    def unload_blkfront(self) -> None:
        """Take the block driver out, as soon as it has no disk any longer."""
        # It is in use a moment longer than its last disk is there.
        gone = "[ ! -e /sys/module/xen_blkfront ]"
        self.wait_until(f"rmmod xen_blkfront 2>/dev/null || {gone}", PATIENCE, "blkfront is in use")

    def load_blkfront(self, **parameters: int) -> None:
        """Load the block driver anew, with module parameters; without any, as it always is."""
        self.unload_blkfront()
        words = " ".join(f"{name}={value}" for name, value in parameters.items())
        self.check(f"{self._insert_blkfront} {words}")

    def spawn(self, command: str) -> Job:
        """Start a command in the background."""
        number = next(_numbers)
        base = f"/tmp/job-{number}"
        ending = f"echo $? > {base}.tmp; mv {base}.tmp {base}.status"
        script = f"({command}) > {base}.out 2>&1 < /dev/null; {ending}"
        pid = self.check(f"setsid sh -c {shlex.quote(script)} > /dev/null 2>&1 & echo $!").strip()
        return Job(self, base, int(pid))

    def wait_until(self, condition: str, timeout: float, what: str) -> None:
        """Poll a shell condition, there rather than from here, until it holds."""
        loops = max(1, int(timeout * 5))
        poll = (
            f"n=0; until {condition}; do n=$((n+1)); [ $n -gt {loops} ] && exit 99; sleep 0.2; done"
        )
        status, output = self.run(poll, timeout * 3 + 30)
        if status:
            raise GuestError(
                f"{self.name}: {what} after {timeout} s; {output}\n{self.dmesg()[-2000:]}"
            )

    def wait_for_device(self, device: str, timeout: float = PATIENCE) -> None:
        """Wait until a block device such as ``xvdb`` is there with its size."""
        sectors = f"/sys/block/{device}/size"
        # Linux makes the device's file a moment before it can be opened.
        opens = f"true 2>/dev/null < /dev/{device}"
        self.wait_until(
            f'[ -b /dev/{device} ] && [ "$(cat {sectors})" != 0 ] && {opens}',
            timeout,
            f"no /dev/{device}",
        )

    def wait_gone(self, device: str, timeout: float = PATIENCE) -> None:
        """Wait until a block device has left."""
        self.wait_until(f"[ ! -e /sys/block/{device} ]", timeout, f"/dev/{device} is still there")

    def dmesg(self) -> str:
        """Return the kernel's log there."""
        return self.run("dmesg")[1]

    def uptime(self) -> float:
        """Return the seconds since boot there, a clock for measurements (busybox ``dd`` prints no
        rate).
        """
        return float(self.check("cat /proc/uptime").split()[0])


class Job:
    """A command running in the background of a guest."""

    def __init__(self, shell: Shell, base: str, pid: int) -> None:
        self.shell = shell
        self.pid = pid
        self._base = base

    def status(self) -> int | None:
        """Return the job's exit status, or None while it runs."""
        text = self.shell.run(f"cat {self._base}.status 2>/dev/null")[1].strip()
        return int(text) if text else None

    def output(self) -> str:
        """Return what the job has printed so far."""
        return self.shell.run(f"cat {self._base}.out")[1]

    def wait(self, timeout: float = PATIENCE) -> tuple[int, str]:
        """Wait for the end; return status and output."""
        self.shell.wait_until(f"[ -e {self._base}.status ]", timeout, "a background job still runs")
        status = self.status()
        if status is None:
            raise GuestError("a job without a status")
        return status, self.output()

    def kill(self) -> None:
        """Kill the job and all it started."""
        self.shell.run(f"kill -9 -{self.pid}")


class Dom0(Shell):
    """Domain 0 as a guest: a disk connected to it appears in dom0 itself once blkfront is loaded
    there.
    """

    name = "Domain-0"
    domid = 0
    is_shared = True
    _insert_blkfront = "modprobe xen-blkfront"

    def run(self, command: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Run a shell command in dom0."""
        try:
            result = subprocess.run(
                ["sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise GuestError(
                f"Domain-0: {command!r} still runs after {timeout} s:\n{said[-2000:]}"
            ) from None
        return result.returncode, result.stdout.decode(errors="replace")


class Guest(Shell):
    """A guest made with ``xl create``; a context manager that destroys it.

    Args:
        kind: "pv" or "pvh".
        vcpus: number of virtual processors.
        memory: MiB.
        fio: put fio into the guest (its libraries are 80 MB: more memory, a later start).
        cmdline: more words for the kernel's command line; ``lab.noblkfront`` leaves the block
            frontend out, ``lab.root=xvda`` waits for that disk and makes it the root.
        disks: ``disk`` lines of the configuration, as xl takes them.
        ramdisk: the initial RAM disk, instead of the lab's own.
        kernel: what to start instead of Linux, such as GRUB, with neither initial RAM disk nor
            command line.
        paused: leave it paused; then :meth:`unpause` and :meth:`wait_ready` are the caller's.
        name: its name, otherwise a unique one.
        on_reboot: what xl does when it reboots.
    """

    def __init__(
        self,
        kind: str = "pv",
        *,
        vcpus: int = 1,
        memory: int | None = None,
        fio: bool = False,
        cmdline: str = "",
        disks: Sequence[str] = (),
        ramdisk: Path | None = None,
        kernel: Path | None = None,
        paused: bool = False,
        name: str | None = None,
        on_reboot: str = "destroy",
    ) -> None:
        kind = "pvh" if IS_ARM else kind  # Xen knows but one kind there
        self._begin(kind, name or f"{kind}-{next(_numbers)}")
        linux = {
            "kernel": str(LAB / "vmlinuz"),
            "ramdisk": str(ramdisk or LAB / ("guest-fio.cpio" if fio else "guest.cpio")),
            "cmdline": f"{KERNEL_OPTIONS} {cmdline}".strip(),
        }
        settings = {
            "name": self.name,
            "type": kind,
            **(linux if kernel is None else {"kernel": str(kernel)}),
            "memory": memory or (384 if fio else 192),
            "vcpus": vcpus,
            "on_crash": "preserve",
            "on_reboot": on_reboot,
            "disk": list(disks),
        }
        directory = Path("/run/lab/guests")
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / f"{self.name}.cfg"
        config.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
        self._create(config, paused)

    def _begin(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self.domid = -1
        self.console = ""
        self._marks = itertools.count(1)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tty = self._stop = self._stop_writer = -1
        self._reader: threading.Thread | None = None

    @classmethod
    def running(cls, kind: str, name: str) -> Guest:
        """Return a guest, of any kind, that something else has started."""
        guest = cls.__new__(cls)
        guest._begin(kind, name)
        guest.domid = int(sh("xl", "domid", name).strip())
        guest._attach_console()
        return guest

    def _create(self, config: Path, paused: bool) -> None:
        for boot in range(1, _BOOTS + 1):
            try:
                sh("xl", "create", "-p", str(config), timeout=START_SECONDS)
                self.domid = int(sh("xl", "domid", self.name).strip())
                self._attach_console()
                if not paused:
                    self.unpause()
                    self.wait_ready()
            except BaseException as error:
                self.destroy()
                # Emulated, a PVH guest dies of a triple fault once in a while.
                if self.kind != "pvh" or not isinstance(error, GuestDied) or boot == _BOOTS:
                    raise
                self.console = ""
            else:
                return

    def __enter__(self) -> Guest:  # noqa: PYI034 - typing.Self came with 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    # -- life --------------------------------------------------------------------------------------
    # ------------------

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Wait until the guest's shell takes commands.

        Raises:
            GuestDied: it will not any more.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._wait_console(re.compile(re.escape(READY)), 0, 10, "is not ready")
            except GuestError as error:
                if self.has_died():
                    raise GuestDied(f"{error}\n(it has died)") from None
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def alive(self) -> bool:
        """Tell whether the domain still exists."""
        return (
            self.domid >= 0
            and subprocess.run(
                ["xl", "domid", self.name], capture_output=True, check=False
            ).returncode
            == 0
        )

    def has_died(self) -> bool:
        """Tell whether the domain has gone, or is only kept to be looked at."""
        if not self.alive():
            return True
        row = sh("xl", "list", str(self.domid), check=False).splitlines()[-1].split()
        return len(row) == 6 and "c" in row[4]  # crashed: name, id, memory, VCPUs, state, time

    def pause(self) -> None:
        """Stop the guest's processors."""
        sh("xl", "pause", str(self.domid))

    def unpause(self) -> None:
        """Let the guest's processors run again."""
        sh("xl", "unpause", str(self.domid))

    def checkpoint(self, path: Path) -> None:
        """Write the guest to a file, for which it stands still; then it continues."""
        sh("xl", "save", "-c", str(self.domid), str(path), timeout=SAVE_SECONDS)

    def save(self, path: Path) -> None:
        """Write the guest to a file, and with that end the domain."""
        sh("xl", "save", str(self.domid), str(path), timeout=SAVE_SECONDS)
        self._detach_console()

    def restore(self, path: Path) -> None:
        """Make a domain of what :meth:`save` wrote: with another id, and paused."""
        sh("xl", "restore", "-p", str(path), timeout=SAVE_SECONDS)
        self.domid = int(sh("xl", "domid", self.name).strip())
        self._attach_console()

    def migrate(self, rune: str = "xl migrate-receive") -> tuple[int, str]:
        """Move it, running; return xl's status and what it said.

        It is another domain afterwards, unless that failed, and not here, if it went elsewhere.

        Args:
            rune: what receives it, by xl's word for it; otherwise this same host.
        """
        command = ["xl", "migrate", "-s", "", self.name, rune]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=SAVE_SECONDS,
            check=False,
        )
        if done.returncode == 0:
            self._detach_console()
            self.domid = -1
            if rune == "xl migrate-receive":
                self.domid = int(sh("xl", "domid", self.name).strip())
                self._attach_console()
        return done.returncode, done.stdout.decode(errors="replace")

    def reboot(self) -> None:
        """Have it reboot on xl's word, which makes another domain of the same name."""
        # What the kernel runs then; the lab's init would not hear a signal.
        script = r"printf '#!/bin/sh\nexec busybox reboot -f\n' > /bin/reboot"
        self.check(f"rm -f /bin/reboot; {script}; chmod +x /bin/reboot")
        before, deadline = self.domid, time.monotonic() + START_SECONDS
        sh("xl", "reboot", str(before))
        while self.domid == before:
            said = sh("xl", "domid", self.name, check=False).strip()
            if said.isdigit():
                self.domid = int(said)
            if time.monotonic() > deadline:
                raise GuestError(f"{self.name} has not rebooted:\n{self.console[-2000:]}")
            time.sleep(0.2)
        self._detach_console()
        self.console = ""
        self._attach_console()
        self.wait_ready()

    def shutdown(self) -> None:
        """Let the guest power itself off."""
        self._write(b"sync; poweroff -f\n")

    def wait_dead(self, timeout: float = PATIENCE) -> None:
        """Wait until the domain is gone, and what libxl removes last of it."""
        deadline = time.monotonic() + timeout
        last = ["xenstore-exists", f"/libxl/{self.domid}"]
        while self.alive() or subprocess.run(last, check=False).returncode == 0:
            if time.monotonic() > deadline:
                raise GuestError(f"{self.name} still exists after {timeout} s")
            time.sleep(0.2)

    def destroy(self) -> None:
        """Destroy the domain, if it is still there, and keep its console."""
        if self.domid >= 0 and self.alive():
            sh("xl", "destroy", str(self.domid), check=False)
        self._detach_console()

    # -- commands ----------------------------------------------------------------------------------
    # ------------------

    def run(self, command: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Run a shell command in the guest; return its status and everything it printed.

        Raises:
            GuestError: no end within ``timeout`` seconds; the message holds the end of the console.
            The shell is then
                still busy with it.
        """
        mark = f"@{os.getpid()}-{next(self._marks)}@"
        with self._lock:
            start = len(self.console)
        # Evaluated in a subshell: one process, where a PVH guest under emulation pays 0.3 s for
        # each.
        line = (
            f"echo {mark}begin.; (eval {shlex.quote(command)}) < /dev/null 2>&1; echo {mark}$?.\n"
        )
        self._write(line.encode())
        pattern = re.compile(rf"{mark}begin\.\r?\n(.*?){mark}(\d+)\.", re.DOTALL)
        found = self._wait_console(pattern, start, timeout, f"{command!r} has not ended")
        return int(found.group(2)), found.group(1).replace("\r\n", "\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._tty, data) :]

    def _wait_console(
        self, pattern: re.Pattern[str], start: int, timeout: float, what: str
    ) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                found = pattern.search(self.console, start)
                if found:
                    return found
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestError(
                        f"{self.name}: {what} after {timeout} s; "
                        f"the end of its console:\n{self.console[-2000:]}"
                    )
                self._changed.wait(min(left, 1))

    # -- console -----------------------------------------------------------------------------------
    # ------------------

    def _attach_console(self) -> None:
        deadline = time.monotonic() + PATIENCE
        path = ""
        while not path.startswith("/dev/"):
            path = sh(
                "xenstore-read", f"/local/domain/{self.domid}/console/tty", check=False
            ).strip()
            if time.monotonic() > deadline:
                raise GuestError(f"{self.name}: xenconsoled gave it no terminal: {path}")
            time.sleep(0.05)
        self._tty = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._tty)
        self._stop, self._stop_writer = os.pipe()
        self._reader = threading.Thread(
            target=self._read_console, name=f"console of {self.name}", daemon=True
        )
        self._reader.start()

    def _read_console(self) -> None:
        with (RESULTS / f"guest-{self.name}.log").open("ab") as log:
            while True:
                ready = select.select([self._tty, self._stop], [], [])[0]
                if self._stop in ready:
                    return
                try:
                    data = os.read(self._tty, 65536)
                except OSError:
                    return
                if not data:
                    return
                log.write(data)
                log.flush()
                with self._changed:
                    self.console += data.decode(errors="replace")
                    self._changed.notify_all()

    def _detach_console(self) -> None:
        if self._stop_writer < 0:
            return
        os.close(self._stop_writer)
        self._stop_writer = -1
        if self._reader is not None:
            self._reader.join(10)
        os.close(self._tty)
        os.close(self._stop)


class SharedGuest:
    """One guest for several tests, and another once it has died.

    Args:
        kind, options: as of :class:`Guest`.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        self._make = partial(Guest, kind, **options)
        self._guest: Guest | None = None

    def get(self) -> Guest:
        """Return a guest that lives."""
        if self._guest is None or self._guest.has_died():
            self.close()
            self._guest = self._make()
            self._guest.is_shared = True
        return self._guest

    def close(self) -> None:
        """Destroy it."""
        if self._guest is not None:
            self._guest.destroy()
            self._guest = None
