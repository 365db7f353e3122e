"""``demo``: try a disk without Xen.

A second process plays the guest. It shares memory with this one and kicks it through
eventfds; the device, ring and backend code is what serves a guest of Xen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from ..datapath.disk import Disk
from ..errors import DeviceError, UsageError
from ..exit_status import ExitStatus
from ..host.program import own_command
from ..session import Interrupts, Observer, Outcome, Session
from ..simulated.guest import Plan, pattern
from ..simulated.guest import main as play_guest
from ..simulated.hypervisor import SimulatedHypervisor, SimulatedMachine
from ..simulated.xenstored import SimulatedXenstored
from ..units import format_size
from ..xenbus import toolstack
from ..xenbus.device import Device
from ..xenbus.states import Address
from ..xenbus.vdev import parse
from ..xenbus.xenstore import Store
from .backend_arguments import backend_from, backend_name
from .environment import Environment

GUEST = 1
_BLOCKS = 20_000


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Connect the disk to the second process and print what it measured."""
    if args.guest is not None:
        return ExitStatus(play_guest(args.guest, env.say))
    with ExitStack() as stack:
        kept = args.overlay is not None and os.path.lexists(args.overlay)  # somebody's changes
        file_backends = (None, "cow", "raw", "mmap")
        is_raw = args.format in (None, "raw")
        if args.path is None and args.overlay is None and is_raw and args.backend in file_backends:
            args.path = stack.enter_context(_temporary_image(args.bytes))
            args.backend = args.backend or "cow"
            args.overwrite = True
        disk = Disk(backend_from(args))
        stack.callback(disk.close)
        name = backend_name(args)
        length = min(args.bytes, disk.backend.size)
        write = not disk.read_only
        is_kept = kept or name in ("raw", "mmap") or (name == "vhd" and args.overlay is None)
        if write and is_kept and not args.overwrite:
            write = False
            changed = args.overlay if kept else args.path
            env.tell(f"only reading: {name} would change {changed} (to allow that: --overwrite)")
        image = args.path if name in ("cow", "overlay") or args.overlay is not None else None
        before = _digest(image, length) if image else None
        interrupts = stack.enter_context(Interrupts().installed())
        phases = _drive(disk, interrupts, length, write, args, env)
        untouched = image is None or _digest(image, length) == before
    verified = write and _expected(disk, name) != "anything"  # or _drive would have raised
    if args.json:
        result = {"backend": name, "path": args.path, "phases": phases, "verified": verified}
        if image:
            result["image_untouched"] = untouched
        env.say(json.dumps(result))
    else:
        if verified:
            env.say(f"verified: {format_size(length)} read back as they should be")
        if image:
            env.say(f"image {'untouched' if untouched else 'CHANGED'}: sha256 before and after")
    return ExitStatus.OK if untouched else ExitStatus.ERROR


def _drive(
    disk: Disk,
    interrupts: Interrupts,
    length: int,
    write: bool,
    args: argparse.Namespace,
    env: Environment,
) -> list[dict[str, Any]]:
    """Serve the disk to a guest process until it is done; what it measured."""
    phases: list[dict[str, Any]] = []
    with ExitStack() as stack:
        xenstored = stack.enter_context(SimulatedXenstored())
        xenstored.add_domain(GUEST, "demo", "00000000-0000-4000-8000-000000000001")
        machine = stack.enter_context(SimulatedMachine(domid=GUEST))
        hypervisor = stack.enter_context(SimulatedHypervisor(machine))
        store = stack.enter_context(Store.open(xenstored.socket_path(0)))
        vdev = parse("xvda")
        address = Address(0, GUEST, vdev.number, "vbd3")
        plan = Plan(
            machine.address,
            xenstored.socket_path(GUEST),
            address.frontend,
            length,
            _BLOCKS,
            write,
            _expected(disk, backend_name(args)),
        )
        device = Device(store, hypervisor, address, disk, on_failure=interrupts.fail)
        session = Session(store, device, vdev, interrupts, patience=30)
        finished = threading.Event()

        def listen(guest: subprocess.Popen[str]) -> None:
            assert guest.stdout is not None
            for line in guest.stdout:
                phase = json.loads(line)
                phases.append(phase)
                if "error" not in phase and not args.json:
                    env.say(_describe(phase))
            if guest.wait() == 0:
                finished.set()
            else:
                xenstored.remove_domain(GUEST)  # it may not have released its disk
            interrupts.asked = True
            interrupts.wake()

        class Host(Observer):
            def attach(self) -> None:
                toolstack.attach(
                    store,
                    address,
                    vdev,
                    backend_keys=device.keys(),
                    params=backend_name(args),
                    read_only=disk.read_only,
                    pid=os.getpid(),
                )
                guest = _start_guest(plan, machine)
                reader = threading.Thread(target=listen, args=(guest,), daemon=True)
                reader.start()
                stack.callback(_end_guest, guest, reader)

        outcome = session.run(Host())
    for phase in phases:
        if "error" in phase and outcome is not Outcome.FORCED:  # then errors are no wonder
            raise DeviceError(f"the guest says: {phase['error']}")
    if not finished.is_set():
        raise DeviceError(f"interrupted: {outcome.value}")
    return phases


def _expected(disk: Disk, name: str) -> str:
    if name == "discard":
        return "zeros"
    return "written" if disk.backend.keeps_data else "anything"


def _start_guest(plan: Plan, machine: SimulatedMachine) -> subprocess.Popen[str]:
    return subprocess.Popen(
        own_command("demo", "--guest", json.dumps(asdict(plan))),
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=machine.descriptors,
        start_new_session=True,  # a Ctrl-C is for us; the guest sees its disk unplugged
    )


def _end_guest(guest: subprocess.Popen[str], reader: threading.Thread) -> None:
    if guest.poll() is None:
        guest.terminate()
    guest.wait()
    reader.join()
    assert guest.stdout is not None
    guest.stdout.close()


def _describe(phase: dict[str, Any]) -> str:
    seconds = max(phase["seconds"], 1e-9)
    return (
        f"{phase['name']:<20}{phase['bytes'] / seconds / 1e6:>9.1f} MB/s"
        f"{phase['requests'] / seconds:>10.0f} IOPS"
    )


@contextmanager
def _temporary_image(length: int) -> Iterator[str]:
    """Make an image of ``length`` bytes, gone afterwards."""
    if length < 512 or length % 512:
        raise UsageError(f"--bytes takes a multiple of 512, not {format_size(length)}")
    with tempfile.NamedTemporaryFile(prefix="xen_disk_py-demo-", suffix=".raw") as image:
        image.write(pattern(length)[::-1])
        image.flush()
        yield image.name


def _digest(path: str, length: int) -> tuple[str, int]:
    """Hash what the demo works on; a write anywhere else shows in the time of change."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = length
        while left:
            chunk = file.read(min(left, 1 << 20))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
        return digest.hexdigest(), os.fstat(file.fileno()).st_mtime_ns
