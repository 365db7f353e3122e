"""What the lab's machines are made of: suites, packages, command lines, and the hash that names a
build.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]

MACHINE_MEMORY = "5G"
DOM0_MEMORY = "3G"
CPUS = 2

# "-cpu max" crashes a PV dom0 at its first instruction; SVM with nested paging is what PVH guests
# need.
QEMU_CPU = "qemu64,+svm,+npt"

XEN_OPTIONS = (
    f"dom0_mem={DOM0_MEMORY},max:{DOM0_MEMORY} dom0_max_vcpus={CPUS} com1=115200,8n1 console=com1 "
    "spec-ctrl=no bootscrub=0 loglvl=all guest_loglvl=all"
)
DOM0_OPTIONS = (
    "console=hvc0 quiet mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on "
    "rcupdate.rcu_expedited=1 net.ifnames=0"
)

PACKAGES = (
    "mount",
    "udev",
    "kmod",
    "iproute2",
    "procps",
    "util-linux",
    "linux-image-amd64",
    "xenstore-utils",
    "qemu-system-xen",
    "qemu-utils",
    "grub-xen-host",
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


@dataclass(frozen=True)
class Suite:
    """A Debian release and the Xen in it."""

    name: str
    xen: str
    linux: str

    @property
    def packages(self) -> tuple[str, ...]:
        """Everything dom0's root file system is made from."""
        return (*PACKAGES, f"xen-hypervisor-{self.xen}-amd64", f"xen-utils-{self.xen}")


SUITES = {
    "bookworm": Suite("bookworm", xen="4.17", linux="6.1"),
    "trixie": Suite("trixie", xen="4.20", linux="6.12"),
}
DEFAULT_SUITE = "bookworm"

# The files whose content decides what a build contains.
RECIPE_FILES = (
    "recipe.py",
    "archive.py",
    "build.py",
    "image/dom0-init",
    "image/dom0-initrd",
    "image/guest-init",
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
