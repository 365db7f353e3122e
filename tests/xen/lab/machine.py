"""One QEMU process: boot Xen or resume a saved machine, give dom0 a job, always end.

dom0 and we talk over three virtio-serial ports, each a Unix socket here: ``lab.control`` (lines:
"ready" from dom0 when its services are up, "go TIME" from us, "begun" from dom0), ``lab.output``
(what the job prints, then a mark with its status) and ``lab.console`` (a terminal for the
interactive shell).

A saved machine is QEMU's device state plus dom0's memory in a file. The file is mapped privately,
so resuming reads nothing up front, any number of machines share one copy, and what one writes stays
its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Callable, Union

from .architecture import Architecture

END_MARK = b"\x1elab-done "
START_SECONDS = 120
RESUME_SECONDS = 300
PORTS = ("control", "output", "console")

Readable = Union[int, socket.socket]


class LabError(Exception):
    """Something that keeps the lab from working, told to a person."""


class BootError(LabError):
    """The machine did not come up; nothing of the job has run, so it may be tried again."""


def die_with_parent() -> None:
    """Run in the child before exec: no terminal signals, and death when the lab dies."""
    os.setpgid(0, 0)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _prepare() -> None:
    os.nice(5)
    die_with_parent()


@dataclass(frozen=True)
class Link:
    """One end of a network that joins two machines and nothing else.

    Attributes:
        number: 1 makes the socket, and is to be started first; 2 finds it there.
        path: of the Unix socket that is the cable; None for what :mod:`.ceph` has made.
    """

    number: int
    path: Path | None

    @property
    def address(self) -> str:
        """The machine's own address, of those that RFC 5737 sets aside for documentation."""
        return f"192.0.2.{self.number}"

    def arguments(self, device: str) -> list[str]:
        """Return QEMU's arguments for it; ``device`` is QEMU's name of the network card."""
        server = "on" if self.number == 1 else "off"
        cable = f"stream,id=link,server={server},addr.type=unix,addr.path={self.path}"
        if self.path is None:
            cable = f"tap,id=link,ifname=lab{self.number},script=no,downscript=no"
        mac = f"52:54:00:00:00:0{self.number}"
        return ["-netdev", cable, "-device", f"{device},netdev=link,mac={mac},romfile="]


