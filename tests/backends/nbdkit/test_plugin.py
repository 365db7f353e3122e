"""A module that nbdkit's Python would serve is a disk."""

from __future__ import annotations

import errno
import os
import sys
import textwrap

import pytest

from backends.blocks import read, write
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.errors import BackendError, UsageError

RAM = """
import nbdkit

API_VERSION = 2
calls = []
disk = None

def config(key, value):
    global disk
    calls.append(("config", key, value))
    if key == "size":
        disk = bytearray(nbdkit.parse_size(value))

def open(readonly):
    calls.append(("open", readonly))
    return "handle"

def get_size(h):
    return len(disk)

def pread(h, buf, offset, flags):
    calls.append(("pread", h, len(buf), offset, flags))
    buf[:] = disk[offset : offset + len(buf)]

def pwrite(h, buf, offset, flags):
    calls.append(("pwrite", h, len(buf), offset, flags))
    disk[offset : offset + len(buf)] = buf

def flush(h, flags):
    calls.append(("flush", h, flags))

def trim(h, count, offset, flags):
    calls.append(("trim", h, count, offset, flags))
    disk[offset : offset + count] = bytes(count)
"""

FIRST_VERSION = """
disk = bytearray(1 << 20)

def open(readonly):
    return 1

def get_size(h):
    return len(disk)

def pread(h, count, offset):
    return disk[offset : offset + count]

def pwrite(h, buf, offset):
    disk[offset : offset + len(buf)] = buf

def flush(h):
    pass

def trim(h, count, offset):
    disk[offset : offset + count] = bytes(count)
"""


@pytest.fixture
def plugin(tmp_path):
    """Open a plugin of this text: the disk, whose ``module`` the plugin is."""
    disks = []

    def make(text, *settings, name="plugin.py", export="", **options):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        disk = open_backend(None, {"path": f"{path}{export}", **options}, pairs=settings)
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        disk.close()


class TestSecondVersion(BackendConformance):
    @pytest.fixture(autouse=True)
    def _plugin(self, plugin):
        self.plugin = plugin

    def open_disk(self, tmp_path):
        return self.plugin(RAM, "size=4M")


class TestFirstVersion(TestSecondVersion):
    def open_disk(self, tmp_path):
        return self.plugin(FIRST_VERSION)


class TestParallel(TestSecondVersion):
    def open_disk(self, tmp_path):
        return self.plugin(
            RAM + "\ndef thread_model(): return nbdkit.THREAD_MODEL_PARALLEL\n", "size=4M"
        )


def test_it_is_called_as_by_nbdkit(plugin):
    disk = plugin(RAM, "size=1M", "access-key=a=b", "size=2M")
    write(disk, 4096, bytes(512))
    read(disk, 4096, 512)
    disk.flush()
    disk.discard(8192, 4096)
    assert [
        ("config", "size", "1M"),
        ("config", "access-key", "a=b"),
        ("config", "size", "2M"),
        ("open", False),
        ("pwrite", "handle", 512, 4096, 0),
        ("pread", "handle", 512, 4096, 0),
        ("flush", "handle", 0),
        ("trim", "handle", 4096, 8192, 0),
    ] == disk.module.calls


def test_its_life_is_that_under_nbdkit(plugin):
    names = (
        "config_complete thread_model get_ready after_fork preconnect default_export close cleanup"
    )
    more = "".join(
        f"\ndef {name}(*args): calls.append(({name!r}, *args))" for name in names.split()
    )
    disk = plugin(RAM + more, "size=1M", read_only=True)
    disk.close()
    disk.close()
    assert [
        ("config", "size", "1M"),
        ("config_complete",),
        ("thread_model",),
        ("get_ready",),
        ("after_fork",),
        ("preconnect", True),
        ("default_export", True, False),
        ("open", True),
        ("close", "handle"),
        ("cleanup",),
    ] == disk.module.calls


