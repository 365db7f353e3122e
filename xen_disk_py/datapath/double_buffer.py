"""Memory that outlives a process which may be killed while it writes there.

It is part of a file that is mapped by whoever serves a disk. What is written replaces what was
there as a whole: one of two buffers is valid, the other is filled, then a word says that this one
is valid. Whenever the process is killed, one buffer is complete.

The order of the stores in the program is all that this takes, and no fence, on ARM neither:

* A process is killed between two instructions. All stores before are done, though another processor
  may not see them yet; none behind is, since no processor stores for an instruction that it may
  still have to give up.
* A successor reads after it has got the lock that goes when the process has ended (see
  :mod:`xen_disk_py.recovery.record`): the kernel, which takes a lock to release one, has made all
  of these visible then.

Who reads while the process lives has neither, and may find a mixture: if the buffer that was valid
is written anew meanwhile, and on ARM also if the word was visible before what it stands for.
"""

from __future__ import annotations

import struct

_LENGTH = struct.Struct("<I")
_HEAD = 8


class DoubleBuffer:
    """Some bytes, replaced as a whole.

    Args:
        memory: an even number of bytes; half of them, less 8, is the longest that fits.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._word = memory[:4].cast("I")
        self._size = (len(memory) - _HEAD) // 2
        self._valid = self._word[0] if self._word[0] in (1, 2) else 0

    @property
    def room(self) -> int:
        """How many bytes fit."""
        return self._size - _LENGTH.size

    def write(self, data: bytes) -> None:
        """Replace what is there by ``data``.

        Raises:
            ValueError: it does not fit; what is there stays.
        """
        spare, at = (2, _HEAD + self._size) if self._valid == 1 else (1, _HEAD)
        content = _LENGTH.pack(len(data)) + data
        if len(content) > self._size:
            raise ValueError(f"{len(data)} bytes do not fit into {self.room}")
        # one store: a memory's slice costs as much as it takes to copy a page
        self._memory[at : at + len(content)] = content
        self._word[0] = self._valid = spare

    def read(self) -> bytes | None:
        """Return a copy of what is there; None if that is nothing, or damaged."""
        if not self._valid:
            return None
        at = _HEAD if self._valid == 1 else _HEAD + self._size
        (length,) = _LENGTH.unpack_from(self._memory, at)
        at += _LENGTH.size
        return bytes(self._memory[at : at + length]) if length <= self.room else None

    def clear(self) -> None:
        """Have nothing there."""
        self._word[0] = self._valid = 0
