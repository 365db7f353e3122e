"""What the rest of the program takes for granted of a hypervisor, on the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.smoke
def test_hypervisor() -> None:
    """The cases that are skipped where there is no Xen."""
    options = ("-q", "-p", "no:cacheprovider", "-c", "tests/xen/pytest.ini", "-rs", "-m", "xen")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/test_hypervisor_contract.py"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " skipped" not in result.stdout, result.stdout
