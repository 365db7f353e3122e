"""What a toolstack does, against a xenstored in memory and as the guest sees it."""

from __future__ import annotations

import contextlib
import errno
import io
import random
import select
import time

import pytest

from xen_disk_py.errors import DeviceError, DeviceTaken, GuestNotFound, StoreError
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus import toolstack, xenstore
from xen_disk_py.xenbus.states import Address, State
from xen_disk_py.xenbus.toolstack import (
    Attached,
    Domain,
    attach,
    attached,
    can_xl_detach,
    choose_kind,
    detach,
    domains,
    find_domain,
    free_device,
    own_domid,
    taken,
    xen_version,
)
from xen_disk_py.xenbus.vdev import from_number, parse
from xen_disk_py.xenbus.xenstore import Store

GUEST, OTHER = 5, 7
UUID = "11111111-2222-3333-4444-{:012d}"
XVDB = Address(0, GUEST, 51728, "vbd3")
KEYS = {"state": "2", "sectors": "2048", "feature-flush-cache": "1"}


@pytest.fixture
def server():
    """Run a xenstored with two guests, and what libxl makes for each."""
    with SimulatedXenstored() as running:
        with Store.open(running.socket_path()) as store:
            for domid, name in ((GUEST, "web"), (OTHER, "mail")):
                running.add_domain(domid, name, UUID.format(domid))
                store.write(f"/libxl/{domid}/type", "pvh")
        yield running


@pytest.fixture
def store(server):
    with Store.open(server.socket_path()) as result:
        yield result


@pytest.fixture
def guest(server):
    """See xenstore as the guest does."""
    with Store.open(server.socket_path(GUEST)) as result:
        yield result


@pytest.fixture
def observer(server):
    """Be somebody else in dom0, with a connection of its own."""
    with Store.open(server.socket_path()) as result:
        yield result


@pytest.fixture
def before_the_first(monkeypatch):
    """Give a function that has another one called before the first request of a kind is sent."""

    def arrange(kind, act):
        def send(router, request):
            if request.op == getattr(xenstore.Op, kind):
                monkeypatch.undo()
                act()
            return post(router, request)

        post = xenstore._Router._post
        monkeypatch.setattr(xenstore._Router, "_post", send)

    return arrange


def plug(store, address=XVDB, **changes):
    options = {
        "backend_keys": KEYS,
        "params": "raw:/images/größe 100%.img",
        "read_only": False,
        "pid": 4711,
        **changes,
    }
    attach(store, address, from_number(address.devid), **options)


def nodes_of(address, dev, mode="w"):
    """Write out every node that stands for a disk, as libxl makes them."""
    back = f"/local/domain/0/backend/{address.kind}/{address.frontend_domid}/{address.devid}"
    front = f"/local/domain/{address.frontend_domid}/device/vbd/{address.devid}"
    tool = f"/libxl/{address.frontend_domid}/device/vbd/{address.devid}"
    shared = {
        "frontend": front,
        "frontend-id": str(address.frontend_domid),
        "params": "raw:/images/gr%C3%B6%C3%9Fe 100%25.img",
        "type": address.kind,
        "dev": dev,
        "mode": mode,
        "device-type": "disk",
        "removable": "0",
        "bootable": "1",
        "specification": "xen",
        "online": "1",
        "xen-disk-pid": "4711",
        **KEYS,
        **({"script": "/bin/true"} if address.kind == "vbd3" else {}),
    }
    directories = {
        back: shared,
        front: {
            "backend": back,
            "backend-id": "0",
            "virtual-device": str(address.devid),
            "device-type": "disk",
            "trusted": "1",
            "state": "1",
        },
        tool: {**shared, "backend": back},
    }
    nodes = {}
    for directory, keys in directories.items():
        parts = directory.split("/")
        nodes.update({"/".join(parts[:count]): "" for count in range(2, len(parts) + 1)})
        nodes.update({f"{directory}/{name}": value for name, value in keys.items()})
    return nodes


def tree_of(server):
    """Give all values, as everybody finds them now."""
    return {path: node.value.decode("ascii") for path, node in server.nodes.items()}


def permissions_of(server, under=""):
    nodes = server.nodes.items()
    return {path: list(node.permissions) for path, node in nodes if path.startswith(under)}


