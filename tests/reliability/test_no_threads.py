"""No thread to be had: what there is does the work, and the log says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reliability.test_cuts import PLAIN
from xen_disk_py.datapath import queue

HERE = Path(__file__).parent


def run(code, *arguments):
    """Run a program, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *code, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(queue.__file__).parents[2]), str(HERE))),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "" == done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _system_that_refuses_threads():
    code = (
        "import threading, no_threads\n"
        "try:\n    no_threads.forbid_threads()\nexcept OSError as error:\n    print(error)\n"
        "else:\n"
        "    try:\n        threading.Thread(target=int).start()\n"
        "    except RuntimeError:\n        print('refused')\n"
        "    else:\n        print('a thread started all the same')\n"
    )
    answer = run(["-c", code]).strip()
    if answer != "refused":
        pytest.skip(f"RLIMIT_NPROC does not help: {answer}")


@pytest.mark.parametrize("order", [0, 4])
def test_a_queue_does_all_requests_itself(order):
    setting = {**PLAIN, "threads": 4, "requests": 60, "order": order}
    (said,) = run([str(HERE / "no_threads.py")], json.dumps(setting)).splitlines()
    assert said.startswith("no thread to be had (can't start new thread): the queue's own")
    assert "ulimit -u" in said
    assert "pids.max" in said


def test_the_threads_that_there_are_do_all_calls():
    code = (
        "import select, threading, no_threads\n"
        "from xen_disk_py.datapath.workers import Workers\n"
        "workers, who = Workers(4, print), set()\n"
        "def call():\n    who.add(threading.current_thread().name)\n    return 7\n"
        "gate = threading.Event()\n"
        "workers.submit(lambda: gate.wait() and 7, 0)\n"
        "no_threads.forbid_threads()\n"
        "for number in range(1, 9):\n    workers.submit(call, number)\n"
        "gate.set()\n"
        "results = []\n"
        "while workers.unfinished:\n    select.select([workers], [], [])\n"
        "    results += workers.collect()\n"
        "print(sorted(results) == [(n, 7) for n in range(9)], who)\n"
        "workers.close()\n"
    )
    said, result = run(["-c", code]).splitlines()
    assert said.startswith("no thread to be had (can't start new thread): 1 will do")
    assert "True {'worker'}" == result


def test_calls_without_any_thread_are_done_by_who_submits_them():
    """And when there is one again, it is used."""
    code = (
        "import os, resource, select, threading, no_threads\n"
        "from xen_disk_py.datapath.workers import Workers\n"
        "workers, who = Workers(2, print), []\n"
        "def call():\n    who.append(threading.current_thread().name)\n    return 7\n"
        "pid = os.getuid()\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NPROC)\n"
        "if not pid:\n    os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (0, most))\n"
        "workers.submit(call, 1)\n"
        "workers.submit(call, 2)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (most, most))\n"
        "workers.submit(call, 3)\n"
        "results = []\n"
        "while workers.unfinished:\n    select.select([workers], [], [])\n"
        "    results += workers.collect()\n"
        "print(results, who)\n"
        "workers.close()\n"
    )
    said, result = run(["-c", code]).splitlines()
    assert said.startswith("no thread to be had")
    assert "[(1, 7), (2, 7), (3, 7)] ['MainThread', 'MainThread', 'worker']" == result
