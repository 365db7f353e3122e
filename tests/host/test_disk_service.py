"""The systemd unit that serves one disk: what it runs is a command line of ours."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources

import pytest

from xen_disk_py.commands.arguments import build_parser
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import record

UNIT = resources.files("xen_disk_py").joinpath("data", "xen-disk@.service").read_text("utf-8")

MDWE = """
import ctypes
zero = ctypes.c_ulong(0)
if ctypes.CDLL(None).prctl(65, ctypes.c_ulong(1), zero, zero, zero):  # PR_SET_MDWE
    raise SystemExit(77)
from xen_disk_py import libxen
from xen_disk_py.host import atomic
libxen._logger_address()
atomic.load_fence().barrier()
"""


class Unit(configparser.RawConfigParser):
    """Keeps the case of names; of one that comes again, the last."""

    def __init__(self):
        super().__init__(strict=False, comment_prefixes=("#",), delimiters=("=",))
        self.optionxform = str
        self.read_string(UNIT)


def documented_configuration():
    """Return the example of a configuration file that the unit begins with."""
    return dict(re.findall(r"^#   ([A-Z_]+)=(.*)$", UNIT, re.MULTILINE))


def test_the_documented_configuration_makes_a_command_line():
    command = Unit()["Service"]["ExecStart"]
    for name, value in documented_configuration().items():
        assert re.search(rf"\$\{{?{name}\b", command), f"{name} is not used"
        command = re.sub(rf"\$\{{{name}\}}", shlex.quote(value), command)
        command = command.replace(f"${name}", value)
    assert "$" not in command
    program, *words = shlex.split(command)
    assert "@PROGRAM@" == program
    args = build_parser().parse_args(words)
    assert ("connect", "web", "nobody", True) == (args.command, args.vm, args.user, args.quiet)
    assert ("raw", "xvdb", True) == (args.backend, args.vdev, args.recover)


def test_a_guest_whose_name_looks_like_an_option_is_a_guest():
    command = Unit()["Service"]["ExecStart"].replace("${VM}", "--debug").replace("$OPTIONS", "")
    assert "--debug" == build_parser().parse_args(shlex.split(command)[1:]).vm


def test_starting_waits_longer_than_the_guest_may_take():
    """The default of systemd is 90 s, and connect's is said by its parser."""
    assert "notify" == Unit()["Service"]["Type"]
    assert "TimeoutStartSec" not in Unit()["Service"]
    assert build_parser().parse_args(["connect", "vm"]).timeout < 90


def test_what_leaves_its_disk_behind_is_restarted_and_nothing_else():
    service = Unit()["Service"]
    assert "on-abnormal" == service["Restart"]  # signals and silence, no exit status
    assert [str(int(ExitStatus.CRASHED))] == service["RestartForceExitStatus"].split()


def test_what_a_successor_needs_to_know_is_kept():
    service = Unit()["Service"]
    assert record.DIRECTORY == f"/run/{service['RuntimeDirectory']}"
    assert "yes" == service["RuntimeDirectoryPreserve"]


def test_memory_that_is_written_need_not_be_executed():
    done = subprocess.run([sys.executable, "-c", MDWE], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("needs Linux 6.3")
    assert (0, "") == (done.returncode, done.stderr)


def test_systemd_takes_it(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    path = tmp_path / "xen-disk@web.service"
    path.write_text(UNIT.replace("@PROGRAM@", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr.strip()}")
    assert (0, "") == (done.returncode, done.stderr)
