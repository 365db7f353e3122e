"""``python -m xen_disk_py``, what ``host.program`` starts, and how one file (zipapp) begins.

An isolated Python takes nothing from the environment. We keep what somebody put into PYTHONPATH on
purpose (a disk that he wrote, or pyxs), but nothing that depends on the current directory.
"""

import os
import sys

if sys.flags.isolated:
    _named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    _place = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:0] = [_place, *filter(os.path.isabs, _named)]

from xen_disk_py.cli import run  # only now is it to be found

if __name__ == "__main__":
    run()
