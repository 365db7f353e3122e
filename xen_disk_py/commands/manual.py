"""The man page, made from the parser of the command line: what it says is what the program does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from .. import __version__
from .arguments import PROGRAM, commands_of

_STATUS = (
    ("0", "Success."),
    ("1", "An error; the message on stderr says what to do."),
    ("2", "The command line is wrong."),
    ("70", "Serving the disk failed; another process can take it over."),
    ("130", "Interrupted: the disk was taken away without the guest's consent."),
)
_FILES = (
    (
        "/run/xen_disk_py/",
        "What each process serves, for `list` and for a process that takes over.",
    ),
    ("/etc/xen/scripts/block-xen-disk", "The hotplug script that xl runs."),
    ("/etc/xen-disk/NAME.conf", "What the service xen-disk@NAME serves."),
)
_COMMON = {"--help", "--debug"}  # said once, for all commands
_SEE_ALSO = "xl(1), xl-disk-configuration(5), losetup(8), qemu-nbd(8), nbdkit(1)"


def manual(parser: argparse.ArgumentParser) -> str:
    """Write the man page of a parser and its commands, for ``man`` to format."""
    return "\n".join(_manual(parser)) + "\n"


def _manual(parser: argparse.ArgumentParser) -> Iterator[str]:
    purpose, _, _ = (parser.description or "").partition(",")
    yield f'.TH {PROGRAM.upper()} 8 "" "{PROGRAM} {__version__}" "System administration"'
    yield ".SH NAME"
    yield f"{_text(PROGRAM)} \\- {_text(purpose[:1].lower() + purpose[1:].rstrip('.'))}"
    yield ".SH SYNOPSIS"
    yield from _synopsis(parser)
    yield ".SH DESCRIPTION"
    yield from _paragraphs(parser.description)
    yield from _paragraphs(parser.epilog)
    yield ".SH OPTIONS"
    yield from _actions(parser._optionals._group_actions, parser.prog)
    yield ".SH COMMANDS"
    for name, command in commands_of(parser).items():
        if command.usage:  # others are for the program itself
            yield from _command(name, command)
    yield ".SH EXIT STATUS"
    yield from _table(_STATUS)
    yield ".SH FILES"
    yield from _table(_FILES)
    yield ".SH SEE ALSO"
    yield _text(_SEE_ALSO)


def _command(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    yield f".SS {_text(name)}"
    yield from _synopsis(command)
    yield from _paragraphs(command.description)
    for group in command._action_groups:
        actions = [
            each
            for each in group._group_actions
            if each.help != argparse.SUPPRESS and not _COMMON.intersection(each.option_strings)
        ]
        if not actions:
            continue
        if group not in (command._positionals, command._optionals):
            title = group.title or ""
            yield ".PP"
            yield f".I {_text(title[:1].upper() + title[1:])}"
        yield from _actions(actions, command.prog)


def _synopsis(command: argparse.ArgumentParser) -> Iterator[str]:
    for number, line in enumerate((command.usage or "").splitlines()):
        if number:
            yield ".br"
        yield f"\\fB{_text(command.prog)}\\fR{_text(line.strip()[len('%(prog)s') :])}"


def _actions(actions: list[argparse.Action], program: str) -> Iterator[str]:
    for action in actions:
        value = action.metavar or action.dest.upper()
        if action.choices is not None:
            value = "|".join(str(choice) for choice in action.choices)
        names = ", ".join(f"\\fB{_text(name)}\\fR" for name in action.option_strings)
        shown = f"\\fI{_text(str(value))}\\fR" if action.nargs != 0 else ""
        yield ".TP"
        yield " ".join(filter(None, (names, shown)))
        yield _prose((action.help or "") % {"prog": program, "default": action.default})


def _table(rows: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, text in rows:
        yield ".TP"
        yield f".B {_text(name)}"
        yield _prose(text)


def _paragraphs(text: str | None) -> Iterator[str]:
    for part in (text or "").split("\n\n"):
        yield ".PP"
        if part.startswith(" "):  # examples stay as they are
            yield ".nf"
            yield from (_text(line) for line in part.splitlines())
            yield ".fi"
        else:
            yield _prose(part.replace("\n", " "))


def _prose(text: str) -> str:
    """Show what stands between backticks, to be typed as it is, in bold."""
    return re.sub("`([^`]+)`", r"\\fB\1\\fR", _text(text))


def _text(text: str) -> str:
    """Keep the formatter from reading text as its own language."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text
