"""From a name on the command line to an open, checked backend.

A backend is named by

* a word: one of ours (``discard``, ``raw``, ``mmap``, ``cow``, ``overlay``, ``vhd``), or an
  installed entry point of the group ``xen_disk_py.backends``;
* ``package.module:Class``;
* ``file.py`` or ``file.py:Class``, as the backend or, with no backend given, as the path. The file
  may also be a plugin for nbdkit's Python; then a name behind the colon is that of an export.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import BackendError, UsageError, XenDiskError
from ..units import parse_size
from . import Backend, sharing
from .filter import Filter
from .options import convert

ENTRY_POINTS = "xen_disk_py.backends"

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
_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w+))?")
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
_FILTER = re.compile(
    r"(?P<name>(?P<file>[^=]+?\.py)(?::(?P<cls>\w+))?|\w+)(?::(?P<options>\w+=.*))?", re.DOTALL
)
_SETTING = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*=.*", re.DOTALL)  # nbdkit(1)
_FLAGS = {
    "path": "--path",
    "size": "--size",
    "read_only": "--read-only",
    "cow_limit": "--cow-limit",
    "overlay": "--overlay",
    "sector_size": "--sector-size",
    "force": "--force",
}
_SCHEMES = {
    "at": ("at:",),
    "nbd": ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://", "nbd+vsock://", "[ "),
    "rbd": ("rbd:",),
}
"""How a path begins that names no file, by backend."""
_SIZES = ("size", "cow_limit", "sector_size")


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


def parse_options(pairs: Iterable[str]) -> dict[str, str]:
    """Read the ``key=value`` of each ``--option``; the last of a key counts.

    Raises:
        UsageError: one is not of that form, or has a flag of its own, such as ``--path``.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--option {pair}: write it as name=value")
        if key in _FLAGS:
            raise UsageError(f"--option {pair}: use {_FLAGS[key]} for that")
        options[key] = value
    return options


def open_backend(
    backend: str | None,
    options: Mapping[str, object],
    filters: Iterable[str] = (),
    *,
    pairs: Sequence[str] = (),
) -> Backend:
    """Find the class, give its constructor what it asks for, and check the result.

    Args:
        backend: what ``--backend`` says; None for the default (see :func:`choose`).
        options: by parameter name: ``path``, ``size``, ``read_only``, ``cow_limit``,
            ``sector_size``, ``overlay``. None, and False for ``read_only``, mean that it was not
            given. Text becomes what the parameter is annotated as (see :mod:`.options`).
        filters: what each ``--filter`` says, the first next to the disk.
        pairs: what each ``--option`` says, ``key=value``: more parameters by name; of an nbdkit
            plugin, its settings in this order, with whatever keys.

    ``force`` is no constructor's: with it images are opened though somebody else uses them.

    Asked for ``read_only``, a class whose constructor has no such parameter is opened as usual
    and its *instance* gets ``read_only = True``: whoever serves the disk refuses writes then.

    Raises:
        UsageError: there is no such backend, or it takes no such option or misses one.
        BackendError: it cannot be loaded or opened, or breaks the contract.
        ImageError: from ours, about the image.
    """
    cls, label, arguments, wanted, read_only, force = _read(backend, options, filters, pairs)
    try:
        with sharing.forced(force):
            disk = cls(**arguments)
        if read_only and not disk.read_only and not sharing.is_looking():
            disk.read_only = True
    except XenDiskError:
        raise
    except Exception as error:
        raise BackendError(f"{label} cannot be opened: {user_line(error, cls)}") from error
    check(disk)
    return _wrap(disk, wanted)


def check_wanted(
    backend: str | None,
    options: Mapping[str, object],
    filters: Iterable[str] = (),
    *,
    pairs: Sequence[str] = (),
) -> None:
    """See whether a disk can be asked for like this; nothing is opened.

    Raises:
        UsageError: there is no such backend or filter, or it takes no such option or misses one.
        BackendError: it cannot be loaded.
    """
    _read(backend, options, filters, pairs)


