"""Who else uses the storage of an image, by whatever way: loop devices, mounts, QEMU, other nodes.

``flock`` says who else has opened *the same file* with a lock. The same bytes can be reached by
other ways, of which the kernel tells in sysfs and /proc. What Xen's own ``block`` script refuses is
refused here, too: a writer wants the storage alone, a reader wants nobody who writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from ..named import NamedTuple

_LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
_LOOP_INFO = struct.Struct("=5Q176x16x")  # lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit
_SECTOR = 512  # of sizes in sysfs, whatever the device's own is
_DEPTH = 8  # of loop devices over loop devices
_EVERYTHING = (0, 1 << 63)
_NAMESPACES = 256  # of mounts, that are looked into: each is a file to be read
_PROCESSES = 20_000  # that are asked for theirs
_CONFIGFS = "/sys/kernel/config"
_PROBES = 5
_PROBE_PAUSE = 0.05

Number = tuple[int, int]
"""Of a block device: major, minor."""

T = TypeVar("T")
_forced: ContextVar[bool | None] = ContextVar("forced", default=None)
_looking: ContextVar[bool] = ContextVar("looking", default=False)
_arriving: ContextVar[bool] = ContextVar("arriving", default=False)


@contextmanager
def having(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Have a variable of the context another value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def forced(force: bool) -> AbstractContextManager[None]:
    """With ``force``, images that are opened in here are shared with whoever uses them.

    Without, a refusal in here names that option.
    """
    return having(_forced, force)


def is_forced() -> bool:
    """Tell whether :func:`forced` says so."""
    return bool(_forced.get())


def or_force() -> str:
    """Return what to add to a refusal: the option, where there is one."""
    return "" if _forced.get() is None else ", or --force to use it all the same"


def looking() -> AbstractContextManager[None]:
    """Have images that are opened in here read without a lock, and nothing made or changed."""
    return having(_looking, True)


def is_looking() -> bool:
    """Tell whether :func:`looking` says so."""
    return _looking.get()


def arriving(arrives: bool) -> AbstractContextManager[None]:
    """With ``arrives``, disks that are opened in here, if they can, take their lock at ``claim``.

    Their guest comes from another host, which has the lock until the guest runs here.
    """
    return having(_arriving, arrives)


def is_arriving() -> bool:
    """Tell whether :func:`arriving` says so."""
    return _arriving.get()


class Storage(NamedTuple):
    """Where an image's bytes are.

    Attributes:
        path: of the image, absolute.
        writable: it is opened for writing.
        files: ``st_dev`` and ``st_ino`` of the file, or of those behind a loop device.
        devices: block devices that show at least a part of it.
    """

    path: str
    writable: bool
    files: frozenset[tuple[int, int]]
    devices: frozenset[Number]


def storage_of_files(paths: Iterable[str], *, writable: bool) -> list[Storage]:
    """Say where the bytes of files or devices are that are not open; of what is there."""
    found = []
    for path in paths:
        with suppress(OSError):  # whoever opens it says what is wrong
            found.append(storage_of(os.stat(path), os.path.abspath(path), writable=writable))
    return found


class Use(NamedTuple):
    """That somebody else uses the storage.

    Attributes:
        reason: who, and how, as the end of a sentence: ``attached to /dev/loop0``.
        remedy: a command that ends it, or None.
        refused: else it is worth a warning.
    """

    reason: str
    remedy: str | None
    refused: bool


class Loop(NamedTuple):
    """A loop device over a file: which part of it, in bytes."""

    name: str
    number: Number
    extent: tuple[int, int]
    read_only: bool


class Below(NamedTuple):
    """What a block device lies on, if it is (a partition of) a loop device."""

    path: str
    identity: tuple[int, int]
    extent: tuple[int, int]
    is_whole: bool


def storage_of(status: os.stat_result, path: str, *, writable: bool) -> Storage:
    """Say where the bytes of an image are, from its ``fstat``."""
    if not stat.S_ISBLK(status.st_mode):
        identity = (status.st_dev, status.st_ino)
        loops = {loop.number for loop in loops_over(identity)}
        devices = {number for loop in loops for number in overlapping(loop)}
        return Storage(path, writable, frozenset({identity}), frozenset(devices))
    number = number_of(status)
    files = {below.identity for below in below_all(number)}
    return Storage(path, writable, frozenset(files), frozenset(overlapping(number)))


def uses(status: os.stat_result, *, writable: bool) -> list[Use]:
    """Find who else uses an image, from its ``fstat``; the worst first.

    Not those who have locked it: that is the caller's to try.
    """
    found: list[Use] = []
    if stat.S_ISBLK(status.st_mode):
        number = number_of(status)
        if not writable or is_forced():  # else the kernel has said so already (O_EXCL)
            found += _uses_of_device(number)
        found += _exports(status)
        below = next(iter(below_all(number)), None)
        if below is not None:
            found += _uses_of_file(below.identity, below.extent, writable, {whole_of(number)})
    else:
        found += _uses_of_file((status.st_dev, status.st_ino), _EVERYTHING, writable, set())
        found += _exports(status)
    return sorted(found, key=lambda use: not use.refused)


def explain_busy(path: str) -> str:
    """Say why the kernel calls a block device busy, as far as it tells."""
    try:
        number = number_of(os.stat(path))
    except OSError:
        return ""
    return ", ".join(use.reason for use in _known_uses(number))


def _uses_of_file(
    identity: tuple[int, int], extent: tuple[int, int], writable: bool, own: set[Number]
) -> Iterator[Use]:
    for loop in loops_over(identity):
        if loop.number in own or not _overlap(loop.extent, extent):
            continue
        users = [use for n in overlapping(loop.number) for use in _known_uses(n)]
        reason = f"attached to /dev/{loop.name}"
        if users:
            reason += f" ({', '.join(use.reason for use in users)})"
        remedies = [use.remedy for use in users if use.remedy] + [f"losetup -d /dev/{loop.name}"]
        remedy = "; ".join(dict.fromkeys(remedies))
        if writable:
            yield Use(reason, remedy, refused=True)
        elif not loop.read_only:
            busy = any(use.refused for use in users) or (not users and _is_claimed(loop.number))
            yield Use(reason, remedy, refused=busy)
    for name in _swaps():
        with suppress(OSError):
            status = os.stat(name)
            if (status.st_dev, status.st_ino) == identity:
                yield Use("used as swap space", f"swapoff {shlex.quote(name)}", refused=True)


def _uses_of_device(number: Number) -> Iterator[Use]:
    """Who uses a block device, or a part of it, that we only want to read."""
    found = [use for n in overlapping(number) for use in _known_uses(n)]
    yield from (use for use in found if not use.reason.endswith(_HARMLESS))
    if not found and _is_claimed(number):
        yield Use("opened by a program that wants it alone", None, refused=False)


_HARMLESS = "mounted read-only"


def _known_uses(number: Number, depth: int = _DEPTH) -> Iterator[Use]:
    """Mounts, swap and what is built on a block device."""
    for point, writes in _mounts(number):
        if writes:
            yield Use(f"mounted on {_printable(point)}", f"umount {shlex.quote(point)}", True)
        else:
            yield Use("mounted read-only", f"umount {shlex.quote(point)}", False)
    for name in _swaps():
        with suppress(OSError):
            status = os.stat(name)
            if stat.S_ISBLK(status.st_mode) and number_of(status) == number:
                yield Use("used as swap space", f"swapoff {shlex.quote(name)}", True)
    for holder in _list(f"{_sysfs(number)}/holders"):
        above = _parse_number(_read(f"/sys/class/block/{holder}/dev"))
        through = list(_known_uses(above, depth - 1)) if above is not None and depth else []
        for use in through:  # a mounted volume of LVM, md or dm-crypt
            yield use._replace(reason=f"a part of /dev/{holder}, {use.reason}")
        if not through:
            yield Use(f"a part of /dev/{holder}", None, False)


def below_all(number: Number) -> Iterator[Below]:
    """Follow loop devices down to the files that they show."""
    for _ in range(_DEPTH):
        below = _below(number)
        if below is None:
            return
        yield below
        try:
            status = os.stat(below.path)
        except OSError:
            return
        if not stat.S_ISBLK(status.st_mode):
            return
        number = number_of(status)


def _below(number: Number) -> Below | None:
    directory = _sysfs(number)
    start, size = 0, _integer(f"{directory}/size") * _SECTOR
    if os.path.exists(f"{directory}/partition"):
        start = _integer(f"{directory}/start") * _SECTOR
        directory = os.path.dirname(directory)
    path = _backing_file(directory)
    if path is None:
        return None
    offset = _integer(f"{directory}/loop/offset")
    identity = _identity(path)
    if identity is None or identity != (_loop_identity(os.path.basename(directory)) or identity):
        return None
    try:
        length = os.stat(path).st_size
    except OSError:
        return None
    extent = (start + offset, start + offset + size)
    # a file's last, incomplete sector is not in the device
    is_whole = extent[0] == 0 and (extent[1] >= length - length % _SECTOR)
    return Below(path, identity, extent, is_whole)


def loops_over(identity: tuple[int, int]) -> Iterator[Loop]:
    """Find the loop devices over a file, by its ``st_dev`` and ``st_ino``."""
    for name in _list("/sys/block"):
        if not name.startswith("loop"):
            continue
        directory = f"/sys/block/{name}"
        path = _backing_file(directory)
        if path is None:
            continue
        if identity not in (_identity(path), _loop_identity(name)):
            continue
        number = _parse_number(_read(f"{directory}/dev"))
        if number is None:
            continue
        offset = _integer(f"{directory}/loop/offset")
        size = _integer(f"{directory}/size") * _SECTOR
        read_only = _integer(f"{directory}/ro") == 1
        yield Loop(name, number, (offset, offset + size), read_only)


def number_of(status: os.stat_result) -> Number:
    """Return the number of a block device."""
    return (os.major(status.st_rdev), os.minor(status.st_rdev))


def whole_of(number: Number) -> Number:
    """Return the disk that a partition is a part of; another device itself."""
    directory = _sysfs(number)
    if not os.path.exists(f"{directory}/partition"):
        return number
    return _parse_number(_read(f"{os.path.dirname(directory)}/dev")) or number


def overlapping(number: Number) -> list[Number]:
    """List the block devices that share bytes with one: itself, its disk or its partitions."""
    whole = whole_of(number)
    if whole != number:
        return [number, whole]
    directory = _sysfs(number)
    parts = [
        _parse_number(_read(f"{directory}/{name}/dev"))
        for name in _list(directory)
        if os.path.exists(f"{directory}/{name}/partition")
    ]
    return [number, *(part for part in parts if part is not None)]


def node_of(number: Number) -> str | None:
    """Name the kernel's own node of a block device, whichever others there are."""
    for line in _read(f"{_sysfs(number)}/uevent").splitlines():
        if line.startswith("DEVNAME="):
            return f"/dev/{line[len('DEVNAME=') :]}"
    return None


