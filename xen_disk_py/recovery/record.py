"""What a serving process tells the others on this host, and its successor: a file in /run.

The file is memory-mapped, so that ``list`` reads it at no cost to the disk::

    facts: who serves what (a JSON object, in a double buffer)
    counters of the disk, which fill a page
    a journal for each queue that is offered
    histograms of latency for each of these queues

The process holds a lock on the file as long as it lives: a record without a lock is that
of an orphan, and :meth:`Record.adopt` takes it over. The lock goes when the last thread
of the process has ended and all its memory is unmapped, so that nothing that it began can come
after what its successor does.

A process that has become another user cannot remove its file; it clears the facts, and its
supervisor, or whoever makes a record next, removes what is empty. It keeps the record open for
writing, though, and a successor is root. So what the successor is to open is sealed before: a
second file, which only root can write, and which counts wherever it and the record differ.

Beside it is the socket of :mod:`.control`, which goes with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import stat
import threading
import time
from typing import Any, Callable, NoReturn

from .. import __version__
from ..blkif import MAX_QUEUES
from ..datapath.double_buffer import DoubleBuffer
from ..datapath.journal import SIZE as JOURNAL_SIZE
from ..datapath.journal import Journal
from ..datapath.latency import SIZE as LATENCIES_SIZE
from ..datapath.statistics import WORDS, Statistics
from ..errors import DeviceError, DeviceTaken, XenUnavailable
from ..host.process import is_process
from ..host.systemd import notify_starting
from ..hypervisor import Closing
from ..named import NamedTuple
from ..xenbus.states import Address
from ..xenbus.vdev import from_number
from . import temporary
from .facts import FORMATS, Facts

log = logging.getLogger("xen_disk_py")

DIRECTORY = "/run/xen_disk_py"
SOCKET = ".control"
"""What the name of the process's socket ends with; see :mod:`.control`."""

SEALED = ".sealed"
"""What the name of the file ends with that says what to believe of a record; see above."""

_NEW = ".new"  # and this, as long as it is not complete

FACTS_SIZE = 32 << 10
"""Bytes at the beginning of a record, a double buffer with the facts."""
_COUNTERS = 4096
HEAD = FACTS_SIZE + _COUNTERS
"""Bytes of a record before the journals."""
_VERSION = 32  # characters of one that are shown
_TRIES = 50  # one who looks has the lock for a moment, one who ends has it until the very end
_PAUSE = 0.01
_BECOMING = 10.0  # seconds that the start of a program may take, where a command waits for it


def path_of(directory: str, address: Address) -> str:
    """Return the name of a device's record."""
    return os.path.join(directory, f"{address.frontend_domid}-{address.devid}")


def _prepare(directory: str) -> None:
    """Make the directory of records, which nobody else may enter: who can open a file can lock it.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "somebody else has made it")
    if status.st_mode & 0o077:
        os.chmod(directory, 0o700)


def _facts_in(data: bytes) -> Facts | None:
    """Read the beginning of a record; None for nothing, or nothing that can be read."""
    if len(data) < FACTS_SIZE:
        return None
    return Facts.parse(DoubleBuffer(memoryview(bytearray(data[:FACTS_SIZE]))).read() or b"")


def _believed_in(data: bytes, path: str) -> Facts | None:
    """Read the beginning of the record of that name, and what was sealed of it."""
    facts = _facts_in(data)
    return facts if facts is None else _believed(facts, path)


def _believed(facts: Facts, path: str) -> Facts:
    try:
        with open(f"{path}{SEALED}", "rb") as file:
            sealed = Facts.parse(file.read())
    except FileNotFoundError:
        return facts
    except OSError:
        sealed = None
    return sealed.believed(facts) if sealed is not None else Facts(format=0)


def queues_in(size: int) -> int:
    """Tell from the length of a record for how many queues it is; 0 for none that there can be.

    Formats 2 and 3 need no other sign: no number of queues up to 8 makes both as long.
    """
    for each in (JOURNAL_SIZE + LATENCIES_SIZE, JOURNAL_SIZE):
        queues, rest = divmod(size - HEAD, each)
        if not rest and 0 < queues <= MAX_QUEUES:
            return queues
    return 0


def read_head(data: bytes) -> tuple[Facts, dict[str, int]] | None:
    """Read the facts and counters in the first ``HEAD`` bytes; None if they say nothing."""
    facts = _facts_in(data)
    if facts is None or len(data) < HEAD:
        return None
    words = memoryview(data)[FACTS_SIZE : FACTS_SIZE + 8 * WORDS].cast("Q")
    return facts, Statistics(words).as_dict()


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _unlink(fd: int, path: str) -> None:
    """Remove the locked file, unless somebody who asks for no lock was quicker."""
    with contextlib.suppress(FileNotFoundError):
        if _is_at(fd, path):
            _remove_beside(path)
            os.unlink(path)


def _remove_beside(path: str) -> None:
    for name in (SOCKET, SEALED, f"{SEALED}{_NEW}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}{name}")


def _lock(path: str, flags: int) -> int | None:
    """Open and lock the file of that name; None if it is locked, or lost its name meanwhile.

    A file is removed only under its lock, so what this returns keeps its name.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path):
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _claim(path: str, flags: int) -> int | None:
    """Open and lock a file; None if somebody keeps the lock."""
    for _ in range(_TRIES):
        fd = _lock(path, flags)
        if fd is not None:
            return fd
        time.sleep(_PAUSE)
    return None