class TestDomains:
    def test_all_that_run_are_listed_by_id(self, server, store):
        server.add_domain(12, "twelve", UUID.format(12))

        assert [
            Domain(0, "Domain-0", "00000000-0000-0000-0000-000000000000"),
            Domain(5, "web", UUID.format(5)),
            Domain(7, "mail", UUID.format(7)),
            Domain(12, "twelve", UUID.format(12)),
        ] == domains(store)

    def test_what_is_no_domain_is_not_listed(self, store):
        store.write("/local/domain/template/name", "x")

        assert [0, GUEST, OTHER] == [domain.domid for domain in domains(store)]

    def test_a_domain_may_have_neither_name_nor_uuid(self, store):
        store.write("/local/domain/9", "")
        store.remove("/local/domain/0/name")

        assert Domain(9, "", "") == domains(store)[-1]
        assert "(no name) (domain 9)" == str(domains(store)[-1])
        assert "Domain-0" == domains(store)[0].name

    def test_it_shows_as_its_name_and_id(self):
        assert "web (domain 5)" == str(Domain(5, "web", ""))


class TestFindDomain:
    @pytest.mark.parametrize(
        "text",
        [
            "5",
            "web",
            UUID.format(5),
            UUID.format(5).replace("-", ""),
            "{" + UUID.format(5) + "}",
        ],
    )
    def test_it_is_found_by_id_uuid_or_name(self, store, text):
        assert Domain(GUEST, "web", UUID.format(5)) == find_domain(store, text)

    def test_the_case_of_a_uuid_does_not_matter(self, server, store):
        server.add_domain(9, "lower", "abcdefab-cdef-abcd-efab-cdefabcdefab")
        server.add_domain(10, "upper", "FEDCBAFE-DCBA-FEDC-BAFE-DCBAFEDCBAFE")

        assert 9 == find_domain(store, "ABCDEFAB-CDEF-ABCD-EFAB-CDEFABCDEFAB").domid
        assert 10 == find_domain(store, "fedcbafe-dcba-fedc-bafe-dcbafedcbafe").domid

    def test_an_id_counts_before_a_name(self, server, store):
        server.add_domain(9, "5", UUID.format(9))

        assert GUEST == find_domain(store, "5").domid

    def test_a_name_of_digits_is_found_if_no_id_is(self, server, store):
        server.add_domain(9, "2024", UUID.format(9))

        assert 9 == find_domain(store, "2024").domid

    def test_a_uuid_counts_before_a_name(self, server, store):
        server.add_domain(9, UUID.format(GUEST), UUID.format(9))

        assert GUEST == find_domain(store, UUID.format(GUEST)).domid

    def test_a_name_like_a_uuid_is_found_if_no_uuid_is(self, server, store):
        server.add_domain(9, UUID.format(99), UUID.format(9))

        assert 9 == find_domain(store, UUID.format(99)).domid

    def test_of_two_of_one_name_the_ids_are_told(self, server, store):
        server.add_domain(9, "web", UUID.format(9))
        with pytest.raises(GuestNotFound, match=r"several domains are named 'web'.*: 5, 9$"):
            find_domain(store, "web")

    @pytest.mark.parametrize(
        "text", ["", "we", "Web", "web ", "6", "-5", "5.0", "0x5", "²", "9" * 5000, UUID.format(8)]
    )
    def test_where_there_is_none_the_running_are_told(self, store, text):
        with pytest.raises(GuestNotFound) as caught:
            find_domain(store, text)
        expected = f"no domain {text!r} is running; running are: 0 Domain-0, 5 web, 7 mail"
        assert expected == str(caught.value)

    def test_where_none_runs_that_is_told(self, store):
        store.remove("/local/domain")
        with pytest.raises(GuestNotFound, match="running are: none"):
            find_domain(store, "web")


