#!/usr/bin/env bash
# Without the GIL, an object to which nobody refers any longer can still be there: a weak reference
# to it answers, and the buffer that it exports counts as in use. The thread that made it counts its
# references apart from those of all others (PEP 703's biased counts); where another thread gives
# the last one up, the object goes only when its maker runs again, or a collection sums the counts
# up. So "the weak reference is dead" is right, and "it is alive" means nothing before a collection.
#
# Needs a free-threaded Python as python3.13t, python3.14t or python3t in PATH, or named in $PYTHON.
#
# Seen: CPython 3.13.15, built from Debian's source with --disable-gil:
#   given up by another thread while its maker sleeps: alive
#   after gc.collect(): gone
#   (a build with a GIL: gone, gone)
set -euo pipefail
for python in "${PYTHON:-}" python3.13t python3.14t python3.15t python3t; do
    [ -n "$python" ] && command -v "$python" >/dev/null && break
    python=
done
[ -n "$python" ] || { echo "needs a free-threaded Python: PYTHON=/path/to/python3.13t"; exit 77; }
"$python" - <<'PYTHON'
import ctypes
import gc
import sys
import threading
import weakref

if getattr(sys, "_is_gil_enabled", lambda: True)():
    print("this Python has a GIL")
    sys.exit(77)
made, is_made, may_end = [], threading.Event(), threading.Event()


def make():
    made.append((ctypes.c_char * 4096)())
    is_made.set()
    may_end.wait()


maker = threading.Thread(target=make)
maker.start()
is_made.wait()
reference = weakref.ref(made[0])
made.clear()
found = []
for when in ("given up by another thread while its maker sleeps", "after gc.collect()"):
    found.append("alive" if reference() is not None else "gone")
    print(f"{when}: {found[-1]}")
    gc.collect()
may_end.set()
maker.join()
sys.exit(found != ["alive", "gone"])
PYTHON
