"""Each line of the log says whose disk it is about and how bad it is, and is one line."""

from __future__ import annotations

import io
import logging
import os

import pytest

from xen_disk_py.host.logs import LineHandler, about, is_journal
from xen_disk_py.host.output import Output


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Log to a file, which systemd's journal reads or not; return what is there."""
    path = tmp_path / "log"

    def logged(act, *, journal=False):
        with path.open("w") as stream:
            status = os.fstat(stream.fileno())
            if journal:
                monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
            output = Output(stream)
            log = logging.Logger("test")
            log.addHandler(LineHandler(output, "xen-disk"))
            act(log)
            output.close()
        return path.read_text().splitlines()

    return logged


def at_each_level(log):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "%s", logging.getLevelName(level))


def test_levels_are_priorities_where_the_journal_reads(logged):
    assert [
        "<7>xen-disk: DEBUG",
        "<6>xen-disk: INFO",
        "<4>xen-disk: WARNING",
        "<3>xen-disk: ERROR",
        "<2>xen-disk: CRITICAL",
    ] == logged(at_each_level, journal=True)


def test_but_not_in_a_file_that_a_service_of_ours_was_sent_to(logged, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert "xen-disk: DEBUG" == logged(at_each_level)[0]


def test_lines_name_the_disk(logged):
    def act(log):
        with about("myvm/xvdb"):
            log.error("one")
            with about("myvm\n/xvdc"):
                log.error("two")
        log.error("three")

    assert [
        "xen-disk: myvm/xvdb: one",
        "xen-disk: myvm\\n/xvdc: two",
        "xen-disk: three",
    ] == logged(act)


def test_a_message_is_one_line_and_a_traceback_has_the_same_priority(logged):
    def act(log):
        log.error("a\n%s", "b\x1b[2J", exc_info=ValueError("first\nsecond\x1b[2J"))

    first, *traceback = logged(act, journal=True)
    assert "<3>xen-disk: a\\nb\\x1b[2J" == first
    assert "<3>ValueError: first" in traceback
    assert "<3>second\\x1b[2J" == traceback[-1]
    assert {"<3>"} == {line[:3] for line in traceback}


def test_a_line_that_cannot_be_made_is_no_error_of_who_logs(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    output = Output(io.StringIO())
    handler = LineHandler(output, "xen-disk")
    handler.handle(logging.LogRecord("test", logging.ERROR, "", 1, "%d", ("x",), None))
    handler.flush()
    assert "Logging error" in said.getvalue()


def test_what_has_no_descriptor_is_no_journal(monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert not is_journal(Output(io.StringIO()))
