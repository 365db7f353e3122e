"""Wrong input on a real host: one line that says what is wrong and what to do, and no trace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest

from .disk import PROGRAM, Disk, gained, lost, xenstore_snapshot
from .guest import PATIENCE, Dom0, Guest, Shell, sh

ERROR = "xen-disk: error: "
RUNTIME, USAGE = 1, 2
RECORDS = Path("/run/xen_disk_py")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

Refused = Callable[..., str]


def traces() -> dict[str, str]:
    """Return what a run could leave behind: nodes of xenstore, and files of ours."""
    files = RECORDS.iterdir() if RECORDS.exists() else ()
    nodes = {path: value for path, value in xenstore_snapshot().items() if path != "/libxl"}
    return {**nodes, **{str(file): "" for file in files}}


def run(
    arguments: Sequence[Any],
    *,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a command of the product, perhaps under another program that prepares the ground."""
    return subprocess.run(
        [*prefix, *PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def check_refusal(
    result: subprocess.CompletedProcess[str], status: int, says: Sequence[str]
) -> str:
    """See that a run ended with a status and one line on stderr with certain words in it."""
    told = f"{result.args}\nstatus {result.returncode}\n{result.stdout}{result.stderr}"
    assert result.returncode == status, told
    assert result.stdout == "", told
    lines = result.stderr.splitlines()
    assert len(lines) == 1, told
    assert lines[0].startswith(ERROR), told
    for words in says:
        assert words in lines[0], f"{words!r} is not in: {told}"
    return lines[0]


@pytest.fixture
def refused() -> Iterator[Refused]:
    """Return a function that runs a command which must fail, and leave no trace."""
    before = traces()

    def check(*arguments: Any, status: int = RUNTIME, says: Sequence[str], **how: Any) -> str:
        return check_refusal(run(arguments, **how), status, says)

    yield check
    after = traces()
    assert gained(before, after) == {}
    assert lost(before, after) == {}


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a directory that everybody may look into, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="errors-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def privately(script: str) -> tuple[str, ...]:
    """Return what runs a program in mounts of its own, changed by a script that nobody else sees.

    ``$d`` is an empty directory in it.
    """
    prepare = "set -e; d=$(mktemp -d); mount -t tmpfs none $d"
    return ("unshare", "--mount", "sh", "-c", f'{prepare}; {script}; exec "$@"', "sh")


def without(device: str) -> tuple[str, ...]:
    """Return what runs a program in a world without ``/dev/xen/<device>``."""
    return privately(f"cp -a /dev/xen/. $d; rm $d/{device}; mount --bind $d /dev/xen")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process stand still for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def xenstored() -> int:
    return int(sh("pidof", "xenstored").split()[0])


# -- the guest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("connect", "nosuch"), ("disconnect", "4711", "xvdb")])
def test_no_such_vm(refused: Refused, command: tuple[str, ...]) -> None:
    """The running ones are listed."""
    refused(*command, says=[f"no domain {command[1]!r} is running", "0 Domain-0"])


def test_two_vms_of_that_name(refused: Refused) -> None:
    """Their ids are told, by which they can be told apart. (xl refuses to make such a pair.)"""
    homes = [f"/local/domain/{domid}" for domid in (30001, 30002)]
    try:
        for home in homes:
            sh("xenstore-write", f"{home}/name", "twin")
        refused("connect", "twin", says=["several domains are named 'twin'", "30001, 30002"])
    finally:
        for home in homes:
            sh("xenstore-rm", home)


def test_guest_without_a_block_frontend(new_guest: Callable[..., Guest]) -> None:
    """The disk is taken back, and it is told what the guest's state usually means."""
    guest = new_guest("pv", cmdline="lab.noblkfront")
    before = traces()
    result = run(["connect", guest.name, "--timeout", "3"])
    after = traces()
    check_refusal(
        result,
        RUNTIME,
        ["did not connect within 3 s", "Initialising", "no block driver", "modprobe xen-blkfront"],
    )
    assert before == after


# -- the image -------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_no_such_file(refused: Refused, directory: Path) -> None:
    """The file is named."""
    path = directory / "absent.raw"
    refused("connect", "0", "--path", path, says=[str(path), "no such file", "truncate"])


def test_directory(refused: Refused, directory: Path) -> None:
    """A directory is no disk."""
    refused(
        "connect", "0", "--path", directory, says=[str(directory), "a directory", "give the image"]
    )


def test_empty_file(refused: Refused, directory: Path) -> None:
    """An image has a size."""
    path = directory / "empty.raw"
    path.touch()
    says = [str(path), "empty", "truncate -s"]
    refused("connect", "0", "--path", path, "--backend", "raw", says=says)


def test_odd_size(refused: Refused, directory: Path) -> None:
    """A disk has whole sectors."""
    path = directory / "odd.raw"
    path.write_bytes(b"x" * 1000)
    says = [str(path), "1000 bytes", "multiple of 512", "truncate -s %512"]
    refused("connect", "0", "--path", path, says=says)


def test_file_without_permission(refused: Refused, directory: Path) -> None:
    """Who may not talk to Xen is told to be root, and without Xen, about the file."""
    path = directory / "secret.raw"
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    refused("connect", "0", "--path", path, prefix=NOBODY, says=["run this as root"])
    says = [str(path), "no permission to read", "run as its owner or root"]
    refused("info", path, prefix=NOBODY, says=says)


# -- a backend of one's own ------------------------------------------------------------------------

HEAD = "from xen_disk_py.backends import Backend\n\n\n"
WHOLE = """\
class Broken(Backend):
    size = 1 << 20

    def read(self, buffers, offset):
        pass

    def write(self, buffers, offset):
        pass
"""
OPENS = "\n    def __init__(self):\n        raise RuntimeError('no tape in the drive')\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def oops(:\n", ["broken.py:1", "SyntaxError"]),
        (HEAD + WHOLE.partition("    def write")[0], ["Broken", "no write(self, buffers"]),
        (HEAD + WHOLE + OPENS, ["broken.py:14", "RuntimeError: no tape in the drive"]),
        (HEAD + WHOLE.replace("1 << 20", "-512"), ["Broken", "size is -512", "positive"]),
    ],
    ids=["syntax error", "missing method", "exception in open", "negative size"],
)
def test_broken_backend(refused: Refused, directory: Path, source: str, says: list[str]) -> None:
    """The author is told what is wrong, and the line where there is one."""
    path = directory / "broken.py"
    path.write_text(source)
    refused("connect", "0", "--path", path, says=says)


