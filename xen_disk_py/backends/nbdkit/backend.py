"""A disk that a Python plugin of nbdkit is: a module with ``open``, ``get_size`` and ``pread``.

The module is called as nbdkit calls it, with one connection that lasts as long as the disk. Where
nbdkit leaves a plugin's fault to the client, this is stricter: a request during which the plugin
has called ``set_error`` has failed, whether it raises or not.

The plugin never sees the guest's pages, but copies of its own: it may keep them, and what the
guest changes meanwhile does not reach it.
"""

from __future__ import annotations

import errno
import operator
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import Any, Callable, ClassVar

from ...errors import BackendError, UsageError
from .. import Backend
from . import api

_NEEDED = ("open", "get_size", "pread")
_VERSIONS = (1, 2)
_THREADS = 16  # as nbdkit has (--threads)
_SECTORS = (512, 1024, 2048, 4096)
_TRIM = 1 << 30  # bytes in one call, whose count has 32 bits in nbdkit
_REQUESTS = {"pread", "pwrite", "flush", "trim"}


def is_plugin(module: ModuleType) -> bool:
    """Tell whether a module has what nbdkit requires of a plugin."""
    return all(callable(getattr(module, name, None)) for name in _NEEDED)


def plugin_class(module: ModuleType, export: str | None) -> type[PluginBackend]:
    """Make the class of a plugin's disks.

    Args:
        module: the plugin.
        export: which of its disks; None for the one that it gives without a name.
    """
    # Of the plugin's module, so that messages name lines of its file.
    names = {"__module__": module.__name__, "module": module, "export": export or ""}
    return type("Plugin", (PluginBackend,), names)