class _Read(NamedTuple):
    """What :func:`open_backend` was asked for: a class, what its constructor gets, the filters."""

    cls: type[Backend]
    label: str
    arguments: dict[str, object]
    filters: list[_Wanted]
    read_only: bool
    force: bool


def _read(
    backend: str | None,
    options: Mapping[str, object],
    filters: Iterable[str],
    pairs: Sequence[str],
) -> _Read:
    given = {key: value for key, value in options.items() if value is not None}
    path = given.get("path")
    name = choose(backend, None if path is None else str(path))
    if backend is None and name == path:
        del given["path"]
    read_only = bool(given.pop("read_only", False))
    force = bool(given.pop("force", False))
    cls, label = find_class(name)
    if _is_plugin_class(cls):
        arguments = _plugin_arguments(label, given, pairs, read_only)
    else:
        arguments = _arguments(cls, label, {**given, **parse_options(pairs)}, read_only)
    wanted = [_read_filter(text) for text in filters]  # first: what is wrong there opens nothing
    return _Read(cls, label, arguments, wanted, read_only, force)


def wrap(source: Backend, filters: Iterable[str]) -> Backend:
    """Put filters over a disk, the first next to it; without any, return the disk itself.

    Args:
        source: an open disk; closed if a filter cannot be had.
        filters: each ``NAME[:key=value,…]``, where the name may be ``FILE.py[:Class]``.

    Raises:
        UsageError: there is no such filter, or it takes no such option.
        BackendError: it cannot be loaded or made.
    """
    return _wrap(source, map(_read_filter, filters))


def _wrap(disk: Backend, wanted: Iterable[_Wanted]) -> Backend:
    try:
        for each in wanted:
            disk = _put_over(disk, each)
    except BaseException:
        disk.close()
        raise
    return disk


def put_over(source: Backend, text: str) -> Filter:
    """Put a filter over a disk, which stays open if that cannot be; as :func:`wrap` otherwise."""
    return _put_over(source, _read_filter(text))


class _Wanted(NamedTuple):
    """A ``--filter``: its options as they are given, and as the class takes them."""

    text: str
    name: str
    cls: type[Filter]
    given: dict[str, str]
    arguments: dict[str, Any]


def _put_over(source: Backend, wanted: _Wanted) -> Filter:
    try:
        disk = wanted.cls(source, **wanted.arguments)
    except XenDiskError:
        raise
    except Exception as error:
        line = user_line(error, wanted.cls)
        raise BackendError(f"--filter {wanted.text}: {line}") from error
    disk.name, disk.given = wanted.name, wanted.given
    check(disk)
    return disk


def _read_filter(text: str) -> _Wanted:
    """Find the class of a ``--filter``, and read its options.

    Raises:
        UsageError: there is no such filter, or it takes no such option.
        BackendError: it cannot be loaded.
    """
    match = _FILTER.fullmatch(text)
    if match is None:
        raise UsageError(f"--filter {text}: write it as NAME, or NAME:key=value,key=value")
    name = match["name"]
    if match["file"]:
        cls = find_filter(match["file"], match["cls"])
    elif name in _FILTERS:
        cls = getattr(importlib.import_module(f"{__package__}.filters.{name}"), _FILTERS[name])
    else:
        raise UsageError(
            f"--filter {text}: there is no filter {name}: use one of {', '.join(_FILTERS)}, or a "
            "file.py"
        )
    given = filter_options(cls, name, filter(None, (match["options"] or "").split(",")))
    return _Wanted(text, match["name"], cls, given, filter_arguments(cls, name, given))


