import io
import json
import os
import shutil

import pytest

from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.exit_status import ExitStatus


class Cli:
    """Runs commands; keeps what the last one has said."""

    out = err = ""

    def __call__(self, *words):
        env = Environment(stdout=io.StringIO(), stderr=io.StringIO())
        status = main(words, env)
        self.out, self.err = env.stdout.getvalue(), env.stderr.getvalue()
        return status


@pytest.fixture
def cli():
    return Cli()


def test_a_dynamic_one(cli, tmp_path):
    path = tmp_path / "a.vhd"
    assert ExitStatus.OK == cli("create", str(path), "--size", "100M")
    assert f"{path} 100 MiB\n" == cli.out
    assert path.stat().st_size < 10_000
    assert ExitStatus.OK == cli("check", str(path))
    assert f"{path} has no errors\n" == cli.out


def test_a_fixed_one(cli, tmp_path):
    path = tmp_path / "a.vhd"
    assert ExitStatus.OK == cli("create", str(path), "--size", "1M", "--fixed", "--json")
    expected = {"path": str(path), "size": 1 << 20, "format": "vhd", "parent": None}
    assert expected == json.loads(cli.out)
    assert (1 << 20) + 512 == path.stat().st_size


def test_a_child(cli, tmp_path):
    base, path = tmp_path / "base.vhd", tmp_path / "a.vhd"
    cli("create", str(base), "--size", "1M")
    assert ExitStatus.OK == cli("create", str(path), "--parent", str(base), "--json")
    expected = {"path": str(path), "size": 1 << 20, "format": "vhd", "parent": str(base)}
    assert expected == json.loads(cli.out)
    assert ExitStatus.OK == cli("check", str(path), "--json")
    assert {"path": str(path), "errors": [], "warnings": []} == json.loads(cli.out)


def test_a_child_that_is_larger_and_may_become_larger_still(cli, tmp_path):
    base, path = tmp_path / "base.vhd", tmp_path / "a.vhd"
    cli("create", str(base), "--size", "1M")
    words = ["create", str(path), "--parent", str(base), "--size", "3M", "--max-size", "4G"]
    assert ExitStatus.OK == cli(*words)
    assert f"{path} 3 MiB\n" == cli.out
    disk = VhdBackend(str(path))
    assert 4 << 30 == disk.resize(4 << 30)
    disk.close()
    assert ExitStatus.OK == cli("check", str(path))


def test_a_child_of_a_raw_image(cli, tmp_path):
    (tmp_path / "gold.img").write_bytes(bytes(1 << 20))
    words = ["create", str(tmp_path / "a.vhd"), "--parent", str(tmp_path / "gold.img")]
    assert ExitStatus.ERROR == cli(*words)
    assert "not a VHD" in cli.err
    assert ExitStatus.OK == cli(*words, "--parent-format", "raw")


def test_a_parent_whose_own_is_elsewhere(cli, tmp_path):
    os.makedirs(tmp_path / "under" / "more")
    base, middle = tmp_path / "base.vhd", tmp_path / "under" / "middle.vhd"
    leaf = tmp_path / "under" / "more" / "leaf.vhd"
    allow = ("--option", f"parents={tmp_path}")
    cli("create", str(base), "--size", "1M")
    assert ExitStatus.OK == cli("create", str(middle), "--parent", str(base))
    assert ExitStatus.ERROR == cli("create", str(leaf), "--parent", str(middle))
    assert f"--option parents={tmp_path}" in cli.err
    assert ExitStatus.OK == cli("create", str(leaf), "--parent", str(middle), *allow)
    assert ExitStatus.ERROR == cli("check", str(leaf))
    assert "error: its parent would be" in cli.out
    assert ExitStatus.OK == cli("check", str(leaf), *allow)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--size", "0"], "positive multiple of 512"),
        (["--size", "1000"], "positive multiple of 512"),
        (["--size", "3T"], "has 2 TiB at most"),
        (["--size", "1M", "--parent-format", "raw"], "how to read --parent"),
        (["--size", "1M", "--fixed", "--max-size", "2M"], "larger always"),
        ([], "--size or --parent"),
        (["--parent", "x", "--fixed"], "cannot be fixed"),
        (["--parent", "x", "--option", "a=b"], "there is only parents"),
    ],
)
def test_what_cannot_be(cli, tmp_path, words, text):
    assert ExitStatus.USAGE == cli("create", str(tmp_path / "a.vhd"), *words)
    assert text in cli.err
    assert [] == os.listdir(tmp_path)


@pytest.fixture
def chain(cli, tmp_path):
    """A child with a sector of its own, over a base in another directory."""
    (tmp_path / "under").mkdir()
    base, child = tmp_path / "base.vhd", tmp_path / "under" / "child.vhd"
    cli("create", str(base), "--size", "1M")
    cli("create", str(child), "--parent", str(base))
    disk = VhdBackend(str(child), parents=str(tmp_path))
    disk.write([memoryview(b"c" * 512)], 4096)
    disk.close()
    return child


def test_what_a_child_has_itself(cli, chain):
    assert ExitStatus.OK == cli("diff", str(chain))
    assert "4096 512\n" == cli.out
    assert f"{chain}: has 512 B of 1 MiB itself\n" == cli.err
    assert ExitStatus.OK == cli("diff", str(chain), "--json")
    expected = {
        "overlay": str(chain),
        "size": 1 << 20,
        "held": 512,
        "in_use": False,
        "ranges": [{"offset": 4096, "length": 512}],
    }
    assert expected == json.loads(cli.out)


@pytest.mark.parametrize("output_format", ["raw", "qcow2"])
def test_an_image_of_a_chain(cli, chain, tmp_path, output_format):
    if output_format != "raw" and shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    new = tmp_path / "new"
    words = ["export", str(chain), str(new), "--output-format", output_format]
    assert ExitStatus.ERROR == cli(*words)
    assert f"--option parents={tmp_path}" in cli.err
    assert ExitStatus.OK == cli(*words, "--option", f"parents={tmp_path}")
    assert f"{new} 1 MiB\n" == cli.out
    expected = bytes(4096) + b"c" * 512 + bytes((1 << 20) - 4608)
    if output_format == "raw":
        assert expected == new.read_bytes()
    else:
        assert b"QFI\xfb" == new.read_bytes()[:4]
    for wrong in (["--path", "x"], ["--option", "a=b"]):
        assert ExitStatus.USAGE == cli(*words, "--force", *wrong)
