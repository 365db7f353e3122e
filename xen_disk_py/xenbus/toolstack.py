"""What a toolstack does around a disk: find the domain, make the nodes, remove them, list.

The nodes are those that libxl makes, so that ``xl block-list`` and ``xl destroy`` know the
disk. The kind of directory depends on the host: libxl serves ``vbd3`` from Xen 4.19 on; an
older one knows what to do with ``qdisk``, where a guest's own QEMU would try to serve it too.

Sources: libxl (``tools/libs/light/libxl_disk.c``, ``libxl_device.c``), xenstore-paths(7).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress

from ..errors import DeviceError, DeviceTaken, GuestNotFound, StoreError
from ..named import NamedTuple
from .states import Address, State
from .vdev import VirtualDevice, first_free, from_number
from .xenstore import Store, quote, unquote

KINDS = ("vbd3", "qdisk")
"""The kinds of backend directory that we use."""

_VBD3 = (4, 19)  # the Xen whose libxl knows that kind
_NO_SCRIPT = "/bin/true"
_REMOVALS = 8  # tries of all nodes at once: other disks of the guest may be coming and going
_CROWD = 500  # tries, some 25 s: of all disks that come or go with a host, one is first

SCRIPT = "block-xen-disk"
"""The hotplug script, by which a disk line of xl says that the disk is ours."""

PID_KEY = "xen-disk-pid"
"""The key by which we know our own disks: the process that serves it."""


class Domain(NamedTuple):
    """A running domain."""

    domid: int
    name: str
    uuid: str

    def __str__(self) -> str:
        return f"{self.name or '(no name)'} (domain {self.domid})"


def disk_name(store: Store, address: Address) -> str:
    """Name a disk for people: ``myvm/xvdb``; by the guest's id if its name cannot be had."""
    name = None
    with suppress(StoreError):
        name = store.read(f"/local/domain/{address.frontend_domid}/name")
    return f"{name or address.frontend_domid}/{from_number(address.devid)}"


def domains(store: Store) -> list[Domain]:
    """List the running domains by id."""
    entries = [entry for entry in store.list("/local/domain") if entry.isdigit()]
    uuids = store.read_all([f"/local/domain/{entry}/vm" for entry in entries])
    names = store.read_all([f"/local/domain/{entry}/name" for entry in entries])
    return sorted(
        Domain(
            int(entry), name or ("Domain-0" if entry == "0" else ""), (vm or "").rpartition("/")[2]
        )
        for entry, vm, name in zip(entries, uuids, names)
    )


def find_domain(store: Store, text: str) -> Domain:
    """Find a domain by id, UUID or name, tried in that order.

    Raises:
        GuestNotFound: none, or several of that name; the message lists the running ones.
    """
    running = domains(store)
    matches = [domain for domain in running if str(domain.domid) == text]
    if not matches:
        from uuid import UUID

        try:
            wanted = str(UUID(text))
        except ValueError:
            pass
        else:
            matches = [domain for domain in running if domain.uuid.lower() == wanted]
    if not matches:
        matches = [domain for domain in running if domain.name == text]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(str(domain.domid) for domain in matches)
        raise GuestNotFound(f"several domains are named {text!r}; name one by its id: {ids}")
    names = ", ".join(f"{domain.domid} {domain.name}".strip() for domain in running)
    raise GuestNotFound(f"no domain {text!r} is running; running are: {names or 'none'}")


def own_domid(store: Store) -> int:
    """Return the domain that this process runs in."""
    return int(store.read("domid") or 0)


def xen_version() -> tuple[int, int] | None:
    """Return the hypervisor's version, or None if this is no Xen domain."""
    numbers = []
    for name in ("major", "minor"):
        try:
            with open(f"/sys/hypervisor/version/{name}", encoding="ascii") as file:
                numbers.append(int(file.read()))
        except (OSError, ValueError):
            return None
    return numbers[0], numbers[1]


