import contextlib
import os
import random

import killing
import pytest

from xen_disk_py.backends.image import Image
from xen_disk_py.backends.vhd import VhdBackend, layout
from xen_disk_py.backends.vhd import commit as commit_module
from xen_disk_py.backends.vhd.chain import Committed
from xen_disk_py.backends.vhd.check import check
from xen_disk_py.backends.vhd.commit import commit
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.errors import ImageError

from .conftest import OTHER_UUID, UUID, build, content_of, needs, qemu_content, read, write

MIB = 1 << 20
SIZE = 6 * MIB


def nothing(done, total):
    """A progress that nobody wants to know of."""


def content(path, **options):
    with contextlib.closing(VhdBackend(str(path), read_only=True, **options)) as disk:
        return read(disk)


def scatter(path, seed):
    dice = random.Random(seed)
    with contextlib.closing(VhdBackend(str(path))) as disk:
        for _ in range(12):
            sector = dice.choice((0, 5, 4095, 4096, dice.randrange(SIZE // 512 - 8)))
            count = dice.choice((1, 2, 8))
            write(disk, sector * 512, dice.choice((bytes(512), dice.randbytes(512))) * count)


@pytest.fixture(params=["dynamic", "fixed", "child", "raw"])
def base(request, tmp_path):
    """A parent of each kind."""
    path = str(tmp_path / "base.vhd")
    if request.param == "raw":
        path = str(tmp_path / "base.img")
        with open(path, "wb") as file:
            file.write(random.Random(1).randbytes(SIZE))
        return path
    if request.param == "child":
        create(str(tmp_path / "root.vhd"), SIZE)
        scatter(tmp_path / "root.vhd", 5)
        create_child(path, str(tmp_path / "root.vhd"))
    else:
        create(path, SIZE, fixed=request.param == "fixed")
    scatter(path, 1)
    return path


@pytest.fixture
def child(tmp_path, base):
    path = str(tmp_path / "child.vhd")
    create_child(path, base, is_raw=base.endswith(".img"))
    scatter(path, 2)
    return path


def base_content(base):
    if base.endswith(".img"):
        return content_of(base)
    return content(base)


def test_all_is_in_the_parent_and_the_child_is_gone(base, child):
    expected = content(child)
    told = []
    parent, count = commit(child, keep=False, progress=lambda *each: told.append(each))
    assert base == parent
    assert 0 < count < SIZE
    assert (SIZE, SIZE) == told[-1]
    assert not os.path.exists(child)
    assert expected == base_content(base)
    if base.endswith(".vhd"):
        assert [] == check(base)


def test_with_keep_an_empty_child_is_left(base, child):
    expected = content(child)
    commit(child, keep=True, progress=nothing)
    assert expected == content(child) == base_content(base)
    assert [] == check(child)
    assert os.path.getsize(child) < 8192


@needs("qemu-img")
def test_qemu_reads_the_parent_afterwards(tmp_path):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, SIZE)
    scatter(base, 1)
    create_child(path, base)
    scatter(path, 2)
    expected = content(path)
    commit(path, keep=False, progress=nothing)
    assert expected == qemu_content(base, tmp_path)


def test_the_middle_of_a_chain(tmp_path):
    names = [str(tmp_path / name) for name in ("base.vhd", "middle.vhd", "leaf.vhd")]
    create(names[0], SIZE)
    for parent, path in zip(names, names[1:]):
        create_child(path, parent)
    for seed, path in enumerate(names):
        with contextlib.closing(VhdBackend(path)) as disk:
            write(disk, seed * 512, bytes([seed + 1]) * 512)
    expected = content(names[1])
    commit(names[1], keep=False, progress=nothing)
    assert expected == content(names[0])
    with pytest.raises(ImageError, match="its parent is not there"):
        content(names[2])  # as its parent is gone: it had to be committed first


def test_a_parents_other_children_do_not_take_it_for_what_it_was(tmp_path):
    base = str(tmp_path / "base.vhd")
    create(base, SIZE)
    (tmp_path / "elsewhere").mkdir()
    first, second = str(tmp_path / "first.vhd"), str(tmp_path / "elsewhere" / "second.vhd")
    for path in (first, second):
        create_child(path, base)
    scatter(first, 1)
    commit(first, keep=False, progress=nothing)
    with pytest.raises(ImageError, match="its parent has the UUID"):
        content(second, parents=str(tmp_path))


@pytest.mark.parametrize("is_raw", [False, True])
def test_another_child_beside_it_is_found_before_anything_is_changed(tmp_path, is_raw):
    base = str(tmp_path / "base")
    if is_raw:
        with open(base, "wb") as file:
            file.truncate(SIZE)
    else:
        create(base, SIZE)
    first, second = str(tmp_path / "first.vhd"), str(tmp_path / "second.VHD")
    for path in (first, second):
        create_child(path, base, is_raw=is_raw)
    (tmp_path / "broken.vhd").write_bytes(b"no VHD")
    before = content_of(base)
    with pytest.raises(ImageError, match=r"second\.VHD: is a child of .*/base, too"):
        commit(first, keep=False, progress=nothing)
    assert before == content_of(base)
    os.unlink(second)
    commit(first, keep=False, progress=nothing)


def test_what_cannot_be_committed_changes_nothing(tmp_path):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, MIB)
    with pytest.raises(ImageError, match="has no parent"):
        commit(base, keep=False, progress=nothing)
    create_child(path, base)
    with (
        contextlib.closing(VhdBackend(path)),
        pytest.raises(ImageError, match="in use by process"),
    ):
        commit(path, keep=False, progress=nothing)
    with (
        contextlib.closing(VhdBackend(base, read_only=True)),
        pytest.raises(ImageError, match="in use by process"),
    ):
        commit(path, keep=False, progress=nothing)


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_no_room_in_the_middle_leaves_the_chain_as_it_was(tmp_path, monkeypatch, failing):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, SIZE)
    create_child(path, base)
    scatter(path, 3)
    expected = content(path)
    real, calls = os.pwritev, 0

    def full(fd, buffers, offset):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(ImageError, match=r"No space left .*do it again; .*still reads as before"):
        commit(path, keep=False, progress=nothing)
    monkeypatch.undo()
    assert expected == content(path)
    commit(path, keep=False, progress=nothing)
    assert expected == content(base)


