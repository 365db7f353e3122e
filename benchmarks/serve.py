"""``connect`` in a process of its own, on a simulated host that another process has made.

``python -m benchmarks.serve MACHINE SOCKET RECORDS ARGUMENT...``: the machine's address, dom0's
xenstore socket, a directory for the records, and what comes after ``xen-disk connect``, or
``fork-server``. It and its forks end with who measures, however that ends.
"""

from __future__ import annotations

import os
import sys

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.host.process import end_with_parent
from xen_disk_py.simulated.hypervisor import SimulatedHypervisor, SimulatedMachine
from xen_disk_py.xenbus.xenstore import Store


def _end_with_parents() -> None:
    parents = [os.getppid()]
    end_with_parent(parents[0])
    os.register_at_fork(
        before=lambda: parents.append(os.getpid()),
        after_in_parent=parents.pop,
        after_in_child=lambda: end_with_parent(parents[-1]),
    )


if __name__ == "__main__":
    _end_with_parents()
    address, socket, records, *arguments = sys.argv[1:]
    with SimulatedMachine.attach(address) as machine:
        environment = Environment(
            open_store=lambda: Store.open(socket),
            open_hypervisor=lambda: SimulatedHypervisor(machine),
            xen_version=lambda: None,
            record_directory=records,
        )
        if arguments != ["fork-server"]:
            arguments = ["connect", *arguments]
        sys.exit(main(arguments, environment))
