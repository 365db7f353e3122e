"""What is killed at every effect is seen after each."""

from __future__ import annotations

import os
import re
from pathlib import Path

import killing
import pytest

from xen_disk_py import backends
from xen_disk_py.backends.holes import punch_hole

PAGE = 4096


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_each_state_is_seen_once(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"

    def act(begin):
        begin()
        fd = os.open(a, os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"a" * PAGE, 0)
        os.fsync(fd)
        os.posix_fallocate(fd, PAGE, PAGE)
        punch_hole(fd, 0, PAGE)
        os.ftruncate(fd, 3)
        os.rename(a, b)
        os.close(os.open(b, os.O_RDONLY))
        os.unlink(b)

    states = []
    for _ in killing.at_every_effect(act, effects=7):
        states.append(contents(tmp_path))
        a.unlink(missing_ok=True)
        b.unlink(missing_ok=True)
    assert [
        {},
        {"a": b""},
        {"a": b"a" * PAGE},
        {"a": b"a" * PAGE + bytes(PAGE)},
        {"a": bytes(2 * PAGE)},
        {"a": bytes(3)},
        {"b": bytes(3)},
        {},
    ] == states


def test_work_that_fails_or_does_less_than_was_said_is_told():
    with pytest.raises(AssertionError):
        list(killing.at_every_effect(lambda begin: 1 / 0, effects=0))
    with pytest.raises(AssertionError):
        list(killing.at_every_effect(lambda begin: begin(), effects=1))


@pytest.mark.parametrize("module", ["os", "fcntl"])
def test_whatever_the_backends_call_is_known_to_be_an_effect_or_none(module):
    places = Path(backends.__file__).parent
    text = "".join(
        path.read_text()
        for path in (*places.glob("*.py"), *places.glob("overlay/*.py"), *places.glob("vhd/*.py"))
    )
    called = set(re.findall(rf"\b{module}\.([a-z][a-z_]*)\b", text))
    effects = killing.EFFECTS[os if module == "os" else killing.fcntl]
    no_call = {"path", "environ", "stat_result"}
    elsewhere = {"fork", "kill", "waitid", "waitpid"}  # processes, which have their own tests
    assert set() == called - set(effects) - killing.TRACELESS - no_call - elsewhere - {"open"}
