"""What the content of an image looks like: for a warning, never for a decision how to read it.

A guest writes what it likes into its disk, the first sector of another format included. A program
that went by that would let the guest name any file of the host as a backing file (CVE-2008-2004).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable

from ..named import NamedTuple

OVERLAY = b"xen-disk overlay"
"""How an overlay of ours begins."""

_HEAD = 4096  # bytes looked at
_VHD = b"conectix"  # its footer is the last sector; in a dynamic one the first has a copy
_VHD_FOOTERS = (512, 511)  # bytes before the end; 511 is how Virtual PC before 2004 wrote it


class Signature(NamedTuple):
    """What an image looks like.

    Attributes:
        name: the format, as people call it.
        remedy: how to get a raw image out of it.
        is_overlay: a file that ``--overlay`` has made.
        option: what has a guest see the disk inside without converting; None if nothing does.
    """

    name: str
    remedy: str
    is_overlay: bool = False
    option: str | None = None


def _converted(qemu: str) -> Callable[[str], str]:
    return lambda path: (
        f"qemu-img convert -f {qemu} -O raw {shlex.quote(path)} {shlex.quote(path + '.raw')}"
    )


def _unpacked(program: str) -> Callable[[str], str]:
    return lambda path: f"{program} -dc {shlex.quote(path)} > {shlex.quote(path + '.raw')}"


_HEADS: tuple[tuple[int, bytes, str, Callable[[str], str]], ...] = (
    (0, b"QFI\xfb\0\0\0\1", "qcow", _converted("qcow")),
    (0, b"QFI\xfb", "qcow2", _converted("qcow2")),
    (0, _VHD, "a VHD", _converted("vpc")),
    (0, b"vhdxfile", "a VHDX", _converted("vhdx")),
    (0, b"KDMV", "a VMDK", _converted("vmdk")),
    (0, b"COWD", "a VMDK", _converted("vmdk")),
    (0, b"# Disk DescriptorFile", "the descriptor of a VMDK", _converted("vmdk")),
    (64, b"\x7f\x10\xda\xbe", "a VDI", _converted("vdi")),
    (0, b"QED\0", "QED", _converted("qed")),
    (0, b"WithoutFreeSpace", "a Parallels disk", _converted("parallels")),
    (0, b"WithouFreSpacExt", "a Parallels disk", _converted("parallels")),
    (0, b"\x1f\x8b\x08", "gzip", _unpacked("gzip")),
    (0, b"\xfd7zXZ\0", "xz", _unpacked("xz")),
    (0, b"\x28\xb5\x2f\xfd", "zstd", _unpacked("zstd")),
    (0, b"\x04\x22\x4d\x18", "lz4", _unpacked("lz4")),
    (4, b"1AY&SY", "bzip2", _unpacked("bzip2")),
)


def recognise(fd: int, path: str, size: int) -> Signature | None:
    """Say what the ``size`` bytes open as ``fd`` look like; None: a raw image, or unknown.

    Args:
        fd: of a file or a block device.
        path: its name, for the remedy.
        size: in bytes.

    Raises:
        OSError: it cannot be read.
    """
    head = os.pread(fd, min(_HEAD, size), 0)
    if head.startswith(OVERLAY):
        quoted = shlex.quote(path)
        return Signature("an overlay", f"connect it with --overlay {quoted}", is_overlay=True)
    for offset, magic, name, remedy in _HEADS:
        if head.startswith(magic, offset):
            option = "--format vhd" if magic == _VHD else None
            return Signature(name, remedy(path), option=option)
    for before_end in _VHD_FOOTERS:
        at = size - before_end
        if at > 0 and os.pread(fd, len(_VHD), at) == _VHD:
            converted = _converted("vpc")(path)
            return Signature("a VHD of fixed size", converted, option="--format vhd")
    return None
