"""What commands make has its name when it is on stable storage, and not before: after a power cut
at any moment there is the new file, whole, or what was there.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess

import pytest
from recorded import SIZE, header, make, stopped, write

from xen_disk_py.backends import holes, newfile, trim
from xen_disk_py.backends.overlay import file as overlay_file
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus


class Storage:
    """Watches a process: which files have what is not stored, which names are not."""

    def __init__(self, monkeypatch, *, syncs=True):
        self.names, self.early = [], []
        self.unstored = set()  # inodes of files and, for their names, of directories
        self._syncs = syncs
        for name in ("pwrite", "pwritev", "ftruncate", "write"):
            monkeypatch.setattr(os, name, self._changing(getattr(os, name)))
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        for module in (holes, trim, overlay_file):
            monkeypatch.setattr(module, "punch_hole", self._changing(module.punch_hole))
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._syncing(getattr(os, name)))
        for name in ("link", "rename"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))
        monkeypatch.setattr(subprocess, "Popen", self._starting(subprocess.Popen))

    def _changing(self, real):
        def change(fd, *args):
            self.unstored.add(os.fstat(fd).st_ino)
            return real(fd, *args)

        return change

    def _starting(self, real):
        def start(*args, pass_fds=(), **options):
            self.unstored.update(os.fstat(fd).st_ino for fd in pass_fds)
            return real(*args, pass_fds=pass_fds, **options)

        return start

    def _syncing(self, real):
        def sync(fd):
            real(fd)
            if self._syncs:
                self.unstored.discard(os.fstat(fd).st_ino)

        return sync

    def _naming(self, real):
        def name(old, new, **options):
            real(old, new, **options)
            if not newfile._HIDDEN.fullmatch(os.path.basename(new)):
                self.names.append(os.path.basename(new))
                if os.stat(new).st_ino in self.unstored:
                    self.early.append(os.path.basename(new))
                self.unstored.add(os.stat(os.path.dirname(os.path.abspath(new))).st_ino)

        return name


QEMU_IMG = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
EXPORT = ("export", "--format", "raw", "base.raw", "new", "--output-format")
COMMANDS = [
    ("create", "new", "--size", "1M"),
    ("create", "new", "--size", "1M", "--fixed"),
    ("create", "new", "--parent", "base.raw", "--parent-format", "raw"),
    (*EXPORT, "raw"),
    (*EXPORT, "vhd"),
    pytest.param((*EXPORT, "qcow2"), marks=QEMU_IMG),
    ("export", "--format", "raw", "base.raw", "there", "--force"),
    ("rewind", "t.xdt", "--base", "base.raw", "--at", "end", "-o", "new"),
    ("rewind", "t.xdt", "--base", "base.raw", "--at", "end", "--overlay", "new"),
    ("commit", "changes", "--path", "base.raw"),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o700)
    base = tmp_path / "base.raw"
    base.write_bytes(b"\1" * SIZE)
    (tmp_path / "there").write_bytes(b"old")
    make(tmp_path / "t.xdt", header(base), [write(0, 1, 0, b"a" * 1024), stopped(9)])

    def run(*words):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        return main(list(words), env), env.stderr.getvalue()

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_name_comes_after_what_it_names_and_stays(run, tmp_path, monkeypatch, command):
    if command[0] == "commit":
        run("rewind", "t.xdt", "--base", "base.raw", "--at", "end", "--overlay", "changes")
    with monkeypatch.context() as patch:
        storage = Storage(patch)
        assert (ExitStatus.OK, "") == run(*command)
    assert storage.names or command[0] == "commit"
    assert [] == storage.early
    there = [tmp_path, *tmp_path.iterdir()]
    assert [] == [path.name for path in there if path.stat().st_ino in storage.unstored]


@pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[3], COMMANDS[7]], ids=" ".join)
def test_a_command_whose_storage_lies_is_found(run, monkeypatch, command):
    with monkeypatch.context() as patch:
        storage = Storage(patch, syncs=False)
        run(*command)
    assert ["new"] == storage.early
