"""What the rest of the program takes for granted of Xen and of its xenstore, on the real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["test_hypervisor_contract", "test_xenstore"])
def test_contract(module: str) -> None:
    """The cases that are skipped where there is no Xen."""
    options = ("-q", "-p", "no:cacheprovider", "-c", "tests/xen/pytest.ini", "-rs", "-m", "xen")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{module}.py"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " skipped" not in result.stdout, result.stdout
