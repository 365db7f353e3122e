"""The hotplug script, run as libxl runs it."""

from __future__ import annotations

import pytest
from libxl_stub import run_script

SERVED = {"state": "2", "xen-disk-pid": "123"}


def test_a_served_disk_may_connect(tmp_path):
    status, keys = run_script(tmp_path, "add", SERVED)
    assert (0, {**SERVED, "hotplug-status": "connected"}) == (status, keys)


def test_a_refused_disk_fails_with_its_reason(tmp_path):
    refused = {"state": "2", "hotplug-error": "/x: no such 'file'", "hotplug-status": "error"}
    assert (1, refused) == run_script(tmp_path, "add", refused)


def test_a_disk_that_somebody_else_put_into_state_2(tmp_path):
    status, keys = run_script(tmp_path, "add", {"state": "2"})
    assert status == 1
    assert "xen-disk serve does not serve this disk" == keys["hotplug-error"]
    assert "error" == keys["hotplug-status"]


@pytest.mark.parametrize("keys", [{}, SERVED, {"hotplug-error": "bad"}])
def test_remove_changes_nothing(tmp_path, keys):
    assert (0, keys) == run_script(tmp_path, "remove", keys)
