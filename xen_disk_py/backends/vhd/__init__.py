"""VHD, the format of XenServer, XCP-ng, Hyper-V, Azure and VirtualBox: read, written, made."""

from .backend import VhdBackend

__all__ = ["VhdBackend"]
