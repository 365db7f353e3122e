"""Three filters over each kind of disk: still a disk that keeps the contract."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import pytest
from long_run import one_in

from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import XenUnavailable

MIB = 1 << 20
START = 64 << 10
SIZE = 3 * MIB + 512
"""Of the disk that the filters show: its last page is not whole."""

# A partition table whose first partition begins at START, and has SIZE bytes.
TABLE = bytes(446) + struct.pack("<4xB3xII", 0x83, START // 512, SIZE // 512).ljust(64, b"\0")
TABLE += b"\x55\xaa"


def make_raw(path):
    with open(path, "wb") as file:
        file.write(TABLE)
        file.truncate(START + SIZE)


def make_vhd(path, **options):
    create(path, START + SIZE, **options)
    disk = open_backend("vhd", {"path": path})
    disk.write([memoryview(TABLE)], 0)
    disk.close()


def make_child(path):
    make_vhd(f"{path}.base")
    create_child(f"{path}.middle", f"{path}.base")
    create_child(path, f"{path}.middle")


def make_qcow2(path):
    make_raw(f"{path}.raw")
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{path}.raw", path]
    subprocess.run(command, check=True)


def a_libnbd_and(program):
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))


def of_an_overlay(path):
    return {"path": path, "overlay": f"{path}.changes"}


def of_a_command(path):
    return {"path": f"[ nbdkit file {path} ]"}


def of_qcow2(path):
    return {"path": path, "format": "qcow2"}


SOURCES = {
    "raw": ("raw", make_raw, None),
    "mmap": ("mmap", make_raw, None),
    "cow": ("cow", make_raw, None),
    "overlay": ("overlay", make_raw, of_an_overlay),
    "vhd-dynamic": ("vhd", make_vhd, None),
    "vhd-fixed": ("vhd", lambda path: make_vhd(path, fixed=True), None),
    "vhd-child": ("vhd", make_child, None),
    "nbd": ("nbd", make_raw, of_a_command),
    "qcow2": ("qemu", make_qcow2, of_qcow2),
}


def pytest_generate_tests(metafunc):
    """Try every kind with some of the suite, all of it on some kind; each with each if asked."""
    if "kind" in metafunc.fixturenames:
        tests = sorted(name for name in dir(BackendConformance) if name.startswith("test_"))
        number = tests.index(metafunc.function.__name__)
        kinds = [kind for at, kind in enumerate(SOURCES) if one_in(5, at, number)]
        metafunc.parametrize("kind", kinds)


class TestStack(BackendConformance):
    @pytest.fixture(autouse=True)
    def _kind(self, kind, tmp_path):
        self.kind = kind
        if kind in ("nbd", "qcow2"):
            a_libnbd_and({"nbd": "nbdkit", "qcow2": "qemu-nbd"}[kind])

    def open_disk(self, tmp_path):
        backend, make, options_of = SOURCES[self.kind]
        path = str(tmp_path / "disk.img")
        if not os.path.exists(path):
            make(path)
        options = {"path": path} if options_of is None else options_of(path)
        filters = ["partition:number=1", "delay", f"log:file={tmp_path / 'requests.log'}"]
        return open_backend(backend, options, filters)


class TestStackThatKeepsData(TestStack):
    """Filters with a memory of their own, one over the other."""

    def open_disk(self, tmp_path):
        backend, make, options_of = SOURCES[self.kind]
        path = str(tmp_path / "disk.img")
        if not os.path.exists(path):
            make(path)
        options = {"path": path} if options_of is None else options_of(path)
        return open_backend(backend, options, ["cache:size=256K", "powercut:limit=1M", "checksum"])


class TestStackOverDiscard(BackendConformance):
    """It keeps nothing that a partition table could be in."""

    def open_disk(self, tmp_path):
        filters = ["offset:start=64K", "delay", f"log:file={tmp_path / 'requests.log'}"]
        return open_backend("discard", {"size": 4 * MIB}, filters)
