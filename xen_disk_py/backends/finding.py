"""From a name on the command line to a class.

A backend is named by

* a word: one of ours (``discard``, ``raw``, ``mmap``, ``cow``, ``overlay``, ``vhd``), or an
  installed entry point of the group ``xen_disk_py.backends``;
* ``package.module:Class``;
* ``file.py`` or ``file.py:Class``, as the backend or, with no backend given, as the path. The file
  may also be a plugin for nbdkit's Python; then a name behind the colon is that of an export.

A filter is named by a word, one of ours, or by ``file.py`` or ``file.py:Class``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

from ..errors import BackendError, UsageError
from . import Backend
from .filter import Filter

ENTRY_POINTS = "xen_disk_py.backends"
_PACKAGE = Backend.__module__
_OURS = {
    "at": "AtBackend",
    "cow": "CowBackend",
    "discard": "DiscardBackend",
    "mmap": "MmapBackend",
    "nbd": "NbdBackend",
    "overlay": "OverlayBackend",
    "qemu": "QemuBackend",
    "raw": "RawBackend",
    "rbd": "RbdBackend",
    "vhd": "VhdBackend",
}
QEMU_FORMATS = ("qcow2", "vhdx", "vmdk", "vdi")
"""Formats that are left to a ``qemu-nbd`` of our own."""
_MODULES = {"qemu": "nbd.qemu"}  # where a backend is not in the module of its name
_FILTERS = {
    "cache": "Cache",
    "checksum": "Checksum",
    "corrupt": "Corrupt",
    "delay": "Delay",
    "error": "Error",
    "log": "Log",
    "offset": "Offset",
    "partition": "Partition",
    "powercut": "Powercut",
    "protect": "Protect",
    "rate": "Rate",
    "readahead": "Readahead",
    "record": "Recorder",
    "retry": "Retry",
}
_SCHEMES = {
    "at": ("at:",),
    "nbd": ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://", "nbd+vsock://", "[ "),
    "rbd": ("rbd:",),
}
"""How a path begins that names no file, by backend."""
_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w+))?")


def choose(backend: str | None, path: str | None) -> str:
    """Name the backend that is used when ``--backend`` and ``--path`` are these."""
    if backend is not None:
        return backend
    if path is None:
        return "discard"
    for name, start in _SCHEMES.items():
        if path.startswith(start):
            return name
    return path if _FILE.fullmatch(path) else "cow"


def is_file(path: str) -> bool:
    """Tell whether a ``--path`` names a file of this host, rather than a server's disk."""
    return not any(path.startswith(start) for start in _SCHEMES.values())


def builtin_names() -> list[str]:
    """Name the backends of this package."""
    return sorted(_OURS)


def find_class(name: str) -> tuple[type[Backend], str]:
    """Find the class of that name (see :func:`choose`), and what to call it in messages.

    Raises:
        UsageError: there is none.
        BackendError: it cannot be loaded.
    """
    if name in _OURS:
        module = importlib.import_module(f"{_PACKAGE}.{_MODULES.get(name, name)}")
        return _checked(getattr(module, _OURS[name]), name), f"the {name} backend"
    file = _FILE.fullmatch(name)
    if file is not None:
        return _from_file(file["file"], file["name"]), os.path.basename(file["file"])
    if ":" in name:
        return _from_module(name), name
    return _from_entry_point(name), f"the {name} backend"


def is_own_filter(name: str) -> bool:
    """Tell whether a filter's name is one of this package's."""
    return name in _FILTERS


def find_filter(name: str) -> type[Filter]:
    """Find the class of a filter: one of ours, or ``file.py[:Class]``.

    Raises:
        UsageError: there is none.
        BackendError: it cannot be loaded.
    """
    file = _FILE.fullmatch(name)
    if file is not None:
        return _filter_from_file(file["file"], file["name"])
    if name not in _FILTERS:
        raise UsageError(
            f"there is no filter {name}: use one of {', '.join(_FILTERS)}, or a file.py"
        )
    module = importlib.import_module(f"{_PACKAGE}.filters.{name}")
    found: type[Filter] = getattr(module, _FILTERS[name])
    return found


def _from_module(name: str) -> type[Backend]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise BackendError(
                f"{name}: there is no module {error.name}: "
                "install it, or add the absolute path of its directory to PYTHONPATH"
            ) from error
        raise BackendError(f"{name} cannot be imported: {_where(error)}") from error
    except Exception as error:
        raise BackendError(f"{name} cannot be imported: {_where(error)}") from error
    if not hasattr(module, class_name):
        known = _choices(module)
        raise BackendError(
            f"{name}: {module_name} has no {class_name}"
            + (f"; it has {', '.join(known)}" if known else "")
        )
    return _checked(getattr(module, class_name), name)


def _from_entry_point(name: str) -> type[Backend]:
    import importlib.metadata  # slow to import, and hardly ever needed

    if sys.version_info >= (3, 10):
        found = list(importlib.metadata.entry_points(group=ENTRY_POINTS))
    else:
        found = list(importlib.metadata.entry_points().get(ENTRY_POINTS, ()))
    for point in found:
        if point.name == name:
            try:
                cls = point.load()
            except Exception as error:
                raise BackendError(f"{name} cannot be imported: {_where(error)}") from error
            return _checked(cls, name)
    known = ", ".join(sorted({*_OURS, *(point.name for point in found)}))
    raise UsageError(
        f"there is no backend {name}: use one of {known}, a file.py, or package.module:Class"
    )


