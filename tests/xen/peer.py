"""The other of two dom0s (the lab's ``--pair``): commands there, streams to it, guests on it.

There, ``python3 -m tests.xen.peer serve`` gives whoever connects what ssh would: the first line is
a shell command, everything else its standard input and output. Nobody but the two is on the
network.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
import time

from .guest import PATIENCE, RESULTS, Guest, GuestError, Shell

PORT = 2222
ADDRESS = os.environ.get("XEN_LAB_PEER", "")
"""The other machine's, on the one that runs the tests."""
_MODULE = "python3 -m tests.xen.peer"


class Handler(socketserver.BaseRequestHandler):
    """One command; what it says as an error goes to a log, as its output may be a stream."""

    def handle(self) -> None:
        line = b""
        while not line.endswith(b"\n"):
            piece = self.request.recv(1)
            if not piece:
                return
            line += piece
        with (RESULTS / "peer.log").open("ab") as log:
            log.write(b"--- " + line)
            log.flush()
            process = subprocess.Popen(
                ["sh", "-c", line], stdin=self.request, stdout=self.request, stderr=log
            )
        # What the process has of it is the only end from now on: at its exit, the other side reads
        # the end.
        self.request.close()
        process.wait()

    def finish(self) -> None:
        """Leave the connection, which is closed, alone."""


class Server(socketserver.ThreadingTCPServer):
    """Takes commands; each has a thread and a connection of its own."""

    daemon_threads = True
    allow_reuse_address = True

    def shutdown_request(self, request: object) -> None:
        """Leave the connection to the command."""


def _connected(command: str, timeout: float | None = None) -> socket.socket:
    """Return a connection to a command there; commands are one line."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection((ADDRESS, PORT), timeout=30)
            break
        except OSError:  # it has not got that far
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    connection.settimeout(timeout)
    connection.sendall(command.encode() + b"\n")
    return connection


class Peer(Shell):
    """The other dom0, for commands as root."""

    name = "the other host"

    def run(self, command: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Run a shell command there; return its status and everything it printed."""
        script = f"({command}) < /dev/null 2>&1; status=$?; echo; echo @$status"
        data = b""
        with _connected(f"sh -c {_one_line(script)}", timeout) as connection:
            try:
                while True:
                    piece = connection.recv(65536)
                    if not piece:
                        break
                    data += piece
            except socket.timeout:
                said = data.decode(errors="replace")
                raise GuestError(
                    f"{command!r} still runs after {timeout} s there:\n{said}"
                ) from None
        output, _, status = data.decode(errors="replace").rpartition("\n@")
        if not re.fullmatch(r"\d+\n", status):
            raise GuestError(f"{command!r} ended there without a status:\n{output}{status}")
        return int(status), output

    @staticmethod
    def stream(command: str) -> str:
        """Return a command for here that is joined to one there, as ``ssh HOST COMMAND`` is."""
        return f"{_MODULE} stream {shlex.quote(command)}"


class PeerGuest(Shell):
    """A guest on the other host, which does not get its console back: for one command a time."""

    def __init__(self, peer: Peer, kind: str, name: str) -> None:
        self.name = name
        self.kind = kind
        self._peer = peer
        self.domid = int(peer.check(f"xl domid {shlex.quote(name)}").strip())

    def run(self, command: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Run a shell command in the guest; return its status and everything it printed."""
        words = [self.kind, self.name, str(timeout), command]
        return self._peer.run(f"{_MODULE} guest {shlex.join(words)}", timeout + PATIENCE)


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError(f"a command of several lines: {text!r}")
    return shlex.quote(text)


def _stream(command: str) -> int:
    """Join our standard input and output to a command there."""
    connection = _connected(command)

    def send() -> None:
        while True:
            data = os.read(0, 1 << 16)
            if not data:
                break
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    while True:
        data = connection.recv(1 << 16)
        if not data:
            return 0
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


def main(arguments: list[str]) -> int:
    """Be what the words say: ``serve``, ``stream COMMAND``, ``guest KIND NAME TIMEOUT COMMAND``."""
    what, *words = arguments
    if what == "serve":
        with Server(("", PORT), Handler) as server:
            server.serve_forever()
    if what == "stream":
        return _stream(*words)
    kind, name, timeout, command = words
    status, output = Guest.running(kind, name).run(command, float(timeout))
    sys.stdout.write(output)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
