"""Tries states, several at a time, until one fails; then looks for the least that does."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Callable

from ..backends.image import Image
from ..errors import ImageError
from ..named import NamedTuple
from ..trace.powercut import Choice, Epoch, Extent, extents_of
from ..trace.reader import TraceReader
from ..units import format_size
from .minimize import minimize
from .states import Plan, State, name_of
from .trial import Outcome, run
from .views import View, can_clone

_PREFIX = "xen-disk-crashtest-"
_LOCK = "lock"
_STEP = 0.1  # seconds

REDUCE = 200
"""Checks of what failed and of parts of it, unless it is said how many."""

Progress = Callable[[int, int], None]


class Failure(NamedTuple):
    """A state that failed.

    Attributes:
        state: the first of all.
        outcome: how the check ended.
        least: the least of it that fails.
        name: what names that.
        kept: the file that has it, unless that is removed at the end.
        is_steady: whether the same state failed a second time; None: it was not tried.
    """

    state: State
    outcome: Outcome
    least: Choice
    name: str
    kept: str
    is_steady: bool | None


class Result(NamedTuple):
    """What was found.

    Attributes:
        tried: how many states were.
        same: how many had the bytes of another one, and were not tried again.
        failure: the first that failed; None: none did.
    """

    tried: int
    same: int
    failure: Failure | None


@dataclass(frozen=True)
class Setting:
    """What all checks have in common.

    Attributes:
        reader: of the trace.
        base: what the disk was when recording began.
        command: the check, with ``{}`` for the image.
        timeout: seconds for each.
        directory: ours alone, where the images are.
    """

    reader: TraceReader
    base: Image
    command: str
    timeout: float
    directory: str

    @property
    def unit(self) -> int:
        """Bytes of a sector."""
        return self.reader.header.sector_size

    def view(self, name: str) -> View:
        """Make an image.

        Raises:
            ImageError: it cannot be made.
        """
        try:
            return View(self.directory, name, self.base, self.reader.fileno(), self.unit)
        except OSError as error:
            raise _no_image(self.directory, error) from error

    def check(self, view: View, state: State, is_over: Callable[[], bool]) -> Outcome | None:
        """Run the check of what a view shows."""
        header = self.reader.header
        until = state.epoch.until
        facts = {
            "XEN_DISK_STATE": state.name,
            "XEN_DISK_FLUSH": str(state.epoch.number),
            "XEN_DISK_TIME": _seconds(header.started + state.epoch.time),
            "XEN_DISK_UNTIL": "" if until is None else _seconds(header.started + until),
        }
        return run(self.command, view.path, facts, self.timeout, is_over)

    def check_apart(self, view: View, state: State) -> Outcome:
        """Run the check in a thread, so that a signal, wherever it meets this one, ends it too."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            try:
                outcome = pool.submit(self.check, view, state, over.is_set).result()
            finally:
                over.set()
        assert outcome is not None
        return outcome


def _no_image(directory: str, error: OSError) -> ImageError:
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = ": name another --directory, or give fewer --jobs"
    return ImageError(f"{os.path.dirname(directory)}: {error.strerror}{hint}")


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"


@contextmanager
def temporary(directory: str | None) -> Iterator[tuple[str, list[str]]]:
    """Make a directory for us alone, removed at the end but for the files in the list.

    It has a file that is locked as long as we live: whoever was killed has left that, too, and what
    it has left is removed by the next one.
    """
    directory = tempfile.gettempdir() if directory is None else directory
    _sweep(directory)
    path, lock = _make_locked(directory)
    kept: list[str] = []
    try:
        yield path, kept
    finally:
        for name in os.listdir(path) if kept else ():
            if os.path.join(path, name) not in kept:
                os.unlink(os.path.join(path, name))
        if not kept:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_locked(directory: str) -> tuple[str, int]:
    """Make a directory with a file that is locked; return its path, and that file's descriptor."""
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX, dir=directory)
        name = os.path.join(path, _LOCK)
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(name):
            return path, lock
        os.close(lock)  # another one, who sweeps, found it before it was locked


