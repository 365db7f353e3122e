"""The command line: has one command done, and makes an exit status of how that went."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands.arguments import PROGRAM, parse
from .commands.environment import Environment
from .errors import UsageError, XenDiskError
from .exit_status import ExitStatus

log = logging.getLogger("xen_disk_py")


def main(argv: Sequence[str], env: Environment | None = None) -> ExitStatus:
    """Run one command; never raises for anything a user can cause.

    Args:
        argv: the arguments, without the program's name.
        env: the machine to run on.
    """
    env = env if env is not None else Environment()
    debug = "--debug" in argv
    logging.basicConfig(
        stream=env.stderr,
        level=logging.DEBUG if debug else logging.INFO,
        format=f"{PROGRAM}: %(message)s",
    )
    program = PROGRAM
    try:
        args = parse(argv)
        program = f"{PROGRAM} {args.command}"
        command = importlib.import_module(f"xen_disk_py.commands.{args.command}")
        return ExitStatus(command.run(args, env))
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
        return ExitStatus.ERROR if done.code else ExitStatus.OK
    except Exception as error:
        if debug:
            raise
        message = f"{type(error).__name__}: {error} (a bug, or a broken system: see --debug)"
        return _fail(env, XenDiskError(message), ExitStatus.ERROR, debug)


def _fail(env: Environment, error: Exception, status: ExitStatus, debug: bool) -> ExitStatus:
    if debug:
        log.debug("traceback", exc_info=error)
    env.tell(f"{PROGRAM}: error: {error}")
    return status


def run() -> NoReturn:
    """Run the program: what ``xen-disk`` and ``python -m xen_disk_py`` do."""
    sys.exit(main(sys.argv[1:]))