# -- the device ------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_vdev_taken(dom0: Dom0, connect: Callable[..., Disk]) -> None:
    """The disk that has the name stays as it is."""
    disk = connect(dom0, "--size", "1M", "--vdev", "xvdc")
    dom0.wait_for_device(disk.device)
    before = traces()
    result = run(["connect", "0", "--vdev", "xvdc"])
    after = traces()
    check_refusal(result, RUNTIME, ["xvdc is taken", "choose another --vdev"])
    assert before == after
    dom0.check(f"dd if=/dev/{disk.device} of=/dev/null bs=4096 count=1 iflag=direct")
    assert disk.disconnect() == 0, disk.describe()


def test_vdev_nonsense(refused: Refused) -> None:
    """Examples are given."""
    says = ["'xvd!'", "no device name", "xvdb"]
    refused("connect", "0", "--vdev", "xvd!", status=USAGE, says=says)


# -- the host --------------------------------------------------------------------------------------


def test_not_root(refused: Refused) -> None:
    """An unprivileged user is told to be root."""
    refused("connect", "0", prefix=NOBODY, says=["run", "as root"])


def test_no_xen(refused: Refused) -> None:
    """On a machine without Xen it says so, and what can be done all the same."""
    places = "/sys/hypervisor /dev/xen /proc/xen /run/xenstored"
    hidden = privately(f"for place in {places}; do mount -t tmpfs none $place; done")
    refused("connect", "0", prefix=hidden, says=["this machine does not run on Xen"])


@pytest.mark.smoke
def test_xenstore_that_does_not_answer(refused: Refused) -> None:
    """It does not wait indefinitely."""
    with stopped(xenstored()):
        result = run(["connect", "0"])
    check_refusal(result, RUNTIME, ["xenstore", "does not answer", "xenstored"])


def test_nobody_at_the_socket(refused: Refused, directory: Path) -> None:
    """A xenstored that has died is told from one that is slow."""
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    says = ["cannot connect to xenstore", str(path), "refused", "start xenstored"]
    how = {"prefix": without("xenbus"), "environment": {"XENSTORED_PATH": str(path)}}
    refused("connect", "0", says=says, **how)


@pytest.mark.parametrize("name", ["gntdev", "evtchn"])
def test_module_not_loaded(refused: Refused, name: str) -> None:
    """The command that loads it is told."""
    says = [f"/dev/xen/{name} does not exist", f"modprobe xen-{name}"]
    refused("connect", "0", prefix=without(name), says=says)


@pytest.mark.parametrize(
    ("name", "package"),
    [("libxengnttab.so.1", "libxengnttab1"), ("libxenevtchn.so.1", "libxenevtchn1")],
)
def test_library_missing(refused: Refused, name: str, package: str) -> None:
    """The package that has it is told."""
    place = sh("sh", "-c", f"dirname $(ldconfig -p | grep -m 1 '{name} ' | sed 's/.* //')").strip()
    place = os.path.realpath(place)
    layers = f"lowerdir={place},upperdir=$d/up,workdir=$d/work"
    sh("modprobe", "overlay")
    hidden = privately(
        f"mkdir $d/up $d/work; mknod $d/up/{name} c 0 0; mount -t overlay -o {layers} none {place}"
    )
    refused("connect", "0", prefix=hidden, says=[f"{name} not found", "install", package])


def test_sound_host_again(dom0: Shell, connect: Callable[..., Disk]) -> None:
    """After all that a disk can be connected."""
    disk = connect(dom0, "--size", "1M")
    dom0.wait_for_device(disk.device)
    assert disk.disconnect() == 0, disk.describe()
