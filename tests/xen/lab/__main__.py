"""Start the lab: ``python -m tests.xen.lab`` or ``python tests/xen/lab``, from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

if (
    not __package__
):  # started by the directory's name: give the relative imports a package to stand in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "lab"

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
