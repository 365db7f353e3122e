import ctypes
import errno
import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from xen_disk_py.errors import PrivilegeError, UsageError
from xen_disk_py.host import privileges
from xen_disk_py.host.privileges import User, become, find_user
from xen_disk_py.recovery.record import Record, find
from xen_disk_py.xenbus.states import Address

SOMEBODY = User("somebody", 1234, 4321)


@pytest.fixture
def users(monkeypatch):
    """A host with root and two others, and we are root."""
    by_name = {"root": (0, 0), "somebody": (1234, 4321), "toor": (0, 4321)}
    groups = {"root": 0, "disks": 999}

    def entry(name):
        uid, gid = by_name[name]
        return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/false"))

    def group(name):
        return grp.struct_group((name, "x", groups[name], []))

    def with_number(table, lookup):
        return lambda number: lookup({of(v): k for k, v in table.items()}[number])

    def of(value):
        return value[0] if isinstance(value, tuple) else value

    monkeypatch.setattr(pwd, "getpwnam", entry)
    monkeypatch.setattr(pwd, "getpwuid", with_number(by_name, entry))
    monkeypatch.setattr(grp, "getgrnam", group)
    monkeypatch.setattr(grp, "getgrgid", with_number(groups, group))
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.parametrize(
    ("text", "gid"),
    [("somebody", 4321), ("1234", 4321), ("somebody:disks", 999), ("1234:999", 999)],
)
def test_a_user_is_found_by_name_or_number(users, text, gid):
    assert User("somebody", 1234, gid) == find_user(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gone", "there is no user 'gone'"),
        ("", "there is no user ''"),
        ("77", "there is no user '77'"),
        ("somebody:gone", "there is no group 'gone'"),
        ("somebody:", "there is no group ''"),
        ("somebody:77", "there is no group '77'"),
        ("root", "that is root"),
        ("0", "that is root"),
        ("toor", "that is root"),
        ("somebody:root", "that is root"),
    ],
)
def test_who_cannot_be_become_is_refused_in_one_line(users, text, why):
    with pytest.raises(UsageError) as caught:
        find_user(text)
    assert str(caught.value).startswith(f"--user {text}: {why}")
    assert "\n" not in str(caught.value)


def test_a_number_that_is_too_large_is_no_user():
    with pytest.raises(UsageError, match="there is no user"):
        find_user("9" * 30)


def test_only_root_becomes_somebody_else(users, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError, match="only root can become somebody else: run as root"):
        find_user("somebody")


STATUS = {
    "Name": "python",
    "Uid": "1234\t1234\t1234\t1234",
    "Gid": "4321\t4321\t4321\t4321",
    "Groups": "",
    "CapInh": "0000000000000000",
    "CapPrm": "0000000000000000",
    "CapEff": "0000000000000000",
    "CapBnd": "000001ffffffffff",
    "CapAmb": "0000000000000000",
    "NoNewPrivs": "1",
}


