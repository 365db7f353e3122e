"""What tests of several commands need."""

from __future__ import annotations

import pytest


@pytest.fixture
def image(tmp_path):
    """An image of 1 MiB; a module whose commands need another has its own."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * 4096)
    return path
