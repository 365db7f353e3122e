"""What the backend tests share."""

import contextlib
import functools
import os
import random
import shutil
import subprocess
import tempfile

import pytest


@functools.lru_cache(maxsize=8)
def _noise(size):
    return random.Random(size).randbytes(size)


@pytest.fixture
def make_image(tmp_path):
    """Makes an image file: of random content, or sparse."""

    def make(size=1 << 20, *, name="disk.img", sparse=False):
        path = tmp_path / name
        with open(path, "wb") as file:
            if sparse:
                file.truncate(size)
            else:
                file.write(_noise(size))
        return str(path)

    return make


@pytest.fixture
def image(make_image):
    return make_image()


@pytest.fixture
def attach_loop():
    """Makes a loop device of a file, with options of losetup."""
    devices = []

    def attach(path, *options):
        if os.geteuid():
            pytest.skip("a loop device needs root")
        if shutil.which("losetup") is None:
            pytest.skip("a loop device needs losetup")
        made = subprocess.run(
            ["losetup", "--find", "--show", *options, path],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"no loop device here: {made.stderr.strip()}")
        devices.append(made.stdout.strip())
        return devices[-1]

    yield attach
    for device in reversed(devices):
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def loop_device(make_image, attach_loop):
    """A block device of 4 MiB."""
    return attach_loop(make_image(4 << 20, name="loop.img"))


@pytest.fixture
def as_nobody():
    """A context in which this process has no privilege, and a directory that all can enter."""

    @contextlib.contextmanager
    def dropped():
        if os.geteuid():
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield directory, dropped
