"""Programs of ours as real processes on a simulated host: to be killed, and to follow each other.

Each is started as the program starts itself, but with PROGRAM in the place of Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import xen_disk_py
from xen_disk_py.host.process import is_process
from xen_disk_py.host.program import own_command

# What a busy machine may take longer for than the product would wait.
PATIENT = """
import xen_disk_py.xenbus.device
import xen_disk_py.datapath.disk
import xen_disk_py.datapath.processes
import xen_disk_py.trace.sink
import xen_disk_py.recovery.control
import xen_disk_py.recovery.record
import xen_disk_py.session
import xen_disk_py.host.systemd
import xen_disk_py.xenbus.xenstore

xen_disk_py.xenbus.device.Device.force.__defaults__ = (30.0,)
xen_disk_py.datapath.disk.SETTLING = 30.0
xen_disk_py.datapath.processes.ANSWER = 30.0
xen_disk_py.trace.sink.PATIENCE = 30.0
xen_disk_py.recovery.control._CLIENT = 30.0
xen_disk_py.recovery.control._GRACE = 30.0
xen_disk_py.recovery.control.ask.__kwdefaults__["timeout"] = 30.0
xen_disk_py.recovery.record._TRIES = 3000  # whoever looks into a record may be stopped just then
xen_disk_py.session._TOOLSTACK_PATIENCE = 30.0
xen_disk_py.host.systemd._PATIENCE = 30.0
xen_disk_py.xenbus.xenstore.Store.open.__func__.__defaults__ = (None, 30.0)
"""

PROGRAM = """#!{python}
import gc
import os
import subprocess
import sys

gc.disable()  # as __main__ does; run enables it
sys.path.insert(0, {package!r})
from xen_disk_py.host.output import open_standard_descriptors

open_standard_descriptors()
from xen_disk_py.cli import main, run
from xen_disk_py.commands.environment import Environment
from xen_disk_py.recovery import record
from xen_disk_py.simulated.hypervisor import SimulatedHypervisor, SimulatedMachine
from xen_disk_py.xenbus.states import Address
from xen_disk_py.xenbus.xenstore import Store

assert sys.argv[1] == "-I"  # how is shown in tests/host/test_program.py
sys.executable = __file__
machine = SimulatedMachine.attach({machine!r})
if "--adopt" in sys.argv and '"tries"' not in " ".join(sys.argv):
    for each in os.listdir({records!r}):
        domid, _, devid = each.partition("-")
        if devid.isdigit():
            record.await_end({records!r}, Address(0, int(domid), int(devid), ""))
    machine.bury_backend()  # what a kernel has done when a process has died, or become this one
for descriptor in machine.descriptors:
    os.set_inheritable(descriptor, True)
popen = subprocess.Popen
subprocess.Popen = lambda *what, **more: popen(*what, **{{**more, "pass_fds": machine.descriptors}})
env = Environment(
    open_store=lambda: Store.open({socket!r}),
    open_hypervisor=lambda: SimulatedHypervisor(machine),
    xen_version=lambda: (4, 20),
    record_directory={records!r},
    journal={journal!r},
)
{patient}
{hook}
run(sys.argv[4 if sys.argv[2] == "-m" else 3 :], env)
"""


class Process:
    """One of them."""

    def __init__(self, host, command, directory, **streams):
        self._host = host
        self._out, self._err = directory / "stdout", directory / "stderr"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                command,
                pass_fds=host.machine.descriptors,
                cwd=directory,
                **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **streams},
            )
        self.pid = self._process.pid

    @property
    def out(self):
        return self._out.read_text()

    @property
    def err(self):
        return self._err.read_text()

    def signal(self, signum=signal.SIGINT):
        self._process.send_signal(signum)

    def until(self, text):
        """Wait until it has said that, on either stream."""
        self._host.until(
            lambda: text in self.out + self.err or self._process.poll() is not None,
            what=f"{text!r}",
        )
        assert text in self.out + self.err, self.out + self.err

    def wait(self):
        """Wait for its end; the result is its exit status."""
        return self._process.wait(30)

    @property
    def is_over(self):
        return self._process.poll() is not None

    def kill(self):
        """Kill it, and do what a kernel does then."""
        self._process.kill()
        self._process.wait(30)
        queues = [each for facts in self._host.facts() for each in facts.queues]
        self._host.until(lambda: not any(is_process(*each) for each in queues))
        self._host.machine.bury_backend()


class Processes:
    """Starts them; none is left at the end."""

    def __init__(self, host, directory):
        self._host = host
        self._directory = directory
        self._all = []
        self.program = directory / "python"
        self.install()

    def install(self, hook="", place=Path(xen_disk_py.__file__).parents[1]):
        """Write the program anew.

        ``hook`` is Python that runs in each before ``main``; ``place`` is what is put into Python's
        path, to import the program from.
        """
        text = PROGRAM.format(
            python=sys.executable,
            package=str(place),
            machine=self._host.machine.address,
            socket=self._host.xenstored.socket_path(0),
            records=self._host.records,
            journal=self._host.journal,
            patient=PATIENT,
            hook=hook,
        )
        new = self.program.with_name("new")
        new.write_text(text)
        new.chmod(0o755)
        os.replace(new, self.program)

    def start(self, *argv, prefix=(), **streams):
        """Start one: ``prefix`` is what starts it, ``streams`` are options of Popen's."""
        directory = self._directory / f"process{len(self._all)}"
        directory.mkdir()
        command = [*prefix, str(self.program), *own_command(*argv)[1:]]
        self._all.append(Process(self._host, command, directory, **streams))
        return self._all[-1]

    def close(self):
        for process in self._all:
            process.kill()
