"""Other formats by ``qemu-img``, where it is installed: it makes them of a raw image of ours."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
from typing import Any, Callable

from ..errors import ImageError, ProgramMissing
from ..host.program import SYSTEM_PATH, find_program

FORMATS = ("qcow2", "vhdx", "vdi")

INSTALL = "install qemu-utils (Debian, Ubuntu) or qemu-img (Fedora)"
"""Where QEMU's programs for images come from."""

_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")
_REPEATED = re.compile(r"(Could not open '[^']*': )(?=\1)")
_LONGEST = 2000  # characters of what it says
_PATIENCE = 60.0  # seconds: a backing file may be a pipe, or on a server that does not answer


def find() -> str:
    """Return where ``qemu-img`` is.

    Raises:
        ProgramMissing: it is not installed.
    """
    return find_program("qemu-img", INSTALL)


def convert(raw: int, made: int, output_format: str, progress: Callable[[int, int], None]) -> None:
    """Make an image of another format.

    Args:
        raw: the descriptor of the raw image.
        made: the descriptor of an empty file, which becomes the other.
        output_format: one of :data:`FORMATS`.
        progress: told how much of 100 is done.

    Raises:
        ProgramMissing: ``qemu-img`` is not installed.
        ImageError: it fails; the message says why.
    """
    # It is told what it reads: an image's content, which a guest wrote, must not name its format.
    words = ["convert", "-p", "-f", "raw", "-O", output_format]
    files = [f"/proc/self/fd/{fd}" for fd in (raw, made)]
    with subprocess.Popen(
        [find(), *words, *files],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(raw, made),
        cwd="/",
        env={"PATH": SYSTEM_PATH, "LC_ALL": "C"},
    ) as process:
        try:
            said = _follow(process, progress)
        except BaseException:
            process.kill()
            raise
        if process.wait():
            raise ImageError(f"qemu-img cannot make it: {said or 'it does not say why'}")


def describe(path: str, image_format: str) -> list[dict[str, Any]]:
    """Return what ``qemu-img info`` says of an image and its backing files, the image first.

    Raises:
        ProgramMissing: ``qemu-img`` is not installed.
        ImageError: it fails; the message says why.
    """
    path = os.path.abspath(path)
    words = ["info", "--force-share", "--backing-chain", "--output=json", "-f", image_format]
    try:
        done = subprocess.run(
            [find(), *words, "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            env={"PATH": SYSTEM_PATH, "LC_ALL": "C"},
            check=False,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise ImageError(
            f"{path}: qemu-img has not answered for {_PATIENCE:g} s: is a backing file on storage "
            f"that hangs? (qemu-img info -f {image_format} {path} names it)"
        ) from None
    if done.returncode:
        said = _in_one_line(done.stderr) or "qemu-img does not say why"
        raise ImageError(f"{path}: {_explained(said, path, image_format)}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def naming_others(path: str, image_format: str) -> list[str]:
    """Tell which image of a chain names another file that QEMU reads, too; the first is the image.

    That is a backing file, or where an image's data or extents are.

    Raises:
        ProgramMissing: ``qemu-img`` is not installed.
        ImageError: it fails; the message says why.
    """
    chain = describe(path, image_format)
    found = []
    for number, image in enumerate(chain, 1):
        data = image.get("format-specific", {}).get("data", {})
        own = image["filename"]
        extents = any(each.get("filename", own) != own for each in data.get("extents", []))
        if number < len(chain) or extents or "data-file" in data:
            found.append(own)
    return found


def is_stream_optimized(path: str) -> bool:
    """Tell whether a VMDK is compressed, as for a transfer; False if that is not to be known."""
    try:
        (image, *_) = describe(path, "vmdk")
    except (ProgramMissing, ImageError):
        return False
    data = image.get("format-specific", {}).get("data", {})
    return bool(data.get("create-type") == "streamOptimized")


_HINTS = (
    (
        "infinite loop",
        "give it another backing file: qemu-img rebase -u -f {0} -b FILE -F FORMAT {1}",
    ),
    (
        "No such file",
        "put that backing file there, or name another: qemu-img rebase -u -f {0} -b FILE -F FORMAT "
        "{1}",
    ),
    ("format", "name the format that it has with --format"),
    ("descriptor", "name the format that it has with --format"),
    ("signature", "name the format that it has with --format"),
    ("Invalid argument", "it is no {0}, or damaged: name its format with --format"),
    ("lock", "another process uses it: end that first"),
    ("log", "replay it: qemu-img check -r all -f {0} {1}"),
)
"""What QEMU says, and what to do."""


def _explained(said: str, path: str, image_format: str) -> str:
    """Say it without what it repeats, and what to do."""
    said = _REPEATED.sub("", said.partition(" To replay the log, run:")[0].rstrip("."))
    said = said.removeprefix(f"Could not open '{path}': ")
    hint = next((hint for words, hint in _HINTS if words in said), None)
    return said if hint is None else f"{said}: {hint.format(image_format, path)}"


def _follow(process: subprocess.Popen[bytes], progress: Callable[[int, int], None]) -> str:
    """Report what it says of its progress until it ends; return what it says of errors."""
    assert process.stdout is not None
    assert process.stderr is not None
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, 4096)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    said = (said + data)[:_LONGEST]
                else:
                    for percent in _PERCENT.findall(data):
                        progress(int(float(percent)), 100)
    return _in_one_line(said)


def _in_one_line(said: bytes) -> str:
    return " ".join(said[:_LONGEST].decode(errors="replace").split()).removeprefix("qemu-img: ")
