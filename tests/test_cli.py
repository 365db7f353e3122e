"""From arguments to an exit status; whatever goes wrong is one line on stderr."""

from __future__ import annotations

import argparse
import io
import itertools
import subprocess
import sys
from contextlib import suppress

import pytest

from xen_disk_py import __version__, cli
from xen_disk_py.cli import main
from xen_disk_py.commands.arguments import build_parser, commands_of
from xen_disk_py.commands.backend_arguments import spec_from
from xen_disk_py.commands.environment import Environment
from xen_disk_py.commands.parsing import parse
from xen_disk_py.errors import DeviceError, GuestNotFound, UsageError
from xen_disk_py.exit_status import ExitStatus


@pytest.fixture
def env():
    def missing():
        raise AssertionError("nothing of this host is needed to see that it is wrong")

    return Environment(
        stdout=io.StringIO(), stderr=io.StringIO(), open_store=missing, open_hypervisor=missing
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: COMMAND"),
        (["fly"], "no command 'fly' (try: xen-disk --help)"),
        (["--debug", "conect"], "no command 'conect': did you mean connect? (try: xen-disk"),
        (["connect", "--sise", "1G"], "no option --sise: did you mean --size? (try: xen-disk conn"),
        (["connect", "vm", "--sise=1G"], "no option --sise: did you mean --size? (try"),
        (["disconnect", "--froce"], "no option --froce: did you mean --force? (try"),
        (["connect", "vm", "--rolle", "x"], "no option --rolle (try"),  # nobody is told of --role
        (["--debugg", "list"], "no option --debugg: did you mean --debug? (try"),
        (["help", "demon"], "no command 'demon': did you mean demo? (try: xen-disk --help)"),
        (["connect"], "required: VM"),
        (["connect", "vm", "--size", "lots"], "'lots' is not a size"),
        (["connect", "vm", "--size", "100E"], "'100E' is more than any disk can have"),
        (["connect", "vm", "--path", ""], "the name of the file is empty"),
        (["connect", "vm", "--overlay", ""], "the name of the file is empty"),
        (["export", "", "new"], "the name of the file is empty"),
        (["export", "a", ""], "the name of the file is empty"),
        (["connect", "vm", "--path", "a", "--cow-limit", "0"], "0 bytes hold no change"),
        (["connect", "vm", "--backend", "overlay"], "needs --path and --overlay"),
        (["connect", "vm", "--path", "a", "--read-only", "--overlay", "no/such"], "leave out one"),
        (["connect", "vm", "--size", "1.00001K"], "not a whole number of bytes"),
        (["connect", "vm", "--vdev", "floppy"], "'floppy' is no device name"),
        (["connect", "vm", "--vdev", ""], "'' is no device name"),
        (["connect", "vm", "--indirect-segments", "4097"], "not a number from 0 to 4096"),
        (["connect", "vm", "--indirect-segments", "-1"], "not a number from 0 to 4096"),
        (["connect", "vm", "--indirect-segments", "²"], "not a number from 0 to 4096"),
        (["connect", "vm", "--timeout", "soon"], "'soon' is no number of seconds"),
        (["connect", "vm", "--timeout", "-1"], "is no number of seconds"),
        (["connect", "vm", "--timeout", "nan"], "is no number of seconds"),
        (["connect", "vm", "--timeout", "inf"], "is no number of seconds"),
        (["connect", "vm", "--timeout", "1e9"], "is no number of seconds"),
        (["connect", "vm", "--backend", "magnetic"], "magnetic"),
        (["connect", "vm", "--option", "novalue"], "write it as name=value"),
        (["connect", "vm", "--option", "not-a-name=1"], "write it as name=value"),
        (["connect", "vm", "--option", "size=1M"], "use --size for that"),
        (["connect", "vm", "--option", "a=1"], "takes no --option a"),
        (["connect", "vm", "--cow-limit", "1G"], "takes no --cow-limit"),
        (["connect", "vm", "--backend", "raw"], "needs --path"),
        (["connect", "vm", "--backend", "overlay", "--path", "a"], "needs --overlay"),
        (["connect", "vm", "--overlay", "no/such"], "name the image with --path"),
        (["connect", "vm", "--overlay", "a", "--backend", "raw", "--path", "b"], "no --overlay"),
        (["connect", "vm", "--overlay", "a", "--backend", "discard"], "takes no --overlay"),
        (["connect", "vm", "--option", "overlay=a"], "use --overlay for that"),
        (["diff"], "required: OVERLAY"),
        (["commit"], "required: OVERLAY"),
        (["export", "a"], "required: NEW"),
        (["connect", "vm", "--sector-size", "700"], "'700' is not 512, 1024, 2048 or 4096"),
        (["connect", "vm", "--sector-size", "4K"], "'4K' is not 512, 1024, 2048 or 4096"),
        (["connect", "vm", "--option", "sector_size=4096"], "use --sector-size for that"),
        (["connect", "vm", "--user", "no such user"], "there is no user 'no such user'"),
        (["connect", "vm", "extra"], "the name of a new disk goes with --vdev"),
        (["connect", "vm", "extra", "--adopt", "more"], "unrecognized arguments: more"),
        (["list", "--json", "vm", "extra"], "unrecognized arguments: extra"),
        (["resize", "vm", "xvda", "--force", "huge"], "'huge' is not a size"),
        (["disconnect", "vm"], "required: VDEV"),
        (["disconnect", "vm", "nonsense"], "'nonsense' is no device name"),
        (["resize", "vm"], "required: VDEV"),
        (["resize", "vm", "xvda", "huge"], "'huge' is not a size"),
        (["resize", "vm", "xvda", "100"], "SIZE: 100 bytes is not a positive multiple of 512"),
        (["resize", "vm", "xvda", "--timeout", "soon"], "'soon' is no number of seconds"),
        (["demo", "--bytes", "100"], "--bytes takes a multiple of 512, not 100 B"),
        (["demo", "--bytes", "0"], "--bytes takes a multiple of 512"),
    ],
)
def test_usage(env, argv, said):
    assert main(argv, env) is ExitStatus.USAGE
    (line,) = env.stderr.getvalue().splitlines()
    assert line.startswith("xen-disk: error: ")
    assert said in line
    assert env.stdout.getvalue() == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "100"], "100 bytes is not a positive multiple of 512"),
        (["--size", "512", "--sector-size", "4096"], "multiple of 4096"),
    ],
)
def test_what_comes_to_light_when_the_disk_is_opened(host, argv, said):
    env = host.environment()
    assert ExitStatus.USAGE == main(["connect", "guest", *argv], env)
    assert said in env.stderr.getvalue()


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        ([], "xen-disk"),
        (["fly"], "xen-disk"),
        (["connect", "vm", "--timeout", "soon"], "xen-disk connect"),
        (["demo", "extra"], "xen-disk demo"),
        (["demo", "--colour"], "xen-disk demo"),
        (["demo", "--bytes", "100"], "xen-disk demo"),
        (["resize", "vm", "xvda", "--force", "huge"], "xen-disk resize"),
        (["connect", "vm", "--user", "no such user"], "xen-disk connect"),
    ],
)
def test_a_mistake_names_the_help_of_the_command_that_was_wrong(env, argv, program):
    main(argv, env)
    assert env.stderr.getvalue().endswith(f" (try: {program} --help)\n")


