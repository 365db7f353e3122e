"""The command line: its commands, their arguments, their help.

The first group of a command's options holds what most people need; the groups after it are for the
rest. Help, man page (``manual``) and completion (``complete``) all come from this parser.
"""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..backends.finding import QEMU_FORMATS
from ..errors import UsageError
from ..recovery.role import OPTION as ROLE
from ..recovery.role import Role
from ..units import parse_size

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]

PROGRAM = "xen-disk"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the paragraphs of a text; one that is indented stays as it is."""

    def __init__(self, prog: str, width: int = 78) -> None:
        super().__init__(prog, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        import textwrap  # to nobody but who asks for help

        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(part, 78, break_on_hyphens=False)
            for part in text.split("\n\n")
        )


class Parser(argparse.ArgumentParser):
    """A parser that raises ``UsageError``, which names the help of the command that was wrong."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)  # scripts outlive abbreviations
        options.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **options)
        self._positionals.title = "arguments"
        self._optionals.title = "options"  # what Python 3.10 and newer call it

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, as argparse finds it."""
        raise UsageError(message, self.prog)

    def format_help(self) -> str:
        """Return the help, as wide as the terminal.

        argparse makes a formatter for each argument that is added, too. None of these needs to
        know the width, which takes ``shutil``, and with it the libraries of three compressions.
        """
        import shutil

        width = shutil.get_terminal_size().columns - 2
        self.formatter_class = functools.partial(_Formatter, width=width)
        return super().format_help()


def size(text: str) -> int:
    """Read a size, as the ``type`` of an argument."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive_size(text: str) -> int:
    limit = size(text)
    if not limit:
        raise argparse.ArgumentTypeError("0 bytes hold no change: give at least one")
    return limit


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


def _role(text: str) -> Role:
    try:
        return Role.parse(text)
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


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return seconds


def _speed(text: str) -> float | None:
    if text == "asap":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0
    if not 0 < speed <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor asap")
    return speed


def _queues(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 8")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def _segments(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 4096")
    return int(text)


def _sector_size(text: str) -> int:
    if text not in ("512", "1024", "2048", "4096"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 512, 1024, 2048 or 4096")
    return int(text)


def _add_backend_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--path",
        type=_name,
        metavar="PATH",
        help="an image, a block device, nbd://SERVER/EXPORT, rbd:POOL/IMAGE, at:TRACE@MOMENT, or a "
        "Python file that defines a disk, or is a plugin for nbdkit, whose settings follow as "
        "KEY=VALUE",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="discard, raw, mmap, cow, overlay, vhd, FILE.py, package.module:Class, or one that "
        "another package installs (default: overlay with --overlay, else cow with --path, else "
        "discard)",
    )
    parser.add_argument(
        "--overlay",
        type=_name,
        metavar="PATH",
        help="keep the changes in this file, which is created if it does not exist; the image is "
        "not changed (default for --path: the image that the overlay was made for). If the name "
        "ends in .vhd, it is a differencing VHD, which other programs read",
    )
    parser.add_argument(
        "--size", type=size, help="size of a discard disk: bytes, or 10M, 1G, 2T (default: 1G)"
    )
    parser.add_argument("--read-only", action="store_true", help="refuse all writes")


def _add_option_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend's own; may be given several times. KEY=VALUE alone is the "
        "same",
    )


def _add_disk_arguments(parser: Parser) -> argparse._ArgumentGroup:
    disk = parser.add_argument_group("the disk")
    disk.add_argument(
        "--format",
        choices=("raw", "vhd", *QEMU_FORMATS),
        help="what the image is: raw, the bytes of the disk, or a VHD or one of QEMU's formats, in "
        "which writes stay (default: raw)",
    )
    disk.add_argument(
        "--cow-limit",
        type=_positive_size,
        metavar="SIZE",
        help="how much the changes of a cow disk may take of this host's memory (default: half of "
        "what is free), or those of an overlay of its file system (default: all)",
    )
    disk.add_argument(
        "--sector-size",
        type=_sector_size,
        metavar="BYTES",
        help="logical sector size, 512 to 4096 (default: the block device's own; for a file 512)",
    )
    _add_option_argument(disk)
    disk.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="change how the disk behaves: delay, error, rate, log and others, or FILE.py; may be "
        "given several times, the first next to the image",
    )
    disk.add_argument(
        "--force",
        action="store_true",
        help="use the image even if something else does (another disk, a mount, a loop device, "
        "QEMU); this destroys data unless they all only read",
    )
    return disk


def _add_disk_of_a_guest(parser: Parser) -> None:
    parser.add_argument("vm", metavar="VM", help="the guest's domain id, UUID or name")
    parser.add_argument("vdev", metavar="VDEV", help="the disk's name in the guest, such as xvdb")


