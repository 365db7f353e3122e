"""A file for changes in memory has no name that a stranger could use first."""

from __future__ import annotations

import os
import stat

import pytest

from xen_disk_py.recovery import temporary


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_MEMORY", str(tmp_path))
    return tmp_path


def test_nobody_else_can_make_the_file_first(memory):
    path = temporary.new_path()
    assert not os.path.exists(path)
    status = os.stat(os.path.dirname(path))
    assert (os.geteuid(), 0o700) == (status.st_uid, stat.S_IMODE(status.st_mode))
    assert path != temporary.new_path()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_nobody_cannot_enter(memory):
    path = temporary.new_path()
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            open(path, "w").close()
    finally:
        os.seteuid(0)


def test_it_goes_with_its_directory(memory):
    path = temporary.new_path()
    open(path, "w").close()
    temporary.remove(path)
    assert [] == os.listdir(memory)
    temporary.remove(path)


def test_one_that_was_never_made_goes_too(memory):
    temporary.remove(temporary.new_path())
    assert [] == os.listdir(memory)


def test_the_directory_of_another_file_stays(memory):
    (memory / "mine").mkdir()
    (memory / "mine/changes.overlay").touch()
    temporary.remove(str(memory / "mine/changes.overlay"))
    assert ["mine"] == os.listdir(memory)


def test_nothing_else_is_removed(memory, tmp_path):
    """A record says what; whoever has got into a process without privileges can write that."""
    others = [
        tmp_path / "shadow",
        memory / "changes.overlay",
        memory / "mine" / "changes.overlay",
        memory / "xen_disk_py-1" / "shadow",
        memory / "xen_disk_py-1" / "deeper" / "changes.overlay",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        temporary.remove(str(path))
    temporary.remove(str(memory / "xen_disk_py-1" / ".." / "mine" / "changes.overlay"))
    assert [True] * len(others) == [path.exists() for path in others]
