"""Tests that run inside a real Xen dom0, and the lab that boots one."""
