"""Initial RAM disks: cpio archives written from Python, filled with programs, their libraries and
kernel modules.
"""

from __future__ import annotations

import lzma
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .architecture import Architecture

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB = 1, 5


@dataclass
class Tree:
    """Files in memory, by absolute path without the leading slash; parents appear by themselves."""

    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    devices: dict[str, tuple[int, int]] = field(default_factory=dict)

    def directory(self, path: str) -> None:
        """Add a directory and the ones above it."""
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            self.entries.setdefault("/".join(parts[:depth]), (stat.S_IFDIR | 0o755, b""))

    def file(self, path: str, content: bytes, mode: int = 0o755) -> None:
        """Add a file."""
        if "/" in path:
            self.directory(path.rpartition("/")[0])
        self.entries[path] = (stat.S_IFREG | mode, content)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        if "/" in path:
            self.directory(path.rpartition("/")[0])
        self.entries[path] = (stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """Add /dev/console, which the kernel opens before init can mount anything."""
        self.directory("dev")
        self.entries["dev/console"] = (stat.S_IFCHR | 0o600, b"")
        self.devices["dev/console"] = (5, 1)

    def cpio(self) -> bytes:
        """Return the tree as an uncompressed "newc" archive, the form Linux takes as an initrd."""
        out = bytearray()
        for number, (path, (mode, content)) in enumerate(sorted(self.entries.items()), start=1):
            out += _cpio_entry(number, path, mode, content, self.devices.get(path, (0, 0)))
        out += _cpio_entry(0, "TRAILER!!!", 0, b"", (0, 0))
        return bytes(out)

    def write_to(self, directory: Path) -> None:
        """Write files, directories and links (no device nodes) below a directory."""
        for path, (mode, content) in sorted(self.entries.items()):
            target = directory / path
            if stat.S_ISDIR(mode):
                target.mkdir(parents=True, exist_ok=True)
            elif stat.S_ISLNK(mode):
                target.symlink_to(content.decode())
            elif stat.S_ISREG(mode):
                target.write_bytes(content)
                target.chmod(stat.S_IMODE(mode))


def _cpio_entry(
    number: int, path: str, mode: int, content: bytes, device: tuple[int, int]
) -> bytes:
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % value for value in fields) + name
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def add_busybox(tree: Tree, root: Path) -> None:
    """Add the static busybox and a link for each of its applets."""
    binary = root / "usr/bin/busybox"
    tree.file("bin/busybox", binary.read_bytes())
    for applet in _applets(binary.read_bytes()):
        if applet != "busybox":
            tree.link(f"bin/{applet}", "/bin/busybox")
    tree.link("sbin", "bin")


def _applets(binary: bytes) -> list[str]:
    """Return what a busybox, of whatever architecture, can be called: a sorted table of names."""
    start = binary.index(b"[\0[[\0")
    return binary[start : binary.index(b"\0\0", start)].decode().split("\0")


def add_programs(
    tree: Tree, root: Path, programs: Iterable[str], architecture: Architecture
) -> None:
    """Add programs of ``root`` and the libraries they need."""
    tree.file(architecture.loader, (root / architecture.loader).read_bytes())
    libraries = f"usr/lib/{architecture.triplet}"
    search = [root / libraries, root / libraries / "ceph", root / "usr/lib"]
    for program in programs:
        content = (root / program).read_bytes()
        tree.file(f"opt/bin/{program.rpartition('/')[2]}", content)
        needed = _needed(content)
        while needed:
            name = needed.pop()
            target = f"lib/{architecture.triplet}/{name}"
            if target in tree.entries or architecture.loader.endswith(name):
                continue
            content = next(
                path for path in (d / name for d in search) if path.exists()
            ).read_bytes()
            tree.file(target, content)
            needed += _needed(content)


def _needed(elf: bytes) -> list[str]:
    """Return the libraries that a 64-bit little-endian ELF file names (elf(5))."""
    (headers,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    loads, dynamic = [], None
    for at in range(headers, headers + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", elf, at)
        if kind == PT_LOAD:
            loads.append((offset, address, length))
        elif kind == PT_DYNAMIC:
            dynamic = elf[offset : offset + length]
    tags = list(struct.iter_unpack("<QQ", dynamic or b""))
    table = next((value for tag, value in tags if tag == DT_STRTAB), 0)
    strings = next((o + table - a for o, a, length in loads if a <= table < a + length), 0)
    starts = [strings + value for tag, value in tags if tag == DT_NEEDED]
    return [elf[start : elf.index(b"\0", start)].decode() for start in starts]


class Modules:
    """The kernel modules of a root: who needs whom, and their bytes, decompressed."""

    def __init__(self, root: Path) -> None:
        directories = sorted((root / "usr/lib/modules").iterdir())
        if len(directories) != 1:
            raise RuntimeError(
                f"expected one kernel in {root}/usr/lib/modules, "
                f"found {[f.name for f in directories]}"
            )
        self.directory = directories[0]
        self.version = self.directory.name
        self._needs: dict[str, list[str]] = {}
        self._paths: dict[str, Path] = {}
        for line in (self.directory / "modules.dep").read_text().splitlines():
            path, _, needs = line.partition(":")
            self._needs[_module_name(path)] = [_module_name(need) for need in needs.split()]
            self._paths[_module_name(path)] = self.directory / path
        builtin = (self.directory / "modules.builtin").read_text().split()
        self._builtin = {_module_name(path) for path in builtin}

    def add(self, tree: Tree, names: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Add modules as /modules/NAME.ko and their loading order as /modules/order."""
        order: list[str] = []
        for name in optional:
            if name in self._paths:
                self._collect(name, order)
        for name in names:
            self._collect(name, order)
        for name in order:
            tree.file(f"modules/{name}.ko", self._read(name), 0o644)
        tree.file("modules/order", "".join(f"{name}\n" for name in order).encode(), 0o644)

    def _collect(self, name: str, order: list[str]) -> None:
        if name in order or name in self._builtin:
            return
        if name not in self._paths:
            raise RuntimeError(f"kernel {self.version} has no module {name}")
        for need in reversed(self._needs[name]):
            self._collect(need, order)
        order.append(name)

    def _read(self, name: str) -> bytes:
        path = self._paths[name]
        content = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(content)
        if path.suffix != ".ko":
            raise RuntimeError(f"{path}: do not know how to decompress {path.suffix}")
        return content


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def unpack_kernel(image: bytes) -> bytes:
    """Return the ELF kernel inside a bzImage, or the bzImage itself when its compression is not xz.

    Emulated decompression costs seconds per boot, of dom0 and of every guest, and both Xen and
    libxl take the ELF file.
    """
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if not payload.startswith(b"\xfd7zXZ\x00"):
        return image
    kernel = lzma.LZMADecompressor().decompress(payload)
    return kernel if kernel.startswith(b"\x7fELF") else image
