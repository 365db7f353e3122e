"""A filter is the methods it changes; everything else is the source's."""

from pathlib import Path
from types import MappingProxyType

import pytest

from backends.blocks import read, write
from backends.child import conformance_command
from xen_disk_py.backends import Backend
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.filter import Filter, do_all
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.vhd.create import create
from xen_disk_py.errors import BackendError, ImageError, UsageError

ODD = (3 << 19) + 512
ROOT = Path(__file__).parents[2]

MINE = """
from xen_disk_py.backends import Backend
from xen_disk_py.backends.filter import Filter

class Disk(Backend):
    size = 4096
    def read(self, buffers, offset):
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
    def write(self, buffers, offset): pass

class Flip(Filter):
    def __init__(self, source, mask: int = 255):
        super().__init__(source)
        self.mask = mask

    def read(self, buffers, offset):
        done = self.source.read(buffers, offset)
        for buffer in buffers:
            buffer[:] = bytes(byte ^ self.mask for byte in buffer)
        return done
"""


class OverABackend(BackendConformance):
    options = MappingProxyType({})

    @pytest.fixture(autouse=True)
    def _image(self, make_image):
        self.image = make_image(ODD)

    def open_disk(self, tmp_path):
        options = {key: value.format(tmp_path) for key, value in self.options.items()}
        return Filter(open_backend(self.backend, {"path": self.image, **options}))


class TestOverRaw(OverABackend):
    backend = "raw"


class TestOverMmap(OverABackend):
    backend = "mmap"


class TestOverCow(OverABackend):
    backend = "cow"


class TestOverOverlay(OverABackend):
    backend = "overlay"
    options = MappingProxyType({"overlay": "{}/changes"})


class TestOverDiscard(BackendConformance):
    def open_disk(self, tmp_path):
        return Filter(Filter(open_backend("discard", {"size": 1 << 20})))


class TestOverAReadOnlyDisk(BackendConformance):
    def open_disk(self, tmp_path):
        return Filter(open_backend(str(ROOT / "examples" / "address_disk.py"), {"size": 3 << 30}))


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="ascii")
    return str(path)


def test_the_whole_contract_is_passed_on():
    """Whatever a backend may define, a filter has of its source."""

    class Source(Backend):
        size = 8192
        read_only = True
        keeps_data = False
        sector_size = 1024
        physical_sector_size = 8192
        threads = 7
        survives = True
        repeats_flush = True
        discard_granularity = 2048
        can_discard_securely = True
        memory = 77
        storage = ("here",)

        def __init__(self):
            self.calls = []

        def __getattribute__(self, name):
            if name in methods:
                return lambda *arguments: self.calls.append((name, *arguments)) or 512
            return super().__getattribute__(name)

    methods = {
        "read": ([], 0),
        "write": ([], 512),
        "read_nowait": ([], 1024),
        "write_nowait": ([], 1536),
        "flush": (),
        "discard": (0, 4096),
        "discard_securely": (512, 1024),
        "resize": (16384,),
        "claim": (),
        "after_fork": (),
        "close": (),
    }
    source = Source()
    disk = Filter(source)
    known = {name for name in [*vars(Backend), *Backend.__annotations__] if name[0] != "_"}
    attributes = known - set(methods)
    assert methods.keys() <= known
    for name in attributes:
        assert getattr(source, name) == getattr(disk, name), name
    for name, arguments in methods.items():
        getattr(disk, name)(*arguments)
    assert [(name, *arguments) for name, arguments in methods.items()] == source.calls
    assert "Filter over Source" == str(disk)


class Counting(Filter):
    threads = 1

    def __init__(self, source):
        super().__init__(source)
        self.reads = 0

    def read(self, buffers, offset):
        self.reads += 1
        return super().read(buffers, offset)


def test_no_request_passes_by_a_method_that_is_changed(make_image):
    disk = Counting(open_backend("raw", {"path": make_image()}))
    assert 0 == disk.read_nowait([memoryview(bytearray(512))], 0)
    read(disk, 0, 512)
    assert 1 == disk.reads
    assert 512 == disk.write_nowait([memoryview(bytes(512))], 0)
    assert (1, True, 1 << 20) == (disk.threads, disk.survives, disk.size)
    disk.close()


def test_what_begins_requests_by_itself_is_passed_on_or_put_aside():
    class Asynchronous(Backend):
        size = 4096
        asynchronous = object()
        repeats_flush = True

    source = Asynchronous()
    assert source.asynchronous is Filter(source).asynchronous
    assert 1 == Filter(source).threads

    class Flushes(Filter):
        def flush(self):
            pass

    assert (None, 16) == (Flushes(source).asynchronous, Flushes(source).threads)
    assert (None, 1) == (Counting(source).asynchronous, Counting(source).threads)


def test_a_size_that_changes_is_seen(make_image):
    disk = Filter(open_backend("raw", {"path": make_image()}))
    assert 1 << 20 == disk.resize(None) == disk.size
    assert 2 << 20 == disk.resize(2 << 20) == disk.size == disk.source.size
    disk.close()


