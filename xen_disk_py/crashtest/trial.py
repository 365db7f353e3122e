"""Runs a check of one state, for a bounded time.

Everything that it starts ends with it, and with this process, however that ends; so does what it
has mounted, where a mount namespace is to be had.
"""

from __future__ import annotations

import functools
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Callable

from ..errors import ProgramMissing, UsageError
from ..host.program import find_program
from ..named import NamedTuple

_TAIL = 4096  # bytes of output that are kept
_STEP = 0.05  # seconds between two looks at whether it has ended
# Our end of the pipe closes with us, even by SIGKILL: whoever reads it ends the group that it is
# in. It is there before the command starts, so no moment is left at which nobody would.
_WITH_GUARD = """\
exec 3<&0 < /dev/null
{ read -r _ <&3; kill -9 0; } > /dev/null 2>&1 &
command=$1
shift
exec "$@" /bin/sh -c "$command" 3<&-
"""


class Outcome(NamedTuple):
    """How a check ended.

    Attributes:
        status: as the shell sees it; negative: by that signal; None: it took too long.
        output: the last of what it printed.
    """

    status: int | None
    output: str

    @property
    def has_failed(self) -> bool:
        """Whether it did not say that all is well."""
        return self.status != 0

    @property
    def text(self) -> str:
        """The status, for a person."""
        if self.status is None:
            return "took too long, and was killed"
        return f"status {self.status}" if self.status >= 0 else f"signal {-self.status}"


def run(
    command: str,
    path: str,
    facts: Mapping[str, str],
    timeout: float,
    is_over: Callable[[], bool],
) -> Outcome | None:
    """Run a command of the shell; None: it was broken off.

    Args:
        command: ``{}`` in it becomes the path.
        path: of the image.
        facts: added to its environment.
        timeout: seconds.
        is_over: whether to break it off.

    Raises:
        UsageError: there is no such command.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", _WITH_GUARD, "sh", command.replace("{}", shlex.quote(path)), *_apart()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **facts},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout as pipe:
        output = b""
        end = time.monotonic() + timeout
        is_late = broken_off = False
        poller: select.poll | None = select.poll()
        assert poller is not None
        poller.register(pipe, select.POLLIN)
        try:
            while not _has_ended(process.pid):
                is_late, broken_off = time.monotonic() >= end, is_over()
                if is_late or broken_off:
                    break
                if poller is None:
                    time.sleep(_STEP / 50)
                elif poller.poll(_STEP * 1000):
                    part = os.read(pipe.fileno(), 1 << 16)
                    output = (output + part)[-_TAIL:]
                    poller = poller if part else None
        finally:  # Ctrl-C, too
            with suppress(ProcessLookupError):  # it is not reaped yet, so the number is its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(pipe.fileno(), False)
        with suppress(BlockingIOError):
            output += os.read(pipe.fileno(), 1 << 16)
    if broken_off:
        return None
    text = output[-_TAIL:].decode(errors="replace")
    if process.returncode in (126, 127) and not is_late:
        raise UsageError(f"--check: the command cannot be run: {text.strip()}")
    return Outcome(None if is_late else process.returncode, text)


@functools.cache
def _apart() -> Sequence[str]:
    """What runs a command in a mount namespace of its own: its mounts end with it, however it does.

    Nothing, where that is not to be had: without root, or in a container.
    """
    try:
        program = find_program("unshare", "install util-linux")
    except ProgramMissing:
        return ()
    words = (program, "--mount", "--")
    quiet = subprocess.DEVNULL
    done = subprocess.run(
        [*words, "/bin/true"], stdin=quiet, stdout=quiet, stderr=quiet, check=False
    )
    return () if done.returncode else words


def _has_ended(pid: int) -> bool:
    """Whether a child has; it is not reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
