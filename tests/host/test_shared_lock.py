"""A lock between threads and forks."""

from __future__ import annotations

import os
import signal
import threading

from xen_disk_py.host.shared_lock import SharedLock


def holding(lock):
    """Fork a process that has the lock until it is killed; its id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with lock:
            os.write(writer, b"x")
            signal.pause()
        os._exit(1)
    assert b"x" == os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return pid


def test_a_fork_has_it_until_it_ends():
    lock = SharedLock()
    pid = holding(lock)
    got = threading.Event()

    def take():
        with lock:
            got.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not got.wait(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert got.wait(30)
    thread.join()


def test_one_thread_has_it_at_a_time():
    lock = SharedLock()
    inside, most = [], []

    def work():
        for _ in range(200):
            with lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {1} == set(most)
    assert 800 == len(most)
