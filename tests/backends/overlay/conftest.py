"""What the tests of power cuts share."""

from __future__ import annotations

import pytest

from xen_disk_py.backends.overlay import epoch, header


@pytest.fixture
def boot(monkeypatch):
    """Names the boot that the host is in."""
    now = ["a" * 36]
    for module in (epoch, header):
        monkeypatch.setattr(module, "boot_id", lambda: now[0])

    def boot(letter):
        now[0] = letter * 36

    return boot
