"""Waiting until what was written is on stable storage, for several threads at once."""

from __future__ import annotations

import errno
import os
import threading


class Stable:
    """The ``fdatasync`` of one file. Who asks for it meanwhile shares the next one.

    Linux reports a failed write-back once, and drops the pages: the next ``fdatasync`` succeeds
    although what was written is lost. So one that has failed stays failed as long as this lives.

    Args:
        fd: the file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._turn = threading.Condition()
        self._begun = 0  # how many fdatasync have begun
        self._ended = 0  # the last of those that have ended well
        self._running = False
        self._failure: OSError | None = None

    def sync(self) -> None:
        """Return when everything that was written before this call is on stable storage.

        Raises:
            OSError: it is not, or something earlier is not; no later call succeeds either.
        """
        with self._turn:
            mine = self._begun + 1  # one that began before this call may have missed something
            while self._ended < mine:
                if self._failure is not None:
                    raise OSError(
                        errno.ENOTRECOVERABLE,  # no retry helps
                        f"a flush has failed ({self._failure.strerror}), and what it lost is not "
                        "known: nothing is flushed any more; see to the storage and reconnect",
                    )
                if self._running:
                    self._turn.wait()
                else:
                    self._run()

    def _run(self) -> None:
        self._begun += 1
        number = self._begun
        self._running = True
        self._turn.release()
        failure = None
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            failure = error
        finally:
            self._turn.acquire()
            self._running = False
            self._turn.notify_all()
        if failure is None:
            self._ended = number
        else:
            self._failure = failure
