"""``doctor``: check each thing that ``connect`` and ``serve`` need, and say how to fix it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from itertools import groupby

from .. import libxen
from ..errors import XenDiskError
from ..exit_status import ExitStatus
from ..host.atomic import load_fence
from ..host.install import ours
from ..libxen import EVTCHN_DEVICE, GNTALLOC, GNTDEV
from ..libxl.attachment import FIRST_XEN
from ..named import NamedTuple
from ..xenbus import toolstack
from .environment import Environment

_ROOT = "/"
_RECORD = 256 << 10  # bytes that the record of a disk with one queue has room in
_NOT_UNDER_XEN = "needs a kernel that runs under Xen: see above"


class Check(NamedTuple):
    """One thing looked at.

    ``needed`` is False where ``connect`` works without it, ``for_serve`` says whether ``serve``
    needs it; ``remedy`` is empty if all is well.
    """

    name: str
    ok: bool
    needed: bool
    detail: str
    remedy: str = ""
    for_serve: bool = False


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print what was found; the status says whether ``connect`` can work."""
    checks = [
        check._replace(
            remedy="" if check.ok else check.remedy, for_serve=check.needed or check.for_serve
        )
        for check in examine(env)
    ]
    if args.json:
        env.say(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            mark = "ok" if check.ok else "MISSING" if check.needed else "absent"
            env.say(f"{mark:<8} {check.name}: {check.detail}")
            if not check.ok and check.remedy:
                env.say(f"{'':<8} {check.remedy}")
        for command, needed in (
            ("serve", [check for check in checks if check.for_serve]),
            ("connect", [check for check in checks if check.needed]),
        ):
            broken = ", ".join(check.name for check in needed if not check.ok)
            cannot = f"{command} cannot work here; missing: {broken}"
            env.say(cannot if broken else f"{command} can work here")
    return ExitStatus.OK if all(check.ok for check in checks if check.needed) else ExitStatus.ERROR


def examine(env: Environment) -> Iterator[Check]:
    """Look at everything, in the order in which it matters."""
    xen = libxen.runs_under_xen()
    yield Check(
        "Xen",
        xen,
        True,
        "this kernel runs under Xen" if xen else "this kernel does not run under Xen",
        "boot this host with Xen (Debian: apt install xen-system-amd64, then reboot); "
        "without Xen, try: xen-disk demo",
    )
    root = os.geteuid() == 0
    yield Check("privilege", root, True, "root" if root else "not root", "sudo, or run as root")
    for device, needed in ((GNTDEV, True), (EVTCHN_DEVICE, True), (GNTALLOC, False)):
        detail, _, remedy = (device.problem() or "").partition(": ")
        yield Check(
            f"kernel module {device.module}",
            not detail,
            needed,
            detail or f"{device.path} can be used",
            remedy if xen else _NOT_UNDER_XEN,
        )
    yield from _libraries()
    yield _fence()
    yield _store(env, xen=xen)
    yield _records(env)
    yield from _for_serve(env)


def _libraries() -> Iterator[Check]:
    """A line for each library, and one for each function that a library lacks."""
    for name, findings in groupby(libxen.survey(), key=lambda finding: finding.library):
        library, *functions = findings
        missing = [function for function in functions if not function.found]
        if not library.found:
            detail, _, remedy = library.remedy.rpartition(": ")
            detail = detail.removeprefix(f"{name} ") or "not found"
            yield Check(name, False, library.required, detail, remedy)
            continue
        yield Check(name, True, library.required, f"found, {len(functions)} functions looked for")
        for function in missing:
            yield Check(
                f"{name} {function.symbol}", False, function.required, "not found", function.remedy
            )


def _parts(error: XenDiskError) -> tuple[str, str]:
    """Take a message apart: what is wrong, and what to do."""
    detail, colon, remedy = str(error).rpartition(": ")
    return (detail, remedy) if colon else (remedy, "")


def _fence() -> Check:
    try:
        fence = load_fence()
    except XenDiskError as error:
        return Check("memory fence", False, True, *_parts(error))
    return Check("memory fence", True, True, fence.source)


def _store(env: Environment, *, xen: bool) -> Check:
    try:
        with env.open_store() as store:
            name = store.read("/local/domain/0/name")
            own = toolstack.own_domid(store)
    except XenDiskError as error:
        detail, remedy = _parts(error)
        if "start xenstored" in remedy:
            remedy = "systemctl start xenstored (Debian: systemctl start xen)"
        remedy = remedy if xen else _NOT_UNDER_XEN
        return Check("xenstore", False, True, detail, remedy)
    if own:
        detail = f"answers, but this is domain {own}, a guest"
        return Check("xenstore", False, True, detail, "run it in domain 0")
    return Check("xenstore", True, True, f"answers; domain 0 is {name or 'without a name'}")


def _records(env: Environment) -> Check:
    """See whether the directory of the records can be made or written; nothing is made."""
    place = env.record_directory
    while not os.path.lexists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    space = os.statvfs(place)
    name, detail = "records", f"{env.record_directory} can be written"
    if not os.path.isdir(place):
        return Check(name, False, True, f"{place} is no directory", f"move {place} away")
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(name, False, True, f"{place} cannot be written", "run as root")
    if space.f_bavail * space.f_frsize < _RECORD:
        return Check(name, False, True, f"{place} is full", f"make room there (df -h {place})")
    return Check(name, True, True, detail)


def _for_serve(env: Environment) -> Iterator[Check]:
    """Look at what ``serve`` needs besides."""
    version = env.xen_version()
    needs = "Xen {}.{}".format(*FIRST_XEN)
    yield Check(
        "version of Xen",
        version is not None and version >= FIRST_XEN,
        False,
        "unknown" if version is None else "{}.{}".format(*version),
        f"upgrade to {needs}, whose libxl takes backendtype=tap, or use: xen-disk connect",
        True,
    )
    for file in ours(_ROOT, "")[:2]:
        try:
            with open(file.path, "rb") as found:
                content = found.read()
        except OSError as error:
            content, detail = None, f"{file.path}: {error.strerror}"
        else:
            detail = file.path
        is_current = content == file.content
        remedy = "xen-disk install"
        if content is not None and not is_current:
            detail = f"{file.path} is not this version's"
            remedy = "xen-disk install --force (it replaces what somebody may have changed)"
        yield Check(os.path.basename(file.path), is_current, False, detail, remedy, True)
