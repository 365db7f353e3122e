"""A disk in a Ceph cluster, through librbd."""

from .backend import RbdBackend

__all__ = ["RbdBackend"]