def _sweep(directory: str) -> None:
    """Remove what those have left who were killed."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if not name.startswith(_PREFIX):
            continue
        with suppress(OSError):  # it is another user's, or in use, or was kept: that has no lock
            status = os.lstat(path)
            if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
                continue
            lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def check_space(setting: Setting, written: int, jobs: int) -> None:
    """See that there is room for the images.

    Args:
        setting: where.
        written: bytes that the trace has.
        jobs: how many images there are at a time.

    Raises:
        ImageError: there is not.
    """
    base = setting.base
    status = os.fstat(base.fd)
    here = base.size if base.is_block_device else min(base.size, status.st_blocks * 512)
    if can_clone(setting.directory, base.fd):
        here = 0
    needed = 2 * jobs * min(base.size, here + written)
    there = os.statvfs(setting.directory)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise ImageError(
            f"{os.path.dirname(setting.directory)}: up to {format_size(needed)} are needed, "
            f"and {format_size(free)} are free: name another --directory, "
            "or give fewer --jobs"
        )


class _Search:
    """What the threads share."""

    def __init__(self, setting: Setting, plan: Plan, jobs: int, progress: Progress) -> None:
        self.setting = setting
        self.plan = plan
        self.progress = progress
        self.stored: list[tuple[Extent, ...]] = []  # by each flush
        self.tasks: Queue[tuple[int, State]] = Queue(2 * jobs)
        self.lock = threading.Lock()
        self.first: dict[int, int] = {}  # by the digest of a content, the first that had it
        self.names: dict[int, State] = {}
        self.tried = self.same = 0
        self.failures: dict[int, Outcome] = {}  # by the number of the task
        self.error: BaseException | None = None
        self.stop = threading.Event()  # nothing new is begun
        self.abort = threading.Event()  # what runs is killed
        self.done = threading.Event()  # all tasks are in the queue

    def work(self, number: int) -> None:
        """Do tasks until there are none."""
        try:
            with self.setting.view(f"disk{number}.raw") as view:
                self._work(view)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.error = self.error or error
            self.stop.set()
            self.abort.set()

    def _work(self, view: View) -> None:
        at = 0
        while True:
            try:
                number, state = self.tasks.get(timeout=_STEP)
            except Empty:
                if self.done.is_set() or self.abort.is_set():
                    return
                continue
            while at <= state.epoch.number:
                view.advance(self.stored[at])
                at += 1
            view.show(extents_of(state.epoch, state.chosen, self.setting.unit))
            if self._is_new(view.digest, number, state):
                outcome = self.setting.check(view, state, self.abort.is_set)
                if outcome is None:
                    return
                with self.lock:
                    self.tried += 1
                    if outcome.has_failed:
                        self.failures[view.digest] = outcome
                        self.stop.set()
            view.restore()
            self.progress(self.tried + self.same, self.plan.count)

    def _is_new(self, digest: int, number: int, state: State) -> bool:
        with self.lock:
            before = self.first.get(digest)
            if before is None or number < before:
                self.first[digest] = number
                self.names[number] = state
            self.same += before is not None
            return before is None


def search(
    setting: Setting,
    plan: Plan,
    jobs: int,
    progress: Progress,
    found: Callable[[str], Progress],
    most: int,
) -> Result:
    """Try the states of a plan, and stop at the first that fails.

    Args:
        setting: what all checks have in common.
        plan: which states.
        jobs: how many at a time.
        progress: told how many of them were tried.
        found: told the name of the one that fails; returns what is told how many checks the search
            for the least of it has made.
        most: how many that may make.

    Raises:
        ImageError: there is no room, or the like.
        UsageError: the command cannot be run.
    """
    shared = _Search(setting, plan, jobs, progress)
    threads = [threading.Thread(target=shared.work, args=(n,), daemon=True) for n in range(jobs)]
    started = 0
    try:
        for thread in threads:
            started += 1
            thread.start()
        _feed(shared)
        shared.done.set()
        for thread in threads:
            while thread.is_alive():
                thread.join(_STEP)
    finally:
        shared.stop.set()
        shared.abort.set()
        for thread in threads[:started]:
            with suppress(RuntimeError):  # a signal came before it was started
                thread.join()
    if shared.error is not None:
        if isinstance(shared.error, OSError):
            raise _no_image(setting.directory, shared.error) from shared.error
        raise shared.error
    if not shared.failures:
        return Result(shared.tried, shared.same, None)
    digest = min(shared.failures, key=lambda digest: shared.first[digest])
    state, outcome = shared.names[shared.first[digest]], shared.failures[digest]
    failure = reduce(setting, shared.stored, state, outcome, found(state.name), most)
    return Result(shared.tried, shared.same, failure)


def _feed(shared: _Search) -> None:
    number = 0
    for epoch in shared.plan.epochs():
        shared.stored.append(epoch.stored)
        for state in shared.plan.states(epoch):
            while not shared.stop.is_set():
                try:
                    shared.tasks.put((number, state), timeout=_STEP)
                except Full:
                    continue
                break
            if shared.stop.is_set():
                return
            number += 1


def try_one(setting: Setting, plan: Plan, name: str, *, keep: bool) -> tuple[State, Outcome, str]:
    """Try the state of a name; return it, how that ended, and where its image is.

    Raises:
        UsageError: there is no such state.
        ImageError: there is no room, or the like.
    """
    wanted, _ = plan.find(name)
    with setting.view("state.raw") as view:
        for epoch in plan.epochs():
            view.advance(epoch.stored)
            if epoch.number == wanted:
                break
        state = plan.named(name, epoch)
        view.show(extents_of(epoch, state.chosen, setting.unit))
        outcome = setting.check_apart(view, state)
        if keep:
            view.restore()
            view.show(extents_of(epoch, state.chosen, setting.unit))
        return state, outcome, view.path


def reduce(
    setting: Setting,
    stored: list[tuple[Extent, ...]],
    state: State,
    outcome: Outcome,
    progress: Progress,
    most: int,
) -> Failure:
    """Look for the least of a state that fails; its image is left in the directory.

    After ``most`` checks what was found by then is returned.
    """
    epoch: Epoch = state.epoch
    unit = setting.unit
    checks = 0
    with setting.view("state.raw") as view:
        for extents in stored[: epoch.number + 1]:
            view.advance(extents)

        def fails(chosen: Choice) -> bool:
            nonlocal checks
            if checks == most:
                return False
            progress(checks, most)
            checks += 1
            view.restore()
            view.show(extents_of(epoch, chosen, unit))
            part = State(name_of(epoch, chosen, unit), epoch, chosen)
            return setting.check_apart(view, part).has_failed

        def only(part: object) -> Choice:
            assert isinstance(part, list)
            return tuple(mask if at in part else 0 for at, mask in enumerate(state.chosen))

        least = state.chosen
        is_steady = fails(state.chosen) if most else None
        if is_steady:
            items = [at for at, mask in enumerate(state.chosen) if mask]
            least = only(minimize(items, lambda part: fails(only(list(part))), most))
            for at, pending in enumerate(epoch.pending):
                whole = (1 << pending.units(unit)) - 1
                if least[at] not in (0, whole):  # it need not be torn
                    untorn = (*least[:at], whole, *least[at + 1 :])
                    least = untorn if fails(untorn) else least
        view.restore()
        view.show(extents_of(epoch, least, unit))
        return Failure(state, outcome, least, name_of(epoch, least, unit), view.path, is_steady)
