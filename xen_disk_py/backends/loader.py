"""From what the command line says to an open, checked backend, with filters over it.

Which class is meant by a name: see :mod:`.finding`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable

from ..errors import BackendError, UsageError, XenDiskError
from ..named import NamedTuple
from ..units import parse_size
from . import Backend, sharing
from .filter import Filter
from .finding import choose, find_class, find_filter, is_plugin_class, user_line
from .options import convert
from .parameters import parameters_of

if TYPE_CHECKING:
    import inspect

_FILTER = r"(?P<name>[^=]+?\.py(?::\w+)?|\w+)(?::(?P<options>\w+=.*))?"
_SETTING = r"[A-Za-z][A-Za-z0-9_.-]*=.*"  # nbdkit(1)
_FLAGS = {
    "path": "--path",
    "size": "--size",
    "read_only": "--read-only",
    "cow_limit": "--cow-limit",
    "overlay": "--overlay",
    "sector_size": "--sector-size",
    "force": "--force",
}
_NUMBERS = ("size", "sector_size", "physical_sector_size", "discard_granularity", "threads")
_SIZES = ("size", "cow_limit", "sector_size")


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
    if is_plugin_class(cls):
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


def filter_parts(text: str) -> tuple[str, list[str]]:
    """Return the name in a ``--filter``, and its options as they are written.

    Raises:
        UsageError: it has no such parts.
    """
    match = re.fullmatch(_FILTER, text, re.DOTALL)
    if match is None:
        raise UsageError(f"--filter {text}: write it as NAME, or NAME:key=value,key=value")
    return match["name"], list(filter(None, (match["options"] or "").split(",")))


def _read_filter(text: str) -> _Wanted:
    """Find the class of a ``--filter``, and read its options.

    Raises:
        UsageError: there is no such filter, or it takes no such option.
        BackendError: it cannot be loaded.
    """
    name, options = filter_parts(text)
    try:
        cls = find_filter(name)
    except UsageError as error:
        raise UsageError(f"--filter {text}: {error}") from None
    given = filter_options(cls, name, options)
    return _Wanted(text, name, cls, given, filter_arguments(cls, name, given))


def filter_parameters(cls: type[Filter]) -> dict[str, inspect.Parameter]:
    """Return what a filter can be given, by name."""
    import inspect  # see .parameters: few disks have a filter

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
    for name in _NUMBERS:
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
    return _misnamed(backend)


def _misnamed(backend: Backend) -> str | None:
    """Say what a disk keeps under a name for which the contract has another meaning."""
    for name, meaning, is_that in (
        ("memory", "how many bytes of memory writes occupy", lambda found: isinstance(found, int)),
        ("notes", "lines for whoever opens the disk", _are_all(str)),
        ("host_storage", "the files and devices that the disk is in", _are_all(sharing.Storage)),
    ):
        found = getattr(backend, name)
        if not is_that(found):
            kind = type(found).__name__
            return f"{name} is a {kind}, but means {meaning}: give that another name"
    for method in ("discard", "discard_securely"):
        is_defined = getattr(type(backend), method) is not getattr(Backend, method)
        if getattr(backend, f"can_{method}") and not is_defined:
            return f"can_{method}, but defines no {method}(self, offset, length)"
    return None


def _are_all(kind: type) -> Callable[[object], bool]:
    """Tell of a sequence, which is no text, whether all that it has are of a kind."""
    return lambda found: (
        isinstance(found, Sequence)
        and not isinstance(found, (str, bytes, bytearray))
        and all(isinstance(each, kind) for each in found)
    )


def _arguments(
    cls: type[Backend], label: str, given: Mapping[str, object], read_only: bool
) -> dict[str, object]:
    """Match what was given with what the constructor takes."""
    takes, takes_all = parameters_of(cls)
    arguments: dict[str, object] = {}
    for key, text in given.items():
        value: object = text
        if key not in takes and not takes_all:
            raise UsageError(f"{label} takes no {_flag(key)}; {_accepted(list(takes))}")
        if isinstance(text, str):
            annotation = takes[key].annotation if key in takes else ""
            value = _converted(key, text, annotation)
        arguments[key] = value
    if read_only and ("read_only" in takes or takes_all):
        arguments["read_only"] = True
    missing = []
    for key, parameter in takes.items():
        if key not in arguments and parameter.is_needed:
            if key == "read_only":
                arguments[key] = False
            else:
                missing.append(_flag(key))
    if missing:
        raise UsageError(f"{label} needs {' and '.join(missing)}")
    return arguments


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
        if not re.fullmatch(_SETTING, text, re.DOTALL):
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
