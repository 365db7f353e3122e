"""Virtual device numbers and the names that people give them.

A name is ``xvdc``, ``xvdc1``, ``sda``, ``hdb2``, ``d2``, ``d2p1`` or a plain number
(decimal, ``0x…`` or ``0…``). Disk letters count in base 26: a … z, aa, ab …

Source: xen-vbd-interface(7).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import DeviceError, UsageError
from ..named import NamedTuple

_EXTENDED = 1 << 28
_MAX_DISK = (1 << 20) - 1
_NAME = r"(xvd|sd|hd)([a-z]{1,5})([0-9]{0,9})"
_NUMBERED = r"d([0-9]{1,9})(?:p([0-9]{1,9}))?"
_PLAIN = r"0[xX]([0-9a-fA-F]{1,9})|(0[0-7]{0,12})|([1-9][0-9]{0,9})"


class VirtualDevice(NamedTuple):
    """A device number and the name a Linux guest gives it."""

    number: int
    name: str

    @property
    def guest_device(self) -> str:
        """Where a Linux guest finds it; Linux shows hd and sd disks as xvd ones."""
        parts = _split(self.number)
        if parts is None:
            return f"/dev/{self.name}"
        _, disk, partition = parts
        return f"/dev/xvd{_disk_to_letters(disk)}{partition or ''}"

    def __str__(self) -> str:
        return self.name


def _letters_to_disk(letters: str) -> int:
    disk = 0
    for letter in letters:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    return disk - 1


def _disk_to_letters(disk: int) -> str:
    letters = ""
    disk += 1
    while disk:
        disk, rest = divmod(disk - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


def _xvd(disk: int, partition: int) -> int | None:
    if disk < 16 and partition < 16:
        return 202 << 8 | disk << 4 | partition
    if disk <= _MAX_DISK and partition < 256:
        return _EXTENDED | disk << 8 | partition
    return None


def _sd(disk: int, partition: int) -> int | None:
    return 8 << 8 | disk << 4 | partition if disk < 16 and partition < 16 else None


def _hd(disk: int, partition: int) -> int | None:
    if disk < 4 and partition < 64:
        return (3, 22)[disk // 2] << 8 | (disk % 2) << 6 | partition
    return None


_FAMILIES = {"xvd": _xvd, "sd": _sd, "hd": _hd}


def _split(number: int) -> tuple[str, int, int] | None:
    """Take a number apart: family, disk, partition. None: it belongs to no family."""
    if number >> 28 == 1:
        return "xvd", number >> 8 & _MAX_DISK, number & 255
    major, minor = number >> 8, number & 255
    if major in (202, 8):
        return {202: "xvd", 8: "sd"}[major], minor >> 4, minor & 15
    if major in (3, 22) and minor < 128:
        return "hd", (minor >> 6) + (2 if major == 22 else 0), minor & 63
    return None


def from_number(number: int) -> VirtualDevice:
    """Name the device ``number``; a number of no known family is its own name."""
    parts = _split(number)
    if parts is None:
        return VirtualDevice(number, str(number))
    family, disk, partition = parts
    return VirtualDevice(number, f"{family}{_disk_to_letters(disk)}{partition or ''}")


def parse(text: str) -> VirtualDevice:
    """Read any form of a device name.

    Raises:
        UsageError: it is none, or out of its family's range.
    """
    name = text[5:] if text.startswith("/dev/") else text
    number: int | None = None
    match = re.fullmatch(_NAME, name)
    numbered = re.fullmatch(_NUMBERED, name)
    plain = re.fullmatch(_PLAIN, name)
    if match:
        number = _FAMILIES[match[1]](_letters_to_disk(match[2]), int(match[3] or "0"))
    elif numbered:
        number = _xvd(int(numbered[1]), int(numbered[2] or "0"))
    elif plain:
        hexadecimal, octal, decimal = plain.groups()
        number = int(decimal or octal or hexadecimal, 10 if decimal else 8 if octal else 16)
        if not 0 < number < 2 << 28:
            number = None
    if number is None:
        raise UsageError(
            f"{text!r} is no device name; use one like xvdb, xvdb1, sda, d1p1 or 51728"
        )
    return from_number(number)


def first_free(taken: Iterable[int], start: int = 0) -> VirtualDevice:
    """Find the first whole xvd disk, from disk ``start`` on, of which no number is ``taken``.

    Numbers of all families count, and partitions, too: Linux shows hda and sda as xvda, and
    refuses a second disk of that name (``xen_translate_vdev``, ``xlbd_reserve_minors``).
    """
    used = {parts[1] for parts in map(_split, taken) if parts is not None}
    for disk in range(start, _MAX_DISK + 1):
        number = _xvd(disk, 0)
        if number is not None and disk not in used:
            return from_number(number)
    raise DeviceError("all device numbers of this guest are taken")