NAMED = """
import nbdkit
def open(readonly): return nbdkit.export_name().encode()
def get_size(h): return 512
def pread(h, count, offset): return h.ljust(count)
"""


@pytest.mark.parametrize(
    ("export", "more", "name"),
    [
        ("", "", b""),
        (":other", "", b"other"),
        ("", "def default_export(readonly, is_tls): return 'first'", b"first"),
        (":other", "def default_export(readonly, is_tls): return 'first'", b"other"),
    ],
)
def test_the_name_behind_the_path_is_that_of_the_export(plugin, export, more, name):
    assert name.ljust(512) == read(plugin(NAMED + more, export=export), 0, 512)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", (False, True, True)),
        ("def can_write(h): return False", (True, True, True)),
        ("def can_write(h): return 1", (True, True, True)),
        ("def can_trim(h): return False", (False, False, True)),
        ("def can_flush(h): return False", (False, True, False)),
        ("del pwrite", (True, True, True)),
        ("del trim", (False, False, True)),
        ("del flush", (False, True, False)),
        ("flush = 3", (False, True, False)),
    ],
)
def test_what_it_can_is_what_it_says_or_has(plugin, more, expected):
    disk = plugin(f"{RAM}\n{more}", "size=1M")
    disk.flush()
    did = ("flush", "handle", 0) in disk.module.calls
    assert expected == (disk.read_only, disk.can_discard, did)


def test_one_with_fua_and_no_flush_is_asked_for_that(plugin):
    disk = plugin(RAM + "\ndel flush\ndef can_fua(h): return nbdkit.FUA_NATIVE", "size=1M")
    write(disk, 0, bytes(512))
    disk.discard(0, 512)
    flags = [call[-1] for call in disk.module.calls if call[0] in ("pwrite", "trim")]
    assert [2, 2] == flags


def test_block_sizes_are_kept_to(plugin):
    disk = plugin(RAM + "\ndef block_size(h): return 1024, 4096, 16384", "size=1M")
    assert (1024, 4096) == (disk.sector_size, disk.physical_sector_size)
    write(disk, 1024, bytes(40 << 10))
    lengths = [call[2] for call in disk.module.calls if call[0] == "pwrite"]
    assert [16384, 16384, 8192] == lengths


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("def get_size(h): return 1000", "1000 bytes, not a positive multiple of the sector, 512"),
        ("def get_size(h): return -1", "-1 bytes"),
        ("def get_size(h): return 1.5", "TypeError"),
        ("def block_size(h): return 65536, 65536, 65536", "smallest request is 65536"),
        ("def block_size(h): return 3, 65536, 65536", "block_size returned"),
        ("def block_size(h): return 1", "TypeError"),
        ("API_VERSION = 3", "API_VERSION is 3"),
        ("API_VERSION = 'x'", "API_VERSION is 'x'"),
        ("def default_export(*args): return 3", "default_export returned 3"),
        (
            "def open(readonly): raise ValueError('not today')",
            "plugin.py:36: ValueError: not today",
        ),
        ("def config_complete(): raise ValueError('no url')", "plugin.py:36: ValueError: no url"),
    ],
)
def test_one_that_is_no_disk_is_refused_in_a_line(plugin, more, message):
    with pytest.raises(BackendError) as caught:
        plugin(f"{RAM}\n{more}", "size=1M")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "settings", "options", "message"),
    [
        (FIRST_VERSION, ["size=1M"], {}, "size=1M: the plugin takes no settings"),
        (RAM, ["1size=1M"], {}, "1size=1M: write it as name=value"),
        (
            RAM,
            [],
            {"size": "1M"},
            "takes no --size; what it takes stands behind its path as size=…",
        ),
    ],
)
def test_wrong_settings_are_an_error_of_usage(plugin, text, settings, options, message):
    with pytest.raises(UsageError) as caught:
        plugin(text, *settings, **options)
    assert message in str(caught.value)


