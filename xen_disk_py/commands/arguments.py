"""What can be asked on the command line: the commands, their arguments, their help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import UsageError
from ..units import parse_size

PROGRAM = "xen-disk"


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)  # scripts outlive abbreviations
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)


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


def _queues(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 8")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _segments(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 4096")
    return int(text)


def _sector_size(text: str) -> int:
    if text not in ("512", "1024", "2048", "4096"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 512, 1024, 2048 or 4096")
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
        help="discard, raw, mmap, cow, overlay, FILE.py, package.module:Class, or an installed one "
        "(default: overlay with --overlay, else cow with --path, else discard)",
    )
    parser.add_argument(
        "--overlay",
        metavar="PATH",
        help="a file that keeps the changes, made if there is none; the image stays as it is "
        "(without --path: the image that the file was made for)",
    )
    parser.add_argument("--size", type=_size, help="of a discard disk: bytes, or 10M, 1G, 2T")
    parser.add_argument("--read-only", action="store_true", help="refuse all writes")
    parser.add_argument(
        "--cow-limit",
        type=_size,
        metavar="SIZE",
        help="what a cow disk's changes may take of host memory (default: half of what is free), "
        "an overlay's of its file system (default: all)",
    )
    parser.add_argument(
        "--sector-size",
        type=_sector_size,
        metavar="BYTES",
        help="the disk's logical sector: 512 to 4096 (default: the device's own; of a file 512)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend's own; may be given several times",
    )


def _add_overlay_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overlay", metavar="OVERLAY", help="a file that --overlay has made")


def _add_result_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="say the result as JSON")
    parser.add_argument("--quiet", "-q", action="store_true", help="do not show how far it is")


def _add_overlay_commands(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    diff = commands.add_parser(
        "diff",
        parents=[common],
        help="say what an overlay holds",
        description="Print a line for each run of bytes that OVERLAY holds in place of its "
        "image's: where it starts on the disk, and its length. Nothing is changed; while a disk "
        "uses the overlay, the lines may be out of date when they are read.",
    )
    _add_overlay_argument(diff)
    diff.add_argument("--json", action="store_true", help="as JSON")

    commit = commands.add_parser(
        "commit",
        parents=[common],
        help="put an overlay's changes into its image",
        description="Put what OVERLAY holds into its image, wholly or not at all, and remove "
        "OVERLAY. A complete new image is made beside the old one and takes its place, so the "
        "folder must have room for it; nobody may use either file meanwhile, and other overlays of "
        "the image fit it no more.",
    )
    _add_overlay_argument(commit)
    commit.add_argument(
        "--keep", action="store_true", help="leave an empty overlay of the new image in its place"
    )
    _add_result_arguments(commit)

    export = commands.add_parser(
        "export",
        parents=[common],
        help="make a new image of an overlay and its image",
        description="Make a new, sparse image NEW of OVERLAY and its image, which stay as they "
        "are. It is for its owner alone (mode 0600).",
    )
    _add_overlay_argument(export)
    export.add_argument("new", metavar="NEW", help="the new image")
    export.add_argument("--force", action="store_true", help="replace a file of that name")
    _add_result_arguments(export)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ``words`` of the result is that line, to be parsed once more.

    Raises:
        UsageError: it asks for something that is not there.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    if len(rest) == 1 and not rest[0].startswith("-"):
        rest = _place(args, rest[0])
    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}", f"{PROGRAM} {args.command}")
    args.words = list(words)
    return args


def _place(args: argparse.Namespace, word: str) -> list[str]:
    """Put a word behind an option where it belongs; return it if it belongs nowhere.

    argparse takes a positional argument that may be left out for left out if an option stands
    before it (``connect VM --adopt VDEV``, ``resize VM VDEV --force SIZE``).
    """
    if args.command == "connect" and args.device is None:
        args.device = word
    elif args.command == "resize" and args.size is None:
        try:
            args.size = _size(word)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"argument SIZE: {error}", f"{PROGRAM} resize") from None
    else:
        return [word]
    return []


def _add_connect(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    connect = commands.add_parser(
        "connect",
        parents=[common],
        help="give a guest a disk until Ctrl-C",
        description="Give the running guest VM a disk and serve it until Ctrl-C, which unplugs "
        "it politely; a second Ctrl-C forces it. SIGTERM is the same, and SIGHUP when started in "
        "a terminal (stdin or stderr is one); otherwise SIGHUP resizes the disk to what its image "
        "has become.",
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
        "--queues",
        type=_queues,
        default=1,
        metavar="N",
        help="queues to offer, each with a thread; fewer for a disk that lets in fewer threads "
        "(default: 1)",
    )
    connect.add_argument(
        "--grants",
        choices=("auto", "copy", "map"),
        default="auto",
        help="how to get at the guest's pages; auto: keep them mapped if the guest offers that "
        "(persistent grants), else copy, else map for each request (default: auto)",
    )
    connect.add_argument(
        "--persistent-grants",
        type=_count,
        default=8224,
        metavar="N",
        help="pages of the guest to keep mapped at most (default: 8224)",
    )
    connect.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the guest may take to connect (default: 30)",
    )
    connect.add_argument(
        "--cdrom",
        action="store_true",
        help="present it as a CD-ROM, which is read-only; Linux takes one in PV guests only",
    )
    connect.add_argument(
        "--user",
        metavar="NAME[:GROUP]",
        help="whom to become when all is open, without any privilege (such as nobody)",
    )
    connect.add_argument(
        "--on-error",
        choices=("report", "hold"),
        default="report",
        help="what to do with a request that the storage cannot do: report an error to the guest, "
        "or hold it and try again until it can, while the guest waits (default: report)",
    )
    connect.add_argument(
        "--supervise",
        action="store_true",
        help="if the process that serves the disk dies or hangs, start another, which goes on: "
        "the guest sees a pause. A cow disk gets an overlay in memory",
    )
    connect.add_argument(
        "--watchdog",
        type=_seconds,
        default=60,
        metavar="SECONDS",
        help="with --supervise: of silence, or for one request, that mean that it hangs; 0 for "
        "never (default: 60)",
    )
    connect.add_argument(
        "--recover",
        action="store_true",
        help="if a process that served --vdev of this guest died, go on with its disk, else "
        "connect one; if this one dies of an error, leave the disk to the next: for services",
    )
    connect.add_argument(
        "--adopt",
        action="store_true",
        help="go on with the disk VDEV of a process that died, with the arguments that it had",
    )
    connect.add_argument("device", metavar="VDEV", nargs="?", help="with --adopt: such as xvdb")
    # No help, they are for processes that we start ourselves. --leave: with an error of our own,
    # leave the disk to a successor; --again: this is one, say nothing on stdout; --scratch: remove
    # the overlay at the end; --rehearse: only see whether --adopt would come so far.
    for flag in ("--leave", "--again", "--scratch", "--rehearse"):
        connect.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    connect.add_argument("--json", action="store_true", help="say what is connected as JSON")
    connect.add_argument("--quiet", "-q", action="store_true", help="no status line, no totals")


def _add_upgrade(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    upgrade = commands.add_parser(
        "upgrade",
        parents=[common],
        help="have the program that is installed by now go on with a disk",
        description="Have the process that serves a disk become the program that is installed by "
        "now (after `pip install`, say): the guest sees a pause of some tenths of a second. "
        "Whether the new program comes up is seen first; if it does not, the old one goes on.",
    )
    upgrade.add_argument("vm", metavar="VM", help="domain id, UUID or name")
    upgrade.add_argument("vdev", metavar="VDEV", help="such as xvdb")
    upgrade.add_argument(
        "--timeout",
        type=_seconds,
        default=60,
        metavar="SECONDS",
        help="how long it may take (default: 60)",
    )
    upgrade.add_argument("--json", action="store_true", help="say who serves it now as JSON")


def build_parser() -> _Parser:
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

    _add_connect(commands, common)

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

    resize = commands.add_parser(
        "resize",
        parents=[common],
        help="give a disk another size while the guest uses it",
        description="Give a disk another size while the guest uses it: SIZE, or, without it, the "
        "size that its image has by now. With SIZE, an image file of a raw or mmap disk is made "
        "that long; a cow disk keeps its size. SIGHUP to the process that serves the disk does "
        "what this does without SIZE, unless that process was started in a terminal.",
    )
    resize.add_argument("vm", metavar="VM", help="domain id, UUID or name")
    resize.add_argument("vdev", metavar="VDEV", help="such as xvdb")
    resize.add_argument(
        "size", metavar="SIZE", nargs="?", type=_size, help="bytes, or 512M, 10G, 2T"
    )
    resize.add_argument(
        "--force", action="store_true", help="allow a smaller size; what lies beyond is lost"
    )
    resize.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the process that serves the disk may take (default: 30)",
    )
    resize.add_argument("--json", action="store_true", help="say the new size as JSON")

    _add_upgrade(commands, common)
    _add_overlay_commands(commands, common)

    commands.add_parser(
        "serve",
        parents=[common],
        help="serve the disks that xl's configurations ask for",
        description="Wait for disks that guests' configurations (or xl block-attach) ask for with "
        "backendtype=tap,script=block-xen-disk, and start a process for each. Ctrl-C ends the "
        "waiting, not the disks. Needs Xen 4.19; see docs/xl.md.",
    )

    install = commands.add_parser(
        "install",
        parents=[common],
        help="put the hotplug script and the services where xl and systemd look for them",
        description="Put the hotplug script for `serve` into /etc/xen/scripts, the services "
        "xen-disk-serve and xen-disk@ into /etc/systemd/system.",
    )
    install.add_argument(
        "--prefix", default="/", metavar="FOLDER", help="the system's root (default: /)"
    )
    install.add_argument("--remove", action="store_true", help="take them away again")
    install.add_argument(
        "--force", action="store_true", help="also where a file of that name differs"
    )

    # no help: it is what serve starts, not for people
    adopt = commands.add_parser("adopt", parents=[common])
    adopt.add_argument("domid", type=int)
    adopt.add_argument("devid", type=int)

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
        help="let a raw or mmap disk's image, or an overlay that exists, be overwritten (otherwise "
        "it is only read)",
    )
    demo.add_argument("--json", action="store_true", help="the results as JSON")
    return parser
