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

    python -m xen_disk_py demo --path ./mydisk.py
    python -m xen_disk_py connect myvm --path ./mydisk.py

What holds for every call:

* ``offset`` is in bytes, a multiple of ``sector_size``. ``buffers`` is a list of
  ``memoryview`` of unsigned bytes, each a multiple of ``sector_size`` and at most 4096 long:
  the guest's own pages. Together they are one run of the disk, inside ``[0, size)``: the
  caller has checked that. Those of a write may be read-only.
* Fill (or take) every buffer whole. Return the number of bytes, as ``os.preadv`` does, or
  ``None`` for all of them; fewer is an error. Any exception is an I/O error in the guest
  and a line in our log; the disk lives on.
* The guest may change its pages during the call: copy first what must not change between
  two looks. Keep no buffer after the call returns: its pages go back to the guest.
* A write that returned is in the disk; a ``flush`` that returned is on stable storage.
* All calls come from one thread, never two at once.
* What the constructor names as a keyword it can be given: ``path`` by ``--path``, ``size``
  (bytes) by ``--size``, ``read_only`` by ``--read-only``, anything else by
  ``--option name=value`` (text, or a size like ``64M`` where the parameter is annotated
  ``int``). A disk whose constructor has no ``read_only`` can be connected ``--read-only``
  all the same: no write reaches it then. One that is always ``read_only`` needs no ``write``.

Check yours (this needs pytest, and writes all over the disk)::

    python -m xen_disk_py.backends.conformance ./mydisk.py --option name=value
"""

from __future__ import annotations

from collections.abc import Sequence


class Backend:
    """A disk: subclasses set ``size``, define ``read`` and ``write``; the rest is optional."""

    size: int
    """Bytes; a positive multiple of ``sector_size``. Fixed while the disk is connected."""

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

    discard_granularity: int = 4096
    """The smallest run, in bytes, whose discard frees something."""

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Fill ``buffers`` from the disk, starting ``offset`` bytes into it."""
        raise NotImplementedError

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Store ``buffers`` to the disk, starting ``offset`` bytes into it."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when every finished write is on stable storage. Default: it already is."""

    def discard(self, offset: int, length: int) -> None:
        """Forget ``length`` bytes at ``offset``: the guest does not need them any longer.

        Offered to the guest only where a subclass defines it. What is read there afterwards
        is up to the backend; whatever it is, document it.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release everything: called after the last request. A second call does no harm."""

    @property
    def memory(self) -> int:
        """Bytes of host memory that the guest's writes hold (copy-on-write); 0 if none."""
        return 0

    @property
    def can_discard(self) -> bool:
        """Whether ``discard`` is offered to the guest."""
        return type(self).discard is not Backend.discard

    def __str__(self) -> str:
        return type(self).__name__
