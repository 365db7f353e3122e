import importlib.metadata
import os
import sys
import textwrap
from pathlib import Path

import pytest

from backends.blocks import read
from xen_disk_py.backends import Backend, finding
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.discard import DiscardBackend
from xen_disk_py.backends.filter import Filter
from xen_disk_py.backends.finding import choose, is_file, user_line
from xen_disk_py.backends.image import Image
from xen_disk_py.backends.loader import check, open_backend, parse_options
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.errors import BackendError, ImageError, UsageError

DISK = """
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 1 << 20
    def read(self, buffers, offset):
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
    def write(self, buffers, offset):
        pass
"""


class Memory(Backend):
    """A disk of this module, whose constructor takes whatever a test wants it to."""

    def __init__(self, size=4096, **given):
        self.size = size
        self.given = given
        self.closed = 0

    def read(self, buffers, offset):
        pass

    def write(self, buffers, offset):
        pass

    def close(self):
        self.closed += 1


HERE = f"{__name__}:"


@pytest.fixture
def write_file(tmp_path, monkeypatch):
    """Writes a file of somebody's and returns its path; forgets what running it changes."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)

    def make(text, name="mydisk.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    yield make
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def error_of(kind, backend, **options):
    with pytest.raises(kind) as caught:
        open_backend(backend, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Which backend it is


@pytest.mark.parametrize(
    ("backend", "path", "chosen"),
    [
        (None, None, "discard"),
        (None, "disk.raw", "cow"),
        (None, "/dev/sdb", "cow"),
        (None, "./mydisk.py", "./mydisk.py"),
        (None, "./mydisk.py:Mine", "./mydisk.py:Mine"),
        ("raw", "disk.raw", "raw"),
        ("raw", "odd.py", "raw"),
        ("mmap", None, "mmap"),
    ],
)
def test_the_backend_follows_from_what_is_given(backend, path, chosen):
    assert chosen == choose(backend, path)


@pytest.mark.parametrize(
    ("backend", "options", "kind"),
    [
        (None, {}, DiscardBackend),
        (None, {"path": None, "size": None}, DiscardBackend),
        (None, {"path": "image"}, CowBackend),
        ("cow", {"path": "image", "cow_limit": "1M"}, CowBackend),
        ("raw", {"path": "image"}, RawBackend),
        ("mmap", {"path": "image"}, MmapBackend),
        ("overlay", {"path": "image", "overlay": "changes"}, OverlayBackend),
    ],
)
def test_ours_are_opened_by_name(image, backend, options, kind):
    given = {**options, **({"path": image} if options.get("path") else {})}
    if "overlay" in options:
        given["overlay"] = f"{image}.overlay"
    disk = open_backend(backend, given)
    assert kind is type(disk)
    disk.close()


def test_a_size_is_passed_on():
    assert 64 << 20 == open_backend(None, {"size": 64 << 20}).size
    assert 64 << 20 == open_backend("discard", {"size": "64M"}).size


def test_a_module_and_class():
    assert type(open_backend(f"{HERE}Memory", {})) is Memory


def test_an_entry_point(monkeypatch):
    point = importlib.metadata.EntryPoint("memory", f"{HERE}Memory", finding.ENTRY_POINTS)
    broken = importlib.metadata.EntryPoint("broken", "no.such:Thing", finding.ENTRY_POINTS)

    def entry_points(**group):
        points = [point, broken]
        return points if group else {finding.ENTRY_POINTS: points}

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert type(open_backend("memory", {})) is Memory
    assert "broken cannot be imported" in error_of(BackendError, "broken")
    message = error_of(UsageError, "nonsense")
    assert "there is no backend nonsense" in message
    assert "broken, cow, discard, memory, mmap, nbd, overlay, qemu, raw, rbd, vhd" in message


def test_no_entry_points_at_all():
    assert "there is no backend nonsense" in error_of(UsageError, "nonsense")


@pytest.mark.parametrize("how", ["backend", "path", "named"])
def test_a_file(write_file, how):
    path = write_file(DISK)
    if how == "path":
        disk = open_backend(None, {"path": path})
    else:
        disk = open_backend(path + (":Disk" if how == "named" else ""), {})
    assert bytes(512) == read(disk, 0, 512)
    assert not os.path.exists(os.path.join(os.path.dirname(path), "__pycache__"))


def test_a_file_gets_the_path_only_where_it_is_not_the_path(write_file):
    path = write_file(DISK + "    def __init__(self, path=None): self.path = path\n")
    assert open_backend(None, {"path": path}).path is None
    assert open_backend(path, {"path": "other"}).path == "other"


def test_the_only_disk_of_a_file_may_have_any_name(write_file):
    path = write_file(DISK.replace("Disk(", "Mine(") + "\nfrom abc import ABC\nAlias = Mine\n")
    assert "Mine" == type(open_backend(path, {})).__name__


def test_of_several_disks_in_a_file_the_one_called_disk_is_meant(write_file):
    path = write_file(DISK + "class Other(Disk): pass\n")
    assert "Disk" == type(open_backend(path, {})).__name__
    assert "Other" == type(open_backend(f"{path}:Other", {})).__name__


def test_several_disks_in_a_file_and_none_called_disk(write_file):
    path = write_file(DISK.replace("Disk(", "One(") + "class Two(One): pass\n")
    message = error_of(BackendError, path)
    assert "several disks: One, Two" in message
    assert f"--backend {path}:One" in message


def test_a_file_may_import_its_neighbours_and_use_dataclasses(write_file):
    write_file("SIZE = 8192\n", "a_neighbour.py")
    path = write_file(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from a_neighbour import SIZE
        from xen_disk_py.backends import Backend

        @dataclass
        class Disk(Backend):
            size: int = SIZE
            def read(self, buffers, offset): pass
            def write(self, buffers, offset): pass
        """
    )
    assert 8192 == open_backend(path, {}).size
    assert 4096 == open_backend(path, {"size": 4096}).size