def _add_overlay_argument(parser: Parser) -> None:
    parser.add_argument(
        "overlay",
        metavar="OVERLAY",
        type=_name,
        help="a file made by connect --overlay; or a VHD (*.vhd)",
    )


def _add_image_argument(parser: Parser) -> None:
    parser.add_argument(
        "--path",
        type=_name,
        metavar="IMAGE",
        help="the image that the overlay was made for (default: the one that it names, which is "
        "followed only if nobody but root and you can have written the overlay)",
    )


def _add_result_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", "-q", action="store_true", help="show no progress")


def _add_overlay_commands(commands: Commands) -> None:
    info = commands.add_parser(
        "info",
        help="say what an image, an overlay, a VHD or another disk is",
        description="Print the format, size and allocated space of SOURCE and of what lies below "
        "it: an overlay's image, a VHD's parents, a qcow2's backing files. Of an overlay, whether "
        "its image is as it was, and what differs. Then what connect would give a guest: the size, "
        "the sectors, discard, with the filters. "
        "Locks and changes nothing; a disk may be using SOURCE.",
    )
    info.add_argument(
        "source",
        metavar="SOURCE",
        help="an image, a block device, an overlay, an address such as nbd://HOST/EXPORT, or a "
        "Python file",
    )
    _add_option_argument(info)
    info.add_argument(
        "--format",
        choices=("raw", "vhd", "overlay", *QEMU_FORMATS),
        help="what SOURCE is (default: vhd if its name ends in .vhd, overlay if it begins like "
        "one, else raw)",
    )
    info.add_argument(
        "--backend",
        choices=("cow", "raw", "mmap"),
        help="how connect would serve a raw image (default: cow)",
    )
    info.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="a filter over SOURCE, as in connect; the first is next to it",
    )
    info.add_argument("--json", action="store_true", help="print JSON")

    diff = commands.add_parser(
        "diff",
        help="list what an overlay has changed",
        description="Print a line for each extent that OVERLAY holds instead of its image: its "
        "offset on the disk and its length, in bytes. Changes nothing. While a disk uses the "
        "overlay, the list may be out of date as soon as it is printed.",
    )
    _add_overlay_argument(diff)
    diff.add_argument("--json", action="store_true", help="print JSON")

    commit = commands.add_parser(
        "commit",
        help="write an overlay's changes into its image",
        description="Write the changes in OVERLAY into its image, all or none of them, and remove "
        "OVERLAY. The command makes a complete new image next to the old one and then puts it in "
        "its place, so the directory needs room for both. Nobody may use either file meanwhile. "
        "Other overlays of the same image do not fit the new image. The changes in a VHD (OVERLAY "
        "ends in .vhd) are written into its parent in place. Until that is complete OVERLAY reads "
        "as before; after an interruption, run the command again. Other children of the parent "
        "do not fit it any more.",
    )
    _add_overlay_argument(commit)
    _add_vhd_argument(commit)
    _add_image_argument(commit)
    commit.add_argument(
        "--keep", action="store_true", help="leave an empty overlay of the new image behind"
    )
    _add_result_arguments(commit)

    rebase = commands.add_parser(
        "rebase",
        help="have an overlay lie over another image of the same content",
        description="Have OVERLAY lie over IMAGE from now on: a copy of its image, or its image "
        "itself after it was moved, restored or touched. If the old image is still there as it "
        "was, both are compared, except where OVERLAY has changes. If it is not, only you can know "
        "that the content is the same: then say --force. A wrong image gives the guest a mixture "
        "of two disks.",
    )
    _add_overlay_argument(rebase)
    rebase.add_argument("image", metavar="IMAGE", help="the image, of the same size")
    rebase.add_argument(
        "--force", action="store_true", help="do not compare: the content is what it was"
    )
    _add_result_arguments(rebase)

    export = commands.add_parser(
        "export",
        help="make a new image of any disk",
        description="Make NEW, a sparse image of what a guest would read from SOURCE: an overlay "
        "and its image, a VHD and its parents, any other image or disk that connect takes as "
        "--path, with filters over it. They are not changed. A guest may be using an overlay or a "
        "VHD meanwhile; NEW is the disk as it was at one instant. Only the owner can read NEW "
        "(mode 0600).",
    )
    export.add_argument(
        "overlay",
        metavar="SOURCE",
        type=_name,
        help="a file made by connect --overlay, a VHD, another image, or an address such as "
        "nbd://HOST/EXPORT",
    )
    export.add_argument("new", metavar="NEW", type=_name, help="the image to make")
    export.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of SOURCE, as in connect; of a VHD: parents=DIR[:DIR], directories where "
        "its parents may be, besides the one that it is in",
    )
    _add_image_argument(export)
    export.add_argument(
        "--format",
        choices=("overlay", "vhd", "raw", *QEMU_FORMATS),
        help="what SOURCE is (default: vhd if its name ends in .vhd, else overlay)",
    )
    export.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="a filter over SOURCE, as in connect; the first is next to it",
    )
    export.add_argument(
        "--output-format",
        choices=("raw", "vhd", "qcow2", "vhdx", "vdi"),
        default="raw",
        help="what NEW is to be; others than raw need room for a raw image meanwhile; qcow2, vhdx "
        "and vdi are made by qemu-img, which must be installed (default: raw)",
    )
    export.add_argument("--force", action="store_true", help="replace NEW if it exists")
    _add_result_arguments(export)