def _is_claimed(number: Number) -> bool:
    """Ask the kernel whether somebody wants a block device alone.

    Two who ask at once would see each other: ask again.
    """
    node = node_of(number)
    if node is None:
        return False
    for attempt in range(_PROBES):
        if attempt:
            time.sleep(_PROBE_PAUSE)
        try:
            os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK))
        except OSError as error:
            if error.errno != errno.EBUSY:
                return False
        else:
            return False
    return True


def _mounts(number: Number) -> Iterator[tuple[str, bool]]:
    """Where a block device is mounted, and whether its file system is written."""
    # 36 35 98:0 /root /mnt rw,noatime master:1 - ext4 /dev/sda1 rw   (proc(5))
    wanted = f"{number[0]}:{number[1]}"
    seen = set()
    for line in _mountinfo():
        fields = line.split(" ")
        try:
            at = fields.index("-")
            device, point, source, options = fields[2], fields[4], fields[at + 2], fields[at + 3]
        except (ValueError, IndexError):
            continue
        if device == wanted or (device.startswith("0:") and _is_node(_unescaped(source), number)):
            writes = "rw" in options.split(",")
            if (point, writes) not in seen:  # each namespace has a copy of most
                seen.add((point, writes))
                yield _unescaped(point), writes


def _mountinfo() -> Iterator[str]:
    """Return the lines of all mount namespaces, as far as we may see them; our own first."""
    yield from _read("/proc/self/mountinfo").splitlines()
    namespaces = {_link("/proc/self/ns/mnt")}
    for name in _list("/proc")[:_PROCESSES]:
        if len(namespaces) > _NAMESPACES:
            return
        if not name.isdigit():
            continue
        namespace = _link(f"/proc/{name}/ns/mnt")
        if namespace is not None and namespace not in namespaces:
            namespaces.add(namespace)
            yield from _read(f"/proc/{name}/mountinfo").splitlines()


