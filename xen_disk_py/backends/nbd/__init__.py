"""A disk on an NBD server, through libnbd."""

from .backend import NbdBackend

__all__ = ["NbdBackend"]
