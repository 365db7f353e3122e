"""``demo``: try a disk without Xen.

A second process plays the guest. It shares memory with this one and kicks it through
eventfds; the device, ring and backend code is what serves a guest of Xen.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import subprocess
import tempfile
import threading
from contextlib import ExitStack
from typing import Any

from ..blkif import SECTOR
from ..datapath.disk import Disk
from ..errors import DeviceError, UsageError
from ..exit_status import ExitStatus
from ..host.program import own_command
from ..recovery import orphans
from ..session import Interrupts, Observer, Outcome, Session
from ..simulated.guest import STOPPED, Plan, pattern
from ..simulated.guest import main as play_guest
from ..simulated.hypervisor import SimulatedHypervisor, SimulatedMachine
from ..simulated.xenstored import SimulatedXenstored
from ..units import format_size
from ..xenbus import toolstack
from ..xenbus.device import Device
from ..xenbus.states import Address
from ..xenbus.vdev import parse
from ..xenbus.xenstore import Store
from .backend_arguments import spec_from
from .environment import Environment

GUEST = 1
_BLOCKS = 20_000
_CHUNK = 1 << 20
_OWN = "xen_disk_py.backends."


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Connect the disk to the second process and print what it measured."""
    if args.guest is not None:
        return ExitStatus(play_guest(args.guest, env.say))
    with ExitStack() as stack:
        is_kept = args.overlay is not None and os.path.lexists(args.overlay)  # somebody's changes
        with_image = _with_image(args, stack)
        is_ours = with_image is not args
        spec = spec_from(with_image)
        is_fresh = spec.overlay is not None and not is_kept
        only_reads = spec.backend in ("vhd", "qemu") and not (is_ours or is_fresh or args.overwrite)
        if only_reads and not spec.read_only:  # for writing it would be repaired
            disk = Disk(spec._replace(read_only=True).open_backend())
        else:
            disk = Disk(spec.open_backend())
        stack.callback(disk.close)
        orphans.check(
            env.record_directory,
            disk.backend.host_storage,
            force=spec.force,
            open_store=env.open_store,
        )
        env.tell_all(disk.backend.notes)
        name = spec.backend_name
        length = min(args.bytes, disk.backend.size)
        length -= length % disk.backend.sector_size
        keeps_out = type(disk.backend).__module__.startswith(_OWN) and (
            name in ("discard", "cow") or is_fresh
        )
        write = not (spec.read_only or (disk.read_only and not only_reads))
        if write and not (keeps_out or is_ours or args.overwrite):
            write = False
            changed = spec.overlay or spec.path or name
            env.tell(f"only reading: writing would change {changed} (to allow that: --overwrite)")
        image = spec.path if name == "cow" or spec.overlay is not None else None
        before = _digest(image, length) if image else None
        interrupts = stack.enter_context(Interrupts().installed())
        phases = _drive(disk, name, interrupts, length, write, args, env)
        if phases is None:
            return ExitStatus.INTERRUPTED
        untouched = image is None or _digest(image, length) == before
    verified = write and _expected(disk, name) != "anything"  # or _drive would have raised
    if args.json:
        result = {"backend": name, "path": spec.path, "phases": phases, "verified": verified}
        if image:
            result["image_untouched"] = untouched
        env.say(json.dumps(result))
    else:
        if verified:
            checked = next(each["bytes"] for each in phases if each["name"] == "sequential read")
            env.say(f"verified: {format_size(checked)} read back as they should be")
        if image:
            env.say(f"image {'untouched' if untouched else 'CHANGED'}: sha256 before and after")
    return ExitStatus.OK if untouched else ExitStatus.ERROR


def _drive(
    disk: Disk,
    name: str,
    interrupts: Interrupts,
    length: int,
    write: bool,
    args: argparse.Namespace,
    env: Environment,
) -> list[dict[str, Any]] | None:
    """Serve the disk to a guest process until it is done; what it measured.

    Returns:
        None if somebody ended it: by a signal, or by not reading what it says.
    """
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
            _expected(disk, name),
            args.seconds,
        )
        device = Device(store, hypervisor, address, disk, on_failure=interrupts.fail)
        session = Session(store, device, vdev, interrupts, patience=30)
        is_done = threading.Event()  # the guest's part
        is_over = threading.Event()  # the guest
        was_asked = threading.Event()  # to end, by somebody
        live = env.err.isatty() and not args.json

        def listen(guest: subprocess.Popen[str]) -> None:
            assert guest.stdout is not None
            for line in guest.stdout:
                told = json.loads(line)
                if "progress" in told:
                    if live:
                        env.draw(f"{told['progress']}: {told['done'] * 100:.0f}%")
                    continue
                if live:
                    env.draw("")
                phases.append(told)
                if "error" not in told and not args.json:
                    env.announce(_describe(told))
                if env.out.failure == errno.EPIPE:  # `| head -1`
                    was_asked.set()
                    interrupts.asked = True
                    interrupts.wake()
            if guest.wait() not in (0, STOPPED):
                xenstored.remove_domain(GUEST)  # it may not have released its disk
            if guest.returncode == 0:
                is_done.set()
            is_over.set()
            interrupts.asked = True
            interrupts.wake()

        class Host(Observer):
            def attach(self) -> None:
                toolstack.attach(
                    store,
                    address,
                    vdev,
                    backend_keys=device.keys(),
                    params=name,
                    read_only=disk.read_only,
                    pid=os.getpid(),
                )
                guest = _start_guest(plan, machine)
                reader = threading.Thread(target=listen, args=(guest,), daemon=True)
                reader.start()
                stack.callback(_end_guest, guest, reader)

            def unplugging(self) -> None:
                if not is_over.is_set():
                    was_asked.set()
                    env.tell("asked the guest to release the disk; Ctrl-C again to force")

        outcome = session.run(Host())
    if was_asked.is_set() or outcome is Outcome.FORCED:
        env.tell(f"interrupted: {outcome.value}")
        return None
    for phase in phases:
        if "error" in phase:
            raise DeviceError(f"the guest says: {phase['error']}")
    if not is_done.is_set():
        raise DeviceError(f"interrupted: {outcome.value}")
    return phases


def _expected(disk: Disk, name: str) -> str:
    if name == "discard":
        return "zeros"
    return "written" if disk.backend.keeps_data else "anything"


def _start_guest(plan: Plan, machine: SimulatedMachine) -> subprocess.Popen[str]:
    return subprocess.Popen(
        own_command("demo", "--guest", json.dumps(plan._asdict())),
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


def _with_image(args: argparse.Namespace, stack: ExitStack) -> argparse.Namespace:
    """Return the arguments; if no image was named, copies of them that name one just made.

    The image, and the overlay of an overlay disk, are removed with ``stack``.
    """
    is_raw = args.format in (None, "raw")
    wanted = args.backend in (None, "cow", "raw", "mmap", "overlay")
    if args.path is not None or args.overlay is not None or not (is_raw and wanted):
        return args
    step = args.sector_size or SECTOR
    if args.bytes < step or args.bytes % step:
        raise UsageError(f"--bytes takes a multiple of {step}, not {format_size(args.bytes)}")
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="xen-disk-demo-"))
    named = argparse.Namespace(**vars(args))
    named.path = os.path.join(directory, "disk.raw")
    named.backend = args.backend or "cow"
    if named.backend == "overlay":
        named.overlay = os.path.join(directory, "changes.overlay")
    with open(named.path, "wb") as image:
        for start in range(0, args.bytes, _CHUNK):
            image.write(pattern(min(_CHUNK, args.bytes - start), start)[::-1])
    return named


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