def filter_parameters(cls: type[Filter]) -> dict[str, inspect.Parameter]:
    """Return what a filter can be given, by name."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]  # behind the source
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in parameters if p.kind in by_name}


def filter_options(cls: type[Filter], name: str, items: Iterable[str]) -> dict[str, str]:
    """Read the ``key=value`` of a filter.

    Raises:
        UsageError: it takes no such option.
    """
    takes = filter_parameters(cls)
    given = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in takes:
            raise UsageError(
                f"--filter {name}: {item!r} is no option of it; it takes "
                f"{', '.join(takes) or 'none'}"
            )
        given[key] = value
    return given


def filter_arguments(cls: type[Filter], name: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Convert what a filter was given.

    Raises:
        UsageError: something is not what it takes, or is missing.
    """
    takes = filter_parameters(cls)
    arguments = {}
    for key, value in given.items():
        try:
            arguments[key] = convert(value, takes[key].annotation)
        except UsageError as error:
            raise UsageError(f"--filter {name}: {key}={value}: {error}") from None
    for key, parameter in takes.items():
        if parameter.default is parameter.empty and key not in given:
            raise UsageError(f"--filter {name} needs {key}=…")
    return arguments


def check(backend: Backend) -> None:
    """See that a backend keeps the contract where one can see it; close it if it does not.

    Raises:
        BackendError: it does not.
    """
    try:
        fault = _fault(backend)
    except Exception as error:  # noqa: BLE001 - a property of an author's class may raise anything
        fault = user_line(error, backend)
    if fault is None:
        return
    message = f"{type(backend).__name__}: {fault}"
    try:
        backend.close()
    except Exception as error:  # noqa: BLE001 - the fault matters more
        message += f" (and close failed: {user_line(error, backend)})"
    raise BackendError(message)


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


def _fault(backend: Backend) -> str | None:
    """Say what is wrong with an open backend."""
    needed = ["read"] if backend.read_only else ["read", "write"]
    for method in needed:
        if getattr(getattr(backend, method), "__func__", None) is getattr(Backend, method):
            return f"defines no {method}(self, buffers, offset)"
    if backend.asynchronous is not None and (backend.threads > 1 or not backend.repeats_flush):
        return "is asynchronous, so threads must be 1 and repeats_flush True"
    if not hasattr(backend, "size"):
        return "has no size: set self.size, in bytes, in __init__"
    for name in ("size", "sector_size", "physical_sector_size", "discard_granularity"):
        value = getattr(backend, name)
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{name} is {value!r}, not an int"
        if value <= 0:
            return f"{name} is {value}, it must be positive"
    sector = backend.sector_size
    if sector not in (512, 1024, 2048, 4096):
        return f"sector_size is {sector}, it must be 512, 1024, 2048 or 4096"
    if backend.size % sector:
        return f"size is {backend.size}, not a multiple of sector_size, {sector}"
    if backend.physical_sector_size % sector:
        physical = backend.physical_sector_size
        return f"physical_sector_size is {physical}, not a multiple of sector_size, {sector}"
    if backend.discard_granularity % sector:
        granularity = backend.discard_granularity
        return f"discard_granularity is {granularity}, not a multiple of sector_size, {sector}"
    return None


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
        module = importlib.import_module(f"{__package__}.{_MODULES.get(name, name)}")
        return _checked(getattr(module, _OURS[name]), name), f"the {name} backend"
    file = _FILE.fullmatch(name)
    if file is not None:
        return _from_file(file["file"], file["name"]), os.path.basename(file["file"])
    if ":" in name:
        return _from_module(name), name
    return _from_entry_point(name), f"the {name} backend"


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


def find_filter(path: str, class_name: str | None) -> type[Filter]:
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
    try:
        with open(path, "rb") as file:
            source = file.read()
    except FileNotFoundError:
        raise BackendError(f"{path}: no such file: check the name") from None
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}") from error
    path = os.path.abspath(path)
    # A name that no other module has. A traceback asks for the loader, which Python 3.15 demands.
    loader = importlib.machinery.SourceFileLoader(path, path)
    spec = importlib.util.spec_from_file_location(path, path, loader=loader)
    assert spec is not None  # there is a loader
    module = importlib.util.module_from_spec(spec)
    directory = os.path.dirname(path)
    if directory not in sys.path:
        sys.path.append(directory)  # its neighbours can be imported; at the end, to hide nothing
    sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
    sys.modules.setdefault("nbdkit", importlib.import_module(f"{__package__}.nbdkit.api"))
    try:
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise BackendError(f"{path} cannot be loaded: {_where(error, path)}") from error
    return module


