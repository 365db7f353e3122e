"""What the arguments say that a disk is to be: the same for every command that opens one."""

from __future__ import annotations

import argparse
import os

from ..backends import Backend
from ..backends.finding import QEMU_FORMATS, choose
from ..errors import UsageError
from ..recovery.spec import DiskSpec, current_directory


def spec_from(args: argparse.Namespace, temporary: str | None = None) -> DiskSpec:
    """Describe the disk that the arguments ask for.

    What ``--overlay`` and ``--format`` imply is in it: the backend and, from the overlay, the path.
    An argument that a command does not have has its default.

    Args:
        args: of the command.
        temporary: the overlay, if that is to be removed with the disk.

    Raises:
        UsageError: they contradict each other.
        ImageError: the overlay cannot be read.
    """
    given = vars(args)
    if args.overlay is not None and args.read_only and not os.path.lexists(args.overlay):
        raise UsageError(
            f"--overlay {args.overlay}: there is no such file yet, and with --read-only nothing "
            "will be in it: leave out one of them"
        )
    spec = DiskSpec(
        directory=current_directory(),
        backend=args.backend,
        path=args.path,
        overlay=temporary if temporary is not None else args.overlay,
        is_temporary=temporary is not None,
        size=args.size,
        cow_limit=args.cow_limit,
        sector_size=args.sector_size,
        options=tuple(args.option),
        filters=tuple(args.filter),
        read_only=args.read_only or given.get("cdrom", False),
        cdrom=given.get("cdrom", False),
        discard=not given.get("no_discard", False),
        latency=given.get("latency") != "off",
        force=args.force,
        retries=given.get("on_error") == "hold",
    )
    named = (
        "queues",
        "queues_in",
        "grants",
        "persistent_grants",
        "indirect_segments",
        "timeout",
        "user",
    )
    spec = spec._replace(**{name: given[name] for name in named if name in given})
    if spec.overlay is not None and is_vhd(spec.overlay):
        return _with_vhd_overlay(spec, spec.overlay, args.format)
    spec = _of_format(spec, args.format)
    return spec if spec.overlay is None else _with_overlay(spec, spec.overlay)


def backend_from(args: argparse.Namespace) -> Backend:
    """Open the backend that the arguments describe.

    Raises:
        UsageError: they contradict each other or the backend does not take one of them.
        ImageError: the image cannot be used.
        BackendError: the backend's own code is broken.
    """
    return spec_from(args).open_backend()


def is_vhd(overlay: str) -> bool:
    """Tell by its name whether the changes to an image are kept in a VHD."""
    return overlay.lower().endswith((".vhd", ".avhd"))


def _with_vhd_overlay(spec: DiskSpec, overlay: str, form: str | None) -> DiskSpec:
    """Have the VHD that ``--overlay`` names served, as a child of the image if there is one."""
    if spec.backend not in (None, "vhd"):
        raise UsageError(f"--backend {spec.backend} does not keep changes in a VHD: leave it out")
    if spec.path is None:
        _check_exists(overlay)
        return spec._replace(backend="vhd", path=overlay, overlay=None)
    if form in QEMU_FORMATS:
        raise _changes_of_qemu(spec, overlay, form)
    options = spec.options if form is None else (f"parent_format={form}", *spec.options)
    return spec._replace(backend="vhd", options=options)


def _of_format(spec: DiskSpec, form: str | None) -> DiskSpec:
    """Have the backend that reads ``--format``; the format is never guessed from the content."""
    if form is None:
        return spec
    if form != "raw" and spec.path is None:
        raise UsageError(f"--format {form} needs --path: name the file")
    reads = "qemu" if form in QEMU_FORMATS else form
    fits = spec.backend not in ("vhd", "qemu") if reads == "raw" else spec.backend == reads
    if spec.backend is not None and not fits:
        raise UsageError(
            f"--backend {spec.backend} does not read --format {form}: leave out one of them"
        )
    if form == "raw":
        return spec
    if spec.overlay is not None and form in QEMU_FORMATS:
        raise _changes_of_qemu(spec, spec.overlay, form)
    if spec.overlay is not None:
        raise UsageError(
            f"--overlay {spec.overlay}: the changes to a VHD are kept in a VHD: give that a name "
            "that ends in .vhd"
        )
    if form in QEMU_FORMATS:
        return spec._replace(backend="qemu", options=(f"format={form}", *spec.options))
    return spec._replace(backend=form)


def _changes_of_qemu(spec: DiskSpec, overlay: str, form: str) -> UsageError:
    return UsageError(
        f"--overlay {overlay}: QEMU keeps changes itself: make them a file of their own "
        f"(qemu-img create -f qcow2 -b {spec.path} -F {form} FILE), and serve that"
    )


def _with_overlay(spec: DiskSpec, overlay: str) -> DiskSpec:
    from ..backends.overlay.file import image_path

    if (spec.backend is None and spec.path is None) or spec.backend_name == "cow":
        spec = spec._replace(backend="overlay")
    if spec.backend == "overlay" and spec.path is None:
        _check_exists(overlay)
        return spec._replace(path=image_path(overlay))
    return spec


def _check_exists(overlay: str) -> None:
    if not os.path.lexists(overlay):
        raise UsageError(
            f"--overlay {overlay}: there is no such file yet: name the image with --path"
        )


def is_cow(args: argparse.Namespace) -> bool:
    """Tell whether the changes to an image would be kept in memory."""
    is_raw = args.format in (None, "raw")
    return args.overlay is None and is_raw and choose(args.backend, args.path) == "cow"