class Kernel:
    """Writes down what it is asked, and shows in /proc what it is told to."""

    def __init__(self, tasks):
        self.calls = []
        self.tasks = tasks
        self.fails = None
        self.show(10, STATUS)
        self.show(11, STATUS)

    def show(self, task, status):
        directory = self.tasks / str(task)
        directory.mkdir(exist_ok=True)
        lines = [f"{name}:\t{value}\n" for name, value in status.items()]
        (directory / "status").write_text("".join(lines), encoding="ascii")

    def system_call(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if self.fails == name:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        return call

    def prctl(self, option, *_rest):
        self.calls.append(("prctl", option))
        return self._result("prctl")

    def capset(self, _header, data):
        self.calls.append(("capset", data))
        return self._result("capset")

    def _result(self, name):
        ctypes.set_errno(errno.EPERM)
        return -1 if self.fails == name else 0


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    kernel = Kernel(tmp_path)
    for name in ("umask", "setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, kernel.system_call(name))
    monkeypatch.setattr(privileges, "_libc", kernel)
    monkeypatch.setattr(privileges, "_TASKS", str(tmp_path))
    return kernel


def test_groups_go_while_we_are_root_and_capabilities_at_the_end(kernel):
    become(SOMEBODY)
    assert kernel.calls == [
        ("umask", 0o077),
        ("setgroups", []),
        ("setresgid", 4321, 4321, 4321),
        ("setresuid", 1234, 1234, 1234),
        ("capset", bytes(24)),
        ("prctl", 4),
    ]


@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid", "capset", "prctl"])
def test_what_the_system_refuses_ends_it(kernel, call):
    kernel.fails = call
    with pytest.raises(PrivilegeError, match="Operation not permitted"):
        become(SOMEBODY)
    assert call == kernel.calls[-1][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("Uid", "\t".join("0" if i == j else "1234" for j in range(4))) for i in range(4)),
        *(("Gid", "\t".join("0" if i == j else "4321" for j in range(4))) for i in range(4)),
        ("Groups", "6"),
        *((name, "0000000000200000") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")),
        ("NoNewPrivs", "0"),
        ("NoNewPrivs", None),
    ],
)
def test_whatever_is_left_in_any_thread_is_refused(kernel, name, value):
    status = {**STATUS, name: value}
    if value is None:
        del status[name]
    kernel.show(11, status)
    found = "not shown" if value is None else value.replace("\t", " ")
    with pytest.raises(PrivilegeError, match=f"{name} of thread 11 is {found}, not "):
        become(SOMEBODY)


def test_a_thread_that_has_just_ended_has_nothing_left(kernel):
    (kernel.tasks / "12").mkdir()
    become(SOMEBODY)


def test_a_system_that_shows_nothing_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(privileges, "_TASKS", "/no/such/directory")
    with pytest.raises(PrivilegeError, match="/no/such/directory cannot be read"):
        become(SOMEBODY)


# -- and really ------------------------------------------------------------------------------

REALLY = pytest.mark.skipif(
    os.geteuid() != 0 or "nobody" not in [entry.pw_name for entry in pwd.getpwall()],
    reason="needs root, and a user nobody",
)
TESTS = Path(__file__).parents[1]

BECOME = """
import json, os, sys, threading
from xen_disk_py.host import privileges
from xen_disk_py.errors import PrivilegeError

early = threading.Event()
if "early" in sys.argv:
    threading.Thread(target=early.wait, daemon=True).start()
user = privileges.find_user("nobody")
privileges.forbid_gains()
late = threading.Event()
threading.Thread(target=late.wait, daemon=True).start()
image = open(sys.argv[1], "r+b", buffering=0)
try:
    privileges.become(user)
except PrivilegeError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    os._exit(0)

def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.strerror
    return None

status = {}
for line in open("/proc/self/status"):
    name, _, value = line.partition(":")
    status[name] = value.split()
print(json.dumps({
    "threads": len(os.listdir("/proc/self/task")),
    "status": status,
    "refused": [
        attempt(os.setuid, 0),
        attempt(os.setgid, 0),
        attempt(open, sys.argv[1]),
        attempt(open, "/proc/self/mem"),
    ],
    "written": image.write(b"by nobody"),
    "umask": os.umask(0),
}), flush=True)
os._exit(0)
"""


def run_python(script, *arguments, **environment):
    """Run a script with this package and the tests' modules at hand; its output as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)
    return json.loads(done.stdout)


@pytest.fixture
def roots_image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0o600)
    return path


@REALLY
def test_nobody_has_nothing_but_what_is_open(roots_image):
    shown = run_python(BECOME, roots_image)
    nobody = pwd.getpwnam("nobody")
    status = shown["status"]
    assert [str(nobody.pw_uid)] * 4 == status["Uid"]
    assert [str(nobody.pw_gid)] * 4 == status["Gid"]
    assert [] == status["Groups"]
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert ["0" * 16] == status[name]
    assert ["1"] == status["NoNewPrivs"]
    assert 2 == shown["threads"]
    assert ["Operation not permitted"] * 2 + ["Permission denied"] * 2 == shown["refused"]
    assert 0o077 == shown["umask"]
    assert b"by nobody" == roots_image.read_bytes()[: shown["written"]]


@REALLY
def test_a_thread_that_was_there_before_is_not_overlooked(roots_image):
    error = run_python(BECOME, roots_image, "early")["error"]
    assert "NoNewPrivs of thread" in error
    assert bytes(9) == roots_image.read_bytes()[:9]


CONNECT = """
import contextlib, json, os, signal, sys, threading
from pathlib import Path
from xen_disk_py.host import privileges

privileges.forbid_gains()  # before the simulated xenstored starts its thread
from conftest import Host
from xen_disk_py.cli import main
from xen_disk_py.xenbus.vdev import parse
from xen_disk_py.xenbus.states import Address, State

records, image, end = sys.argv[1:]
late = []

def watch_opens(event, arguments):
    if event in ("open", "import") and os.geteuid() and not str(arguments[0]).startswith("/proc"):
        late.append(str(arguments[0]))

stack = contextlib.ExitStack()
host = Host(stack, Path(records))
nodes = host.tree()
address = Address(0, host.DOMID, parse("xvda").number, "vbd3")
stores = [host.open_store(host.DOMID) for _ in range(2)]
host.open_store = lambda domid: stores.pop()
env = host.environment()
facts = {"read": []}

def play():
    host.until(lambda: f"{address.frontend}/state" in host.tree())
    for number in range(2):
        frontend = host.frontend(address)
        frontend.connect()
        frontend.write(4096 * number, b"nobody  " * 512)
        frontend.flush()
        facts["read"].append(len(frontend.read(0, 65536)))
        facts["uid"] = os.geteuid()
        with contextlib.suppress(PermissionError):
            facts["sealed"] = os.stat(f"{records}/5-51712.sealed").st_uid
        if number == 0:  # the guest's driver is loaded again
            frontend.disconnect()
            frontend._switch(State.INITIALISING)
    host.until(env.stdout.getvalue)
    os.kill(os.getpid(), signal.SIGINT)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    if end == "forced":
        os.kill(os.getpid(), signal.SIGINT)
    else:
        frontend.disconnect()

player = threading.Thread(target=play)
player.start()
sys.addaudithook(watch_opens)
argv = ["connect", "guest", "--path", image, "--backend", "raw", "--user", "nobody"]
facts["status"] = int(main(argv, env))
player.join()
left = host.tree()
for tree in (nodes, left):
    tree.pop("/local/domain/0/device", None)
facts["left"] = sorted(set(left) ^ set(nodes))
facts["late"] = late
facts["err"] = env.stderr.getvalue()
print(json.dumps(facts), flush=True)
os._exit(0)
"""


@pytest.mark.shared
@REALLY
@pytest.mark.parametrize(("end", "status"), [("unplugged", 0), ("forced", 130)])
def test_a_disk_is_served_and_cleaned_up_by_nobody(roots_image, tmp_path, end, status):
    records = tmp_path / "records"
    shown = run_python(CONNECT, records, roots_image, end, TMPDIR=tmp_path)
    assert status == shown["status"], shown["err"]
    assert pwd.getpwnam("nobody").pw_uid == shown["uid"]
    assert [65536, 65536] == shown["read"]
    assert roots_image.read_bytes().startswith(b"nobody")
    assert [] == shown["left"]
    assert [] == shown["late"]
    assert not find(str(records), Address(0, 5, 51712, "vbd3")).alive
    sealed = os.stat(records / "5-51712.sealed")
    assert (0, 0o600, False) == (sealed.st_uid, stat.S_IMODE(sealed.st_mode), "sealed" in shown)
    with Record(str(records), Address(0, 5, 51728, "vbd3")):
        assert ["5-51728"] == os.listdir(records)
