"""``upgrade``: have the installed version of the program take a disk over."""

from __future__ import annotations

import argparse
import json
import signal
import time

from ..errors import DeviceError
from ..exit_status import ExitStatus
from ..host.process import is_process, send_signal
from ..recovery import record
from ..recovery.facts import FORMATS, Facts
from ..xenbus import toolstack
from ..xenbus.states import State
from ..xenbus.toolstack import Attached
from ..xenbus.vdev import parse
from .environment import Environment

_LOOK = 0.02  # seconds between two looks at the record, which tells nobody when it changes


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Ask the process that serves the disk, and say how that went."""
    vdev = parse(args.vdev)
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        disk = toolstack.find_attached(store, domain.domid, vdev)
        if toolstack.is_from_libxl(store, disk.address):
            raise DeviceError(
                f"xl has attached {vdev}: end its process (kill -9 {disk.pid}), and xen-disk serve "
                "has the new program take over"
            )
    facts = _upgrade(env, disk, args.timeout)
    for_so_long = f", nobody served for {facts.pause:.2f} s" if facts.pause is not None else ""
    env.tell(f"{vdev}: version {facts.version} takes over{for_so_long}")
    if args.json:
        told = ("domid", "domain", "vdev", "number", "device", "pid", "version", "pause")
        env.say(json.dumps({name: getattr(facts, name) for name in told}))
    return ExitStatus.OK


def _upgrade(env: Environment, disk: Attached, timeout: float) -> Facts:
    """Have another program serve the disk; the facts about it.

    Raises:
        DeviceError: that is not so, and why.
    """
    before = record.find_served(env.record_directory, disk.address)
    adopt = f"xen-disk connect --adopt {disk.address.frontend_domid} {disk.device}"
    died = DeviceError(f"process {disk.pid} has died; to take over its disk: {adopt}")
    if before is None or not before.alive:
        raise died
    old = before.facts
    if old is None or old.format not in FORMATS or old.pid != disk.pid or old.started is None:
        raise DeviceError(
            f"process {disk.pid} does not serve {disk.device} yet, or is of a version that cannot "
            "be followed: try again, or disconnect the disk"
        )
    if disk.backend_state is State.CLOSING:
        raise DeviceError(f"{disk.device} is about to go: the guest has been asked to release it")
    try:
        if not send_signal(disk.pid, old.process_started, signal.SIGUSR2):
            raise died
    except PermissionError as error:
        raise DeviceError(f"no signal can be sent to process {disk.pid}: run as root") from error
    deadline = time.monotonic() + timeout
    while True:
        found = record.find(env.record_directory, disk.address)
        if found is None or not (found.alive or found.facts):
            raise DeviceError(f"{disk.device} was disconnected meanwhile")
        if found.alive and found.facts is not None:
            refusal = found.facts.not_upgraded
            if refusal is not None and refusal != old.not_upgraded:
                raise DeviceError(f"process {disk.pid} continues as it was: {refusal[1]}")
            if found.facts.started not in (None, old.started):
                return found.facts
        if time.monotonic() >= deadline:
            # the new program is the same process, and has no record until it has begun
            is_there = found.alive or is_process(disk.pid, old.process_started)
            raise DeviceError(
                f"process {disk.pid} has not answered within {timeout:g} s: it is stopped or hangs"
                if is_there
                else f"the new program has died; to take over the disk: {adopt}"
            )
        time.sleep(_LOOK)