def _add_trace_commands(commands: Commands) -> None:
    trace = commands.add_parser(
        "trace",
        help="show what a guest asked of its disk",
        description="Print the requests in FILE, made by record or --filter record:file=FILE, in "
        "the order in which the storage completed them; or, with --summary, statistics. Of a trace "
        "that is cut off or damaged, what comes before that is shown, and the exit status is 1. "
        "Changes nothing; the disk may still be recorded.",
    )
    trace.add_argument("trace", metavar="FILE", type=_name, help="the trace")
    trace.add_argument("--json", action="store_true", help="print a JSON object for each request")
    form = trace.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    form.add_argument(
        "--summary",
        action="store_true",
        help="print sizes, latency, working set, reuse, flushes and the most used ranges",
    )
    form.add_argument(
        "--fio",
        action="store_true",
        help="print what fio --read_iolog replays, from fio 3.31 on",
    )
    form.add_argument("--blkparse", action="store_true", help="print what blkparse prints")
    trace.add_argument(
        "--fio-path",
        metavar="PATH",
        help="the file or device that fio is to use (default: /dev/xvda, in a guest)",
    )

    plot = commands.add_parser(
        "plot",
        help="draw what a guest asked of its disk",
        description="Draw the requests in FILE, a trace: their offsets over time, their latency, "
        "requests and bytes a second, and their sizes. Without -o on the terminal; with it as a "
        "picture, which needs matplotlib.",
    )
    plot.add_argument("trace", metavar="FILE", type=_name, help="the trace")
    plot.add_argument(
        "-o",
        "--output",
        metavar="NEW",
        type=_name,
        help="the picture to make: its name ends in .svg, .png or .html",
    )
    plot.add_argument("--title", help="the title of the picture (default: the name of FILE)")
    plot.add_argument("--force", action="store_true", help="replace NEW if it exists")

    replay = commands.add_parser(
        "replay",
        help="issue the requests of a trace again, to any disk",
        description="Issue the requests in FILE, a trace, to any disk: at the recorded times, or "
        "as fast as possible, with as many in flight at once as in the recording. Then print "
        "how they ended and how long they took, next to the recorded figures. The exit status is "
        "1 if a request fails that succeeded in the recording, or if --compare finds a difference.",
    )
    replay.add_argument("trace", metavar="FILE", type=_name, help="the trace")
    _add_backend_arguments(replay)
    replay.add_argument(
        "--speed",
        type=_speed,
        default=1.0,
        metavar="N",
        help="N times as fast as recorded; asap: as fast as possible (default: 1)",
    )
    replay.add_argument(
        "--compare",
        action="store_true",
        help="compare what is read with what the trace, made with data=yes, wrote there before",
    )
    replay.add_argument(
        "--overwrite", action="store_true", help="allow writes to a disk that keeps them"
    )
    _add_result_arguments(replay)
    _add_disk_arguments(replay)


def _add_vhd_argument(parser: Parser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="parents=DIR[:DIR]",
        help="directories where a VHD's parents may be, besides the one that it is in",
    )


