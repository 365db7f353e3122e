"""Building a Python that this machine lacks, without building."""

import subprocess

import pytest

from tests import pythons

SYSTEM = pythons.Root("none", ())


@pytest.fixture
def builds(monkeypatch):
    """Which steps are started; "fails" does."""
    started = []

    def run(words, check):
        started.append(words[-1])
        if words[-1] == "fails":
            raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(pythons.subprocess, "run", run)
    return started


def python(*steps):
    return pythons.Python(SYSTEM, "/opt/any/bin/python3", steps)


def test_a_build_resumes_at_the_step_it_was_in(builds, tmp_path):
    kept = tmp_path / "opt/any/kept"
    kept.parent.mkdir(parents=True)
    with pytest.raises(subprocess.CalledProcessError):
        pythons.ensure_built(python("one", "fails", "three"), tmp_path)
    assert not kept.exists()  # of another recipe
    kept.parent.mkdir()
    kept.touch()
    pythons.ensure_built(python("one", "two", "three"), tmp_path)
    pythons.ensure_built(python("one", "two", "three"), tmp_path)
    assert ["one", "fails", "two", "three"] == builds
    assert kept.exists()


def test_what_follows_a_changed_step_is_built_again(builds, tmp_path):
    (tmp_path / "opt").mkdir()
    pythons.ensure_built(python("one", "two", "three"), tmp_path)
    pythons.ensure_built(python("one", "changed", "three"), tmp_path)
    assert ["one", "two", "three", "changed", "three"] == builds


@pytest.mark.parametrize("command", ["false", "false && true"])
def test_a_command_that_fails_ends_its_step(command, tmp_path):
    step = pythons.build_step("source", command).replace("/root/source_*.orig.tar.*z", "any.tar")
    (tmp_path / "directory").mkdir()
    subprocess.run(["tar", "--create", "--file", "any.tar", "directory"], cwd=tmp_path, check=True)
    step = step.replace("$(mktemp -d)", str(tmp_path))
    ended = subprocess.run(["sh", "-c", step, "build", "/nowhere"], check=False)
    assert 1 == ended.returncode


def test_the_steps_are_shell():
    steps = [step for each in pythons.PYTHONS.values() for step in each.steps]
    assert 7 == len(steps)
    for step in steps:
        subprocess.run(["sh", "-n", "-c", step], check=True)