def test_a_file_has_what_a_traceback_asks_of_a_module(write_file):
    """The loader, without which Python 3.15 warns, and the source that it gives."""
    path = write_file(DISK)
    spec = sys.modules[type(open_backend(path, {})).__module__].__spec__
    assert (path, True) == (spec.origin, spec.has_location)
    assert Path(path).read_text(encoding="utf-8") == spec.loader.get_source(spec.name)


# Options


def test_options_are_read():
    assert {"a": "1", "b": "x=y", "c": ""} == parse_options(["a=0", "a=1", "b=x=y", "c="])


@pytest.mark.parametrize("pair", ["a", "=1", "", "a b=1", "1=2"])
def test_an_option_that_is_none_is_refused(pair):
    with pytest.raises(UsageError, match="write it as name=value"):
        parse_options([pair])


def test_an_option_that_has_its_own_flag_is_refused():
    with pytest.raises(UsageError, match="use --cow-limit for that"):
        parse_options(["cow_limit=1M"])


def test_text_becomes_a_number_where_the_parameter_is_an_int(write_file):
    path = write_file(
        """
        from typing import Optional, Union
        import typing
        from xen_disk_py.backends import Backend

        class Disk(Backend):
            size = 512
            def __init__(self, a: int, b: "int", c: Optional[int] = None, d: "int | None" = 1,
                         e: Union[int, None] = None, f: "typing.Optional[int]" = None,
                         g="", h: str = "", i: Optional[str] = None):
                self.all = [a, b, c, d, e, f, g, h, i]
            def read(self, buffers, offset): pass
            def write(self, buffers, offset): pass
        """
    )
    disk = open_backend(path, dict.fromkeys("abcdefghi", "1k"))
    assert [1024] * 6 + ["1k"] * 3 == disk.all
    assert "--option a=…: 'x' is not a number: give a whole number" in error_of(
        UsageError, path, a="x", b="1"
    )


def test_an_option_that_is_not_taken_names_those_that_are(image):
    message = error_of(UsageError, "raw", path=image, size=512)
    assert "the raw backend takes no --size; it takes --path, --sector-size, --read-only" == message
    message = error_of(UsageError, None, path=image, speed="9")
    assert "the cow backend takes no --option speed=…" in message
    assert "it takes --path, --cow-limit, --sector-size, --read-only" in message
    assert "takes no --cow-limit" in error_of(UsageError, "raw", path=image, cow_limit=1)
    assert "the raw backend takes no --overlay" in error_of(
        UsageError, "raw", path=image, overlay="changes"
    )
    assert "the overlay backend needs --overlay" == error_of(UsageError, "overlay", path=image)