def _where(error: BaseException, file: str | None = None) -> str:
    """Name an exception of an import and the line: the last one in ``file``, if given."""
    if isinstance(error, SyntaxError) and error.filename:
        kind = type(error).__name__
        return f"{os.path.basename(error.filename)}:{error.lineno}: {kind}: {error.msg}"
    return user_line(error, file)


def _choices(module: ModuleType, of: type[Backend] = Backend) -> list[str]:
    """Name the disks that a module defines, or its filters."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, of)
        and issubclass(value, Filter) is (of is Filter)
        and value.__module__ == module.__name__
        and value.__name__ == name
    ]


def _checked(value: object, name: str) -> type[Backend]:
    if inspect.isclass(value) and issubclass(value, Backend):
        return value
    raise BackendError(f"{name} is not a class derived from xen_disk_py.backends.Backend")


def _arguments(
    cls: type[Backend], label: str, given: Mapping[str, object], read_only: bool
) -> dict[str, object]:
    """Match what was given with what the constructor takes."""
    takes, takes_all = _parameters(cls)  # type: ignore[arg-type]  # a class has its own __hash__
    arguments: dict[str, object] = {}
    for key, text in given.items():
        value: object = text
        if key not in takes and not takes_all:
            raise UsageError(f"{label} takes no {_flag(key)}; {_accepted(list(takes))}")
        if isinstance(text, str):
            annotation = takes[key].annotation if key in takes else inspect.Parameter.empty
            value = _converted(key, text, annotation)
        arguments[key] = value
    if read_only and ("read_only" in takes or takes_all):
        arguments["read_only"] = True
    missing = []
    for key, parameter in takes.items():
        if key not in arguments and parameter.default is parameter.empty:
            if key == "read_only":
                arguments[key] = False
            else:
                missing.append(_flag(key))
    if missing:
        raise UsageError(f"{label} needs {' and '.join(missing)}")
    return arguments


@functools.cache
def _parameters(cls: type[Backend]) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """Return what a constructor takes by name, and whether it takes any name."""
    found = inspect.signature(cls).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {each.name: each for each in found if each.kind in by_name}
    return takes, any(each.kind is each.VAR_KEYWORD for each in found)


def _is_plugin_class(cls: type[Backend]) -> bool:
    # A class of a plugin exists only where a file was run, which has imported this.
    plugins = sys.modules.get(f"{__package__}.nbdkit.backend")
    return plugins is not None and issubclass(cls, plugins.PluginBackend)


def _plugin_arguments(
    label: str, given: Mapping[str, object], pairs: Sequence[str], read_only: bool
) -> dict[str, object]:
    for key in given:
        if key != "sector_size":
            raise UsageError(
                f"{label} is a plugin for nbdkit and takes no {_flag(key)}; what it takes stands "
                f"behind its path as {key}=…"
            )
    for text in pairs:
        if not _SETTING.fullmatch(text):
            raise UsageError(f"{text}: write it as name=value")
    return {**given, "settings": pairs, "read_only": read_only}


def _flag(key: str) -> str:
    return _FLAGS.get(key, f"--option {key}=…")


def _accepted(keys: Sequence[str]) -> str:
    flags = [_flag(key) for key in keys if key != "read_only"]
    return f"it takes {', '.join([*flags, '--read-only'])}"


def _converted(key: str, text: str, annotation: object) -> object:
    try:
        return parse_size(text) if key in _SIZES else convert(text, annotation)
    except UsageError as error:
        raise UsageError(f"{_flag(key)}: {error}") from None


def _file_of(backend: object) -> str | None:
    cls = backend if isinstance(backend, type) else type(backend)
    return getattr(sys.modules.get(cls.__module__), "__file__", None)
