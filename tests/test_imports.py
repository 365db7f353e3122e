"""What a process of a disk has in memory, of which a host may have hundreds; and others at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, logging, pyxs, sys
# pyxs has "platform", which has "subprocess" in older Pythons; logging "pathlib" in 3.15
before = set(sys.modules)
import xen_disk_py.cli
from xen_disk_py.commands.parsing import parse
{program}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
DISK = """
import xen_disk_py.commands.adopt, xen_disk_py.commands.connect, xen_disk_py.libxen
from xen_disk_py.commands.backend_arguments import spec_from
args = parse(["connect", "vm", *{words!r}])
spec_from(args).open_disk().close()
"""
LIST = """
import xen_disk_py.commands.list
parse(["list"])
"""
# Modules that take hundreds of KiB with what they import; those who need them import them late.
LARGE = {
    *("ast", "bz2", "dataclasses", "decimal", "difflib", "dis", "inspect", "lzma", "pathlib"),
    *("random", "shutil", "subprocess", "tempfile", "urllib.parse"),
    *("xen_disk_py.backends.nbdkit", "xen_disk_py.recovery.supervisor"),
}
# Smaller ones, of what hardly a disk does.
RARE = {
    *("grp", "importlib.util", "pwd"),
    *("xen_disk_py.backends.exporting", "xen_disk_py.datapath.processes"),
    *("xen_disk_py.recovery.survey", "xen_disk_py.trace"),
}
# What serves a disk.
SERVES = {
    *("xen_disk_py.backends.image", "xen_disk_py.backends.loader", "xen_disk_py.datapath.disk"),
    *("xen_disk_py.datapath.queue", "xen_disk_py.libxen", "xen_disk_py.session"),
}


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def imported(program):
    """Return what a process has imported that has parsed its command line, and run that."""
    return set(json.loads(python("-c", PROGRAM.format(program=program)).stdout))


@pytest.mark.parametrize("options", [["--backend", "raw"], [], ["--overlay", "changes"]])
def test_a_disk_imports_nothing_that_it_does_not_use(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    found = imported(DISK.format(words=["--path", "disk.raw", *options]))
    assert not (LARGE | RARE) & found
    assert found >= SERVES


def test_a_list_imports_nothing_that_serves():
    assert not (LARGE | SERVES) & imported(LIST)


def test_a_version_is_printed_without_xenstore():
    said = python("-X", "importtime", "-m", "xen_disk_py", "--version").stderr
    found = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    assert not ({"pyxs"} | LARGE | SERVES) & found
    assert "xen_disk_py.cli" in found