class Machine:
    """A running QEMU with Xen in it; a context manager that always ends it."""

    def __init__(
        self,
        build: Path,
        architecture: Architecture,
        *,
        share: Path | None = None,
        log: Path | None = None,
        resume: bool = False,
        save: bool = False,
        link: Link | None = None,
    ) -> None:
        self.build = build
        self._link = link
        self._architecture = architecture
        self.resumed = resume
        self.directory = Path(tempfile.mkdtemp(prefix="xen-lab-"))
        self.log = log or self.directory / "console.log"
        self._share = share or self.directory
        self._save = save
        self._sockets: dict[str, socket.socket] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control = b""

    def __enter__(self) -> Machine:  # noqa: PYI034 - typing.Self came with 3.11
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill QEMU and remove what the machine had."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for sock in self._sockets.values():
            sock.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _command(self) -> list[str]:
        machine = self._architecture
        device = machine.device
        memory = f"memory-backend-ram,id=ram,size={machine.memory}"
        if self._save or self.resumed:
            share = "on" if self._save else "off"
            file = f"mem-path={self.build / 'memory'},share={share}"
            memory = f"memory-backend-file,id=ram,size={machine.memory},{file}"
        snapshot = "off" if self._save else "on"
        command = [
            *(machine.qemu, "-nodefaults", "-no-reboot", "-display", "none"),
            *("-object", memory, *machine.machine("ram", self.build)),
            *("-serial", f"file:{self.log}"),
            *(
                "-drive",
                f"file={self.build / 'disk'},if=none,id=disk,format=raw,cache=unsafe,"
                f"snapshot={snapshot}",
            ),
            *("-device", f"{device('blk')},drive=disk"),
            *("-fsdev", f"local,id=share,path={self._share},security_model=none"),
            *("-device", f"{device('9p')},fsdev=share,mount_tag=share"),
            *("-device", device("rng"), "-device", device("serial")),
            *(
                "-chardev",
                f"socket,id=qmp,path={self.directory}/qmp",
                "-mon",
                "chardev=qmp,mode=control",
            ),
        ]
        for port in PORTS:
            kind = "virtconsole" if port == "console" else "virtserialport"
            command += ["-chardev", f"socket,id={port},path={self.directory}/{port}"]
            command += ["-device", f"{kind},chardev={port},name=lab.{port}"]
        if self._link is not None:
            command += self._link.arguments(device("net"))
        if self.resumed:
            command += ["-incoming", "defer"]
        return command

    def _start(self) -> None:
        listeners = {}
        for name in (*PORTS, "qmp"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.directory / name))
            listener.listen(1)
            listeners[name] = listener
        errors = self.directory / "qemu.log"
        with errors.open("wb") as handle:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                preexec_fn=_prepare,  # noqa: PLW1509 - the lab has no threads
            )
        deadline = time.monotonic() + START_SECONDS
        for name, listener in listeners.items():
            listener.settimeout(0.2)
            while True:
                try:
                    self._sockets[name] = listener.accept()[0]
                    break
                except socket.timeout:
                    self._check_alive()
                    if time.monotonic() > deadline:
                        raise BootError(f"QEMU did not start within {START_SECONDS} s") from None
            listener.close()
        self._qmp_read()
        self._qmp("qmp_capabilities")
        if self.resumed:
            self._ignore_memory()
            self._qmp("migrate-incoming", uri=f"exec:cat '{self.build / 'state'}'")
            self._await_migration()
            self._qmp("cont")

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            said = (self.directory / "qemu.log").read_text(errors="replace").strip()
            raise BootError(
                f"QEMU ended with status {self._process.returncode}: {said or self.console_tail()}"
            )

    def console_tail(self, lines: int = 25) -> str:
        """Return the last lines of Xen's and dom0's console."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    # -- QEMU's own control channel
    # ----------------------------------------------------------------------------------

    def _qmp_read(self) -> dict[str, object]:
        data = b""
        sock = self._sockets["qmp"]
        sock.settimeout(RESUME_SECONDS)
        while not data.endswith(b"\n"):
            try:
                piece = sock.recv(1)
            except socket.timeout:
                raise BootError("QEMU does not answer") from None
            if not piece:
                self._check_alive()
                raise BootError("QEMU closed its control channel")
            data += piece
        message: dict[str, object] = json.loads(data)
        return message

    def _qmp(self, command: str, **arguments: object) -> object:
        self._sockets["qmp"].sendall(
            json.dumps({"execute": command, "arguments": arguments}).encode()
        )
        while True:
            message = self._qmp_read()
            if "error" in message:
                raise BootError(f"QEMU refuses {command}: {message['error']}")
            if "return" in message:
                return message["return"]

    def _ignore_memory(self) -> None:
        capability = {"capability": "x-ignore-shared", "state": True}
        self._qmp("migrate-set-capabilities", capabilities=[capability])

    def save(self) -> None:
        """Write the state of the machine beside its memory file and stop it."""
        self._ignore_memory()
        self._qmp("stop")
        self._qmp("migrate", uri=f"exec:cat > '{self.build / 'state'}'")
        self._await_migration()
        self._qmp("quit")
        if self._process is not None:
            self._process.wait(timeout=RESUME_SECONDS)

    def _await_migration(self) -> None:
        deadline = time.monotonic() + RESUME_SECONDS
        while time.monotonic() < deadline:
            answer = self._qmp("query-migrate")
            status = answer.get("status") if isinstance(answer, dict) else None
            if status == "completed":
                return
            if status == "failed":
                raise BootError(f"QEMU could not save or resume the machine: {answer}")
            time.sleep(0.05)
        raise BootError("saving or resuming the machine took too long")

    # -- dom0 --------------------------------------------------------------------------------------
    # ------------------

    def expect(self, word: str, seconds: float) -> None:
        """Wait for a line on the control port."""
        deadline = time.monotonic() + seconds
        sock = self._sockets["control"]
        while True:
            line, newline, rest = self._control.partition(b"\n")
            if newline:
                self._control = rest
                if line.decode(errors="replace").strip() == word:
                    return
                continue
            self._check_alive()
            if time.monotonic() > deadline:
                raise BootError(
                    f"dom0 did not say {word!r} within {seconds:.0f} s; "
                    f"its console:\n{self.console_tail()}"
                )
            if select.select([sock], [], [], 0.2)[0]:
                self._control += sock.recv(4096)

    def begin(self) -> None:
        """Bring dom0 to the point where the job on the share runs."""
        if not self.resumed:
            self.expect("ready", self._architecture.boot_seconds)
        self._sockets["control"].sendall(f"go {time.time():.0f}\n".encode())
        self.expect("begun", RESUME_SECONDS)

    @property
    def terminal(self) -> socket.socket:
        """The terminal that the interactive shell is on."""
        return self._sockets["console"]

    def follow(
        self,
        write: Callable[[bytes], object],
        deadline: float | None,
        also: Relay | None = None,
    ) -> int:
        """Pass on what the job prints until it ends, and return its status."""
        sock = self._sockets["output"]
        pending = b""
        while True:
            if deadline is not None and time.monotonic() > deadline:
                write(pending)
                raise LabError("the time is up; the machine was stopped")
            watched: list[Readable] = [sock, *(also.watched if also else ())]
            ready: list[Readable] = select.select(watched, [], [], 0.5)[0]
            if also:
                also.serve(ready)
            if sock not in ready:
                self._check_running(pending, write)
                continue
            data = sock.recv(65536)
            if not data:
                self._check_running(pending, write)
                raise LabError(
                    f"the machine stopped before the job ended; its console:\n{self.console_tail()}"
                )
            pending += data
            text, mark, rest = pending.partition(END_MARK)
            if mark and b"\n" in rest:
                write(text)
                return int(rest.partition(b"\n")[0])
            if not mark:
                # Keep back what may be the start of the mark.
                starts = (n for n in range(len(END_MARK), 0, -1) if text.endswith(END_MARK[:n]))
                cut = len(text) - next(starts, 0)
                write(text[:cut])
                pending = text[cut:]

    def _check_running(self, pending: bytes, write: Callable[[bytes], object]) -> None:
        if self._process is not None and self._process.poll() is not None:
            write(pending)
            raise LabError(
                f"the machine stopped before the job ended; its console:\n{self.console_tail()}"
            )


class Relay:
    """What :meth:`Machine.follow` serves beside the output: our terminal joined to dom0's."""

    def __init__(self, keyboard: int, screen: int, terminal: socket.socket) -> None:
        self.watched: tuple[Readable, ...] = (keyboard, terminal)
        self._keyboard = keyboard
        self._screen = screen
        self._terminal = terminal

    def serve(self, ready: list[Readable]) -> None:
        """Pass on what either side has written."""
        if self._keyboard in ready:
            typed = os.read(self._keyboard, 4096)
            if typed:
                self._terminal.sendall(typed)
            else:
                self.watched = (self._terminal,)
        if self._terminal in ready:
            os.write(self._screen, self._terminal.recv(65536))


def save_machine(build: Path, architecture: Architecture) -> None:
    """Boot the build until dom0's services are up and save that state in its directory."""
    for attempt in (1, 2, 3):
        try:
            with Machine(build, architecture, save=True, log=build / "boot.log") as machine:
                machine.expect("ready", architecture.boot_seconds)
                time.sleep(1)
                machine.save()
        except BootError:
            if attempt == 3:
                raise
        else:
            return
