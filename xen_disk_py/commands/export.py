"""``export``: make a new image of what a guest would read of any disk."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing

from ..backends import Backend, qemu_img
from ..backends.exporting import Convert, Progress, export_disk
from ..backends.finding import QEMU_FORMATS, choose, is_file
from ..backends.loader import open_backend
from ..backends.overlay import maintenance
from ..backends.overlay.file import image_path
from ..backends.signatures import recognise
from ..backends.vhd.backend import directories_from
from ..backends.vhd.create import convert as convert_to_vhd
from ..backends.vhd.export import export as export_vhd
from ..errors import ImageError, UsageError
from ..exit_status import ExitStatus
from ..recovery.export_in_use import keeper
from ..units import format_size
from .backend_arguments import is_vhd
from .environment import Environment
from .orphaned import not_of_orphans
from .progress import ProgressLine
from .signals import interruptible


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Export, and say what was made."""
    with ProgressLine(env, "copying the image", quiet=args.quiet) as progress, interruptible():
        notes: list[str] = []
        convert, check = _converter(args.output_format, progress), not_of_orphans(env)
        if args.filter or args.format in QEMU_FORMATS or not _is_image(args.overlay):
            if _is_image(args.overlay) and args.format is None and not is_vhd(args.overlay):
                _refuse_other_formats(args.overlay)
            with closing(_open(args)) as disk:
                notes = list(disk.notes)
                env.tell_all(notes)
                if is_file(args.overlay):
                    check(args.overlay, False)
                size = export_disk(
                    disk, args.new, force=args.force, progress=progress, convert=convert
                )
        elif args.format == "raw":
            if args.path is not None or args.option:
                raise UsageError("--path and --option are not for a raw image: leave them out")
            size = maintenance.export_image(
                args.overlay,
                args.new,
                force=args.force,
                progress=progress,
                convert=convert,
                check=check,
            )
        elif args.format == "vhd" or (args.format is None and is_vhd(args.overlay)):
            if args.path is not None:
                raise UsageError("--path is not for a VHD, which finds its parent itself")
            directories = directories_from(args.option)
            size = export_vhd(
                args.overlay,
                args.new,
                force=args.force,
                directories=directories,
                progress=progress,
                convert=convert,
                check=check,
                keep=keeper(env.record_directory),
            )
        elif args.option:
            raise UsageError("--option is for a VHD: leave it out")
        else:
            _refuse_other_formats(args.overlay)
            size = maintenance.export(
                args.overlay,
                args.new,
                force=args.force,
                progress=progress,
                path=args.path,
                convert=convert,
                check=check,
                keep=keeper(env.record_directory),
            )
    path = os.path.abspath(args.new)
    if args.json:
        env.say(
            json.dumps({"path": path, "size": size, "format": args.output_format, "notes": notes})
        )
    else:
        env.say(f"{path} {format_size(size)}")
    return ExitStatus.OK


def _is_image(source: str) -> bool:
    """Tell whether it is a file that we read ourselves: no server's disk, nor a program."""
    return is_file(source) and choose(None, source) == "cow"


def _refuse_other_formats(source: str) -> None:
    """Name the option for what is no overlay; never read it by its content."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # of a FIFO, nobody waits
    except OSError:
        return  # whoever opens it says why
    try:
        looks = recognise(fd, source, os.fstat(fd).st_size)
    except OSError:
        return
    finally:
        os.close(fd)
    if looks is None:
        raise ImageError(f"{source}: not an overlay: if it is a raw image, add --format raw")
    if not looks.is_overlay:
        form = "vhd" if looks.option is not None else looks.name.split()[-1].lower()
        if form == "vhd" or form in QEMU_FORMATS:
            raise UsageError(f"{source}: looks like {looks.name}: if it is, add --format {form}")


def _open(args: argparse.Namespace) -> Backend:
    """Open the disk that SOURCE is, with its filters, for reading only."""
    source, form = args.overlay, args.format
    options: dict[str, object] = {"path": source, "read_only": True}
    backend = None
    if form in QEMU_FORMATS:
        backend, options["format"] = "qemu", form
    elif form == "vhd" or (form is None and is_vhd(source)):
        backend = "vhd"
    elif form == "raw":
        backend = "raw"
    elif form == "overlay" or _is_image(source):
        backend, options["overlay"] = "overlay", source
        options["path"] = args.path if args.path is not None else image_path(source)
    elif args.path is not None:
        raise UsageError("--path is for an overlay: leave it out")
    return open_backend(backend, options, args.filter, pairs=args.option)


def _converter(output_format: str, progress: Progress) -> Convert | None:
    """Return what makes the new image of a raw one; None: that is the new image."""
    if output_format == "raw":
        return None
    if output_format == "vhd":
        return lambda raw, made: convert_to_vhd(raw, made, progress)
    qemu_img.find()  # before anything is copied

    def convert(raw: int, made: int) -> None:
        qemu_img.convert(raw, made, output_format, progress)

    return convert
