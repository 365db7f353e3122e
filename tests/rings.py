"""What a guest's end of a ring waits for."""

from __future__ import annotations

import select
import time

from xen_disk_py.blkif import decode_response

PATIENCE = 30.0  # seconds for the next response


def responses_of(line, count):
    """Wait for so many responses, and return them.

    Args:
        line: has a ``ring``, a ``channel``, and the ``failures`` of the queue that serves it.
        count: no more than that may come.
    """
    found = []
    deadline = time.monotonic() + PATIENCE
    poll = select.poll()
    poll.register(line.channel.fileno(), select.POLLIN)
    while len(found) < count:
        slots = line.ring.take()
        found.extend(map(decode_response, slots))
        if slots:
            deadline = time.monotonic() + PATIENCE
        elif not line.ring.arm():
            assert time.monotonic() < deadline, f"{len(found)} of {count} responses"
            assert not line.failures, line.failures
            poll.poll(100)
            line.channel.acknowledge()
    assert count == len(found)
    return found