@pytest.mark.parametrize("name", ["raw", "mmap", "cow"])
def test_a_required_option_that_misses_is_named(name):
    assert f"the {name} backend needs --path" == error_of(UsageError, name)


def test_a_required_option_of_a_custom_disk_is_named(write_file):
    path = write_file(DISK + "    def __init__(self, speed, *more): pass\n")
    assert "mydisk.py needs --option speed=…" == error_of(UsageError, path)


def test_a_constructor_that_takes_anything_gets_everything():
    disk = open_backend(f"{HERE}Memory", {"size": "8k", "path": "p", "x": "1", "read_only": True})
    assert 8192 == disk.size
    assert {"path": "p", "x": "1", "read_only": True} == disk.given


def test_a_bad_size_is_a_usage_error():
    assert "--size" in error_of(UsageError, None, size=1000)


def test_an_image_error_stays_one():
    assert "no such file" in error_of(ImageError, None, path="/gone/disk.raw")


# Read-only


def test_read_only_reaches_a_constructor_that_has_it(image):
    disk = open_backend("raw", {"path": image, "read_only": True})
    assert disk.read_only
    assert disk._image.read_only
    disk.close()


def test_read_only_is_set_on_a_disk_that_has_no_parameter_for_it(image, write_file):
    for path in (image, write_file(DISK)):
        disk = open_backend(None, {"path": path, "read_only": True})
        assert disk.read_only
        assert not type(disk).read_only
        disk.close()


def test_read_only_that_is_false_was_not_given(image, write_file):
    assert not open_backend(None, {"read_only": False}).read_only
    path = write_file(DISK + "    def __init__(self, read_only): self.read_only = read_only\n")
    assert open_backend(path, {"read_only": False}).read_only is False


def test_a_disk_that_cannot_be_made_read_only_is_refused(write_file):
    path = write_file(DISK + "    read_only = property(lambda self: False)\n")
    assert "AttributeError" in error_of(BackendError, path, read_only=True)


# What authors do wrong


@pytest.mark.parametrize("how", ["backend", "path"])
def test_a_file_that_is_not_there(tmp_path, how):
    path = str(tmp_path / "gone.py")
    if how == "path":
        message = error_of(BackendError, None, path=path)
    else:
        message = error_of(BackendError, path)
    assert f"{path}: no such file: check the name" == message


def test_force_opens_an_image_that_another_uses(make_image):
    image = make_image()
    options = {"path": image}
    with Image.open(image, writable=True):
        with pytest.raises(ImageError, match="or --force to use it all the same"):
            open_backend("raw", options)
        open_backend("raw", {**options, "force": True}).close()
    with pytest.raises(UsageError, match="--option force=1: use --force for that"):
        parse_options(["force=1"])


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "dir.py").mkdir()
    assert "cannot be read: Is a directory" in error_of(BackendError, str(tmp_path / "dir.py"))


def test_a_syntax_error_names_its_line(write_file):
    message = error_of(BackendError, write_file("x = 1\n\ndef read(:\n"))
    assert "mydisk.py:3: SyntaxError: " in message


def test_a_syntax_error_of_a_neighbour_names_the_neighbour(write_file):
    write_file("x =\n", "bad_neighbour.py")
    message = error_of(BackendError, write_file("\nimport bad_neighbour\n"))
    assert "bad_neighbour.py:1: SyntaxError: " in message


def test_an_import_error_names_its_line(write_file):
    path = write_file("import os\nimport no_such_module_anywhere\n")
    message = error_of(BackendError, path)
    assert f"{path} cannot be loaded: mydisk.py:2: ModuleNotFoundError: " in message


def test_an_exception_while_loading_leaves_no_module_behind(write_file):
    path = write_file("\n1 / 0\n")
    assert "mydisk.py:2: ZeroDivisionError: division by zero" in error_of(BackendError, path)
    assert path not in sys.modules


def test_a_file_without_a_disk(write_file):
    path = write_file("from xen_disk_py.backends import Backend\nclass Disk2: pass\n")
    assert "has no disk in it" in error_of(BackendError, path)


