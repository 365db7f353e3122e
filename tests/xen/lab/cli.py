"""The commands of the lab."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from .architecture import CPUS
from .build import ensure_build, say
from .ceph import ceph
from .machine import BootError, LabError, Link, Machine, Relay
from .progress import NOTES, Follower, Progress, commit_of, report
from .recipe import CHECKOUT, DEFAULT_SUITE, HERE, SUITES, Suite
from .stage import write_stage

BOOT_ATTEMPTS = 3
TEST_MINUTES = 45.0
ALL = "all"
RERUNS = "XEN_DISK_RERUNS"
"""Environment variable: the file that gets the names of tests that passed at a second try only."""
TESTS_FAILED = 1  # pytest's status
NO_TESTS = 5  # likewise: of a run that continues, all have passed
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}
PYTEST = (
    "python3 -u -m pytest -c tests/xen/pytest.ini --rootdir=. -o cache_dir=/mnt/results/cache "
    "--junitxml=/mnt/results/junit.xml"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.xen.lab", description="Real Xen under emulation, for tests."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--suite",
        choices=[*sorted(SUITES), ALL],
        default=DEFAULT_SUITE,
        help="which machine; all: bookworm and trixie, one after another (test and build)",
    )
    common.add_argument(
        "--cold",
        action="store_true",
        help="boot from power-on instead of resuming the saved machine",
    )
    common.add_argument(
        "--copy",
        action="store_true",
        help="copy the package to dom0 instead of installing its wheel",
    )
    common.add_argument(
        "--cpus",
        type=int,
        choices=range(1, CPUS + 1),
        default=1,
        help="dom0's processors (default: 1; waking another one costs most under emulation)",
    )
    common.add_argument(
        "--results", type=Path, help="directory for logs (default: build/xen/SUITE-COMMAND)"
    )
    common.add_argument(
        "--timeout",
        type=float,
        default=TEST_MINUTES,
        metavar="MINUTES",
        help="stop whatever runs after this (default: 45)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    test = commands.add_parser("test", parents=[common], help="run the tests of tests/xen in dom0")
    test.add_argument(
        "--again",
        action="store_true",
        help="run those that fail once more, after a fresh start",
    )
    test.add_argument(
        "--continue",
        dest="progress",
        type=Path,
        metavar="DIR",
        help="keep in DIR what has passed, as it does, and run only the others of this commit",
    )
    summary = commands.add_parser(
        "summary", help="say what has passed, failed and not run, by the files of test --continue"
    )
    summary.add_argument("directory", type=Path, metavar="DIR", help="what test --continue had")
    test.add_argument(
        "--pair",
        action="store_true",
        help="boot a second machine and join the two by a network: what test_migration.py needs",
    )
    test.add_argument(
        "--ceph",
        action="store_true",
        help="--pair, with a Ceph cluster of this machine that both reach: what test_rbd.py needs",
    )
    run = commands.add_parser(
        "run", parents=[common], help="run a shell command in dom0, in the staged checkout"
    )
    run.add_argument(
        "words",
        nargs="+",
        metavar="WORD",
        help="the command; several words are quoted, one is a script",
    )
    commands.add_parser("shell", parents=[common], help="a root shell in dom0 on this terminal")
    commands.add_parser(
        "demo", parents=[common], help="the whole walkthrough in a real guest, step by step"
    )
    commands.add_parser("build", parents=[common], help="only make the cached build")
    return parser


def _job_directory(share: Path, mode: str, command: str, environment: dict[str, str]) -> None:
    job = share / "job"
    job.mkdir()
    (share / "results").mkdir()
    shutil.copy(HERE / "image/job.sh", share / "job.sh")
    (job / "mode").write_text(mode)
    (job / "command").write_text(command)
    (job / "environment").write_text(
        "".join(f"export {k}={shlex.quote(v)}\n" for k, v in environment.items())
    )
    size = shutil.get_terminal_size()
    (job / "terminal").write_text(f"rows {size.lines} cols {size.columns}")


def _write_out(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _follow(machine: Machine, mode: str, deadline: float | None, follower: Follower | None) -> int:
    def write(data: bytes) -> None:
        _write_out(data)
        if follower is not None:
            follower.look()

    if mode != "shell":
        return machine.follow(write, deadline)
    keyboard = sys.stdin.fileno()
    relay = Relay(keyboard, sys.stdout.fileno(), machine.terminal)
    if not os.isatty(keyboard):
        return machine.follow(_write_out, deadline, also=relay)
    before = termios.tcgetattr(keyboard)
    try:
        tty.setraw(keyboard)
        return machine.follow(_write_out, deadline, also=relay)
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _results(arguments: argparse.Namespace) -> Path:
    directory: Path | None = arguments.results
    return directory or CHECKOUT / "build/xen" / f"{arguments.suite}-{arguments.command}"


def _start(
    build: Path,
    suite: Suite,
    share: Path,
    resume: bool,
    stack: ExitStack,
    pair: bool,
    cable: Path | None,
) -> Machine:
    """Start what the job runs on, and, beside it, the other of a pair; return the first."""
    machines = []
    for number, place in enumerate((share, share / "peer") if pair else (share,), start=1):
        machine = Machine(
            build,
            suite.architecture,
            share=place,
            log=place / "results/console.log",
            resume=resume,
            link=Link(number, cable) if pair else None,
        )
        machines.append(stack.enter_context(machine))
    for machine in machines:
        machine.begin()
    return machines[0]


def _pair(share: Path, environment: dict[str, str]) -> dict[str, str]:
    """Prepare the other machine of a pair; return the environment of the first."""
    ours, theirs = (Link(number, None).address for number in (1, 2))
    (share / "peer").mkdir()
    (share / "stage.tar").rename(share / "peer/stage.tar")
    os.link(share / "peer/stage.tar", share / "stage.tar")
    command = "python3 -m tests.xen.peer serve"
    _job_directory(share / "peer", "run", command, {**environment, "LAB_ADDRESS": theirs})
    return {**environment, "LAB_ADDRESS": ours, "XEN_LAB_PEER": theirs}


def _run_job(
    arguments: argparse.Namespace,
    mode: str,
    command: str,
    environment: dict[str, str],
    results: Path,
    progress: Progress | None = None,
) -> int:
    suite = SUITES[arguments.suite]
    build = ensure_build(suite)
    share = Path(tempfile.mkdtemp(prefix="xen-lab-share-"))
    follower = None
    with_ceph = getattr(arguments, "ceph", False)
    pair = with_ceph or getattr(arguments, "pair", False)
    cable = None if with_ceph else share / "link"
    environment = {**environment, "LAB_CPUS": str(arguments.cpus)}
    until_end = ExitStack()
    try:
        write_stage(share, install=not arguments.copy)
        if pair:
            environment = _pair(share, environment)
        _job_directory(share, mode, command, environment)
        if progress is not None:
            (share / "job/done").write_text("".join(f"{name}\n" for name in progress.done))
            follower = Follower(progress, share / "results" / NOTES)
        if with_ceph:
            until_end.enter_context(ceph(share))
        deadline = None if mode == "shell" else time.monotonic() + arguments.timeout * 60
        # The saved machine has no network.
        resume = not arguments.cold and not pair and (build / "state").exists()
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            started = time.monotonic()
            try:
                with ExitStack() as stack:
                    machine = _start(build, suite, share, resume, stack, pair, cable)
                    seconds = time.monotonic() - started
                    say(f"dom0 {'resumed' if resume else 'booted'} in {seconds:.1f} s")
                    return _follow(machine, mode, deadline, follower)
            except BootError as error:
                if attempt == BOOT_ATTEMPTS:
                    raise
                say(f"start {attempt} failed, trying a full boot: {error}")
                resume = False
        raise AssertionError
    finally:
        until_end.close()
        if follower is not None:
            follower.look()
        shutil.rmtree(results, ignore_errors=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        if (share / "results").exists():
            shutil.copytree(share / "results", results)
            if (share / "peer/results").exists():
                shutil.copytree(share / "peer/results", results / "peer")
            if mode == "test":
                say(f"logs and reports are in {results}")
        shutil.rmtree(share, ignore_errors=True)


def _failed(results: Path) -> list[str]:
    """Return the tests that failed, as pytest noted them."""
    noted = results / "cache/v/cache/lastfailed"
    return list(json.loads(noted.read_text())) if noted.exists() else []


def _run_tests(arguments: argparse.Namespace, what: Sequence[str]) -> int:
    """Run tests, and once more those that fail, if asked: emulated guests do die of themselves."""
    results = _results(arguments)
    pytest, progress = PYTEST, None
    if arguments.progress is not None:
        commit = commit_of(CHECKOUT)
        progress = Progress(arguments.progress / f"{arguments.suite}-{commit}.jsonl")
        # With "=": pytest looks for the file that defines the options before it knows them.
        pytest += f" --note=/mnt/results/{NOTES} --done=/mnt/job/done"
        say(f"{arguments.suite}: {len(progress.done)} tests are done already, by {progress.path}")
    run = partial(_run_job, arguments, "test", environment=UNBUFFERED, progress=progress)
    started = time.monotonic()
    status = run(f"{pytest} {shlex.join(what)}", results=results)
    if status == NO_TESTS and progress is not None and progress.done:
        status = 0
    names = _failed(results)
    if arguments.again and status == TESTS_FAILED and names:
        say(f"{len(names)} failed, and run again on a fresh machine: {' '.join(names)}")
        again = results / "again"
        status = run(f"{pytest} -m '' {shlex.join(names)}", results=again)
        still = _failed(again) if status in (0, TESTS_FAILED) else names
        passed = [name for name in names if name not in still]
        if passed:
            say(f"failed once, then passed, which is a fault to be found: {' '.join(passed)}")
        if RERUNS in os.environ:
            with open(os.environ[RERUNS], "a", encoding="utf-8") as file:
                file.writelines(f"{name} (lab, {arguments.suite})\n" for name in passed)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"{arguments.suite}: status {status} after {minutes} min {seconds} s")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the lab and return its exit status."""
    arguments, extra = _parser().parse_known_args(argv)
    if arguments.command == "summary" and not extra:
        try:
            print(*report(arguments.directory), sep="\n")
        except LabError as error:
            print(f"lab: error: {error}", file=sys.stderr)
            return 1
        return 0
    whole = [name for name, suite in sorted(SUITES.items()) if suite.is_common]
    suites = whole if arguments.suite == ALL else [arguments.suite]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the machine ends with us
    try:
        if extra and arguments.command != "test":
            _parser().error(f"unknown argument: {extra[0]} (put a command with options after --)")
        if arguments.suite == ALL and arguments.command not in ("test", "build"):
            _parser().error("--suite all is for test and build")
        if arguments.command == "build":
            for suite in suites:
                say(f"ready: {ensure_build(SUITES[suite])}")
            return 0
        if arguments.command == "test":
            what = [word for word in extra if word != "--"]
            if not any((CHECKOUT / word.partition("::")[0]).exists() for word in what if word):
                what.append("tests/xen")
            statuses = []
            for arguments.suite in suites:
                try:
                    statuses.append(_run_tests(arguments, what))
                except LabError as error:  # the other suites are run all the same
                    say(f"error: {arguments.suite}: {error}")
                    statuses.append(1)
            if arguments.progress is not None:
                print(*report(arguments.progress), sep="\n")
            return max(statuses)
        results = _results(arguments)
        if arguments.command == "run":
            words = arguments.words
            command = words[0] if len(words) == 1 else shlex.join(words)
            return _run_job(arguments, "run", command, UNBUFFERED, results)
        if arguments.command == "demo":
            return _run_job(
                arguments, "run", "python3 -m tests.xen.walkthrough", UNBUFFERED, results
            )
        return _run_job(arguments, "shell", "", {}, results)
    except LabError as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; the machine was stopped", file=sys.stderr)
        return 130
