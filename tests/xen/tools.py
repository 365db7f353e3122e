"""More for a guest's initial RAM disk: Python with its sqlite3, a script of ours, and xfs.

All of it is dom0's own. A guest's kernel unpacks one archive behind another, and a later file takes
the place of an earlier one.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from .guest import IS_ARM, LAB
from .lab.architecture import AMD64, ARM64
from .lab.archive import Modules, Tree, add_programs
from .lab.build import CHECKSUMS, GUEST_MODULES

ROOT = Path("/")
LAZY = ("encodings.ascii", "encodings.latin_1", "encodings.utf_8", "linecache", "traceback")
"""What Python imports only when it needs it."""


def _imported(script: Path) -> list[Path]:
    """Return the files of all modules that a script imports, without ``site``."""
    show = (
        f"import runpy, sys, {', '.join(LAZY)}; runpy.run_path({str(script)!r}); "
        "print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)))"
    )
    command = [sys.executable, "-I", "-S", "-c", show]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Path(name) for name in done.stdout.split()]


def write_ramdisk(path: Path, script: Path) -> None:
    """Write the lab's initial RAM disk, with Python, all that a script imports, and xfs."""
    architecture = ARM64 if IS_ARM else AMD64
    tree = Tree()
    program = str(Path(sys.executable).resolve().relative_to(ROOT))
    modules = _imported(script)
    extensions = [str(each.relative_to(ROOT)) for each in modules if each.suffix == ".so"]
    add_programs(tree, ROOT, [program, *extensions], architecture)
    for name in extensions:  # they belong elsewhere; their libraries are in place
        del tree.entries[f"opt/bin/{name.rpartition('/')[2]}"]
    for each in modules:
        tree.file(str(each.relative_to(ROOT)), each.read_bytes(), 0o644)
    tree.link("opt/bin/python3", Path(program).name)
    tree.file(script.name, script.read_bytes(), 0o644)
    Modules(ROOT).add(tree, (*GUEST_MODULES, "xfs"), optional=CHECKSUMS)
    path.write_bytes((LAB / "guest.cpio").read_bytes() + tree.cpio())


def command(script: Path, *arguments: str) -> str:
    """Return what runs the script there, for a shell."""
    words = ["/opt/bin/python3", "-S", "-B", f"/{script.name}", *arguments]
    return f"PYTHONHOME=/usr {shlex.join(words)}"
