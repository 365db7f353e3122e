"""``info``: what something is and what lies below it; nothing is locked or changed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess

import pytest

from xen_disk_py.backends.image import Image
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.errors import XenUnavailable
from xen_disk_py.exit_status import ExitStatus

SIZE = 1 << 20


@pytest.fixture
def info():
    def info(*argv):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        status = main(["info", *map(str, argv)], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return info


@pytest.fixture
def told(info):
    def told(*argv):
        status, out, err = info(*argv, "--json")
        assert (ExitStatus.OK, "") == (status, err)
        return json.loads(out)

    return told


@pytest.fixture
def what(told):
    """Without what a guest would have of it."""

    def what(*argv):
        found = told(*argv)
        assert found.pop("guest") is None or found["refused"] is None
        del found["refused"]
        assert [] == found.pop("notes")
        return found

    return what


@pytest.fixture
def overlay(tmp_path, image):
    path = tmp_path / "changes"
    disk = OverlayBackend(str(image), overlay=str(path))
    disk.write([memoryview(b"x" * 1024)], 512)
    disk.close()
    return path


def test_an_image(what, image):
    found = what(image)
    assert found.pop("disk_usage") == found.pop("allocated") >= SIZE
    assert {
        "path": str(image),
        "format": "raw",
        "size": SIZE,
        "sector_size": 512,
        "in_use": False,
        "parent": None,
        "looks_like": None,
    } == found


def test_an_overlay_and_its_image(what, image, overlay):
    found = what(overlay)
    assert {
        "path": str(overlay),
        "format": "overlay",
        "size": SIZE,
        "sector_size": 512,
        "allocated": 4096,
        "disk_usage": os.stat(overlay).st_blocks * 512,
        "in_use": False,
        "fits": True,
        "differences": [],
        "committed": False,
        "parent": what(image),
    } == found


def test_for_people(info, image, overlay):
    status, out, err = info(overlay)
    assert (ExitStatus.OK, "") == (status, err)
    assert out.startswith(f"{overlay}\n  format      overlay\n")
    assert "\n  size        1 MiB (1048576 bytes)\n" in out
    assert "  fits        yes\n" in out
    assert f"\n{image}\n  format      raw\n" in out


@pytest.mark.parametrize("how", ["touched", "replaced", "longer"])
def test_what_differs_is_said(told, info, image, overlay, tmp_path, how):
    if how == "touched":
        os.utime(image)
    elif how == "replaced":
        shutil.copy2(image, tmp_path / "other")
        os.rename(tmp_path / "other", image)
    else:
        os.truncate(image, SIZE + 512)
    found = told(overlay)
    assert found["fits"] is False
    said = {
        "touched": "it was written since",
        "replaced": "it is another one",
        "longer": f"its size is {SIZE + 512} bytes, not {SIZE}",
    }[how]
    assert said in " ".join(found["differences"])
    assert f"fits        no: {found['differences'][0]}" in info(overlay)[1]


def test_an_image_that_is_not_there(told, info, image, overlay):
    os.unlink(image)
    found = told(overlay)
    assert (None, []) == (found["fits"], found["differences"])
    assert {"path": str(image), "error": "No such file or directory"} == found["parent"]
    assert "unknown: its image cannot be read" in info(overlay)[1]


def test_a_commit_that_was_killed(told, info, image, overlay, monkeypatch):
    monkeypatch.setattr(maintenance, "_finish", lambda *_: None)
    maintenance.commit(str(overlay), keep=False, progress=lambda *_: None)
    assert told(overlay)["committed"]
    assert "to finish it: xen-disk commit" in info(overlay)[1]


def test_a_vhd_and_its_parents(told, tmp_path, image):
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    base, child = str(tmp_path / "base.vhd"), str(tmp_path / "child.vhd")
    parent = ["--parent", str(image), "--parent-format", "raw"]
    assert ExitStatus.OK is main(["create", base, *parent], env)
    assert ExitStatus.OK is main(["create", child, "--parent", base], env)
    found = told(child)
    assert ("vhd", "differencing", SIZE, 0) == tuple(
        found[name] for name in ("format", "kind", "size", "allocated")
    )
    assert ("vhd", base) == (found["parent"]["format"], found["parent"]["path"])
    assert ("raw", str(image)) == tuple(
        found["parent"]["parent"][name] for name in ("format", "path")
    )


def test_a_parent_that_is_neither_file_nor_disk_is_not_opened(told, tmp_path):
    """To open a watchdog's device is to start it."""
    child, parent = tmp_path / "child.vhd", tmp_path / "parent.vhd"
    create(str(parent), SIZE)
    create_child(str(child), str(parent))
    parent.unlink()
    parent.symlink_to("/dev/full")
    assert "neither a file nor a block device" in told(child)["parent"]["error"]


