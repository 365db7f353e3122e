"""The lab: real Xen, a real dom0 and real guests on a machine that has none of them.

``python -m tests.xen.lab`` boots Xen under QEMU's software emulation, hands the checkout to its
dom0 and runs something there: the tests of this directory, any command, a shell or the walkthrough.
The modules, bottom up:

* :mod:`recipe`: what a suite is made of (packages, kernels' options, file names) and the hash of it
  all;
* :mod:`archive`: initial RAM disks written from Python, kernel modules and libraries with what they
  need;
* :mod:`build`: packages to a cached directory with hypervisor, kernel, initrd, disk image and a
  saved machine;
* :mod:`stage`: the checkout, installed as a user would, in one archive for dom0;
* :mod:`machine`: one QEMU process: boot or resume, talk to dom0, always end;
* :mod:`progress`: what of a run has passed, kept so that it may be interrupted;
* :mod:`cli`: the commands.

What runs inside (``image/``: the init scripts of dom0 and of the guests; ``job.sh``: what dom0 does
per run) is shell.
"""
