"""Files for other programs: all of them or none, and nobody else's is lost."""

from __future__ import annotations

import os
import stat

import pytest

from xen_disk_py.errors import InstallError
from xen_disk_py.host.install import File, install, ours, remove
from xen_disk_py.host.program import unit_command


@pytest.fixture
def files(tmp_path):
    return [
        File(str(tmp_path / "a/first"), b"one", 0o755),
        File(str(tmp_path / "b/second"), b"two", 0o644),
    ]


def there(directory):
    """All files under a directory."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        for path in directory.rglob("*")
        if path.is_file()
    }


WHOLE = {"a/first": (b"one", 0o755), "b/second": (b"two", 0o644)}


def test_what_belongs_elsewhere():
    assert [
        ("/etc/xen/scripts/block-xen-disk", 0o755),
        ("/etc/systemd/system/xen-disk-serve.service", 0o644),
        ("/etc/systemd/system/xen-disk@.service", 0o644),
        ("/usr/local/share/bash-completion/completions/xen-disk", 0o644),
        ("/usr/local/share/zsh/site-functions/_xen-disk", 0o644),
        ("/etc/fish/completions/xen-disk.fish", 0o644),
        ("/usr/local/share/man/man8/xen-disk.8", 0o644),
    ] == [(file.path, file.mode) for file in ours("/", "")]
    script, *units, bash, zsh, fish, manual = ours("/opt/x/", ".TH ⇄")
    assert "/opt/x/etc/xen/scripts/block-xen-disk" == script.path
    assert script.content.startswith(b"#!/bin/sh\n")
    for unit in units:
        assert f"\nExecStart={unit_command()} " in unit.content.decode()
        assert b"@PROGRAM@" not in unit.content
    assert bash.content.endswith(b"\ncomplete -F _xen_disk xen-disk\n")
    assert zsh.content.startswith(b"#compdef xen-disk\n")
    assert b"complete -c xen-disk" in fish.content
    assert ".TH ⇄" == manual.content.decode()


def test_install_and_remove(tmp_path, files):
    first, second = (file.path for file in files)
    umask = os.umask(0o077)
    try:
        assert [f"installed {first}", f"installed {second}"] == install(files, force=False)
    finally:
        os.umask(umask)
    assert WHOLE == there(tmp_path)
    assert 0o755 == stat.S_IMODE((tmp_path / "a").stat().st_mode)  # for everybody, as the files
    assert [f"unchanged: {first}", f"unchanged: {second}"] == install(files, force=False)
    assert WHOLE == there(tmp_path)
    assert [f"removed {first}", f"removed {second}"] == remove(files, force=False)
    assert {} == there(tmp_path)
    assert [f"not there: {first}", f"not there: {second}"] == remove(files, force=False)


@pytest.mark.parametrize("change", [install, remove])
@pytest.mark.parametrize("other", [(b"two and more", 0o644), (b"two", 0o600)])
def test_a_file_that_differs(tmp_path, files, change, other):
    path = tmp_path / "b/second"
    path.parent.mkdir()
    path.write_bytes(other[0])
    path.chmod(other[1])
    with pytest.raises(InstallError, match=r"b/second is there and differs .*--force"):
        change(files, force=False)
    assert {"b/second": other} == there(tmp_path)
    said = change(files, force=True)
    assert said[1] == f"{'replaced' if change is install else 'removed'} {path}"
    assert (WHOLE if change is install else {}) == there(tmp_path)


@pytest.mark.parametrize("change", [install, remove])
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_is_no_file_is_left_alone(tmp_path, files, change, kind):
    path = tmp_path / "b/second"
    path.parent.mkdir()
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/nowhere")
    with pytest.raises(InstallError, match="no regular file: move it away"):
        change(files, force=True)
    assert {} == there(tmp_path)


@pytest.mark.parametrize("force", [False, True])
def test_half_done_is_undone(tmp_path, files, force, monkeypatch):
    """The second file fails; the first is as it was, and nothing lies about."""
    before = {}
    if force:
        install([files[0]._replace(content=b"older", mode=0o700)], force=False)
        before = {"a/first": (b"older", 0o700)}
    rename = os.rename

    def sometimes(source, path):
        if path == files[1].path:
            raise OSError(30, "Read-only file system")
        rename(source, path)

    monkeypatch.setattr("os.rename", sometimes)
    with pytest.raises(InstallError, match="second: Read-only file system; nothing was changed"):
        install(files, force=force)
    assert before == there(tmp_path)


def test_a_full_disk_leaves_no_half_file(tmp_path, files, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InstallError, match="No space left on device; nothing was changed"):
        install(files, force=False)
    assert {} == there(tmp_path)