def test_short_counts_are_continued():
    class Trickle(Backend):
        size = 1 << 20

        def read(self, buffers, offset):
            buffers[0][:512] = bytes([offset // 512]) * 512
            return 512

    data = bytearray(4096)
    views = [memoryview(data)[:1024], memoryview(data)[1024:]]
    assert 4096 == do_all(Trickle().read, views, 512)
    assert b"".join(bytes([n]) * 512 for n in range(1, 9)) == data
    assert 0 == do_all(lambda buffers, offset: 0, views, 0)
    assert 4096 == do_all(lambda buffers, offset: None, views, 0)


def test_filters_of_a_file_are_put_over_a_disk_in_their_order(mine):
    disk = open_backend(mine, {}, [f"{mine}:mask=15", f"{mine}:Flip:mask=240", mine])
    assert bytes(512) == read(disk, 0, 512)
    assert "Flip over" in str(disk)
    disk = open_backend(mine, {}, [f"{mine}:mask=15"])
    assert b"\x0f" * 512 == read(disk, 0, 512)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (
            "nothing",
            UsageError,
            "no filter nothing: use one of cache, checksum, corrupt, delay",
        ),
        ("", UsageError, "write it as NAME"),
        ("delay:", UsageError, "write it as NAME"),
        ("delay:read", UsageError, "write it as NAME"),
        ("delay:colour=blue", UsageError, "'colour=blue' is no option of it; it takes read, write"),
        ("delay:read=1,x", UsageError, "'x' is no option of it"),
        ("delay:read=soon", UsageError, "read=soon: 'soon' is not a time"),
        ("delay:read=2-1", UsageError, "read=2-1: the shorter time goes first"),
        ("error:rate=2", UsageError, "rate=2 is not from 0 to 1"),
        ("error:rate=often", UsageError, "rate=often: 'often' is no number"),
        ("error:sticky=perhaps", UsageError, "neither yes nor no"),
        ("error:operations=read+eat", UsageError, "use some of read[+]write[+]flush[+]discard"),
        ("error:errno=EWHAT", UsageError, "there is no such error; EIO is one"),
        ("error:errno=errorcode", UsageError, "there is no such error"),
        ("error:range=1M", UsageError, "range=1M"),
        ("error:range=2M-1M", UsageError, "write it as START-END"),
        ("corrupt", UsageError, "corrupt needs rate=…"),
        ("corrupt:rate=1,operations=flush", UsageError, "is none of read, write, read[+]write"),
        ("rate", UsageError, "rate needs bytes=… or requests=…"),
        ("rate:bytes=1M,burst=x", UsageError, "'x' is not a time"),
        ("protect:range=5", UsageError, "range=5: write it as START-END"),
        ("offset:start=1", UsageError, "start=1 is not a multiple of the disk's sectors"),
        ("offset:start=1M", UsageError, "1048576 is not inside of a disk of 1048576 bytes: give a"),
        ("offset:start=2M", UsageError, "2097152 is not inside of a disk of 1048576 bytes: give a"),
        ("offset:start=512K,size=1M", UsageError, "give size=524288 at most, or leave it out"),
        ("partition", UsageError, "partition needs number=…"),
        ("partition:number=1", ImageError, "no partition table: leave out --filter"),
        ("log", UsageError, "log needs file=…"),
        ("log:file=/no/such/place", UsageError, "there is no directory /no/such"),
        ("log:file=/dev/null,format=xml", UsageError, "'xml' is none of text, json"),
        ("./gone.py", BackendError, "no such file"),
        ("{}:Disk", BackendError, "has no filter Disk in it: .* are Flip"),
        ("{}:Flip:mask=no", UsageError, "mask=no: 'no' is not a number"),
    ],
)
def test_what_cannot_be_had_is_said_and_the_disk_closed(make_image, mine, text, kind, said):
    image = make_image()
    with pytest.raises(kind, match=said):
        open_backend("raw", {"path": image}, [text.replace("{}", mine)])
    open_backend("raw", {"path": image}).close()  # it is unlocked


def test_the_disk_of_a_file_is_not_its_filter(mine):
    assert "mine.py:Disk" == str(open_backend(mine, {}))


def test_conformance_takes_filters(mine, tmp_path):
    arguments = [mine, "--filter", mine, "--", "-q", "-k", "flush"]
    _, output = conformance_command(*arguments, cwd=tmp_path)
    assert "2 failed" not in output
    assert "after_a_flush" in output  # the disk reads other than what was written


def test_writes_pass(make_image):
    disk = Filter(open_backend("raw", {"path": make_image()}))
    write(disk, 512, b"x" * 1024)
    assert b"x" * 1024 == read(disk, 512, 1024)
    disk.close()


@pytest.mark.parametrize("text", ["none", "delay:", "offset:from=1", "offset:start=x"])
def test_nothing_is_opened_for_a_filter_that_cannot_be(tmp_path, text):
    path = tmp_path / "disk.vhd"
    create(str(path), 1 << 20)
    path.write_bytes(path.read_bytes()[:-512])  # opened for writing, it gets its footer back
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--filter"):
        open_backend("vhd", {"path": str(path)}, [text])
    assert before == path.read_bytes()
