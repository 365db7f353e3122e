"""The command line: has one command done, and makes an exit status of how that went."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NoReturn, TextIO, cast

from .commands.arguments import PROGRAM
from .commands.environment import Environment
from .commands.parsing import parse
from .commands.signals import ended_though_it_hangs
from .errors import Forked, UsageError, XenDiskError
from .exit_status import ExitStatus
from .host.logs import LineHandler
from .host.output import open_standard_descriptors

log = logging.getLogger("xen_disk_py")

_SERVING = {"adopt", "connect", "demo", "fork-server", "serve"}
"""Commands that handle signals by themselves, and fork before they start a thread."""

STACK = 8 << 20
"""Bytes of a thread's stack, as glibc has them by default. musl has 128 KiB, and Alpine's Python
asks for 1 MiB: less than what Python's own limits of recursion permit may take."""


def main(argv: Sequence[str], env: Environment | None = None) -> ExitStatus:
    """Run one command; never raises for anything a user can cause.

    Args:
        argv: the arguments, without the program's name.
        env: the machine to run on.
    """
    return _main(argv, env if env is not None else Environment(), is_program=False)


def _main(argv: Sequence[str], env: Environment, *, is_program: bool) -> ExitStatus:
    debug = "--debug" in argv
    logging.basicConfig(
        handlers=[LineHandler(env.err, PROGRAM)],
        level=logging.DEBUG if debug else logging.INFO,
    )
    program = PROGRAM
    try:
        args = parse(argv)
        program = f"{PROGRAM} {args.command}"
        module = args.command.replace("-", "_")
        command = importlib.import_module(f"xen_disk_py.commands.{module}")
        if is_program:
            gc.freeze()  # nothing of what was imported will ever be garbage
            gc.enable()
            # What a disk's author prints is no data of ours, and must not fail in his disk. For
            # good: a thread that waited for the reader of stderr would keep us from our end.
            sys.stdout = sys.stderr = cast(TextIO, env.err)
        may_hang = is_program and args.command not in _SERVING
        with ended_though_it_hangs(env) if may_hang else nullcontext():
            return ExitStatus(command.run(args, env))
    except Forked as process:
        words = process.words
    except UsageError as error:
        hint = f"{error} (try: {error.program or program} --help)"
        return _fail(env, UsageError(hint), ExitStatus.USAGE, debug)
    except XenDiskError as error:
        return _fail(env, error, ExitStatus.ERROR, debug)
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        return ExitStatus.ERROR  # whoever read our output has gone; there is nobody to tell
    except SystemExit as done:  # argparse, after --help or --version; or an author's backend
        return ExitStatus.ERROR if done.code else _printed(env, debug)
    except Exception as error:
        if debug:
            raise
        message = f"{type(error).__name__}: {error} (a bug, or a broken system: see --debug)"
        return _fail(env, XenDiskError(message), ExitStatus.ERROR, debug)
    return _main(words, env, is_program=is_program)


def _printed(env: Environment, debug: bool) -> ExitStatus:
    """See that what others have printed on stdout has arrived."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return ExitStatus.ERROR
    except OSError as error:
        told = XenDiskError(f"cannot write to stdout: {error.strerror}")
        return _fail(env, told, ExitStatus.ERROR, debug)
    return ExitStatus.OK


def _fail(env: Environment, error: Exception, status: ExitStatus, debug: bool) -> ExitStatus:
    if debug:
        log.debug("traceback", exc_info=error)
    env.tell(f"{PROGRAM}: error: {error}", logging.ERROR)
    return status


def run(argv: Sequence[str] | None = None, env: Environment | None = None) -> NoReturn:
    """Run the program: what ``xen-disk`` and ``python -m xen_disk_py`` do.

    Args:
        argv: the arguments, if they are not those of this process.
        env: the machine to run on, if it is not this one.
    """
    gc.disable()  # while what the command needs is imported
    open_standard_descriptors()
    threading.stack_size(STACK)
    env = env if env is not None else Environment()
    env.err.inherit()
    try:
        status = _main(sys.argv[1:] if argv is None else argv, env, is_program=True)
    finally:
        env.drain()
    try:
        env.stdout.flush()
    except OSError:  # it has been told; Python would tell once more, with a status of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = sys.stderr = None  # for Python's last flush no thread of an author is in there
    sys.exit(status)