class TestHost:
    def test_the_domain_we_are_is_read(self, store, guest):
        assert 0 == own_domid(store)
        assert GUEST == own_domid(guest)

    def test_without_a_domid_we_are_dom0(self, store):
        store.remove("/local/domain/0/domid")

        assert 0 == own_domid(store)

    @pytest.mark.parametrize(
        ("files", "version"),
        [
            ({"major": "4\n", "minor": "17\n"}, (4, 17)),
            ({"major": "4\n", "minor": "20\n"}, (4, 20)),
            ({"major": "4\n"}, None),
            ({"major": "4\n", "minor": "<denied>\n"}, None),
            ({}, None),
        ],
    )
    def test_the_version_is_read_or_none_at_all(self, monkeypatch, files, version):
        def fake(path, encoding):
            name = path.replace("/sys/hypervisor/version/", "")
            if name not in files:
                raise FileNotFoundError(path)
            return io.StringIO(files[name])

        monkeypatch.setattr(toolstack, "open", fake, raising=False)

        assert version == xen_version()

    @pytest.mark.parametrize(
        ("version", "device_model", "kind"),
        [
            (None, False, "vbd3"),
            (None, True, "vbd3"),
            ((4, 0), False, "qdisk"),
            ((4, 18), False, "qdisk"),
            ((4, 18), True, "vbd3"),
            ((4, 19), False, "vbd3"),
            ((4, 19), True, "vbd3"),
            ((4, 20), False, "vbd3"),
            ((5, 0), False, "vbd3"),
            ((3, 99), False, "qdisk"),
        ],
    )
    def test_the_kind_is_one_that_libxl_minds_and_no_qemu(self, store, version, device_model, kind):
        store.write(f"/local/domain/0/device-model/{OTHER}/state", "running")
        if device_model:
            store.write(f"/local/domain/0/device-model/{GUEST}/state", "running")

        assert kind == choose_kind(store, GUEST, version)
        is_known = kind == "qdisk" or version is None or version >= (4, 19)
        assert is_known == can_xl_detach(kind, version)


class TestDevices:
    def test_none_is_taken_at_first(self, store):
        assert set() == taken(store, GUEST)
        assert parse("xvda") == free_device(store, GUEST)

    def test_what_either_side_knows_is_taken(self, store):
        store.write(f"/local/domain/{GUEST}/device/vbd/51712", "")
        store.write(f"/local/domain/{GUEST}/device/vbd/51728", "")
        store.write(f"/libxl/{GUEST}/device/vbd/51728", "")
        store.write(f"/libxl/{GUEST}/device/vbd/51760", "")
        store.write(f"/libxl/{GUEST}/device/vbd/nonsense", "")
        store.write(f"/local/domain/{OTHER}/device/vbd/51744", "")

        assert {51712, 51728, 51760} == taken(store, GUEST)
        assert parse("xvdc") == free_device(store, GUEST)

    def test_gaps_are_filled(self, store):
        for name in ("xvda", "xvdb", "xvdc"):
            plug(store, Address(0, GUEST, parse(name).number, "vbd3"))
        detach(store, XVDB)

        assert parse("xvdb") == free_device(store, GUEST)
        assert parse("xvda") == free_device(store, OTHER)


