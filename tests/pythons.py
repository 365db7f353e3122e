"""The fast suite on a Python that this machine lacks: ``python -m tests.pythons 3.15``.

Debian testing has the newest ones. Its packages are unpacked once into a directory of their own
(500 MB in ``~/.cache/xen_disk_py/pythons``, made anew when the list of packages changes, or with
``--new``). Two more are built there once from Debian 13's sources: ``3.13-musl`` has musl as its C
library, and ``3.13t`` no GIL.

Each run has a private copy of that and of the checkout: the wheel is built there, put into a
virtual environment, and tested as by ``tox``. Needs root, for devices and mounts, and the Debian
package mmdebstrap. Testing changes, so this is no part of ``.ci/run``.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .xen.lab.bootstrap import BootstrapError, bootstrap

CHECKOUT = Path(__file__).resolve().parents[1]
COMMON = (
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
TO_BUILD = (
    "autoconf",
    "automake",
    "dpkg-dev",
    "libffi-dev",
    "libltdl-dev",  # a macro of libffi's configure
    "liblzma-dev",
    "libssl-dev",
    "libtool",
    "make",
    "musl-tools",
    "pkg-config",
    "python3-venv",
    "xz-utils",
    "zlib1g-dev",
)
SOURCES = ("python3.13", "libffi", "libnbd", "libxml2", "xz-utils", "zlib")
EXCLUDED_PATHS = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
)


def build_step(source: str, commands: str, setup: str = "") -> str:
    """Make a script that builds a source package in a root, to be installed in its ``$1``.

    apt has checked what the source is. A command that fails ends it, so they are joined by ``&&``.
    """
    return f"""
set -e
export PREFIX=$1
cd $(mktemp -d)
tar --extract --file /root/{source}_*.orig.tar.*z
{setup}
(cd */ && {commands.strip()}
) >build.log 2>&1 || {{ tail -n 30 build.log; exit 1; }}
"""


FOR_MUSL = """
headers=/usr/include/x86_64-linux-musl  # without the kernel's, which musl leaves to others
for directory in linux asm-generic mtd; do ln -sfn /usr/include/$directory $headers/$directory; done
ln -sfn /usr/include/x86_64-linux-gnu/asm $headers/asm
cat >musl-cc <<'END'
#!/bin/sh
# gcc knows no musl, and says glibc's name for the machine
case "$*" in *--print-multiarch*) echo x86_64-linux-musl; exit ;; esac
exec x86_64-linux-musl-gcc "$@"
END
chmod +x musl-cc
export CC=$PWD/musl-cc CFLAGS="-O2 -fPIC" CPPFLAGS=-I$PREFIX/include
export LDFLAGS="-L$PREFIX/lib -Wl,-rpath,$PREFIX/lib"
"""
CONFIGURE = (  # built for tests: no debug information, and no optimisation by profile
    './configure -q --prefix=$PREFIX --with-ensurepip=no --disable-test-modules OPT="-O2 -DNDEBUG"'
)
CHECK = '$PREFIX/bin/python3 -c "import ctypes, hashlib, lzma, zlib"'
MUSL = tuple(
    build_step(source, commands, FOR_MUSL)
    for source, commands in (
        (
            "libffi",
            r"""
    autoreconf -i &&
    ./configure -q --prefix=$PREFIX --disable-docs --disable-shared \
        --disable-multi-os-directory --disable-builddir &&
    make -s -j2 && make -s install
""",
        ),
        (
            "zlib",
            """
    sh ./configure --static --prefix=$PREFIX &&
    make -s libz.a && cp libz.a $PREFIX/lib && cp zlib.h zconf.h $PREFIX/include
""",
        ),
        (
            "xz-utils",
            """
    ./configure -q --prefix=$PREFIX --disable-shared --disable-doc --disable-nls &&
    make -s -j2 -C src/liblzma && make -s -C src/liblzma install
""",
        ),
        (
            "python3.13",
            rf"""
    {CONFIGURE} \
        LIBFFI_CFLAGS=" " LIBFFI_LIBS=-lffi ZLIB_CFLAGS=" " ZLIB_LIBS=-lz \
        LIBLZMA_CFLAGS=" " LIBLZMA_LIBS=-llzma &&
    make -s -j2 && make -s install && {CHECK}
""",
        ),
        (
            "libxml2",
            r"""
    autoreconf -i && ./configure -q --prefix=$PREFIX --disable-shared --with-minimum &&
    make -s -j2 libxml2.la && make -s install-libLTLIBRARIES install-data
""",
        ),
        (
            "libnbd",
            r"""
    export PKG_CONFIG_PATH=$PREFIX/lib/pkgconfig  # for libxml2, without which it has no URIs
    ./configure -q --prefix=$PREFIX --disable-static --disable-python --disable-ocaml \
        --disable-golang --disable-rust --disable-fuse --disable-ublk --without-gnutls \
        --without-bash-completions &&
    make -s -j2 -C common/utils && make -s -j2 -C lib && make -s -C lib install
""",
        ),
    )
)
FREE_THREADED = (
    build_step(
        "python3.13",
        f"""
    {CONFIGURE} --disable-gil &&
    make -s -j2 && make -s install && {CHECK}
