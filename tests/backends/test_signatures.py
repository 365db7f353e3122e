"""What real tools make is recognised, and nothing else."""

import gzip
import logging
import lzma
import os
import shutil
import subprocess

import pytest

from xen_disk_py.backends.image import Image
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.signatures import recognise
from xen_disk_py.errors import ImageError


def found(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return recognise(fd, str(path), os.path.getsize(path))
    finally:
        os.close(fd)


def run(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["-f", "qcow2"], "qcow2"),
        (["-f", "qcow2", "-o", "compat=0.10"], "qcow2"),
        (["-f", "vpc"], "a VHD"),
        (["-f", "vpc", "-o", "subformat=fixed"], "a VHD of fixed size"),
        (["-f", "vhdx"], "a VHDX"),
        (["-f", "vmdk"], "a VMDK"),
        (["-f", "vmdk", "-o", "subformat=monolithicFlat"], "the descriptor of a VMDK"),
        (["-f", "vdi"], "a VDI"),
        (["-f", "qed"], "QED"),
        (["-f", "qcow"], "qcow"),
        (["-f", "parallels"], "a Parallels disk"),
    ],
)
def test_an_image_of_qemu_is_recognised_and_the_remedy_converts_it(tmp_path, options, name):
    path = tmp_path / "an image"
    run("qemu-img", "create", *options, str(path), "4M")
    signature = found(path)
    assert name == signature.name
    assert not signature.is_overlay
    run("sh", "-c", signature.remedy)
    assert os.path.getsize(f"{path}.raw") >= 4 << 20
    assert found(f"{path}.raw") is None


@pytest.mark.parametrize("program", ["gzip", "xz", "zstd", "bzip2", "lz4"])
def test_a_compressed_image_is_recognised_and_the_remedy_unpacks_it(tmp_path, program):
    path = tmp_path / "an image"
    content = os.urandom(8192)
    (tmp_path / "plain").write_bytes(content)
    path.write_bytes(run(program, "-c", str(tmp_path / "plain")))
    signature = found(path)
    assert program == signature.name
    run("sh", "-c", signature.remedy)
    assert content == (tmp_path / "an image.raw").read_bytes()


@pytest.mark.parametrize(("compress", "name"), [(gzip.compress, "gzip"), (lzma.compress, "xz")])
def test_a_compressed_image_of_python_is_recognised(tmp_path, compress, name):
    (tmp_path / "x").write_bytes(compress(bytes(1 << 20)))
    assert name == found(tmp_path / "x").name


@pytest.mark.parametrize("size", [1, 511, 512, 4096, 1 << 20])
def test_a_raw_image_is_nothing_else(make_image, size):
    assert found(make_image(size)) is None


def test_a_file_system_is_nothing_else(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 << 20))
    run("mkfs.ext4", "-q", str(path))
    assert found(path) is None


def test_a_container_is_served_as_it_is_with_one_line_of_warning(tmp_path, caplog):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(path), "4M")
    run("truncate", "-s", "%512", str(path))
    with caplog.at_level(logging.WARNING), Image.open(str(path), writable=False) as image:
        assert os.path.getsize(path) == image.size
    (line,) = caplog.messages
    assert line.startswith(f"{path}: looks like qcow2, ")
    assert f"convert it first: qemu-img convert -f qcow2 -O raw {path} {path}.raw" in line


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_a_vhd_can_be_served_as_one(tmp_path, caplog, subformat):
    path = tmp_path / "disk.vhd"
    run("qemu-img", "create", "-f", "vpc", "-o", f"subformat={subformat}", str(path), "4M")
    with caplog.at_level(logging.WARNING), Image.open(str(path), writable=False):
        pass
    (line,) = caplog.messages
    assert line.endswith("inside, use --format vhd")


def test_a_container_of_an_odd_size_is_not_told_to_be_padded(tmp_path, caplog):
    path = tmp_path / "disk.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20))[:999])
    with pytest.raises(ImageError) as caught:
        Image.open(str(path), writable=False)
    assert not caplog.messages
    assert "truncate" not in str(caught.value)
    assert f"gzip -dc {path}" in str(caught.value)


@pytest.mark.parametrize("writable", [True, False])
def test_an_overlay_is_no_image(make_image, tmp_path, writable):
    path = tmp_path / "overlay"
    OverlayBackend(make_image(), overlay=str(path)).close()
    with pytest.raises(ImageError, match=r"an overlay, whose .* --overlay"):
        Image.open(str(path), writable=writable)
