"""What joins the lab's two dom0s: commands there, and streams, as ssh would have them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from xen import pace, peer
from xen.guest import GuestError

TESTS = Path(__file__).parent


@pytest.fixture
def there(monkeypatch, tmp_path):
    """Return the other host, which is this one, at a port of its own."""
    monkeypatch.setattr(peer, "RESULTS", tmp_path)
    monkeypatch.setattr(peer, "ADDRESS", "127.0.0.1")
    with peer.Server(("127.0.0.1", 0), peer.Handler) as server:
        monkeypatch.setattr(peer, "PORT", server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield peer.Peer()
        server.shutdown()
        thread.join()


def test_a_command(there):
    assert there.run("echo out; echo err >&2; printf last; exit 3") == (3, "out\nerr\nlast")
    assert there.check("cat") == ""  # it has no input
    with pytest.raises(GuestError, match="ended with status 1"):
        there.check("false")


def test_a_command_that_hangs(there, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(GuestError, match="still runs"):
        there.run(f"cat {fifo}", timeout=0.2)
    fifo.write_text("now it ends")


def test_a_stream_has_two_directions_and_ends(there, monkeypatch):
    """What comes in is what the command gets, to its end; its output ends when it does."""
    data = os.urandom(1 << 20)
    code = (
        "import sys; from xen import peer; "
        f"peer.ADDRESS, peer.PORT = '127.0.0.1', {peer.PORT}; "
        "sys.exit(peer.main(['stream', 'wc -c; echo said >&2; cat /dev/null']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )
    assert (done.returncode, done.stdout.strip()) == (0, b"1048576"), done.stderr
    assert "said" in (peer.RESULTS / "peer.log").read_text()  # no error gets into the stream


@pytest.mark.parametrize(("seconds", "factor"), [(0.0, 1.0), (4.0, 1.0), (10.0, 2.5), (99.0, 6.0)])
def test_limits_grow_with_slowness(seconds, factor):
    assert pace.factor(seconds) == factor
