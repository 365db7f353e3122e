"""``import nbdkit``, for plugins: what nbdkit's own module does."""

from __future__ import annotations

import errno
import logging
import signal

import pytest

from xen_disk_py.backends.nbdkit import api


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("511", 511),
        ("7k", 7 << 10),
        (" +7K", 7 << 10),
        ("1b", 1),
        ("3s", 1536),
        ("17M", 17 << 20),
        ("2g", 2 << 30),
        ("1T", 1 << 40),
        ("1p", 1 << 50),
        ("7E", 7 << 60),
    ],
)
def test_a_size_is_read_as_nbdkit_reads_it(text, size):
    assert size == api.parse_size(text)


@pytest.mark.parametrize("text", ["", "foo", "-1", "0x10", "1.5M", "7kB", "8E", "1_0", "\u0663"])
def test_what_is_no_size_is_a_value_error(text):
    with pytest.raises(ValueError, match="Unable to parse string as size"):
        api.parse_size(text)


@pytest.mark.parametrize(
    "call",
    [
        lambda: api.parse_size(17),
        lambda: api.parse_size(b"17"),
        lambda: api.debug(3),
        lambda: api.set_error("EIO"),
    ],
)
def test_a_value_of_another_type_is_a_type_error(call):
    with pytest.raises(TypeError):
        call()


def test_debug_is_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        api.debug("100% sure")
    assert ["100% sure"] == caplog.messages


def test_there_is_no_export_name_before_it_is_opened():
    with pytest.raises(RuntimeError):
        api.export_name()


def test_an_error_is_that_of_the_thread():
    api.set_error(errno.ENOSPC)
    assert errno.ENOSPC == api.current.error
    api.set_error(0)


def test_shutdown_asks_the_process_to_end(monkeypatch):
    asked = []
    monkeypatch.setattr(api.os, "kill", lambda *what: asked.append(what))
    api.shutdown()
    assert [(api.os.getpid(), signal.SIGTERM)] == asked
