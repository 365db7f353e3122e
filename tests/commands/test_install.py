"""``install``: what it says, and that ``--prefix`` is all it touches."""

from __future__ import annotations

import io
import os
import shutil
import subprocess

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus

PATHS = [
    "etc/xen/scripts/block-xen-disk",
    "etc/systemd/system/xen-disk-serve.service",
    "etc/systemd/system/xen-disk@.service",
    "usr/local/share/bash-completion/completions/xen-disk",
    "usr/local/share/zsh/site-functions/_xen-disk",
    "etc/fish/completions/xen-disk.fish",
    "usr/local/share/man/man8/xen-disk.8",
]


@pytest.fixture
def run(tmp_path):
    def run(*argv):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO())
        status = main(["install", "--prefix", str(tmp_path), *argv], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return run


def test_there_and_away_again(run, tmp_path):
    paths = [str(tmp_path / path) for path in PATHS]
    status, out, err = run()
    assert (ExitStatus.OK, "".join(f"installed {path}\n" for path in paths)) == (status, out)
    assert "systemctl enable --now xen-disk-serve" in err
    assert os.access(paths[0], os.X_OK)
    assert "".join(f"unchanged: {path}\n" for path in paths) == run()[1]
    removed = "".join(f"removed {path}\n" for path in paths)
    assert (ExitStatus.OK, removed, "") == run("--remove")
    assert "".join(f"not there: {path}\n" for path in paths) == run("--remove")[1]


@pytest.mark.parametrize("argv", [[], ["--remove"]])
def test_somebody_elses_file(run, tmp_path, argv):
    script = tmp_path / PATHS[0]
    script.parent.mkdir(parents=True)
    script.write_text("mine\n")
    status, out, err = run(*argv)
    assert (ExitStatus.ERROR, "") == (status, out)
    assert err.startswith(f"xen-disk: error: {script} is there and differs")
    assert len(err.splitlines()) == 1
    assert "mine\n" == script.read_text()
    assert run(*argv, "--force")[0] is ExitStatus.OK


def test_systemd_understands_the_unit(run, tmp_path):
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd is not installed")
    run()
    done = subprocess.run(
        [verify, "verify", tmp_path / PATHS[1]], capture_output=True, text=True, check=False
    )
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr.strip()}")
    assert (0, "") == (done.returncode, done.stderr)
