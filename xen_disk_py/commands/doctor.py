"""``doctor``: check each thing that ``connect`` needs, and say how to fix what is missing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from .. import libxen
from ..errors import XenDiskError
from ..exit_status import ExitStatus
from ..host.atomic import load_fence
from ..libxen import EVTCHN_DEVICE, GNTALLOC, GNTDEV
from .environment import Environment


class Check(NamedTuple):
    """One thing looked at.

    ``needed`` is False where ``connect`` works without it; ``remedy`` is empty if all is well.
    """

    name: str
    ok: bool
    needed: bool
    detail: str
    remedy: str = ""


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print what was found; the status says whether ``connect`` can work."""
    checks = list(examine(env))
    broken = [check for check in checks if check.needed and not check.ok]
    if args.json:
        env.say(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            mark = "ok" if check.ok else "MISSING" if check.needed else "absent"
            env.say(f"{mark:<8} {check.name}: {check.detail}")
            if not check.ok and check.remedy:
                env.say(f"{'':<8} {check.remedy}")
        if broken:
            env.say(
                f"connect cannot work here; missing: {', '.join(check.name for check in broken)}"
            )
        else:
            env.say("connect can work here")
    return ExitStatus.ERROR if broken else ExitStatus.OK


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
        problem = device.problem()
        yield Check(
            f"kernel module {device.module}",
            problem is None,
            needed,
            f"{device.path} can be used" if problem is None else problem.partition(": ")[0],
            f"modprobe {device.module}",
        )
    yield from _libraries()
    yield _fence()
    yield _store(env)


def _libraries() -> Iterator[Check]:
    """A line for each library, and one for each function that a library lacks."""
    for name, findings in groupby(libxen.survey(), key=lambda finding: finding.library):
        library, *functions = findings
        missing = [function for function in functions if not function.found]
        if not library.found:
            yield Check(name, False, library.required, "not found", library.remedy)
            continue
        yield Check(name, True, library.required, f"found, {len(functions)} functions looked for")
        for function in missing:
            yield Check(
                f"{name} {function.symbol}", False, function.required, "not found", function.remedy
            )


def _fence() -> Check:
    try:
        fence = load_fence()
    except XenDiskError as error:
        return Check("memory fence", False, True, str(error), "apt install libatomic1")
    return Check("memory fence", True, True, fence.source)


def _store(env: Environment) -> Check:
    try:
        with env.open_store() as store:
            name = store.read("/local/domain/0/name")
    except XenDiskError as error:
        return Check("xenstore", False, True, str(error), "systemctl start xenstored")
    return Check("xenstore", True, True, f"answers; domain 0 is {name or 'without a name'}")
