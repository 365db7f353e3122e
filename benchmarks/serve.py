"""``connect`` in a process of its own, on a simulated host that another process has made.

``python -m benchmarks.serve MACHINE SOCKET RECORDS ARGUMENT...``: the machine's address, dom0's
xenstore socket, a directory for the records, and what comes after ``xen-disk connect``, or
``fork-server``.
"""

from __future__ import annotations

import sys

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.simulated.hypervisor import SimulatedHypervisor, SimulatedMachine
from xen_disk_py.xenbus.xenstore import Store

if __name__ == "__main__":
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
