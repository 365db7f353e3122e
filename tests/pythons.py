"""The fast suite on a Python that this machine lacks: ``python -m tests.pythons 3.15``.

Debian testing has the newest ones. Its packages are unpacked once into a directory of their own
(400 MB in ``~/.cache/xen_disk_py/pythons``, made anew when the list of packages changes, or with
``--new``). Each run has a private copy of that and of the checkout: the wheel is built there, put
into a virtual environment, and tested as by ``tox``. Needs root, for devices and mounts, and the
Debian package mmdebstrap. Testing changes, so this is no part of ``.ci/run``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
RELEASE = "forky"
VERSIONS = ("3.14", "3.15")
PACKAGES = (
    *(f"python{version}-venv" for version in VERSIONS),
    "python3-hypothesis",
    "python3-prometheus-client",
    "python3-pytest",
    "python3-pytest-rerunfailures",
    "python3-pytest-timeout",
    "python3-pyxs",
    "python3-setuptools",
    # what tests use if it is there
    "dmsetup",
    "e2fsprogs",
    "gcc",
    "libatomic1",
    "libc6-dev",
    "libnbd0",
    "mount",
    "nbdkit",
    "procps",
    "qemu-utils",
    "udev",
    "util-linux",
)
EXCLUDED_PATHS = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
)

# In namespaces of its own, as root: $1 is the system's root, $2 an empty directory, $3 the command.
ENTER = """
set -e
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
cd "$2/root"
for directory in dev sys; do mount --rbind /$directory $directory; done
mount -t proc proc proc
mount -t tmpfs tmpfs run
mkdir -p run/lock "$2/tmp" src
chmod 1777 "$2/tmp"
mount --bind "$2/tmp" tmp  # no tmpfs, and no overlay: a file system with direct I/O and extents
mount --bind "$2/src" src
exec chroot . /bin/sh -c "$3"
"""

# In there.
TEST = """
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
cd /src
python{version} -m venv --system-site-packages /venv
/venv/bin/pip install -q --no-index --no-deps --no-build-isolation /src
/venv/bin/pip check
/venv/bin/python -P -m pytest {arguments} || exit $?  # no exec: orphans are not to become its own
"""


def cache_directory() -> Path:
    """Return where the systems are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "xen_disk_py" / "pythons"


def ensure_root(new: bool) -> Path:
    """Return the root of a system that has the packages, made first if it is not there."""
    digest = hashlib.sha256("\0".join((RELEASE, *PACKAGES, *EXCLUDED_PATHS)).encode()).hexdigest()
    place = cache_directory() / f"{RELEASE}-{digest[:12]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with (cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if new:
            shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            for old in cache_directory().glob(f"*{RELEASE}-*"):
                shutil.rmtree(old)
            print(f"unpacking {RELEASE} to {place}, once", file=sys.stderr, flush=True)
            work = place.with_name(f".{place.name}")
            work.mkdir()
            command = [
                "mmdebstrap",
                "--quiet",
                "--variant=apt",
                f"--include={','.join(PACKAGES)}",
                '--aptopt=Acquire::Languages "none"',
                '--aptopt=Acquire::Check-Valid-Until "false"',  # a mirror may lag behind
                *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED_PATHS),
                RELEASE,
                "-",  # apt's own user may not be let into a directory of ours
            ]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as packer:
                unpack = ["tar", "--extract", "--directory", work, "--exclude=./dev/*"]
                subprocess.run(unpack, stdin=packer.stdout, check=True)
            if packer.returncode:
                raise SystemExit(f"mmdebstrap failed ({packer.returncode})")
            work.rename(place)
    return place


def copy_checkout(target: Path) -> None:
    """Copy what git has, or would have if it were told, as it stands in the work tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout.decode()
    for name in listed.split("\0"):
        source = CHECKOUT / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)


def main() -> int:
    """Run the suite, and return its status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.pythons", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--new", action="store_true", help="fetch the packages of today")
    parser.add_argument("version", choices=VERSIONS)
    options, pytest = parser.parse_known_args()
    if os.geteuid() or not shutil.which("mmdebstrap"):
        parser.error("this needs root, and: sudo apt-get install mmdebstrap")
    root = ensure_root(options.new)
    # Not in /tmp, which may be a tmpfs.
    with tempfile.TemporaryDirectory(dir=cache_directory()) as work:
        copy_checkout(Path(work) / "src")
        command = TEST.format(version=options.version, arguments=shlex.join(pytest))
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--"]
        return subprocess.run(
            [*namespaces, "sh", "-c", ENTER, "enter", root, work, command], check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