def test_a_class_that_is_not_there(write_file):
    path = write_file(DISK)
    assert "has no Tape; the disks in it: Disk" in error_of(BackendError, f"{path}:Tape")
    assert "has no Tape; it has Memory" in error_of(BackendError, f"{HERE}Tape")


def test_a_class_that_is_no_disk(write_file):
    path = write_file("class Disk: pass\nother = 3\n")
    for name in (f"{path}:Disk", f"{path}:other", path, f"{HERE}read"):
        assert "is not a class derived from" in error_of(BackendError, name)


def test_a_module_that_is_not_there():
    message = error_of(BackendError, "no_such_package.disks:Disk")
    assert "there is no module no_such_package" in message
    assert "PYTHONPATH" in message


@pytest.mark.parametrize("name", [":Disk", "os:", "a b:c"])
def test_a_name_that_is_nonsense(name):
    error_of(BackendError, name)


def test_a_module_that_breaks_when_imported(write_file):
    sys.path.append(os.path.dirname(write_file("\nimport no_such_thing\n", "breaks_one.py")))
    write_file("\n\n1 / 0\n", "breaks_two.py")
    message = error_of(BackendError, "breaks_one:Disk")
    assert "breaks_one:Disk cannot be imported: breaks_one.py:2: ModuleNotFoundError" in message
    message = error_of(BackendError, "breaks_two:Disk")
    assert "breaks_two:Disk cannot be imported: breaks_two.py:3: ZeroDivisionError" in message


def test_an_exception_in_the_constructor_names_the_authors_line(write_file):
    path = write_file(DISK + "    def __init__(self):\n        open('/gone/away')\n")
    message = error_of(BackendError, path)
    assert "mydisk.py cannot be opened: mydisk.py:12: FileNotFoundError: " in message


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"size": None}, "size is None, not an int"),
        ({"size": 4096.0}, "size is 4096.0, not an int"),
        ({"size": True}, "size is True, not an int"),
        ({"size": "1G"}, "size is '1G', not an int"),
        ({"size": 0}, "size is 0, it must be positive"),
        ({"size": -512}, "size is -512, it must be positive"),
        ({"size": 1000}, "size is 1000, not a multiple of sector_size, 512"),
        ({"size": 512, "sector_size": 4096}, "size is 512, not a multiple of sector_size, 4096"),
        ({"sector_size": 256}, "sector_size is 256, it must be 512, 1024"),
        ({"sector_size": 8192, "size": 8192}, "sector_size is 8192"),
        ({"sector_size": 1536}, "sector_size is 1536"),
        ({"physical_sector_size": 700}, "physical_sector_size is 700, not a multiple"),
        ({"physical_sector_size": 512, "sector_size": 4096}, "physical_sector_size is 512"),
        ({"discard_granularity": 0}, "discard_granularity is 0, it must be positive"),
        ({"discard_granularity": 6000}, "discard_granularity is 6000, not a multiple"),
        ({"threads": []}, "threads is [], not an int"),
        ({"memory": bytearray(4096)}, "memory is a bytearray, but means how many bytes of memory"),
        ({"notes": "one"}, "notes is a str, but means lines for whoever opens the disk"),
        ({"notes": [None]}, "notes is a list, but means lines"),
        ({"host_storage": "/dev/sda"}, "host_storage is a str, but means the files and devices"),
        ({"can_discard": True}, "can_discard, but defines no discard(self, offset, length)"),
        ({"can_discard_securely": True}, "can_discard_securely, but defines no discard_securely"),
    ],
)
def test_a_broken_attribute_is_named_and_the_disk_closed(change, fault):
    disk = Memory()
    vars(disk).update(change)
    with pytest.raises(BackendError) as caught:
        check(disk)
    assert f"Memory: {fault}" in str(caught.value)
    assert 1 == disk.closed


def test_a_sound_disk_passes_and_stays_open():
    for sector in (512, 1024, 2048, 4096):
        disk = Memory(8192)
        disk.sector_size = sector
        check(disk)
        assert 0 == disk.closed


