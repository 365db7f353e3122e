#!/usr/bin/env bash
# Python warns when a process with several threads forks (DeprecationWarning, since 3.12). With
# warnings as errors, 3.12 to 3.14 swallow it: nothing is raised and nothing printed, so that a test
# suite under -W error sees no such fork. 3.15 raises it, but in the parent and after the fork: the
# child exists, and whoever called os.fork() has no process id to wait for.
#
# Python 3 as python3, or named in $PYTHON; one before 3.12 does not warn, and is no use here.
#
# Seen: CPython 3.12.1, 3.13.0 and Debian's 3.14.8: "swallowed"; Debian's 3.15.0: "raised, with a child"
set -euo pipefail
exec "${PYTHON:-python3}" -W error - <<'PYTHON'
import os
import sys
import threading

if sys.version_info < (3, 12):
    print("this Python does not warn")
    sys.exit(77)
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
try:
    pid = os.fork()
    if not pid:
        os._exit(0)
    found = "swallowed"
except DeprecationWarning:
    pid, _ = os.waitpid(-1, 0)  # there is one
    pid, found = 0, "raised, with a child"
if pid:
    os.waitpid(pid, 0)
end.set()
thread.join()
print(f"Python {sys.version.split()[0]}: {found}")
sys.exit(found != ("swallowed" if sys.version_info < (3, 15) else "raised, with a child"))
PYTHON