def _unavailable(path: str, error: OSError) -> XenUnavailable:
    """Say why a record cannot be made, and what to do."""
    remedy = {
        errno.EACCES: "run as root",
        errno.EPERM: "run as root",
        errno.EROFS: "run as root, on a host whose /run can be written",
        errno.ENOSPC: f"make room there (df -h {os.path.dirname(path)})",
        errno.EDQUOT: f"make room there (df -h {os.path.dirname(path)})",
    }.get(error.errno or 0, "see whether that is a directory of root's")
    return XenUnavailable(f"cannot write {path}: {error.strerror}: {remedy}")


def _refuse_unknown(path: str, address: Address, version: str) -> NoReturn:
    """Say that a record cannot be read, and what to do."""
    domid, vdev = address.frontend_domid, from_number(address.devid)
    what, remedy = "is damaged, or another version wrote it", ""
    if version not in ("", __version__):
        writer = version[:_VERSION]
        what = f"was written by xen-disk {writer}, in terms that {__version__} does not know"
        remedy = f"take it over with that version (xen-disk connect --adopt {domid} {vdev}), or "
    raise DeviceError(
        f"{path} {what}: {vdev} of domain {domid} cannot be adopted, and is as it was; {remedy}"
        f"take it away with: xen-disk disconnect {domid} {vdev} --force"
    )


