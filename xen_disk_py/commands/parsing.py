"""Parse a command line: what it says, or in a line what is wrong with it.

What there is to say is in ``arguments``; here is what argparse does not do as a person would
expect: a value behind an option, settings of a plugin, a word that is spelled wrongly.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence

from ..errors import UsageError
from .arguments import PROGRAM, Parser, build_parser, commands_of, size

_SETTING = r"[A-Za-z][\w.-]*=.*"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ``words`` of the result is that line, to be parsed once more.

    ``complete``, which shells call, takes any words, half ones too: they are ``line``.

    Raises:
        UsageError: it asks for something that is not there.
    """
    if words[:1] == ["complete"]:
        return argparse.Namespace(command="complete", line=list(words[1:]))
    parser = build_parser(words[0] if words else None)
    commands = commands_of(parser)
    for word in words:
        if not word.startswith("-"):
            _check_options(parser, find_command(parser, commands, word), words)
            break
    args, rest = parser.parse_known_args(words)
    if "option" in args:
        rest = _take_settings(args, rest)
    if len(rest) == 1 and not rest[0].startswith("-"):
        rest = _place(args, rest[0])
    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}", f"{PROGRAM} {args.command}")
    args.words = list(words)
    return args


def _check_options(parser: Parser, command: Parser, words: Sequence[str]) -> None:
    """See that a command has the long options that are given.

    argparse would first complain of what it misses then, if only because a value stands in the
    place of an argument.

    Raises:
        UsageError: it has not; the message names one that is spelled like it.
    """
    known = {**parser._option_string_actions, **command._option_string_actions}
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if name.startswith("--") and " " not in word and name not in known:
            offered = [each for each in known if known[each].help != argparse.SUPPRESS]
            command.error(f"no option {name}{_nearest(name, offered)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    """Ask whether one was meant that is spelled like it, if there is one."""
    import difflib

    near = difflib.get_close_matches(name, names, 1)
    return f": did you mean {near[0]}?" if near else ""


def _take_settings(args: argparse.Namespace, words: list[str]) -> list[str]:
    """Have each ``key=value`` mean what it does behind ``--option``; return the other words.

    So nbdkit's plugins get theirs, and argparse needs to know nothing of where they may stand.
    """
    if "=" in (getattr(args, "device", None) or ""):  # no VDEV has one
        words = [args.device, *words]
        args.device = None
    settings = [word for word in words if re.fullmatch(_SETTING, word, re.DOTALL)]
    args.option = [*args.option, *settings]
    return [word for word in words if word not in settings]


def _place(args: argparse.Namespace, word: str) -> list[str]:
    """Put a word behind an option where it belongs; return it if it belongs nowhere.

    argparse takes a positional argument that may be left out for left out if an option stands
    before it (``connect VM --adopt VDEV``, ``resize VM VDEV --force SIZE``).
    """
    if args.command == "connect" and args.device is None:
        args.device = word
    elif args.command == "resize" and args.size is None:
        try:
            args.size = size(word)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"argument SIZE: {error}", f"{PROGRAM} resize") from None
    else:
        return [word]
    return []


def find_command(parser: Parser, commands: Mapping[str, Parser], name: str) -> Parser:
    """Find a command's parser by its name.

    Raises:
        UsageError: there is no such command; the message names one that is spelled like it.
    """
    if name not in commands:
        parser.error(f"no command {name!r}{_nearest(name, commands)}")
    return commands[name]