def test_what_was_opened_is_closed_when_the_disk_is_refused(plugin, capsys):
    more = """
def get_size(h): return 7
def close(h): print("close", h)
def cleanup(): raise RuntimeError("this error says less")
"""
    with pytest.raises(BackendError, match="7 bytes"):
        plugin(RAM + more)
    assert "close handle\n" == capsys.readouterr().out


# -- errors --------------------------------------------------------------------------------

FAILING = """
def pread(h, buf, offset, flags):
    if offset == 0:
        nbdkit.set_error(28)
        raise RuntimeError("full")
    if offset == 512:
        nbdkit.set_error(110)
    if offset == 1024:
        raise RuntimeError("no reason given")
"""


def test_an_error_has_the_number_that_was_set(plugin):
    disk = plugin(RAM + FAILING, "size=1M")
    with pytest.raises(OSError, match="RuntimeError: full") as caught:
        read(disk, 0, 512)
    assert errno.ENOSPC == caught.value.errno


def test_an_error_that_was_set_counts_though_nothing_is_raised(plugin):
    """nbdkit takes that for success, and the client for data."""
    disk = plugin(RAM + FAILING, "size=1M")
    with pytest.raises(
        OSError, match=r"pread called nbdkit\.set_error, and raised nothing"
    ) as caught:
        read(disk, 512, 512)
    assert errno.ETIMEDOUT == caught.value.errno
    with pytest.raises(RuntimeError, match="no reason given"):
        read(disk, 1024, 512)
    assert bytes(512) == read(disk, 1536, 512)  # what an error was set for is over


def test_too_little_data_is_an_error(plugin):
    disk = plugin(FIRST_VERSION.replace("offset + count]", "offset + count - 1]"))
    with pytest.raises(OSError, match="511 of 512 bytes"):
        read(disk, 0, 512)


def test_what_it_keeps_of_a_request_is_its_own(plugin):
    disk = plugin(
        RAM.replace(
            "def pread(h, buf, offset, flags):", "def pread(h, buf, offset, flags):\n    keep(buf)"
        ).replace(
            "def pwrite(h, buf, offset, flags):",
            "def pwrite(h, buf, offset, flags):\n    keep(buf)",
        )
        + "\nkept = []\nkeep = kept.append\n",
        "size=1M",
    )
    page = bytearray(b"1" * 512)
    disk.write([memoryview(page)], 0)
    page[:] = b"2" * 512
    disk.read([memoryview(page)], 0)
    page += b"not exported"  # a buffer that somebody has cannot grow
    assert [b"1" * 512] * 2 == [bytes(buffer) for buffer in disk.module.kept]
    assert disk.module.kept[0].readonly


# -- loading -------------------------------------------------------------------------------


def test_a_module_beside_it_does_not_take_the_place_of_nbdkit(plugin, tmp_path, monkeypatch):
    (tmp_path / "nbdkit.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert 1 << 20 == plugin(RAM, "size=1M").size


def test_a_class_that_is_a_disk_counts_more_than_functions(plugin):
    text = """
    from xen_disk_py.backends import Backend

    class Mine(Backend):
        size = 512
        def read(self, buffers, offset): pass
        write = read

    def open(readonly): pass
    get_size = pread = open
    """
    assert "Mine" == type(plugin(text)).__name__


def test_a_file_that_is_neither_is_told_both(plugin):
    with pytest.raises(BackendError, match="a plugin for nbdkit has open, get_size and pread"):
        plugin("def open(readonly): pass")


def test_it_says_of_itself_what_nbdkit_does_not_ask(plugin):
    disk = plugin(RAM, "size=1M")
    assert (False, True) == (disk.survives, disk.keeps_data)
    disk = plugin(RAM + "\nsurvives = True\nkeeps_data = False", "size=1M")
    assert (True, False) == (disk.survives, disk.keeps_data)


def test_nothing_is_compiled_beside_it(plugin, tmp_path):
    plugin(RAM, "size=1M")
    assert ["plugin.py"] == os.listdir(tmp_path)
    assert "nbdkit" in sys.modules
