"""What may be taken: of the host and of control groups, as their files say."""

from __future__ import annotations

import os

import pytest

from xen_disk_py.host.memory import Budget, room

MIB = 1 << 20
MEMINFO = "MemTotal:       {} kB\nMemFree:  5 kB\nMemAvailable:   {} kB\nHugePages_Total:       0\n"
V2 = "24 23 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "24 23 0:22 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"


def reader(total, available, **files):
    meminfo = MEMINFO.format(total >> 10, available >> 10)
    return {"/proc/meminfo": meminfo, **files}


def room_of(files):
    return room(lambda path: files.get(path, ""))


def test_this_host_has_some():
    assert 0 <= room() < 1 << 60


@pytest.mark.parametrize(("total", "left"), [(256, 64), (1024, 128), (4096, 512), (1 << 20, 1024)])
def test_a_part_of_the_hosts_memory_is_left_alone(total, left):
    assert (200 - min(left, 200)) * MIB == room_of(reader(total * MIB, 200 * MIB))
    assert (4000 - left) * MIB == room_of(reader(total * MIB, 4000 * MIB))


def test_without_a_figure_there_is_an_error():
    with pytest.raises(OSError, match="MemAvailable"):
        room_of({})


@pytest.mark.parametrize("name", ["max", "high"])
@pytest.mark.parametrize("path", ["/dom0.slice/x.service", "/dom0.slice"])
def test_a_control_group_and_those_it_is_in_count(name, path):
    files = reader(64 << 30, 32 << 30)
    files |= {
        "/proc/self/cgroup": "0::/dom0.slice/x.service\n",
        "/proc/self/mountinfo": V2,
        f"/sys/fs/cgroup{path}/memory.{name}": f"{256 * MIB}\n",
        f"/sys/fs/cgroup{path}/memory.current": f"{100 * MIB}\n",
        f"/sys/fs/cgroup{path}/memory.stat": f"inactive_file {20 * MIB}\nactive_file {MIB}\nx 1\n",
    }
    assert (256 - 100 + 21 - 32) * MIB == room_of(files)


def test_a_group_without_a_limit_does_not_count():
    files = reader(64 << 30, 32 << 30)
    files |= {
        "/proc/self/cgroup": "0::/\n",
        "/proc/self/mountinfo": V2,
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": f"{100 * MIB}\n",
    }
    assert 31 << 30 == room_of(files)


def test_an_older_hierarchy_counts():
    files = reader(64 << 30, 32 << 30)
    home = "/sys/fs/cgroup/memory/xen"
    files |= {
        "/proc/self/cgroup": "4:memory:/xen\n1:cpu:/other\n0::/\n",
        "/proc/self/mountinfo": V1 + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
        f"{home}/memory.limit_in_bytes": f"{128 * MIB}\n",
        f"{home}/memory.usage_in_bytes": f"{60 * MIB}\n",
        f"{home}/memory.stat": f"total_inactive_file {10 * MIB}\ntotal_active_file 0\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{33 << 30}\n",
    }
    assert (128 - 60 + 10 - 16) * MIB == room_of(files)


def test_the_group_of_a_container_is_found_below_its_mount():
    files = reader(64 << 30, 32 << 30)
    files |= {
        "/proc/self/cgroup": "0::/docker/1234/inner\n",
        "/proc/self/mountinfo": V2.replace(" / ", " /docker/1234 "),
        "/sys/fs/cgroup/inner/memory.max": f"{128 * MIB}\n",
        "/sys/fs/cgroup/inner/memory.current": f"{60 * MIB}\n",
    }
    assert (128 - 60 - 16) * MIB == room_of(files)


def test_what_is_full_has_no_room():
    assert 0 == room_of(reader(1 << 30, 1 << 20))


def test_a_budget_asks_before_each_step():
    left = [10 * MIB]
    asked = []

    def ask():
        asked.append(left[0])
        return left[0]

    budget = Budget(ask)
    taken = 0
    while budget.take(4096):
        taken += 4096
        left[0] -= 4096
    assert 10 * MIB == taken
    assert len(asked) < taken // 4096 // 10
    assert not budget.take(4096)
    left[0] = 4096
    assert budget.take(4096)


def test_many_that_take_at_once_stay_within_the_bound():
    """Sixty of them, each a step ahead of what the others see."""
    left = [64 * MIB]
    budgets = [Budget(lambda: left[0]) for _ in range(60)]
    taken = 0
    while True:
        done = [budget.take(4096) for budget in budgets]
        taken += 4096 * sum(done)
        left[0] = 64 * MIB - taken
        if not any(done):
            break
    assert 63 * MIB < taken < 64 * MIB + 60 * (64 << 10)


def test_a_file_that_cannot_be_read_is_empty(monkeypatch):
    if not os.path.exists("/proc/meminfo"):
        pytest.skip("no /proc")
    with pytest.raises(OSError, match="MemAvailable"):
        room(lambda path: "")
