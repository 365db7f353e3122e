"""Other settings for a filter that is in use: all of them or none, and written down."""

from __future__ import annotations

import pytest

from backends.blocks import read
from backends.filters.test_filters import Memory
from xen_disk_py.backends import stack
from xen_disk_py.backends.filter import Filter, direct
from xen_disk_py.backends.loader import wrap
from xen_disk_py.errors import BackendError, DeviceError, UsageError

TEXTS = ("error:every=2", "delay:read=1us,seed=7", "error:armed=no")


@pytest.fixture
def filters():
    return stack.filters_of(wrap(Memory(), TEXTS), len(TEXTS))


def test_the_stack_as_it_was_given(filters):
    assert list(TEXTS) == [stack.text_of(each) for each in filters]
    assert ["error", "delay", "error"] == [each["name"] for each in stack.describe(filters)]
    settings = stack.describe(filters)[0]["settings"]
    assert ("2", "1.0", "EIO", "no") == tuple(
        settings[key] for key in ("every", "rate", "errno", "sticky")
    )


def test_a_filter_that_is_the_disk_itself_is_none_of_them():
    disk = wrap(Memory(), TEXTS)
    assert [disk] == stack.filters_of(disk, 1)
    assert [] == stack.filters_of(disk, 0)


def test_by_name_or_place(filters):
    assert filters[1] is stack.find(filters, "delay")
    assert filters[2] is stack.find(filters, "3")
    for which, said in (
        ("error", "several filters are called error: name it by its place: 1, 3"),
        ("rate", "the disk has no filter rate; it has error, delay, error"),
        ("0", "no filter 0: the disk has 3"),
        ("4", "no filter 4: the disk has 3"),
    ):
        with pytest.raises(UsageError, match=said):
            stack.find(filters, which)
    with pytest.raises(UsageError, match="connected without --filter"):
        stack.find([], "error")


def test_by_what_it_can_do(filters):
    assert filters[0] is stack.find_by_action(filters[:2], "arm", None)
    assert filters[2] is stack.find_by_action(filters, "arm", "3")
    for found, action, which, said in (
        (filters, "arm", None, r"several filters know arm: .*1 \(error\), 3 \(error\)"),
        (filters, "cut", None, "no filter that knows cut"),
        (filters, "arm", "delay", "the filter delay knows no arm"),
    ):
        with pytest.raises(UsageError, match=said):
            stack.find_by_action(found, action, which)


def test_settings_change_and_what_is_not_named_stays(filters):
    noted = []
    stack.change(filters, filters[1], ["read=2ms-3ms", "write=1s"], noted.append)
    after = ("error:every=2", "delay:read=2ms-3ms,seed=7,write=1s", "error:armed=no")
    assert [after] == noted
    assert (0.002, 0.003) == filters[1]._bounds["read"]
    assert (1.0, 1.0) == filters[1]._bounds["write"]


@pytest.mark.parametrize(
    "changes",
    [
        ["rate=0.5", "every=x"],
        ["rate=0.5", "rate=2"],
        ["rate=0.5", "errno=ENOTHING"],
        ["rate=0.5", "colour=blue"],
        ["rate=0.5", "range"],
        ["rate=0.5", "range=1M-2M,3M-4M"],
        ["rate=0.5", "armed=/tmp/x\n"],
    ],
)
def test_all_or_none(filters, changes):
    before = {**vars(filters[0])}
    with pytest.raises(UsageError):
        stack.change(filters, filters[0], changes, pytest.fail)
    assert before == vars(filters[0])


def test_what_cannot_be_written_down_is_not_done(filters):
    def full(texts):
        raise DeviceError("too long")

    with pytest.raises(DeviceError, match="too long"):
        stack.change(filters, filters[0], ["every=1"], full)
    assert TEXTS[0] == stack.text_of(filters[0])
    assert 2 == filters[0]._every


def test_one_that_keeps_its_settings():
    disk = wrap(Memory(), ["offset:size=64K"])
    with pytest.raises(UsageError, match="offset keeps its settings as long as"):
        stack.change([disk], disk, ["size=128K"], pytest.fail)
    assert 65536 == disk.size


def test_a_filter_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from xen_disk_py.backends.filter import Filter\n"
        "class Mine(Filter):\n"
        "    actions = {'cut': {'mask': '1'}}\n"
        "    def __init__(self, source, mask: int = 255):\n"
        "        super().__init__(source)\n"
        "        self.mask = mask\n"
        "    def configure(self, mask):\n"
        "        self.mask = 1 // mask\n"
    )
    disk = wrap(Memory(), [str(file)])
    assert disk is stack.find([disk], "mine.py")
    assert disk is stack.find_by_action([disk], "cut", None)
    stack.change([disk], disk, ["mask=1"], lambda texts: None)
    assert 1 == disk.mask
    with pytest.raises(BackendError, match=r"mine\.py:\d+: ZeroDivisionError"):
        stack.change([disk], disk, ["mask=0"], pytest.fail)


def test_error_is_armed_and_disarmed():
    disk = wrap(Memory(), ["error:operations=read,armed=no"])
    read(disk, 0, 512)
    for action, fails in (("arm", True), ("disarm", False), ("arm", True)):
        changes = [f"{key}={value}" for key, value in disk.actions[action].items()]
        stack.change([disk], disk, changes, lambda texts: None)
        if fails:
            with pytest.raises(OSError, match="the error filter"):
                read(disk, 0, 512)
        else:
            read(disk, 0, 512)
    assert {"matched": 1, "failed": 2} == disk.counters()


def test_a_log_is_switched_off_and_goes_to_another_file(tmp_path):
    disk = wrap(Memory(), [f"log:file={tmp_path}/one"])
    for change in ("on=no", "on=yes", f"file={tmp_path}/two"):
        read(disk, 0, 512)
        stack.change([disk], disk, [change], lambda texts: None)
    read(disk, 0, 512)
    with pytest.raises(UsageError, match="nowhere"):
        stack.change([disk], disk, [f"file={tmp_path}/nowhere/three"], pytest.fail)
    read(disk, 0, 512)
    assert (2, 2) == tuple(
        len((tmp_path / name).read_text().splitlines()) for name in ("one", "two")
    )
    disk.close()


def test_what_an_idle_filter_passes_on_is_called_below_it():
    source = Memory(threads=8)
    disk = wrap(source, ["delay", "protect", "error:armed=no"])
    error, protect, delay = disk, disk.source, disk.source.source
    assert source.read_nowait == direct(disk, "read_nowait")
    assert protect.write_nowait == direct(disk, "write_nowait")
    assert delay.read == direct(disk, "read")  # the source lets fewer in than the filter
    stack.change([delay, protect, error], delay, ["read=1us"], lambda texts: None)
    assert delay.read_nowait == direct(disk, "read_nowait")
    stack.change([delay, protect, error], error, ["armed=yes"], lambda texts: None)
    for method in ("read", "write", "read_nowait", "write_nowait"):
        assert getattr(error, method) == direct(disk, method)


@pytest.mark.parametrize("place", ["class", "object"])
def test_a_method_that_is_changed_is_called(place):
    class Mine(Filter):
        if place == "class":

            def read(self, buffers, offset):
                return self.source.read(buffers, offset)

    disk = Mine(Memory())
    if place == "object":
        disk.read = disk.source.read
    assert not disk.passes_on("read")
    assert disk.passes_on("write")
