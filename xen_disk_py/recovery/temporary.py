"""Where the changes of a disk are that ends with its last process: a file in memory.

/dev/shm is everybody's: a name there must not be known before its file exists. So the file lies
in a directory of its own, which is made with it, under a name that nobody knows, and which nobody
else may enter.
"""

from __future__ import annotations

import os
from contextlib import suppress

_MEMORY = "/dev/shm"
_PREFIX = "xen_disk_py-"
_NAME = "changes.overlay"


def new_path() -> str:
    """Make a directory that is ours alone, and return the path of a file to be made in it.

    Raises:
        OSError: it cannot be made.
    """
    import tempfile  # and with it much that hardly a disk needs

    return os.path.join(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY), _NAME)


def remove(path: str) -> None:
    """Remove such a file, and its directory; what is gone, or no such file, is passed by.

    The path comes from a record, which whoever has got into a process without privileges can write,
    and root is asked to remove it.
    """
    directory, name = os.path.split(path)
    memory, own = os.path.split(directory)
    if name != _NAME or memory != _MEMORY or not own.startswith(_PREFIX):
        return
    with suppress(OSError):  # it was never made, say
        os.unlink(path)
    with suppress(OSError):
        os.rmdir(directory)
