"""The man page: what the parser says, all of it, as ``man`` shows it."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess

import pytest

from xen_disk_py import __version__
from xen_disk_py.cli import main
from xen_disk_py.commands.arguments import build_parser, commands_of
from xen_disk_py.commands.manual import manual

COMMANDS = commands_of(build_parser())
HIDDEN = "adopt", "fork-server"  # for serve
PEOPLES = [name for name in COMMANDS if name not in HIDDEN]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What each section says, as one line of words; commands are sections."""
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(
        [groff, "-man", "-ww", "-Tascii", "-P-cbou", "-rHY=0"],  # -ww: warn about everything
        input=manual(build_parser()),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "" == done.stderr
    parts = re.split(r"^(?: {3})?(\S.*)$", done.stdout, flags=re.MULTILINE)
    return {title: " ".join(text.split()) for title, text in zip(parts[1::2], parts[2::2])}


def words(text):
    """A text as the page shows it; what stands between backticks is bold there."""
    return " ".join(text.replace("`", "").split())


def test_a_section_for_each_command(shown):
    assert [*PEOPLES, "EXIT STATUS"] == [
        title for title in shown if title in COMMANDS or title == "EXIT STATUS"
    ]
    assert "xen-disk - give a running Xen guest a disk" == shown["NAME"]


@pytest.mark.parametrize("name", PEOPLES)
def test_a_command(shown, name):
    parser = COMMANDS[name]
    said = shown[name]
    assert words(parser.description) in said
    for line in parser.usage.splitlines():
        assert line.strip().replace("%(prog)s", f"xen-disk {name}") in said
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.dest not in ("help", "debug"):
            assert words(action.help.replace("%%", "%")) in said
            for option in action.option_strings:
                assert option in said


@pytest.mark.parametrize("name", PEOPLES)
def test_help_says_the_same(name, capsys):
    main([name, "--help"])
    said = words(capsys.readouterr().out)
    assert words(COMMANDS[name].description) in said


def test_its_first_line_names_the_version():
    assert f'"xen-disk {__version__}"' in manual(build_parser()).splitlines()[0]


def test_text_is_no_markup():
    """Of a line that begins with a dot, or has a backslash in it."""
    parser = argparse.ArgumentParser(prog="xen-disk", usage="x", description=".so \\fBme\n'so it")
    page = manual(parser)
    assert "\\&.so \\efBme 'so it" in page
    assert not re.search(r"^\.so", page, flags=re.MULTILINE)


def test_what_is_to_be_typed_is_bold(shown):
    page = manual(build_parser())
    assert r"whose process has died is an \fBorphan\fR if \fBconnect \-\-adopt\fR can" in page
    assert "`" not in page
    assert not [title for title, text in shown.items() if "`" in text]


def test_man_finds_its_name(tmp_path):
    """``apropos`` and ``whatis`` read the first section with this program."""
    lexgrog = shutil.which("lexgrog")
    if lexgrog is None:
        pytest.skip("man-db is not installed")
    page = tmp_path / "xen-disk.8"
    page.write_text(manual(build_parser()))
    done = subprocess.run([lexgrog, page], capture_output=True, text=True, check=True)
    assert f'{page}: "xen-disk - give a running Xen guest a disk"\n' == done.stdout
