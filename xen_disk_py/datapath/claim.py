"""Wait until the host that a guest comes from has let its disk go."""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable

from ..backends import Backend
from ..backends.finding import user_line
from ..errors import BackendError
from .workers import MORE

log = logging.getLogger("xen_disk_py")

_PAUSE = 0.2  # seconds until the lock is asked for again
_PATIENCE = 10.0  # seconds that the other host may take before that is worth a line


class Claim:
    """Takes a disk's lock, in a thread of its own: that may take a while.

    Args:
        backend: open, its lock left to another host.
        on_end: called, from that thread, when the lock is ours.

    Attributes:
        is_done: it is.
    """

    def __init__(self, backend: Backend, on_end: Callable[[], None]) -> None:
        self._backend = backend
        self._on_end = on_end
        self._stopped = threading.Event()
        self._has_begun = self._is_refusal_said = False
        self.is_done = False

    def begin(self) -> bool:
        """Begin to ask for the lock, unless that has begun.

        Returns:
            False if the system gives no thread: nobody asks yet. To be called again.
        """
        if not self._has_begun:
            try:
                threading.Thread(target=self._run, name="claim", daemon=True).start()
            except RuntimeError as error:
                if not self._is_refusal_said:
                    self._is_refusal_said = True
                    log.error(
                        "the disk's lock is not asked for yet, since there is no thread to be had "
                        "(%s): %s",
                        error,
                        MORE,
                    )
                return False
            self._has_begun = True
        return True

    def stop(self) -> None:
        """Ask no more; who closes the backend waits for what is under way."""
        self._stopped.set()

    def _run(self) -> None:
        began, is_said = time.monotonic(), False
        while not self._stopped.is_set():
            try:
                self._backend.claim()
            except Exception as error:  # noqa: BLE001 - whatever an author's code raises
                if not is_said and time.monotonic() - began >= _PATIENCE:
                    is_said = True
                    is_told = isinstance(error, BackendError)
                    why = str(error) if is_told else user_line(error, self._backend)
                    log.warning("the guest waits for its disk: %s", why)
                self._stopped.wait(_PAUSE)
            else:
                if is_said:
                    log.warning("the guest has its disk now: %s", self._backend)
                self.is_done = True
                self._on_end()
                return