def choose_kind(store: Store, domid: int, version: tuple[int, int] | None) -> str:
    """Choose the backend directory's kind so that libxl, and nobody's QEMU, minds the disk."""
    if version is not None and version < _VBD3:
        device_model = f"/local/domain/{own_domid(store)}/device-model/{domid}"
        if not store.exists(device_model):
            return "qdisk"
    return "vbd3"


def can_xl_detach(kind: str, version: tuple[int, int] | None) -> bool:
    """Tell whether ``xl block-detach`` of that Xen takes away a disk of that kind of directory.

    An older one knows no ``vbd3``, which guests with a QEMU of their own need all the same.
    """
    return kind != "vbd3" or version is None or version >= _VBD3


def taken(store: Store, domid: int) -> set[int]:
    """Return the device numbers that the domain uses."""
    numbers: set[int] = set()
    for parent in (f"/local/domain/{domid}/device/vbd", f"/libxl/{domid}/device/vbd"):
        numbers.update(int(name) for name in store.list(parent) if name.isdigit())
    return numbers


def free_device(store: Store, domid: int) -> VirtualDevice:
    """Choose the first free device from xvda on, filling gaps."""
    return first_free(taken(store, domid))


def check_free(store: Store, domid: int, device: VirtualDevice) -> None:
    """See that the domain has no device of that number, as :func:`attach` will.

    Raises:
        DeviceTaken: it has.
    """
    if device.number in taken(store, domid):
        raise _taken(device, domid)


def _taken(device: VirtualDevice, domid: int) -> DeviceTaken:
    return DeviceTaken(
        f"{device.name} is taken in domain {domid}; choose another --vdev, or leave it out for the "
        "first free one"
    )


def attach(
    store: Store,
    address: Address,
    device: VirtualDevice,
    *,
    backend_keys: Mapping[str, str],
    params: str,
    read_only: bool,
    cdrom: bool = False,
    pid: int,
) -> None:
    """Make all nodes of a device, with their permissions, in one transaction.

    One, because blkfront probes the device as soon as it sees it and gives up for good on
    the first key it may not read (EACCES).

    Args:
        store: xenstore.
        address: where the nodes go.
        device: its number and name.
        backend_keys: what the backend publishes itself, its ``state`` included.
        params: free text that says what the disk is.
        read_only: how the toolstack's ``mode`` key reads.
        cdrom: the device's type is that of a CD-ROM, not of a disk.
        pid: the process that serves it.

    Raises:
        DeviceTaken: the guest has a device of that number.
        DeviceError: the guest has gone.
    """
    guest, host = address.frontend_domid, address.backend_domid
    device_type = "cdrom" if cdrom else "disk"
    backend = {
        "frontend": address.frontend,
        "frontend-id": str(guest),
        "params": quote(params),
        "type": address.kind,
        "dev": device.name,
        "mode": "r" if read_only else "w",
        "device-type": device_type,
        "removable": str(int(cdrom)),
        "bootable": "1",
        "specification": "xen",
        "online": "1",
        PID_KEY: str(pid),
        **backend_keys,
    }
    if address.kind == "vbd3":
        # libxl runs it with "remove" when it detaches the disk, and fails if there is none
        backend["script"] = _NO_SCRIPT
    frontend = {
        "backend": address.backend,
        "backend-id": str(host),
        "virtual-device": str(address.devid),
        "device-type": device_type,
        "trusted": "1",
        "state": str(int(State.INITIALISING)),
    }
    toolstack = {**backend, "frontend": address.frontend, "backend": address.backend}
    trees = (
        (address.frontend, [f"n{guest}", f"r{host}"], frontend),
        (address.backend, [f"n{host}", f"r{guest}"], backend),
        (address.toolstack, [f"n{host}"], toolstack),
    )

    def create(transaction: Store) -> None:
        *there, home = transaction.read_all([*address.directories, f"/local/domain/{guest}"])
        if there != [None] * len(there):
            raise _taken(device, guest)
        if home is None:
            raise DeviceError(f"domain {guest} has gone")
        for path, permissions, keys in trees:
            transaction.create(path, permissions, keys)

    store.transact(create, tries=_CROWD)


