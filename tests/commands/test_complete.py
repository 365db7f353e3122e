"""Completion: what can stand at the cursor, and that the shells ask and show it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import resources
from pathlib import Path

import pytest

import xen_disk_py
from xen_disk_py.cli import main
from xen_disk_py.commands.arguments import build_parser, commands_of
from xen_disk_py.commands.environment import Environment
from xen_disk_py.errors import XenUnavailable
from xen_disk_py.exit_status import ExitStatus

COMMANDS = commands_of(build_parser())
DATA = resources.files("xen_disk_py").joinpath("data")


def away():
    raise XenUnavailable("no Xen here")


def complete(*line, env=None):
    """Ask what can follow some words; the candidates, without their descriptions."""
    env = env or Environment(open_store=away)
    env.stdout, env.stderr = io.StringIO(), io.StringIO()
    assert main(["complete", *line], env) is ExitStatus.OK
    assert "" == env.stderr.getvalue()
    return [word.partition("\t")[0] for word in env.stdout.getvalue().splitlines()]


def test_commands():
    assert [name for name in COMMANDS if name not in ("adopt", "fork-server")] == complete("")
    assert complete() == complete("") == complete("help", "") == complete("--debug", "")
    assert ["disconnect", "diff"] == complete("di")  # in the order of the help
    assert [] == complete("fly", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name):
    shown = [
        option
        for action in COMMANDS[name]._actions
        if action.help != "==SUPPRESS=="
        for option in action.option_strings
    ]
    assert shown == complete(name, "-")
    assert "--role" not in shown
    for option in shown:
        assert option in complete(name, option[:-1])


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        (["connect", "--grants", ""], ["auto", "copy", "map"]),
        (["connect", "--grants", "c"], ["copy"]),
        (["connect", "--grants=c"], ["copy"]),  # zsh and fish
        (["connect", "--grants", "="], ["auto", "copy", "map"]),  # bash
        (["connect", "--grants", "=", "c"], ["copy"]),
        (["connect", "--size", ""], []),
        (["connect", "--option", "a"], []),
        (["connect", "--backend", "mm"], ["mmap"]),
        (["connect", "--path", "x"], [":files"]),
        (["connect", "--path", "=", "x"], [":files"]),
        (["commit", ""], [":files"]),
        (["commit", "--keep", "x"], [":files"]),
        (["commit", "x", ""], []),
        (["export", "x", ""], [":files"]),
        (["install", "--prefix", ""], [":directories"]),
        (["connect", "--user", "roo"], ["root"]),
        (["connect", ""], []),  # where there is no Xen
    ],
)
def test_values(line, candidates):
    assert candidates == complete(*line)


def test_guests_and_their_disks(host):
    host.serving(host.memory(), "xvda")
    host.serving(host.memory(), "xvdc")
    host.xenstored.add_domain(9, "$(reboot)", "00000000-0000-0000-0000-000000000009")
    for line, candidates in (
        (["connect", "--path", "-", ""], ["Domain-0", "guest", "9"]),  # not what a shell would run
        (["connect", "--json", "gu"], ["guest"]),
        (["list", "--json", "gu"], ["guest"]),
        (["disconnect", "guest", "xv"], ["xvda", "xvdc"]),
        (["connect", "--adopt", "--", "guest", "xvdc"], ["xvdc"]),
        (["disconnect", "nobody", ""], []),
        (["resize", "5", "xvda", ""], []),
    ):
        assert candidates == complete(*line, env=host.environment())
    host.xenstored.remove_domain(9)


@pytest.fixture
def shell(tmp_path):
    """Run a script of a shell that finds our program, and a directory with two files."""
    program = tmp_path / "bin" / "xen-disk"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m xen_disk_py "$@"\n')
    program.chmod(0o755)
    (tmp_path / "files").mkdir()
    for name in ("disk.raw", "disk.vhd"):
        (tmp_path / "files" / name).touch()
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(xen_disk_py.__file__).parents[1]),
        "HOME": str(tmp_path),
    }

    def run(name, script):
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed")
        done = subprocess.run(
            [path, "-c", script],
            cwd=tmp_path / "files",
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "" == done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("conn", ["connect"]),
        ("connect --grants = c", ["copy"]),
        ("connect --qu", ["--quiet", "-q", "--queues", "--queues-in"]),
        ("connect --path disk", ["disk.raw", "disk.vhd"]),
        ("connect --path = disk.r", ["disk.raw"]),
        ("connect --size 1", []),
    ],
)
def test_bash(shell, line, candidates):
    expected = [word for word in candidates if word != "-q"]
    script = f"""
        compopt() {{ :; }}  # works while a person types only
        . {DATA.joinpath("xen-disk")}
        COMP_WORDS=(xen-disk {line})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _xen_disk
        [ ${{#COMPREPLY[@]}} = 0 ] || printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    assert sorted(expected) == sorted(shell("bash", script))


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("conn", ["connect\tgive a guest a disk and serve it until Ctrl-C"]),
        ("connect --grants c", ["copy"]),
        ("connect --path disk", ["disk.raw", "disk.vhd"]),
        ("connect --size 1", []),
    ],
)
def test_fish(shell, line, candidates):
    script = f"source {DATA.joinpath('xen-disk.fish')}; complete -C 'xen-disk {line}'"
    assert candidates == shell("fish", script)


ZSH = """
    zmodload zsh/zpty
    zpty shell zsh -f -i
    zpty -w shell "fpath=({data} \\$fpath); autoload -U compinit; compinit -D -u"
    zpty -w shell "bindkey '^I' complete-word; echo RE''ADY"
    zpty -r shell out '*READY*'
    zpty -w -n shell $'{line}\\t'
    zpty -w -n shell $'\\C-ashow=(\\C-e); print -r -- \\\\<${{(j: :)show}}\\\\>\\n'
    zpty -r shell out $'*\\n<*>*'
    print -r -- ${{${{out##*$'\\n<'}}%%'>'*}}
"""


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("xen-disk conn", "xen-disk connect"),
        ("xen-disk connect --grants=c", "xen-disk connect --grants=copy"),
        ("xen-disk connect --path=disk.v", "xen-disk connect --path=disk.vhd"),
    ],
)
def test_zsh(shell, line, completed):
    """In a terminal of its own, since zsh completes nowhere else."""
    assert [completed] == shell("zsh", ZSH.format(data=DATA, line=line))


def test_a_full_disk_is_no_bug():
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as full:
        env = Environment(stdout=full, stderr=io.StringIO(), open_store=away)
        assert ExitStatus.ERROR == main(["complete", "con"], env)
    assert "cannot write to stdout: No space left on device\n" in env.stderr.getvalue()
