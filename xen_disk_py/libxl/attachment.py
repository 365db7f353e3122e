"""A disk that libxl asks for: what its nodes say, and what we write there.

For ``backendtype=tap`` libxl (from Xen 4.19 on) makes all nodes of a device, then waits 10 s
for the backend's ``state`` to be 2, runs the hotplug script with ``add``, and continues when the
script has succeeded. The script sets ``hotplug-status``; only then the backend may connect, as
libxl would miss a 2 that lasts too short. To detach, libxl sets ``online`` to 0 and ``state`` to
5, waits 10 s for 6, runs the script with ``remove`` and removes the nodes itself.

A disk that cannot be had is told in ``hotplug-error``, in state 2 as well: the script finds it
at once, and ``xl`` prints it.

All that decides which disk it is comes from the backend's directory, which the guest cannot write.

Sources: libxl (``libxl_disk.c``, ``libxl_device.c``, ``libxl_linux.c``).
"""

from __future__ import annotations

from ..errors import DeviceError, DeviceTaken, UsageError
from ..named import NamedTuple
from ..xenbus.device import Device
from ..xenbus.states import Address, State
from ..xenbus.toolstack import PID_KEY
from ..xenbus.xenstore import Store
from . import target

KIND = "vbd3"
"""The backend directory that libxl uses for ``backendtype=tap``."""

FIRST_XEN = (4, 19)
"""The first Xen whose libxl takes ``backendtype=tap`` without a ``tapdisk`` of its own."""

_ERROR_MAX = 1000  # characters; with its path it has to fit into one request


class Replaced(DeviceError):
    """The toolstack has taken the disk away, and may have made another there; nothing is done."""


class DiskConfig(NamedTuple):
    """What libxl's keys ask for: arguments of ``connect``, and whether the guest may discard."""

    arguments: list[str]
    discard: bool


def read_config(store: Store, address: Address) -> DiskConfig:
    """Read what the disk shall be.

    Raises:
        UsageError: there is no such disk; the message says what to write instead.
    """

    def key(name: str) -> str:
        return store.read(f"{address.backend}/{name}") or ""

    if key("device-type") != "disk":
        raise UsageError("a CD-ROM is not served: leave devtype=cdrom out of the disk line")
    arguments = target.arguments(key("params"))
    if key("mode") != "w":
        arguments.append("--read-only")
    return DiskConfig(arguments, key("discard-enable") != "0")


def publish(
    store: Store, address: Address, config: DiskConfig, keys: dict[str, str], pid: int
) -> None:
    """Write what the backend publishes, its ``state`` included, and who serves it.

    Args:
        store: xenstore.
        address: which device.
        config: what was opened: that may take minutes, and the device may be another one now.
        keys: what is published.
        pid: who serves it.

    Raises:
        DeviceTaken: another process serves it.
        Replaced: the toolstack does not want it any longer.
    """

    def write(transaction: Store) -> None:
        if transaction.exists(f"{address.backend}/{PID_KEY}"):
            raise DeviceTaken("another process serves this disk")
        if _state(transaction, address) is not State.INITIALISING:
            raise Replaced("the toolstack has taken the disk away again")
        _check(transaction, address, config)
        for name, value in {PID_KEY: str(pid), **keys}.items():
            transaction.write(f"{address.backend}/{name}", value)

    store.transact(write)


def pass_on(store: Store, address: Address, config: DiskConfig, died: str, pid: int) -> None:
    """Have another process serve a device than the one that has died.

    Args:
        store: xenstore.
        address: which device.
        config: what was opened, as for :func:`publish`.
        died: what stands there of the one that has died.
        pid: who serves it now.

    Raises:
        Replaced: the toolstack does not want it any longer.
    """

    def write(transaction: Store) -> None:
        if transaction.read(f"{address.backend}/{PID_KEY}") != died:
            raise Replaced("the toolstack has taken the disk away meanwhile")
        _check(transaction, address, config)
        transaction.write(f"{address.backend}/{PID_KEY}", str(pid))

    store.transact(write)


def _check(store: Store, address: Address, config: DiskConfig) -> None:
    """See that the device asks for that disk.

    Raises:
        Replaced: it does not.
    """
    try:
        wanted: DiskConfig | None = read_config(store, address)
    except UsageError:
        wanted = None
    if wanted != config:
        raise Replaced("the toolstack has made another disk there meanwhile")


def refuse(store: Store, address: Address, reason: str) -> bool:
    """Have libxl fail at once, with ``reason``; nothing if somebody already serves the disk.

    Returns:
        Whether libxl waits, and is told.
    """
    text = "".join(letter if " " <= letter <= "~" else "?" for letter in reason)

    def write(transaction: Store) -> bool:
        if transaction.exists(f"{address.backend}/{PID_KEY}"):
            return False
        if _state(transaction, address) is not State.INITIALISING:
            return False
        transaction.write(f"{address.backend}/hotplug-error", text[:_ERROR_MAX])
        transaction.write(f"{address.backend}/hotplug-status", "error")
        transaction.write(f"{address.backend}/state", str(int(State.INIT_WAIT)))
        return True

    return store.transact(write)


def close(store: Store, address: Address, pid: int | None) -> None:
    """Show libxl a closed device, of which it then removes the nodes.

    Args:
        store: xenstore.
        address: which device.
        pid: the process that serves it; None for a device that nobody does. Nothing is written
            if it is another: libxl may have made the device anew meanwhile.
    """

    def write(transaction: Store) -> None:
        served_by = transaction.read(f"{address.backend}/{PID_KEY}")
        if served_by == (None if pid is None else str(pid)) and transaction.exists(
            f"{address.backend}/state"
        ):
            transaction.write(f"{address.backend}/state", str(int(State.CLOSED)))

    store.transact(write)


class AdoptedDevice(Device):
    """A device whose nodes are libxl's: it connects when the hotplug script has run."""

    def watch(self) -> None:
        """Have xenstore tell of the script, too."""
        super().watch()
        self._store.watch(f"{self.address.backend}/hotplug-status")

    def update(self) -> None:
        """Do nothing as long as the script has not run, but for leaving."""
        if not self._is_awaiting_script():
            super().update()

    def _is_awaiting_script(self) -> bool:
        return (
            self.state is State.INIT_WAIT
            and self._store.read(f"{self.address.backend}/hotplug-status") != "connected"
            and _state(self._store, self.address) is State.INIT_WAIT
            and self._store.exists(f"{self.address.frontend}/state")
            and not self._guest_is_gone()
        )


def _state(store: Store, address: Address) -> State | None:
    return State.parse(store.read(f"{address.backend}/state"))
