"""Overlays that somebody has changed."""

from __future__ import annotations

import zlib

COPY = 2048  # where the second header is


def with_header(data, at: int, content):
    """Change an overlay's header, with the checksum that belongs to it, in both places."""
    header = bytearray(data[:COPY])
    header[at : at + len(content)] = content
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    return bytes(2 * header) + data[2 * COPY :]