def test_it_takes_no_lock_and_changes_nothing(told, image, overlay, monkeypatch):
    def flock(*_):
        raise AssertionError("a lock")

    disk = OverlayBackend(str(image), overlay=str(overlay))
    with contextlib.closing(disk), monkeypatch.context() as patch:
        before = os.stat(overlay).st_mtime_ns
        patch.setattr(fcntl, "flock", flock)
        found = told(overlay)
        assert found["in_use"]
        assert found["parent"]["in_use"]
        assert before == os.stat(overlay).st_mtime_ns
        disk.flush()
    with Image.open(str(image), writable=True):
        assert told(image)["in_use"]


def test_another_format_that_it_looks_like(told, image):
    with open(image, "r+b") as file:
        file.write(b"QFI\xfb")
    assert "qcow2" == told(image)["looks_like"]


def test_the_format_can_be_said(info, told, image, overlay):
    assert "raw" == told(overlay, "--format", "raw")["format"]
    status, _, err = info(image, "--format", "overlay")
    assert ExitStatus.ERROR is status
    assert "not an overlay" in err


@pytest.mark.parametrize("what", ["nothing", "directory", "pipe"])
def test_what_is_no_image(info, tmp_path, what):
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    status, out, err = info(path)
    assert (ExitStatus.ERROR, "") == (status, out)
    assert str(path) in err


# what has to be asked of others


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@needs("qemu-img")
def test_a_qcow2_and_its_backing_files(told, info, tmp_path):
    base, path = str(tmp_path / "base.raw"), str(tmp_path / "a.qcow2")
    with open(base, "wb") as file:
        file.truncate(SIZE)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, "2M"]
    subprocess.run(words, check=True)
    found = told(path, "--format", "qcow2")
    parent = found["parent"]
    assert (path, "qcow2", 2 * SIZE, False) == tuple(
        found[name] for name in ("path", "format", "size", "in_use")
    )
    assert (base, "raw", SIZE, None) == tuple(
        parent[name] for name in ("path", "format", "size", "parent")
    )
    assert f"  parent      {base}" in info(path, "--format", "qcow2")[1].splitlines()
    os.unlink(base)
    status, out, err = info(path, "--format", "qcow2")
    assert (ExitStatus.ERROR, "", 1) == (status, out, err.count("\n"))
    assert base in err


def test_a_program(told, info, tmp_path):
    path = tmp_path / "mydisk.py"
    path.write_text(
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    size = 8192\n"
        "    read_only = True\n"
        "    def read(self, buffers, offset): pass\n",
        encoding="ascii",
    )
    found = told(path)
    assert ("python", 8192, None) == (found["format"], found["size"], found["in_use"])
    assert [
        "  format      python",
        "  size        8 KiB (8192 bytes)",
        "  sectors     512 bytes",
    ] == (info(path)[1].splitlines()[1:4])


@needs("nbdkit")
def test_a_servers_disk(info):
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))
    status, out, err = info("[ nbdkit memory 8M ]", "--json")
    assert (ExitStatus.OK, "") == (status, err)
    found = json.loads(out)
    assert ("nbd", 8 << 20, None) == (found["format"], found["size"], found["allocated"])


RAM = """
disk = bytearray(1 << 20)
def config(key, value): disk[:] = bytes([int(value)]) * len(disk)
def open(readonly): assert readonly
def get_size(h): return len(disk)
def pread(h, count, offset): return disk[offset : offset + count]
"""


