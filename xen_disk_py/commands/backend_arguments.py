"""The arguments that say which backend: the same for every command that opens one."""

from __future__ import annotations

import argparse
import os

from ..backends import Backend
from ..backends.loader import choose, open_backend, parse_options
from ..errors import UsageError


def backend_from(args: argparse.Namespace) -> Backend:
    """Open the backend that the arguments describe.

    What ``--overlay`` implies is put into ``args``: the backend and, from the overlay, the path.

    Raises:
        UsageError: they contradict each other or the backend does not take one of them.
        ImageError: the image cannot be used.
        BackendError: the backend's own code is broken.
    """
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
    return open_backend(args.backend, given)


def _apply_format(args: argparse.Namespace) -> None:
    """Have the backend that reads ``--format``; the format is never guessed from the content."""
    if args.format is None:
        return
    if args.format != "raw" and args.path is None:
        raise UsageError(f"--format {args.format} needs --path: name the file")
    if args.backend is not None and (args.backend == "vhd") != (args.format == "vhd"):
        raise UsageError(
            f"--backend {args.backend} does not read --format {args.format}: leave out one of them"
        )
    if args.format == "raw":
        return
    args.backend = args.format


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


def backend_name(args: argparse.Namespace) -> str:
    """Name the backend as the user knows it."""
    return choose(args.backend, args.path)