def test_what_is_no_option_may_look_like_one():
    assert "--jsno" == parse(["list", "--", "--jsno"]).vm
    assert "--my guest" == parse(["list", "--my guest"]).vm


@pytest.mark.parametrize("command", [None, *commands_of(build_parser())])
def test_help_says_what_the_option_says(env, command, capsys):
    words = [] if command is None else [command]
    assert main(["help", *words], env) is ExitStatus.OK
    assert main([*words, "--help"], env) is ExitStatus.OK
    assert capsys.readouterr().out == env.stdout.getvalue()


def test_the_ten_options_that_people_need_first_come_first():
    first = commands_of(build_parser())["connect"]._optionals._group_actions
    shown = {action.option_strings[0] for action in first if action.help != argparse.SUPPRESS}
    assert 10 == len(shown - {"-h", "--debug"})


@pytest.mark.parametrize("argv", [["-V"], ["--version"], ["--help"], ["connect", "--help"]])
def test_help_and_version(env, argv, capsys):
    assert main(argv, env) is ExitStatus.OK
    printed = capsys.readouterr().out
    assert (f"xen-disk {__version__}" if argv[0] in ("-V", "--version") else "usage:") in printed
    assert env.stderr.getvalue() == ""


@pytest.mark.parametrize("argv", [["--debug", "list"], ["list", "--debug"]])
def test_debug_stands_anywhere(env, argv, caplog):
    env.open_store = failing(GuestNotFound("nobody"))
    with caplog.at_level("DEBUG"):
        assert main(argv, env) is ExitStatus.ERROR
    (shown,) = [record for record in caplog.records if record.exc_info]
    assert shown.exc_info[0] is GuestNotFound


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            UsageError("do it like this"),
            2,
            "xen-disk: error: do it like this (try: xen-disk list --help)\n",
        ),
        (DeviceError("it broke"), 1, "xen-disk: error: it broke\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 1, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(None), 0, ""),
        (SystemExit(77), 1, ""),
        (SystemExit("an author's own words"), 1, ""),
        (
            ZeroDivisionError("by zero"),
            1,
            "xen-disk: error: ZeroDivisionError: by zero "
            "(a bug, or a broken system: see --debug)\n",
        ),
    ],
)
def test_exit_status(env, error, status, said, caplog):
    env.open_store = failing(error)
    assert status == main(["list"], env)
    assert said == env.stderr.getvalue()
    assert "Traceback" not in caplog.text