def _exports(status: os.stat_result) -> Iterator[Use]:
    """What the kernel itself serves to others, without a lock: LIO, NVMe targets, USB gadgets."""
    for what, path, remedy in _exported():
        try:
            other = os.stat(path)
        except OSError:
            continue  # of another mount namespace, or gone
        same_device = (
            stat.S_ISBLK(status.st_mode)
            and stat.S_ISBLK(other.st_mode)
            and number_of(other) in overlapping(number_of(status))
        )
        if same_device or os.path.samestat(status, other):
            yield Use(f"exported by the kernel ({what})", remedy, refused=True)


def _exported() -> Iterator[tuple[str, str, str | None]]:
    """List what configfs has: who serves it, the path, and a command that ends that."""
    core = f"{_CONFIGFS}/target/core"
    for hba in _list(core):
        for name in _list(f"{core}/{hba}"):
            directory = f"{core}/{hba}/{name}"
            if _read(f"{directory}/enable").strip() != "1":
                continue
            plugin = hba.rpartition("_")[0]
            # "TCM FILEIO ID: 0        File: PATH  Size: 1048576  Mode: …" (target_core_file.c)
            _, found, rest = _read(f"{directory}/info").partition("        File: ")
            path = rest.rpartition("  Size: ")[0] if found else ""
            remedy = f"targetcli /backstores/{plugin} delete {shlex.quote(name)}"
            for each in {path, _read(f"{directory}/udev_path").strip()} - {""}:
                yield f"LIO's {_printable(plugin)} {_printable(name)}", each, remedy
    subsystems = f"{_CONFIGFS}/nvmet/subsystems"
    for subsystem in _list(subsystems):
        for name in _list(f"{subsystems}/{subsystem}/namespaces"):
            directory = f"{subsystems}/{subsystem}/namespaces/{name}"
            if _read(f"{directory}/enable").strip() == "1":
                remedy = f"echo 0 > {shlex.quote(directory)}/enable"
                path = _read(f"{directory}/device_path").strip()
                yield f"NVMe target {_printable(subsystem)}", path, remedy
    gadgets = f"{_CONFIGFS}/usb_gadget"
    for gadget in _list(gadgets):
        for function in _list(f"{gadgets}/{gadget}/functions"):
            for lun in _list(f"{gadgets}/{gadget}/functions/{function}"):
                path = _read(f"{gadgets}/{gadget}/functions/{function}/{lun}/file").strip()
                if path:
                    yield f"USB gadget {_printable(gadget)}", path, None


def _is_node(path: str, number: Number) -> bool:
    """Tell whether a mount's source, as btrfs has it, is this device."""
    if not path.startswith("/"):
        return False
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and number_of(status) == number


def _swaps() -> list[str]:
    return [_unescaped(line.split()[0]) for line in _read("/proc/swaps").splitlines()[1:] if line]


def _backing_file(directory: str) -> str | None:
    name = _read(f"{directory}/loop/backing_file")
    return name.removesuffix("\n") if name else None


def _loop_identity(name: str) -> tuple[int, int] | None:
    """Ask a loop device for its file; the name in sysfs may be of another mount namespace."""
    try:
        fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        answer = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    except OSError:
        return None
    finally:
        os.close(fd)
    device, inode, *_ = _LOOP_INFO.unpack(answer)
    return device, inode


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _sysfs(number: Number) -> str:
    return os.path.realpath(f"/sys/dev/block/{number[0]}:{number[1]}")


def _parse_number(text: str) -> Number | None:
    major, colon, minor = text.strip().partition(":")
    return (int(major), int(minor)) if colon and major.isdigit() and minor.isdigit() else None


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _integer(path: str) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else 0


def _list(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """Undo the octal escapes of /proc."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
