"""``metrics``: what all disks of this host have done, for Prometheus."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import Any, cast

from ..backends.image import transfer_all
from ..backends.newfile import NewFile
from ..datapath.latency import PER_SECOND, SERIES
from ..errors import UsageError, XenDiskError, XenUnavailable
from ..exit_status import ExitStatus
from ..recovery import survey
from ..recovery.survey import Seen
from ..text import printable
from .environment import Environment
from .signals import interruptible

LABELS = ("domain", "domid", "vdev", "backend")
"""``domid`` keeps a guest apart from the one of that name before, whose record is still there."""
_COUNTERS = {  # the counter's name without _total: whence it comes, what it says
    "requests": ("requests", "Requests answered, of any kind and with any status."),
    "reads": ("reads", "Reads."),
    "writes": ("writes", "Writes; a flush with data is one, too."),
    "flushes": ("flushes", "Flushes and barriers."),
    "discards": ("discards", "Discards."),
    "read_bytes": ("bytes_read", "Bytes read."),
    "written_bytes": ("bytes_written", "Bytes written."),
    "discarded_bytes": ("bytes_discarded", "Bytes discarded."),
    "errors": ("errors", "Requests that the storage has failed at."),
    "refused_requests": ("refused", "Requests that were refused, as they break the protocol."),
    "wakeups": ("wakeups", "Times that the process was woken by the guest."),
}
_GAUGES = {
    "in_flight_requests": ("in_flight", "Requests under way."),
    "retry_queued_requests": ("held", "Requests queued for retry."),
    "memory_bytes": ("memory", "Memory that the guest's changes take (cow)."),
}
_OF_A_PROCESS = {"in_flight", "held", "memory"}  # which are gone with it
EDGES = tuple(1 << power for power in range(4, 26))
"""Upper edges of the histogram, in units: 4 µs to 8.4 s."""
_BEGINNING = b"# HELP xen_disk_"
_LATENCY = "request_duration_seconds"
_CONTENT = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE = 10.0  # seconds that a client may take for each piece of its request
CLIENTS = 16
"""Connections at once; others are closed."""


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print the metrics, write them to a file, or serve them until a signal."""
    try:
        import prometheus_client  # noqa: F401 - whether it is there
    except ImportError as error:
        raise XenUnavailable(
            f"metrics needs prometheus_client ({error}): pip install prometheus_client"
        ) from error
    if args.listen is not None:
        _serve(args.listen, env)
        return ExitStatus.OK
    text = render(survey.look(env.record_directory))
    if args.output is None:
        env.say(text.rstrip("\n"))
    else:
        with interruptible():
            write(args.output, text)
    return ExitStatus.OK


