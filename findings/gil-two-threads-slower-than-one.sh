#!/usr/bin/env bash
# Two threads that read from the page cache do less together than one alone. CPython gives its lock
# up around each system call. With one as short as a `preadv` of 4 KiB the other thread takes the
# lock meanwhile, so that each call ends with a wait, a wake-up and a switch. So it is not that two
# are no faster, as one lock would have it: they lose half. Processes do not.
#
# Needs a Python 3 with a GIL (named in $PYTHON, or python3), and two idle processors: what competes
# for them leaves one thread less than two.
#
# Seen: CPython 3.9.18, 3.11.7 and 3.13.0, Linux 6.18, two processors:
#   one thread 1,036,000/s, two 434,500/s, x 0.42
#   one thread 1,088,500/s, two 440,500/s, x 0.40
#   one thread 1,062,500/s, two 453,500/s, x 0.43
set -euo pipefail
[ "$(nproc)" -ge 2 ] || { echo "needs two processors"; exit 77; }
exec "${PYTHON:-python3}" - <<'PYTHON'
import os
import sys
import tempfile
import threading
import time

SECONDS = 0.2

if not getattr(sys, "_is_gil_enabled", lambda: True)():
    print("this Python has no GIL")
    sys.exit(77)


def rate(count):
    """Return how many calls so many threads do in a second, all together."""
    ready, done = threading.Barrier(count), [0] * count

    def work(number):
        page, calls = [bytearray(4096)], 0
        ready.wait()
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            for _ in range(100):
                os.preadv(file.fileno(), page, 0)
            calls += 100
        done[number] = calls

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / SECONDS


with tempfile.TemporaryFile(dir="/dev/shm") as file:
    file.write(bytes(4096))
    file.flush()
    rates, begun, used = {1: [], 2: []}, time.perf_counter(), time.process_time()
    for _ in range(5):
        for count, found in rates.items():
            found.append(rate(count))
if time.process_time() - used < 0.9 * (time.perf_counter() - begun):
    print("other work has the processors")
    sys.exit(77)
one, two = max(rates[1]), max(rates[2])
print(f"one thread {one:,.0f}/s, two {two:,.0f}/s, x {two / one:.2f}")
sys.exit(two > 0.9 * one)
PYTHON
