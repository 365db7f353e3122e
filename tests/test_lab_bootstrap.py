"""What unpacks Debian for the lab ends whole, with what it has started and mounted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# In the place of mmdebstrap: what it does to a machine while it works, without end.
PACKER = """#!/bin/sh
trap '' TERM PIPE
mkdir "$TMPDIR/root"
mount -t tmpfs pythons-none "$TMPDIR/root" || exit
sleep 1000 &
echo "working $$ $!" >&2
wait
wait
"""
RUN = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from xen.lab.bootstrap import bootstrap
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
bootstrap(["forky", "-"], Path("root"), Path("work"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="it mounts")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_killed_leaves_nothing(tmp_path, monkeypatch, signum):
    """No process of it, and no mount: the pipe to stderr has no writer then."""
    packer = tmp_path / "mmdebstrap"
    packer.write_text(PACKER)
    packer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("root", "work"):
        (tmp_path / name).mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("working ")
        process.send_signal(signum)
        process.stderr.read()  # its end comes with the end of the last of them
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
