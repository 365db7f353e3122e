"""nbdkit serves each of our disks, and other programs read what we wrote."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import traceback
import types
from contextlib import closing

import pytest

import xen_disk_py
from xen_disk_py.backends.nbd import NbdBackend
from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.errors import ImageError, UsageError, XenUnavailable
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import record
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.spec import DiskSpec
from xen_disk_py.xenbus.states import Address
from xen_disk_py.xenbus.toolstack import Domain
from xen_disk_py.xenbus.vdev import parse

pytestmark = pytest.mark.shared

MIB = 1 << 20
PLUGIN = os.path.join(os.path.dirname(xen_disk_py.__file__), "nbdkit_plugin.py")
PATIENCE = 60.0

ROT13 = """
from xen_disk_py.backends.filter import Filter

class Rot(Filter):
    def read(self, buffers, offset):
        for buffer in buffers:
            self.source.read([buffer], offset)
            buffer[:] = bytes(byte ^ 13 for byte in buffer)
            offset += len(buffer)

    def write(self, buffers, offset):
        self.source.write([bytes(byte ^ 13 for byte in b"".join(buffers))], offset)
"""


def missing() -> str:
    """Say what this machine lacks; empty if nothing."""
    for program in ("nbdkit", "qemu-img"):
        if shutil.which(program) is None:
            return f"needs {program}"
    if subprocess.run(
        ["nbdkit", "python", "--version"], capture_output=True, check=False
    ).returncode:
        return "needs nbdkit's Python (Debian: nbdkit-plugin-python)"
    try:
        NBD.load()
    except XenUnavailable as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def nbdkit():
    reason = missing()
    if reason:
        pytest.skip(reason)


def qemu_img(*words):
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def raw(directory):
    path = directory / "disk.raw"
    path.write_bytes(bytes(2 * MIB))
    return [f"path={path}", "backend=raw"], ("raw", path)


def qcow2(directory):
    path = directory / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "2M")
    return [f"path={path}", "format=qcow2"], ("qcow2", path)


def vhd(directory):
    path = directory / "disk.vhd"
    qemu_img("create", "-q", "-f", "vpc", "-o", "force_size=on", path, "2M")
    return [f"path={path}", "format=vhd"], ("vpc", path)


def overlay(directory):
    words, _ = raw(directory)
    return [words[0], f"overlay={directory / 'changes'}"], None


def cow(directory):
    words, _ = raw(directory)
    return words[:1], None


def filtered(directory):
    (directory / "rot.py").write_text(ROT13)
    words, _ = raw(directory)
    return [*words, f"filter={directory / 'rot.py'}", "filter=delay:read=0,write=0"], None


def plugin(directory):
    """nbdkit's Python serves a disk of ours that is a plugin for nbdkit's Python."""
    path = directory / "ram.py"
    path.write_text(
        "disk = bytearray(2 << 20)\n"
        "def config(key, value): disk[0] = int(value)\n"
        "def open(readonly): return 1\n"
        "def get_size(h): return len(disk)\n"
        "def pread(h, count, offset): return disk[offset:offset + count]\n"
        "def pwrite(h, buf, offset): disk[offset:offset + len(buf)] = buf\n"
    )
    return [f"path={path}", "first=0"], None


@pytest.mark.parametrize("make", [raw, qcow2, vhd, overlay, cow, filtered, plugin])
def test_each_format_through_nbdkit_is_what_qemu_reads(nbdkit, tmp_path, make):
    words, direct = make(tmp_path)
    socket, expected = tmp_path / "socket", tmp_path / "expected.raw"
    command = ["nbdkit", "-f", "--exit-with-parent", "python", PLUGIN, *words]
    dice, content, found = random.Random(1), bytearray(2 * MIB), bytearray(2 * MIB)
    disk = NbdBackend(command)
    try:
        assert (2 * MIB, False) == (disk.size, disk.read_only)
        disk.read([memoryview(content)], 0)
        for _ in range(40):
            length = 512 * dice.randint(1, 64)
            offset = 512 * dice.randint(0, (2 * MIB - length) // 512)
            data = dice.randbytes(length) if dice.random() < 0.7 else bytes(length)
            disk.write([memoryview(data)], offset)
            content[offset : offset + length] = data
        disk.flush()
        disk.read([memoryview(found)], 0)
        assert content == found
        expected.write_bytes(content)
    finally:
        disk.close()
    if direct is not None:
        qemu_img("compare", "-f", direct[0], "-F", "raw", str(direct[1]), str(expected))
    elif make is overlay:
        run = f'qemu-img compare -f raw -F raw "$uri" {expected}'
        command = ["nbdkit", "-r", "-U", str(socket), "python", PLUGIN, *words, "--run", run]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# -- the command ---------------------------------------------------------------------------


def test_the_command_prints_the_path():
    env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
    assert ExitStatus.OK == main(["nbdkit-plugin"], env)
    assert f"{PLUGIN}\n" == env.stdout.getvalue()


# -- without nbdkit: the functions ---------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """The plugin as nbdkit runs it, with the functions of nbdkit that it calls."""
    errors = []
    names = {"THREAD_MODEL_PARALLEL": 3, "FUA_EMULATE": 1, "set_error": errors.append}
    monkeypatch.setitem(sys.modules, "nbdkit", types.SimpleNamespace(**names))
    module = types.ModuleType("__main__")
    module.__file__ = PLUGIN
    with open(PLUGIN, encoding="utf-8") as file:
        exec(compile(file.read(), PLUGIN, "exec"), vars(module))
    del module.__file__  # Python has it while it runs the file only
    module.errors = errors
    yield module
    module.cleanup()


def test_every_client_has_the_same_disk(served, tmp_path):
    for word in raw(tmp_path)[0]:
        served.config(*word.split("="))
    served.config_complete()
    disk = served.open(False)
    assert disk is served.open(False)
    assert (3, 1, True, True, True, True) == (
        served.thread_model(),
        served.can_fua(disk),
        served.can_write(disk),
        served.can_flush(disk),
        served.can_trim(disk),
        served.can_multi_conn(disk),
    )
    assert (512, 4096, 32 * MIB) == served.block_size(disk)
    served.pwrite(disk, memoryview(b"x" * 512), 512, 0)
    served.flush(disk, 0)
    page = bytearray(512)
    served.pread(disk, memoryview(page), 512, 0)
    assert b"x" * 512 == page


def test_a_trim_is_of_whole_sectors(served, tmp_path):
    for word in raw(tmp_path)[0]:
        served.config(*word.split("="))
    disk = served.open(False)
    trimmed = []
    disk.discard = lambda *extent: trimmed.append(extent)
    for count, offset in ((1000, 0), (1000, 100), (511, 0), (4096, 4096)):
        served.trim(disk, count, offset, 0)
    assert [(0, 512), (512, 512), (4096, 4096)] == trimmed


def test_a_client_that_asks_for_less_than_a_sector_is_told(served, tmp_path):
    for word in raw(tmp_path)[0]:
        served.config(*word.split("="))
    disk = served.open(True)
    assert not served.can_write(disk)
    with pytest.raises(ValueError, match="--filter=blocksize"):
        served.pread(disk, memoryview(bytearray(100)), 0, 0)
    assert [22] == served.errors


def test_an_error_keeps_its_number(served):
    served.config("backend", "discard")
    disk = served.open(False)

    def full(buffers, offset):
        raise OSError(28, "full")

    disk.write = full
    with pytest.raises(OSError, match="full"):
        served.pwrite(disk, memoryview(bytes(512)), 0, 0)
    assert [28] == served.errors


def test_its_words_are_those_of_the_command_line(served):
    served.config("format", "qcow3")
    with pytest.raises(UsageError, match="qcow3"):
        served.config_complete()


def test_a_flag_has_one_value(served):
    served.config("read_only", "yes")
    with pytest.raises(ValueError, match="the only value is yes"):
        served.config("read-only", "no")
    assert not served.can_write(served.open(False))


def test_what_is_wrong_with_the_disk_is_said_without_the_frames_below(served, tmp_path):
    served.config("path", str(tmp_path / "gone.raw"))
    with pytest.raises(ImageError, match="no such file") as raised:
        served.open(readonly=False)
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert {"test_nbdkit_plugin.py", "nbdkit_plugin.py"} == {
        os.path.basename(frame.filename) for frame in frames
    }
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_other_keys_are_the_disks_own(served, tmp_path):
    words = plugin(tmp_path)[0]
    for word in words:
        served.config(*word.split("="))
    assert ["demo", f"--path={tmp_path / 'ram.py'}", "--option=first=0"] == served._words
    assert 2 * MIB == served.get_size(served.open(False))


def test_the_disk_of_a_process_that_died_is_left_to_its_successor(served, tmp_path, monkeypatch):
    path, address = tmp_path / "disk.raw", Address(0, 5, 51728, "vbd3")
    path.write_bytes(bytes(MIB))
    records = str(tmp_path / "records")
    monkeypatch.setattr(record, "DIRECTORY", records)
    spec = DiskSpec(directory="/", backend="raw", path=str(path))
    with closing(spec.open_disk()) as disk:
        one = record.Record(records, address)
        facts = Facts.about(spec, Domain(5, "guest", ""), parse("xvdb"), disk)
        one.describe(facts._replace(pid=999_999_999))
        one.leave()
    served.config("path", str(path))
    served.config("backend", "raw")
    with pytest.raises(ImageError, match="whose process has died"):
        served.open(False)
    served.config("force", "yes")
    assert MIB == served.get_size(served.open(False))
    record.forget(records, address)


def test_pyxs_is_not_needed(tmp_path):
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    code = f"""
import sys
sys.modules["pyxs"] = None  # as where it is not installed
import importlib.util
spec = importlib.util.spec_from_file_location("plugin", {PLUGIN!r})
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)
plugin.config("path", "disk.raw")
plugin.config("backend", "raw")
disk = plugin.open(False)
print(plugin.get_size(disk))
try:
    plugin._open_store()
except plugin._load("errors").XenUnavailable as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [str(MIB), "import of pyxs halted; None in sys.modules"] == ran.stdout.splitlines()