def test_a_bug_has_its_traceback_with_debug(env):
    env.open_store = failing(ZeroDivisionError("by zero"))
    with pytest.raises(ZeroDivisionError):
        main(["list", "--debug"], env)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "discard"),
        (["--path", "disk.raw"], "cow"),
        (["--path", "disk.py.raw"], "cow"),
        (["--path", "cow"], "cow"),
        (["--path", "./mine.py"], "./mine.py"),
        (["--path", "mine.py:Second"], "mine.py:Second"),
        (["--path", "disk.raw", "--backend", "raw"], "raw"),
        (["--backend", "a.b:C"], "a.b:C"),
    ],
)
def test_what_a_backend_is_called(argv, name):
    from xen_disk_py.commands.backend_arguments import spec_from

    assert name == spec_from(build_parser().parse_args(["connect", "vm", *argv])).backend_name


def test_options_reach_the_backend(tmp_path):
    from xen_disk_py.commands.backend_arguments import backend_from

    (tmp_path / "mine.py").write_text(
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    def __init__(self, size: int, colour, read_only=False):\n"
        "        self.size, self.colour, self.read_only = size, colour, read_only\n"
        "    def read(self, buffers, offset): ...\n"
        "    def write(self, buffers, offset): ...\n"
    )
    argv = ["connect", "vm", "--path", str(tmp_path / "mine.py"), "--option", "colour=a=b"]
    argv += ["--size", "2M", "--read-only"]
    disk = backend_from(build_parser().parse_args(argv))
    assert (2 << 20, "a=b", True) == (disk.size, disk.colour, disk.read_only)


def test_the_default_environment(monkeypatch):
    """Is this machine; each part is looked up when it is needed."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    env = Environment()
    assert env.stdout is sys.stdout
    assert env.stderr is sys.stderr
    assert env.record_directory == "/run/xen_disk_py"
    monkeypatch.setattr("xen_disk_py.libxen.Xen", lambda: "xen")
    monkeypatch.setattr("xen_disk_py.xenbus.toolstack.xen_version", lambda: (4, 17))
    assert env.open_hypervisor() == "xen"
    assert env.xen_version() == (4, 17)
    assert main(["connect"]) is ExitStatus.USAGE
    assert "required: VM" in sys.stderr.getvalue()


@pytest.mark.parametrize("argv", [["top", "--once", "--interval", "0.01"], ["complete", "con"]])
def test_a_closed_stdout_is_no_error(monkeypatch, argv, tmp_path):
    monkeypatch.setattr("sys.stdout", None)
    env = Environment(stderr=io.StringIO(), record_directory=str(tmp_path))
    with env.stdout:
        assert (ExitStatus.OK, "") == (main(argv, env), env.stderr.getvalue())


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["top", "--help"]])
def test_help_that_has_not_arrived_is_an_error(monkeypatch, env, argv):
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert ExitStatus.ERROR == main(argv, env)
    assert "cannot write to stdout: No space left on device" in env.stderr.getvalue()


def test_as_a_program():
    """As ``python -m xen_disk_py``; the console script calls the same function."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "xen_disk_py", "connect"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("xen-disk: error: the following arguments are required: VM")


def test_run_exits_with_the_status(monkeypatch):
    monkeypatch.setattr("sys.argv", ["xen-disk", "connect"])
    for stream in ("stdout", "stderr"):  # are given up
        monkeypatch.setattr(sys, stream, io.StringIO())
    with pytest.raises(SystemExit) as caught:
        cli.run()
    assert caught.value.code == 2


SHOWS_ITS_STACK = """
import threading
from xen_disk_py import cli

cli._main = lambda *_, **__: print(threading.stack_size()) or 0
cli.run([])
"""


def test_threads_have_large_stacks_where_they_are_small_by_default():
    command = ["sh", "-c", 'ulimit -s 1024; exec "$0" -c "$1"', sys.executable, SHOWS_ITS_STACK]
    assert 8 << 20 == int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("words", list(itertools.permutations(["vm", "xvda", "--adopt"])))
def test_an_option_may_stand_before_what_can_be_left_out(words):
    args = parse(["connect", *words])
    expected = [word for word in words if word != "--adopt"]
    assert (*expected, True) == (args.vm, args.device, args.adopt)


def test_a_size_may_stand_behind_an_option():
    assert 1 << 30 == parse(["resize", "vm", "xvda", "--force", "1G"]).size


@pytest.mark.parametrize(
    "words",
    [
        ["connect", "vm", "--path", "p.py", "a-b=1", "size=2=3"],
        ["connect", "vm", "a-b=1", "--path", "p.py", "size=2=3"],
        ["connect", "vm", "--option", "a-b=1", "--path", "p.py", "size=2=3"],
        ["connect", "vm", "--adopt", "--path", "p.py", "a-b=1", "size=2=3", "xvdb"],
        ["demo", "a-b=1", "--path", "p.py", "size=2=3"],
    ],
)
def test_settings_of_a_plugin_stand_anywhere_in_their_order(words):
    args = parse(words)
    assert ["a-b=1", "size=2=3"] == args.option
    assert ("xvdb" if "--adopt" in words else None) == getattr(args, "device", None)
    assert ("a-b=1", "size=2=3") == spec_from(args).options
