"""A disk whose storage takes waiting, where the system gives no more threads.

Run as a program, it plays the frontend; the backend is a fork of it that may have no thread more
than a number, by ``RLIMIT_NPROC``. That does not bind root, so root becomes somebody else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys

from cuts import Frontend

NOBODY = 65534


def forbid_threads() -> None:
    """Have the system refuse more threads to this process.

    Raises:
        OSError: it cannot be had.
    """
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


class Starved(Frontend):
    """A frontend of a backend without threads."""

    def backend(self, setting, cut):
        """Be a backend, in a process of its own."""
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        forbid_threads()
        super().backend(setting, cut)


def main(setting):
    """Have all requests done, and check each."""
    with contextlib.ExitStack() as stack:
        frontend = Starved(setting, stack)
        frontend.step()
        frontend.generation(setting, 0, 0)
        assert frontend.done
        frontend.check()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
