"""What an emulated machine of each architecture is: QEMU's program and devices, Debian's names, and
how Xen gets dom0's kernel.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CPUS = 2


@dataclass(frozen=True)
class Architecture:
    """One of :data:`AMD64`, what is derived from it, and :data:`ARM64`.

    Attributes:
        name: Debian's.
        qemu: the program that emulates it.
        triplet: where its libraries are.
        loader: its dynamic loader, in a root file system.
        hypervisor: Xen's name in ``/boot``, as a pattern.
        memory: of the machine.
        packages: of dom0, beside those of all.
        dom0_modules: drivers of its root disk.
        cpu: the processor's model.
        host_programs: a program and the Debian package that has it.
        host_files: likewise a file.
        boot_seconds: until its services are up, at most.
    """

    name: str
    qemu: str
    triplet: str
    loader: str
    hypervisor: str
    memory: str
    packages: tuple[str, ...]
    dom0_modules: tuple[str, ...]
    cpu: str
    host_programs: tuple[tuple[str, str], ...]
    host_files: tuple[tuple[str, str], ...] = ()
    boot_seconds: float = 600

    @property
    def is_foreign(self) -> bool:
        """Whether its programs do not run here."""
        return self is ARM64

    def machine(self, ram: str, build: Path) -> list[str]:
        """Return QEMU's arguments for the machine and what it boots.

        Args:
            ram: the object that is its memory.
            build: where hypervisor, kernel and initial RAM disk are.
        """
        if self is ARM64:
            return [
                *("-machine", f"{_VIRT},memory-backend={ram}", "-m", self.memory),
                *("-accel", "tcg,thread=multi", "-cpu", self.cpu, "-smp", str(CPUS)),
                *("-dtb", str(build / "machine.dtb"), "-kernel", str(build / "xen")),
                *("-append", f"{_XEN} console=dtuart dtuart=/pl011@9000000"),
                *_loader(build / "vmlinuz", _KERNEL_AT),
                *_loader(build / "initrd", _INITRD_AT),
            ]
        return [
            *("-machine", f"q35,memory-backend={ram}", "-m", self.memory),
            *("-accel", "tcg,thread=multi", "-cpu", self.cpu, "-smp", str(CPUS)),
            *("-kernel", str(build / "xen"), "-append", f"{_XEN} com1=115200,8n1 console=com1"),
            *("-initrd", f"{build / 'vmlinuz'} {_DOM0},{build / 'initrd'}"),
        ]

    def device(self, name: str) -> str:
        """Return QEMU's name of a virtio device on this machine's bus."""
        return f"virtio-{name}-{'device' if self is ARM64 else 'pci'}"

    def prepare(self, build: Path) -> None:
        """Make what :meth:`machine` needs beside hypervisor, kernel and initial RAM disk.

        QEMU's ``guest-loader`` leaves ``#size-cells`` out of ``/chosen``, so that Xen reads sizes
        of 0: the nodes are written here.
        """
        if self is not ARM64:
            return
        tree = str(build / "machine.dtb")
        command = [self.qemu, "-machine", f"{_VIRT},dumpdtb={tree}", "-m", self.memory]
        command += ["-cpu", self.cpu, "-smp", str(CPUS), "-display", "none"]
        subprocess.run(command, check=True, capture_output=True)
        _put(tree, "x", "/chosen", "#address-cells", "2")
        _put(tree, "x", "/chosen", "#size-cells", "2")
        for name, kind, at in (
            ("vmlinuz", "kernel", _KERNEL_AT),
            ("initrd", "ramdisk", _INITRD_AT),
        ):
            node = f"/chosen/module@{at:x}"
            subprocess.run(["fdtput", "-c", tree, node], check=True)
            _put(tree, "s", node, "compatible", f"multiboot,{kind}", "multiboot,module")
            size = (build / name).stat().st_size
            _put(tree, "x", node, "reg", "0", f"{at:x}", "0", f"{size:x}")
            if kind == "kernel":
                _put(tree, "s", node, "bootargs", _DOM0)


_XEN = (
    f"dom0_mem=3G,max:3G dom0_max_vcpus={CPUS} spec-ctrl=no bootscrub=0 loglvl=all guest_loglvl=all"
)
_DOM0 = (
    "console=hvc0 quiet mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on "
    "rcupdate.rcu_expedited=1 net.ifnames=0"
)
_VIRT = "virt,virtualization=on,gic-version=3,its=off"
_KERNEL_AT = 0x5000_0000  # at 0x48000000 it would overlap the device tree
_INITRD_AT = 0x5C00_0000


def _put(tree: str, kind: str, node: str, name: str, *values: str) -> None:
    subprocess.run(["fdtput", "-t", kind, tree, node, name, *values], check=True)


def _loader(file: Path, at: int) -> Sequence[str]:
    return "-device", f"loader,file={file},addr={at:#x},force-raw=on"


AMD64 = Architecture(
    "amd64",
    qemu="qemu-system-x86_64",
    triplet="x86_64-linux-gnu",
    loader="lib64/ld-linux-x86-64.so.2",
    hypervisor="xen-*-amd64.gz",
    memory="5G",
    packages=("qemu-system-xen", "grub-xen-host"),
    dom0_modules=("virtio_pci", "virtio_blk", "ext4"),
    # "max" crashes a PV dom0 at its first instruction; SVM with nested paging is what PVH and HVM
    # guests need.
    cpu="qemu64,+svm,+npt",
    host_programs=(("qemu-system-x86_64", "qemu-system-x86"),),
    host_files=(("/usr/share/seabios/bios-256k.bin", "seabios"),),
)
# libvirt knows no model that has SVM and is this one: PV guests only.
LIBVIRT = replace(
    AMD64,
    cpu="Nehalem",
    packages=(
        *AMD64.packages,
        *("libvirt-daemon", "libvirt-daemon-driver-xen", "libvirt-clients"),
    ),
)
# Its boot includes the start of an HVM guest.
HVM = replace(AMD64, packages=(*AMD64.packages, "seabios", "ipxe-qemu"), boot_seconds=1800)
# Debian has no qemu-system-xen there: no qdisk to compare with. What is only unpacked lacks what
# every installation has.
ARM64 = Architecture(
    "arm64",
    qemu="qemu-system-aarch64",
    triplet="aarch64-linux-gnu",
    loader="lib/ld-linux-aarch64.so.1",
    hypervisor="xen-*-arm64",
    memory="5G",
    packages=(
        *("base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "gzip"),
        *("hostname", "sed", "tar", "debianutils", "diffutils", "libc-bin", "sysvinit-utils"),
    ),
    dom0_modules=("virtio_mmio", "virtio_blk", "ext4"),
    cpu="cortex-a57",
    host_programs=(
        ("qemu-system-aarch64", "qemu-system-arm"),
        ("fdtput", "device-tree-compiler"),
        ("depmod", "kmod"),
    ),
)
