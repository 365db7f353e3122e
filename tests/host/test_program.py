"""How the program starts itself: isolated, by where it is; and that it comes up so."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import pyxs

import xen_disk_py
from xen_disk_py import __version__
from xen_disk_py.errors import ProgramMissing
from xen_disk_py.host import program
from xen_disk_py.host.program import _how, _quoted, find_program, own_command, unit_command

PLACE = Path(xen_disk_py.__file__).parents[1]
DEMO = ["demo", "--backend=mine:Disk", "--size=64K", "--bytes=64K", "--seconds=0.1", "--overwrite"]


def test_how(tmp_path):
    one_file = tmp_path / "xen-disk.pyz"
    one_file.touch()
    assert ["-m", "xen_disk_py"] == _how("/opt/x", ["/usr/lib", "/opt/x"])
    assert ["/opt/x/xen_disk_py/__main__.py"] == _how("/opt/x", ["/usr/lib", "/opt"])
    assert [str(one_file)] == _how(str(one_file), [str(tmp_path)])


def run(command, directory, **environment):
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def strangers(tmp_path):
    """A directory where somebody waits for a Python that looks into it."""
    directory = tmp_path / "stranger"
    (directory / "xen_disk_py").mkdir(parents=True)
    for name in ("argparse.py", "pyxs.py", "json.py", "xen_disk_py/__init__.py"):
        (directory / name).write_text("raise SystemExit('a stranger was here')\n")
    return directory


def test_nothing_of_the_current_directory_is_run(strangers):
    done = run(own_command("--version"), strangers, PYTHONPATH=f".::{strangers.name}")
    assert (0, f"xen-disk {__version__}\n", "") == (done.returncode, done.stdout, done.stderr)


def test_by_a_path(strangers, tmp_path):
    """A checkout, say: what is nowhere in Python's own path."""
    shutil.copytree(PLACE / "xen_disk_py", tmp_path / "copy" / "xen_disk_py")
    how = _how(str(tmp_path / "copy"), site.getsitepackages())
    done = run([sys.executable, "-I", *how, "--version"], strangers)
    assert (0, f"xen-disk {__version__}\n", "") == (done.returncode, done.stdout, done.stderr)


def test_what_pythonpath_names_is_found(strangers, tmp_path):
    """A disk of somebody's own, which the processes that take over need as well."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(
        "from xen_disk_py.backends.discard import DiscardBackend as Disk\n"
    )
    command = own_command(*DEMO)
    done = run(command, strangers, PYTHONPATH=f".:{tmp_path / 'own'}")
    assert (0, "") == (done.returncode, done.stderr)
    done = run(command, tmp_path / "own", PYTHONPATH=".")
    assert (1, "") == (done.returncode, done.stdout)
    assert "there is no module mine: install it" in done.stderr


@pytest.fixture
def at_home(tmp_path):
    """A home with a disk and pyxs in it, as ``pip install --user`` leaves them there."""
    # not sys._base_executable, which is the virtual environment's in Python 3.9
    python = os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info))
    home = tmp_path / "home"
    script = "import site; print(site.getusersitepackages())"
    own = Path(run([python, "-c", script], tmp_path, HOME=str(home)).stdout.strip())
    own.mkdir(parents=True)
    (own / "pyxs").symlink_to(Path(pyxs.__file__).parent)
    (own / "beside.pth").write_text(f"{tmp_path / 'beside'}\n")  # an editable install
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "mine.py").write_text(
        "from xen_disk_py.backends.discard import DiscardBackend as Disk\n"
    )
    how = [python, "-I", str(PLACE / "xen_disk_py" / "__main__.py"), *DEMO]
    return lambda **environment: run(how, tmp_path, HOME=str(home), **environment)


def test_what_somebody_installed_for_himself_is_found(at_home):
    done = at_home()
    assert (0, "") == (done.returncode, done.stderr)


def test_what_somebody_installed_for_himself_is_not_asked_for(at_home):
    done = at_home(PYTHONNOUSERSITE="1")
    assert 1 == done.returncode
    assert "No module named 'pyxs'" in done.stderr or "no module mine" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to give a directory away")
def test_what_somebody_else_installed_is_not_run(at_home, tmp_path):
    """Of whom HOME is, after ``sudo`` in some systems."""
    for place in (tmp_path / "home").rglob("site-packages"):
        os.chown(place, 65534, 65534)
    assert 1 == at_home().returncode


def test_another_program_is_found_where_only_root_writes(strangers, monkeypatch, tmp_path):
    for name in ("sh", "nosuchprogram"):
        (strangers / name).write_text("#!/bin/sh\n")
        (strangers / name).chmod(0o755)
    monkeypatch.chdir(strangers)
    monkeypatch.setenv("PATH", f":.:{strangers}")
    assert find_program("sh", "install it") in ("/usr/bin/sh", "/bin/sh")
    with pytest.raises(ProgramMissing, match=r"nosuchprogram in /usr/.*:/bin: install it$"):
        find_program("nosuchprogram", "install it")


def test_what_is_no_program_is_passed_by(monkeypatch, tmp_path):
    (tmp_path / "a" / "it").mkdir(parents=True)
    for name in "bc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "it").touch()
    (tmp_path / "c" / "it").chmod(0o755)
    monkeypatch.setattr(program, "SYSTEM_PATH", ":".join(str(tmp_path / name) for name in "abc"))
    assert str(tmp_path / "c" / "it") == find_program("it", "")


def test_a_path_is_taken_as_it_is(strangers, monkeypatch):
    (strangers / "sh").write_text("#!/bin/sh\n")
    monkeypatch.chdir(strangers)
    with pytest.raises(ProgramMissing, match=r"no program \./sh: chmod$"):
        find_program("./sh", "chmod")
    (strangers / "sh").chmod(0o755)
    for path in ("./sh", str(strangers / "sh")):
        assert path == find_program(path, "chmod")


def test_a_units_words():
    assert " ".join(own_command()) == unit_command()
    assert "/opt/a-b/python3" == _quoted("/opt/a-b/python3")
    assert '"/opt/a b%%$$\\\\c/python3"' == _quoted("/opt/a b%$\\c/python3")
