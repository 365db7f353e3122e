"""The arguments that say which backend: the same for every command that opens one."""

from __future__ import annotations

import argparse
import os

from ..backends import Backend
from ..backends.loader import QEMU_FORMATS, choose, open_backend, parse_options
from ..errors import UsageError


def backend_from(args: argparse.Namespace) -> Backend:
    """Open the backend that the arguments describe.

    What ``--overlay`` implies is put into ``args``: the backend and, from the overlay, the path.

    Raises:
        UsageError: they contradict each other or the backend does not take one of them.
        ImageError: the image cannot be used.
        BackendError: the backend's own code is broken.
    """
    if args.overlay is not None and args.read_only and not os.path.lexists(args.overlay):
        raise UsageError(
            f"--overlay {args.overlay}: there is no such file yet, and with --read-only nothing "
            "will be in it: leave out one of them"
        )
    if args.overlay is not None and is_vhd(args.overlay):
        _apply_vhd_overlay(args)
    else:
        _apply_format(args)
        if args.overlay is not None:
            _complete(args)
    given: dict[str, object] = {}
    for name in ("path", "size", "cow_limit", "sector_size", "overlay"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    for name in ("read_only", "force"):
        if getattr(args, name):
            given[name] = True
    given.update(parse_options(args.option))
    return open_backend(args.backend, given, args.filter)


def is_vhd(overlay: str) -> bool:
    """Tell by its name whether the changes to an image are kept in a VHD."""
    return overlay.lower().endswith((".vhd", ".avhd"))


def _apply_vhd_overlay(args: argparse.Namespace) -> None:
    """Have the VHD that ``--overlay`` names served, as a child of the image if there is one."""
    if args.backend not in (None, "vhd"):
        raise UsageError(f"--backend {args.backend} does not keep changes in a VHD: leave it out")
    args.backend = "vhd"
    if args.path is None:
        if not os.path.lexists(args.overlay):
            raise UsageError(
                f"--overlay {args.overlay}: there is no such file yet: name the image with --path"
            )
        args.path, args.overlay = args.overlay, None
    elif args.format is not None:
        args.option = [f"parent_format={args.format}", *args.option]


def _apply_format(args: argparse.Namespace) -> None:
    """Have the backend that reads ``--format``; the format is never guessed from the content."""
    if args.format is None:
        return
    if args.format != "raw" and args.path is None:
        raise UsageError(f"--format {args.format} needs --path: name the file")
    reads = "qemu" if args.format in QEMU_FORMATS else args.format
    fits = args.backend not in ("vhd", "qemu") if reads == "raw" else args.backend == reads
    if args.backend is not None and not fits:
        raise UsageError(
            f"--backend {args.backend} does not read --format {args.format}: leave out one of them"
        )
    if args.format == "raw":
        return
    if args.overlay is not None and args.format in QEMU_FORMATS:
        raise UsageError(
            f"--overlay {args.overlay}: QEMU keeps changes itself: make them a file of their own "
            f"(qemu-img create -f qcow2 -b {args.path} -F {args.format} FILE), and serve that"
        )
    if args.overlay is not None:
        raise UsageError(
            f"--overlay {args.overlay}: the changes to a VHD are kept in a VHD: give that a name "
            "that ends in .vhd"
        )
    args.backend = args.format
    if args.format in QEMU_FORMATS:
        args.backend = "qemu"
        args.option = [f"format={args.format}", *args.option]


def _complete(args: argparse.Namespace) -> None:
    from ..backends.overlay.file import image_path

    if (args.backend is None and args.path is None) or choose(args.backend, args.path) == "cow":
        args.backend = "overlay"
    if args.backend == "overlay" and args.path is None:
        if not os.path.lexists(args.overlay):
            raise UsageError(
                f"--overlay {args.overlay}: there is no such file yet: name the image with --path"
            )
        args.path = image_path(args.overlay)


def is_cow(args: argparse.Namespace) -> bool:
    """Tell whether the changes to an image would be kept in memory."""
    is_raw = args.format in (None, "raw")
    return args.overlay is None and is_raw and choose(args.backend, args.path) == "cow"


def backend_name(args: argparse.Namespace) -> str:
    """Name the backend as the user knows it."""
    return choose(args.backend, args.path)