class TestAttach:
    @pytest.mark.parametrize("kind", ["vbd3", "qdisk"])
    @pytest.mark.parametrize(("read_only", "mode"), [(False, "w"), (True, "r")])
    def test_it_makes_the_nodes_that_libxl_makes(self, server, store, kind, read_only, mode):
        address = Address(0, GUEST, 51728, kind)
        before = tree_of(server)
        plug(store, address, read_only=read_only)

        assert {**before, **nodes_of(address, "xvdb", mode)} == tree_of(server)

    def test_xl_finds_what_it_needs_to_list_it(self, store):
        plug(store)

        keys = set(store.list(XVDB.toolstack))
        assert {"backend", "type", "dev", "removable", "mode", "device-type", "params"} <= keys

    def test_a_cdrom_is_told_to_the_guest_and_to_libxl(self, server, store):
        plug(store, read_only=True, cdrom=True)

        tree = tree_of(server)
        expected = {"device-type": "cdrom", "removable": "1", "mode": "r"}
        for path in (XVDB.backend, XVDB.toolstack):
            assert expected == {name: tree[f"{path}/{name}"] for name in expected}
        assert "cdrom" == tree[f"{XVDB.frontend}/device-type"]

    def test_nodes_belong_to_whom_they_should(self, server, store):
        plug(store)

        for path, expected in (
            (XVDB.frontend, ["n5", "r0"]),
            (XVDB.backend, ["n0", "r5"]),
            (XVDB.toolstack, ["n0"]),
        ):
            permissions = permissions_of(server, under=path)
            assert dict.fromkeys(permissions, expected) == permissions

    def test_the_guest_may_read_the_backend_and_write_its_own_half_only(self, server, store, guest):
        plug(store)
        seen = {**guest.tree(XVDB.frontend), **guest.tree(XVDB.backend)}
        made = nodes_of(XVDB, "xvdb").items()
        assert {p: v for p, v in made if p.startswith((XVDB.frontend, XVDB.backend))} == seen

        before = tree_of(server)
        for name in [*store.list(XVDB.backend), "new"]:
            with contextlib.suppress(StoreError):
                guest.write(f"{XVDB.backend}/{name}", "1")
            with contextlib.suppress(StoreError):
                guest.remove(f"{XVDB.backend}/{name}")
        with contextlib.suppress(StoreError):
            guest.create(XVDB.backend, ["b5"], {})
        assert before == tree_of(server)
        with pytest.raises(StoreError) as caught:
            guest.read(XVDB.toolstack)
        assert errno.EACCES == caught.value.errno
        guest.write(f"{XVDB.frontend}/state", "3")
        assert "3" == store.read(f"{XVDB.frontend}/state")

    def test_another_guest_sees_nothing_of_it(self, server, store):
        plug(store)
        with Store.open(server.socket_path(OTHER)) as stranger:
            for path in XVDB.directories:
                with pytest.raises(StoreError) as caught:
                    stranger.read(path)
                assert errno.EACCES == caught.value.errno

    def test_nothing_shows_before_all_of_it_does(self, server, store, monkeypatch):
        def look(router, request):
            sent.append(request)
            assert before == tree_of(server)
            return post(router, request)

        sent = []
        post = xenstore._Router._post
        before = tree_of(server)
        monkeypatch.setattr(xenstore._Router, "_post", look)
        plug(store)

        assert len(sent) > 30
        assert {**before, **nodes_of(XVDB, "xvdb")} == tree_of(server)

    def test_a_watcher_in_the_guest_finds_all_readable_as_soon_as_it_fires(self, store, guest):
        guest.watch(f"/local/domain/{GUEST}/device")
        guest.pending()
        plug(store)
        poller = select.poll()
        poller.register(guest.fileno(), select.POLLIN)
        deadline = time.monotonic() + 30
        while not guest.pending():
            assert poller.poll((deadline - time.monotonic()) * 1000)

        assert ["n5", "r0"] == guest.get_permissions(XVDB.frontend)
        expected = nodes_of(XVDB, "xvdb")
        for path in (XVDB.frontend, XVDB.backend):
            for node, value in guest.tree(path).items():
                assert expected[node] == value
        assert XVDB.backend == guest.read(f"{XVDB.frontend}/backend")

    @pytest.mark.parametrize("path", XVDB.directories)
    def test_a_device_that_is_there_is_taken_and_stays_as_it_is(self, server, store, path):
        store.write(f"{path}/state", "4")
        before = tree_of(server)
        with pytest.raises(DeviceTaken, match=f"xvdb is taken in domain {GUEST}; choose another"):
            plug(store)
        assert before == tree_of(server)

    @pytest.mark.parametrize("path", XVDB.directories)
    @pytest.mark.parametrize("when", ["MKDIR", "SET_PERMS", "WRITE"])
    def test_one_who_is_quicker_keeps_the_device_and_nothing_of_ours_is_left(
        self, server, store, observer, before_the_first, path, when
    ):
        def meanwhile():
            observer.write(f"{path}/state", "1")
            expected.append(tree_of(server))

        expected = []
        before_the_first(when, meanwhile)
        with pytest.raises(DeviceTaken):
            plug(store)
        assert expected == [tree_of(server)]

    def test_other_changes_meanwhile_do_not_hinder(self, server, store, observer, before_the_first):
        before = tree_of(server)
        before_the_first("MKDIR", lambda: plug(observer, Address(0, GUEST, 51744, "vbd3")))
        plug(store)
        second = nodes_of(Address(0, GUEST, 51744, "vbd3"), "xvdc")
        assert {**before, **nodes_of(XVDB, "xvdb"), **second} == tree_of(server)

    def test_few_answers_are_waited_for(self, store, monkeypatch):
        def wait(router):
            sleeps.append(router)
            return exchange(router)

        sleeps = []
        exchange = xenstore._Router._exchange
        monkeypatch.setattr(xenstore._Router, "_exchange", wait)
        plug(store)

        assert 6 == len(sleeps)  # begin; is it free; three trees; commit

    def test_a_guest_that_has_gone_gets_nothing(self, server, store):
        server.remove_domain(GUEST)
        before = tree_of(server)
        with pytest.raises(DeviceError, match=f"domain {GUEST} has gone"):
            plug(store)
        assert before == tree_of(server)

    def test_what_xenstore_refuses_leaves_nothing(self, server, store):
        before = tree_of(server)
        with pytest.raises(StoreError):
            plug(store, params="x" * 5000)
        assert before == tree_of(server)


