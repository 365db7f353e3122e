"""TLS to real servers: who is asked, by which key, and what is said where that is wrong."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import pytest

from backends.blocks import read, write
from xen_disk_py.backends.nbd import NbdBackend, tls
from xen_disk_py.errors import BackendError

PATIENCE = 30.0
AUTHORITY = "cn = test\nca\ncert_signing_key\nexpiration_days = 30\n"
SERVER = (
    'cn = "localhost"\ndns_name = "localhost"\ntls_www_server\nsigning_key\nexpiration_days = 30\n'
)


def certtool(*words):
    subprocess.run(["certtool", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Directories: ``ca`` of the authority, ``other`` of another, ``server``, ``none``; keys."""
    for program in ("certtool", "psktool", "nbdkit"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: gnutls-bin nbdkit)")
    top = tmp_path_factory.mktemp("pki")
    (top / "ca.txt").write_text(AUTHORITY)
    (top / "server.txt").write_text(SERVER)
    for name in ("ca", "other", "server", "none"):
        (top / name).mkdir()
        certtool("--generate-privkey", "--key-type=ecdsa", "--outfile", top / name / "key.pem")
    for name in ("ca", "other"):
        words = ["--load-privkey", top / name / "key.pem", "--template", top / "ca.txt"]
        certtool("--generate-self-signed", *words, "--outfile", top / name / "ca-cert.pem")
    server = top / "server"
    (server / "key.pem").rename(server / "server-key.pem")
    shutil.copy(top / "ca" / "ca-cert.pem", server)
    authority = ["--load-ca-certificate", top / "ca" / "ca-cert.pem"]
    authority += ["--load-ca-privkey", top / "ca" / "key.pem", "--template", top / "server.txt"]
    key = ["--load-privkey", server / "server-key.pem"]
    certtool("--generate-certificate", *authority, *key, "--outfile", server / "server-cert.pem")
    (top / "keys.psk").write_text(f"alice:{'5a' * 32}\n")
    (top / "wrong.psk").write_text(f"alice:{'a5' * 32}\n")
    return top


@pytest.fixture(scope="module")
def start(pki):
    """Start nbdkit with TLS on a free port; give that."""
    servers = []

    def start(*words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require", *words]
        servers.append(subprocess.Popen([*command, "memory", "1M"], stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                assert servers[-1].poll() is None, "nbdkit ended"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            else:
                return port

    yield start
    for server in servers:
        server.kill()
        server.wait(PATIENCE)


@pytest.fixture(scope="module")
def certified(start, pki):
    return start(f"--tls-certificates={pki / 'server'}")


@pytest.fixture(scope="module")
def keyed(start, pki):
    return start(f"--tls-psk={pki / 'keys.psk'}")


def is_usable(uri):
    disk = NbdBackend(uri)
    write(disk, 4096, b"x" * 4096)
    disk.flush()
    assert b"x" * 4096 == read(disk, 4096, 4096)
    disk.close()


def refused(uri):
    with pytest.raises(BackendError) as caught:
        NbdBackend(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_with_a_certificate(certified, pki):
    is_usable(f"nbds://localhost:{certified}/?tls-certificates={pki / 'ca'}")


def test_a_server_with_the_certificate_of_another_authority(certified, pki):
    message = refused(f"nbds://localhost:{certified}/?tls-certificates={pki / 'other'}")
    assert "not of the authority in ca-cert.pem" in message


def test_a_server_that_nobody_would_know(certified, pki):
    """libnbd 1.14 would take any certificate."""
    message = refused(f"nbds://localhost:{certified}/?tls-certificates={pki / 'none'}")
    assert f"no ca-cert.pem in {pki / 'none'}" in message


def test_a_server_that_wants_tls(certified):
    message = refused(f"nbd://localhost:{certified}/")
    assert "write nbds://" in message


def test_a_server_with_keys(keyed, pki):
    is_usable(f"nbds://alice@localhost:{keyed}/?tls-psk-file={pki / 'keys.psk'}")


@pytest.mark.parametrize(
    ("user", "file", "words"),
    [
        ("alice@", "wrong.psk", "the server refused the key"),
        ("bob@", "keys.psk", "username bob was not found in PSK file"),
        ("alice@", "none.psk", "No such file or directory"),
    ],
)
def test_a_wrong_key(keyed, pki, user, file, words):
    assert words in refused(f"nbds://{user}localhost:{keyed}/?tls-psk-file={pki / file}")


# -- without a server ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://host/",
        "nbd+unix:///?socket=s",
        "nbds+unix:///?socket=s",
        "nbds://a@h/?tls-psk-file=k",
    ],
)
def test_what_has_no_certificates_passes(uri, tmp_path):
    tls.check(uri, str(tmp_path), is_root=False)


def test_the_users_own_directories_are_those_of_libnbd(tmp_path):
    with pytest.raises(BackendError) as caught:
        tls.check("nbds://host/", str(tmp_path), is_root=False)
    assert f"in {tmp_path}/.pki/libnbd or {tmp_path}/.config/pki/libnbd" in str(caught.value)
    directory = tmp_path / ".config/pki/libnbd"
    directory.mkdir(parents=True)
    (directory / "ca-cert.pem").touch()
    tls.check("nbds://host/", str(tmp_path), is_root=False)


@pytest.mark.parametrize("home", ["/root", None])
def test_root_has_one_directory(home):
    with pytest.raises(BackendError, match=r"no ca-cert.pem in /etc/pki/libnbd,"):
        tls.check("nbds://host/", home, is_root=True)


def test_other_errors_are_left_as_they_are():
    assert "connect: refused" == tls.explained("nbds://host/", "connect: refused")
    assert "not supported" == tls.explained("nbd://host/", "not supported")
    assert "USER@HOST" in tls.explained("nbds://host/", "getlogin_r: no")
