"""What a process of a disk has in memory, of which a host may have hundreds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROGRAM = """
import importlib, json, logging, pyxs, sys
# pyxs has "platform", which has "subprocess" in older Pythons; logging "pathlib" in 3.15
before = set(sys.modules)
for name in ("cli", "commands.connect", "commands.adopt", "backends.raw", "backends.cow"):
    importlib.import_module(f"xen_disk_py.{name}")
from xen_disk_py.backends.loader import open_backend
open_backend("discard", {})
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# Modules that take hundreds of KiB with what they import; those who need them import them late.
LARGE = {
    *(
        "decimal",
        "difflib",
        "pathlib",
        "random",
        "shutil",
        "subprocess",
        "tempfile",
        "urllib.parse",
    ),
    *("xen_disk_py.backends.nbdkit", "xen_disk_py.recovery.supervisor"),
}


def test_a_disk_imports_nothing_large_that_it_does_not_use():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-S", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    assert not LARGE & set(json.loads(done.stdout))
