"""A plugin for ``nbdkit python``: any disk of this program on an NBD server.

::

    nbdkit python "$(xen-disk nbdkit-plugin)" path=disk.vhd format=vhd filter=delay:read=0.01

The keys are the options of ``xen-disk demo`` that say what disk it is, without their dashes, and
``read-only=yes``; every other key is one of the disk's own, as behind ``--option``. nbdkit runs
this file by itself, in whatever Python it is linked with: it finds the package that it belongs to
by its own path.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xen_disk_py.backends import Backend

API_VERSION = 2

_PACKAGE = "xen_disk_py"
_DIRECTORY = os.path.dirname(os.path.realpath(__file__))  # Python forgets __file__ after this
_KEYS = ("path", "format", "backend", "overlay", "filter", "size", "cow-limit", "sector-size")
_FLAGS = ("read-only", "force")

_words: list[str] = ["demo"]
_lock = threading.RLock()  # of what follows; and of the disk, if that lets one thread in
_disks: list[Backend] = []  # one, when it is open


def config(key: str, value: str) -> None:
    """Take a ``key=value`` of nbdkit's command line."""
    name = key.replace("_", "-")
    if name in _KEYS:
        _words.append(f"--{name}={value}")
    elif name in _FLAGS:
        if value.lower() not in ("yes", "true", "on", "1"):
            raise ValueError(f"{key}={value}: the only value is yes; else leave it out")
        _words.append(f"--{name}")
    else:
        _words.append(f"--option={key}={value}")


def config_complete() -> None:
    """See that the words make sense; the disk is opened when a client comes."""
    _briefly(_load("commands.parsing").parse, _words)


def thread_model() -> int:
    """As many requests at once as there are: what lets one thread in is locked here."""
    import nbdkit  # type: ignore[import-not-found]  # nbdkit's own, in its process only

    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> Backend:  # noqa: A001 - nbdkit's name for it
    """Open the disk, once for all clients."""
    with _lock:
        if not _disks:
            words = [*_words, "--read-only"] if readonly else _words
            args = _load("commands.parsing").parse(words)
            disk = _briefly(_load("commands.backend_arguments").backend_from, args)
            try:
                _load("recovery.orphans").check(
                    _load("recovery.record").DIRECTORY,
                    disk.host_storage,
                    force=args.force,
                    open_store=_open_store,
                )
            except BaseException:
                disk.close()
                raise
            _disks.append(disk)
        return _disks[0]


def _briefly(call: Any, argument: Any) -> Any:
    """Call it; what it says of the disk is a message for people, and nbdkit prints all frames."""
    try:
        return call(argument)
    except _load("errors").XenDiskError as error:
        raise error.with_traceback(None) from None


def _open_store() -> Any:
    """Connect to xenstore; nbdkit's Python need not have pyxs."""
    try:
        store = _load("xenbus.xenstore").Store
    except ModuleNotFoundError as error:
        raise _load("errors").XenUnavailable(str(error)) from error
    return store.open()


def cleanup() -> None:
    """Close it."""
    for disk in _disks:
        disk.close()


def get_size(disk: Backend) -> int:
    """Its bytes."""
    return disk.size


def block_size(disk: Backend) -> tuple[int, int, int]:
    """The smallest, the preferred and the largest request."""
    return disk.sector_size, max(disk.physical_sector_size, 4096), 32 << 20


def can_write(disk: Backend) -> bool:
    """Whether it is not read-only."""
    return not disk.read_only


def can_flush(disk: Backend) -> bool:
    """It can, as far as there is anything to flush."""
    return True


def can_fua(disk: Backend) -> int:
    """By a flush behind the write, which nbdkit does."""
    import nbdkit

    return int(nbdkit.FUA_EMULATE)


def can_trim(disk: Backend) -> bool:
    """Whether it has discard."""
    return disk.can_discard


def can_multi_conn(disk: Backend) -> bool:
    """All clients have the same disk, and a flush is for all that was written."""
    return True


def pread(disk: Backend, buf: memoryview, offset: int, flags: int) -> None:
    """Read, in as many calls as it takes."""
    _do(disk, disk.read, buf, offset)


def pwrite(disk: Backend, buf: memoryview, offset: int, flags: int) -> None:
    """Write, in as many calls as it takes."""
    _do(disk, disk.write, buf, offset)


def flush(disk: Backend, flags: int) -> None:
    """Flush."""
    _call(disk, disk.flush)


def trim(disk: Backend, count: int, offset: int, flags: int) -> None:
    """Discard the whole sectors in the extent."""
    sector = disk.sector_size
    start, stop = -(-offset // sector) * sector, (offset + count) // sector * sector
    if start < stop:
        _call(disk, disk.discard, start, stop - start)


def _do(disk: Backend, move: Any, buffer: memoryview, offset: int) -> None:
    if offset % disk.sector_size or len(buffer) % disk.sector_size:
        _fail(errno.EINVAL)
        raise ValueError(
            f"{len(buffer)} bytes at {offset}: the sector has {disk.sector_size} bytes "
            "(nbdkit --filter=blocksize minblock=… takes any request)"
        )
    do_all = _load("backends.filter").do_all
    done = _call(disk, do_all, move, [buffer.cast("B")], offset)
    if done < len(buffer):
        raise EOFError(f"{done} of {len(buffer)} bytes")


def _call(disk: Backend, call: Any, *arguments: Any) -> Any:
    try:
        if disk.threads > 1 or disk.asynchronous is not None:
            return call(*arguments)
        with _lock:
            return call(*arguments)
    except OSError as error:
        _fail(error.errno)
        raise


def _fail(number: int | None) -> None:
    import nbdkit

    if number:
        nbdkit.set_error(number)


def _load(name: str) -> Any:
    """Import a module of the package that this file is in."""
    if _PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            _PACKAGE,
            os.path.join(_DIRECTORY, "__init__.py"),
            submodule_search_locations=[_DIRECTORY],
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = module
        spec.loader.exec_module(module)
        logging.basicConfig(format="xen-disk: %(message)s")
    return importlib.import_module(f"{_PACKAGE}.{name}")
