"""What is wrong with TLS to an NBD server (``nbds://``), and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

from ...errors import BackendError

_AUTHORITY = "ca-cert.pem"
_HINTS = (
    (
        "requires TLS",
        "write nbds:// for nbd://, with ?tls-certificates=DIR, or USER@ and ?tls-psk-file=FILE",
    ),
    (
        "certificate verification",
        "the server's certificate is not of the authority in ca-cert.pem, or not for this host",
    ),
    (
        "non-properly terminated",
        "the server refused the key: see the user (nbds://USER@…) and the tls-psk-file or the "
        "client-cert.pem",
    ),
    ("getlogin_r", "name the user of the key: nbds://USER@HOST/…"),
    ("not supported", "the server has no TLS: see its options (nbdkit: --tls=require)"),
)


def check(uri: str, home: str | None, *, is_root: bool) -> None:
    """See that libnbd will find an authority by which it knows the server.

    Where there is no ``ca-cert.pem``, libnbd takes every certificate for good, without a word
    (1.14.2; a directory that the URI names included).

    Args:
        uri: any; what has no certificates passes.
        home: the user's directory.
        is_root: libnbd looks elsewhere then.

    Raises:
        BackendError: it will not.
    """
    parts = urlsplit(uri)
    given = parse_qs(parts.query)
    if parts.scheme != "nbds" or "tls-psk-file" in given:
        return  # without TLS, or to a socket or machine that has no name to be certified
    directories = given.get("tls-certificates", [])[-1:] or _defaults(home, is_root=is_root)
    if not any(os.access(os.path.join(name, _AUTHORITY), os.R_OK) for name in directories):
        raise BackendError(
            f"{uri}: no {_AUTHORITY} in {' or '.join(directories)}, so that anybody could be the "
            "server: put the certificate of its authority there, or name the directory with "
            "?tls-certificates=DIR"
        )


def _defaults(home: str | None, *, is_root: bool) -> Sequence[str]:
    """Where libnbd looks by itself (nbd_set_tls_certificates(3))."""
    if is_root or home is None:
        return ["/etc/pki/libnbd"]
    return [os.path.join(home, ".pki/libnbd"), os.path.join(home, ".config/pki/libnbd")]


def explained(uri: str, error: str) -> str:
    """Add to libnbd's words what to do, where TLS is the matter."""
    scheme = urlsplit(uri).scheme
    for words, hint in _HINTS:
        if words in error and (scheme.startswith("nbds") or words == "requires TLS"):
            return f"{error}: {hint}"
    return error
