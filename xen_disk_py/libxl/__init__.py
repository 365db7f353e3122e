"""Disks that a toolstack asks for: `xl block-attach`, and `disk` lines."""
