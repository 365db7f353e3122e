"""A guest whose root is our disk: there before its kernel starts, served while it boots."""

from __future__ import annotations

from typing import Callable

import pytest

from .disk import GOLD, Disk, boot_and_write
from .guest import Guest, sh


@pytest.mark.smoke
def test_guest_boots_from_a_gold_image(
    connect: Callable[..., Disk], new_guest: Callable[..., Guest]
) -> None:
    """Root is our disk, and the image is not changed by it."""
    digest = sh("sha256sum", str(GOLD))
    boot_and_write(new_guest, connect, "--path", GOLD)
    assert digest == sh("sha256sum", str(GOLD)), "the gold image has changed"