class PluginBackend(Backend):
    """A plugin's disk; see :func:`plugin_class`.

    A plugin may say of itself what nbdkit does not ask for: ``survives = True`` and
    ``keeps_data = False`` in its module mean what they do in a class.

    Args:
        settings: each ``key=value``, given to ``config`` in this order.
        read_only: what ``open`` is told, and refuse writes.
        sector_size: the logical sector in bytes; by default 512, or the plugin's smallest request.

    Raises:
        UsageError: it takes no such settings.
        BackendError: it breaks nbdkit's contract, or is no disk that a guest could use.
        Exception: whatever the plugin raises.
    """

    module: ClassVar[ModuleType]
    export: ClassVar[str]

    def __init__(
        self,
        *,
        settings: Sequence[str] = (),
        read_only: bool = False,
        sector_size: int | None = None,
    ) -> None:
        self._export: str | None = None
        self._version = self._declared_version()
        self._closing = ExitStack()
        try:
            self._configure(settings, read_only)
            self._open(read_only, sector_size)
        except BaseException:
            with suppress(Exception):  # the first error says more
                self.close()
            raise

    def _declared_version(self) -> int:
        version = getattr(self.module, "API_VERSION", 1)
        if version not in _VERSIONS:
            raise BackendError(
                f"{self}: API_VERSION is {version!r}, and the versions known here are 1 and 2"
            )
        return int(version)

    def _configure(self, settings: Sequence[str], read_only: bool) -> None:
        for text in settings:
            key, _, value = text.partition("=")
            if self._callback("config") is None:
                raise UsageError(f"{text}: the plugin takes no settings, since it has no config")
            self._call("config", key, value)
        self._call_if("config_complete")
        model = self._call_if("thread_model")
        if model == api.THREAD_MODEL_PARALLEL:
            self.threads = _THREADS
        self._closing.callback(self._call_if, "cleanup")
        for name in ("get_ready", "after_fork"):
            self._call_if(name)
        self._call_if("preconnect", read_only)

    def _open(self, read_only: bool, sector_size: int | None) -> None:
        name = self.export or self._call_if("default_export", read_only, False) or ""
        if not isinstance(name, str):
            raise BackendError(f"{self}: default_export returned {name!r}, not a str")
        self._export = name
        self._handle = self._call("open", read_only)
        self._closing.callback(self._call_if, "close", self._handle)
        self.size = operator.index(self._call("get_size", self._handle))
        minimum, preferred, self._most = self._block_size()
        self.sector_size = sector_size or max(minimum, 512)
        if self.sector_size not in _SECTORS or self.sector_size % minimum:
            raise BackendError(
                f"{self}: its smallest request is {minimum} bytes, and a disk's sector is 512 to "
                "4096 and a multiple of that"
            )
        if self.size <= 0 or self.size % self.sector_size:
            raise BackendError(
                f"{self}: get_size returned {self.size} bytes, not a positive multiple of the "
                f"sector, {self.sector_size}"
            )
        self.physical_sector_size = self.discard_granularity = max(self.sector_size, 4096)
        if preferred in _SECTORS and preferred >= self.sector_size:
            self.physical_sector_size = preferred
        self.read_only = read_only or not self._can("write", "pwrite")
        self._can_flush = self._can("flush", "flush")
        self._can_trim = self._can("trim", "trim")
        fua = self._call_if("can_fua", self._handle)
        # Without a flush, a plugin that knows FUA has stored only what was written with that.
        self._flags = api.FLAG_FUA if fua == api.FUA_NATIVE and not self._can_flush else 0
        self.survives = getattr(self.module, "survives", False) is True
        self.keeps_data = getattr(self.module, "keeps_data", True) is True

    def _block_size(self) -> tuple[int, int, int]:
        """The smallest, the preferred and the largest request, in bytes."""
        answer = self._call_if("block_size", self._handle)
        minimum, preferred, maximum = (0, 0, 0) if answer is None else map(operator.index, answer)
        minimum, maximum = minimum or 1, maximum or 0xFFFF_FFFF
        if minimum < 1 or minimum & (minimum - 1) or maximum < max(minimum, 4096):
            raise BackendError(f"{self}: block_size returned {answer!r}, which nobody can keep to")
        return minimum, preferred, maximum - maximum % max(minimum, 4096)

    # -- calls of the plugin -------------------------------------------------------------

    def _callback(self, name: str) -> Callable[..., Any] | None:
        found = getattr(self.module, name, None)
        return found if callable(found) else None

    def _call_if(self, name: str, *arguments: Any) -> Any:
        """Call a function that a plugin need not have; None if it has not."""
        return None if self._callback(name) is None else self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        current = api.current
        current.error, current.export = 0, self._export
        try:
            result = getattr(self.module, name)(*arguments)
        except Exception as error:
            if current.error:
                text = f"{type(error).__name__}: {error}"
                raise OSError(current.error, text).with_traceback(error.__traceback__) from error
            raise
        finally:
            current.export = None
        if current.error and name in _REQUESTS:
            raise OSError(current.error, f"{name} called nbdkit.set_error, and raised nothing")
        return result

    def _can(self, what: str, function: str) -> bool:
        """Whether the plugin says that it can, or, if it says nothing, has the function."""
        if self._callback(f"can_{what}") is None:
            return self._callback(function) is not None
        # nbdkit, too, takes nothing else for a yes.
        return self._call(f"can_{what}", self._handle) is True

    # -- requests ------------------------------------------------------------------------

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Have ``pread`` fill a buffer of its own, and copy that."""
        data = memoryview(bytearray(sum(map(len, buffers))))
        for at in range(0, len(data), self._most):
            piece = data[at : at + self._most]
            if self._version == 1:
                answer = self._call("pread", self._handle, len(piece), offset + at)
                content = memoryview(answer).cast("B")
                if len(content) < len(piece):
                    raise OSError(errno.EIO, f"pread returned {len(content)} of {len(piece)} bytes")
                piece[:] = content[: len(piece)]
            else:
                self._call("pread", self._handle, piece, offset + at, 0)
        at = 0
        for buffer in buffers:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Give ``pwrite`` a copy of the data."""
        data = memoryview(b"".join(buffers))
        for at in range(0, len(data), self._most):
            piece = data[at : at + self._most]
            self._call("pwrite", self._handle, piece, offset + at, *self._with(self._flags))

    def flush(self) -> None:
        """Call ``flush``, unless the plugin says that it has none."""
        if self._can_flush:
            self._call("flush", self._handle, *self._with(0))

    def discard(self, offset: int, length: int) -> None:
        """Call ``trim``; what is read there afterwards is up to the plugin."""
        for at in range(0, length, _TRIM):
            count = min(_TRIM, length - at)
            self._call("trim", self._handle, count, offset + at, *self._with(self._flags))

    def _with(self, flags: int) -> tuple[int, ...]:
        """The last argument of a request; version 1 has none."""
        return () if self._version == 1 else (flags,)

    @property
    def can_discard(self) -> bool:
        """Whether the plugin can trim."""
        return self._can_trim

    def close(self) -> None:
        """Call ``close`` and ``cleanup``, where the plugin has them."""
        self._closing.close()

    def __str__(self) -> str:
        return f"nbdkit plugin {self.module.__file__}"
