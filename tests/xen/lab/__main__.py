"""Start the lab, from the checkout: ``python -m tests.xen.lab``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
