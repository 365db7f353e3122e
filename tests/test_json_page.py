"""docs/json.md has the keys of every ``--json``: those, and no others."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path

import pytest

from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.cli import main
from xen_disk_py.commands import demo
from xen_disk_py.commands.arguments import build_parser, commands_of
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.xenbus.states import Address, State

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
ADDRESS = Address(0, 5, 51728, "vbd3")


def documented():
    """Return for each command its keys, and those that are not always there."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        name = section.split("\n", 1)[0]
        rows = re.findall(r"^\| `([^`]+)`(\??) \|", section, re.MULTILINE)
        found[name] = {key: mark == "?" for key, mark in rows}
    return found


def keys(value, prefix=""):
    """Return the paths of all keys in a JSON value; ``parent`` has the same ones once more."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            path = f"{prefix}.{name}" if prefix else name
            if name == "parent" and isinstance(each, dict):
                yield path
                yield from keys(each)
            else:
                yield from keys(each, path)
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for each in value:
            yield from keys(each, f"{prefix}[]")
    else:
        yield prefix


def check(command, printed):
    page = documented()[command]
    found = set(keys(json.loads(printed)))
    assert {key for key, optional in page.items() if not optional} - found == set()
    assert found - set(page) == set()


@pytest.fixture
def run():
    def run(*argv):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO(), stdin=None)
        main([*map(str, argv), "--json"], env)
        return env.stdout.getvalue()

    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def overlay(image, tmp_path):
    path = tmp_path / "changes.overlay"
    disk = OverlayBackend(str(image), overlay=str(path))
    disk.write([memoryview(b"x" * 4096)], 8192)
    disk.close()
    return path


def test_every_exit_status_is_there():
    rows = re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(status) for status in ExitStatus] == [int(row) for row in rows]


def test_every_command_that_prints_json_is_there():
    commands = commands_of(build_parser())
    prints = {name for name, each in commands.items() if "--json" in each.format_help()}
    assert prints == set(documented())


def test_demo(run, monkeypatch):
    monkeypatch.setattr(demo, "_BLOCKS", 300)
    check("demo", run("demo", "--bytes=64K"))
    check("demo", run("demo", "--backend=discard", "--bytes=64K"))


def test_doctor(run):
    check("doctor", run("doctor"))


@pytest.mark.parametrize("command", ["diff", "info", "commit"])
def test_of_an_overlay(run, overlay, command):
    check(command, run(command, overlay))


def test_export_and_rebase(run, overlay, image, tmp_path):
    check("export", run("export", overlay, tmp_path / "new.raw"))
    check("rebase", run("rebase", overlay, image))


def test_of_images(run, image, tmp_path):
    check("info", run("info", image, "--filter=protect:range=0-512"))
    check("create", run("create", tmp_path / "new.vhd", "--size=1M"))
    check("info", run("info", tmp_path / "new.vhd", "--format=vhd"))
    check("check", run("check", tmp_path / "new.vhd"))


@pytest.mark.shared
def test_of_a_disk_that_is_served(host, processes, image):
    argv = ["connect", "guest", "--vdev=xvdb", "--path", str(image), "--backend=raw", "--json"]
    argv += ["--filter=protect:range=0-512"]
    process = processes.start(*argv)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until("}")
    check("connect", process.out)
    for command, *more in (
        ["list"],
        ["filter", "guest", "xvdb", "list"],
        ["top", "--once", "--interval=0.001"],
        ["resize", "guest", "xvdb", "2M"],
        ["upgrade", "guest", "xvdb"],
    ):
        env = host.environment()
        main([command, *more, "--json"], env)
        check(command, env.stdout.getvalue())
    process.signal(signal.SIGINT)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert 0 == process.wait()
