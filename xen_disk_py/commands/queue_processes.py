"""How ``connect`` and ``serve`` have a process made for each queue of a disk."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Callable

from ..datapath.disk import Disk
from ..errors import XenDiskError
from ..host import privileges
from ..host.privileges import User
from ..host.process import CommandLine, start_time
from ..hypervisor import Hypervisor
from ..recovery.record import Record
from ..recovery.spec import DiskSpec
from .arguments import PROGRAM
from .environment import Environment

if TYPE_CHECKING:
    from ..datapath.processes import Identities, Interrupts, QueueProcesses


def start(
    env: Environment,
    spec: DiskSpec,
    disk: Disk,
    record: Record,
    hypervisor: Hypervisor,
    domid: int,
    name: str,
    stack: ExitStack,
    *,
    adopts: bool = False,
    user: User | None = None,
    crash: Callable[[Exception], object] | None = None,
    interrupts: Interrupts | None = None,
) -> QueueProcesses | None:
    """Make them, before there is a thread; None where one thread is to serve them.

    Args:
        env: opens a hypervisor in each.
        spec: says what is asked for.
        disk: its statistics are the record's.
        record: of the disk.
        hypervisor: of this process; a fork cannot use it.
        domid: the guest.
        name: of the disk, for ``ps``.
        stack: ends them.
        adopts: the guest has the disk already, from a process that died: if they cannot be had now,
            ``crash`` leaves it to another.
        user: whom they become.
        crash: as of :class:`QueueProcesses`.
        interrupts: likewise.

    Raises:
        XenDiskError: they cannot be had.
    """
    if not spec.has_queue_processes:
        return None
    from ..datapath.processes import QueueProcesses  # hardly a disk has them

    def prepare(number: int) -> Hypervisor:
        env.err.forget()
        env.out.forget()
        CommandLine().show(f"{PROGRAM}: queue {number} of {name}")
        hypervisor.close()
        own = env.open_hypervisor()
        if user is not None:
            own.reserve(domid, 1)
            privileges.become(user)
        return own

    def note(queues: Identities) -> None:
        """Have it be known whom a successor waits for, though we were killed before we serve."""
        if adopts:  # else there is nothing that a successor could take over
            pid = os.getpid()
            started = start_time(pid)
            record.update(pid=pid, process_started=started, started=None, queues=queues)

    journals = record.journals[: spec.queues]
    try:
        processes = QueueProcesses(
            disk,
            spec.queue_options,
            journals,
            prepare,
            crash=crash,
            interrupts=interrupts,
            on_forked=note,
        )
    except XenDiskError as error:
        if adopts and crash is not None:
            crash(error)
        raise
    return stack.enter_context(processes)
