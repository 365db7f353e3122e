"""Filters that ``--filter NAME`` puts over a disk: one module each."""
