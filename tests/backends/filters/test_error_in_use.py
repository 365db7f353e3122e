"""``error`` while a guest uses the disk: each setting, and the guest's disk lives on."""

from __future__ import annotations

import pytest

from xen_disk_py.backends import stack
from xen_disk_py.backends.loader import wrap


@pytest.fixture
def served(host):
    """Serve a disk with a filter; give a way to ask as the guest, and one to change settings."""

    def served(text):
        disk = wrap(host.memory(), [f"error:{text}"])
        serving = host.serving(disk, "xvdb")
        frontend = serving.frontend()
        calls = {
            "read": lambda offset: frontend.read(offset, 4096),
            "write": lambda offset: frontend.write(offset, b"x" * 4096),
            "flush": lambda offset: frontend.flush(),
            "discard": lambda offset: frontend.discard(offset, 4096),
        }

        def ask(operation, offset=0):
            try:
                calls[operation](offset)
            except OSError:
                return "error"
            return "ok"

        def change(*changes):
            stack.change([disk], disk, changes, lambda texts: None)
            serving.disk.bind()

        return ask, change

    return served


def test_it_is_armed_by_a_file(served, tmp_path):
    ask, change = served(f"armed={tmp_path}/armed,operations=read")
    found = [ask("read")]
    (tmp_path / "armed").touch()
    found.append(ask("read"))
    (tmp_path / "armed").unlink()
    found.append(ask("read"))
    change("armed=yes")
    found.append(ask("read"))
    change("armed=no")
    found.append(ask("read"))
    assert ["ok", "error", "ok", "error", "ok"] == found


@pytest.mark.parametrize("sticky", [True, False])
def test_it_stays_or_passes(served, sticky):
    ask, change = served(f"every=3,operations=read,sticky={'yes' if sticky else 'no'}")
    assert ["ok", "ok", "error"] == [ask("read") for _ in range(3)]
    assert [("error" if sticky else "ok")] * 2 == [ask("read") for _ in range(2)]
    change("every=3")
    assert "ok" == ask("read")


@pytest.mark.parametrize("operation", ["read", "write", "discard"])
def test_only_that_operation_in_that_range(served, operation):
    ask, change = served(f"operations={operation},range=64K-128K")
    for each in ("read", "write", "discard"):
        assert ("error" if each == operation else "ok") == ask(each, 65536)
        assert "ok" == ask(each, 131072)
    assert "ok" == ask("flush")
    change("range=0-4K")
    assert ("ok", "error") == (ask(operation, 65536), ask(operation, 0))


def test_so_often_as_the_seed_draws_it(served):
    ask, change = served("rate=0.5,operations=read,seed=4")
    first = [ask("read") for _ in range(40)]
    change("seed=4")
    assert first == [ask("read") for _ in range(40)]
    assert {"ok", "error"} == set(first)
    change("rate=0")
    assert {"ok"} == {ask("read") for _ in range(10)}


def test_with_that_errno(served, caplog):
    ask, change = served("errno=ENOSPC,operations=write")
    assert "error" == ask("write")
    assert "No space left on device (the error filter)" in caplog.text
    change("errno=EROFS")
    assert "error" == ask("write")
    assert "Read-only file system (the error filter)" in caplog.text