class TestDetach:
    def test_the_tree_is_as_it_was(self, server, store):
        before = permissions_of(server), tree_of(server)
        plug(store)
        detach(store, XVDB)

        assert before == (permissions_of(server), tree_of(server))

    def test_again_it_does_nothing(self, server, store):
        before = tree_of(server)
        detach(store, XVDB)
        plug(store)
        detach(store, XVDB)
        detach(store, XVDB)

        assert before == tree_of(server)

    def test_what_the_guest_made_goes_with_it(self, server, store, guest):
        before = tree_of(server)
        plug(store)
        guest.write(f"{XVDB.frontend}/ring-ref", "8")
        guest.write(f"{XVDB.frontend}/a/b/c/d", "x")
        detach(store, XVDB)

        assert before == tree_of(server)

    @pytest.mark.parametrize("path", XVDB.directories)
    def test_what_is_half_gone_goes(self, server, store, path):
        before = tree_of(server)
        plug(store)
        store.remove(path)
        detach(store, XVDB)

        assert before == tree_of(server)

    def test_of_a_guest_that_has_gone_nothing_of_ours_is_left(self, server, store):
        plug(store)
        server.remove_domain(GUEST)
        detach(store, XVDB)

        left = [path for path in tree_of(server) if f"/{GUEST}/" in path or "backend" in path]
        assert [f"/libxl/{GUEST}/type"] == left

    def test_other_devices_stay_whatever_comes_and_goes(self, server, store):
        dice = random.Random(1)
        before = tree_of(server)
        names = {parse(name).number: name for name in ("xvda", "xvdb", "xvdq", "xvdc1")}
        addresses = [
            Address(0, domid, number, kind)
            for domid in (GUEST, OTHER)
            for number in names
            for kind in ("vbd3", "qdisk")
        ]
        there = set()
        for _ in range(40):
            address = dice.choice(addresses)
            same = {other for other in there if other.frontend == address.frontend}
            if address in there:
                detach(store, address)
                there.remove(address)
            elif same:
                with pytest.raises(DeviceTaken):
                    plug(store, address)
            else:
                plug(store, address)
                there.add(address)

            expected = dict(before)
            for one in there:
                expected.update(nodes_of(one, names[one.devid]))
            assert expected == tree_of(server)
            assert there == {disk.address for disk in attached(store)}
        for address in there:
            detach(store, address)
        assert before == tree_of(server)

    def test_a_device_of_something_else_keeps_its_directories(self, server, store):
        store.write(f"/local/domain/{GUEST}/device/vif/0/state", "4")
        store.write(f"/local/domain/0/backend/vif/{GUEST}/0/state", "4")
        store.write(f"/libxl/{GUEST}/device/vif/0/backend", "x")
        before = tree_of(server)
        plug(store)
        detach(store, XVDB)

        assert before == tree_of(server)

    def test_it_happens_all_at_once(self, server, store, monkeypatch):
        remove = Store.remove

        def look(self, path):
            seen.append(tree_of(server))
            remove(self, path)

        plug(store)
        before, seen = tree_of(server), []
        monkeypatch.setattr(Store, "remove", look)
        detach(store, XVDB)

        assert len(seen) > 3
        assert [before] * len(seen) == seen


