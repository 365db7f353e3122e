"""The arguments that say which backend: the same for every command that opens one."""

from __future__ import annotations

import argparse

from ..backends import Backend
from ..backends.loader import choose, open_backend, parse_options


def backend_from(args: argparse.Namespace) -> Backend:
    """Open the backend that the arguments describe.

    Raises:
        UsageError: they contradict each other or the backend does not take one of them.
        ImageError: the image cannot be used.
        BackendError: the backend's own code is broken.
    """
    given: dict[str, object] = {}
    for name in ("path", "size", "cow_limit", "sector_size"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if args.read_only:
        given["read_only"] = True
    given.update(parse_options(args.option))
    return open_backend(args.backend, given)


def backend_name(args: argparse.Namespace) -> str:
    """Name the backend as the user knows it."""
    return choose(args.backend, args.path)
