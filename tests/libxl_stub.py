"""What libxl 4.20 does around a disk with ``backendtype=tap``, played on a simulated host.

The keys and their order of events are those of ``libxl__device_disk_add`` and
``libxl__initiate_device_generic_remove``; the hotplug script is the real one, on commands that
keep xenstore in files.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import xen_disk_py
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import Address, State
from xen_disk_py.xenbus.vdev import parse

DATA = Path(xen_disk_py.__file__).parent / "data"
SCRIPT = DATA / "block-xen-disk"

_COMMANDS = {
    "xenstore-read": 'exec cat "$STORE/$1"\n',
    "xenstore-write": (
        'while [ $# -gt 0 ]; do\n  printf %s "$2" > "$STORE/$1" || exit 1\n  shift 2\ndone\n'
    ),
}


class LibxlError(Exception):
    """What ``xl`` would print."""


def run_script(directory, action, keys, name="backend/vbd3/5/51728"):
    """Run the script as libxl does; its status and what the backend's directory holds then."""
    commands, store = directory / "bin", directory / "store"
    commands.mkdir(parents=True, exist_ok=True)
    for command, text in _COMMANDS.items():
        (commands / command).write_text(f"#!/bin/sh\n{text}")
        (commands / command).chmod(0o755)
    backend = store / name
    backend.mkdir(parents=True, exist_ok=True)
    for file in backend.iterdir():
        file.unlink()
    for key, value in keys.items():
        (backend / key).write_text(value)
    done = subprocess.run(
        [SCRIPT, action],
        env={
            "PATH": f"{commands}:{os.environ['PATH']}",
            "STORE": str(store),
            "script": str(SCRIPT),
            "XENBUS_TYPE": "vbd3",
            "XENBUS_PATH": name,
            "XENBUS_BASE_PATH": "backend",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, {file.name: file.read_text() for file in backend.iterdir()}


class Libxl:
    """The toolstack of a simulated host; whatever it attached, it can detach."""

    def __init__(self, host, directory):
        self.host = host
        self.store = host.open_store()
        self.directory = directory

    def create(self, target, vdev="xvdb", *, domid=None, **changed):
        """Make a device's nodes, and no more; ``changed`` are keys of the backend."""
        domid = self.host.DOMID if domid is None else domid
        address = Address(0, domid, parse(vdev).number, "vbd3")
        backend = {
            "frontend": address.frontend,
            "params": f"aio:{target}",
            "script": "/etc/xen/scripts/block-xen-disk",
            "frontend-id": str(domid),
            "online": "1",
            "removable": "0",
            "bootable": "1",
            "state": "1",
            "dev": vdev,
            "type": "vbd3",
            "mode": "w",
            "device-type": "disk",
            "discard-enable": "1",
            "specification": "xen",
            **{key.replace("_", "-"): value for key, value in changed.items()},
        }
        frontend = {
            "backend": address.backend,
            "backend-id": "0",
            "state": "1",
            "virtual-device": str(address.devid),
            "device-type": "disk",
            "trusted": "1",
        }
        trees = (
            (address.frontend, [f"n{domid}", "r0"], frontend),
            (address.backend, ["n0", f"r{domid}"], backend),
            (address.toolstack, ["n0"], {**backend, "backend": address.backend}),
        )

        def write(transaction):
            for path, permissions, keys in trees:
                transaction.create(path, permissions, keys)

        self.store.transact(write)
        return address

    def wait(self, address, state):
        """Wait until the backend is in exactly that state."""
        path = f"{address.backend}/state"
        self.host.until(
            lambda: self.store.read(path) == str(int(state)), what=f"{address}: {state}"
        )

    def run_script(self, address, action):
        """Run the hotplug script; raise what it said if it failed."""
        before = {
            path.rpartition("/")[2]: value
            for path, value in self.store.tree(address.backend).items()
            if path.count("/") == address.backend.count("/") + 1
        }
        status, after = run_script(self.directory, action, before)
        for key in after:
            if after[key] != before.get(key):
                self.store.write(f"{address.backend}/{key}", after[key])
        if status and action == "add":
            raise LibxlError(f"script: {self.store.read(f'{address.backend}/hotplug-error')}")
        assert status == 0

    def attach(self, target, vdev="xvdb", **changed):
        """Attach a disk: ``xl block-attach``, or a disk line when a guest is created."""
        address = self.create(target, vdev, **changed)
        self.wait(address, State.INIT_WAIT)
        self.run_script(address, "add")
        return address

    def ask_to_detach(self, address):
        """Tell the backend that the disk goes."""

        def write(transaction):
            transaction.write(f"{address.backend}/online", "0")
            if transaction.read(f"{address.backend}/state") != "6":
                transaction.write(f"{address.backend}/state", "5")

        self.store.transact(write)

    def finish_detach(self, address):
        """Wait for the backend, and remove the nodes."""
        self.wait(address, State.CLOSED)
        self.run_script(address, "remove")
        self.remove(address)

    def detach(self, address):
        """Detach a disk that no guest holds."""
        self.ask_to_detach(address)
        self.finish_detach(address)

    def remove(self, address):
        """Remove the nodes."""
        toolstack.detach(self.store, address)
