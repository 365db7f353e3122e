"""The handshake between a device's frontend and backend, as a table; and where its keys live.

Each end publishes one state and watches the other's. What the backend does next depends
only on its own state, the frontend's, and whether the toolstack still wants the device
(``online``): :func:`react` says it, and does nothing itself.

The usual life::

    backend   InitWait ─────────── Connected ──────────── Closing ─── Closed
    frontend  Initialising ─ Initialised ─ Connected ─────── Closing ─ Closed

Linux's frontend waits for InitWait before it allocates its ring, so the backend goes there
first. A frontend may skip states, and a watch may show only the last of several. A value
that means nothing to us changes nothing.

Sources: ``xen/include/public/io/xenbus.h``, ``blkif.h``; Linux
``drivers/block/xen-blkback/xenbus.c`` for the reaction to each frontend state.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from ..named import NamedTuple


class State(IntEnum):
    """XenbusState."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8

    @classmethod
    def parse(cls, text: str | None) -> State | None:
        """Read a ``state`` key. None stays None (no such key); nonsense is UNKNOWN."""
        if text is None:
            return None
        if len(text) == 1 and text in "012345678":
            return cls(int(text))
        return cls.UNKNOWN

    def __str__(self) -> str:
        return f"{self.value} ({self.name.replace('_', ' ').title().replace(' ', '')})"


class Action(Enum):
    """What the backend does next."""

    STAY = "nothing"
    CONNECT = "map the ring, bind the event channel, publish Connected"
    CLOSE = "publish Closing; serve until the frontend has closed"
    DISCONNECT = "finish all requests, unmap and unbind everything, then publish Closed"
    REOPEN = "as DISCONNECT if need be, then publish InitWait"
    FINISH = "as DISCONNECT, then leave for good"


def react(backend: State, frontend: State | None, online: bool) -> Action:
    """Say what a backend in state ``backend`` does about a frontend in state ``frontend``.

    Args:
        backend: the state we are in, or that the toolstack has put us into (Closing).
        frontend: None if the frontend's directory is gone.
        online: False once the toolstack wants the device detached.
    """
    if frontend is None:
        return Action.FINISH
    if backend is State.INIT_WAIT:
        if frontend in (State.INITIALISED, State.CONNECTED):
            return Action.CONNECT
        if frontend is State.CLOSING:
            return Action.CLOSE
        if frontend is State.CLOSED:
            return Action.DISCONNECT
    elif backend is State.CONNECTED:
        if frontend is State.CLOSING:
            return Action.CLOSE
        if frontend is State.CLOSED:
            return Action.DISCONNECT
        if frontend is State.INITIALISING:  # a driver that was killed and started again
            return Action.REOPEN
    elif backend is State.CLOSING:
        if not State.INIT_WAIT <= frontend <= State.CLOSING:
            return Action.DISCONNECT  # it has closed, or was never there to close
    elif backend is State.CLOSED:
        if not online:
            return Action.FINISH
        if frontend is State.INITIALISING:
            return Action.REOPEN
        if frontend in (State.INITIALISED, State.CONNECTED):
            return Action.CONNECT  # it began anew and did not wait for us
    return Action.STAY


class Address(NamedTuple):
    """Which device this is, and its three directories in xenstore.

    ``kind`` is the backend's directory name (``vbd3``, ``qdisk``), ``devid`` the virtual
    device number.
    """

    backend_domid: int
    frontend_domid: int
    devid: int
    kind: str

    @property
    def backend(self) -> str:
        """Ours; the guest may read it."""
        return (
            f"/local/domain/{self.backend_domid}/backend/{self.kind}"
            f"/{self.frontend_domid}/{self.devid}"
        )

    @property
    def frontend(self) -> str:
        """The guest's; we may read it."""
        return f"/local/domain/{self.frontend_domid}/device/vbd/{self.devid}"

    @property
    def toolstack(self) -> str:
        """Where libxl looks for devices to list and detach."""
        return f"/libxl/{self.frontend_domid}/device/vbd/{self.devid}"

    @property
    def directories(self) -> list[str]:
        """All three, frontend first: the order to remove them in."""
        return [self.frontend, self.backend, self.toolstack]