def test_a_disk_that_a_python_file_defines(what, info, tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(RAM)
    assert {
        "path": str(path),
        "format": "python",
        "size": SIZE,
        "sector_size": 512,
        "allocated": None,
        "disk_usage": None,
        "in_use": None,
        "parent": None,
    } == what(path, "byte=7")
    _, out, _ = info(path)
    assert [
        str(path),
        "  format      python",
        "  size        1 MiB (1048576 bytes)",
        "  sectors     512 bytes",
    ] == out.splitlines()[:4]


def test_a_raw_image_has_no_options(info, image):
    status, _, err = info(image, "byte=7")
    assert ExitStatus.USAGE == status
    assert "takes no --option byte=…" in err


def test_what_is_not_there_is_said_with_what_to_do(info, tmp_path):
    status, _, err = info(tmp_path / "gone.vhd")
    assert status is ExitStatus.ERROR
    assert "gone.vhd: no such file: check the name" in err
    status, _, err = info("http://example.org/disk.raw")
    assert status is ExitStatus.ERROR
    assert "[ nbdkit --exit-with-parent curl http://example.org/disk.raw ]" in err


def test_a_command_with_half_a_pair_of_quotation_marks(info):
    status, _, err = info("[ nbdkit 'memory ]")
    if "libnbd" in err:
        pytest.skip("no libnbd here")
    assert status is ExitStatus.USAGE
    assert "No closing quotation: quote it as in a shell" in err


# what a guest would have


def test_of_an_image_as_connect_serves_it(told, image):
    assert {
        "backend": "cow",
        "size": SIZE,
        "sector_size": 512,
        "physical_sector_size": 4096,
        "read_only": False,
        "flush": True,
        "discard": True,
        "secure_discard": False,
        "discard_granularity": 4096,
        "requests": 16,
        "queues": 8,
        "survives": False,
        "filters": [],
    } == told(image)["guest"]
    assert told(image, "--backend", "raw")["guest"]["survives"]


@pytest.mark.parametrize("kind", ["raw", "mmap", "vhd", "overlay"])
def test_it_is_what_a_disk_that_is_open_says(told, tmp_path, image, kind):
    """Of a disk that is in use: whoever has it can say what is true."""
    path, words = str(image), []
    if kind == "vhd":
        path = str(tmp_path / "a.vhd")
        create(path, SIZE)
        disk = open_backend("vhd", {"path": path})
    elif kind == "overlay":
        path = str(tmp_path / "changes")
        disk = open_backend("overlay", {"path": str(image), "overlay": path})
    else:
        words = ["--backend", kind]
        disk = open_backend(kind, {"path": path})
    with contextlib.closing(disk):
        guest = told(path, *words)["guest"]
        assert (disk.can_discard, disk.discard_granularity, disk.threads, disk.size) == (
            guest["discard"],
            guest["discard_granularity"],
            guest["requests"],
            guest["size"],
        )
        names = ("sector_size", "physical_sector_size", "read_only", "survives")
        assert [getattr(disk, name) for name in names] == [guest[name] for name in names]


def test_with_filters(told, info, image, tmp_path):
    log = tmp_path / "requests"
    words = ["--filter=offset:start=64K", "--filter=powercut:seed=7", f"--filter=log:file={log}"]
    guest = told(image, "--backend=raw", *words)["guest"]
    assert (SIZE - (64 << 10), False) == (guest["size"], guest["survives"])
    assert ["offset", "powercut", "log"] == [each["name"] for each in guest["filters"]]
    assert "64K" == guest["filters"][0]["settings"]["start"]
    assert f"  filter 3    log file={log},format=text,on=yes" in info(image, *words)[1].splitlines()
    assert not log.exists()


def test_a_filter_that_cannot_be(info, image):
    status, out, err = info(image, "--filter=partition:number=1")
    assert (ExitStatus.ERROR, "", 1) == (status, out, err.count("\n"))
    assert "partition" in err


def test_what_connect_would_refuse(told, info, image):
    os.truncate(image, SIZE + 100)
    assert told(image)["guest"] is None
    assert "not a multiple of 512" in told(image)["refused"]
    assert "\nconnect refuses it: its size, " in info(image)[1]


def test_what_a_python_file_says_of_itself(told, tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(RAM)
    guest = told(path, "byte=7")["guest"]
    assert (None, False, "python") == (guest["read_only"], guest["discard"], guest["backend"])


@needs("nbdkit")
def test_what_a_server_says(info):
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))
    _, out, _ = info("[ nbdkit -r memory 8M ]", "--filter=delay:read=1ms", "--json")
    guest = json.loads(out)["guest"]
    assert (True, False, 64, False) == tuple(
        guest[name] for name in ("read_only", "discard", "requests", "survives")
    )
    _, out, _ = info("[ nbdkit memory 8M ]")
    assert "  requests    many at a time, in up to 1 queue" in out.splitlines()
    assert "  discard     yes, of 4 KiB" in out.splitlines()


@needs("qemu-img", "qemu-nbd")
def test_a_qcow2_that_is_in_use(told, tmp_path):
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))
    path = str(tmp_path / "a,b.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "2M"], check=True)
    with contextlib.closing(open_backend("qemu", {"path": path, "format": "qcow2"})) as disk:
        before = os.stat(path).st_mtime_ns
        found = told(path, "--format=qcow2", "--filter=offset:start=1M")
        assert (True, SIZE, True) == (
            found["in_use"],
            found["guest"]["size"],
            found["guest"]["discard"],
        )
        assert before == os.stat(path).st_mtime_ns
        disk.flush()
