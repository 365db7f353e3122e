"""What is written for a successor, and read by one of this or another version."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.errors import DeviceError, UsageError
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.role import Role
from xen_disk_py.recovery.spec import VERSION, DiskSpec

# What JSON has to escape, and a name that is not UTF-8; st.text() of all of Unicode builds a table
# of it first, for a second.
LETTERS = st.text('az09 =,"\\/\n\0éÄ€𝄞\udcff', max_size=9)
TEXT = st.none() | LETTERS
SPECS = st.builds(
    DiskSpec._replace,  # the other fields have their defaults
    st.just(DiskSpec()),
    backend=TEXT,
    path=TEXT,
    overlay=TEXT,
    is_temporary=st.booleans(),
    size=st.none() | st.integers(0, 1 << 50),
    options=st.lists(LETTERS, max_size=3).map(tuple),
    timeout=st.floats(0, 1e6),
    user=TEXT,
)


@given(SPECS)
def test_a_successor_reads_what_was_written(spec):
    facts = Facts(disk=spec.plain(), survives=True, not_upgraded=(1.0, "no"), pause=1)
    read = Facts.parse(facts.encode())
    assert spec == read.spec
    assert facts._replace(disk=None) == read._replace(disk=None)


def test_what_an_older_version_did_not_know_has_its_default():
    plain = DiskSpec(path="/a", filters=("delay",)).plain()
    del plain["filters"]
    assert DiskSpec(path="/a") == DiskSpec.parse(plain)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"encryption": "luks"}, "encryption"),
        ({"queues": "two"}, "queues"),
        ({"read_only": 1}, "read_only"),
        ({"queues": True}, "queues"),
        ({"version": VERSION + 1}, "version"),
    ],
)
def test_what_this_version_does_not_know_is_refused(changed, named):
    with pytest.raises(DeviceError, match=rf"terms unknown here \({named}\): use that version"):
        DiskSpec.parse({**DiskSpec().plain(), **changed})


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"7", b"{", b"\xff", b"[" * 100_000])
def test_no_facts(text):
    assert Facts.parse(text) is None


@pytest.mark.parametrize("changed", [{"format": 1}, {"pid": "x"}, {"new": 1}, {"disk": 7}])
def test_facts_of_another_version_are_shown_and_not_taken_over(changed):
    data = {**json.loads(Facts(path="/a", disk={}).encode()), **changed}
    facts = Facts.parse(json.dumps(data).encode())
    assert ("/a", None) == (facts.path, facts.temporary)
    with pytest.raises(DeviceError, match="is of xen-disk of another version: use that version"):
        _ = facts.spec


@given(st.builds(Role, st.booleans(), st.booleans(), st.booleans(), TEXT))
def test_a_role_is_passed_on(role):
    words = role.words()
    assert role == (Role.parse(words[1]) if words else Role())


@pytest.mark.parametrize("text", ["", "7", "[]", "{", '{"leaves": 1}', '{"flies": true}'])
def test_a_role_that_makes_no_sense(text):
    with pytest.raises(UsageError, match="--role"):
        Role.parse(text)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"queues": 1}, "for several queues: add --queues 2"),
        ({"filters": ("delay",)}, "leave out --filter"),
        ({"retries": True}, "--on-error hold"),
        ({"backend": "cow"}, "use --backend raw or mmap"),
        ({"backend": None}, "use --backend raw or mmap"),
        ({"backend": "{}/mine.py", "options": ()}, "use --backend raw or mmap"),
    ],
)
def test_what_only_one_process_can_do_is_refused_with_queues_in_processes(
    tmp_path, changed, reason
):
    """A disk of a user's own, too, though it is made of one of ours."""
    (tmp_path / "mine.py").write_text(
        "from xen_disk_py.backends.raw import RawBackend\nclass Disk(RawBackend): pass\n"
    )
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    spec = DiskSpec(backend="raw", path=str(image), queues=2, queues_in="processes")
    spec.open_disk().close()
    for name, value in changed.items():
        spec = spec._replace(**{name: value.format(tmp_path) if value == str(value) else value})
    with pytest.raises(UsageError, match=rf"^--queues-in processes.*{reason}"):
        spec.open_disk()
    RawBackend(str(image)).close()  # it is not locked any more
