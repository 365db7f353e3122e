"""Packages to a bootable machine, once: the cached directory of a suite.

A build holds ``xen`` and ``vmlinuz`` (both unpacked), ``initrd``, ``disk`` (dom0's root, never
written again) and, when saving worked, ``memory`` and ``state``: the machine as it stood when its
services were up. It is made in a temporary directory beside its place and renamed when whole, under
a lock, so that a killed build leaves nothing that looks finished.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .architecture import Architecture
from .archive import Modules, Tree, add_busybox, add_programs, unpack_kernel
from .bootstrap import BootstrapError, bootstrap
from .machine import LabError, save_machine
from .recipe import EXCLUDED_PATHS, HERE, INCLUDED_PATHS, Suite, build_directory, cache_root

KEEP_BUILDS = 2
DISK_SIZE = "3G"
GUEST_DISK_SIZE = "64M"
GUEST_PROGRAMS = ("usr/sbin/mke2fs", "usr/sbin/e2fsck", "usr/sbin/blkdiscard")
GUEST_MODULES = ("xen_blkfront", "ext4")
# ext4 asks for the checksum by name at run time, so modules.dep does not tell.
CHECKSUMS = ("crc32c_generic", "crc32c_cryptoapi", "libcrc32c")

HOST_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "tar": "tar",
}
HOST_FILES = {
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}


def say(text: str) -> None:
    """Report progress on stderr."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def ensure_host_packages(architecture: Architecture) -> None:
    """Install what this machine lacks when that is possible, or say which command does."""
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"
    programs = {**HOST_PROGRAMS, **dict(architecture.host_programs)}
    files = {**HOST_FILES, **dict(architecture.host_files)}
    missing = {package for program, package in programs.items() if not shutil.which(program)}
    missing |= {package for path, package in files.items() if not Path(path).exists()}
    if not missing:
        return
    packages = sorted(missing)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(f"this machine lacks {', '.join(packages)}; run: sudo {' '.join(command)}")
    say(f"installing {', '.join(packages)}")
    subprocess.run(["apt-get", "update"], check=False, stdout=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(command, check=False, stdout=sys.stderr, env=environment).returncode:
        raise LabError(
            f"apt could not install {', '.join(packages)}; run it yourself: {' '.join(command)}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build holds {path}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ensure_build(suite: Suite) -> Path:
    """Return the directory of a finished build, making it first when it is not there."""
    place = build_directory(suite)
    ensure_host_packages(suite.architecture)
    if (place / "disk").exists():
        return place
    with _locked(cache_root() / f"{suite.name}.lock"):
        if (place / "disk").exists():
            return place
        for leftover in cache_root().glob(f".{suite.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        started = time.monotonic()
        say(f"building {suite.name} (Xen {suite.xen}, Linux {suite.linux}), once, in {place}")
        work = Path(tempfile.mkdtemp(prefix=f".{suite.name}-", dir=cache_root()))
        try:
            finished = work / "build"
            finished.mkdir()
            root = work / "root"
            _install_packages(suite, root, work)
            _fill(suite, root, finished, work)
            shutil.rmtree(root)
            _save(finished, suite)
            finished.rename(place)
            _forget_old(suite)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        say(f"built in {time.monotonic() - started:.0f} s")
    return place


def _forget_old(suite: Suite) -> None:
    by_age = sorted(cache_root().glob(f"{suite.name}-*"), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-KEEP_BUILDS]:
        shutil.rmtree(old, ignore_errors=True)


# What cannot run here is only unpacked; what its scripts would have done, nobody misses.
_VARIANT = {
    False: ("--variant=apt",),
    True: ("--variant=extract", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"),
}


def _install_packages(suite: Suite, root: Path, work: Path) -> None:
    say(f"installing {len(suite.packages)} Debian packages and what they need (2 to 5 minutes)")
    root.mkdir()
    excludes = [f"--dpkgopt=path-exclude={path}" for path in EXCLUDED_PATHS]
    includes = [f"--dpkgopt=path-include={path}" for path in INCLUDED_PATHS]
    options = [
        *_VARIANT[suite.architecture.is_foreign],
        f"--architectures={suite.architecture.name}",
        f"--include={','.join(suite.packages)}",
        '--aptopt=Acquire::Languages "none"',
        *suite.apt_options,
        *excludes,
        *includes,
        suite.release,
        "-",
    ]
    log = work / "mmdebstrap.log"
    try:
        with log.open("wb") as errors:
            # The kernel's package would spend half a minute on an initrd that nobody boots.
            bootstrap(options, root, work, errors=errors, environment={"INITRD": "No"})
    except BootstrapError:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        hint = ""
        if "NO_PUBKEY" in tail or "not signed" in tail:
            hint = f"\nThe keys of {suite.name} are missing: upgrade debian-archive-keyring."
        raise LabError(f"mmdebstrap could not make {suite.name}:\n{tail}{hint}") from None


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise LabError(
            f"expected one {pattern} in {directory}, found {[path.name for path in found]}"
        )
    return found[0]


def _unzipped(content: bytes) -> bytes:
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def _fill(suite: Suite, root: Path, build: Path, work: Path) -> None:
    say("unpacking kernel and hypervisor, making the guests")
    architecture = suite.architecture
    image = HERE / "image"
    kernel = unpack_kernel(_only(root / "boot", "vmlinuz-*").read_bytes())
    (build / "vmlinuz").write_bytes(kernel)
    hypervisor = _only(root / "boot", architecture.hypervisor)
    (build / "xen").write_bytes(_unzipped(hypervisor.read_bytes()))
    if architecture.is_foreign:  # what packages' scripts do that could not be run
        shutil.rmtree(root / "var/run", ignore_errors=True)
        (root / "var/run").symlink_to("/run")
        for name in ("mnt", "root", "tmp", "proc", "sys", "run"):
            (root / name).mkdir(exist_ok=True)
        for name in ("passwd", "group"):
            shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
        for applet in ("awk", "pidof"):
            if not (root / "usr/bin" / applet).exists():
                (root / "usr/bin" / applet).symlink_to("busybox")
        version = _only(root / "usr/lib/modules", "*").name
        subprocess.run(["depmod", "-b", str(root), version], check=True)
    modules = Modules(root)

    initrd = Tree()
    add_busybox(initrd, root)
    modules.add(initrd, architecture.dom0_modules, optional=CHECKSUMS)
    initrd.console()
    initrd.file("init", (image / "dom0-initrd").read_bytes())
    for directory in ("proc", "sys", "root"):
        initrd.directory(directory)
    (build / "initrd").write_bytes(initrd.cpio())
    architecture.prepare(build)

    lab = root / "opt/lab"
    lab.mkdir(parents=True)
    guest_init = (image / "guest-init").read_bytes()
    shutil.copy(image / "dom0-init", lab / "init")
    (lab / "vmlinuz").write_bytes(kernel)
    guest = _guest_tree(architecture, root)
    modules.add(guest, GUEST_MODULES, optional=CHECKSUMS)
    guest.file("init", guest_init)
    (lab / "guest.cpio").write_bytes(guest.cpio())
    add_programs(guest, root, ["usr/bin/fio"], architecture)
    (lab / "guest-fio.cpio").write_bytes(guest.cpio())
    if suite.hvm:
        _add_hvm(root, lab, modules)

    disk = _guest_tree(architecture, root)
    disk.file("bin/init", guest_init)
    disk.file("lab-root", b"", 0o644)
    guest_root = work / "guest-root"
    guest_root.mkdir()
    disk.write_to(guest_root)
    _make_image(guest_root, lab / "guest-root.ext4", GUEST_DISK_SIZE)

    (root / "etc/mtab").unlink(missing_ok=True)
    (root / "etc/mtab").symlink_to("/proc/self/mounts")
    say("making dom0's disk")
    _make_image(root, build / "disk", DISK_SIZE)


def _add_hvm(root: Path, lab: Path, modules: Modules) -> None:
    """Add what starts an HVM guest: its firmware reads kernel and RAM disk at a crawl, so that
    these are the smallest there are.
    """
    shutil.copy(_only(root / "boot", "vmlinuz-*"), lab / "hvm-kernel")
    guest = Tree()
    add_busybox(guest, root)
    modules.add(guest, ("xen_blkfront",))
    guest.console()
    for directory in ("proc", "sys", "tmp", "mnt", "etc"):
        guest.directory(directory)
    guest.file("init", (HERE / "image/guest-init").read_bytes())
    (lab / "hvm.cpio.gz").write_bytes(gzip.compress(guest.cpio()))
    shutil.copy(HERE / "image/hvm-start", lab / "before-ready")


def _guest_tree(architecture: Architecture, root: Path) -> Tree:
    tree = Tree()
    add_busybox(tree, root)
    add_programs(tree, root, GUEST_PROGRAMS, architecture)
    tree.console()
    for directory in ("proc", "sys", "root", "tmp", "mnt", "etc"):
        tree.directory(directory)
    # busybox runs an applet of its own, such as its mke2fs (ext2 only), whatever the path says; it
    # has no mkfs.ext4.
    tree.link("opt/bin/mkfs.ext4", "mke2fs")
    return tree


def _make_image(directory: Path, image: Path, size: str) -> None:
    command = [
        "mkfs.ext4",
        "-q",
        "-F",
        "-O",
        "^has_journal",
        "-E",
        "root_owner=0:0",
        "-d",
        str(directory),
        str(image),
        size,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"mkfs.ext4 could not make {image.name}: {result.stderr.strip()}")


def _save(build: Path, suite: Suite) -> None:
    time_needed = "up to 20 minutes, for it starts an HVM guest" if suite.hvm else "about a minute"
    say(f"booting once, to save the running machine for fast starts ({time_needed})")
    try:
        save_machine(build, suite.architecture)
    except LabError as error:
        for name in ("memory", "state"):
            (build / name).unlink(missing_ok=True)
        say(f"could not save the machine, every start will be a full boot: {error}")
