"""What the benchmarks measure with and how they compare, not how fast anything is."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, thread_time
from types import SimpleNamespace

import pytest

from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.errors import BackendError, DeviceError

sys.path.append(str(Path(__file__).parents[1]))  # last: the package is tested where it is installed

from benchmarks import bare, local, loop, report, workload
from benchmarks.bare import scattered_system_call, slice_copy, system_call
from benchmarks.results import BYTES, CPU, RATE, Results
from benchmarks.workload import SLOTS, Load, send


@pytest.fixture
def load(host):
    def connect(backend):
        serving = host.serving(backend)
        load = Load(host.open_store(host.DOMID), host.guest, serving.address.frontend, pages=16)
        load._timeout = host.PATIENCE
        host._frontends.append(load)
        load.connect()
        return load

    return connect


@pytest.fixture
def until_answered(monkeypatch):
    """Have a second of sending be 1000 requests of this load, whatever that takes."""

    def install(load):
        clock = SimpleNamespace(perf_counter=lambda: load.answered / 1000, monotonic=monotonic)
        monkeypatch.setattr(workload, "time", clock)

    return install


@pytest.mark.parametrize("depth", [1, 2, 3, SLOTS])
@pytest.mark.parametrize("size", [4096, 65536])
def test_a_load_sends_what_was_laid_out_in_that_order(host, load, until_answered, size, depth):
    backend = host.memory(1 << 20)
    offsets = [place * 65536 for place in (3, 1, 4, 15, 9)]
    sender = load(backend)
    sender.prepare(READ, size, depth, offsets)
    until_answered(sender)
    requests, seconds = send([sender], 0.6)
    assert requests == len(backend.calls) == 1000 * seconds
    assert 600 <= requests < 600 + 2 * SLOTS
    laps = 256  # laid out, then from the start again
    expected = [("read", offsets[i % laps % 5], size) for i in range(requests)]
    assert expected == backend.calls


def test_a_load_goes_to_as_many_places_as_it_is_told(host, load, until_answered):
    backend = host.memory(1 << 20)
    offsets = [(7 * place % 256) * 4096 for place in range(256)] + [0] * 70
    sender = load(backend)
    sender.prepare(READ, 4096, SLOTS, offsets)
    until_answered(sender)
    send([sender], 0.4)
    assert offsets == [offset for _, offset, _ in backend.calls[: len(offsets)]]


def test_a_load_can_be_prepared_again(host, load, until_answered):
    backend = host.memory(1 << 20)
    sender = load(backend)
    until_answered(sender)
    for operation, depth in ((READ, SLOTS), (WRITE, 1), (READ, 4)):
        sender.prepare(operation, 4096, depth, [0, 4096], scatter=True)
        del backend.calls[:]
        requests, _ = send([sender], 0.05)
        assert [("write" if operation == WRITE else "read")] * requests == [
            call[0] for call in backend.calls
        ]
        assert requests > 1


def test_a_load_notices_an_error(host, load, until_answered):
    sender = load(host.memory(1 << 20))
    until_answered(sender)
    sender.prepare(READ, 4096, 8, [0, 0, 0, 1 << 20])
    with pytest.raises(DeviceError):
        send([sender], 5)


@pytest.mark.parametrize("kind", [system_call, scattered_system_call, slice_copy])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_a_bare_loop_counts_its_calls(tmp_path, monkeypatch, kind, operation):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__, thread_time=thread_time)
    monkeypatch.setattr(bare, "time", clock)
    path = tmp_path / "image"
    path.write_bytes(b"x" * 65536)
    sample = kind(str(path), operation, 8192, [0, 8192, 32768])(3)
    assert 0 == sample.requests % 3
    assert sample.requests > 0
    assert 4 == sample.seconds  # and looks at the clock, after the first
    written = path.read_bytes()
    assert 65536 == len(written)
    assert (operation == WRITE) == (b"\0" * 8192 == written[32768:40960])


def test_a_ratio_is_made_within_each_round(tmp_path):
    results = Results({"command": "x"})
    for ours, theirs in ((10, 10), (300, 100), (8, 4)):
        results.add("t", "w", "ours", rate=ours)
        results.add("t", "w", "theirs", rate=theirs)
    results.save(tmp_path / "r.json")
    loaded = Results.load(tmp_path / "r.json")
    assert (2, 1, 3) == loaded.ratio("t", "w", "rate", "ours", "theirs")
    assert loaded.ratio("t", "w", "rate", "ours", "nobody") is None


def test_contenders_take_turns_in_any_order_and_are_shown_in_one(tmp_path):
    results, done = Results({"command": "x"}), []

    def loop(name):
        return lambda seconds: done.append(name) or workload.Sample(1, 1, 1)

    bench = local.Bench(results, tmp_path, 1, 20)
    bench.interleave("t", "w", 1, {name: loop(name) for name in "abc"})
    assert ["a", "b", "c"] == list(results.tables["t"]["w"])
    turns = [tuple(done[at : at + 3]) for at in range(0, len(done), 3)]
    assert 21 == len(turns)
    assert {"a", "b", "c"} == {turn[0] for turn in turns}
    assert all({"a", "b", "c"} == set(turn) for turn in turns)


MARKS = ("goals", "goals in full", "local", "lab", "calls")


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "benchmarks-page.md"
    marks = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in MARKS)
    path.write_text(f"# Page\n{marks}The end\n")
    return path


def test_a_report_fills_the_document(tmp_path, document):
    local, lab = Results({"command": "local one"}), Results({"command": "lab one"})
    for cpu in (5, 3, 2):
        for name, factor in (("bare call", 1), ("raw", cpu)):
            local.add("requests", "4 KiB read, depth 32", name, **{RATE: 1, BYTES: 1, CPU: factor})
    for name, rate in (("raw", 300), ("blkback", 100), ("qdisk", 200)):
        lab.add("xen-pv-1-dom0-2", "4 KiB random read, depth 32", name, **{RATE: rate})
    single = Results({"command": "calls"})
    single.add("calls", "getppid", "one call", seconds=0.00000125)
    files = []
    for name, results in (("local", local), ("lab", lab), ("calls", single)):
        files.append(str(tmp_path / f"{name}.json"))
        results.save(files[-1])
    assert 0 == report.main([*files, "--directory", str(document.parent)])
    text = document.read_text()
    assert "old" not in text
    assert text.endswith("The end\n")
    assert "local one" in text
    assert "lab one" in text
    assert "| getppid | 1.25 |" in text
    cells = [line.split(" | ") for line in text.splitlines() if line.count(" | ") > 3]
    rows = {row[0][2:]: row[3].strip() for row in cells}
    text = "the same within 1 MiB, which the bare call has in its processor's own cache"
    assert "yes" == rows[text]
    assert "yes" == rows["Xen, PV, 2 processors for dom0: 4 KiB, 32 in flight, of blkback's rate"]
    assert "yes" == rows["Xen, any guest, smaller requests: of qdisk's rate"]
    assert "" == rows["--help, seconds"]
    plot = (tmp_path / "benchmarks-xen-pv-1-dom0-2.svg").read_text()
    assert 2 == plot.count("<circle")
    assert "4 KiB random read, depth 32" in plot


def test_what_is_measured_with_goes_when_a_benchmark_is_told_to_end():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), workload.terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert before == signal.getsignal(signal.SIGTERM)


_FLEET = """
import os, sys, time
from benchmarks import fleet
def idle(pids, seconds):
    os.write(int(sys.argv[2]), " ".join(map(str, pids)).encode())
    time.sleep(1000)