@pytest.mark.parametrize("over", [Memory, lambda: Filter(Memory())])
def test_what_a_disk_may_say_it_sets_as_any_attribute(over):
    disk = over()
    said = (disk.memory, disk.notes, disk.host_storage, disk.can_discard, disk.can_discard_securely)
    assert (0, (), (), False, False) == said
    disk.memory, disk.notes, disk.host_storage = 512, ["a word"], []
    disk.can_discard = disk.can_discard_securely = False
    check(disk)
    assert (512, ["a word"], []) == (disk.memory, disk.notes, disk.host_storage)


def test_the_constructor_of_a_disk_sets_what_it_tells(write_file):
    path = write_file(DISK + "    def __init__(self):\n        self.notes = ['a word']\n")
    assert ["a word"] == open_backend(path, {}).notes


def test_a_disk_without_a_size(write_file):
    path = write_file(DISK.replace("size = 1 << 20", "pass"))
    assert "Disk: has no size: set self.size" in error_of(BackendError, path)


@pytest.mark.parametrize("method", ["read", "write"])
def test_a_disk_without_a_method(write_file, method):
    path = write_file(DISK.replace(f"def {method}(", "def other("))
    assert f"Disk: defines no {method}(self, buffers, offset)" in error_of(BackendError, path)


def test_a_read_only_disk_needs_no_write(write_file):
    path = write_file(DISK.replace("def write(", "read_only = True\n    def other("))
    assert open_backend(path, {}).read_only


def test_attributes_that_raise_are_faults(write_file):
    path = write_file(DISK.replace("size = 1 << 20", "size = property(lambda self: 1 // 0)"))
    assert "Disk: mydisk.py:5: ZeroDivisionError" in error_of(BackendError, path)


def test_a_close_that_fails_too_is_mentioned():
    class Stubborn(Memory):
        def close(self):
            raise RuntimeError("not now")

    with pytest.raises(BackendError, match=r"size is 0.*close failed: .*RuntimeError: not now"):
        check(Stubborn(0))


# The line for the log


def caught(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_line_is_the_innermost_one_of_the_authors_file(write_file):
    path = write_file(
        DISK
        + textwrap.indent(
            textwrap.dedent(
                """
                def flush(self):
                    self.helper()
                def helper(self):
                    import json
                    json.loads("{")
                """
            ),
            "    ",
        )
    )
    disk = open_backend(path, {})
    error = caught(disk.flush)
    assert user_line(error, disk).startswith("mydisk.py:16: JSONDecodeError: Expecting property")


def test_two_files_of_one_name_are_told_apart(write_file, tmp_path):
    (tmp_path / "one").mkdir()
    body = DISK + "    def flush(self):\n        {}raise KeyError('{}')\n"
    one = open_backend(write_file(body.format("", "one"), "one/mydisk.py"), {})
    two = open_backend(write_file(body.format("pass\n        ", "two")), {})
    assert "mydisk.py:12: KeyError: 'one'" == user_line(caught(one.flush), one)
    assert "mydisk.py:13: KeyError: 'two'" == user_line(caught(two.flush), two)


def test_of_ours_it_is_the_line_of_our_file(image):
    disk = open_backend("raw", {"path": image, "read_only": True})
    line = user_line(caught(disk.discard, 0, 512), disk)
    assert line.startswith("raw.py:")
    assert line.endswith(f": OSError: [Errno 95] {os.strerror(95)}")
    disk.close()


def test_without_a_frame_of_the_author_it_is_the_innermost_line():
    line = user_line(caught(parse_options, ["x"]), DiscardBackend())
    assert line.startswith("loader.py:")
    assert "UsageError" in line


def test_it_is_one_line_of_bounded_length():
    line = user_line(ValueError("a\n\tb\x1b[31m" + "x" * 1000))
    assert line.startswith("ValueError: a b?[31mx")
    assert 300 == len(line)
    assert "ValueError" == user_line(ValueError())


@pytest.mark.parametrize(
    ("path", "backend"),
    [
        ("nbd://host/disk", "nbd"),
        ("nbds://host", "nbd"),
        ("nbd+unix:///disk?socket=/s", "nbd"),
        ("[ nbdkit memory 1M ]", "nbd"),
        ("rbd:rbd/disk", "rbd"),
        ("nbd/disk.raw", "cow"),
        ("./rbd:x", "cow"),
    ],
)
def test_a_path_that_names_a_servers_disk(path, backend):
    assert backend == choose(None, path)
    assert (backend == "cow") == is_file(path)
