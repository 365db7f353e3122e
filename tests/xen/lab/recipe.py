"""What the lab's machines are made of: suites, packages, command lines, and the hash that names a
build.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from .architecture import AMD64, ARM64, HVM, LIBVIRT, Architecture

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]

PACKAGES = (
    "mount",
    "udev",
    "kmod",
    "iproute2",
    "procps",
    "util-linux",
    "xenstore-utils",
    "qemu-utils",
    "python3",
    "python3-pytest",
    "python3-pytest-timeout",
    "libatomic1",
    "fio",
    "busybox-static",
    "e2fsprogs",
    "xfsprogs",
    "dmsetup",
    "strace",
    "libnbd0",
    "nbdkit",
)

# Hundreds of megabytes of drivers and manuals that no test looks at.
EXCLUDED_PATHS = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/iso-codes/*",
    "/boot/System.map*",
    *(
        f"{lib}/modules/*/kernel/{directory}/*"
        for lib in ("/lib", "/usr/lib")
        for directory in (
            "sound",
            "net/wireless",
            "net/mac80211",
            "net/netfilter",
            "drivers/ata",
            "drivers/gpu",
            "drivers/hid",
            "drivers/hwmon",
            "drivers/iio",
            "drivers/infiniband",
            "drivers/media",
            "drivers/mtd",
            "drivers/net",
            "drivers/staging",
            "drivers/usb",
        )
    ),
)

# Of these all the same: what joins two machines, and what it needs.
INCLUDED_PATHS = tuple(
    f"{lib}/modules/*/kernel/drivers/net/{name}.ko*"
    for lib in ("/lib", "/usr/lib")
    for name in ("virtio_net", "net_failover")
)


@dataclass(frozen=True)
class Suite:
    """A Debian release on an architecture, and the Xen in it.

    Attributes:
        name: what ``--suite`` takes; also the beginning of its builds' names.
        release: Debian's.
        xen: version, as in the packages' names.
        linux: version, for people.
        architecture: the machine, and what it adds to the packages.
        hvm: have an HVM guest run, which takes minutes to start, when the machine is saved.
        is_testing: the release is not out yet. Its list of packages expires within days, which a
            mirror that stands still exceeds; it is signed all the same.
        is_common: whether ``--suite all`` has it: the others change under us, take much longer,
            or are there for one module of tests.
    """

    name: str
    release: str
    xen: str
    linux: str
    architecture: Architecture = AMD64
    hvm: bool = False
    is_testing: bool = False
    is_common: bool = False

    @property
    def packages(self) -> tuple[str, ...]:
        """Everything dom0's root file system is made from."""
        architecture = self.architecture
        return (
            *PACKAGES,
            *architecture.packages,
            f"linux-image-{architecture.name}",
            f"xen-hypervisor-{self.xen}-{architecture.name}",
            f"xen-utils-{self.xen}",
        )

    @property
    def apt_options(self) -> tuple[str, ...]:
        """What mmdebstrap passes to apt for this suite alone."""
        return ('--aptopt=Acquire::Check-Valid-Until "false"',) if self.is_testing else ()


SUITES = {
    suite.name: suite
    for suite in (
        Suite("bookworm", "bookworm", xen="4.17", linux="6.1", is_common=True),
        Suite("trixie", "trixie", xen="4.20", linux="6.12", is_common=True),
        Suite("forky", "forky", xen="4.20", linux="7", is_testing=True),
        Suite("arm64", "trixie", xen="4.20", linux="6.12", architecture=ARM64),
        Suite("libvirt", "bookworm", xen="4.17", linux="6.1", architecture=LIBVIRT),
        Suite("hvm417", "bookworm", xen="4.17", linux="6.1", architecture=HVM, hvm=True),
        Suite("hvm420", "trixie", xen="4.20", linux="6.12", architecture=HVM, hvm=True),
    )
}
DEFAULT_SUITE = "bookworm"

# The files whose content decides what a build contains.
RECIPE_FILES = (
    "architecture.py",
    "recipe.py",
    "archive.py",
    "build.py",
    "image/dom0-init",
    "image/dom0-initrd",
    "image/guest-init",
    "image/hvm-start",
)


def cache_root() -> Path:
    """Return the directory that holds every build, under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "xen_disk_py" / "lab"


def build_directory(suite: Suite) -> Path:
    """Return the directory that the build of this suite by this recipe has or will have."""
    digest = hashlib.sha256()
    for name in RECIPE_FILES:
        digest.update(name.encode() + b"\0" + (HERE / name).read_bytes() + b"\0")
    return cache_root() / f"{suite.name}-{digest.hexdigest()[:12]}"
