"""``top``: what all disks of this host do, refreshed in place."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import termios
import time
import tty
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import UsageError
from ..exit_status import ExitStatus
from ..recovery import survey
from ..recovery.survey import Seen
from ..text import printable
from ..units import format_size
from .environment import Environment
from .rates import in_order, is_of, rates
from .signals import interruptible
from .top_table import COLUMNS, DEAD, Draw, drawing, fitting, narrowed, plainly, shortened

_SORT_KEYS = {
    "g": "guest",
    "i": "iops",
    "m": "mbs",
    "l": "p99",
    "d": "depth",
    "f": "inflight",
    "e": "errors",
    "M": "memory",
}
_HELP = (
    "q quit, space now; sort: < >, or g guest, i IOPS, m MB/s, l p99, d depth, f in flight, "
    "e errors, M memory"
)
# another screen, no cursor, and what is too long is cut, not wrapped
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_UNKNOWN = (80, 24)  # columns and lines, where the terminal does not say
_NAME = 20  # columns of a guest's name at most
_SORTED = {
    "guest": "GUEST",
    "iops": "IOPS",
    "mbs": "MB/s",
    "p99": "p99",
    "depth": "DEPTH",
    "inflight": "FLIGHT",
    "errors": "ERRORS",
    "memory": "MEMORY",
}


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Show a table, or print lines or JSON, until somebody ends it."""
    if not args.interval:
        raise UsageError("--interval 0: give a number of seconds above 0")
    with interruptible():
        try:
            is_live = not (args.once or args.json) and _is_tty(env.stdin) and _is_tty(env.stdout)
            if is_live and env.stdin is not None:
                _show(args, env, env.stdin)
            else:
                _print(args, env)
        except KeyboardInterrupt:
            pass  # the way to end it
    return ExitStatus.OK


def _is_tty(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _look(args: argparse.Namespace, env: Environment) -> list[Seen]:
    return [seen for seen in survey.look(env.record_directory) if is_of(seen, args.vm)]


def _print(args: argparse.Namespace, env: Environment) -> None:
    """Print what each interval was like, below each other."""
    before, then = _look(args, env), time.monotonic()
    while True:
        _wait_for_reader(env, args.interval)
        seen, now = _look(args, env), time.monotonic()
        rows = in_order(rates(before, seen, now - then), args.sort)
        before, then = seen, now
        if args.json:
            env.say(json.dumps(rows, indent=2 if args.once else None))
        else:
            for line in _table(rows):
                env.say(line)
        if args.once:
            return
        if not args.json:
            env.say("")


def _wait_for_reader(env: Environment, seconds: float) -> None:
    """Sleep; end at once if nobody reads what is printed.

    Raises:
        BrokenPipeError: so it is.
    """
    poller = select.poll()
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        poller.register(env.stdout.fileno(), 0)
    if any(events & select.POLLERR for _, events in poller.poll(seconds * 1000)):
        raise BrokenPipeError


def _show(args: argparse.Namespace, env: Environment, stdin: TextIO) -> None:
    """Show a table in place, and obey keys."""
    sort, draw = args.sort, drawing()
    before, then = _look(args, env), time.monotonic()
    rows = rates(before, before, 1.0)
    with _screen(env.stdout, stdin) as wake:
        due = then + args.interval
        while True:
            _draw(env.stdout, in_order(rows, sort), COLUMNS.index(_SORTED[sort]), draw)
            poller = select.poll()
            poller.register(stdin.fileno(), select.POLLIN)
            poller.register(wake, select.POLLIN)
            ready = dict(poller.poll(max(0.0, due - time.monotonic()) * 1000))
            if wake in ready:
                os.read(wake, 4096)  # another size: draw anew
            if stdin.fileno() in ready:
                keys = os.read(stdin.fileno(), 64).decode("ascii", "replace")
                if not keys or set(keys) & set("qQ\x03\x04"):
                    return
                for key in keys:
                    sort = _next(sort, key) if key in "<>" else _SORT_KEYS.get(key, sort)
                if " " in keys:
                    due = 0.0
            now = time.monotonic()
            if now >= due:
                seen = _look(args, env)
                rows = rates(before, seen, now - then)
                before, then, due = seen, now, now + args.interval


@contextlib.contextmanager
def _screen(stdout: TextIO, stdin: TextIO) -> Iterator[int]:
    """Take the terminal, and give it back as it was; a descriptor tells of another size."""
    settings = termios.tcgetattr(stdin.fileno())
    wake, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handler = signal.signal(signal.SIGWINCH, lambda signum, frame: None)
    fd = signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    try:
        tty.setcbreak(stdin.fileno())
        stdout.write(_ENTER)
        yield wake
    finally:
        signal.set_wakeup_fd(fd)
        signal.signal(signal.SIGWINCH, handler)
        os.close(wake)
        os.close(alarm)
        with contextlib.suppress(termios.error, OSError):  # the terminal has gone
            termios.tcsetattr(stdin.fileno(), termios.TCSADRAIN, settings)
            stdout.write(_LEAVE)
            stdout.flush()


def _next(sort: str, key: str) -> str:
    """The order by the column to the left or to the right."""
    columns = list(_SORTED)
    return columns[(columns.index(sort) + (1 if key == ">" else -1)) % len(columns)]


def _draw(stdout: TextIO, rows: list[dict[str, Any]], sort: int, draw: Draw) -> None:
    width, height = os.get_terminal_size(stdout.fileno())
    if not (width and height):  # as of a serial console, which does not know
        width, height = _UNKNOWN
    most = max(1, width - 1)
    cells = [COLUMNS, *map(_cells, rows)]
    kept = fitting(cells, sort, most)
    table = draw(narrowed(cells, kept, most), rows, kept, sort)
    space = max(2, height - 4)
    if len(table) > space:
        hidden = len(table) - space + 1
        table[space - 1 :] = [f"{hidden} more: sort, or make the terminal larger"[:most]]
    shown = [_summary(rows)[:most], "", *table, "", _HELP[:most]]
    text = "\r\n".join(f"{line}\x1b[K" for line in shown[: max(1, height)])
    encoding = stdout.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    stdout.write(f"\x1b[H{text}\x1b[J")
    stdout.flush()


def _summary(rows: list[dict[str, Any]]) -> str:
    iops = sum(row["iops"] for row in rows)
    rate = sum(row["bytes_per_second"] for row in rows) / 1e6
    under_way = sum(row["in_flight"] for row in rows)
    disks = f"{len(rows)} disk{'' if len(rows) == 1 else 's'}"
    return (
        f"{time.strftime('%X')}  {disks}, {iops:.0f} IOPS, {rate:.1f} MB/s, {under_way} in flight"
    )


def _table(rows: list[dict[str, Any]]) -> list[str]:
    return plainly([COLUMNS, *map(_cells, rows)], rows, range(len(COLUMNS)), 0)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = printable(row["domain"] or str(row["domid"]))  # whatever the guest is called
    return (
        shortened(name, _NAME),
        printable(row["vdev"]),
        printable(row["backend"] or "-") if row["alive"] else DEAD,
        f"{row['iops']:.0f}",
        f"{row['bytes_per_second'] / 1e6:.1f}",
        *(_time(row[f"latency_{name}"]) for name in ("p50", "p99", "max")),
        f"{row['queue_depth']:.1f}",
        str(row["in_flight"]),
        str(row["errors"]),
        format_size(row["memory"]),
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
