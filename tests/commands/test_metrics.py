"""``metrics``: what Prometheus reads, its own tools' opinion of it, and how it gets there."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from xen_disk_py.cli import main
from xen_disk_py.commands import metrics
from xen_disk_py.datapath.latency import SERIES, Latency, bucket_of
from xen_disk_py.datapath.statistics import _COUNTERS
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.survey import Seen

pytest.importorskip("prometheus_client", reason="no prometheus_client here (extra: metrics)")

DASHBOARD = Path(__file__).parents[2] / "examples/grafana.json"
PROMTOOL = shutil.which("promtool")
ALL = {"domain": "guest", "domid": "5", "vdev": "xvdb", "backend": "raw"}


def seen(units=(), alive=True, **more):
    counters = {name: 100 + number for number, name in enumerate(_COUNTERS)}
    counts = [0] * 500
    for each in units:
        counts[bucket_of(each)] += 1
    latencies = [Latency() for _ in SERIES]
    latencies[0] = Latency(counts, sum(units) * 250)
    facts = {"domid": 5, "domain": "guest", "vdev": "xvdb", "number": 51728, "backend": "raw"}
    return Seen(Facts(**{**facts, "size": 4096, **more}), counters, latencies, alive)


def samples(*disks):
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render(disks))
        for sample in family.samples
    }


def value(found, name, **labels):
    return found[f"xen_disk_{name}", tuple(sorted({**ALL, **labels}.items()))]


def test_counters_are_those_of_the_record():
    disk = seen()
    found = samples(disk)
    for name, (counter, _) in metrics._COUNTERS.items():
        assert disk.counters[counter] == value(found, f"{name}_total")
    for name, (gauge, _) in metrics._GAUGES.items():
        assert disk.counters[gauge] == value(found, name)
    assert (1, 4096) == (value(found, "up"), value(found, "size_bytes"))


def test_every_counter_is_exported():
    exported = {name for name, _ in (*metrics._COUNTERS.values(), *metrics._GAUGES.values())}
    assert set(_COUNTERS) == exported


def test_the_histogram_is_exact_at_its_edges():
    """16 units are 4 µs: what took 15 is below that edge, and what took 16 is not."""
    found = samples(seen([15, 16, 31, 32]))
    of = {"operation": "read", "size": "4K"}
    name = "request_duration_seconds"
    for edge, count in (("4e-06", 1), ("8e-06", 3), ("1.6e-05", 4), ("+Inf", 4)):
        assert count == value(found, f"{name}_bucket", le=edge, **of)
    assert 4 == value(found, f"{name}_count", **of)
    assert (15 + 16 + 31 + 32) / 4e6 == pytest.approx(value(found, f"{name}_sum", **of))


def test_what_was_never_requested_has_no_histogram():
    assert not [name for name, _ in samples(seen()) if "duration" in name]


def test_of_a_process_that_died_nothing_is_under_way():
    found = samples(seen(alive=False))
    assert 0 == value(found, "up") == value(found, "in_flight_requests")
    assert 100 == value(found, "requests_total")


def test_guests_of_one_name_are_apart():
    found = samples(seen(), seen(domid=6))
    assert 1 == value(found, "up") == value(found, "up", domid="6")


def test_of_two_records_of_one_disk_the_served_one_counts():
    for pair in ((seen(), seen(alive=False)), (seen(alive=False), seen())):
        assert 1 == value(samples(*pair), "up")


@pytest.mark.parametrize("name", ['a"} 1\nxen_disk_up 7\n', "\udc80\x1b[2J", "a\\", "é\u202e"])
def test_a_guests_name_is_a_label_and_nothing_else(name):
    found = samples(seen(domain=name))
    assert set(samples(seen())) != set(found)
    assert len(samples(seen())) == len(found)
    assert all(line.startswith(("#", "xen_disk_")) for line in metrics.render([]).splitlines())
    assert metrics.render([seen(domain=name)]).isascii() or "é" in name


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: prometheus)")
def test_promtool_finds_nothing():
    text = metrics.render([seen([15, 4000]), seen(domid=6, alive=False)])
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (0, "", "") == (checked.returncode, checked.stdout, checked.stderr)


def test_the_dashboard_asks_for_what_there_is():
    names = {name for name, _ in samples(seen([15]))}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [
        each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"
    ]
    asked = [set(re.findall(r"\bxen_disk_\w+", query)) for query in queries]
    assert len(asked) > 5
    assert [] == [each for each in asked if not each or not each <= names]


OLD = "# HELP xen_disk_up as it was\n"


@pytest.fixture
def run(host):
    def run(*argv):
        env = host.environment()
        status = main(["metrics", *map(str, argv)], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return run


def test_on_stdout(run):
    status, out, _ = run()
    assert (ExitStatus.OK, metrics.render([])) == (status, out)


def test_a_file_is_replaced_at_once(run, tmp_path, monkeypatch):
    path = tmp_path / "xen-disk.prom"
    path.write_text(OLD)
    seen_then, replace = [], os.rename

    def look(source, target):
        seen_then.append((path.read_text(), [p.name for p in tmp_path.glob("*.prom")]))
        assert metrics.render([]) == Path(source).read_text()
        replace(source, target)

    monkeypatch.setattr(metrics.os, "rename", look)
    assert ExitStatus.OK == run("-o", path)[0]
    assert [(OLD, ["xen-disk.prom"])] == seen_then
    assert (metrics.render([]), 0o644) == (path.read_text(), path.stat().st_mode & 0o777)
    assert [path] == list(tmp_path.iterdir())


def test_a_file_has_the_name_that_is_given(run, tmp_path):
    path = tmp_path / ("a  name of two spaces " * 5 + ".prom")
    assert ExitStatus.OK == run("-o", path)[0]
    assert [path.name] == os.listdir(tmp_path)
    assert ExitStatus.USAGE == run("-o", "")[0]


def test_what_was_left_by_one_that_was_killed_is_removed(run, tmp_path, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "rename", killed)
        patch.setattr(metrics.os, "unlink", lambda _: None)  # it had no time to clean up
        run("-o", tmp_path / "xen-disk.prom")
    assert 1 == len(list(tmp_path.iterdir()))
    assert ExitStatus.OK == run("-o", tmp_path / "xen-disk.prom")[0]
    assert ["xen-disk.prom"] == os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_is_as_it_was(run, tmp_path, monkeypatch):
    path = tmp_path / "xen-disk.prom"
    path.write_text(OLD)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    status, _, err = run("-o", path)
    assert ExitStatus.ERROR == status
    assert "No space left on device" in err
    assert (OLD, [path]) == (path.read_text(), list(tmp_path.iterdir()))


def test_what_has_something_else_is_not_replaced(run, tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    status, _, err = run("-o", path)
    assert (ExitStatus.USAGE, bytes(4096)) == (status, path.read_bytes())
    assert "has something else: give another name" in err


def test_what_is_no_file_is_not_replaced(run, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert ExitStatus.USAGE == run("-o", path)[0]
    assert path.is_fifo()


def listening(host, act, signum=signal.SIGINT):
    """Have ``metrics`` listen while a thread acts, which is given the address; then end it."""
    env, errors = host.environment(), []

    def play():
        try:
            host.until(lambda: re.search(r"http://\S+\n", env.stderr.getvalue()))
            act(re.search(r"http://\S+", env.stderr.getvalue())[0])
        except BaseException as error:
            errors.append(error)
        finally:
            os.kill(os.getpid(), signum)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        return main(["metrics", "--listen", "0"], env)
    finally:
        thread.join()
        assert not errors, errors


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_listens_until_a_signal(host, signum):
    def ask(url):
        assert url.startswith("http://127.0.0.1:")
        kind, text = get(url)
        assert (metrics.render([]), True) == (text, kind.startswith("text/plain; version=0.0.4"))
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(url + "/x")
        caught.value.close()

    assert ExitStatus.OK == listening(host, ask, signum)


def test_clients_that_say_nothing_are_so_many_at_most(host, monkeypatch):
    """One more is turned away at once; when one has gone, there is room again."""
    monkeypatch.setattr(metrics, "_PATIENCE", 600.0)

    def ask(url):
        port = urllib.parse.urlsplit(url).port
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(metrics.CLIENTS)]
        try:
            with pytest.raises(OSError, match=r"closed|reset"):
                get(url)
            silent.pop().close()
            host.until(lambda: is_answered(url))
        finally:
            for each in silent:
                each.close()

    def is_answered(url):
        try:
            return metrics.render([]) == get(url)[1]
        except OSError:
            return False

    assert ExitStatus.OK == listening(host, ask)


def test_an_address_in_use(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, _, err = run("--listen", f"127.0.0.1:{port}")
    assert ExitStatus.ERROR == status
    assert f"cannot listen on 127.0.0.1:{port}" in err


@pytest.mark.parametrize("address", ["x", "1:70000", "1:-1", ""])
def test_an_address_that_is_none(run, address):
    assert ExitStatus.USAGE == run("--listen", address)[0]


def test_without_prometheus_client_it_says_what_to_do(run, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("prometheus_client"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    status, _, err = run()
    assert ExitStatus.ERROR == status
    assert "pip install prometheus_client" in " ".join(err.split())
