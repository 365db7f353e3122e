"""The program as one file, made as the README says: all of it works, wherever it is started."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pyxs

import xen_disk_py
from xen_disk_py import __version__
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.record import find
from xen_disk_py.xenbus.states import Address, State

README = Path(__file__).parents[1] / "README.md"
NEW = b"new" * 4096
ADDRESS = Address(0, 5, 51728, "vbd3")


def documented_command():
    """Return the second half of the README's command; the first installs what is zipped."""
    (command,) = re.findall(
        r"^python3 -m pip install .* && (.*zipapp.*)$", README.read_text(), re.M
    )
    return [sys.executable if word == "python3" else word for word in shlex.split(command)]


def build(directory, version=__version__):
    """Build it; what the README has pip put there is what these tests run with."""
    for package in (xen_disk_py, pyxs):
        source = Path(package.__file__).parent
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, directory / "build/pyz" / source.name, ignore=without)
    with (directory / "build/pyz/xen_disk_py/__init__.py").open("a") as file:
        file.write(f"__version__ = {version!r}\n")
    subprocess.run(documented_command(), cwd=directory, check=True)
    return directory / "xen-disk.pyz"


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    return build(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def start(one_file, tmp_path):
    """Run it, from a directory where somebody waits for a Python that looks into it."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    for name in ("xen_disk_py.py", "argparse.py", "pyxs.py"):
        (directory / name).write_text("raise SystemExit('a stranger was here')\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def start(*argv):
        # -S: without what is installed here
        command = [sys.executable, "-S", str(one_file), *argv]
        return subprocess.run(
            command,
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return start


def test_it_runs_by_itself(one_file, start):
    assert f"xen-disk {__version__}\n" == start("-V").stdout
    assert one_file.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(one_file, os.X_OK)


@pytest.mark.shared
def test_demo(start):
    done = start("demo", "--bytes", "64K", "--seconds", "0.1", "--json")
    assert (0, "") == (done.returncode, done.stderr)
    assert json.loads(done.stdout)["verified"]


@pytest.mark.shared
def test_install(one_file, start, tmp_path):
    """The units start this file; each file has its content."""
    done = start("install", "--prefix", str(tmp_path / "root"))
    assert 0 == done.returncode
    for line in done.stdout.splitlines():
        assert Path(line.partition("installed ")[2]).stat().st_size > 200
    for unit, words in (("xen-disk-serve", "serve"), ("xen-disk@", "connect --quiet")):
        text = (tmp_path / f"root/etc/systemd/system/{unit}.service").read_text()
        assert f"\nExecStart={sys.executable} -I {one_file} {words}" in text


@pytest.mark.shared
def test_a_supervised_disk(host, processes, tmp_path):
    """On a simulated host: a worker is killed, and the next one becomes a newer version."""
    one_file = build(tmp_path / "old")
    processes.install(place=one_file)
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    command = ["--path", str(tmp_path / "disk.raw"), "--backend=raw", "--vdev=xvdb", "guest"]
    process = processes.start("connect", "--supervise", *command)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    frontend.write(0, NEW)

    first = facts(host)
    words = Path(f"/proc/{first.pid}/cmdline").read_text().split("\0")
    assert ["-I", str(one_file), "connect"] == words[2:5]
    os.kill(first.pid, signal.SIGKILL)
    host.until(lambda: is_served_by_another(host, first.pid))
    assert NEW == frontend.read(0, len(NEW))

    os.replace(build(tmp_path / "new", "next" * 1000), one_file)
    env = host.environment()
    words = ["upgrade", "guest", "xvdb", "--timeout=100"]  # it compiles all of itself, twice
    assert ExitStatus.OK == main(words, env), env.stderr.getvalue()
    assert "next" * 1000 == facts(host).version
    assert NEW == frontend.read(0, len(NEW))

    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


def facts(host):
    found = find(host.records, ADDRESS)
    return found.facts if found is not None else None


def is_served_by_another(host, pid):
    now = facts(host)
    return now is not None and now.pid not in (0, pid) and now.started is not None
