"""``python -m xen_disk_py``, what ``host.program`` starts, and how one file (zipapp) begins.

An isolated Python takes nothing from the environment. We keep what somebody put into PYTHONPATH on
purpose (a disk that he wrote, or pyxs), and what he has installed for himself (``pip install
--user``), but nothing that depends on the current directory.
"""

import gc
import os
import site
import sys

if sys.flags.isolated:
    _named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    _place = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:0] = [_place, *filter(os.path.isabs, _named)]
    _own = site.getusersitepackages()
    if (
        sys.prefix == sys.base_prefix  # no virtual environment, which is meant to have none of it
        and not os.environ.get("PYTHONNOUSERSITE")
        and os.path.isdir(_own)
        and os.stat(_own).st_uid == os.getuid() == os.geteuid()  # HOME may be somebody else's
    ):
        site.addsitedir(_own)

from xen_disk_py.host.systemd import notify_starting  # only now is it to be found

if __name__ == "__main__":
    notify_starting()  # what is imported next takes most of a start
    gc.disable()  # while it is imported: see ``cli.run``

from xen_disk_py.cli import run

if __name__ == "__main__":
    run()
