"""C libraries as tables: what is called, how, and what a failure looks like.

A :class:`Library` names a shared object, the packages that carry it and the functions
that are called in it. Nothing is loaded before :meth:`Library.load`, and nothing is
loaded twice as something else: the name is a soname, so that an incompatible version is
never picked up.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Callable

from xen_disk_py.errors import HypervisorError, XenUnavailable
from xen_disk_py.named import NamedTuple

Check = Callable[[Any, Any, tuple[Any, ...]], Any]
"""What ctypes calls ``errcheck``: (result, function, arguments) → the result to return."""

# What dlopen says of a library that is not there: of glibc, and of musl.
_ABSENT = "{}: cannot open shared object file: No such file"
_ABSENT_MUSL = "Error loading shared library {}: No such file or directory"

_MAP_FAILED = ctypes.c_void_p(-1).value


def _failure(what: str, function: Any) -> HypervisorError:
    # A library that fails without an errno would read as "Success".
    return HypervisorError(ctypes.get_errno() or errno.EIO, f"cannot {what} ({function.__name__})")


def not_null(what: str) -> Check:
    """Return a check for functions that return a pointer: NULL raises ``cannot <what>``."""

    def check(result: int | None, function: Any, _arguments: tuple[Any, ...]) -> int:
        if not result:
            raise _failure(what, function)
        return result

    return check


def not_negative(what: str) -> Check:
    """Return a check for functions that return a number: below zero raises."""

    def check(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
        if result < 0:
            raise _failure(what, function)
        return result

    return check


def mapped(what: str) -> Check:
    """Return a check for mmap(2), whose failure is all ones."""

    def check(result: int | None, function: Any, _arguments: tuple[Any, ...]) -> int | None:
        if result == _MAP_FAILED:
            raise _failure(what, function)
        return result

    return check


class Signature(NamedTuple):
    """How one function is called. ``argtypes`` None: plain integers only, for speed."""

    restype: Any
    argtypes: Sequence[Any] | None
    check: Check | None = None
    optional: bool = False


class Finding(NamedTuple):
    """Whether a library (``symbol`` None) or one of its functions is here."""

    library: str
    symbol: str | None
    found: bool
    required: bool
    remedy: str
    """What to do if it is not found; empty if it is."""


class Library(NamedTuple):
    """A shared object and every function of it that we call."""

    soname: str | None
    """None: the C library that Python itself runs on."""
    packages: str
    """Where it comes from, as in ``install <packages>``."""
    functions: Mapping[str, Signature]
    loader: type[ctypes.CDLL] = ctypes.CDLL
    required: bool = True

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self.soname or "the C library"

    def load(self) -> SimpleNamespace:
        """Load it: an object with one attribute per function; None for a missing optional one.

        Raises:
            XenUnavailable: the library, or a function that is not optional, is missing.
        """
        shared_object = self._open()
        functions = SimpleNamespace()
        for name, signature in self.functions.items():
            function = getattr(shared_object, name, None)
            if function is None:
                if not signature.optional:
                    raise XenUnavailable(self._no_symbol(name))
            else:
                function.restype = signature.restype
                if signature.argtypes is not None:
                    function.argtypes = signature.argtypes
                if signature.check is not None:
                    function.errcheck = signature.check
            setattr(functions, name, function)
        return functions

    def survey(self) -> Iterator[Finding]:
        """Tell of the library and of each function whether it is here; never raises."""
        try:
            shared_object: ctypes.CDLL | None = self._open()
            reason = ""
        except XenUnavailable as error:
            shared_object, reason = None, str(error)
        yield Finding(self.name, None, shared_object is not None, self.required, reason)
        for name, signature in self.functions.items():
            found = getattr(shared_object, name, None) is not None
            remedy = "" if found else reason or self._no_symbol(name)
            required = self.required and not signature.optional
            yield Finding(self.name, name, found, required, remedy)

    def _open(self) -> ctypes.CDLL:
        try:
            return self.loader(self.soname, use_errno=True)
        except OSError as error:
            reason = str(error)
            if reason.startswith(_ABSENT.format(self.soname)) or reason == _ABSENT_MUSL.format(
                self.soname
            ):
                message = f"{self.name} not found: install {self.packages}"
            else:  # found, but not usable: something that it needs is missing, or the wrong CPU
                message = f"{self.name} cannot be loaded ({reason}): reinstall {self.packages}"
            raise XenUnavailable(message) from None

    def _no_symbol(self, symbol: str) -> str:
        return f"{self.name} has no {symbol}: upgrade {self.packages}"