def _add_image_commands(commands: Commands) -> None:
    create = commands.add_parser(
        "create",
        help="make an empty VHD, or one that holds the changes to another image",
        description="Make FILE, a VHD: an empty one of --size, or a differencing one, which holds "
        "the changes to --parent; with both, one that is larger than its parent. Only the owner "
        "can read FILE (mode 0600).",
    )
    create.add_argument("file", metavar="FILE", type=_name, help="the image to make")
    create.add_argument("--size", type=size, help="size of the disk: bytes, or 512M, 10G, 2T")
    create.add_argument(
        "--parent", metavar="IMAGE", type=_name, help="the image whose changes FILE is to hold"
    )
    create.add_argument(
        "--max-size", type=size, metavar="SIZE", help="how large resize may make the disk later"
    )
    create.add_argument(
        "--format", choices=("vhd",), default="vhd", help="what to make (default: vhd)"
    )
    create.add_argument(
        "--fixed",
        action="store_true",
        help="a fixed VHD, as large as the disk from the start (default: dynamic, which grows)",
    )
    create.add_argument(
        "--parent-format", choices=("vhd", "raw"), help="what the parent is (default: vhd)"
    )
    _add_vhd_argument(create)
    create.add_argument("--json", action="store_true", help="print the result as JSON")

    check = commands.add_parser(
        "check",
        help="say what is wrong with a VHD",
        description="Check the structures of FILE and of its parents, and print a line for each "
        "thing that is wrong: an error if FILE cannot be used or programs read different things "
        "in it, a warning if only some program complains. The exit status is 1 if there are "
        "errors. Changes nothing. No disk may be writing to FILE meanwhile.",
    )
    check.add_argument("file", metavar="FILE", type=_name, help="a VHD")
    check.add_argument(
        "--format", choices=("vhd",), default="vhd", help="what FILE is (default: vhd)"
    )
    _add_vhd_argument(check)
    check.add_argument("--json", action="store_true", help="print JSON")


def _add_rewind_commands(commands: Commands) -> None:
    rewind = commands.add_parser(
        "rewind",
        help="make an image of a recorded disk as it was at a moment",
        description="Make a sparse image, or an overlay, of a disk as it was at a moment of TRACE, "
        "made by record --data or --filter record:file=TRACE,data=yes. This takes the image as it "
        "was when recording began, too. Neither TRACE nor that image is changed; the disk may "
        "still be recorded. Only the owner can read what is made (mode 0600).",
    )
    _add_trace_arguments(rewind)
    rewind.add_argument(
        "--at",
        required=True,
        metavar="MOMENT",
        help="flush:N, when the Nth flush was over (0: as recording began); request:N, when that "
        "request was over; seconds since the recording began (12.5s), or a time of the clock "
        "(2026-11-28T07:30:00, or with Z or +02:00); end",
    )
    rewind.add_argument(
        "-o", "--output", dest="new", metavar="NEW", type=_name, help="the image to make"
    )
    rewind.add_argument(
        "--overlay",
        metavar="OVERLAY",
        type=_name,
        help="make an overlay of the base instead, which holds only what differs",
    )
    _add_result_arguments(rewind)


def _add_crashtest(commands: Commands) -> None:
    crashtest = commands.add_parser(
        "crashtest",
        help="try what a power cut could have left of a recorded disk",
        description="Run a command on states of a disk that a power cut could have left, made of "
        "TRACE, made by record --data or --filter record:file=TRACE,data=yes, and of the image as "
        "it was when recording began. A state has all that was flushed, and of the later writes "
        "none, some, or parts. The first state for which the command fails is printed, with the "
        "smallest set of those writes for which it does, and the exit status is 1. The command may "
        "write to its image, which is a copy.",
        epilog="  xen-disk crashtest disk.xdt --base before.raw --check 'e2fsck -fn {}'",
    )
    _add_trace_arguments(crashtest)
    crashtest.add_argument(
        "--check",
        required=True,
        metavar="COMMAND",
        help="a shell command; {} becomes the path of a raw image. Status 0: the state is good. "
        "The environment has XEN_DISK_STATE, XEN_DISK_FLUSH (how many had succeeded), and in "
        "seconds since 1970 XEN_DISK_TIME (of that flush) and XEN_DISK_UNTIL: what a guest was "
        "told before that has to be there (empty: to the end)",
    )
    crashtest.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="try N states at most (default: 1000)",
    )
    crashtest.add_argument(
        "--seed",
        type=_count,
        metavar="N",
        help="another N tries other states (default: 0)",
    )
    crashtest.add_argument(
        "--from",
        dest="since",
        metavar="MOMENT",
        help="only power cuts after flush:N, or after a time as for rewind --at: when the guest "
        "had made its file system, say",
    )
    crashtest.add_argument(
        "--state",
        metavar="STATE",
        help="try only this one: FLUSH.NUMBER, as it was printed, or FLUSH:REQUEST,REQUEST/0-3, "
        "after that flush only these requests, of the last its sectors 0 to 3",
    )
    crashtest.add_argument(
        "--jobs",
        "-j",
        type=_positive,
        metavar="N",
        help="run N checks at a time (default: one for each CPU)",
    )
    crashtest.add_argument(
        "--reduce",
        type=_count,
        metavar="N",
        help="run at most N checks to find the smallest part of a state that still fails; 0: do "
        "not look for it (default: 200)",
    )
    crashtest.add_argument(
        "--timeout",
        type=_some_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a check may take; one that takes longer has failed (default: 60)",
    )
    crashtest.add_argument(
        "--directory",
        metavar="DIRECTORY",
        type=_name,
        help="where the images are made, two for each job; on Btrfs or XFS next to the base they "
        "are clones, which take space for what differs (default: the system's temporary directory)",
    )
    crashtest.add_argument(
        "--keep",
        action="store_true",
        help="leave the image of the state that failed, or of --state",
    )
    _add_result_arguments(crashtest)


