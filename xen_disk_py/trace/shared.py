"""Memory in which what is noted lies until it is in a trace, so that it outlives the process.

It is a file in memory. A process that waits for the end of the one that serves the disk writes what
that has published and not written (:func:`finish`). Each thing counts from one word on, which is
stored last: a process that is killed leaves all of it or nothing.

=================  =============================================================================
first 4096 bytes   :data:`WORDS`: the trace, and how far it is written, twice
then, as needed    pages: :data:`PAGE_WORDS`, the records, and where their data is
                   chunks, with copies of what was written
=================  =============================================================================
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import suppress
from time import perf_counter_ns

from ..synchronizing import apart
from .format import MAX_DATA, STOPPED, Header, entries
from .writer import TraceWriter, event

_SIZE = 256 << 20  # more than the sink ever asks for
# Nobody else writes there, whoever gets at the file: what is copied there goes to the disk.
# F_SEAL_FUTURE_WRITE (linux/fcntl.h) is not in Python's.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10
HEADER_SIZE = 4096
ID, CLOCK, RING, IS_OVER, PAGES, SELECTED = 0, 2, 3, 4, 5, 6
"""Words: 16 bytes of the id, ``Header.clock`` and ``.ring``; whether the trace has its end; how
many pages there are; which of two states counts. Behind them the states, and the places of pages.
"""
STATE_AT = 64, 128
"""Bytes."""
STATE = struct.Struct("=7Q")
"""The state of the :class:`~.writer.TraceWriter` (where the next block goes, its number, requests
and flushes before it), the number of the page that it stands in, and how many bytes of its records
and of its data are written."""
PLACES = 32  # word
MAX_PAGES = 64
SERIAL, USED, PIECES = range(3)
"""Words of a page: its number, counted over the whole trace; bytes of its records, of one for their
data; from :data:`PIECES_AT` on where each piece of it begins and ends in the memory."""
PAGE_WORDS = 64
"""Bytes."""
ORPHANED = "the disk's process ended"
"""Why a trace stops whose disk was not closed. All that was noted is there."""


class Shared:
    """That memory, of the process that serves the disk.

    Args:
        writer: of the trace.

    Attributes:
        fd: of the file.

    Raises:
        OSError: there is no memory to be had.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self.fd = os.memfd_create("xen_disk_py-trace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, _SIZE)  # it takes as much as is used
            self._memory = memoryview(mmap.mmap(self.fd, _SIZE))
            with suppress(OSError):  # before Linux 5.1
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        self._used = HEADER_SIZE
        self.words = words = self._memory[:HEADER_SIZE].cast("Q")
        words[ID : ID + 2] = memoryview(writer.header.id).cast("Q")
        words[CLOCK], words[RING] = writer.header.clock, writer.header.ring
        self.reached(writer, 0, 0, 0)

    def more(self, size: int) -> tuple[int, memoryview]:
        """Return so many bytes more, zeros, and where they are.

        Raises:
            MemoryError: that is too much.
        """
        at = self._used
        end = at + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > _SIZE:
            raise MemoryError
        self._used = end
        return at, apart(self._memory[at : at + size])

    def page(self, records: int) -> memoryview:
        """Return memory for a page with so many bytes of records."""
        number = self.words[PAGES]
        if number == MAX_PAGES:
            raise MemoryError
        at, memory = self.more(pieces_at(records) + 16 * (MAX_DATA // 512 + 1))
        self.words[PLACES + 2 * number : PLACES + 2 * number + 2] = memoryview(
            struct.pack("=2Q", at, records)
        ).cast("Q")
        self.words[PAGES] = number + 1
        return memory

    def reached(self, writer: TraceWriter, serial: int, used: int, filled: int) -> None:
        """Say how far all is written."""
        other = 1 - self.words[SELECTED]
        state = writer.at, writer.sequence, writer.requests, writer.flushes
        STATE.pack_into(self._memory, STATE_AT[other], *state, serial, used, filled)
        self.words[SELECTED] = other


def pieces_at(records: int) -> int:
    """Where a page has its pieces, which has room for so many bytes of records."""
    return PAGE_WORDS + (records + 7 & ~7)


def finish(memory: int, trace: int) -> None:
    """Write what the disk's process had not written when it was killed, once.

    Args:
        memory: descriptor of the memory.
        trace: of the file.

    Raises:
        OSError: it cannot be written.
    """
    all_ = memoryview(mmap.mmap(memory, os.fstat(memory).st_size, prot=mmap.PROT_READ))
    words = all_.cast("Q")
    if words[IS_OVER]:
        return
    at, sequence, requests, flushes, serial, used, filled = STATE.unpack_from(
        all_, STATE_AT[words[SELECTED]]
    )
    header = Header(0, 512, 0, words[CLOCK], words[ID : ID + 2].tobytes(), ring=words[RING])
    state = {"sequence": sequence, "requests": requests, "flushes": flushes}
    writer = TraceWriter(trace, header, **state, at=at)
    places = words[PLACES : PLACES + 2 * words[PAGES]].tolist()
    found = []
    for place, records in zip(places[::2], places[1::2]):
        number, end, *_ = page = words[place // 8 : (place + PAGE_WORDS) // 8]
        if number >= serial:
            found.append((number, place, end, records, page[PIECES]))
    why = ORPHANED
    try:
        for number, place, end, records, count in sorted(found):
            first, done = (used, filled) if number == serial else (0, 0)
            body = all_[place + PAGE_WORDS + first : place + PAGE_WORDS + end]
            pieces = words[(place + pieces_at(records)) // 8 :][: 2 * count]
            if body:
                data = b"".join(all_[start:stop] for start, stop in zip(pieces[::2], pieces[1::2]))
                _write(writer, body, memoryview(data)[done:])
    except OSError as error:
        why = error.strerror or str(error)
    writer.cut()
    writer.append([event(STOPPED, perf_counter_ns() - words[CLOCK], text=why)])
    writer.sync()


def _write(writer: TraceWriter, body: memoryview, data: memoryview) -> None:
    """Write what a page has."""
    found = list(entries(body))
    length = sum(each[1] for each in found)  # what came into the memory after them has no record
    requests, flushes = sum(each[2] for each in found), sum(each[3] for each in found)
    try:
        writer.write_packed(body, [data[:length]], requests=requests, flushes=flushes)
    except OSError as error:
        writer.write_what_fits(error, body, [data[:length]])
        raise
