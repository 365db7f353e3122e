"""``plot``: a picture in a file or on the terminal."""

from __future__ import annotations

import builtins
import importlib.util
import io
import subprocess
import xml.etree.ElementTree as ET

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.program import own_command
from xen_disk_py.trace.format import FLUSH, STOPPED, WRITE, Header, Record
from xen_disk_py.trace.writer import TraceWriter, event

MS = 1_000_000
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="no matplotlib here (extra: plot)"
)


def make(path, *records):
    with TraceWriter.create(str(path), Header(1 << 30, 512, 0, 0, b"s" * 16)) as writer:
        writer.append([*records, event(STOPPED, 2000 * MS)])
    return path


@pytest.fixture
def trace(tmp_path):
    records = [Record(n, n % 2, n * MS, MS + n, n << 20, 4096 << n % 5) for n in range(900)]
    return make(tmp_path / "t.xdt", *records, Record(900, FLUSH, 900 * MS, MS, 0, 0))


@pytest.fixture
def run(host):
    def run(*argv, status=ExitStatus.OK):
        env = host.environment()
        assert status == main([*map(str, argv)], env)
        return env.stdout.getvalue(), env.stderr.getvalue()

    return run


def test_on_the_terminal(run, trace):
    out, _ = run("plot", trace, "--title", "a guest")
    assert out.startswith("a guest\n0.901 s, 450 reads (")
    rows = [line for line in out.splitlines() if "│" in line]
    assert 16 + 16 + 3 == len(rows)
    assert 1 == len({len(row) for row in rows[:32]})
    for at in (0, 16):  # a diagonal: what is higher up comes later
        starts = [len(row[12:]) - len(row[12:].lstrip()) for row in rows[at + 2 : at + 16]]
        assert sorted(starts, reverse=True) == starts


def test_nothing_is_replaced_on_the_terminal(run, trace):
    assert "--force is for -o NEW" in run("plot", trace, "--force", status=ExitStatus.USAGE)[1]


def test_of_one_request(run, tmp_path):
    path = make(tmp_path / "one.xdt", Record(0, WRITE, 5, 0, 0, 512))
    assert "1 writes" in run("plot", path)[0]


def test_of_no_request(run, tmp_path):
    path = make(tmp_path / "none.xdt")
    assert "no request" in run("plot", path, status=ExitStatus.ERROR)[1]


def test_a_name_that_says_no_format(run, trace):
    assert ".svg, .png, .html" in run("plot", trace, "-o", "x.gif", status=ExitStatus.USAGE)[1]


def test_without_matplotlib_it_says_what_to_do(run, trace, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    _, err = run("plot", trace, "-o", tmp_path / "x.png", status=ExitStatus.ERROR)
    assert "pip install matplotlib" in " ".join(err.split())
    assert not (tmp_path / "x.png").exists()


@pytest.mark.each_python
@needs_matplotlib
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_pictures_in_files(trace, tmp_path):  # no host: matplotlib keeps its fonts open
    def run(name, status=ExitStatus.OK):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO())
        argv = ["plot", str(trace), "-o", str(tmp_path / name), "--title", "a <guest>"]
        assert status == main(argv, env)

    run("x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    run("x.png", ExitStatus.ERROR)
    run("x.svg")
    assert ET.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")
    run("x.html")
    page = (tmp_path / "x.html").read_text()
    assert "a &lt;guest&gt;" in page
    assert "data:image/png;base64," in page


@pytest.mark.each_python
@needs_matplotlib
def test_what_lies_in_the_current_directory_changes_nothing(trace, tmp_path):
    """matplotlib reads a ``matplotlibrc`` there, when it is imported: a process of its own."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsvg.fonttype: path\n")
    subprocess.run(own_command("plot", str(trace), "-o", "new.svg"), cwd=tmp_path, check=True)
    assert b"<text " in (tmp_path / "new.svg").read_bytes()  # neither paths nor LaTeX's