def _add_trace_arguments(parser: Parser) -> None:
    parser.add_argument("trace", metavar="TRACE", type=_name, help="a trace with data")
    parser.add_argument(
        "--base",
        metavar="IMAGE",
        type=_name,
        help="the disk as it was when recording began: a raw image or block device (default: the "
        "image that TRACE names, which is followed only if nobody but root and you can have "
        "written TRACE); it is compared with samples in TRACE",
    )


def _add_connect(commands: Commands) -> None:
    connect = commands.add_parser(
        "connect",
        help="give a guest a disk and serve it until Ctrl-C",
        usage="%(prog)s [OPTIONS] VM\n       %(prog)s --adopt [OPTIONS] VM VDEV",
        description="Give the running guest VM a disk and serve it until Ctrl-C. The guest sees "
        "the disk appear as /dev/xvdb or the like. Ctrl-C asks the guest to release the disk; a "
        "second Ctrl-C does not wait for the guest. SIGTERM acts like Ctrl-C. So does SIGHUP if "
        "stdin or stderr is a terminal; otherwise SIGHUP gives the disk the current size of its "
        "image, unless that is smaller." + _EXAMPLES,
    )
    connect.add_argument("vm", metavar="VM", help="the guest's domain id, UUID or name")
    connect.add_argument(
        "device", metavar="VDEV", nargs="?", help="with --adopt: the disk's name, such as xvdb"
    )
    _add_backend_arguments(connect)
    connect.add_argument(
        "--vdev",
        metavar="DEV",
        help="the disk's name in the guest, such as xvdc (default: the first free one)",
    )
    connect.add_argument(
        "--user",
        metavar="NAME[:GROUP]",
        help="serve the disk as this user, without any privilege, once everything is open",
    )
    connect.add_argument(
        "--supervise",
        action="store_true",
        help="if the process that serves the disk dies or hangs, start another that takes over: "
        "the guest sees a pause, no error. A cow disk then keeps its changes in /dev/shm",
    )
    connect.add_argument("--json", action="store_true", help="describe the disk as JSON")
    connect.add_argument("--quiet", "-q", action="store_true", help="no status line, no totals")

    disk = _add_disk_arguments(connect)
    disk.add_argument(
        "--cdrom",
        action="store_true",
        help="a CD-ROM, which is read-only; Linux accepts one in PV guests only",
    )

    disk.add_argument(
        "--no-discard",
        action="store_true",
        help="do not offer discard (TRIM): the image keeps the space that the guest frees",
    )

    failure = connect.add_argument_group("when something fails")
    failure.add_argument(
        "--on-error",
        choices=("report", "hold"),
        default="report",
        help="when the storage fails: report an I/O error to the guest, or hold the request and "
        "retry until it succeeds, while the guest waits (default: report)",
    )
    failure.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the guest may take to connect (default: 30)",
    )
    failure.add_argument(
        "--watchdog",
        type=_seconds,
        default=60,
        metavar="SECONDS",
        help="with --supervise: replace a process that gives no sign of life, or works on one "
        "request, for this long; 0: never (default: 60)",
    )
    failure.add_argument(
        "--adopt",
        action="store_true",
        help="take over disk VDEV of a process that died, with that process's options",
    )
    failure.add_argument(
        "--recover",
        action="store_true",
        help="for services: take over the disk --vdev if the process that served it died, else "
        "connect a new one; after an error of its own, leave the disk for the next process",
    )

    performance = connect.add_argument_group("performance")
    performance.add_argument(
        "--queues",
        type=_queues,
        default=1,
        metavar="N",
        help="offer N queues, 1 to 8; fewer if the backend allows fewer threads (default: 1)",
    )
    performance.add_argument(
        "--queues-in",
        choices=("threads", "processes"),
        default="threads",
        help="serve all queues in one thread, or each in a process of its own: on a host with "
        "processors to spare, faster for a guest that does many small requests on several queues; "
        "raw and mmap only (default: threads)",
    )
    performance.add_argument(
        "--grants",
        choices=("auto", "copy", "map"),
        default="auto",
        help="how to access the guest's pages: copy, map for each request, or auto: persistent "
        "grants if the guest offers them, else copy, else map (default: auto)",
    )
    performance.add_argument(
        "--persistent-grants",
        type=_count,
        default=8224,
        metavar="N",
        help="keep at most N pages of the guest mapped (default: 8224)",
    )
    performance.add_argument(
        "--indirect-segments",
        type=_segments,
        default=256,
        metavar="N",
        help="offer requests of up to N pages of 4 KiB, at most 4096; 0: no indirect requests "
        "(default: 256)",
    )
    performance.add_argument(
        "--latency",
        choices=("on", "off"),
        default="on",
        help="measure how long requests take, for `top` and `metrics` (default: on)",
    )
    # No help: it is for processes that we start ourselves.
    connect.add_argument(ROLE, type=_role, default=Role(), help=argparse.SUPPRESS)