def is_attached(store: Store, address: Address) -> bool:
    """Tell whether there are nodes of a device, whoever made them."""
    return any(store.exists(path) for path in address.directories)


def pass_on(store: Store, address: Address, pid: int) -> None:
    """Have a device be served by another process than the one that made its nodes."""

    def write(transaction: Store) -> None:
        if transaction.exists(address.backend):
            transaction.write(f"{address.backend}/{PID_KEY}", str(pid))

    store.transact(write)


def detach(store: Store, address: Address) -> None:
    """Remove all nodes of a device and the directories that they leave empty.

    A guest's ``device`` stays: it was there, with its permissions, before any device. Nobody
    makes one for domain 0, though.

    All go at once, unless the guest writes to the frontend's nodes without end: no transaction
    that has touched those is ever committed. Then they go first; it cannot make them anew.
    """
    home = f"/local/domain/{address.frontend_domid}"

    def remove(transaction: Store) -> None:
        for path, roof in (
            (address.frontend, f"{home}/device" if address.frontend_domid else home),
            (address.backend, f"/local/domain/{address.backend_domid}"),
            (address.toolstack, ""),
        ):
            transaction.remove(path)
            parent = path.rpartition("/")[0]
            while parent != roof and transaction.exists(parent):
                if transaction.list(parent):
                    break
                transaction.remove(parent)
                parent = parent.rpartition("/")[0]

    try:
        store.transact(remove, tries=_REMOVALS)
    except StoreError as error:
        if error.errno != errno.EAGAIN:
            raise
        store.remove(address.frontend)
        store.transact(remove, tries=_CROWD)


class Attached(NamedTuple):
    """A disk of ours, as xenstore shows it."""

    address: Address
    device: VirtualDevice
    pid: int
    params: str
    read_only: bool
    backend_state: State | None
    frontend_state: State | None


def attached(store: Store, domid: int | None = None) -> Iterator[Attached]:
    """Find our disks, of one domain or of all."""
    own = own_domid(store)
    for kind in KINDS:
        root = f"/local/domain/{own}/backend/{kind}"
        for guest in store.list(root):
            if not guest.isdigit() or domid not in (None, int(guest)):
                continue
            for devid in filter(str.isdigit, store.list(f"{root}/{guest}")):
                found = _attached(store, Address(own, int(guest), int(devid), kind))
                if found is not None:
                    yield found


def find_attached(store: Store, domid: int, vdev: VirtualDevice) -> Attached:
    """Find a disk of ours.

    Raises:
        DeviceError: there is none; the message lists those that the domain has.
    """
    disks = list(attached(store, domid))
    for disk in disks:
        if disk.address.devid == vdev.number:
            return disk
    names = ", ".join(disk.device.name for disk in disks) or "none"
    raise DeviceError(f"no {vdev} of ours in domain {domid}; connected there: {names}")


def is_from_libxl(store: Store, address: Address) -> bool:
    """Tell whether libxl has made a disk's nodes, by a disk line that names our script."""
    script = store.read(f"{address.backend}/script")
    return script is not None and os.path.basename(script) == SCRIPT


def _attached(store: Store, address: Address) -> Attached | None:
    keys = [f"{address.backend}/{name}" for name in (PID_KEY, "dev", "params", "mode", "state")]
    pid, dev, params, mode, state, frontend = store.read_all([*keys, f"{address.frontend}/state"])
    if pid is None or not pid.isdigit():
        return None
    return Attached(
        address,
        VirtualDevice(address.devid, dev or str(address.devid)),
        int(pid),
        unquote(params or ""),
        mode == "r",
        State.parse(state),
        State.parse(frontend),
    )
