"""``resize``: give a disk another size while the guest uses it, from another terminal."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress

from ..errors import DeviceError, StoreError, UsageError
from ..exit_status import ExitStatus
from ..recovery import record
from ..units import format_size
from ..xenbus import resize, toolstack
from ..xenbus.toolstack import Attached
from ..xenbus.vdev import parse
from ..xenbus.waiting import until
from ..xenbus.xenstore import Store
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Ask the process that serves the disk, and say what it answers."""
    vdev = parse(args.vdev)
    if args.size is not None and (args.size <= 0 or args.size % 512):
        raise UsageError(f"SIZE: {args.size} bytes is not a positive multiple of 512")
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        disk = toolstack.find_attached(store, domain.domid, vdev)
        _check_served(env, disk)
        request = resize.ResizeRequest(args.size, args.force)
        size = _ask(env, store, disk, request, args.timeout)
    if args.json:
        facts = {
            "domid": domain.domid,
            "vdev": vdev.name,
            "number": vdev.number,
            "device": vdev.guest_device,
            "size": size,
        }
        env.say(json.dumps(facts))
    else:
        env.say(f"{vdev} {vdev.number} {vdev.guest_device} {format_size(size)}")
    return ExitStatus.OK


def _check_served(env: Environment, disk: Attached, meanwhile: str = "") -> None:
    """See that a process serves the disk.

    Args:
        env: says where its record is.
        disk: the disk.
        meanwhile: what to say of one that has ended while somebody waited.

    Raises:
        DeviceError: it has ended; the message says what can be done.
    """
    found = record.find_served(env.record_directory, disk.address)
    if found is not None and found.alive:
        return
    device = f"{disk.address.frontend_domid} {disk.device}"
    ended = f"the process that served {disk.device}, {disk.pid}, has ended{meanwhile}: "
    if found is not None and found.is_orphan:
        raise DeviceError(
            f"{ended}with --supervise another takes over by itself, then try again; else have one "
            f"take over with: xen-disk connect --adopt {device}; or take the disk away with: "
            f"xen-disk disconnect {device}"
        )
    raise DeviceError(f"{ended}take the disk away with: xen-disk disconnect {device}")


def _ask(
    env: Environment,
    store: Store,
    disk: Attached,
    request: resize.ResizeRequest,
    timeout: float,
) -> int:
    """Leave the request, wait for the answer, take both away; the result is the size in bytes."""
    back = disk.address.backend
    directory = f"{back}/{resize.DIRECTORY}"
    path = f"{directory}/{os.getpid()}"
    gone = DeviceError(f"{disk.device} was disconnected meanwhile")
    answers: list[str] = []

    def leave(transaction: Store) -> None:
        if not transaction.exists(back):
            raise gone
        # What is made in it is not the guest's to read either.
        permissions = [f"n{disk.address.backend_domid}"]
        transaction.create(directory, permissions, {str(os.getpid()): str(request)})

    def answered() -> bool:
        answers[:] = [store.read(path) or ""]
        return answers[0] != str(request)

    store.transact(leave)
    try:
        if not until(store, path, answered, timeout):
            _check_served(env, disk, f", and no other has taken over within {timeout:g} s")
            raise DeviceError(
                f"the process that serves {disk.device}, {disk.pid}, does not answer within "
                f"{timeout:g} s: it is stopped, hangs in a request, or is too old to resize"
            )
    finally:
        with suppress(StoreError):  # whatever else is wrong is what should be told
            store.remove(path)
    if not answers[0]:
        raise gone
    return resize.parse_answer(answers[0])
