"""``complete``: what could stand next on a command line, for the shells' completion scripts.

The scripts that ``install`` installs call ``xen-disk complete WORD...`` with the words up to the
cursor, the last of which may be empty or half a word. The answer is a line for each candidate, with
a tab and its description, or a single line that leaves the answer to the shell: ``:files`` or
``:directories``. What goes wrong (no xenstore, not root) gives fewer candidates, and no message.
"""

from __future__ import annotations

import argparse
import pwd
import re
from collections.abc import Iterator, Sequence

from ..backends.finding import builtin_names
from ..errors import XenDiskError
from ..exit_status import ExitStatus
from ..named import NamedTuple
from ..text import printable
from ..xenbus import toolstack
from .arguments import build_parser, commands_of
from .environment import Environment

FILES, DIRECTORIES = ":files", ":directories"

_FILE_KINDS = {"PATH", "FILE", "IMAGE", "OVERLAY", "NEW", "SOURCE"}
_HARMLESS = re.compile(r"[\w.@%+-]+")  # to a shell that puts it into a command line

Candidates = Iterator[tuple[str, str]]


class Place(NamedTuple):
    """Where the cursor is.

    Attributes:
        command: the parser of the command; that of the whole program before there is one.
        option: the option whose value is asked for, if one is.
        values: the command's arguments that stand before the cursor, without options.
        word: what is written of the word so far.
    """

    command: argparse.ArgumentParser
    option: argparse.Action | None
    values: list[str]
    word: str


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print what could stand at the cursor."""
    lines = answer(find_place(build_parser(), args.line), env)
    env.put("".join(f"{line}\n" for line in lines))  # env.say prints no tab
    return ExitStatus.OK


def find_place(parser: argparse.ArgumentParser, line: Sequence[str]) -> Place:
    """Find out what the last word of a line is; bash has cut ``--name=value`` into three words."""
    *before, word = line or [""]
    command, option = parser, None
    values: list[str] = []
    for each in before:
        if each == "=" and option is not None:
            continue
        if option is not None:
            option = None
        elif each.startswith("-") and each != "-":
            option = None if "=" in each else _option(command, each)
        elif command is parser and each in commands_of(parser):
            command = commands_of(parser)[each]
        else:
            values.append(each)
    if word == "=":
        word = ""
    elif option is None and word.startswith("--") and "=" in word:
        name, _, word = word.partition("=")
        option = _option(command, name)
    return Place(command, option, values, word)


def _option(command: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    """Find an option that takes a value."""
    for action in command._actions:
        if name in action.option_strings and action.nargs != 0:
            return action
    return None


def answer(place: Place, env: Environment) -> list[str]:
    """Say what could stand at a place, as the shells' scripts want it."""
    action = place.option
    if action is None and place.word.startswith("-"):
        return _lines(place.word, _options(place.command))
    if action is None:
        arguments = [each for each in place.command._actions if not each.option_strings]
        if len(place.values) >= len(arguments):
            return []
        action = arguments[len(place.values)]
    try:
        found = _values(action, place.values, env)
        return [found] if isinstance(found, str) else _lines(place.word, found)
    except XenDiskError:
        return []


def _values(action: argparse.Action, before: Sequence[str], env: Environment) -> Candidates | str:
    """Say what an option or argument can be, given the arguments before it."""
    kind = action.metavar if isinstance(action.metavar, str) else ""
    if isinstance(action, argparse._SubParsersAction) or kind == "COMMAND":
        return _commands(build_parser())
    if action.choices is not None:
        return ((str(choice), "") for choice in action.choices)
    if kind == "DIRECTORY":
        return DIRECTORIES
    if kind in _FILE_KINDS:
        return FILES
    if kind == "VM":
        return _guests(env)
    if kind == "VDEV":
        return _disks(env, before[0])
    if kind.startswith("NAME[:GROUP]"):
        return ((user.pw_name, "") for user in pwd.getpwall())
    return ((name, "") for name in builtin_names() if action.dest == "backend")


def _lines(word: str, candidates: Candidates) -> list[str]:
    return [
        f"{name}\t{printable(text)}" if text else name
        for name, text in candidates
        if name.startswith(word)
    ]


def _options(command: argparse.ArgumentParser) -> Candidates:
    for action in command._actions:
        if action.help != argparse.SUPPRESS:
            for name in action.option_strings:
                yield name, (action.help or "").partition(";")[0]


def _commands(parser: argparse.ArgumentParser) -> Candidates:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:  # those with a help, in its order
                yield choice.dest, choice.help or ""


def _guests(env: Environment) -> Candidates:
    with env.open_store() as store:
        for domain in toolstack.domains(store):
            name = domain.name if _HARMLESS.fullmatch(domain.name) else str(domain.domid)
            yield name, f"domain {domain.domid}"


def _disks(env: Environment, guest: str) -> Candidates:
    with env.open_store() as store:
        domid = toolstack.find_domain(store, guest).domid
        for disk in toolstack.attached(store, domid):
            yield disk.device.name, disk.params
