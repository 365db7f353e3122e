"""One cluster for all tests, and images in it."""

from __future__ import annotations

import itertools

import pytest

from ceph.cluster import Cluster, missing

MIB = 1 << 20


def pytest_collection_modifyitems(items):
    reason = missing()
    for item in items:
        if item.path.parent.name == "ceph":
            item.add_marker(pytest.mark.ceph)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("ceph"))
    yield made
    made.close()


@pytest.fixture
def image(cluster, names=itertools.count()):  # noqa: B008 - one count for all
    """A new image of 16 MiB: its name below the pool."""
    name = f"disk{next(names)}"
    cluster.rbd("create", "-s", "16M", f"rbd/{name}")
    return name
