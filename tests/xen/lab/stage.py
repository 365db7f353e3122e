"""The checkout as dom0 gets it: the product installed as a user would, the tests, the examples
and the benchmarks, in one archive.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .machine import LabError
from .recipe import CHECKOUT, cache_root

PRODUCT = "xen_disk_py"
PRODUCT_FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", PRODUCT)
COPIED = ("tests", "examples", "benchmarks")
EXTRAS = "metrics,tui"
"""Of the product's optional dependencies, those that are small."""
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
KEEP_INSTALLS = 5


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if child.name not in CACHES and child.suffix not in {".pyc", ".egg-info"}:
                yield from _files(child)


def _digest(checkout: Path) -> str:
    digest = hashlib.sha256()
    for name in PRODUCT_FILES:
        for path in _files(checkout / name):
            digest.update(
                str(path.relative_to(checkout)).encode() + b"\0" + path.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:16]


def _pip(*arguments: str) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    command = [*pip, "--quiet", "--no-compile", "--root-user-action=ignore", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(
            f"pip could not install the checkout:\n{(result.stderr or result.stdout).strip()}"
        )


def installed_site(checkout: Path, install: bool) -> Path:
    """Return a directory with the product and what it needs; the same while the files are.

    Args:
        checkout: where the product's files are. install: let pip build and install a wheel, as
        users do; otherwise only copy the package beside its dependency.
    """
    sites = cache_root() / "sites"
    place = sites / f"{_digest(checkout)}-{EXTRAS}-{'wheel' if install else 'copy'}"
    if place.exists():
        os.utime(place)
        return place
    sites.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=sites) as work:
        site = Path(work) / "site"
        if install:
            # From a copy: a build in the checkout leaves directories behind that the next build
            # would pick up.
            source = Path(work) / "source"
            for name in PRODUCT_FILES:
                for path in _files(checkout / name):
                    target = source / path.relative_to(checkout)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
            _pip("--target", str(site), f"{source}[{EXTRAS}]")
        else:
            _pip("--target", str(site), "pyxs")
            for path in _files(checkout / PRODUCT):
                target = site / path.relative_to(checkout)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        try:
            site.rename(place)
        except OSError:  # somebody else was faster
            if not place.exists():
                raise
    by_age = sorted(sites.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-KEEP_INSTALLS]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def write_stage(share: Path, install: bool = True, checkout: Path = CHECKOUT) -> None:
    """Write ``stage.tar`` to the share: one file, because many small ones are slow to read through
    it.
    """
    site = installed_site(checkout, install)

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(member.name).name in CACHES else member

    with tarfile.open(share / "stage.tar", "w") as archive:
        archive.add(site, "site", filter=wanted)
        for name in COPIED:
            if (checkout / name).exists():
                archive.add(checkout / name, name, filter=wanted)
