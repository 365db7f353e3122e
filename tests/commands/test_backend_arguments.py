"""What the arguments that say which backend mean together."""

from __future__ import annotations

import pytest

from xen_disk_py.commands.arguments import build_parser
from xen_disk_py.commands.backend_arguments import is_cow, is_vhd


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--path", "a"], True),
        (["--path", "a", "--format", "raw"], True),
        (["--path", "a", "--backend", "cow"], True),
        (["--path", "a", "--backend", "raw"], False),
        (["--path", "a", "--format", "vhd"], False),
        (["--path", "a", "--overlay", "b"], False),
        (["--path", "a", "--overlay", "b.vhd"], False),
        ([], False),
    ],
)
def test_changes_in_memory(words, expected):
    assert expected == is_cow(build_parser().parse_args(["connect", "7", *words]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.vhd", True), ("/x/A.VHD", True), ("a.avhd", True), ("a.vhdx", False), ("vhd", False)],
)
def test_changes_in_a_vhd(name, expected):
    assert expected == is_vhd(name)
