"""A piece of work that is killed at every line of the code it is about, or at every effect."""

from __future__ import annotations

import os
import signal
import sys

from long_run import stride


def _was_killed(child):
    """Wait for a child, which is killed or ends well."""
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0
    return killed


def everywhere(act, modules, *, lines):
    """Run ``act`` in children, each killed at another line of ``modules``; yield each time.

    Args:
        act: given a function that it calls where counting is to begin.
        modules: whose lines count.
        lines: there must be more than so many.

    The last one is not killed. Ordinarily it is every fifth line, beginning anywhere: each run has
    others, on each Python.
    """
    ours = {module.__file__ for module in modules}
    first, step = stride(5)
    for target in range(first, 10_000, step):
        child = os.fork()
        if not child:
            seen = 0

            def trace_line(frame, event, argument, target=target):
                nonlocal seen
                seen += event == "line"
                if seen == target:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace_line

            def trace(frame, event, argument):
                return trace_line if frame.f_code.co_filename in ours else None

            try:
                act(lambda: sys.settrace(trace))
                sys.settrace(None)
            except BaseException:  # pytest must not continue in the child
                os._exit(1)
            os._exit(0)
        killed = _was_killed(child)
        yield
        if not killed:
            break
    assert target > lines


EFFECTS = (
    "pwrite",
    "pwritev",
    "fdatasync",
    "fsync",
    "ftruncate",
    "link",
    "rename",
    "unlink",
)


def at_every_effect(act, *, effects):
    """Run ``act`` in children, each killed before another call of ``os`` that changes files; yield.

    What lies between two such calls leaves no trace, so this is as good as every instant.

    Args:
        act: given a function that it calls where counting is to begin.
        effects: there must be at least so many.

    The last one is not killed.
    """
    for target in range(1, 10_000):
        child = os.fork()
        if not child:
            seen = 0

            def counted(real, target=target):
                def call(*args, **options):
                    nonlocal seen
                    seen += 1
                    if seen == target:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)

                return call

            def begin():
                for name in EFFECTS:
                    setattr(os, name, counted(getattr(os, name)))

            try:
                act(begin)
            except BaseException:  # pytest must not continue in the child
                os._exit(1)
            os._exit(0)
        killed = _was_killed(child)
        yield
        if not killed:
            break
    assert target > effects
