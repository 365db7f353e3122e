"""``at:TRACE@MOMENT``: a recorded disk as it was at a moment, read-only."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ..errors import ImageError, UsageError
from ..host import memory
from ..text import printable
from ..trace.moment import Moment, check_base, check_usable, rewind
from ..trace.powercut import ZEROS
from ..trace.reader import TraceReader
from . import Backend
from .image import Image
from .overlay.trust import require_trusted
from .sharing import Storage, storage_of

_SHARE = 2  # one part in so many of the memory that is left may be taken for the index


class AtBackend(Backend):
    """What the disk had at a moment of its trace, over the image that it was when recording began.

    Where the last data of each byte is in the trace is kept in memory: about 250 bytes for each
    extent that was written, half of what this host can spare at most. The trace may be growing
    meanwhile.

    Args:
        path: ``at:TRACE@MOMENT``; what a moment is called: see
            :class:`~xen_disk_py.trace.moment.Moment`.
        base: the image; by default the one that the trace names, if that is as it was.
    """

    read_only = True
    survives = True
    threads = 16

    def __init__(self, path: str, *, base: str | None = None) -> None:
        trace, at, moment = path[len("at:") :].rpartition("@")
        if not path.startswith("at:") or not at or not trace:
            raise UsageError(f"{path}: not of the form at:TRACE@MOMENT, such as at:t.xdt@flush:17")
        self.path = path
        when = Moment.parse(moment)
        self.trace = TraceReader(trace)
        try:
            self.base = open_base(self.trace, base)
        except BaseException:
            self.trace.close()
            raise
        try:
            found = rewind(self.trace, when, room=memory.room() // _SHARE)
            check_stays(self.trace)
        except BaseException:
            self.close()
            raise
        self.size = found.size
        self.sector_size = self.trace.header.sector_size
        self.found = found

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read each piece from where it was written last."""
        done = 0
        for buffer in buffers:
            at = offset + done
            for start, length, source in self.found.extents.find(at, len(buffer)):
                self._fill(buffer[start - at :][:length], start, source)
            done += len(buffer)
        return done

    def _fill(self, piece: memoryview, offset: int, source: int | None) -> None:
        if source == ZEROS:
            piece[:] = bytes(len(piece))
            return
        at, done = (offset if source is None else source), 0
        if source is None:  # what lies behind its end was never written
            there = max(0, min(len(piece), self.base.size - offset))
            piece[there:] = bytes(len(piece) - there)
            piece = piece[:there]
        while done < len(piece):
            rest = [piece[done:]]
            if source is None:
                moved = self.base.read(rest, at + done)
            else:
                moved = os.preadv(self.trace.fileno(), rest, at + done)
            if not moved:
                raise OSError(errno.EIO, "the trace or its image was cut short")
            done += moved

    @property
    def memory(self) -> int:
        """Bytes of the index."""
        return self.found.extents.memory

    @property
    def notes(self) -> Sequence[str]:
        """What is missing in the trace up to that moment."""
        return self.found.notes

    @property
    def host_storage(self) -> Sequence[Storage]:
        """The image and the trace."""
        trace = self.trace
        return [
            self.base.storage,
            storage_of(os.fstat(trace.fileno()), os.path.abspath(trace.path), writable=False),
        ]

    def close(self) -> None:
        """Close both files."""
        self.base.close()
        self.trace.close()


def open_base(trace: TraceReader, path: str | None) -> Image:
    """Open the image that a disk was when recording began, if its trace is good for anything.

    Args:
        trace: of the disk.
        path: the image; None: the one that the trace names.

    Raises:
        UsageError: the trace names none.
        ImageError: it cannot be opened, or is not what the disk was.
    """
    check_usable(trace)  # before anybody looks for an image in vain
    header = trace.header
    if path is None and header.path is not None:
        require_trusted(trace.fileno(), trace.path, "name the image (--base, or --option base=)")
        path = header.path
    if path is None:
        raise UsageError(
            f"{printable(trace.path)}: names no image: give the one that the disk was when "
            "recording began"
        )
    if not os.path.lexists(path):
        raise ImageError(
            f"{printable(path)}: no such file: name the image as it was when "
            f"{printable(trace.path)} was begun (--base, or --option base=)"
        )
    image = Image.open(path, writable=False, sector_size=header.sector_size)
    try:
        check_base(header, image.fd, image.size, path, trace.path)
    except BaseException:
        image.close()
        raise
    return image


def check_stays(trace: TraceReader) -> None:
    """See that nobody will overwrite what was read: a ring that is still being written.

    Raises:
        ImageError: somebody may.
    """
    if not trace.header.ring:
        return
    if trace.ending is None:
        for _ in trace.blocks():
            """Up to the end."""
    if trace.ending is None or not trace.ending.is_complete:
        raise ImageError(
            f"{printable(trace.path)}: a ring that is still written may lose its beginning at any "
            "time: stop the recording first"
        )