fleet._idle = idle
fleet.fleet(2, sys.argv[1], forks=True)
"""


def test_a_fleet_ends_with_a_benchmark_that_is_killed(tmp_path):
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(1 << 20))
    told, tell = os.pipe()  # its own: the disks write to the standard output, too
    command = [sys.executable, "-c", _FLEET, str(image), str(tell)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, cwd=root, pass_fds=[tell]
    ) as benchmark:
        os.close(tell)
        pids = os.read(told, 100).split()
        handles = [os.pidfd_open(int(pid)) for pid in pids]
        benchmark.kill()
    os.close(told)
    assert 3 == len(handles)  # two disks, and what forks them
    for handle in handles:
        assert select.select([handle], [], [], 30)[0]
        os.close(handle)


def test_a_goal_is_found_again_by_its_words():
    texts = [goal.text for goal in report.GOALS]
    assert len({*texts}) == len(texts)


def test_every_table_of_the_loop_has_its_view():
    assert {loop.TABLE, loop.TIMING} <= {*report.LOCAL}


def test_goals_are_shown_next_to_what_was_before():
    results = Results({"command": "x"})
    for name, cpu in (("bare call", 1), ("raw", 2), ("raw, before", 4)):
        results.add("all over", "4 KiB read, depth 32", name, **{RATE: 1, BYTES: 1, CPU: cpu})
    found = report.goals([results], report.GOALS[:1], shown=1).splitlines()
    assert "| goal | wanted | measured | | before |" == found[0]
    assert found[2].endswith("4 KiB read, depth 32: 2 (2 to 2) | yes | 4 |")


def test_a_report_leaves_what_was_not_measured_again(tmp_path, document):
    lab = Results({"command": "lab one"})
    lab.add("xen-pv", "w", "raw", **{RATE: 1})
    lab.add("xen-pv", "w", "blkback", **{RATE: 1})
    lab.save(tmp_path / "lab.json")
    report.main([str(tmp_path / "lab.json"), "--directory", str(document.parent)])
    for mark in ("local", "calls"):
        assert f"<!-- {mark} -->\nold\n" in document.read_text()


def test_a_report_writes_only_what_it_is_told_to(tmp_path, document):
    local = Results({"command": "local one"})
    local.add("idle", "raw", "connect", wakeups_per_second=0, resident_bytes=27e6)
    local.save(tmp_path / "local.json")
    file = str(tmp_path / "local.json")
    report.main([file, "--directory", str(document.parent), "--only", "goals"])
    text = document.read_text()
    assert 4 == text.count("old")
    assert "| idle: resident memory, MB | ≤ 30 | raw: 27 (27 to 27) | yes |  |\n" in text


def test_a_report_leaves_a_goal_that_was_not_measured_again(tmp_path, document):
    for resident in (27e6, None):
        run = Results({"command": "local one"})
        if resident:
            run.add("idle", "raw", "connect", resident_bytes=resident)
        run.add("start", "connect", "wall", seconds=0.25 if resident else 0.75)
        run.save(tmp_path / "local.json")
        report.main([str(tmp_path / "local.json"), "--directory", str(tmp_path)])
    text = document.read_text()
    assert 2 == text.count("| idle: resident memory, MB | ≤ 30 | raw: 27 (27 to 27) | yes |  |\n")
    assert 2 == text.count("seconds | ≤ 0.5 | connect: 0.75 (0.75 to 0.75) | no |  |\n")


def test_a_report_needs_a_place_for_what_it_writes(tmp_path, document, capsys):
    document.write_text("# Page\n")
    Results({"command": "local one"}).save(tmp_path / "local.json")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "local.json"), "--directory", str(tmp_path)])
    assert "has a place for goals\n" in capsys.readouterr().err


def test_a_queue_is_measured_in_its_own_thread(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(loop.SIZE))
    results = Results({"command": "x"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(BackendError))
        lane = loop.Lane(stack, RawBackend(str(path)))
        loop.measure(results, {"raw": lane}, str(path), 2 * loop.ROUNDS)
        python, c = lane.calls(READ)
    assert {"raw", "bare call"} == set(results.tables["loop"]["4 KiB write, 1 at once"])
    assert loop.ROUNDS == len(results.values("loop", "4 KiB read, 32 at once", "raw", CPU))
    assert 16 == c["preadv"] == python["read_nowait"]


def test_what_goes_wrong_is_not_hidden_by_the_disk_that_is_still_there():
    with pytest.raises(ZeroDivisionError), workload.served("--size=1M", "--backend=discard"):
        raise ZeroDivisionError
