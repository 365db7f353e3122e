"""Filters: a disk that behaves as another does, but for what it changes.

A filter is the methods it changes; everything else is passed on::

    from xen_disk_py.backends.filter import Filter

    class Upper(Filter):
        def __init__(self, source, shift: int = 32):
            super().__init__(source)
            self.shift = shift

        def read(self, buffers, offset):
            done = self.source.read(buffers, offset)
            ...
            return done

    xen-disk demo --path disk.raw --filter ./upper.py:shift=32

Several may be given; the first is next to the source, the last next to the guest. What follows the
name is passed to the constructor, converted as ``--option`` is. With ``configure`` a filter takes
other settings while the disk is in use (``xen-disk filter``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Callable, ClassVar, TypeVar

from ..errors import UsageError
from . import Backend, settable
from .asynchronous import Asynchronous
from .sharing import Storage, having

if TYPE_CHECKING:
    from ..trace.batch import BatchNotes

_ATTRIBUTES = (
    "size",
    "read_only",
    "keeps_data",
    "sector_size",
    "physical_sector_size",
    "threads",
    "resize_notice",
    "survives",
    "repeats_flush",
    "discard_granularity",
)
_THREADS = 16
T = TypeVar("T")
Noting = Callable[[int, bool], "BatchNotes"]
"""Makes what notes the requests of one queue: its number, and whether what was done in part will be
done again as a whole."""
_SUCCEEDING: ContextVar[bool] = ContextVar("succeeding", default=False)
_REQUESTS = {"read", "write", "flush", "discard", "discard_securely"}


def succeeding() -> AbstractContextManager[None]:
    """Have the filters that are made inside continue what those of a process that died began."""
    return having(_SUCCEEDING, True)


def is_succeeding() -> bool:
    """Whether a disk is being opened that another process has served until now."""
    return _SUCCEEDING.get()


class Filter(Backend):
    """Passes everything on to ``source``; subclasses change some of it.

    The attributes of the contract are the source's, but for those that a subclass defines: with
    ``threads = 1`` in its class, its methods need no lock. One that changes ``read`` and no
    ``read_nowait`` has none (every read goes through ``read``); the same with writes.

    Args:
        source: the disk below; closed with this one.

    Attributes:
        name: what ``--filter`` calls it.
        given: the options that it has, as text.
    """

    actions: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """What ``xen-disk filter VM VDEV ACTION`` sets, by action."""

    def __init__(self, source: Backend) -> None:
        self.source = source
        self.name = type(self).__name__
        self.given: Mapping[str, str] = {}
        own = {name for cls in _subclasses(type(self)) for name in vars(cls)}
        for name in _ATTRIBUTES:
            if name not in own:
                setattr(self, name, getattr(source, name))
        if source.asynchronous is not None:
            # What begins requests by itself would pass by the methods that are changed.
            self.asynchronous: Asynchronous | None = source.asynchronous
            if own & _REQUESTS:
                self.asynchronous = None
                if "threads" not in own:
                    self.threads = _THREADS  # its own methods may be called from any thread

    def __init_subclass__(cls, **options: Any) -> None:
        """See that no request passes by a method that is changed."""
        super().__init_subclass__(**options)
        for method in ("read", "write"):
            if method in vars(cls) and f"{method}_nowait" not in vars(cls):
                setattr(cls, f"{method}_nowait", getattr(Backend, f"{method}_nowait"))

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As the source does."""
        return self.source.read(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As the source does."""
        return self.source.write(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As the source does."""
        return self.source.read_nowait(buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As the source does."""
        return self.source.write_nowait(buffers, offset)

    def flush(self) -> None:
        """As the source does."""
        self.source.flush()

    def discard(self, offset: int, length: int) -> None:
        """As the source does."""
        self.source.discard(offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """As the source does."""
        self.source.discard_securely(offset, length)

    def resize(self, size: int | None) -> int:
        """As the source does; one whose size differs from the source's changes this, too."""
        done = self.source.resize(size)
        self.size = self.source.size
        return done

    def configure(self, *_: Any, **options: Any) -> None:
        """Take these settings while the disk is in use; all of them, or none and raise.

        Called from a thread of its own while requests run, with all options of the constructor,
        converted alike. By default a filter keeps what it has.

        Raises:
            UsageError: one of them cannot be.
        """
        raise UsageError(f"{self.name} keeps its settings as long as the disk is connected")

    def serves(self, guest: str, vdev: str) -> None:
        """Hear whose disk it is, before the first request; by default, it does not matter.

        Args:
            guest: its name.
            vdev: the disk's name there.
        """

    def passes_on(self, method: str) -> bool:
        """Tell whether ``read``, ``write`` or the like does just what the source's does.

        Whoever serves the disk calls the source's then: a filter that is idle costs nothing. Asked
        when the disk is opened, and again after :meth:`configure`.
        """
        return method not in vars(self) and getattr(type(self), method) is getattr(Filter, method)

    def noting(self) -> Noting | None:
        """Tell how what comes to this filter is noted, if that is all that it does.

        Whoever serves the disk may then call the source's methods, and note what they did. Asked of
        the outermost filter (those that pass everything on left out), as :meth:`passes_on` is.
        """
        return None

    def pause(self, operation: str, length: int) -> float:
        """Tell how many seconds a request is to wait before it is done.

        Whoever serves the disk asks that of the outermost filter (those that pass everything on
        left out), waits without a thread, and then calls :meth:`after_pause`.

        Args:
            operation: ``read``, ``write``, ``flush`` or ``discard``.
            length: bytes.
        """
        return 0.0

    def after_pause(self, call: Callable[[], T]) -> T:
        """Do a request of this disk that has waited already."""
        return call()

    def counters(self) -> Mapping[str, int]:
        """Tell what it has done so far, by names."""
        return {}

    @settable
    def memory(self) -> int:
        """The source's."""
        return self.source.memory

    @settable
    def notes(self) -> Sequence[str]:
        """Those of the source."""
        return self.source.notes

    @settable
    def host_storage(self) -> Sequence[Storage]:
        """The source's."""
        return self.source.host_storage

    @settable
    def can_discard(self) -> bool:
        """Whether the source can."""
        return self.source.can_discard

    @settable
    def can_discard_securely(self) -> bool:
        """Whether the source can."""
        return self.source.can_discard_securely

    def claim(self) -> None:
        """As the source does."""
        self.source.claim()

    def after_fork(self) -> None:
        """As the source does; a filter is one process's, but for one that says otherwise."""
        self.source.after_fork()

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    def __str__(self) -> str:
        return f"{type(self).__name__} over {self.source}"


def direct(disk: Backend, method: str) -> Any:
    """Return a method of a disk, or of what is below the filters that pass it on as it is."""
    while isinstance(disk, Filter) and disk.passes_on(method):
        disk = disk.source
    return getattr(disk, method)


def outermost(disk: Backend) -> Filter | None:
    """Return the filter that requests come to first, but for those that pass them on."""
    while isinstance(disk, Filter):
        if not (disk.passes_on("read") and disk.passes_on("write")):
            return disk
        disk = disk.source
    return None


def _subclasses(cls: type) -> list[type]:
    """The classes of a filter that are derived from :class:`Filter`, itself left out."""
    return [each for each in cls.__mro__ if issubclass(each, Filter) and each is not Filter]


def do_all(call: Any, buffers: Sequence[memoryview], offset: int) -> int:
    """Call ``read`` or ``write`` of a source until all is done, as a disk's caller does.

    Returns:
        The number of bytes; fewer if the source did none of the rest.
    """
    length = sum(map(len, buffers))
    rest, done = buffers, 0
    while done < length:
        count = call(rest, offset + done)
        if count is None:
            return length
        if not count:
            break
        done += count
        if done < length:
            rest = _behind(rest, count)
    return done


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is behind the first ``count`` bytes of the buffers."""
    rest = []
    for buffer in buffers:
        if count >= len(buffer):
            count -= len(buffer)
        else:
            rest.append(buffer[count:])
            count = 0
    return rest