def render(disks: Iterable[Seen]) -> str:
    """Return the metrics of disks in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(cast(Any, _Collector(disks)))
    return generate_latest(registry).decode()


class _Collector:
    """What :func:`render` hands to the library.

    Two records with the same labels would make all of them invalid: of such, one that is served.
    """

    def __init__(self, disks: Iterable[Seen]) -> None:
        self._disks: dict[tuple[str, ...], Seen] = {}
        for seen in disks:
            labels = _labels(seen)
            if labels not in self._disks or seen.alive:
                self._disks[labels] = seen

    def collect(self) -> Iterator[Any]:
        """Make the families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def gauge(name: str, text: str, values: Mapping[tuple[str, ...], float]) -> Any:
            family = GaugeMetricFamily(f"xen_disk_{name}", text, labels=LABELS)
            for labels, value in values.items():
                family.add_metric(labels, value)
            return family

        disks = self._disks
        yield gauge(
            "up",
            "Whether the process that serves the disk lives.",
            {labels: seen.alive for labels, seen in disks.items()},
        )
        yield gauge(
            "size_bytes",
            "Size of the disk.",
            {labels: seen.facts.size for labels, seen in disks.items()},
        )
        for name, (counter, text) in _GAUGES.items():
            yield gauge(
                name,
                text,
                {
                    labels: seen.counters[counter]
                    if seen.alive or counter not in _OF_A_PROCESS
                    else 0
                    for labels, seen in disks.items()
                },
            )
        for name, (counter, text) in _COUNTERS.items():
            family = CounterMetricFamily(f"xen_disk_{name}", text, labels=LABELS)
            for labels, seen in disks.items():
                family.add_metric(labels, seen.counters[counter])
            yield family
        yield self._latencies()

    def _latencies(self) -> Any:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(
            f"xen_disk_{_LATENCY}",
            "Time from when a request was taken off the ring until its answer was published, by "
            "operation and size; of those that were timed.",
            labels=(*LABELS, "operation", "size"),
        )
        for labels, seen in self._disks.items():
            for series, latency in zip(SERIES, seen.latencies):
                if not latency.count:
                    continue  # twelve series a disk, most of them empty
                buckets = [
                    (repr(edge / PER_SECOND), count)
                    for edge, count in zip(EDGES, latency.up_to(EDGES))
                ]
                buckets.append(("+Inf", latency.count))
                family.add_metric(
                    (*labels, series.operation, series.size),
                    cast(Any, buckets),
                    sum_value=latency.seconds,
                )
        return family


def _labels(seen: Seen) -> tuple[str, ...]:
    facts = seen.facts
    # A line end in a guest's name is the library's to escape; this is for what is not UTF-8.
    return (
        printable(facts.domain),
        str(facts.domid),
        printable(facts.vdev),
        printable(facts.backend or ""),
    )


def write(path: str, text: str) -> None:
    """Replace a file at once, so that whoever reads it finds the old text or the new one.

    Raises:
        UsageError: something else than a file of metrics is there.
        XenDiskError: it cannot be written; the old one is still there.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise UsageError(f"-o {path}: not a regular file: give a file, or leave out -o")
            with open(path, "rb") as there:
                if there.read(len(_BEGINNING)) not in (b"", _BEGINNING):
                    raise UsageError(f"-o {path}: has something else: give another name")
        # The name that it has for a moment does not end in .prom: node_exporter does not read it.
        with NewFile(path) as file:
            transfer_all(os.pwritev, file.fd, [memoryview(text.encode())], 0)
            os.fchmod(file.fd, 0o644)  # node_exporter is not root
            os.fsync(file.fd)
            file.put(path, replacing=True)
    except OSError as error:
        raise XenDiskError(f"cannot write {path}: {error.strerror}") from error


def _serve(where: tuple[str, int], env: Environment) -> None:
    host, port = where
    directory = env.record_directory
    survey.look(directory)  # what would fail each time fails now

    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/metrics", "/"):
                self.send_error(404)
                return
            try:
                status, body = 200, render(survey.look(directory))
            except XenDiskError as error:
                status, body = 500, f"{error}\n"
            data = body.encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", _CONTENT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            """Say nothing: somebody asks every few seconds."""

    room = threading.BoundedSemaphore(CLIENTS)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = CLIENTS  # of which the kernel knows before we do
        address_family = AF_INET6 if ":" in host else ThreadingHTTPServer.address_family

        def process_request(self, request: Any, client_address: Any) -> None:
            if not room.acquire(blocking=False):
                self.shutdown_request(request)
                return
            try:
                super().process_request(request, client_address)
            except Exception:  # no thread is to be had
                room.release()
                raise

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                room.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Nothing: a client that went away is its own affair."""

    with interruptible():
        try:
            server = Server((host, port), Handler)
        except OSError as error:
            raise XenDiskError(f"cannot listen on {_shown(where)}: {error.strerror}") from error
        with server:
            env.tell(f"serving http://{_shown(server.server_address)}/metrics")
            with contextlib.suppress(KeyboardInterrupt):  # the way to end it
                server.serve_forever()


def _shown(address: Sequence[Any]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
