"""The documents name what there is, and what they refer to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xen_disk_py.backends.finding import builtin_names
from xen_disk_py.commands.arguments import build_parser, commands_of

ROOT = Path(__file__).parents[1]
DISKS = (ROOT / "docs/disks.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "findings/*.md")
    for path in sorted(ROOT.glob(pattern))
]
TESTS = "\n".join(
    f"/{path.name}\n{path.read_text(encoding='utf-8')}" for path in ROOT.glob("tests/**/*.py")
)
INVENTED = re.compile("domains|upper|zeros")  # the examples of docs/extending.md
COMMANDS = [name for name, parser in commands_of(build_parser()).items() if parser.usage]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_in_the_readme(name):
    assert re.search(rf"`(xen-disk )?{name}[ `]", README)


@pytest.mark.parametrize("name", builtin_names())
def test_a_backend_is_documented(name):
    assert re.search(rf"\b{name}\b", README + DISKS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = target.partition("#")
        if "://" in path:
            continue
        where = (ROOT / document).parent / path if path else ROOT / document
        assert where.exists(), target
        if fragment:
            assert fragment in headings(where), target


def headings(path):
    """Name a document's headings as links do."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_what_a_document_names_is_there(document):
    """Files of this tree, and tests; a name that ends in … begins one."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:xen_disk_py|tests|docs|benchmarks|examples)/[\w./-]+)", text):
        if not INVENTED.search(path):
            assert (ROOT / path).exists(), path
    for name in re.findall(r"\b(test_\w+)(?:…)?`", text):
        if not INVENTED.search(name):
            assert f"def {name}" in TESTS or f"/{name}" in TESTS, name


def test_a_disk_of_the_readme_is_tried_by_a_test():
    """In the lab, with real Xen; Ceph's with a real cluster."""
    rows = re.findall(r"^\| `(connect myvm[^`]*)` \|", README, flags=re.MULTILINE)
    assert len(rows) > 9
    assert [] == [row for row in rows if "rbd:" not in row and f'"{row}",\n' not in TESTS]
    assert '"rbd:' in TESTS
