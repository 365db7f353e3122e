"""A real Ceph cluster on this machine, for tests: a monitor, an OSD in memory, a pool ``rbd``.

It takes about ten seconds to come up and needs root, Debian's ceph-mon, ceph-osd and ceph-common,
and the ports 3300, 6789 and 6800 to 7300 of the loopback device, or of another address.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "rbd")
PATIENCE = 120.0


def missing() -> str:
    """Say what this machine lacks; empty if nothing."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: ceph-mon ceph-osd ceph-common)"
    return "" if os.geteuid() == 0 else "needs root"


class Cluster:
    """Runs until :meth:`close`, or until who has started it dies.

    Args:
        directory: what all of it is in.
        address: where it is reached.
        settings: of Ceph's, what else there is to say.
    """

    def __init__(self, directory: Path, address: str = "127.0.0.1", **settings: object) -> None:
        self.directory = directory
        self._settings = {key.replace("_", " "): value for key, value in settings.items()}
        self._address = address
        self.addresses = f"[v2:{address}:3300,v1:{address}:6789]"
        self.conf = directory / "ceph.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        directory, keyring = self.directory, str(self.directory / "keyring")
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd", "run"):
            (directory / name).mkdir()
        # ceph-osd of Debian 13 and later has a relative path compiled in.
        classes = os.path.dirname(glob.glob("/usr/lib/*/rados-classes/libcls_rbd.so")[0])
        settings = {
            "fsid": fsid,
            "mon host": self.addresses,
            "mon initial members": "a",
            "public addr": self._address,
            "cluster addr": self._address,
            "ms bind ipv6": "false",
            "auth cluster required": "none",
            "auth service required": "none",
            "auth client required": "none",
            "auth allow insecure global id reclaim": "true",
            "osd crush chooseleaf type": "0",
            "osd pool default size": "1",
            "osd pool default min size": "1",
            "osd pool default pg autoscale mode": "off",
            "mon allow pool size one": "true",
            "mon data": directory / "mon",
            "osd data": directory / "osd",
            "run dir": directory / "run",
            "admin socket": directory / "run/$name-$pid.asok",
            "pid file": "",
            "log file": directory / "$name.log",
            "keyring": keyring,
            "osd objectstore": "memstore",
            "memstore device bytes": str(2 << 30),
            "osd class dir": classes,
            **self._settings,
        }
        lines = [f"{key} = {value}" for key, value in settings.items()]
        self.conf.write_text("\n".join(["[global]", *lines, ""]))
        monmap = str(directory / "monmap")
        any_ = ["--cap", "mon", "allow *"]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", *any_)
        client = ["-n", "client.admin", *any_, "--cap", "osd", "allow *"]
        self._run("ceph-authtool", keyring, "--gen-key", *client)
        self._run("monmaptool", "--create", "--addv", "a", self.addresses, "--fsid", fsid, monmap)
        mon = ["ceph-mon", *self.arguments, "-i", "a"]
        self._run(*mon, "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._daemon("mon", [*mon, "-f"])
        self.ceph("--connect-timeout", "60", "mon", "stat")
        self.ceph("osd", "new", osd, "0")
        self._run("ceph-osd", *self.arguments, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.start_osd()
        self.ceph("osd", "pool", "create", "rbd", "8", "8")
        self.ceph("osd", "pool", "application", "enable", "rbd", "rbd")

    @property
    def arguments(self) -> list[str]:
        """What names the cluster on a command line."""
        return ["-c", str(self.conf)]

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def _daemon(self, name: str, command: list[str]) -> None:
        with open(self.directory / f"{name}.err", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def ceph(self, *words: str) -> str:
        """Run ``ceph``."""
        return self._run("ceph", *self.arguments, *words)

    def rbd(self, *words: str) -> str:
        """Run ``rbd``."""
        return self._run("rbd", *self.arguments, *words)

    def start_osd(self) -> None:
        """Start the OSD and wait until the cluster has it."""
        self._daemon("osd", ["ceph-osd", *self.arguments, "-i", "0", "-f"])
        deadline = time.monotonic() + PATIENCE
        while " 1 up" not in self.ceph("osd", "stat"):
            assert time.monotonic() < deadline, "the OSD does not come up"
            time.sleep(0.2)

    def pause_osd(self) -> None:
        """Stop the OSD where it is: it answers nothing, and loses nothing."""
        osd = self._daemons["osd"]
        osd.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{osd.pid}/task")
        while any("State:\tT" not in (each / "status").read_text() for each in threads.iterdir()):
            time.sleep(0.01)  # the signal is sent, but a thread may run on for a moment

    def resume_osd(self) -> None:
        """Let it continue."""
        self._daemons["osd"].send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End all daemons."""
        for daemon in reversed(self._daemons.values()):
            with contextlib.suppress(ProcessLookupError):
                daemon.kill()
            daemon.wait()
