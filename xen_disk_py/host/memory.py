"""How much memory this process may take before somebody is killed for it.

The host has a bound (``MemAvailable``), and so has each control group that the process is in. A
part of each is left alone: what the kernel and other programs need.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

_SHARE_LEFT = 8  # one part in so many of all memory is left alone, within these bounds:
_LEAST_LEFT, _MOST_LEFT = 64 << 20, 1 << 30
_LEAST_LEFT_IN_GROUP = 16 << 20
_STEP_LEAST, _STEP_MOST = 64 << 10, 16 << 20
_SHARERS = 64  # so many may take a step at once without going beyond the bound

_Read = Callable[[str], str]


class Budget:
    """Memory that is taken bit by bit, by many processes that know nothing of each other.

    The system is asked how much there is before every step. A step is a small part of that, so
    that all together do not take more than there is.

    Args:
        room: says how many bytes may be taken now.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._granted = 0

    def take(self, size: int) -> bool:
        """Count ``size`` bytes as taken; False: there is no room for them now."""
        if size > self._granted:
            room = self._room()
            if size > room:
                return False
            step = max(min(room // _SHARERS, _STEP_MOST), _STEP_LEAST)
            self._granted = max(size, min(step, room))
        self._granted -= size
        return True


def room(read: _Read | None = None) -> int:
    """Return how many bytes this process may take now, of the host and its control groups.

    Args:
        read: returns the content of a file; empty if there is none.
    """
    read = read or _content
    facts = dict(_fields(read("/proc/meminfo")))
    if "MemAvailable:" not in facts:
        raise OSError(errno.ENOENT, "/proc/meminfo has no MemAvailable")
    total = facts.get("MemTotal:", 0) << 10
    left = min(max(total // _SHARE_LEFT, _LEAST_LEFT), _MOST_LEFT)
    rooms = [(facts["MemAvailable:"] << 10) - left]
    for limit, used in _groups(read):
        if limit < total:
            left = min(max(limit // _SHARE_LEFT, _LEAST_LEFT_IN_GROUP), _MOST_LEFT)
            rooms.append(limit - used - left)
    return max(0, min(rooms))


def _groups(read: _Read) -> Iterator[tuple[int, int]]:
    """The limit of each control group of ours, and what is used that cannot be taken back."""
    for line in read("/proc/self/cgroup").splitlines():
        # 0::/system.slice/x.service      4:memory:/system.slice     (cgroups(7))
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        for mount, root in _mounts(read, controllers):
            inside = os.path.relpath(path, root)
            if inside.startswith(".."):
                continue  # not to be seen from here
            directory = os.path.normpath(os.path.join(mount, inside))
            while True:
                yield from (_unified if not controllers else _legacy)(read, directory)
                if len(directory) <= len(mount):
                    break
                directory = os.path.dirname(directory)


def _unified(read: _Read, directory: str) -> Iterator[tuple[int, int]]:
    used = read(f"{directory}/memory.current").strip()
    if used.isdigit():
        cache = _cache(read(f"{directory}/memory.stat"), "")
        for name in ("max", "high"):
            limit = read(f"{directory}/memory.{name}").strip()
            if limit.isdigit():
                yield int(limit), int(used) - cache


def _legacy(read: _Read, directory: str) -> Iterator[tuple[int, int]]:
    limit = read(f"{directory}/memory.limit_in_bytes").strip()
    used = read(f"{directory}/memory.usage_in_bytes").strip()
    if limit.isdigit() and used.isdigit():
        yield int(limit), int(used) - _cache(read(f"{directory}/memory.stat"), "total_")


def _cache(statistics: str, prefix: str) -> int:
    """Bytes of the page cache, which the kernel drops when it needs them."""
    facts = dict(_fields(statistics))
    return facts.get(f"{prefix}inactive_file", 0) + facts.get(f"{prefix}active_file", 0)


def _mounts(read: _Read, controllers: str) -> Iterator[tuple[str, str]]:
    """Where the hierarchy is mounted, and which directory of it is mounted there."""
    # 36 35 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory   (proc(5))
    for line in read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        unified = kind[0] == "cgroup2" and not controllers
        legacy = kind[0] == "cgroup" and controllers and controllers in kind[2].split(",")
        if unified or legacy:
            yield fields[4], fields[3]


def _fields(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, *values = line.split()
        if values and values[0].isdigit():
            yield name, int(values[0])


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
