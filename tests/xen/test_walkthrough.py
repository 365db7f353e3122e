"""The README's walkthrough, in a guest of each kind; its steps are those of ``walkthrough.py``,
which prints them and what the product says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from .guest import Guest
from .walkthrough import DIRECTORY, make_image, walk


@pytest.fixture(autouse=True)
def image() -> Iterator[None]:
    """The image of the walkthrough, fresh, and its directory gone afterwards."""
    make_image()
    yield
    shutil.rmtree(DIRECTORY)


@pytest.mark.smoke
def test_walkthrough_in_pv_guest(pv_guest: Guest, xenstore_unchanged: None) -> None:
    walk(pv_guest)


def test_walkthrough_in_pvh_guest(pvh_guest: Guest, xenstore_unchanged: None) -> None:
    walk(pvh_guest)
