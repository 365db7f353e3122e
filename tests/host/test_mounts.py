"""The mount, and the mounted file system, that a file is in: known again, never mistaken."""

from __future__ import annotations

import contextlib
import os

import pytest
import storage

from xen_disk_py.host import mounts
from xen_disk_py.host.mounts import mount_of, superblock_of


def facts(path, file_system="ext4"):
    fd = os.open(path, os.O_RDONLY)
    try:
        return mount_of(fd), superblock_of(fd, file_system)
    finally:
        os.close(fd)


def test_a_file_system_that_is_mounted_again_is_another_one(tmp_path):
    with contextlib.ExitStack() as stack:
        mounted = storage.file_system(tmp_path, stack)
        mount, superblock = facts(mounted.directory)
        assert (mount, superblock) == facts(mounted.directory)
        bound_mount, bound_superblock = facts(mounted.bind(tmp_path / "bound"))
        assert superblock == bound_superblock is not None
        assert mount is None or mount != bound_mount
        storage.run("umount", str(tmp_path / "bound"))
        mounted.mount_again()
        again = facts(mounted.directory)
        assert superblock != again[1]
        assert mount is None or mount not in (again[0], bound_mount)
        storage.run("mount", "--bind", str(mounted.directory), str(tmp_path / "bound"))


def test_tmpfs_is_known_by_its_number(tmp_path):
    number = os.stat(tmp_path).st_dev
    expected = f"tmpfs {os.major(number)}:{os.minor(number)}"
    assert expected == facts(tmp_path, "tmpfs")[1]


@pytest.mark.parametrize("file_system", ["vfat", None])
def test_what_has_no_name_has_none(tmp_path, file_system):
    if not os.major(os.stat(tmp_path).st_dev):
        pytest.skip("a file system without a block device")
    assert facts(tmp_path, file_system)[1] is None


def test_a_c_library_or_a_kernel_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "_statx", None)
    assert facts(tmp_path)[0] is None
    monkeypatch.setattr(mounts, "_statx", lambda *_: -1)
    assert facts(tmp_path)[0] is None
    monkeypatch.setattr(mounts, "_statx", lambda *_: 0)  # and nothing in the mask
    assert facts(tmp_path)[0] is None
