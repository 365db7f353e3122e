"""Rings of a hostile guest on a simulated host; how long the attacks last."""

from __future__ import annotations

import pytest

from hostile.attacker import LONG, Memory, Wire


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with XEN_DISK_LONG=1 only")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not LONG:
            item.add_marker(pytest.mark.skip(reason="takes long: set XEN_DISK_LONG=1"))
        if LONG and item.path.parent.name == "hostile":
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture
def wire(host):
    """Return a function that makes rings, which are gone after the test."""

    def make(disk=None, *arguments, **options):
        made = Wire(
            host.guest,
            host.hypervisor,
            disk if disk is not None else Memory(),
            *arguments,
            **options,
        )
        host._stack.callback(made.close)
        return made

    return make


@pytest.fixture
def attacked(host):
    """Return a function that attaches a disk and gives its driver: a session drives the device."""

    def make(backend=None, **options):
        return host.serving(backend if backend is not None else Memory(), **options)

    return make
