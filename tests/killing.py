"""A piece of work that is killed at every line of the code it is about."""

from __future__ import annotations

import os
import signal
import sys

from long_run import stride


def everywhere(act, modules, *, lines):
    """Run ``act`` in children, each killed at another line of ``modules``; yield each time.

    Args:
        act: given a function that it calls where counting is to begin.
        modules: whose lines count.
        lines: there must be more than so many.

    The last one is not killed. Ordinarily it is every third line, beginning anywhere.
    """
    ours = {module.__file__ for module in modules}
    first, step = stride(3)
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
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0
        yield
        if not killed:
            break
    assert target > lines