_EXAMPLES = """

  xen-disk connect myvm --path disk.raw                 throw the changes away
  xen-disk connect myvm --path disk.raw --backend raw   write them to disk.raw
  xen-disk connect myvm --path gold.raw --overlay web.changes --supervise"""


def _add_disconnect(commands: Commands) -> None:
    disconnect = commands.add_parser(
        "disconnect",
        help="take a disk away from a guest",
        description="Take a disk away from a guest and wait until it is gone. This also cleans up "
        "after a process that was killed. From an HVM guest on Xen before 4.19, xl block-detach "
        "cannot take it.",
    )
    _add_disk_of_a_guest(disconnect)
    disconnect.add_argument(
        "--force", action="store_true", help="even if the guest still uses the disk"
    )
    disconnect.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the guest may take to release the disk; with --force, the process that "
        "serves it to end (default: 30)",
    )


def _add_resize(commands: Commands) -> None:
    resize = commands.add_parser(
        "resize",
        help="change the size of a disk while the guest uses it",
        description="Change the size of a disk while the guest uses it: to SIZE, or, without SIZE, "
        "to the current size of its image. With SIZE, the image file of a raw or mmap disk is "
        "made that long. A cow disk keeps its size. SIGHUP to the process that serves the disk "
        "does the same as this command without SIZE, unless that process has a terminal.",
    )
    _add_disk_of_a_guest(resize)
    resize.add_argument(
        "size", metavar="SIZE", nargs="?", type=size, help="bytes, or 512M, 10G, 2T"
    )
    resize.add_argument(
        "--force", action="store_true", help="allow a smaller size: the data beyond it is lost"
    )
    resize.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long the process that serves the disk may take (default: 30)",
    )
    resize.add_argument("--json", action="store_true", help="print the new size as JSON")


def _add_filter(commands: Commands) -> None:
    changing = commands.add_parser(
        "filter",
        help="show or change the filters of a disk while the guest uses it",
        description="Show or change the filters of a disk while the guest uses it. list: "
        "print the filters, the first next to the image, with their settings and counters. set: "
        "change settings; if one is wrong, none is changed. arm, disarm: have the error filter "
        "start or stop failing requests. cut: have the powercut filter cut the power. A process "
        "that takes the disk over has the same settings.\n\n"
        "  xen-disk filter myvm xvdb set delay read=50ms write=50ms",
    )
    _add_disk_of_a_guest(changing)
    changing.add_argument(
        "action",
        metavar="ACTION",
        choices=("list", "set", "arm", "disarm", "cut"),
        help="list, set, arm, disarm or cut",
    )
    changing.add_argument(
        "filter", metavar="FILTER", nargs="?", help="a filter's name, or its number in the list"
    )
    changing.add_argument(
        "settings",
        metavar="KEY=VALUE",
        nargs="*",
        help="with set: a setting, as in --filter NAME:KEY=VALUE",
    )
    changing.add_argument("--json", action="store_true", help="print the filters as JSON")


def _add_record(commands: Commands) -> None:
    record = commands.add_parser(
        "record",
        help="record what a guest asks of its disk",
        description="Start or stop recording the requests to a disk that is in use, or print "
        "whether they are recorded. The guest notices nothing. A process that takes the disk "
        "over continues the recording.",
    )
    _add_disk_of_a_guest(record)
    record.add_argument(
        "action",
        metavar="ACTION",
        choices=("start", "stop", "status"),
        help="start, stop or status",
    )
    record.add_argument(
        "file", metavar="FILE", nargs="?", type=_name, help="with start: the trace to make"
    )
    record.add_argument("--data", action="store_true", help="also record what is written")
    record.add_argument(
        "--ring",
        type=size,
        metavar="SIZE",
        help="keep only the newest part of the trace, of this size (at least 64M)",
    )
    record.add_argument("--json", action="store_true", help="print JSON")


