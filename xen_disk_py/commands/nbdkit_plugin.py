"""``nbdkit-plugin``: say where the plugin is by which nbdkit serves our disks."""

from __future__ import annotations

import argparse
import os

import xen_disk_py

from ..errors import UsageError
from ..exit_status import ExitStatus
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print its path."""
    path = os.path.join(os.path.dirname(os.path.abspath(xen_disk_py.__file__)), "nbdkit_plugin.py")
    if not os.path.isfile(path):
        raise UsageError(
            "nbdkit cannot run a plugin in an archive: install the package (README.md) to have one"
        )
    env.say(path)
    return ExitStatus.OK
