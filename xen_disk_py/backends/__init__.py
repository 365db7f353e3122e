"""How to write a disk, and the contract it keeps.

A disk is a class with a size, a read and a write::

    from xen_disk_py.backends import Backend

    class Disk(Backend):
        def __init__(self):
            self.data = bytearray(16 << 20)
            self.size = len(self.data)

        def read(self, buffers, offset):
            for buffer in buffers:
                buffer[:] = self.data[offset : offset + len(buffer)]
                offset += len(buffer)

        def write(self, buffers, offset):
            for buffer in buffers:
                self.data[offset : offset + len(buffer)] = buffer
                offset += len(buffer)

Save it as ``mydisk.py`` and try it, with no Xen at all, then in a guest::

    xen-disk demo --path ./mydisk.py --overwrite
    xen-disk connect myvm --path ./mydisk.py

What holds for every call:

* ``offset`` is in bytes, a multiple of ``sector_size``. ``buffers`` is a sequence of
  ``memoryview`` of unsigned bytes, each a multiple of ``sector_size`` long: mostly the guest's
  own pages. Together they are one extent of the disk, inside ``[0, size)``: the caller has checked
  that. Those of a write may be read-only. Contiguous requests of the guest may be merged into
  one of up to 1 MiB.
* Fill (or take) the buffers. Return the number of bytes, as ``os.preadv`` does, or ``None`` for
  all of them; after fewer, in whole sectors, you are called again for the rest, none at all is
  an error. Any exception is an I/O error in the guest and a line in our log; the disk lives on.
* The guest may change its pages during the call: copy first what must not change between
  two reads of it. Keep no buffer after the call returns: its pages go back to the guest.
* A write that returned is in the disk; a ``flush`` that returned is on stable storage.
* All calls come from one thread, never two at once, unless ``threads`` says that more may;
  and but for ``resize``, see there.
* What the constructor names as a keyword it can be given: ``path`` by ``--path``, ``size``
  (bytes) by ``--size``, ``sector_size`` by ``--sector-size``, ``read_only`` by
  ``--read-only``, ``overlay`` by ``--overlay``, anything else by ``--option name=value``: text, or
  what the parameter is annotated as: ``int`` (a number, or a size like ``64M``), ``float``,
  ``bool`` (yes or no), ``Literal`` of some values. A disk whose constructor has no
  ``read_only`` can be connected ``--read-only`` all the same: no write reaches it then. One that
  is always ``read_only`` needs no ``write``.
* Open in the constructor whatever needs privilege: under ``--user`` everything else is done by
  that user, without any.

One that lies over another, and changes some of what that does, is a :class:`~.filter.Filter`.

Check yours (this needs pytest, and writes all over the disk)::

    python -m xen_disk_py.backends.conformance ./mydisk.py --option name=value
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .asynchronous import Asynchronous
from .sharing import Storage

if TYPE_CHECKING:
    settable = property
else:

    class settable:  # noqa: N801 - a decorator, as ``property`` is
        """A property that a disk may set, as any attribute of its own."""

        def __init__(self, get):
            self.get = get
            self.__doc__ = get.__doc__

        def __get__(self, disk, cls=None):
            return self if disk is None else self.get(disk)


class StorageError(OSError):
    """The storage cannot do it now, but may later: a server is away, say.

    For a backend to raise where no errno of :class:`OSError` says so. Under ``--on-error hold``
    such a request is queued for retry. So is one that fails with ENOSPC, EDQUOT, EIO, ETIMEDOUT,
    ENOLINK, ENOMEM, or an error of a connection; everything else is an I/O error at once.
    """


class Backend:
    """A disk: subclasses set ``size``, define ``read`` and ``write``; the rest is optional.

    What is no method here may be an attribute of the class, one that ``__init__`` sets, or a
    property.
    """

    size: int
    """Bytes; a positive multiple of ``sector_size``. While the disk is connected it changes in
    ``resize`` only."""

    read_only: bool = False
    """True: the guest is told so and every write is refused before it gets here."""

    keeps_data: bool = True
    """False: the same bytes need not be read again, since the disk drops what is written or
    makes up what is read. Nothing in the guest changes; the demo and the conformance suite
    then compare no content."""

    sector_size: int = 512
    """Logical sector in bytes, a power of two from 512 to 4096: the smallest access."""

    physical_sector_size: int = 4096
    """What the storage likes best, in bytes; a multiple of ``sector_size``."""

    threads: int = 1
    """How many threads may be in here at once. A disk that waits for something (a network, a
    slow device) does many requests at a time with 32, say. Its methods must then be fit for
    that; the guest may use several queues, and a request is done in a thread of its own unless
    ``read_nowait`` or ``write_nowait`` does it at once: these two are called by one more thread
    for each queue."""

    asynchronous: Asynchronous | None = None
    """Where the disk's library does many requests at once by itself, as libnbd does: what begins
    them and tells which are over. A queue then does so from its own thread, and ``threads`` is 1.
    Such a disk has ``repeats_flush``."""

    resize_notice: int | None = None
    """A descriptor that polls readable when the storage has another size that nobody here asked
    for; ``resize(None)`` makes it quiet. A longer disk then becomes the guest's at once."""

    survives: bool = False
    """True: what the guest wrote does not end with this process (it is in a file, on a server):
    if it is killed, another may open the same and take over. That one repeats what was not
    answered, so that a request may be done twice, though never after a later one was answered
    that depends on it."""

    repeats_flush: bool = False
    """True: a ``flush`` that failed may be called again and can be trusted then, because the
    disk has not dropped what it could not store. Linux' files are not like that: after an error
    the next ``fdatasync`` succeeds without the data. By default a flush that failed is the last
    that is tried, or what was written is written again first (``--on-error hold``)."""

    shared_by_forks: bool = False
    """True: processes that are forked from the one that has opened it may all use it at once, each
    after it has called ``after_fork``: what one has written the others read, and a ``flush`` is for
    what any of them has written. The guest's queues may then have a process each
    (``--queues-in processes``). It holds for the very class that says so, no subclass."""

    discard_granularity: int = 4096
    """The smallest extent, in bytes, whose discard frees something; a multiple of
    ``sector_size``."""

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Fill ``buffers`` from the disk, starting ``offset`` bytes into it."""
        raise NotImplementedError

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Store ``buffers`` to the disk, starting ``offset`` bytes into it."""
        raise NotImplementedError

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what takes no waiting; unless that is all, ``read`` does it again in a thread.

        Called only where ``threads`` is more than 1. Default: everything takes waiting.
        """
        return 0

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write if that takes no waiting; unless it is all, ``write`` does it again in a thread."""
        return 0

    def flush(self) -> None:
        """Return when every finished write is on stable storage. Default: it already is."""

    def discard(self, offset: int, length: int) -> None:
        """Forget ``length`` bytes at ``offset``: the guest does not need them any longer.

        Offered to the guest only where a subclass defines it. What is read there afterwards
        is up to the backend; whatever it is, document it.
        """
        raise NotImplementedError

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard so that no copy of the data is left. Offered where a subclass defines it."""
        raise NotImplementedError

    def resize(self, size: int | None) -> int:
        """Become ``size`` bytes long; None asks how long the disk could be, and changes nothing.

        With None, return the storage's current size in bytes (``self.size`` where it cannot
        change by itself). If the guest is to have that, a call with that size follows; so does
        one with what the user asked for. Then make room (or give it up), set ``size`` and
        return it; any exception means that the disk is as it was. What this does not define
        keeps its size.

        This call comes from another thread while requests run in theirs, all of them inside both
        the old size and the new one.
        """
        raise NotImplementedError

    def claim(self) -> None:
        """Take the exclusive lock that was left to another host when the disk was opened.

        Called, from a thread of its own, before the first request, and called again while it
        raises :class:`~xen_disk_py.errors.BackendError`. Default: there is none.
        """

    def after_fork(self) -> None:
        """Prepare for use in a process that has just been forked from the one that opened it."""

    def close(self) -> None:
        """Release everything: called after the last request. A second call does no harm."""

    @settable
    def memory(self) -> int:
        """Bytes of host memory that the guest's writes occupy (copy-on-write); 0 if none."""
        return 0

    @settable
    def notes(self) -> Sequence[str]:
        """Lines for whoever opens it: that a part of what it is made of is missing, say."""
        return ()

    @settable
    def host_storage(self) -> Sequence[Storage]:
        """The files and devices that the disk is in, to find others who use them; see there."""
        return ()

    @settable
    def can_discard(self) -> bool:
        """Whether ``discard`` is offered to the guest."""
        return type(self).discard is not Backend.discard

    @settable
    def can_discard_securely(self) -> bool:
        """Whether ``discard_securely`` is offered, too."""
        return type(self).discard_securely is not Backend.discard_securely

    def __str__(self) -> str:
        """Name the disk in messages: its class with the file that this is in, and its ``path``."""
        name = type(self).__name__
        if type(self).__module__.endswith(".py"):  # run by the loader
            name = f"{os.path.basename(type(self).__module__)}:{name}"
        path = getattr(self, "path", None)
        if isinstance(path, (str, os.PathLike)):
            name += f" ({os.fspath(path)!s})"
        return "".join(letter if letter.isprintable() else "?" for letter in name)
