"""Copy-on-write into a file that outlives the process: the backend, its format, its tools."""

from .backend import OverlayBackend

__all__ = ["OverlayBackend"]