def test_what_is_killed_anywhere_is_finished_by_the_next(tmp_path):
    small = 16 << 10
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")

    def make():
        build(base, small, block_size=4096, uuid=UUID, blocks=[(0, {0, 1}, b"b" * 4096)])
        build(
            path,
            small,
            block_size=4096,
            kind=layout.DIFFERENCING,
            uuid=OTHER_UUID,
            blocks=[(0, {1, 2}, b"c" * 4096), (2, {5}, b"d" * 4096)],
            parent_uuid=UUID,
            parent_name="base.vhd",
        )

    make()
    expected = content(path)

    def act(begin):
        make()
        begin()
        commit(path, keep=False, progress=nothing)

    for _ in killing.at_every_effect(act, effects=10):
        if os.path.exists(path):
            with contextlib.suppress(Committed):
                assert expected == content(path)
            commit(path, keep=False, progress=nothing)
        assert not os.path.exists(path)
        assert expected == content(base)


def test_what_is_done_but_for_the_removal_is_not_done_twice(tmp_path, monkeypatch):
    base, path = str(tmp_path / "base.vhd"), str(tmp_path / "a.vhd")
    create(base, SIZE)
    create_child(path, base)
    with contextlib.closing(VhdBackend(path)) as disk:
        write(disk, 0, b"a" * 512)

    def refuse(path):
        raise ImageError("no")

    with monkeypatch.context() as patched:
        patched.setattr(commit_module, "_remove", refuse)
        with pytest.raises(ImageError):
            commit(path, keep=False, progress=nothing)
    with pytest.raises(ImageError, match=r"were committed to .* remove it with: xen-disk commit"):
        content(path)
    with contextlib.closing(VhdBackend(base)) as disk:  # somebody writes to the parent
        write(disk, 0, b"n" * 512)
    assert (base, 0) == commit(path, keep=False, progress=nothing)
    assert b"n" * 512 == content(base)[:512]
    assert not os.path.exists(path)


def test_the_parent_is_locked_meanwhile(base, child):
    def look(done, total):
        with pytest.raises(ImageError, match="in use by process"):
            Image.open(base, writable=True)

    commit(child, keep=False, progress=look)
