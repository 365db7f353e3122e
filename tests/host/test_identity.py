"""A file or device is told from another one that has taken its name, its inode or its number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from xen_disk_py.host import identity
from xen_disk_py.host.identity import difference, identity_of, is_known


@pytest.fixture(params=["tmp_path", "/dev/shm"])
def directory(request, tmp_path, tmp_path_factory):
    if request.param == "tmp_path":
        yield tmp_path
        return
    made = f"/dev/shm/{tmp_path.name}-{os.getpid()}"
    os.mkdir(made, 0o700)
    yield tmp_path.__class__(made)
    shutil.rmtree(made)


def test_a_file_stays_what_it_is(directory):
    path = directory / "disk.raw"
    path.write_bytes(bytes(4096))
    before = json.loads(json.dumps(identity_of(str(path))))
    path.write_bytes(b"changed" * 1000)
    path.chmod(0o600)
    path.rename(directory / "other.raw")
    now = identity_of(str(directory / "other.raw"))
    assert difference(before, now) is None
    assert is_known(before, now)


def test_a_new_file_with_the_same_inode_is_another(directory):
    path = directory / "disk.raw"
    path.touch()
    before = identity_of(str(path))
    for _ in range(1000):
        path.unlink()
        path.touch()
        now = identity_of(str(path))
        if now["inode"] == before["inode"]:
            break
    assert difference(before, now) is not None
    # Without what the inode's number does not tell, there would be none.
    both = [
        {k: v for k, v in each.items() if k in ("kind", "device", "inode")}
        for each in (before, now)
    ]
    assert (difference(*both) is None) == (now["inode"] == before["inode"])


def test_what_is_not_there(tmp_path):
    assert identity_of(str(tmp_path / "missing")) is None
    (tmp_path / "file").touch()
    assert identity_of(str(tmp_path / "file/below")) is None


@pytest.fixture
def attach(tmp_path):
    """Attach a file of that name to /dev/loop…, which has just been detached."""
    attached = []

    def attach_(name, device="--find"):
        if os.geteuid() or shutil.which("losetup") is None:
            pytest.skip("a loop device needs root and losetup")
        path = tmp_path / name
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        command = [
            "losetup",
            *([device] if device != "--find" else ["--find", "--show"]),
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no loop device here: {done.stderr.strip()}")
        attached.append(done.stdout.strip() or device)
        return attached[-1]

    yield attach_
    for device in attached:
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)


def test_a_device_of_the_same_number_is_another_when_it_was_attached_anew(attach):
    device = attach("one.raw")
    before = identity_of(device)
    assert difference(before, identity_of(device)) is None
    subprocess.run(["losetup", "--detach", device], check=True)
    assert attach("two.raw", device) == device
    now = identity_of(device)
    assert before["kind"] == now["kind"] == "device"
    assert difference(before, now) is not None
    assert is_known(before, now)


def test_after_a_reboot_what_lasts_is_compared(attach, monkeypatch):
    device = attach("one.raw")
    before = identity_of(device)
    subprocess.run(["losetup", "--detach", device], check=True)
    attach("one.raw", device)
    now = {**identity_of(device), "boot": "another"}
    assert difference(before, now) is None  # the same file behind it
    subprocess.run(["losetup", "--detach", device], check=True)
    attach("two.raw", device)
    now = {**identity_of(device), "boot": "another"}
    assert "backing-file was" in difference(before, now)


DEVICE = {"kind": "device", "boot": "b", "diskseq": "7"}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (DEVICE, DEVICE, None),
        (DEVICE, {**DEVICE, "diskseq": "8"}, "diskseq was 7 and is 8"),
        (DEVICE, {**DEVICE, "diskseq": "8", "boot": "c"}, None),
        ({**DEVICE, "wwid": "a"}, {**DEVICE, "boot": "c", "wwid": "b"}, "wwid was a and is b"),
        ({**DEVICE, "wwid": "a"}, {**DEVICE, "boot": "c"}, None),
        (
            {**DEVICE, "partition-number": "1"},
            {**DEVICE, "partition-number": "2"},
            "partition-number was 1 and is 2",
        ),
        (DEVICE, {"kind": "file"}, "one is a file, the other a block device"),
        ({"kind": "file", "inode": 1}, {"kind": "file", "inode": 1, "born": "2.0"}, None),
        (
            {"kind": "file", "inode": 1, "born": "1.0"},
            {"kind": "file", "inode": 1, "born": "2.0"},
            "born was 1.0 and is 2.0",
        ),
    ],
)
def test_differences(before, now, expected):
    assert expected == difference(before, now)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (DEVICE, DEVICE, True),
        (DEVICE, {**DEVICE, "boot": "c"}, False),
        ({**DEVICE, "serial": "s"}, {**DEVICE, "boot": "c", "serial": "s"}, True),
        ({"kind": "file"}, {"kind": "file"}, True),
    ],
)
def test_what_is_known(before, now, expected):
    assert expected == is_known(before, now)


def test_a_c_library_without_the_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(
        identity, "_libc", lambda: identity.SimpleNamespace(statx=None, name_to_handle_at=None)
    )
    (tmp_path / "file").touch()
    assert {"kind", "device", "inode"} == identity_of(str(tmp_path / "file")).keys()
