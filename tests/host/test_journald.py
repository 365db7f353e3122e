"""Entries for systemd's journal: what a reader understands, and that nobody need be there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal import Listener, decode

import xen_disk_py
from xen_disk_py.host.journald import encode, send

JOURNALD = "/lib/systemd/systemd-journald"

FIRST = "".join(map(chr, range(ord("A"), ord("Z") + 1)))
# not st.from_regex, nor st.text: both build a table of all of Unicode first, for a second
NAMES = st.builds(
    lambda first, rest: first + "".join(rest),
    st.sampled_from(FIRST),
    st.lists(st.sampled_from(FIRST + "0123456789_"), max_size=20),
)


@pytest.fixture
def listener(tmp_path):
    listener = Listener(str(tmp_path / "socket"))
    yield listener
    listener.close()


@settings(max_examples=30)
@given(st.dictionaries(NAMES, st.binary(max_size=100), max_size=8))
def test_whatever_is_in_a_value_it_is_read_as_it_was(fields):
    assert fields == decode(encode(fields))


def test_text_and_numbers():
    assert {"A": b"7", "B": "é\n".encode(), "C": b"\xff"} == decode(
        encode({"A": 7, "B": "é\n", "C": "\udcff"})
    )


def test_a_name_with_a_line_end_is_no_field_of_its_own(listener, tmp_path):
    assert send({"GUEST": "a\nPRIORITY=0", "PRIORITY": 6}, str(tmp_path / "socket"))
    assert {"GUEST": b"a\nPRIORITY=0", "PRIORITY": b"6"} == listener.next()


def test_what_no_datagram_can_hold_is_sent_as_a_file(listener, tmp_path):
    before = os.listdir("/proc/self/fd")
    long = os.urandom(1 << 20)
    assert send({"LONG": long, "B": "x"}, str(tmp_path / "socket"))
    assert {"LONG": long, "B": b"x"} == listener.next()
    assert before == os.listdir("/proc/self/fd")


def test_nobody_listens(tmp_path):
    path = tmp_path / "socket"
    assert not send({"A": "x"}, str(path))
    path.write_text("no socket")
    assert not send({"A": "x"}, str(path))
    assert not send({"A": "x"}, "/" + "x" * 200)


def test_a_reader_that_has_stopped_is_not_waited_for(tmp_path):
    """The queue is full at some time; whoever would wait there would never return."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        sent = 0
        while send({"A": "x"}, path):
            sent += 1
        assert sent
        assert not send({"A": bytes(1 << 20)}, path)


SCRIPT = f"""
set -e
mount -t tmpfs tmpfs /run || exit 77
mkdir -p /run/systemd/journal /run/log/journal
{JOURNALD} 2>/dev/null &
trap "kill $!; wait $! || true" EXIT
i=0
until [ -S /run/systemd/journal/socket ]
do
    i=$((i + 1))
    [ $i -lt 300 ] || exit 77
    sleep 0.1
done
"$@"
journalctl -D /run/log/journal --sync 2>/dev/null || true
i=0
until journalctl -D /run/log/journal -o json --all XEN_DISK_GUEST=g >/run/found && [ -s /run/found ]
do
    i=$((i + 1))
    [ $i -lt 300 ]
    sleep 0.1
done
cat /run/found
"""
SENDER = """
import sys, time
sys.path.insert(0, {place!r})
from xen_disk_py.host.journald import send
fields = {{"MESSAGE": "m", "PRIORITY": 3, "XEN_DISK_GUEST": "g", "XEN_DISK_PATH": "a\\nb=c"}}
deadline = time.monotonic() + 30
while not send({{**fields, "XEN_DISK_ERROR": "e" * 300_000}}):
    assert time.monotonic() < deadline
    time.sleep(0.02)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(JOURNALD), reason="needs root and systemd-journald"
)
def test_the_real_one_has_it_all(tmp_path):
    (tmp_path / "sender.py").write_text(
        SENDER.format(place=str(Path(xen_disk_py.__file__).parents[1]))
    )
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace of its own is to be had")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", SCRIPT, "sh", sys.executable, str(tmp_path / "sender.py")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("systemd-journald does not run here")
    assert 0 == done.returncode, done.stderr
    (entry,) = map(json.loads, done.stdout.splitlines())
    assert ("m", "3", "g", "a\nb=c", "e" * 300_000) == tuple(
        entry[name]
        for name in ("MESSAGE", "PRIORITY", "XEN_DISK_GUEST", "XEN_DISK_PATH", "XEN_DISK_ERROR")
    )
