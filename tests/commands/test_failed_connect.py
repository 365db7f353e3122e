"""A ``connect`` that fails has changed nothing on disk, whatever the format."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess

import pytest

from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.vhd import VhdBackend, layout
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus

from .test_bad_disks import SIZE, base, child, patch, resum, state

NODE = "/local/domain/0/backend/vbd/7/51728"


# Each makes what a disk lies in, and returns the words for it; the last is written to, or made.


def raw(directory):
    path = directory / "disk.raw"
    path.write_bytes(b"r" * SIZE)
    return ["--backend", "raw", "--path", path]


def mmap(directory):
    return ["--backend", "mmap", *raw(directory)[2:]]


def fixed_vhd(directory):
    create(str(directory / "disk.vhd"), SIZE, fixed=True)
    return ["--format", "vhd", "--path", directory / "disk.vhd"]


def vhd(directory):
    return ["--format", "vhd", "--path", base(directory)]


def vhd_without_its_footer(directory):
    path = base(directory)
    os.truncate(path, os.path.getsize(path) - 512)
    return ["--format", "vhd", "--path", path]


def vhd_with_an_old_copy_of_its_footer(directory):
    path = base(directory)
    patch(path, 24, struct.pack(">I", 1))  # another time
    resum(path, 0, 512, 64)
    return ["--format", "vhd", "--path", path]


def vhd_chain(directory):
    return ["--format", "vhd", "--path", child(directory)]


def new_child(directory):
    return ["--path", raw(directory)[-1], "--overlay", directory / "new.vhd"]


def old_child(directory):
    path = directory / "old.vhd"
    image = raw(directory)[-1]
    create_child(str(path), str(image), is_raw=True)
    os.truncate(path, os.path.getsize(path) - 512)
    return ["--path", image, "--overlay", path]


def new_overlay(directory):
    return ["--path", raw(directory)[-1], "--overlay", directory / "new"]


def old_overlay(directory):
    path, image = str(directory / "old"), str(raw(directory)[-1])
    with contextlib.closing(OverlayBackend(image, overlay=path)) as disk:
        disk.write([memoryview(b"x" * 4096)], 0)
    return ["--path", image, "--overlay", path]


def qcow2(directory):
    if shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-nbd and qemu-img")
    path = directory / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "5M"], check=True)
    return ["--format", "qcow2", "--path", path]


ALL = (
    *(raw, mmap, fixed_vhd, vhd, vhd_without_its_footer, vhd_with_an_old_copy_of_its_footer),
    *(vhd_chain, new_child, old_child, new_overlay, old_overlay, qcow2),
)


def an_unknown_guest(store, words):
    return ["nobody", *words]


def a_name_that_is_none(store, words):
    return ["guest", *words, "--vdev", "sda17x"]


def a_device_that_is_taken(store, words):
    store.write("/local/domain/5/device/vbd/51712", "")
    return ["guest", *words, "--vdev", "xvda"]


def a_disk_of_another_backend(store, words):
    """Of blkback's, say, which does not lock what it uses."""
    keys = {"params": f"aio:{words[-1]}", "mode": "w", "state": "4", "online": "1"}
    if not os.path.exists(words[-1]):  # the overlay is to be made: the image, then
        keys["params"] = f"aio:{words[1]}"
    for key, value in keys.items():
        store.write(f"{NODE}/{key}", value)
    return ["guest", *words]


CASES = [
    *((make, an_unknown_guest) for make in ALL),
    *((make, a_disk_of_another_backend) for make in ALL),
    *((make, a_device_that_is_taken) for make in (vhd_without_its_footer, new_overlay)),
    (new_overlay, a_name_that_is_none),
]


@pytest.mark.parametrize(("make", "reason"), CASES, ids=lambda each: each.__name__)
def test_bytes_and_times_are_as_they_were(host, tmp_path, make, reason):
    directory = tmp_path / "images"
    directory.mkdir()
    words = [str(word) for word in make(directory)]
    with host.open_store() as store:
        words = reason(store, words)
    before, nodes = state(directory), host.tree()
    env = host.environment()
    assert main(["connect", *words], env) in (ExitStatus.ERROR, ExitStatus.USAGE)
    said = env.stderr.getvalue()
    assert "xen-disk: error: " in said
    assert said.count("\n") == 1
    assert (before, nodes) == (state(directory), host.tree())
    with host.open_store() as store:
        for name in ("/local/domain/5/device/vbd", "/local/domain/0/backend"):
            if store.exists(name):
                store.remove(name)


@pytest.mark.parametrize("make", [vhd_without_its_footer, vhd_with_an_old_copy_of_its_footer])
def test_a_vhd_is_put_in_order_with_the_first_write(tmp_path, make):
    path = make(tmp_path)[-1]
    before = state(tmp_path)
    with contextlib.closing(VhdBackend(path)) as disk:
        page = bytearray(4096)
        assert 4096 == disk.read([memoryview(page)], 0)
        disk.flush()
        assert before == state(tmp_path)
        assert 0 == disk.write_nowait([memoryview(page)], 0)  # a thread does that
        assert 4096 == disk.write([memoryview(page)], 0)
        assert 4096 == disk.write_nowait([memoryview(page)], 0)
    with open(path, "rb") as file:
        copy = file.read(layout.FOOTER)
        file.seek(-layout.FOOTER, os.SEEK_END)
        assert copy == file.read()