class TestAttached:
    def test_a_disk_shows_as_it_was_attached(self, store, guest):
        plug(store, read_only=True)
        guest.write(f"{XVDB.frontend}/state", "3")

        assert [
            Attached(
                XVDB,
                parse("xvdb"),
                4711,
                "raw:/images/größe 100%.img",
                True,
                State.INIT_WAIT,
                State.INITIALISED,
            )
        ] == list(attached(store))

    def test_a_file_name_that_is_no_text_comes_back_whole(self, store):
        name = b"raw:/\xff\x00\n%41".decode("utf-8", "surrogateescape")
        plug(store, params=name)

        assert [name] == [disk.params for disk in attached(store)]

    def test_those_of_one_domain_or_of_all(self, store):
        addresses = [
            Address(0, GUEST, 51712, "vbd3"),
            Address(0, OTHER, 51712, "vbd3"),
            Address(0, GUEST, 51728, "qdisk"),
        ]
        for address in addresses:
            plug(store, address)

        assert addresses == [disk.address for disk in attached(store)]
        assert [addresses[0], addresses[2]] == [disk.address for disk in attached(store, GUEST)]
        assert [addresses[1]] == [disk.address for disk in attached(store, OTHER)]
        assert [] == list(attached(store, 9))

    def test_what_others_serve_is_not_ours(self, store):
        root = "/local/domain/0/backend"
        for path in (
            f"{root}/vbd3/{GUEST}/51712/state",  # a tapdisk's
            f"{root}/qdisk/{GUEST}/51712/state",  # a QEMU's
            f"{root}/vbd/{GUEST}/51728/xen-disk-pid",  # the kernel's
            f"{root}/vbd3/{GUEST}/nonsense/xen-disk-pid",
            f"{root}/vbd3/nonsense/51712/xen-disk-pid",
        ):
            store.write(path, "4")
        store.write(f"{root}/vbd3/{GUEST}/51728/xen-disk-pid", "none")

        assert [] == list(attached(store))

    def test_one_that_is_half_gone_shows_what_is_left(self, store):
        plug(store)
        store.remove(XVDB.frontend)
        for name in ("dev", "params", "mode", "state"):
            store.remove(f"{XVDB.backend}/{name}")

        (disk,) = attached(store)
        assert "51728" == disk.device.name
        assert ("", False, None, None) == disk[3:]

    def test_a_state_that_the_guest_made_up_is_unknown(self, store, guest):
        plug(store)
        guest.write(f"{XVDB.frontend}/state", "on fire")

        assert [State.UNKNOWN] == [disk.frontend_state for disk in attached(store)]


@pytest.mark.parametrize("comes", [True, False])
def test_a_disk_that_comes_or_goes_with_a_hundred_others(server, store, comes, monkeypatch):
    """Each of their transactions undoes one of ours: all change the same directory."""
    if not comes:
        plug(store)
    parent, others = XVDB.backend.rpartition("/")[0], list(range(100))
    ask = Store._ask
    with Store.open(server.socket_path()) as other:

        def ask_and_be_overtaken(self, what, call, *arguments):
            if self is store and what == "cannot commit a transaction" and others:
                other.write(f"{parent}/{others.pop()}", "")
            return ask(self, what, call, *arguments)

        monkeypatch.setattr(Store, "_ask", ask_and_be_overtaken)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        if comes:
            plug(store)
        else:
            detach(store, XVDB)
        assert comes is store.exists(XVDB.backend)
    assert not others


def test_a_guest_that_writes_without_end_keeps_nobody_from_removing_its_disk(
    server, store, guest, monkeypatch
):
    """Each of its writes would undo a transaction that has touched what it may write to."""
    plug(store)
    ask = Store._ask

    def ask_and_be_disturbed(self, what, call, *arguments):
        if self is store and guest.exists(XVDB.frontend):
            guest.write(f"{XVDB.frontend}/state", "1")
        return ask(self, what, call, *arguments)

    monkeypatch.setattr(Store, "_ask", ask_and_be_disturbed)
    detach(store, XVDB)
    assert not [path for path in tree_of(server) if "51728" in path]
