"""What is read from the nodes that libxl makes, and what is written there."""

from __future__ import annotations

import pytest
from libxl_stub import Libxl

from xen_disk_py.errors import DeviceError, DeviceTaken
from xen_disk_py.libxl import attachment
from xen_disk_py.xenbus import toolstack


@pytest.fixture
def libxl(host, tmp_path):
    libxl = Libxl(host, tmp_path)
    yield libxl
    for devid in list(host.store.list("/local/domain/0/backend/vbd3/5")):
        libxl.remove(attachment.Address(0, 5, int(devid), "vbd3"))


def keys(host, address):
    """The backend's keys."""
    start = f"{address.backend}/"
    return {k[len(start) :]: v for k, v in host.tree().items() if k.startswith(start)}


@pytest.mark.parametrize(
    ("script", "ours"),
    [
        ("/etc/xen/scripts/block-xen-disk", True),
        ("/opt/xen/block-xen-disk", True),
        ("block-xen-disk", True),
        ("/etc/xen/scripts/block-tap", False),
        ("/etc/xen/scripts/block-xen-disk-2", False),
        ("/bin/true", False),
        ("", False),
    ],
)
def test_which_disks_are_ours(host, libxl, script, ours):
    assert ours is toolstack.is_from_libxl(host.store, libxl.create("/x", script=script))


def test_no_script_at_all(host, libxl):
    address = libxl.create("/x")
    host.store.remove(f"{address.backend}/script")
    assert not toolstack.is_from_libxl(host.store, address)


@pytest.mark.parametrize("mode", ["r", "w", "", "rw", "x"])
@pytest.mark.parametrize("discard", ["0", "1"])
def test_the_config(host, libxl, mode, discard):
    """Only what is clearly to be written is."""
    config = attachment.read_config(
        host.store, libxl.create("/x", mode=mode, discard_enable=discard)
    )
    assert (mode != "w") is ("--read-only" in config.arguments)
    assert (discard == "1") is config.discard


def test_a_path_that_is_not_ascii(host, libxl):
    address = libxl.create("/x")
    host.xenstored.nodes[f"{address.backend}/params"] = host.xenstored.nodes[
        f"{address.backend}/params"
    ]._replace(value="aio:/bilder/größe.raw".encode())
    assert "--path=/bilder/größe.raw" == attachment.read_config(host.store, address).arguments[0]


def test_what_is_published(host, libxl):
    address = libxl.create("/x")
    before = keys(host, address)
    config = attachment.read_config(host.store, address)
    attachment.publish(host.store, address, config, {"sectors": "8", "state": "2"}, 77)
    assert {**before, "sectors": "8", "state": "2", "xen-disk-pid": "77"} == keys(host, address)


@pytest.mark.parametrize("state", [None, *"123456"])
@pytest.mark.parametrize("pid", [None, "76", "77"])
def test_who_may_write_when(host, libxl, state, pid):
    """Publish and refuse a device once, and close only one's own."""
    address = libxl.create("/x")
    config = attachment.read_config(host.store, address)
    for key, value in (("state", state), ("xen-disk-pid", pid)):
        if value is None:
            host.store.remove(f"{address.backend}/{key}")
        else:
            host.store.write(f"{address.backend}/{key}", value)
    before = keys(host, address)
    new = state == "1" and pid is None
    if not new:
        expected = DeviceTaken if pid else DeviceError
        with pytest.raises(expected):
            attachment.publish(host.store, address, config, {"state": "2"}, 77)
        assert not attachment.refuse(host.store, address, "why")
        assert before == keys(host, address)
    else:
        assert attachment.refuse(host.store, address, "why")
        refused = {"hotplug-error": "why", "hotplug-status": "error", "state": "2"}
        assert {**before, **refused} == keys(host, address)
    before = keys(host, address)
    attachment.close(host.store, address, 77)
    closed = {"state": "6"} if state and pid == "77" else {}
    assert {**before, **closed} == keys(host, address)
    attachment.close(host.store, address, None)
    closed = closed or ({"state": "6"} if state and pid is None else {})
    assert {**before, **closed} == keys(host, address)


def test_nothing_is_written_where_nothing_is(host, libxl):
    address = libxl.create("/x")
    config = attachment.read_config(host.store, address)
    libxl.remove(address)
    before = host.tree()
    assert not attachment.refuse(host.store, address, "why")
    attachment.close(host.store, address, None)
    with pytest.raises(DeviceError, match="has taken the disk away"):
        attachment.publish(host.store, address, config, {"state": "2"}, 77)
    with pytest.raises(attachment.Replaced, match="has taken the disk away"):
        attachment.pass_on(host.store, address, config, "76", 77)
    assert before == host.tree()


@pytest.mark.parametrize(
    "changed", [{"params": "aio:/y"}, {"mode": "r"}, {"discard_enable": "0"}, {"device_type": "c"}]
)
def test_what_was_opened_is_served_as_nothing_else(host, libxl, changed):
    """The toolstack may have made another device while that was opened."""
    address = libxl.create("/x")
    config = attachment.read_config(host.store, address)
    libxl.remove(address)
    libxl.create("/x", **changed)
    before = host.tree()
    with pytest.raises(attachment.Replaced, match="another disk"):
        attachment.publish(host.store, address, config, {"state": "2"}, 77)
    assert before == host.tree()
    host.store.write(f"{address.backend}/xen-disk-pid", "76")
    with pytest.raises(attachment.Replaced, match="another disk"):
        attachment.pass_on(host.store, address, config, "76", 77)
    assert {**before, f"{address.backend}/xen-disk-pid": "76"} == host.tree()


def test_a_disk_is_passed_on_from_who_had_it(host, libxl):
    address = libxl.create("/x", state="4", xen_disk_pid="76")
    config = attachment.read_config(host.store, address)
    before = keys(host, address)
    with pytest.raises(attachment.Replaced, match="has taken the disk away"):
        attachment.pass_on(host.store, address, config, "75", 77)
    attachment.pass_on(host.store, address, config, "76", 77)
    assert {**before, "xen-disk-pid": "77"} == keys(host, address)


def test_any_reason_can_be_told(host, libxl):
    address = libxl.create("/x")
    attachment.refuse(host.store, address, "größe\n\x7f" + "x" * 5000)
    told = host.tree()[f"{address.backend}/hotplug-error"]
    assert told == "gr??e??" + "x" * 993
