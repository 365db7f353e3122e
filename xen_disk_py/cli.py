"""The command line: what can be asked, and how an answer becomes an exit status."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .environment import Environment
from .errors import UsageError, XenDiskError
from .exit_status import ExitStatus
from .units import parse_size

PROGRAM = "xen_disk_py"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try: {self.prog} --help)")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 1_000_000:  # more does not fit into poll()
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _segments(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 256):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 256")
    return int(text)


def _add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--path",
        metavar="PATH",
        help="an image or block device; or a Python file that defines a disk",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="discard, raw, mmap, cow, FILE.py, package.module:Class, or an installed one "
        "(default: cow with --path, else discard)",
    )
    parser.add_argument("--size", type=_size, help="of a discard disk: bytes, or 10M, 1G, 2T")
    parser.add_argument("--read-only", action="store_true", help="refuse all writes")
    parser.add_argument(
        "--cow-limit",
        type=_size,
        metavar="SIZE",
        help="host memory that a cow disk's changes may take (default: half of what is free)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend's own; may be given several times",
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    # what every command takes; SUPPRESS lets it stand before or after the command's name
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="log everything; show tracebacks")
    parser = _Parser(
        prog=PROGRAM,
        description="Hot-plug a disk into a running Xen guest and serve it from Python.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    connect = commands.add_parser(
        "connect",
        parents=[common],
        help="give a guest a disk until Ctrl-C",
        description="Give the running guest VM a disk and serve it until Ctrl-C, which unplugs "
        "it politely; a second Ctrl-C forces it.",
    )
    connect.add_argument("vm", metavar="VM", help="domain id, UUID or name")
    _add_backend_arguments(connect)
    connect.add_argument(
        "--vdev", metavar="DEV", help="such as xvdc (default: the guest's first free one)"
    )
    connect.add_argument(
        "--indirect-segments",
        type=_segments,
        default=256,
        metavar="N",
        help="largest request to offer, in pages of 4 KiB; 0: do not offer (default: 256)",
    )
    connect.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the guest may take to connect (default: 30)",
    )
    connect.add_argument("--json", action="store_true", help="say what is connected as JSON")
    connect.add_argument("--quiet", "-q", action="store_true", help="no status line, no totals")

    listing = commands.add_parser(
        "list", parents=[common], help="show the disks that are connected"
    )
    listing.add_argument("vm", metavar="VM", nargs="?", help="only this guest's")
    listing.add_argument("--json", action="store_true", help="as JSON")

    disconnect = commands.add_parser(
        "disconnect",
        parents=[common],
        help="take a disk away, from another terminal",
        description="Take a disk away and wait until it is gone. Also cleans up behind a "
        "process that was killed.",
    )
    disconnect.add_argument("vm", metavar="VM", help="domain id, UUID or name")
    disconnect.add_argument("vdev", metavar="VDEV", help="such as xvdb")
    disconnect.add_argument("--force", action="store_true", help="even if the guest uses it")
    disconnect.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the guest may take to let go (default: 30)",
    )

    doctor = commands.add_parser(
        "doctor", parents=[common], help="check that this host can connect a disk"
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="try a disk without Xen: a second process plays the guest",
    )
    _add_backend_arguments(demo)
    demo.add_argument(
        "--bytes",
        type=_size,
        default=64 << 20,
        metavar="SIZE",
        help="how much to write and read (default: 64M)",
    )
    demo.add_argument(
        "--overwrite",
        action="store_true",
        help="let a raw or mmap disk's image be overwritten (otherwise it is only read)",
    )
    demo.add_argument("--json", action="store_true", help="the results as JSON")
    return parser


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
    try:
        args = build_parser().parse_args(argv)
        command = importlib.import_module(f"xen_disk_py.commands.{args.command}")
        return ExitStatus(command.run(args, env))
    except UsageError as error:
        return _fail(env, error, ExitStatus.USAGE, debug)
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
        logging.getLogger(PROGRAM).debug("traceback", exc_info=error)
    env.tell(f"{PROGRAM}: error: {error}")
    return status


def run() -> NoReturn:
    """Run the program: what ``xen-disk`` and ``python -m xen_disk_py`` do."""
    sys.exit(main(sys.argv[1:]))
