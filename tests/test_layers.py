"""The layers of docs/architecture.md hold: imports point downward, and never in a circle."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import xen_disk_py

ROOT = Path(xen_disk_py.__file__).parent
CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs" / "architecture.md"

LAYERS = (  # from the bottom to the top: each may import itself and what stands before it
    {"__init__", "errors", "exit_status"},
    {"named", "units", "text", "ration", "synchronizing"},
    {"blkif", "ring", "hypervisor"},
    {"trace"},
    {"host"},
    {"libxen"},
    {"backends"},
    {"crashtest"},
    {"datapath"},
    {"xenbus"},
    {"recovery"},
    {"session"},
    {"libxl", "simulated"},
    {"commands"},
    {"cli", "nbdkit_plugin"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# A hypervisor is chosen when a command runs, and the real one is loaded by then only.
PURE = {
    "crashtest.minimize",
    "blkif",
    "ring",
    "datapath.journal",
    "datapath.latency",
    "datapath.polling",
    "trace.extents",
    "trace.format",
    "trace.powercut",
    "xenbus.states",
}
EFFECTS = {"os", "socket", "select", "subprocess", "ctypes", "threading", "mmap", "fcntl"}


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below it."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(ROOT.rglob("*.py"))
    }


MODULES = modules()


@functools.cache
def imports(name: str) -> tuple[str, ...]:
    """What a module imports: our own modules by their names, others by their whole names."""
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[str]:
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (f"/{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *filter(None, [module])])
            elif module.split(".")[0] == "xen_disk_py":
                base = module[len("xen_disk_py.") :]
            else:
                yield f"/{module}"
                continue
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                for candidate in (whole, base, f"{base}.__init__".lstrip(".")):
                    if candidate in MODULES:
                        yield candidate
                        break


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_its_layer():
    assert set(LEVEL) == {top(name) for name in MODULES}


def test_imports_point_downward():
    upward = [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in imports(name)
        if not imported.startswith("/")
        and top(imported) != top(name)
        and LEVEL[top(imported)] >= LEVEL[top(name)]
    ]
    assert [] == upward


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        name: {
            imported
            for imported in imports(name)
            if not imported.startswith("/") and imported != name
        }
        for name in MODULES
    }
    assert len(MODULES) == len(list(TopologicalSorter(graph).static_order()))


def test_no_module_gives_itself_a_package():
    """Python 3.15 neither sets nor heeds that name: relative imports go by the module's spec."""
    name = "__package" + "__"  # not to find this file
    everywhere = (
        path
        for directory in ("xen_disk_py", "tests", "benchmarks", "examples")
        for path in (CHECKOUT / directory).rglob("*.py")
    )
    assert [] == [str(path) for path in everywhere if name in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_reach_for_no_effect(name):
    assert set() == EFFECTS & {other[1:].split(".")[0] for other in imports(name)}


def test_the_drawing_has_every_layer_and_no_module_that_is_gone():
    drawing = PAGE.read_text(encoding="utf-8").split("```")[1]
    stems = {path.stem for path in MODULES.values()}
    assert set() == set(re.findall(r"\b(\w+)\.py\b", drawing)) - stems
    for name in set(LEVEL) - {"__init__", "__main__", "exit_status"}:
        assert re.search(rf"\b{name}(/|\.py)", drawing), name