""",
    ),
)


@dataclass(frozen=True)
class Root:
    """A system that has Pythons.

    Attributes:
        release: of Debian.
        packages: what it has.
        sources: of which packages it has the sources, in ``/root``.
    """

    release: str
    packages: tuple[str, ...]
    sources: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What tells it from one of another recipe."""
        recipe = (self.release, *self.packages, *EXCLUDED_PATHS, *self.sources)
        return hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Python:
    """Where a Python comes from.

    Attributes:
        root: the system that has it.
        executable: in that.
        steps: what builds it there, if it is no package.
    """

    root: Root
    executable: str
    steps: tuple[str, ...] = ()


NEWEST = ("3.14", "3.15")
TESTING = Root("forky", (*(f"python{version}-venv" for version in NEWEST), *COMMON))
STABLE = Root("trixie", (*TO_BUILD, *COMMON), SOURCES)
PYTHONS = {
    **{version: Python(TESTING, f"/usr/bin/python{version}") for version in NEWEST},
    "3.13-musl": Python(STABLE, "/opt/3.13-musl/bin/python3", MUSL),
    "3.13t": Python(STABLE, "/opt/3.13t/bin/python3", FREE_THREADED),
}
MIRROR = "http://deb.debian.org/debian"

NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--")
# In these, as root: $1 is the system's root, $2 an empty directory, $3 the command.
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
# Likewise, to change it.
BUILD = """
set -e
cd "$1"
for directory in dev sys; do mount --rbind /$directory $directory; done
mount -t proc proc proc
mount -t tmpfs tmpfs tmp
exec chroot . /bin/sh -c "$3" build "$2"
"""

# In there. Debian's pip and setuptools make the wheel: a Python that was built has neither.
TEST = """
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
cd /src
python3 -m venv --system-site-packages /wheel
/wheel/bin/pip wheel -q --no-index --no-deps --no-build-isolation --wheel-dir /wheel /src
{executable} -m venv --without-pip /venv
echo /usr/lib/python3/dist-packages >$(echo /venv/lib/python3.*/site-packages)/debian.pth
/wheel/bin/pip -q --python /venv/bin/python install --no-index --no-deps /wheel/*.whl
/wheel/bin/pip --python /venv/bin/python check
{command}
exit 0  # the shell does not become the last command, whose own all orphans would be: as process 1
"""
PYTEST = "/venv/bin/python -P -m pytest {arguments}"


def cache_directory() -> Path:
    """Return where the systems are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "xen_disk_py" / "pythons"


@contextmanager
def locked(release: str) -> Iterator[None]:
    """Have the systems of a release for ourselves."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    with (cache_directory() / f"{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def ensure_root(root: Root, *, new: bool) -> Path:
    """Return the directory of a system, made first if it is not there."""
    place = cache_directory() / f"{root.release}-{root.digest}"
    if new:
        shutil.rmtree(place, ignore_errors=True)
    if place.exists():
        return place
    for old in cache_directory().glob(f"*{root.release}-*"):
        shutil.rmtree(old)
    say(f"unpacking {root.release} to {place}, once")
    work = place.with_name(f".{place.name}")
    system = work / "system"
    system.mkdir(parents=True)
    archives = shlex.join(("apt-get", "source", "--download-only", "--tar-only", *root.sources))
    options = [
        "--variant=apt",
        f"--include={','.join(root.packages)}",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::Check-Valid-Until "false"',  # a mirror may lag behind
        *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED_PATHS),
        *(
            [f'--customize-hook=chroot "$1" sh -c {shlex.quote(f"cd /root && {archives}")}']
            if root.sources
            else []
        ),
        root.release,
        "-",
        *(f"{kind} {MIRROR} {root.release} main" for kind in ("deb", "deb-src") if root.sources),
    ]
    bootstrap(options, system, work)
    system.rename(place)
    shutil.rmtree(work)
    return place


def ensure_built(python: Python, root: Path) -> None:
    """Have a Python built in a system: those of its steps that are not done yet."""
    prefix = Path(python.executable).parents[1]
    recipe = hashlib.sha256()  # up to a step, since that builds upon those before
    for number, step in enumerate(python.steps, start=1):
        recipe.update(step.encode())
        done = root / "opt" / f"{prefix.name}-{recipe.hexdigest()[:12]}"
        if done.exists():
            continue
        say(f"building {prefix.name} in {root}, once: step {number} of {len(python.steps)}")
        if number == 1:
            shutil.rmtree(root / prefix.relative_to("/"), ignore_errors=True)
        words = [*NAMESPACES, "sh", "-c", BUILD, "enter", str(root), str(prefix), step]
        subprocess.run(words, check=True)
        done.touch()


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
    parser.add_argument(
        "--run",
        metavar="COMMAND",
        help="run a shell command there instead, in the checkout; Python is /venv/bin/python",
    )
    parser.add_argument("version", choices=PYTHONS)
    options, pytest = parser.parse_known_args()
    if os.geteuid() or not shutil.which("mmdebstrap"):
        parser.error("this needs root, and: sudo apt-get install mmdebstrap")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all ends with us
    python = PYTHONS[options.version]
    try:
        with locked(python.root.release):
            root = ensure_root(python.root, new=options.new)
            ensure_built(python, root)
    except (BootstrapError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    command = options.run or PYTEST.format(arguments=shlex.join(pytest))
    # Not in /tmp, which may be a tmpfs.
    with tempfile.TemporaryDirectory(dir=cache_directory()) as work:
        copy_checkout(Path(work) / "src")
        script = TEST.format(executable=python.executable, command=command)
        return subprocess.run(
            [*NAMESPACES, "sh", "-c", ENTER, "enter", root, work, script], check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
