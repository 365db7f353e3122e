"""Xen without Xen: a hypervisor, a xenstore and a guest for demos and tests.

Each module simulates one part of a real host, behind the interface that the
real part has, so that the device, ring and backend code run here unchanged.
"""
