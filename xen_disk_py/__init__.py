"""Hot-plug a disk into a running Xen guest and serve it from Python."""

__version__ = "0.1.0"
