"""Debian's packages to a directory, by ``mmdebstrap``, of which nothing stays behind when it is
interrupted: no process, no mount, and no file but in a directory that the next run takes away.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from .machine import die_with_parent

PATIENCE = 10.0  # seconds that it may take to clean up, where it must do that itself
# Whatever it mounts and starts ends with these.
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--")


class BootstrapError(Exception):
    """``mmdebstrap`` failed; it has said why."""


def bootstrap(
    arguments: Sequence[str],
    root: Path,
    work: Path,
    *,
    errors: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Unpack what ``mmdebstrap`` makes, but for devices.

    Args:
        arguments: its options, the release, ``-``, and mirrors.
        root: an existing directory, for what it makes.
        work: likewise, for what it needs meanwhile.
        errors: where complaints go, if not to stderr.
        environment: variables besides those that we have.

    Raises:
        BootstrapError: it failed, or unpacking did.
    """
    # The archive form works without being root, too.
    command = ["mmdebstrap", "--quiet", "--format=tar"]
    variables = {**os.environ, **(environment or {})}
    if os.geteuid() == 0:
        # apt's own user may not be let into a directory of ours.
        command = [*NAMESPACES, *command, '--aptopt=APT::Sandbox::User "root"']
        variables["TMPDIR"] = str(work)
    packer = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=errors,
        env=variables,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - the lab has no threads
    )
    try:
        unpacker = subprocess.run(
            ["tar", "--extract", "--no-same-owner", "--exclude=./dev/*", "--directory", str(root)],
            stdin=packer.stdout,
            stderr=errors,
            check=False,
        )
        status = packer.wait()
    finally:
        _end(packer)
    if status or unpacker.returncode:
        raise BootstrapError(f"mmdebstrap failed ({status or unpacker.returncode})")


def _end(packer: subprocess.Popen[bytes]) -> None:
    """End it, if it runs, with all that it has started."""
    if packer.stdout is not None:
        packer.stdout.close()
    if packer.poll() is not None:
        return
    with suppress(ProcessLookupError):
        if os.geteuid():  # it has namespaces of its own making, and directories to be removed
            os.killpg(packer.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                packer.wait(PATIENCE)
        os.killpg(packer.pid, signal.SIGKILL)  # unshare, and its child with it: --kill-child
    packer.wait()
