"""Disks of other backends, as their toolstacks write them into xenstore."""

from __future__ import annotations

import logging
import os

import pytest

from xen_disk_py.backends.sharing import Storage, storage_of
from xen_disk_py.errors import ImageError
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus import xenstore
from xen_disk_py.xenbus.other_backends import check
from xen_disk_py.xenbus.toolstack import PID_KEY
from xen_disk_py.xenbus.xenstore import Store

XVDA = 51712


@pytest.fixture
def store():
    with SimulatedXenstored() as running, Store.open(running.socket_path()) as result:
        yield result


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


def serve(store, kind, *, guest=5, devid=XVDA, **keys):
    """Write the keys of a device that another backend serves."""
    home = f"/local/domain/0/backend/{kind}/{guest}/{devid}"
    keys = {"state": "4", "online": "1", "mode": "w", **keys}
    for name, value in keys.items():
        store.write(f"{home}/{name.replace('_', '-')}", value)
    return home


def of(path, *, writable):
    return [storage_of(os.stat(path), path, writable=writable)]


def a_device(number):
    return [Storage("/dev/vg/web", True, frozenset(), frozenset({number}))]


@pytest.mark.parametrize(
    "params", ["aio:{}", "qcow2:{}", "{}", "vhd:{}", "aio:{},backend=raw", "aio:/.{}"]
)
def test_a_file_of_qemu_is_refused(store, image, params):
    serve(store, "qdisk", params=params.format(image))
    with pytest.raises(ImageError) as caught:
        check(store, of(image, writable=True), force=False)
    assert (
        f"{image}: in use as xvda of domain 5 (qdisk): detach it there first "
        "(xl block-detach 5 xvda), or --force to use it all the same"
    ) == str(caught.value)


def test_another_name_of_the_file_is_the_same(store, image, tmp_path):
    os.link(image, tmp_path / "link")
    serve(store, "qdisk", params=f"aio:{tmp_path}/link")
    with pytest.raises(ImageError, match="in use as xvda"):
        check(store, of(image, writable=True), force=False)


def test_a_device_of_blkback_is_refused(store):
    serve(store, "vbd", params="/dev/vg/web", physical_device="fd:1a")
    check(store, a_device((0xFD, 0x1B)), force=False)
    with pytest.raises(ImageError, match=r"/dev/vg/web: in use as xvda of domain 5 \(vbd\)"):
        check(store, a_device((0xFD, 0x1A)), force=False)


@pytest.mark.parametrize(
    ("writable", "mode", "refused"),
    [(True, "r", True), (False, "w", True), (False, "w!", True), (False, "r", False)],
)
def test_readers_share(store, image, writable, mode, refused):
    serve(store, "qdisk", params=f"aio:{image}", mode=mode)
    if refused:
        with pytest.raises(ImageError):
            check(store, of(image, writable=writable), force=False)
    else:
        check(store, of(image, writable=writable), force=False)


@pytest.mark.parametrize(
    "keys",
    [
        {PID_KEY: "77"},  # it has locked it, or nobody serves it
        {"script": "/etc/xen/scripts/block-xen-disk"},
        {"state": "6", "online": "0"},
        {"params": "aio:/gone"},
        {"params": "aio:\0"},
        {"params": ""},
    ],
)
def test_others_do_not_matter(store, image, keys):
    serve(store, "vbd3", params=f"aio:{image}")
    for name, value in keys.items():
        store.write(f"/local/domain/0/backend/vbd3/5/{XVDA}/{name}", value)
    store.write("/local/domain/0/backend/vif/5/0/state", "4")
    check(store, of(image, writable=True), force=False)


def test_a_disk_without_storage_needs_no_look(store):
    store.close()
    check(store, [], force=False)


def test_force_is_a_warning(store, image, caplog):
    serve(store, "qdisk", params=f"aio:{image}")
    with caplog.at_level(logging.WARNING):
        check(store, of(image, writable=True), force=True)
    assert [f"{image}: in use as xvda of domain 5 (qdisk) (used all the same: --force)"] == (
        caplog.messages
    )


def test_a_hundred_disks_of_ours_are_looked_at_in_few_exchanges(store, image, monkeypatch):
    def exchange(router, packets):
        exchanges.append(len(packets))
        return real(router, packets)

    for guest in range(1, 101):
        home = serve(store, "vbd3", guest=guest, params=f"raw:{image}")
        store.write(f"{home}/{PID_KEY}", "4711")
    exchanges = []
    real = xenstore._Router.exchange
    monkeypatch.setattr(xenstore._Router, "exchange", exchange)
    check(store, of(image, writable=True), force=False)

    assert [1, 1, 1, 100, 100] == exchanges  # own domain; kinds; guests; devices; who serves them