def _add_list_and_top(commands: Commands) -> None:
    listing = commands.add_parser(
        "list",
        help="list the disks that are served",
        description="List the disks that processes on this host serve: a line for each. A disk "
        "whose process has died is an `orphan` if `connect --adopt` can take it over, else `dead`.",
    )
    listing.add_argument("vm", metavar="VM", nargs="?", help="only the disks of this guest")
    listing.add_argument("--json", action="store_true", help="print JSON, with all counters")

    top = commands.add_parser(
        "top",
        help="show what all disks of this host do, refreshed in place",
        description="Show for each disk that this host serves how many requests and bytes it does "
        "a second, how long requests take (from when they are taken off the ring until their "
        "answer is published), how many there are on average (DEPTH) and now (FLIGHT), and its "
        "errors. On a terminal the table is refreshed in place, in colours if Rich is installed: "
        "q ends it, < and > sort by another column. "
        "Elsewhere each interval is printed below the last. Reads the records of the processes, "
        "which takes root; locks and changes nothing.",
    )
    top.add_argument("vm", metavar="VM", nargs="?", help="only the disks of this guest")
    top.add_argument(
        "--interval",
        type=_seconds,
        default=1,
        metavar="SECONDS",
        help="how long to measure until the next refresh (default: 1)",
    )
    top.add_argument(
        "--sort",
        choices=("guest", "iops", "mbs", "p99", "depth", "inflight", "errors", "memory"),
        default="guest",
        help="by guest, or the most first (default: guest)",
    )
    top.add_argument(
        "--once", action="store_true", help="measure for one interval, print that, and end"
    )
    top.add_argument(
        "--json",
        action="store_true",
        help="print JSON: a list of disks for each interval, on one line unless --once",
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDR:PORT, such as 127.0.0.1:9808")
    return host.strip("[]") or "127.0.0.1", int(port)


def _add_metrics(commands: Commands) -> None:
    metrics = commands.add_parser(
        "metrics",
        help="print what all disks of this host have done, for Prometheus",
        description="Print counters and histograms of latency of each disk that this host serves "
        "in Prometheus' text format, write them to a file, or serve them by HTTP. Reads the "
        "records of the processes, which takes root; locks and changes nothing. Needs "
        "prometheus_client.",
    )
    where = metrics.add_mutually_exclusive_group()
    where.add_argument(
        "-o",
        "--output",
        type=_name,
        metavar="FILE",
        help="replace FILE at once, for node_exporter's textfile collector, which reads *.prom",
    )
    where.add_argument(
        "--listen",
        type=_address,
        metavar="ADDR:PORT",
        help="serve them by HTTP until Ctrl-C; without ADDR on 127.0.0.1, where every user of "
        "this host can read them",
    )


def _add_upgrade(commands: Commands) -> None:
    upgrade = commands.add_parser(
        "upgrade",
        help="serve a disk with the installed version of this program",
        description="Have the process that serves a disk become the installed version of this "
        "program, after `pip install --upgrade`, say, while the guest uses the disk. The guest "
        "sees a pause of some tenths of a second. The command first checks that the installed "
        "version starts; if it does not, the old one continues.",
    )
    _add_disk_of_a_guest(upgrade)
    upgrade.add_argument(
        "--timeout",
        type=_seconds,
        default=60,
        metavar="SECONDS",
        help="how long it may take (default: 60)",
    )
    upgrade.add_argument("--json", action="store_true", help="describe the disk as JSON")


def _arguments_of(parser: argparse.ArgumentParser) -> list[str]:
    """Name a command's arguments that are not options, as a usage line does."""
    forms = {"?": "[{}]", "*": "[{}...]"}
    return [
        forms.get(str(action.nargs), "{}").format(action.metavar)
        for action in parser._actions
        if not action.option_strings
    ]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """Return the parsers of a parser's commands, by name, in the order of the help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _add_serve(commands: Commands) -> None:
    commands.add_parser(
        "serve",
        help="serve the disks in xl's guest configurations",
        description="Wait for disks that a guest's configuration or `xl block-attach` asks for "
        "with backendtype=tap,script=block-xen-disk, and start a process for each. Ctrl-C ends "
        "the waiting, not the disks. Needs Xen 4.19 or newer, and what `xen-disk install` "
        "installs.",
    )


def _add_install(commands: Commands) -> None:
    install = commands.add_parser(
        "install",
        help="install the services, the man page and completion",
        description="Install the files that other programs look for at fixed places: the hotplug "
        "script of `serve` in /etc/xen/scripts, the services xen-disk-serve and xen-disk@ in "
        "/etc/systemd/system, completion for bash, zsh and fish, and the man page. All of them "
        "are installed, or none.",
    )
    install.add_argument(
        "--prefix", default="/", metavar="DIRECTORY", help="the system's root (default: /)"
    )
    install.add_argument("--remove", action="store_true", help="remove these files again")
    install.add_argument(
        "--force", action="store_true", help="also replace or remove files that differ"
    )


def _add_what_serve_starts(commands: Commands) -> None:
    # no help: they are what serve starts, not for people
    commands.add_parser("fork-server")
    adopt = commands.add_parser("adopt")
    adopt.add_argument("domid", type=int)
    adopt.add_argument("devid", type=int)


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check whether this host can serve disks",
        description="Check what this host needs to serve disks, and say how to get what is "
        "missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="try a disk without Xen: another process plays the guest",
        usage="%(prog)s [OPTIONS]",
        description="Try a disk without Xen and without root. Another process plays the guest: it "
        "writes and reads the disk, checks what it reads, and measures how fast that is.",
    )
    _add_backend_arguments(demo)
    demo.add_argument(
        "--bytes",
        type=size,
        default=64 << 20,
        metavar="SIZE",
        help="how much to write and read (default: 64M)",
    )
    demo.add_argument(
        "--overwrite",
        action="store_true",
        help="allow the demo to overwrite the disk: an image, an existing overlay, or wherever a "
        "disk of your own keeps its data; otherwise it only reads them",
    )
    demo.add_argument(
        "--seconds",
        type=_seconds,
        default=10,
        metavar="SECONDS",
        help="how long each phase may take, about (default: 10)",
    )
    demo.add_argument("--json", action="store_true", help="print the results as JSON")
    demo.add_argument("--guest", help=argparse.SUPPRESS)  # for the process that plays the guest
    _add_disk_arguments(demo)


def _add_nbdkit_plugin(commands: Commands) -> None:
    commands.add_parser(
        "nbdkit-plugin",
        help="print the path of the plugin by which nbdkit serves any of these disks",
        description="Print the path of a plugin for nbdkit's Python, with which nbdkit serves over "
        "NBD any disk that connect can give to a guest. Its parameters are the options of connect "
        "that choose the disk, without --, and read-only=yes.\n\n"
        '  nbdkit python "$(xen-disk nbdkit-plugin)" path=disk.vhd format=vhd',
    )


def _add_help(commands: Commands) -> None:
    asked = commands.add_parser(
        "help", help="describe a command", description="Describe a command and its options."
    )
    asked.add_argument("about", metavar="COMMAND", nargs="?", help="the command (default: all)")


_COMMANDS = {  # in the order of the help
    ("connect",): _add_connect,
    ("list", "top"): _add_list_and_top,
    ("metrics",): _add_metrics,
    ("disconnect",): _add_disconnect,
    ("resize",): _add_resize,
    ("filter",): _add_filter,
    ("upgrade",): _add_upgrade,
    ("info", "diff", "commit", "rebase", "export"): _add_overlay_commands,
    ("create", "check"): _add_image_commands,
    ("record",): _add_record,
    ("trace", "plot", "replay"): _add_trace_commands,
    ("rewind",): _add_rewind_commands,
    ("crashtest",): _add_crashtest,
    ("serve",): _add_serve,
    ("install",): _add_install,
    ("fork-server", "adopt"): _add_what_serve_starts,
    ("doctor",): _add_doctor,
    ("demo",): _add_demo,
    ("nbdkit-plugin",): _add_nbdkit_plugin,
    ("help",): _add_help,
}


@functools.cache
def build_parser(command: str | None = None) -> Parser:
    """Build the parser of the whole command line, or all that one of its commands needs.

    Args:
        command: there may be no other commands if there is one of this name. All of them take
            10 ms, a tenth of what it takes to connect a disk.
    """
    alone = any(command in names for names in _COMMANDS)
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s COMMAND [OPTIONS]",
        description="Give a running Xen guest a disk, and serve that disk from this process.",
        epilog="`xen-disk help COMMAND` describes a command. Start with `xen-disk demo`, which "
        "needs no Xen, or `xen-disk doctor`, which checks this host.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", prog=PROGRAM
    )
    for names, add in _COMMANDS.items():
        if command in names or not alone:
            add(commands)

    for name, each in (("", parser), *commands.choices.items()):
        if each.usage is None and name not in ("adopt", "fork-server"):
            each.usage = " ".join(["%(prog)s [OPTIONS]", *_arguments_of(each)])
        each.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # it may stand before the command's name or after it
            help="log everything, and show tracebacks",
        )
    return parser
