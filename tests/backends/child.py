"""The conformance command in a process that has imported it: pytest takes a second to start."""

import os
import sys
import tempfile
import traceback

from xen_disk_py.backends import conformance


def conformance_command(*arguments, cwd):
    """Do what the command does, in a child of this process; return its status and its output.

    What waits indefinitely, also in threads, ends with the child.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if not child:
            try:
                sys.stdout = sys.stderr = output
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(cwd)
                os.environ["PYTEST_ADDOPTS"] = ""
                status = conformance.main([*map(str, arguments)])
                output.flush()
                os._exit(status)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())  # a warning may end the traceback, too
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(70)  # pytest must not continue in the child
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -status, output.read()