def _from_file(path: str, class_name: str | None) -> type[Backend]:
    from .nbdkit import is_plugin, plugin_class

    module = _run_file(path)
    file = os.path.basename(path)
    if is_plugin(module) and not _choices(module):
        return plugin_class(module, class_name)
    if class_name is not None:
        if not hasattr(module, class_name):
            known = ", ".join(_choices(module)) or "none"
            raise BackendError(f"{path} has no {class_name}; the disks in it: {known}")
        return _checked(getattr(module, class_name), f"{file}:{class_name}")
    choices = _choices(module)
    if len(choices) == 1:
        return _checked(getattr(module, choices[0]), file)
    if hasattr(module, "Disk"):
        return _checked(module.Disk, f"{file}:Disk")
    if not choices:
        raise BackendError(
            f"{path} has no disk in it: no class there is derived from "
            "xen_disk_py.backends.Backend, and a plugin for nbdkit has open, get_size and pread"
        )
    raise BackendError(
        f"{path} has several disks: {', '.join(choices)}; "
        f"call one of them Disk, or choose with --backend {path}:{choices[0]}"
    )


def _filter_from_file(path: str, class_name: str | None) -> type[Filter]:
    """Find a filter in a Python file: the one that there is, or the one of this name.

    Raises:
        BackendError: there is none, or several, or the file cannot be loaded.
    """
    module = _run_file(path)
    known = _choices(module, of=Filter)
    if class_name is None and len(known) == 1:
        class_name = known[0]
    if class_name is None and known:
        raise BackendError(f"{path} has several filters: choose with --filter {path}:{known[0]}")
    if class_name is None or class_name not in known:
        raise BackendError(
            f"{path} has no filter{'' if class_name is None else f' {class_name}'} in it: the "
            "classes derived from xen_disk_py.backends.filter.Filter are "
            f"{', '.join(known) or 'none'}"
        )
    found: type[Filter] = getattr(module, class_name)
    return found


def _run_file(path: str) -> ModuleType:
    """Run a file as a module of its own, leaving no compiled copy beside it."""
    import importlib.util  # few disks are such a file

    try:
        with open(path, "rb") as file:
            source = file.read()
    except FileNotFoundError:
        raise BackendError(f"{path}: no such file: check the name") from None
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}") from error
    path = os.path.abspath(path)
    # A name that no other module has. A traceback asks for the loader, which Python 3.15 demands.
    loader = SourceFileLoader(path, path)
    spec = importlib.util.spec_from_file_location(path, path, loader=loader)
    assert spec is not None  # there is a loader
    module = importlib.util.module_from_spec(spec)
    directory = os.path.dirname(path)
    if directory not in sys.path:
        sys.path.append(directory)  # its neighbours can be imported; at the end, to hide nothing
    sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
    sys.modules.setdefault("nbdkit", importlib.import_module(f"{_PACKAGE}.nbdkit.api"))
    try:
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise BackendError(f"{path} cannot be loaded: {_where(error, path)}") from error
    return module


def _choices(module: ModuleType, of: type[Backend] = Backend) -> list[str]:
    """Name the disks that a module defines, or its filters."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, of)
        and issubclass(value, Filter) is (of is Filter)
        and value.__module__ == module.__name__
        and value.__name__ == name
    ]


def _checked(value: object, name: str) -> type[Backend]:
    if isinstance(value, type) and issubclass(value, Backend):
        return value
    raise BackendError(f"{name} is not a class derived from xen_disk_py.backends.Backend")


def is_plugin_class(cls: type[Backend]) -> bool:
    """Tell whether a class is a plugin for nbdkit's Python."""
    # A class of a plugin exists only where a file was run, which has imported this.
    plugins = sys.modules.get(f"{_PACKAGE}.nbdkit.backend")
    return plugins is not None and issubclass(cls, plugins.PluginBackend)


def _where(error: BaseException, file: str | None = None) -> str:
    """Name an exception of an import and the line: the last one in ``file``, if given."""
    if isinstance(error, SyntaxError) and error.filename:
        kind = type(error).__name__
        return f"{os.path.basename(error.filename)}:{error.lineno}: {kind}: {error.msg}"
    return user_line(error, file)


def user_line(error: BaseException, where: object = None) -> str:
    """Describe an exception in one line, for a log: ``mydisk.py:12: ValueError: …``.

    The line is the innermost one that ran in the file of the backend's class: the author's
    own, even if it called something that raised. Nowhere in that file: the innermost of all.

    Args:
        error: what was caught.
        where: the backend, its class, or the name of a file.
    """
    file = where if isinstance(where, str) else _file_of(where)
    place = own = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith("<frozen "):  # the import system
            place = f"{os.path.basename(name)}:{trace.tb_lineno}: "
        if name == file:
            own = place
        trace = trace.tb_next
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return (own or place) + (text if len(text) <= 300 else text[:299] + "…")


def _file_of(backend: object) -> str | None:
    cls = backend if isinstance(backend, type) else type(backend)
    return getattr(sys.modules.get(cls.__module__), "__file__", None)
