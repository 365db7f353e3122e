"""What threads have in common: that without a GIL, too, nobody disturbs another."""

import threading

from xen_disk_py.synchronizing import apart


def test_views_that_are_apart_are_of_one_memory():
    memory = bytearray(b"abcd")
    view = memoryview(memory)[1:3]
    views = [apart(view), apart(view)]
    assert [("B", 2, False)] * 2 == [(each.format, len(each), each.readonly) for each in views]
    views[0][1:] = b"x"
    assert b"bx" == views[1] == memory[1:3]
    views.clear()
    del view
    memory.append(0)  # impossible while a view exists


def test_threads_take_parts_of_views_that_are_apart():
    view = memoryview(bytearray(64))
    views = [apart(view) for _ in range(4)]
    failures = []

    def run(mine):
        try:
            for _ in range(50_000):
                assert len(mine[8:16]) == 8
        except ValueError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in views]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == failures
