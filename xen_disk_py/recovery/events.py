"""Events of a disk's life as entries of systemd's journal: ``journalctl XEN_DISK_GUEST=myvm``.

Each kind has a ``MESSAGE_ID`` of its own, which never changes. An entry is sent once, when it has
happened; errors come in bursts, and a burst is one entry with a count.
"""

from __future__ import annotations

from functools import partial

from ..datapath.bursts import Bursts
from ..datapath.disk import Disk
from ..host import journald
from ..host.journald import Value
from ..named import NamedTuple
from ..text import printable
from ..units import format_size
from .facts import Facts
from .record import Record


class Kind(NamedTuple):
    """A kind of event: its name, ``MESSAGE_ID`` and syslog's priority."""

    name: str
    id: str
    priority: int


ATTACHED = Kind("attached", "1ed457ff8b3f44d19152357bbc6a3d9e", 6)
CONNECTED = Kind("connected", "a4297d4f285049108fd50e5552fc121c", 6)
ERRORS = Kind("errors", "ec597a1b3dbc481b95cdc7ceed6bd338", 3)
RETRYING = Kind("retrying", "a5f9adf06144466a9c7a41a695b08c75", 4)
RECOVERED = Kind("recovered", "e79a93bcff8a4d7987bb201c4ac5cb6b", 5)
TAKEN_OVER = Kind("taken-over", "34f977fa4dc34d19b5b0db46a8f9e547", 5)
DETACHED = Kind("detached", "d2e421ed53aa443ba5ba3b88beae7e97", 6)
KINDS = (ATTACHED, CONNECTED, ERRORS, RETRYING, RECOVERED, TAKEN_OVER, DETACHED)


class Events:
    """Those of one disk.

    Args:
        record: says whose it is.
        disk: what is served; its failures are told from now on.
        path: of the journal's socket.
    """

    def __init__(self, record: Record, disk: Disk, path: str = journald.SOCKET) -> None:
        self._facts = record.facts  # as they were: the record is empty when all is over
        self._path = path
        self._errors = Bursts(partial(self._failed, ERRORS, "requests failed"))
        self._retries = Bursts(partial(self._failed, RETRYING, "requests are queued for retry"))
        disk.on_error, disk.on_retry = self._errors.add, self._retries.add
        disk.on_recovery = self._recovered

    def attached(self) -> None:
        """The nodes are there, for the guest to see."""
        self._send(ATTACHED, f"attached: {_what(self._facts)}")

    def connected(self) -> None:
        """The guest has the disk."""
        self._send(CONNECTED, f"connected: {_what(self._facts)}")

    def taken_over(self, pause: float | None) -> None:
        """This process serves what another has left.

        Args:
            pause: seconds in which nobody did; None: not known, since that one died.
        """
        more: dict[str, Value] = {} if pause is None else {"XEN_DISK_PAUSE": f"{pause:.3f}"}
        why = "a process died" if pause is None else f"an upgrade, {pause:.3f} s without service"
        self._send(TAKEN_OVER, f"taken over by process {self._facts.pid} ({why})", **more)

    def detached(self, outcome: str, *, is_failure: bool = False) -> None:
        """It is over.

        Args:
            outcome: how it ended.
            is_failure: not as somebody wanted it.
        """
        self.flush()
        kind = DETACHED._replace(priority=3) if is_failure else DETACHED
        self._send(kind, f"detached: {printable(outcome)}", XEN_DISK_OUTCOME=outcome)

    def flush(self) -> None:
        """Tell now of the failures that were counted; before this process ends."""
        self._retries.flush()
        self._errors.flush()

    def _failed(self, kind: Kind, what: str, count: int, first: str) -> None:
        more: dict[str, Value] = {"XEN_DISK_COUNT": count, "XEN_DISK_ERROR": first}
        self._send(kind, f"{what}: {count}, the first: {printable(first)}", **more)

    def _recovered(self, text: str) -> None:
        self.flush()  # what happened before is told before
        self._send(RECOVERED, text)

    def _send(self, kind: Kind, message: str, **more: Value) -> None:
        facts = self._facts
        fields: dict[str, Value] = {
            "MESSAGE": f"{printable(facts.domain or str(facts.domid))}/{facts.vdev}: {message}",
            "MESSAGE_ID": kind.id,
            "PRIORITY": kind.priority,
            "SYSLOG_IDENTIFIER": "xen-disk",
            "XEN_DISK_EVENT": kind.name,
            "XEN_DISK_GUEST": facts.domain,
            "XEN_DISK_DOMID": facts.domid,
            "XEN_DISK_VDEV": facts.vdev,
            "XEN_DISK_BACKEND": facts.backend or "",
            **({"XEN_DISK_PATH": facts.path} if facts.path else {}),
            **more,
        }
        journald.send(fields, self._path)


def _what(facts: Facts) -> str:
    path = f" {printable(facts.path)}" if facts.path else ""
    return f"{format_size(facts.size)} {facts.backend}{path} {facts.mode}"