class Record(Closing):
    """The record of a disk that this process serves; held open and locked until closed.

    Args:
        directory: where records live.
        address: which device.
        queues: how many queues the disk has at most.
        is_attached: tells whether the guest has the device: then the record of a killed
            process is for a successor, and stays as it is.

    Attributes:
        path: the file.
        facts: who serves what, as it was described last.
        statistics: the disk's counters.
        journals: one for each queue.

    Raises:
        DeviceTaken: another process serves that device.
        XenUnavailable: the directory cannot be written.
    """

    def __init__(
        self,
        directory: str,
        address: Address,
        queues: int = 1,
        *,
        is_attached: Callable[[], bool] = lambda: False,
    ) -> None:
        path = path_of(directory, address)
        try:
            _prepare(directory)
            sweep(directory)
            fd = _claim(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise _unavailable(path, error) from error
        if fd is None:
            raise DeviceTaken(
                f"another process serves device {address.devid} of that guest "
                f"({from_number(address.devid)}): choose another --vdev"
            )
        try:
            before = _believed_in(os.pread(fd, FACTS_SIZE, 0), path)
            if before is not None and is_attached():
                self._refuse(address)
        except BaseException:
            os.close(fd)
            raise
        if before is not None and before.temporary is not None:
            temporary.remove(before.temporary)  # of a guest that has gone
        try:
            size = HEAD + queues * (JOURNAL_SIZE + LATENCIES_SIZE)
            os.ftruncate(fd, 0)
            _remove_beside(path)
            os.posix_fallocate(fd, 0, size)  # not sparse: a full /run is an error now, not later
            self._open(fd, path, queues)
        except BaseException as error:
            _unlink(fd, path)  # what is empty says nothing to anybody
            os.close(fd)
            if isinstance(error, OSError):
                raise _unavailable(path, error) from error
            raise

    @classmethod
    def adopt(cls, directory: str, address: Address) -> Record:
        """Take over the record of a killed process, with all that is in it.

        Counters and histograms continue. A record of format 2 gets histograms, which begin anew.

        Raises:
            DeviceTaken: the process lives, or another has taken it over.
            DeviceError: there is none, or one that this version cannot read.
        """
        path = path_of(directory, address)
        name = f"{from_number(address.devid)} of domain {address.frontend_domid}"
        try:
            fd = _claim(path, os.O_RDWR)
        except FileNotFoundError as error:
            raise DeviceError(f"no record of {name}: nothing to adopt") from error
        except OSError as error:
            raise XenUnavailable(f"cannot open {path}: {error.strerror}; run as root") from error
        if fd is None:
            found = find(directory, address)
            if found is not None and found.is_ending and found.facts is not None:
                raise DeviceTaken(
                    f"the process that served {name} has died, but of its queues' processes "
                    f"{found.facts.queue_pids} some still wait for the storage: try again when it "
                    "has answered"
                )
            raise DeviceTaken(f"a process that lives serves {name}: see xen-disk list")
        record = cls.__new__(cls)
        try:
            written = _facts_in(os.pread(fd, FACTS_SIZE, 0)) or Facts(format=0)
            believed = _believed(written, path)
            queues = queues_in(os.fstat(fd).st_size)
            if not queues or believed.format not in FORMATS:  # nothing of it has been touched
                _refuse_unknown(path, address, written.version)
            size = HEAD + queues * (JOURNAL_SIZE + LATENCIES_SIZE)
            with contextlib.suppress(OSError):  # no room: a disk matters more than histograms
                os.posix_fallocate(fd, 0, size)
            record._open(fd, path, queues)
            record.facts = believed
        except BaseException:
            os.close(fd)
            raise
        return record

    @staticmethod
    def _refuse(address: Address) -> NoReturn:
        domid, device = address.frontend_domid, from_number(address.devid)
        raise DeviceTaken(
            f"{device} of domain {domid} is an orphan, its process was killed: take it over "
            f"(xen-disk connect --adopt {domid} {device}), take it away (xen-disk disconnect "
            f"{domid} {device}), or choose another --vdev"
        )

    def _open(self, fd: int, path: str, queues: int) -> None:
        self._fd = fd
        self.path = path
        self._lock = threading.RLock()  # commands change facts, too
        journals = HEAD + queues * JOURNAL_SIZE
        size = os.fstat(fd).st_size
        whole = memoryview(mmap.mmap(fd, size))
        self._facts = DoubleBuffer(whole[:FACTS_SIZE])
        self.facts = Facts.parse(self._facts.read() or b"") or Facts(format=0)
        words = whole[FACTS_SIZE : FACTS_SIZE + 8 * WORDS].cast("Q")
        latencies = [
            whole[at : at + LATENCIES_SIZE].cast("Q")
            for at in range(journals, size, LATENCIES_SIZE)
        ]
        self.statistics = Statistics(words, latencies)
        self.journals = [
            Journal(whole[at : at + JOURNAL_SIZE]) for at in range(HEAD, journals, JOURNAL_SIZE)
        ]

    def describe(self, facts: Facts) -> None:
        """Write who serves what.

        Raises:
            DeviceError: that is too much, over 16,000 bytes as JSON; what was written stays.
        """
        with self._lock:
            try:
                self._facts.write(facts.encode())
            except ValueError as error:
                raise DeviceError(f"the arguments are too long to be noted: {error}") from error
            self.facts = facts

    def seal(self, facts: Facts) -> None:
        """Write down, where only root can, what a successor is to believe of what we describe.

        For a process that is about to give its privileges up: whoever gets into it can write the
        record, whose file it has open.

        Raises:
            XenUnavailable: it cannot be written.
        """
        path = f"{self.path}{SEALED}"
        new = f"{path}{_NEW}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(new, flags, 0o600), "wb") as file:
                file.write(facts.encode())
            os.replace(new, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise _unavailable(path, error) from error

    def update(self, **changed: Any) -> None:
        """Write some of the facts anew; raises as :meth:`describe` does."""
        with self._lock:
            self.describe(self.facts._replace(**changed))

    @property
    def is_closed(self) -> bool:
        """Whether it is ours no longer: closed, or free for a successor."""
        return self._fd < 0

    def leave(self) -> None:
        """Leave the record to whoever adopts it next."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping has a copy of the descriptor
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Remove the record. The counters stay readable for this process."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            _unlink(fd, self.path)
        except PermissionError:
            self._facts.clear()
            fcntl.flock(fd, fcntl.LOCK_UN)  # the mapping has a copy of the descriptor
        finally:
            os.close(fd)


def sweep(directory: str) -> None:
    """Remove the records that their processes emptied.

    Raises:
        OSError: there is no such directory, or it cannot be listed.
    """
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):  # somebody else's business
            fd = _lock(path, os.O_RDONLY)
            if fd is None:
                continue
            try:
                data = os.pread(fd, FACTS_SIZE, 0)
                if (
                    len(data) == FACTS_SIZE
                    and DoubleBuffer(memoryview(bytearray(data))).read() is None
                ):
                    _unlink(fd, path)
            finally:
                os.close(fd)


class Found(NamedTuple):
    """A record read by another process; its facts are None where they cannot be read."""

    facts: Facts | None
    counters: dict[str, int]
    alive: bool
    is_ending: bool = False
    """The process has died, and one that it had forked for a queue still has its locks."""
    is_becoming: bool = False
    """The process becomes another program, which does not serve yet, and may not have the lock."""

    @property
    def is_orphan(self) -> bool:
        """Whether its process has died and another, of this version, can take the disk over."""
        facts = self.facts
        return (
            not self.alive
            and facts is not None
            and facts.format in FORMATS
            and facts.survives
            and facts.disk is not None
        )


def _is_locked(fd: int) -> bool:
    """Tell whether somebody else has the lock; what this takes of it goes at once."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def refuse_orphan(directory: str, address: Address) -> None:
    """See that no disk of that address waits for a successor.

    Raises:
        DeviceTaken: one does.
    """
    found = find(directory, address)
    if found is not None and found.is_orphan:
        Record._refuse(address)


def find(directory: str, address: Address) -> Found | None:
    """Read the record of a device; None if there is none."""
    path = path_of(directory, address)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    facts: Facts | None = None
    is_ending = False
    try:
        for _ in range(_TRIES):
            alive = _is_locked(fd)
            data = os.pread(fd, HEAD, 0)
            if alive and os.pread(fd, FACTS_SIZE, 0) != data[:FACTS_SIZE]:
                time.sleep(_PAUSE)  # it is being written, and may be a mixture
                continue
            facts = _believed_in(data, path)
            # Not of one without a lock: it has ended, though it may be a zombie still.
            is_ending = alive and facts is not None and _is_ending(facts)
            if is_ending:
                alive = False  # what is left of it keeps the lock
            # A sweep has the lock for a moment: that is not the process that serves. One that has
            # described nothing yet has just begun.
            if not alive or facts is None or is_process(facts.pid, facts.process_started):
                break
            time.sleep(_PAUSE)
    finally:
        os.close(fd)
    if len(data) < HEAD:
        return None
    words = memoryview(data)[FACTS_SIZE : FACTS_SIZE + 8 * WORDS].cast("Q")
    is_becoming = not is_ending and facts is not None and _is_becoming(facts)
    return Found(facts, Statistics(words).as_dict(), alive, is_ending, is_becoming)


def find_served(directory: str, address: Address) -> Found | None:
    """Read the record as :func:`find` does, but wait for the program that its process becomes."""
    deadline = time.monotonic() + _BECOMING
    while True:
        found = find(directory, address)
        if found is None or not found.is_becoming or time.monotonic() >= deadline:
            return found
        time.sleep(_PAUSE)


def _is_becoming(facts: Facts) -> bool:
    """Tell whether a process has given its disk up for a program that it becomes, and is there."""
    return facts.released_at is not None and is_process(facts.pid, facts.process_started)


def _is_ending(facts: Facts) -> bool:
    """Tell whether a process has gone, and one that it had forked for a queue has not."""
    return (
        bool(facts.queues)
        and not is_process(facts.pid, facts.process_started)
        and any(is_process(*each) for each in facts.queues)
    )


def await_end(directory: str, address: Address) -> None:
    """Wait until a process that has died has none left of those that it had forked for its queues.

    The kernel kills them then, but one that it works for ends when that is done, as the process
    itself would: whoever has started us is told meanwhile that we live, and still start.
    """
    said = False
    while True:
        found = find(directory, address)
        if found is None or found.facts is None or not found.is_ending:
            return
        if not said:
            log.info("waiting for the end of processes of its queues: %s", found.facts.queue_pids)
            said = True
        notify_starting()  # not WATCHDOG=1, which says that signals are handled
        time.sleep(_PAUSE)


def forget(directory: str, address: Address) -> None:
    """Remove the record of a killed process; not what one that lives has made of it."""
    path = path_of(directory, address)
    try:
        fd = _claim(path, os.O_RDONLY)  # whoever looks has the lock for a moment
    except FileNotFoundError:
        return
    if fd is not None:
        try:
            _unlink(fd, path)
        finally:
            os.close(fd)
